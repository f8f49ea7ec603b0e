"""Trajectory LoRA: at each denoising step a low-rank push on the frozen denoiser's states, with rank by noise level.

    h <- h + sigma(t) * A ReLU(B [norm(h); Emb(t)])          (after LoRA-Diffusion, whose own design is in paper.py)

Up-projections A start at zero, so a fresh adapter changes nothing. Bands of noise levels are nested: they share one A
and B, of which a band uses the first r(t) rank units, so that the largest rank alone is stored. Two recipes of it:
  - `best` has sites before each of the last blocks and on the final state, so that frozen attention carries what is
    pushed between positions. All sites share A and B, of a rank that none could afford alone, and weigh the units
    each for itself;
  - `fast` has one site, the final state, and so nothing of the base in its gradient. It reads a learned mix of the
    states of all depths, and its attending units move information between positions: what they find in the prompt
    (low-rank attention with rectified values) is pushed, and the rank units read it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld.attention import HIDDEN, attention
from tinyld.config import ModelConfig, Settings, check, setting
from tinyld.methods import paper
from tinyld.methods.contract import Method
from tinyld.methods.paper import NUM_BANDS, TIME_WIDTH, Noise, band_of, time_embedding
from tinyld.model import Denoiser, PushAt, take


@dataclass(frozen=True)
class TrajectoryLoraConfig(Settings):
    recipe: str = setting("best", among=("best", "fast", "paper"))
    ranks: tuple[int, ...] = setting((64, 64, 64), least=1)  # by band, high noise first
    sigma: tuple[float, ...] = (1.0, 1.0, 1.0)  # by band, high noise first
    blocks: int = setting(6, least=0)  # best: sites before each of the last `blocks` blocks, and on the final state
    attend: int | None = setting(None, least=1)  # fast: units that attend to the prompt; None: as many as rank units
    dropout: float = setting(0.0, least=0, below=1)  # share of the numbers read that an update does without

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (("ranks", self.ranks), ("sigma", self.sigma)):
            check(len(values) == NUM_BANDS, f"{name} needs {NUM_BANDS} values, high noise first, got {values}")
        check(self.recipe == "best" or self.blocks == 0, f"recipe {self.recipe} pushes the final state only: blocks 0")
        check(self.attend is None or self.recipe == "fast", f"recipe {self.recipe} has no attending units")
        check(self.recipe != "paper" or self.dropout == 0, "recipe paper is the paper's own, without dropout")

    @property
    def attending(self) -> int:
        return max(self.ranks) if self.attend is None else self.attend


class Recipe(NamedTuple):
    config: TrajectoryLoraConfig
    budget: float | None  # as a share of the base
    rates: dict[str, float]  # of the optimizers, the usual one first, as a method's
    post_norm: dict[str, float]
    post_norm_options: dict[str, Any] = {}


# Ours within 0.7%: `best` the most accurate, `fast` the cheapest to train. Their bands have one rank and one sigma, as
# that wrote better than more where there is more noise. The one site of `fast` has less of a hold than seven that share
# their units, and takes larger steps; the better its base, the more it learns by heart.
BEST_RATES = {"muon": 3e-3, "adamw": 5e-3}, {"muon": 2e-3, "adamw": 1e-3}
FAST_RATES = {"muon": 6e-3, "adamw": 1e-2}, {"adamw": 4e-3, "muon": 4e-3}
RECIPES = {
    "best": Recipe(TrajectoryLoraConfig(), 0.007, *BEST_RATES, {"blocks": 4}),
    "fast": Recipe(TrajectoryLoraConfig("fast", blocks=0, dropout=0.1), 0.007, *FAST_RATES, {"dropout": 0.3}),
    "paper": Recipe(TrajectoryLoraConfig("paper", paper.RANKS, paper.SIGMA, blocks=0), None, *BEST_RATES),
}


class RankUnits(nn.Module):
    """The rank units of one site. All sites of a push share A (`up`) and B (`down`), and weigh the units by a gain."""

    def __init__(
        self, config: TrajectoryLoraConfig, width: int, generator: torch.Generator | None,
        shared: RankUnits | None = None,
    ):  # fmt: skip
        super().__init__()
        units, self.dropout = max(config.ranks), config.dropout
        self.down = shared.down if shared else normal(units, width + TIME_WIDTH, fan_in=width, generator=generator)
        self.up = shared.up if shared else nn.Parameter(torch.zeros(width, units))
        self.gain = nn.Parameter(torch.ones(units)) if config.blocks else None
        sigma, is_used = torch.tensor(config.sigma), torch.arange(units) < torch.tensor(config.ranks)[:, None]
        self.register_buffer("sigma", sigma, persistent=False)  # (NUM_BANDS,)
        self.register_buffer("scale", sigma[:, None] * is_used, persistent=False)  # (NUM_BANDS, units)

    def forward(self, h: Tensor, noise: Noise, history: Sequence[Tensor], positions: Tensor | None) -> Tensor:
        """What is added to h (B, L, D), or to it at `positions` (B, M) alone, (B, M, D)."""
        h = h if positions is None else take(h, positions)
        x = F.dropout(F.layer_norm(h, h.shape[-1:]), self.dropout, self.training)
        return self.add(x, noise)

    def add(self, x: Tensor, noise: Noise, attended: Tensor | float = 0.0) -> Tensor:
        """sigma(t) A ReLU(B [x; Emb(t)] + attended): (B, L, D) -> (B, L, D)"""
        width, up = x.shape[-1], self.up if self.gain is None else self.up * self.gain
        hidden = x @ self.down[:, :width].T + (noise.time @ self.down[:, width:].T)[:, None, :] + attended
        return (F.relu(hidden) * self.scale[noise.band][:, None, :]) @ up.T


class AttendingUnits(RankUnits):
    """The site of `fast`: rank units, and units that attend to the prompt, on a mix of the states of all depths."""

    def __init__(self, config: TrajectoryLoraConfig, width: int, depths: int, generator: torch.Generator | None):
        """`depths` are mixed, the site's own included."""
        super().__init__(config, width, generator)
        units = config.attending
        self.mix = nn.Parameter(torch.zeros(depths))
        self.attention = normal(3, units, width, fan_in=width, generator=generator)  # query, key, value
        self.attended = nn.Parameter(torch.zeros(width, units))
        self.down_attended = normal(len(self.down), units, fan_in=units, generator=generator)

    def forward(
        self, h: Tensor, noise: Noise, history: Sequence[Tensor] = (), positions: Tensor | None = None
    ) -> Tensor:
        if isinstance(history, Tensor):  # (depths, B, L, D) of all, normalised once for several pushes that read them
            with torch.autocast(h.device.type, enabled=False):
                x = (self.mix.softmax(0) @ history.flatten(1)).view(h.shape)
        else:
            x = torch.zeros_like(h)
            for state, share in zip([*history[: len(self.mix) - 1], h], self.mix.softmax(0).to(h.dtype), strict=True):
                x = x + F.layer_norm(state, h.shape[-1:]) * share
        x = F.dropout(x, self.dropout, self.training)
        here = x if positions is None else take(x, positions)
        found = self.attend(here, x, noise.prompt_mask)
        push = self.add(here, noise, found @ self.down_attended.T)
        return push + (found * self.sigma[noise.band][:, None, None]) @ self.attended.T

    def attend(self, here: Tensor, x: Tensor, prompt_mask: Tensor) -> Tensor:
        """What each unit finds in the prompt of x (B, L, D) for the states `here` (B, M, D): (B, M, units)."""
        query, key, value = self.attention
        q, k, v = here @ query.T, x @ key.T, F.relu(x @ value.T)  # heads of width 1
        if q.shape[1] == 1:  # whose scores are no matrix product
            weights = (k * q).masked_fill(~prompt_mask[..., None], HIDDEN).softmax(1)
            return (weights * v).sum(1, keepdim=True)
        q, k, v = (of.mT[..., None] for of in (q, k, v))
        return attention(q, k, v, prompt_mask)[..., 0].mT


def normal(*shape: int, fan_in: int, generator: torch.Generator | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).normal_(0.0, fan_in**-0.5, generator=generator))


class TrajectoryPush(nn.Module):
    """Hangs on `Denoiser.push`: a site at every depth from `first_depth` to num_layers, the final state."""

    def __init__(self, config: TrajectoryLoraConfig, model_config: ModelConfig, generator: torch.Generator | None):
        super().__init__()
        width, last = model_config.d_model, model_config.num_layers
        self.first_depth = last - config.blocks
        self.depths = list(range(self.first_depth, last + 1))
        self.reads_depths, self.reads_others = config.recipe == "fast", config.recipe != "best"
        if config.recipe == "paper":
            sites: list[nn.Module] = [paper.PaperUnits(config.ranks, config.sigma, width, generator)]
        elif config.recipe == "fast":
            sites = [AttendingUnits(config, width, last + 1, generator)]
        else:
            first = RankUnits(config, width, generator)
            sites = [first, *(RankUnits(config, width, generator, first) for _ in range(config.blocks))]
        self.sites = nn.ModuleList(sites)

    def start(self, t: Tensor, prompt_mask: Tensor, history: Sequence[Tensor] = ()) -> PushAt:
        noise = Noise(band_of(t), time_embedding(t), prompt_mask)

        def push_at(depth: int, h: Tensor, positions: Tensor | None = None) -> Tensor:
            return self.sites[depth - self.first_depth](h, noise, history, positions)

        return push_at


class TrajectoryLora(Method):
    name, Config = "trajectory-lora", TrajectoryLoraConfig
    rates, post_norm = BEST_RATES

    def __init__(self, config: TrajectoryLoraConfig, model_config: ModelConfig):
        super().__init__(config, model_config)
        most = model_config.num_layers
        check(config.blocks <= most, f"blocks must be at most the base's {most}, got {config.blocks}")

    @classmethod
    def make_config(cls, options: Mapping[str, Any], model_config: ModelConfig) -> TrajectoryLoraConfig:
        given = {name: value for name, value in options.items() if value is not None}
        recipe = RECIPES[given.pop("recipe", "best")]
        budget = given.pop("budget", None if "ranks" in given else recipe.budget)
        config = replace(recipe.config, **({} if model_config.norm_first else recipe.post_norm_options))
        config = replace(config, blocks=min(config.blocks, model_config.num_layers))
        config = cls.fit_budget(cls.configure(config, given), model_config, budget)
        return replace(config, attend=config.attending) if config.recipe == "fast" else config

    @classmethod
    def usual_rates(cls, model_config: ModelConfig, recipe: str | None) -> dict[str, float]:
        own = RECIPES[recipe or "best"]
        return own.rates if model_config.norm_first else own.post_norm

    def install(self, model: Denoiser, generator: torch.Generator | None) -> dict[str, nn.Parameter]:
        self.push = model.push = TrajectoryPush(self.config, self.model_config, generator).to(model.device)
        return dict(self.push.named_parameters())

    @classmethod
    def expected_parameters(cls, config: TrajectoryLoraConfig, model_config: ModelConfig) -> int:
        d, units = model_config.d_model, max(config.ranks)
        if config.recipe == "paper":
            return paper.MODULES * sum(config.ranks) * (3 * d + TIME_WIDTH)
        if config.recipe == "fast":
            return (
                units * (2 * d + TIME_WIDTH + config.attending) + 4 * d * config.attending + model_config.num_layers + 1
            )
        gains = config.blocks + 1 if config.blocks else 0  # one a site
        return units * (2 * d + TIME_WIDTH + gains)

    @classmethod
    def with_rank(cls, config: Any, rank: int) -> TrajectoryLoraConfig:
        """The same proportion between bands, with `rank` in the largest."""
        top = max(config.ranks)
        return replace(config, ranks=tuple(max(1, round(rank * r / top)) for r in config.ranks))

    def penalty(self) -> Tensor | None:
        return self.push.sites[0].penalty() if self.config.recipe == "paper" else None

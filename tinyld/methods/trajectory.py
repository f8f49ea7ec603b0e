"""Trajectory LoRA: at each denoising step a low-rank push on the frozen denoiser's states, with rank by noise level.

    h <- h + sigma(t) * A ReLU(B [norm(h); Emb(t)])          (after LoRA-Diffusion, whose own design is in paper.py)

Up-projections A start at zero, so a fresh adapter changes nothing. Bands of noise levels are nested: they share one A
and B, of which a band uses the first r(t) rank units, so that the largest rank alone is stored. Two recipes of it:
  - `best` has sites before each of the last blocks and on the final state, so that frozen attention carries what is
    pushed between positions. All sites share A and B, of a rank that none could afford alone, and weigh the units
    each for itself;
  - `fast` has one site, the final state, and so nothing of the base in its gradient. It reads a learned mix of the
    states of all depths, or of 8 where there are more, and its attending units move information between positions:
    what they find in the prompt (low-rank attention with rectified values) is pushed, and the rank units read it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld.attention import HIDDEN, attention
from tinyld.config import ModelConfig, Settings, check, setting
from tinyld.methods import paper
from tinyld.methods.contract import Method
from tinyld.methods.paper import NUM_BANDS, TIME_WIDTH, Noise, band_of, normal, time_embedding
from tinyld.model import Denoiser, PushAt, depths_read, take

AUTO, PRUNED = "auto", 0.5  # --set ranks=auto: half of the units that a run begins with are dropped,
PRUNED_FROM, PRUNED_TO = 0.2, 0.6  # in this part of the run
BY_UNIT = {"up": 1, "down": 0, "down_attended": 0}


@dataclass(frozen=True)
class TrajectoryLoraConfig(Settings):
    recipe: str = setting("best", among=("best", "fast", "paper"))
    # by band, high noise first; once units are pruned, site by site
    ranks: tuple[int, ...] = setting((64, 64, 64), least=1)
    sigma: tuple[float, ...] = (1.0, 1.0, 1.0)  # by band, high noise first
    blocks: int = setting(6, least=0)  # best: sites before each of the last `blocks` blocks, and on the final state
    attend: int | None = setting(None, least=1)  # fast: units that attend to the prompt; None: as many as rank units
    dropout: float = setting(0.0, least=0, below=1)  # share of the numbers read that an update does without
    prune: float = setting(0.0, least=0, below=1)  # share of the rank units that training drops, the weakest first

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.sigma) == NUM_BANDS, f"sigma needs {NUM_BANDS} values, high noise first, got {self.sigma}")
        check(self.recipe == "best" or self.blocks == 0, f"recipe {self.recipe} pushes the final state only: blocks 0")
        many = f"ranks needs {NUM_BANDS} values, high noise first, or as many a site, got {self.ranks}"
        check(len(self.ranks) in (NUM_BANDS, NUM_BANDS * self.num_sites), many)
        check(self.attend is None or self.recipe == "fast", f"recipe {self.recipe} has no attending units")
        fixed = self.prune == 0 and self.dropout == 0
        check(self.recipe != "paper" or fixed, "recipe paper is the paper's own: neither ranks auto nor dropout")

    @property
    def num_sites(self) -> int:
        return self.blocks + 1

    @property
    def is_tied(self) -> bool:
        """Whether the sites share A and B; ranks are pruned site by site."""
        return self.num_sites > 1 and self.prune == 0 and len(self.ranks) == NUM_BANDS

    @property
    def attending(self) -> int:
        return max(self.ranks) if self.attend is None else self.attend

    def site_ranks(self, site: int) -> tuple[int, ...]:
        """By band, high noise first; site 0 is the lowest."""
        return self.ranks if len(self.ranks) == NUM_BANDS else self.ranks[NUM_BANDS * site :][:NUM_BANDS]


class Recipe(NamedTuple):
    config: TrajectoryLoraConfig
    budget: float | None  # as a share of the base
    rates: dict[str, float]  # as a method's
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
    """The rank units of one site."""

    def __init__(self, config: TrajectoryLoraConfig, site: int, width: int, generator: torch.Generator | None):
        super().__init__()
        ranks, self.dropout = config.site_ranks(site), config.dropout
        self.down = normal(max(ranks), width + TIME_WIDTH, fan_in=width, generator=generator)
        self.up = nn.Parameter(torch.zeros(width, max(ranks)))
        self.gain = nn.Parameter(torch.ones(max(ranks))) if config.is_tied else None
        self.register_buffer("sigma", torch.tensor(config.sigma), persistent=False)  # by band
        self.register_buffer("ranks", torch.tensor(ranks), persistent=False)

    def forward(self, h: Tensor, noise: Noise, history: Sequence[Tensor], positions: Tensor | None) -> Tensor:
        """What is added to h (B, L, D), or to it at `positions` (B, M) alone, (B, M, D)."""
        h = h if positions is None else take(h, positions)
        x = F.dropout(F.layer_norm(h, h.shape[-1:]), self.dropout, self.training)
        return self.add(x, noise)

    def add(self, x: Tensor, noise: Noise, attended: Tensor | float = 0.0) -> Tensor:
        """sigma(t) A ReLU(B [x; Emb(t)] + attended): (B, L, D) -> (B, L, D)"""
        width, up = x.shape[-1], self.up if self.gain is None else self.up * self.gain
        hidden = x @ self.down[:, :width].T + (noise.time @ self.down[:, width:].T)[:, None, :] + attended
        is_used = torch.arange(len(self.down), device=x.device) < self.ranks[noise.band][:, None]  # (B, units)
        scale = self.sigma[noise.band][:, None] * is_used
        return (F.relu(hidden) * scale[:, None, :]) @ up.T

    def strength(self) -> Tensor:
        """(units,) ||a_u|| ||b_u||; infinite for the strongest of the units that all bands use: every site keeps it."""
        found = (self.up.norm(dim=0) * self.down.norm(dim=1)).detach()
        found[found[: self.ranks.min()].argmax()] = math.inf
        return found

    def by_unit(self) -> list[tuple[nn.Parameter, int]]:
        """The parameters that have a part for every rank unit, with the dimension that counts them."""
        return [(p, BY_UNIT[name]) for name, p in self.named_parameters() if name in BY_UNIT]


class AttendingUnits(RankUnits):
    """The site of `fast`: rank units, and units that attend to the prompt, on a mix of the states of several depths."""

    def __init__(self, config: TrajectoryLoraConfig, width: int, depths: int, generator: torch.Generator | None):
        """`depths` are mixed, the site's own included."""
        super().__init__(config, 0, width, generator)
        units = config.attending
        self.mix = nn.Parameter(torch.zeros(depths))
        self.attention = normal(3, units, width, fan_in=width, generator=generator)  # query, key, value
        self.attended = nn.Parameter(torch.zeros(width, units))
        self.down_attended = normal(len(self.down), units, fan_in=units, generator=generator)

    def forward(self, h: Tensor, noise: Noise, history: Sequence[Tensor], positions: Tensor | None) -> Tensor:
        if not isinstance(history, Tensor):  # (depths, B, L, D), normalised once for several pushes that read them
            states = [*history[: len(self.mix) - 1], h]
            history = torch.stack([F.layer_norm(state, h.shape[-1:]) for state in states])
        with torch.autocast(h.device.type, enabled=False):
            x = (self.mix.softmax(0) @ history.flatten(1).float()).view(h.shape)
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
        if q.is_cuda:  # whose fused attention takes heads of a multiple of 8, and divides by the root of their width
            q, k, v = (F.pad(of, (0, 7)) for of in (q * 8**0.5, k, v))
        return attention(q, k, v, prompt_mask)[..., 0].mT


class TrajectoryPush(nn.Module):
    """Hangs on `Denoiser.push`: a site at every depth from `first_depth` to num_layers, the final state."""

    def __init__(self, config: TrajectoryLoraConfig, model_config: ModelConfig, generator: torch.Generator | None):
        super().__init__()
        width, last = model_config.d_model, model_config.num_layers
        check(config.blocks <= last, f"blocks must be at most the base's {last}, got {config.blocks}")
        self.first_depth = last - config.blocks
        self.depths = list(range(self.first_depth, last + 1))
        self.reads_depths, self.reads_others = config.recipe == "fast", config.recipe != "best"
        if config.recipe == "paper":
            sites: list[nn.Module] = [paper.PaperUnits(config.ranks, config.sigma, width, generator)]
        elif config.recipe == "fast":
            sites = [AttendingUnits(config, width, len(depths_read(last)), generator)]
        else:
            sites = [RankUnits(config, site, width, generator) for site in range(config.num_sites)]
        for site in sites if config.is_tied else ():
            site.down, site.up = sites[0].down, sites[0].up
        self.sites = nn.ModuleList(sites)

    def start(self, t: Tensor, prompt_mask: Tensor, history: Sequence[Tensor] = ()) -> PushAt:
        noise = Noise(band_of(t), time_embedding(t), prompt_mask)

        def push_at(depth: int, h: Tensor, positions: Tensor | None = None) -> Tensor:
            return self.sites[depth - self.first_depth](h, noise, history, positions)

        return push_at


class TrajectoryLora(Method):
    name, Config, recipes = "trajectory-lora", TrajectoryLoraConfig, RECIPES

    @classmethod
    def make_config(cls, given: dict[str, Any], model_config: ModelConfig) -> TrajectoryLoraConfig:
        recipe = RECIPES[given.pop("recipe", "best")]
        if given.get("ranks") == AUTO:
            given["prune"] = PRUNED
            del given["ranks"]
        budget = given.pop("budget", None if "ranks" in given else recipe.budget)
        config = replace(recipe.config, **({} if model_config.norm_first else recipe.post_norm_options))
        config = replace(replace(config, blocks=min(config.blocks, model_config.num_layers)), **given)
        config = cls.fit_budget(config, model_config, budget)
        if config.recipe == "fast":
            config = replace(config, attend=config.attending)
        if budget is not None:  # once units are pruned, no more are left than fit
            config = replace(config, ranks=tuple(int(rank / (1.0 - config.prune)) for rank in config.ranks))
        return config

    def install(self, model: Denoiser, generator: torch.Generator | None) -> dict[str, nn.Parameter]:
        model.push = self.push = TrajectoryPush(self.config, model.config, generator).to(model.device)
        return dict(self.push.named_parameters())

    @classmethod
    def expected_parameters(cls, config: TrajectoryLoraConfig, model_config: ModelConfig) -> int:
        d, sites = model_config.d_model, config.num_sites
        if config.recipe == "paper":
            return paper.MODULES * sum(config.ranks) * (3 * d + TIME_WIDTH)
        unit = 2 * d + TIME_WIDTH
        if config.is_tied:
            return max(config.ranks) * (unit + sites)  # and a gain at every site
        units = sum(max(config.site_ranks(site)) for site in range(sites))
        if config.recipe == "best":
            return units * unit
        return units * (unit + config.attending) + 4 * d * config.attending + len(depths_read(model_config.num_layers))

    @classmethod
    def with_rank(cls, config: TrajectoryLoraConfig, rank: int) -> TrajectoryLoraConfig:
        """The same proportion between bands, with `rank` in the largest."""
        top = max(config.ranks)
        return replace(config, ranks=tuple(max(1, round(rank * r / top)) for r in config.ranks))

    @torch.no_grad()
    def after_update(self, progress: float) -> None:
        """Sets the weakest units of all sites to zero, as many as are due at `progress` of the run, and all that push
        nothing yet. One update later they are still next to zero, and so are chosen again."""
        if self.config.prune == 0 or progress < PRUNED_FROM:
            return
        sites, strength = self.push.sites, torch.cat([site.strength() for site in self.push.sites])
        share = self.config.prune * min(1.0, (progress - PRUNED_FROM) / (PRUNED_TO - PRUNED_FROM))
        due = min(math.ceil(share * len(strength) - 1e-9), len(strength) - len(sites))
        dropped = strength == 0
        dropped[strength.argsort(stable=True)[:due]] = True
        for site, of_site in zip(sites, dropped.split([len(site.down) for site in sites]), strict=True):
            for parameter, dim in site.by_unit():
                parameter.index_fill_(dim, of_site.nonzero()[:, 0], 0.0)

    def finish(self) -> None:
        """Stores the living units only: another config, with ranks site by site."""
        if self.config.prune == 0:
            return
        for site in self.push.sites:
            is_kept = site.strength() > 0
            site.ranks = is_kept.cumsum(0)[site.ranks - 1]
            for parameter, dim in site.by_unit():
                parameter.data = parameter.data.index_select(dim, is_kept.nonzero()[:, 0])
        ranks = torch.cat([site.ranks for site in self.push.sites]).tolist()
        self.config = replace(self.config, ranks=tuple(ranks), prune=0.0)

    def penalty(self) -> Tensor | None:
        return self.push.sites[0].penalty() if self.config.recipe == "paper" else None

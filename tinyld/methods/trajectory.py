"""Trajectory LoRA: at each denoising step a low-rank push on the frozen denoiser's states, with rank by noise level.

    h <- h + sigma(t) * A ReLU(B [norm(h); Emb(t)])          (after LoRA-Diffusion, whose own design is in paper.py)

Up-projections A start at zero, so a fresh adapter changes nothing. A band of noise levels uses the first r(t) rank
units of one A and B, so that the largest rank alone is stored. The sites, before each of the last blocks and on the
final state, share A and B too, and weigh the units each for itself. `best` pushes every position, and attention carries
on what is pushed. `fast` pushes the answer's alone, which read the frozen base's states, keys and values, their own
too: all adapters that answer a text share these and, where it is one token, training keeps them.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld.block import take
from tinyld.config import ModelConfig, check, setting
from tinyld.methods import paper
from tinyld.methods.contract import AUTO, Method, MethodConfig
from tinyld.methods.paper import NUM_BANDS, TIME_WIDTH, band_of, time_embedding
from tinyld.model import Denoiser, PushAt
from tinyld.pointer import Pointer

PRUNED = 0.5  # --set ranks=auto: half of the units that a run begins with are dropped,
PRUNED_FROM, PRUNED_TO = 0.2, 0.6  # in this part of the run


@dataclass(frozen=True)
class TrajectoryLoraConfig(MethodConfig):
    recipe: str = setting("best", among=("best", "fast", "paper"))
    # by band, high noise first; once units are pruned, site by site
    ranks: tuple[int, ...] = setting((64, 64, 64), least=1)
    sigma: tuple[float, ...] = (1.0, 1.0, 1.0)  # by band, high noise first
    blocks: int = setting(6, least=0)  # sites before each of the last `blocks` blocks, and on the final state
    dropout: float = setting(0.0, least=0, below=1)  # share of the numbers read that an update does without
    prune: float = setting(0.0, least=0, below=1)  # share of the rank units that training drops, the weakest first

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.sigma) == NUM_BANDS, f"sigma needs {NUM_BANDS} values, high noise first, got {self.sigma}")
        check(self.recipe != "paper" or self.blocks == 0, "recipe paper pushes the final state only: blocks 0")
        many = f"ranks needs {NUM_BANDS} values, high noise first, or as many a site, got {self.ranks}"
        check(len(self.ranks) in (NUM_BANDS, NUM_BANDS * self.num_sites), many)
        check(self.pointer == 0 or self.blocks > 0, "a pointer reads before the last block: blocks must be 1 or more")
        fixed = self.prune == 0 and self.dropout == 0
        check(self.recipe != "paper" or fixed, "recipe paper is the paper's own: neither ranks auto nor dropout")

    @property
    def num_sites(self) -> int:
        return self.blocks + 1

    @property
    def is_tied(self) -> bool:
        """Whether the sites share A and B; ranks are pruned site by site."""
        return self.num_sites > 1 and self.prune == 0 and len(self.ranks) == NUM_BANDS

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
# that wrote better than more where there is more noise. What pushes few positions takes larger steps. `fast` learns as
# much from 2,000 rows before two blocks of the default base as before four (data/results/equal.csv), for less.
RATES = {"muon": 3e-3, "adamw": 5e-3}, {"muon": 2e-3, "adamw": 1e-3}
FAST_RATES = {"muon": 6e-3, "adamw": 1e-2}, {"muon": 4e-3, "adamw": 2e-3}
RECIPES = {
    "best": Recipe(TrajectoryLoraConfig(), 0.007, *RATES, {"blocks": 4}),
    "fast": Recipe(TrajectoryLoraConfig("fast", blocks=4), 0.007, *FAST_RATES, {"blocks": 2}),
    "paper": Recipe(TrajectoryLoraConfig("paper", paper.RANKS, paper.SIGMA, blocks=0), None, *RATES),
}


class RankUnits(nn.Module):
    """The rank units of one site. A band uses the first of them or, in the paper's design, others than other bands."""

    def __init__(self, config: TrajectoryLoraConfig, site: int, width: int, generator: torch.Generator | None):
        super().__init__()
        ranks, is_papers, self.dropout = config.site_ranks(site), config.recipe == "paper", config.dropout
        first = torch.arange(max(ranks)) < torch.tensor(ranks)[:, None]
        is_used = paper.units_of_bands(ranks) if is_papers else first  # (NUM_BANDS, units)
        down = torch.empty(is_used.shape[1], width + TIME_WIDTH).normal_(0.0, width**-0.5, generator=generator)
        self.down, self.up = nn.Parameter(down), nn.Parameter(torch.zeros(width, len(down)))
        self.gain = nn.Parameter(torch.ones(len(down))) if config.is_tied else None
        self.gate = nn.Parameter(torch.zeros(len(down), width)) if is_papers else None
        self.register_buffer("is_used", is_used, persistent=False)
        self.register_buffer("sigma", torch.tensor(config.sigma), persistent=False)  # by band

    def forward(self, h: Tensor, positions: Tensor | None, band: Tensor, time: Tensor, prompt_mask: Tensor) -> Tensor:
        """What is added to h (B, L, D), or to it at `positions` (B, M) alone, (B, M, D). Of the rows: band (B,), time
        (B, TIME_WIDTH), prompt_mask (B, L) bool."""
        width, down, scale = h.shape[-1], self.down, self.sigma[band][:, None] * self.is_used[band]  # (B, units)
        up = self.up if self.gain is None else self.up * self.gain
        if (gate := self.gate) is not None:
            c = paper.prompt_features(h, prompt_mask)
            if bool((scale == scale[:1]).all()):  # one band: the others' units need not run
                used = scale[0].nonzero()[:, 0]
                down, up, gate, scale = down[used], up[:, used], gate[used], scale[:, used]
            scale = scale * (1.0 + c @ gate.T)
        h = h if positions is None else take(h, positions)
        x = F.dropout(F.layer_norm(h, (width,)), self.dropout, self.training)
        hidden = x @ down[:, :width].T + (time @ down[:, width:].T)[:, None, :]
        return (F.relu(hidden) * scale[:, None, :]) @ up.T

    def strength(self) -> Tensor:
        """(units,) ||a_u|| ||b_u||; infinite for the strongest of the units that all bands use: every site keeps it."""
        found = (self.up.norm(dim=0) * self.down.norm(dim=1)).detach()
        found[found.masked_fill(~self.is_used.all(0), -1.0).argmax()] = math.inf
        return found


class TrajectoryPush(nn.Module):
    """Hangs on `Denoiser.push`: a site at every depth from `first_depth` to num_layers, the final state."""

    def __init__(self, config: TrajectoryLoraConfig, model_config: ModelConfig, generator: torch.Generator | None):
        super().__init__()
        width, last = model_config.d_model, model_config.num_layers
        check(config.blocks <= last, f"blocks must be at most the base's {last}, got {config.blocks}")
        self.first_depth = last - config.blocks
        self.answer_only, self.reads_others = config.recipe == "fast", config.recipe == "paper"
        sites = [RankUnits(config, site, width, generator) for site in range(config.num_sites)]
        for site in sites if config.is_tied else ():
            site.down, site.up = sites[0].down, sites[0].up
        self.sites = nn.ModuleList(sites)
        self.pointer: Pointer | None = None

    def start(self, t: Tensor, prompt_mask: Tensor) -> PushAt:
        told = band_of(t), time_embedding(t), prompt_mask
        return lambda depth, h, positions=None: self.sites[depth - self.first_depth](h, positions, *told)


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
        blocks = given.setdefault("blocks", min(config.blocks, model_config.num_layers))
        pointer = given.pop("pointer", 0)
        given["pointer"] = 0 if pointer == AUTO and blocks == 0 else cls.pointer_width(pointer, budget, model_config)
        config = replace(config, **given)
        config = cls.fit_budget(config, model_config, budget)
        if budget is not None:  # once units are pruned, no more are left than fit
            config = replace(config, ranks=tuple(int(rank / (1.0 - config.prune)) for rank in config.ranks))
        return config

    def install(self, model: Denoiser, generator: torch.Generator | None) -> dict[str, nn.Parameter]:
        model.push = self.push = TrajectoryPush(self.config, model.config, generator).to(model.device)
        return dict(self.push.named_parameters())

    @classmethod
    def expected_parameters(cls, config: TrajectoryLoraConfig, model_config: ModelConfig) -> int:
        d, sites = model_config.d_model, min(config.num_sites, model_config.num_layers + 1)  # more are refused
        if config.recipe == "paper":
            return paper.MODULES * sum(config.ranks) * (3 * d + TIME_WIDTH)
        unit, pointer = 2 * d + TIME_WIDTH, super().expected_parameters(config, model_config)
        if config.is_tied:
            return max(config.ranks) * (unit + sites) + pointer  # with a gain at every site
        return unit * sum(max(config.site_ranks(site)) for site in range(sites)) + pointer

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
            site.up[:, of_site] = 0.0
            site.down[of_site] = 0.0

    def finish(self) -> None:
        """Stores the living units only: another config, with ranks site by site."""
        if self.config.prune == 0:
            return
        for site in self.push.sites:
            is_kept = site.strength() > 0
            site.is_used = site.is_used[:, is_kept]
            site.up.data, site.down.data = site.up.data[:, is_kept].contiguous(), site.down.data[is_kept]
        ranks = torch.cat([site.is_used.sum(1) for site in self.push.sites]).tolist()
        self.config = replace(self.config, ranks=tuple(ranks), prune=0.0)

    def penalty(self) -> Tensor | None:
        site = self.push.sites[0]
        return paper.penalty(site.up, site.down) if self.config.recipe == "paper" else None

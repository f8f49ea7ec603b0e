"""Trajectory LoRA: at each denoising step a low-rank push on the frozen denoiser's states, with rank by noise level.

    h <- h + sigma(t) * sum_i A_i(c) ReLU(B_i [h; Emb(t)])          (LoRA-Diffusion, eq. for x_{t-1})

Departures from the paper, each because the evidence asks for it:
  - a push may stand before each of the last `blocks` blocks, `within` them too (between attention and MLP), and on the
    final state, not on the final state only: frozen attention carries it between positions (`blocks = 0` is the
    paper's place);
  - up-projections start at zero, so a fresh adapter changes nothing;
  - c is the frozen base's own states, mean-pooled over the prompt, and conditions the up-projection as a gate on its
    columns, A_i(c) = W_A diag(1 + W_c c): no separate encoder, no unconstrained shift;
  - `nested` bands share one A and B, of which a band uses the first r(t) directions: they store the largest rank only;
    `core` bands have a small matrix each between A and B besides, `smooth-core` ones interpolated in t (after NaRA,
    arXiv 2605.29716);
  - `tied` places share one A and B, of a rank that no place could afford alone, and weigh its units each for itself;
  - without an `activation` a push is a plain low-rank matrix: no unit is lost where it does not fire;
  - a push may read a learned mix of all frozen depths below it, and units may attend: low-rank attention to the prompt,
    with rectified values, which moves information between positions with no gradient through the base. What they find
    is pushed, and the rank units may read it too;
  - training may drop a share of the numbers that are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld.attention import attention
from tinyld.config import UNSAID_HEAD_WIDTH, ModelConfig, check, check_choice, check_finite
from tinyld.methods.bands import NUM_BANDS, TIME_WIDTH, band_of, band_weights, time_embedding
from tinyld.methods.contract import Method
from tinyld.model import Denoiser, PushAt, take

SHARINGS = ("nested", "separate", "core", "smooth-core")
CONDITIONINGS = ("none", "gate")
READINGS = ("state", "mix")
ACTIVATIONS = ("relu", "none")
PRUNE_FROM, PRUNE_TO = 0.2, 0.6  # of the run: while ranks shrink


@dataclass(frozen=True)
class TrajectoryLoraConfig:
    ranks: tuple[int, ...] = (64, 32, 8)  # by band, high noise first; at each place, or place by place
    sigma: tuple[float, ...] = (1.0, 0.5, 0.25)  # by band, high noise first
    modules: int = 1  # k: pushes summed at one place
    blocks: int = 6  # pushes stand before each of the last `blocks` blocks, and on the final state
    within: bool = False  # and between attention and MLP of each of them
    tied: bool = False  # all places share A and B, and have a gain of their own for each unit
    activation: str = "relu"  # of the rank units; none: the push is linear
    sharing: str = "nested"
    read: str = "state"  # state: the one at the push's place; mix: a learned mix of it and all frozen ones below
    attend: int = 0  # units that attend to the prompt
    head_width: int = 1  # how many of these look at the same tokens
    read_attended: bool = False  # the rank units read what the attending ones found
    conditioning: str = "none"
    lambda_rank: float = 0.0  # weight of the nuclear norm of every A_i B_i
    lambda_orth: float = 0.0  # weight of sum over i != j of ||A_i^T A_j||_F^2
    prune: float = 0.0  # share of the rank units that is dropped while training, the weakest first
    dropout: float = 0.0  # share of the numbers read that an update does without
    BEFORE: ClassVar[dict[str, Any]] = {"head_width": UNSAID_HEAD_WIDTH}  # of a run that does not say

    def __post_init__(self) -> None:
        check_finite(self)
        check(len(self.sigma) == NUM_BANDS, f"sigma needs {NUM_BANDS} values, high noise first, got {self.sigma}")
        check(
            len(self.ranks) == NUM_BANDS or (self.blocks >= 0 and len(self.ranks) == NUM_BANDS * self.num_places),
            f"ranks needs {NUM_BANDS} values, high noise first, or as many a place, got {self.ranks}",
        )
        check(0 <= self.dropout < 1, f"dropout is a share in [0, 1), got {self.dropout}")
        check(0 <= self.prune < 1, f"prune is a share of the rank units in [0, 1), got {self.prune}")
        by_unit = self.sharing == "nested" and self.modules == 1 and not self.tied
        one_by_one = self.prune > 0 or len(self.ranks) > NUM_BANDS
        check(by_unit or not one_by_one, "ranks auto, or place by place, need nested bands, one module, no tied places")
        check(min(self.ranks) >= 1, f"every rank must be at least 1, got {','.join(map(str, self.ranks))}")
        check(self.modules >= 1, f"modules must be at least 1, got {self.modules}")
        check(self.blocks >= 0, f"blocks must be at least 0, got {self.blocks}")
        check(self.blocks > 0 or not self.within, "within needs blocks to push in, got blocks 0")
        check(min(self.lambda_rank, self.lambda_orth) >= 0, "lambda_rank and lambda_orth must be at least 0")
        check(self.head_width >= 1, f"head_width must be at least 1, got {self.head_width}")
        check(
            self.attend >= 0 and self.attend % self.head_width == 0,
            f"attend must be 0 or a multiple of the head width {self.head_width}, got {self.attend}",
        )
        check(self.attend > 0 or not self.read_attended, "read_attended needs units that attend, got attend 0")
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("sharing", self.sharing, SHARINGS)
        check_choice("read", self.read, READINGS)
        check_choice("conditioning", self.conditioning, CONDITIONINGS)

    @property
    def num_places(self) -> int:
        return self.blocks * (2 if self.within else 1) + 1

    def at(self, place: int) -> TrajectoryLoraConfig:
        """The config of one place alone; 0 is the lowest."""
        if len(self.ranks) == NUM_BANDS:
            return self
        return replace(self, blocks=0, within=False, ranks=self.ranks[NUM_BANDS * place : NUM_BANDS * (place + 1)])

    @property
    def stored_rank(self) -> int:
        """Rank units that one module stores: all bands' together, or the largest one's when they are shared."""
        return sum(self.ranks) if self.sharing == "separate" else max(self.ranks)

    @property
    def has_core(self) -> bool:
        return self.sharing in ("core", "smooth-core")

    def units(self) -> Tensor:
        """(NUM_BANDS, modules * stored_rank): sigma where a band uses a unit, else 0."""
        table = torch.zeros(NUM_BANDS, self.stored_rank)
        start = 0
        for band, rank in enumerate(self.ranks):
            table[band, start : start + rank] = self.sigma[band]
            start += rank if self.sharing == "separate" else 0
        return table.repeat(1, self.modules)


FLAT = {"ranks": (64, 64, 64), "sigma": (1.0, 1.0, 1.0)}


class Recipe(NamedTuple):
    config: TrajectoryLoraConfig
    budget: float | None  # as a share of the base
    rates: dict[str, float] | None = None  # as a method's, where they are not the method's own
    post_norm: dict[str, float] | None = None
    post_norm_options: dict[str, Any] = {}


# Ours within 0.7% (`best` the most accurate; `fast` with nothing of the base in the gradient), whose bands have one
# rank and one sigma, as that wrote better than more where there is more noise; and the paper's literal setting. The one
# push of `fast` has less of a hold than seven that share their units, and takes larger steps; the better its base, the
# more it learns by heart.
RECIPES = {
    "best": Recipe(TrajectoryLoraConfig(**FLAT, tied=True), 0.007),
    "fast": Recipe(
        TrajectoryLoraConfig(**FLAT, blocks=0, read="mix", attend=64, read_attended=True, dropout=0.1),
        0.007,
        {"muon": 6e-3, "adamw": 1e-2},
        {"adamw": 4e-3, "muon": 4e-3},
        {"dropout": 0.3},
    ),
    "paper": Recipe(
        TrajectoryLoraConfig(
            modules=2, blocks=0, sharing="separate", conditioning="gate", lambda_rank=0.01, lambda_orth=0.001
        ),
        None,
    ),
}


def before_pruning(config: TrajectoryLoraConfig) -> TrajectoryLoraConfig:
    """The config to begin with so that, once `prune` of the units are gone, no more are left than `config` has."""
    return replace(config, ranks=tuple(int(r / (1.0 - config.prune)) for r in config.ranks))


class PushModule(nn.Module):
    """All k modules of one place, their rank units side by side."""

    def __init__(
        self,
        config: TrajectoryLoraConfig,
        width: int,
        frozen: int,
        generator: torch.Generator | None,
        tied_to: PushModule | None = None,
    ):
        """`frozen` is how many depths below this place the base alone has run."""
        super().__init__()

        def random(*shape: int, fan_in: int = width) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).normal_(0.0, fan_in**-0.5, generator=generator))

        modules, rank = config.modules, config.stored_rank
        self.is_linear, self.dropout, self.head_width = config.activation == "none", config.dropout, config.head_width
        self.down = tied_to.down if tied_to else random(modules * rank, width + TIME_WIDTH)
        self.up = tied_to.up if tied_to else nn.Parameter(torch.zeros(width, modules * rank))
        self.gain = nn.Parameter(torch.ones(modules * rank)) if config.tied else None
        self.gate = nn.Parameter(torch.zeros(modules * rank, width)) if config.conditioning == "gate" else None
        self.core = nn.Parameter(torch.eye(rank).repeat(NUM_BANDS, modules, 1, 1)) if config.has_core else None
        self.mix = nn.Parameter(torch.zeros(frozen + 1)) if config.read == "mix" else None
        self.attention = random(3, config.attend, width) if config.attend else None  # query, key, value
        self.attended = nn.Parameter(torch.zeros(width, config.attend)) if config.attend else None
        reads = config.read_attended
        self.down_attended = random(modules * rank, config.attend, fan_in=config.attend) if reads else None
        self.register_buffer("units", config.units(), persistent=False)
        self.register_buffer("sigma", torch.tensor(config.sigma), persistent=False)

    @property
    def gained_up(self) -> Tensor:
        """The up-projection as this place has it. (D, units)"""
        return self.up if self.gain is None else self.up * self.gain

    def read(self, h: Tensor, history: Sequence[Tensor]) -> Tensor:
        """The normalised state, or the mix of it and the frozen ones below. (B, L, D)"""
        width = h.shape[-1:]
        if self.mix is None:
            return F.layer_norm(h, width)
        shares = self.mix.softmax(0).to(h.dtype)
        depths = [*history[: len(self.mix) - 1], h]
        mixed = torch.zeros_like(h)
        for state, share in zip(depths, shares, strict=True):
            mixed = mixed + F.layer_norm(state, width) * share
        return mixed

    def attend(self, here: Tensor, x: Tensor, prompt_mask: Tensor) -> Tensor:
        """What the attending units find in x (B, L, D) for the places `here` (B, M, D): (B, M, attend)."""
        query, key, value = self.attention  # type: ignore[misc]
        heads = (-1, self.head_width)
        q, k, v = ((of @ w.T).unflatten(-1, heads).transpose(1, 2) for of, w in ((here, query), (x, key), (x, value)))
        return attention(q, k, F.relu(v), prompt_mask).transpose(1, 2).flatten(2)

    def forward(
        self,
        h: Tensor,
        noise: Noise,
        pooled: Tensor | None,
        history: Sequence[Tensor],
        places: Tensor | None = None,
    ) -> Tensor:
        """The push (B, L, D), or (B, M, D) at `places` (B, M). h: (B, L, D), pooled: (B, D); without `attend`, L may be
        some places of a row."""
        if places is not None and self.attention is None:  # nothing else is read
            h, history, places = take(h, places), [take(state, places) for state in history], None
        down, up, gate, down_attended = self.down, self.gained_up, self.gate, self.down_attended
        scale = self.units[noise.band] * noise.weight  # (B, units): sigma where the row's band uses a unit, else 0
        if self.core is None and bool((scale == scale[:1]).all()):  # one band: the others' units need not run
            used = scale[0].nonzero()[:, 0]
            if len(used) < len(down):
                down, up, scale = down[used], up[:, used], scale[:, used]
                gate = None if gate is None else gate[used]
                down_attended = None if down_attended is None else down_attended[used]
        width = h.shape[-1]
        x = F.dropout(self.read(h, history), self.dropout, self.training)
        here = x if places is None else take(x, places)
        found = None if self.attention is None else self.attend(here, x, noise.prompt_mask)
        hidden = here @ down[:, :width].T + (noise.time @ down[:, width:].T)[:, None, :]
        if down_attended is not None:
            hidden = hidden + found @ down_attended.T
        hidden = hidden if self.is_linear else F.relu(hidden)
        if self.core is not None:
            core = torch.einsum("bn,nkij->bkij", noise.bands, self.core)
            hidden = torch.einsum("blki,bkij->blkj", hidden.unflatten(-1, self.core.shape[1:3]), core).flatten(2)
        if gate is not None and pooled is not None:
            scale = scale * (1.0 + pooled @ gate.T)
        push = (hidden * scale[:, None, :]) @ up.T
        if found is not None:
            sigma = self.sigma[noise.band] * noise.weight
            push = push + (found * sigma[:, None, None]) @ self.attended.T
        return push


@dataclass(frozen=True)
class Noise:
    """What the pushes of one forward pass are told, for B rows of L tokens."""

    band: Tensor  # (B,) index of the row's band
    weight: float  # of the whole push
    bands: Tensor  # (B, NUM_BANDS) weights of the bands' cores
    time: Tensor  # (B, TIME_WIDTH)
    prompt_mask: Tensor  # (B, L) bool


class TrajectoryPush(nn.Module):
    """Hangs on `Denoiser.push`: one PushModule for every depth from `first_depth` to num_layers, or every half one."""

    def __init__(self, config: TrajectoryLoraConfig, model_config: ModelConfig, generator: torch.Generator | None):
        super().__init__()
        self.first_depth = model_config.num_layers - config.blocks
        step = 0.5 if config.within else 1.0
        self.depths = [self.first_depth + step * place for place in range(config.num_places)]
        places: list[PushModule] = []
        for place in range(config.num_places):
            tied_to = places[0] if config.tied and places else None
            places.append(PushModule(config.at(place), model_config.d_model, self.first_depth, generator, tied_to))
        self.places = nn.ModuleList(places)
        self.pushes_within = config.within
        self.conditioned = config.conditioning != "none"
        self.reads_depths = config.read == "mix"
        self.reads_others = config.attend > 0 or (self.conditioned and config.blocks == 0)
        self.smooth = config.sharing == "smooth-core"
        self.weight = 1.0  # 0 turns the push off; a composition sets its coefficient

    def place_at(self, depth: float) -> PushModule:
        """The place before block `depth`; d + 1/2 is within block d."""
        return self.places[self.depths.index(depth)]

    def place_names(self) -> list[str]:
        """Where each place is, in words."""
        names = [f"{'before' if depth.is_integer() else 'within'} block {int(depth)}" for depth in self.depths]
        return [*names[:-1], "final state"]

    def start(self, t: Tensor, prompt_mask: Tensor, history: Sequence[Tensor] = ()) -> PushAt:
        noise = Noise(band_of(t), self.weight, band_weights(t, self.smooth), time_embedding(t), prompt_mask)
        pooled: Tensor | None = None

        def push_at(depth: float, h: Tensor, places: Tensor | None = None) -> Tensor:
            nonlocal pooled
            if self.conditioned and pooled is None:  # the states before this adapter's first push
                pooled = pool(h, prompt_mask)
            return self.place_at(depth)(h, noise, pooled, history, places)

        return push_at


def pool(h: Tensor, prompt_mask: Tensor) -> Tensor:
    """Mean of the normalised states over the prompt's tokens: (B, L, D), (B, L) -> (B, D)."""
    share = prompt_mask.to(h.dtype)
    share = share / share.sum(1, keepdim=True).clamp(min=1.0)
    return (F.layer_norm(h, (h.shape[-1],)) * share[..., None]).sum(1)


class TrajectoryLora(Method):
    name, Config = "trajectory-lora", TrajectoryLoraConfig
    rates, post_norm = {"muon": 3e-3, "adamw": 5e-3}, {"muon": 2e-3, "adamw": 1e-3}
    summary = "a low-rank push on the states, with rank by noise level"

    def __init__(self, config: TrajectoryLoraConfig, model_config: ModelConfig):
        super().__init__(config, model_config)
        check(
            config.blocks <= model_config.num_layers,
            f"blocks must be at most the base's {model_config.num_layers}, got {config.blocks}",
        )

    @classmethod
    def usual_rates(cls, model_config: ModelConfig, recipe: str | None) -> dict[str, float]:
        own = RECIPES.get(recipe or "")
        rates = None if own is None else own.rates if model_config.norm_first else own.post_norm
        return rates or super().usual_rates(model_config, recipe)

    @property
    def first_depth(self) -> int:
        return self.model_config.num_layers - self.config.blocks

    @property
    def reads_depths(self) -> bool:
        return self.config.read == "mix"

    def install(self, model: Denoiser, generator: torch.Generator | None) -> dict[str, nn.Parameter]:
        self.dropped: Tensor | None = None
        self.push = TrajectoryPush(self.config, self.model_config, generator).to(model.embedding.weight.device)
        model.push = self.push
        return dict(self.push.named_parameters())

    @classmethod
    def expected_parameters(cls, config: TrajectoryLoraConfig, model_config: ModelConfig) -> int:
        d = model_config.d_model
        shared = 2 * d + TIME_WIDTH  # of a unit's A and B
        own = (d if config.conditioning == "gate" else 0) + (1 if config.tied else 0)
        mix = model_config.num_layers - config.blocks + 1 if config.read == "mix" else 0
        total = config.num_places * (mix + 4 * d * config.attend)
        for place in range(config.num_places):
            rank = config.at(place).stored_rank
            per_unit = own + (0 if config.tied and place else shared)
            per_unit += config.attend if config.read_attended else 0
            total += config.modules * (rank * per_unit + (NUM_BANDS * rank * rank if config.has_core else 0))
        return total

    @classmethod
    def with_rank(cls, config: Any, rank: int) -> TrajectoryLoraConfig:
        """The same proportion between bands, with `rank` in the largest, and as many units that attend if any do."""
        top = max(config.ranks)
        ranks = tuple(max(1, round(rank * r / top)) for r in config.ranks)
        heads = max(1, rank // config.head_width) if config.attend else 0
        return replace(config, ranks=ranks, attend=heads * config.head_width)

    def set_enabled(self, enabled: bool) -> None:
        self.push.weight = 1.0 if enabled else 0.0

    @torch.no_grad()
    def after_update(self, progress: float) -> None:
        """Drops the weakest rank units of all places, from PRUNE_FROM to PRUNE_TO of the run until `prune` are gone.

        Weak is a small ||a_u|| ||b_u||; dropped units are zero and stay so, which is also how a resumed run knows
        them. Every place keeps the strongest of the units that all its bands use.
        """
        if self.config.prune == 0 or progress < PRUNE_FROM:
            return
        place = torch.cat([torch.full((len(p.down),), i) for i, p in enumerate(self.push.places)])
        strength = torch.cat([p.up.norm(dim=0) * p.down.norm(dim=1) for p in self.push.places]).cpu()
        gone = self.config.prune * min(1.0, (progress - PRUNE_FROM) / (PRUNE_TO - PRUNE_FROM))
        target = math.ceil(gone * len(strength) - 1e-9)
        if self.dropped is None:
            self.dropped = strength == 0
        if target > int(self.dropped.sum()):
            last = torch.zeros_like(self.dropped)
            for i, p in enumerate(self.push.places):
                shared = torch.where(place == i, strength, -1.0)
                shared[int((place < i).sum()) + int((p.units != 0).all(0).sum()) :] = -1.0
                last[shared.argmax()] = True
            strength[self.dropped] = -1.0
            order = torch.where(last, torch.inf, strength).argsort(stable=True)
            self.dropped = torch.zeros_like(last)
            self.dropped[order[: min(target, int((~last).sum()))]] = True
        for i, p in enumerate(self.push.places):
            dead = self.dropped[place == i].to(p.down.device)
            p.up[:, dead], p.down[dead] = 0.0, 0.0
            for p_of_unit in (p.gate, p.down_attended):
                if p_of_unit is not None:
                    p_of_unit[dead] = 0.0

    @torch.no_grad()
    def finish(self) -> None:
        """Stores the living units only: another config, with ranks place by place."""
        if self.config.prune == 0:
            return
        self.after_update(1.0)  # averaged weights bring dropped units back
        ranks: list[int] = []
        for p in self.push.places:
            alive = p.up.norm(dim=0) * p.down.norm(dim=1) > 0
            for name, dim in (("up", 1), ("down", 0), ("gate", 0), ("down_attended", 0)):
                parameter = getattr(p, name)
                if parameter is not None:
                    index = alive.nonzero()[:, 0]
                    setattr(p, name, nn.Parameter(parameter.index_select(dim, index), requires_grad=True))
            ranks += [max(1, int((row != 0).sum())) for row in p.units[:, alive]]  # of a band with sigma 0, too
        self.config = replace(self.config, ranks=tuple(ranks), prune=0.0)
        for i, p in enumerate(self.push.places):
            p.units = self.config.at(i).units().to(p.units.device)
        self.own = dict(self.push.named_parameters())

    def penalty(self) -> Tensor | None:
        """lambda_rank * sum ||A_i B_i||_* + lambda_orth * sum_{i != j} ||A_i^T A_j||_F^2, over places and modules."""
        config = self.config
        if config.lambda_rank == 0 and config.lambda_orth == 0:
            return None
        total = torch.zeros((), device=self.push.places[0].up.device)
        for place in self.push.places[:1] if config.tied else self.push.places:
            rank = len(place.down) // config.modules
            ups, downs = place.up.split(rank, dim=1), place.down.split(rank, dim=0)
            if config.lambda_rank:
                total = total + config.lambda_rank * sum(nuclear_norm(u, d) for u, d in zip(ups, downs, strict=True))
            if config.lambda_orth:
                total = total + config.lambda_orth * sum(
                    (a.T @ b).square().sum() for i, a in enumerate(ups) for j, b in enumerate(ups) if i != j
                )
        return total


class _NuclearNorm(torch.autograd.Function):
    """Sum of singular values of up @ down from their QR factors, with the subgradient U V^T of its nonzero part.

    Differentiating an SVD fails where singular values meet or vanish, and a fresh `up` is all zeros.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, up: Tensor, down: Tensor) -> Tensor:
        q_up, r_up = torch.linalg.qr(up)
        q_down, r_down = torch.linalg.qr(down.T)
        u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
        keep = s > 1e-6 * s.max().clamp(min=1e-12)
        ctx.save_for_backward(up, down, q_up @ (u * keep), vh @ q_down.T)
        return s.sum()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        up, down, left, right = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * left @ (right @ down.T), grad * (up.T @ left) @ right


def nuclear_norm(up: Tensor, down: Tensor) -> Tensor:
    """||up @ down||_*, differentiable. up: (D, r), down: (r, E)."""
    return _NuclearNorm.apply(up, down)

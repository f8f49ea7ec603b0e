"""Trajectory LoRA: at each denoising step a low-rank push on the frozen denoiser's states, with rank by noise level.

    h <- h + sigma(t) * sum_i A_i(c) ReLU(B_i [h; Emb(t)])          (LoRA-Diffusion, eq. for x_{t-1})

Departures from the paper, each because the evidence asks for it:
  - a push may stand before each of the last `blocks` blocks and on the final state, not on the final state only: inside
    the blocks, frozen attention carries it between positions (`blocks = 0` is the paper's place);
  - up-projections start at zero, so a fresh adapter changes nothing;
  - c is the frozen base's own states, mean-pooled over the prompt, and conditions the up-projection as a gate on its
    columns, A_i(c) = W_A diag(1 + W_c c): no separate encoder, no unconstrained shift;
  - `nested` bands share one A and B, of which a band uses the first r(t) directions: they store the largest rank only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld.config import ModelConfig, check, check_choice, check_finite
from tinyld.methods.contract import Method
from tinyld.model import Denoiser, PushAt

# Timestep bands (t_lo, t_hi], from high noise to low as the paper lists them ("early" is high noise). Stated here only.
BAND_EDGES = (1.0, 2 / 3, 1 / 3, 0.0)
BAND_NAMES = ("high", "middle", "low")
NUM_BANDS = len(BAND_NAMES)
TIME_WIDTH = 16  # sinusoidal features of t


def band_of(t: Tensor) -> Tensor:
    """Index of the band that each t in (0, 1] falls in; 0 is the highest noise. t: (B,) -> (B,) int64."""
    inner = torch.tensor(BAND_EDGES[1:-1], device=t.device, dtype=t.dtype)
    return (t[:, None] <= inner[None, :]).sum(1)


def time_embedding(t: Tensor) -> Tensor:
    """Sinusoidal features of t in [0, 1]: (B,) -> (B, TIME_WIDTH)."""
    frequency = math.pi * 2.0 ** torch.arange(TIME_WIDTH // 2, device=t.device)
    angle = t[:, None] * frequency[None, :] / 2
    return torch.cat([angle.cos(), angle.sin()], dim=1)


SHARINGS = ("nested", "separate")
CONDITIONINGS = ("none", "gate")


@dataclass(frozen=True)
class TrajectoryLoraConfig:
    ranks: tuple[int, ...] = (64, 32, 8)  # by band, high noise first
    sigma: tuple[float, ...] = (1.0, 0.5, 0.25)  # by band, high noise first
    modules: int = 1  # k: pushes summed at one place
    blocks: int = 6  # pushes stand before each of the last `blocks` blocks, and on the final state
    sharing: str = "nested"
    conditioning: str = "none"
    lambda_rank: float = 0.0  # weight of the nuclear norm of every A_i B_i
    lambda_orth: float = 0.0  # weight of sum over i != j of ||A_i^T A_j||_F^2

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("ranks", "sigma"):
            values = getattr(self, name)
            check(len(values) == NUM_BANDS, f"{name} needs {NUM_BANDS} values, high noise first, got {values}")
        check(min(self.ranks) >= 1, f"every rank must be at least 1, got {','.join(map(str, self.ranks))}")
        check(self.modules >= 1, f"modules must be at least 1, got {self.modules}")
        check(self.blocks >= 0, f"blocks must be at least 0, got {self.blocks}")
        check(min(self.lambda_rank, self.lambda_orth) >= 0, "lambda_rank and lambda_orth must be at least 0")
        check_choice("sharing", self.sharing, SHARINGS)
        check_choice("conditioning", self.conditioning, CONDITIONINGS)

    @property
    def stored_rank(self) -> int:
        """Rank units that one module stores: all bands' together, or the largest one's when nested."""
        return max(self.ranks) if self.sharing == "nested" else sum(self.ranks)

    def units(self) -> Tensor:
        """(NUM_BANDS, modules * stored_rank): sigma where a band uses a unit, else 0."""
        table = torch.zeros(NUM_BANDS, self.stored_rank)
        start = 0
        for band, rank in enumerate(self.ranks):
            table[band, start : start + rank] = self.sigma[band]
            start += rank if self.sharing == "separate" else 0
        return table.repeat(1, self.modules)


# name -> (config, budget as a share of the base): the paper's literal setting, and ours, its proportion within 0.7%.
RECIPES: dict[str, tuple[TrajectoryLoraConfig, float | None]] = {
    "best": (TrajectoryLoraConfig(), 0.007),
    "paper": (
        TrajectoryLoraConfig(
            modules=2, blocks=0, sharing="separate", conditioning="gate", lambda_rank=0.01, lambda_orth=0.001
        ),
        None,
    ),
}


class PushModule(nn.Module):
    """All k modules of one place, their rank units side by side."""

    def __init__(self, config: TrajectoryLoraConfig, width: int, generator: torch.Generator | None):
        super().__init__()
        units = config.modules * config.stored_rank
        self.down = nn.Parameter(torch.empty(units, width + TIME_WIDTH).normal_(0.0, width**-0.5, generator=generator))
        self.up = nn.Parameter(torch.zeros(width, units))
        self.gate = nn.Parameter(torch.zeros(units, width)) if config.conditioning == "gate" else None

    def forward(self, h: Tensor, time: Tensor, scale: Tensor, pooled: Tensor | None) -> Tensor:
        """The push (B, L, D). h: (B, L, D), time: (B, TIME_WIDTH), scale: (B, units), pooled: (B, D)."""
        down, up, gate = self.down, self.up, self.gate
        if bool((scale == scale[:1]).all()):  # one band in the batch: the other bands' units need not run
            used = scale[0].nonzero()[:, 0]
            if len(used) < len(down):
                down, up, scale = down[used], up[:, used], scale[:, used]
                gate = None if gate is None else gate[used]
        width = h.shape[-1]
        x = F.layer_norm(h, (width,))
        hidden = F.relu(x @ down[:, :width].T + (time @ down[:, width:].T)[:, None, :])
        if gate is not None and pooled is not None:
            scale = scale * (1.0 + pooled @ gate.T)
        return (hidden * scale[:, None, :]) @ up.T


class TrajectoryPush(nn.Module):
    """Hangs on `Denoiser.push`: one PushModule for every depth from `first_depth` to num_layers."""

    def __init__(self, config: TrajectoryLoraConfig, model_config: ModelConfig, generator: torch.Generator | None):
        super().__init__()
        self.first_depth = model_config.num_layers - config.blocks
        self.places = nn.ModuleList(
            PushModule(config, model_config.d_model, generator) for _ in range(config.blocks + 1)
        )
        self.register_buffer("units", config.units(), persistent=False)
        self.conditioned = config.conditioning != "none"
        self.weight = 1.0  # 0 turns the push off; a composition sets its coefficient

    def start(self, t: Tensor, prompt_mask: Tensor) -> PushAt:
        scale = self.units[band_of(t)] * self.weight  # (B, units)
        time = time_embedding(t)
        pooled: Tensor | None = None

        def push_at(depth: int, h: Tensor) -> Tensor:
            nonlocal pooled
            if self.conditioned and pooled is None:  # the states before this adapter's first push
                pooled = pool(h, prompt_mask)
            return self.places[depth - self.first_depth](h, time, scale, pooled)

        return push_at


def pool(h: Tensor, prompt_mask: Tensor) -> Tensor:
    """Mean of the normalised states over the prompt's tokens: (B, L, D), (B, L) -> (B, D)."""
    share = prompt_mask.to(h.dtype)
    share = share / share.sum(1, keepdim=True).clamp(min=1.0)
    return (F.layer_norm(h, (h.shape[-1],)) * share[..., None]).sum(1)


class TrajectoryLora(Method):
    name, Config, default_lr = "trajectory-lora", TrajectoryLoraConfig, 5e-3
    summary = "a low-rank push on the states, with rank by noise level"

    def __init__(self, config: TrajectoryLoraConfig, model_config: ModelConfig):
        super().__init__(config, model_config)
        check(
            config.blocks <= model_config.num_layers,
            f"blocks must be at most the base's {model_config.num_layers}, got {config.blocks}",
        )

    @property
    def first_depth(self) -> int:
        return self.model_config.num_layers - self.config.blocks

    def install(self, model: Denoiser, generator: torch.Generator | None) -> dict[str, nn.Parameter]:
        self.push = TrajectoryPush(self.config, self.model_config, generator).to(model.embedding.weight.device)
        model.push = self.push
        return dict(self.push.named_parameters())

    @classmethod
    def expected_parameters(cls, config: TrajectoryLoraConfig, model_config: ModelConfig) -> int:
        d = model_config.d_model
        per_unit = 2 * d + TIME_WIDTH + (d if config.conditioning == "gate" else 0)
        return (config.blocks + 1) * config.modules * config.stored_rank * per_unit

    @classmethod
    def with_rank(cls, config: Any, rank: int) -> TrajectoryLoraConfig:
        """The same proportion between bands, with `rank` in the largest."""
        top = max(config.ranks)
        return replace(config, ranks=tuple(max(1, round(rank * r / top)) for r in config.ranks))

    def set_enabled(self, enabled: bool) -> None:
        self.push.weight = 1.0 if enabled else 0.0

    def penalty(self) -> Tensor | None:
        """lambda_rank * sum ||A_i B_i||_* + lambda_orth * sum_{i != j} ||A_i^T A_j||_F^2, over places and modules."""
        config = self.config
        if config.lambda_rank == 0 and config.lambda_orth == 0:
            return None
        total = torch.zeros((), device=self.push.units.device)
        for place in self.push.places:
            ups = place.up.split(config.stored_rank, dim=1)
            downs = place.down.split(config.stored_rank, dim=0)
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

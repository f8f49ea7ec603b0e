"""Weight LoRA (arXiv 2106.09685): W + scale * B A on attention and MLP matrices, scale = alpha / r.

With bands it is W + scale * B M(t) A: `ranks` lets a band use the first r(t) units only (after T-LoRA), and `core` puts
a small matrix between A and B, one a band, interpolated in t and shared by all matrices (after NaRA, arXiv 2605.29716).
Both need t, so they cannot be merged into the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld.config import ModelConfig, check, check_finite
from tinyld.errors import UsageError
from tinyld.methods.bands import NUM_BANDS, band_of, band_weights
from tinyld.methods.contract import Method
from tinyld.model import LINEARS, Denoiser


@dataclass(frozen=True)
class WeightLoraConfig:
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = LINEARS
    rslora: bool = False  # scale alpha / sqrt(r) (arXiv 2312.03732)
    ranks: tuple[int, ...] = ()  # units used by band, high noise first; empty: all of them
    core: bool = False  # a matrix a band between A and B
    dropout: float = 0.0  # share of the numbers that A reads that an update does without

    def __post_init__(self) -> None:
        check_finite(self)
        check(self.rank >= 1, f"rank must be at least 1, got {self.rank}")
        check(0 <= self.dropout < 1, f"dropout is a share in [0, 1), got {self.dropout}")
        check(self.alpha > 0, f"alpha must be above 0, got {self.alpha}")
        check(len(self.targets) > 0, f"targets must name at least one of {', '.join(LINEARS)}")
        check(len(set(self.targets)) == len(self.targets), f"targets names one twice: {', '.join(self.targets)}")
        for target in self.targets:
            check(target in LINEARS, f"targets must be among {', '.join(LINEARS)}, got {target!r}")
        if self.ranks:
            check(len(self.ranks) == NUM_BANDS, f"ranks needs {NUM_BANDS} values, high noise first, got {self.ranks}")
            check(1 <= min(self.ranks), f"every rank must be at least 1, got {','.join(map(str, self.ranks))}")
            check(max(self.ranks) <= self.rank, f"ranks must be at most rank {self.rank}, got {max(self.ranks)}")

    @property
    def banded(self) -> bool:
        return bool(self.ranks) or self.core

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class LoraLinear(nn.Module):
    """base(x) + scale * B(M(A(x))); B starts at zero."""

    def __init__(self, base: nn.Linear, config: WeightLoraConfig, generator: torch.Generator | None):
        super().__init__()
        self.base, self.scale, self.dropout, self.enabled = base, config.scale, config.dropout, True
        self.between: Tensor | None = None  # M of the rows at hand: (B, r, r); None is the identity
        a = torch.empty(config.rank, base.in_features)
        bound = base.in_features**-0.5  # kaiming_uniform with a = sqrt 5, as PEFT starts A
        self.lora_A = nn.Parameter(a.uniform_(-bound, bound, generator=generator).to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        hidden = F.dropout(x, self.dropout, self.training) @ self.lora_A.T
        if self.between is not None:
            hidden = hidden @ self.between.to(hidden.dtype)
        return y + hidden @ (self.lora_B.T * self.scale)


class BandClock(nn.Module):
    """Hangs on `Denoiser.clock`: sets M(t) between A and B of every matrix."""

    def __init__(self, config: WeightLoraConfig, matrices: Sequence[LoraLinear]):
        super().__init__()
        self.matrices = list(matrices)  # a plain list: they belong to the blocks
        cores = torch.eye(config.rank).repeat(NUM_BANDS, 1, 1)
        self.core: Tensor | nn.Parameter
        if config.core:
            self.core = nn.Parameter(cores)
        else:
            self.register_buffer("core", cores, persistent=False)
        ranks = torch.tensor(config.ranks or [config.rank] * NUM_BANDS)
        used = (torch.arange(config.rank)[None, :] < ranks[:, None]).float()  # (NUM_BANDS, r)
        self.register_buffer("used", used, persistent=False)

    def forward(self, t: Tensor) -> None:
        """t: (B,)"""
        core = torch.einsum("bn,nij->bij", band_weights(t, smooth=True), self.core)
        between = core * self.used[band_of(t)][:, None, :]
        for matrix in self.matrices:
            matrix.between = between


class WeightLora(Method):
    name, Config, rates = "weight-lora", WeightLoraConfig, {"adamw": 2e-3, "muon": 5e-3}
    summary = "a low-rank update of the attention and MLP matrices"

    def install(self, model: Denoiser, generator: torch.Generator | None) -> dict[str, nn.Parameter]:
        self.modules: dict[tuple[int, str], LoraLinear] = {}
        own: dict[str, nn.Parameter] = {}
        for i, block in enumerate(model.blocks):
            for name in self.config.targets:
                lora = LoraLinear(getattr(block, name), self.config, generator)
                setattr(block, name, lora)
                self.modules[i, name] = lora
                own[f"blocks.{i}.{name}.lora_A.weight"] = lora.lora_A
                own[f"blocks.{i}.{name}.lora_B.weight"] = lora.lora_B
        if self.config.banded:
            clock = BandClock(self.config, tuple(self.modules.values())).to(model.embedding.weight.device)
            model.clock = clock
            own |= dict(clock.named_parameters())
        return own

    @classmethod
    def expected_parameters(cls, config: WeightLoraConfig, model_config: ModelConfig) -> int:
        sizes = model_config.matrices()
        core = NUM_BANDS * config.rank**2 if config.core else 0
        return model_config.num_layers * config.rank * sum(sum(sizes[t]) for t in config.targets) + core

    @classmethod
    def with_rank(cls, config: Any, rank: int) -> WeightLoraConfig:
        """The same share of the units for every band."""
        return replace(config, rank=rank, ranks=tuple(max(1, round(rank * r / config.rank)) for r in config.ranks))

    def set_enabled(self, enabled: bool) -> None:
        for module in self.modules.values():
            module.enabled = enabled

    @classmethod
    def combine(
        cls, parts: Sequence[tuple[Any, Mapping[str, Tensor], float]], base: Mapping[str, Tensor]
    ) -> tuple[WeightLoraConfig, dict[str, Tensor]]:
        """Ranks side by side, so that B A is the exact weighted sum of the members' scaled products."""
        first = parts[0][0]
        if any(c.banded for c, _, _ in parts):
            raise UsageError("a weight-lora with bands cannot be combined: its update depends on t")
        if any(c.targets != first.targets for c, _, _ in parts):
            raise UsageError("weight-lora adapters of different targets cannot be combined")
        tensors = {}
        for name in parts[0][1]:
            if name.endswith("lora_A.weight"):
                tensors[name] = torch.cat([t[name] for _, t, _ in parts], dim=0)
            else:
                tensors[name] = torch.cat([w * c.scale * t[name] for c, t, w in parts], dim=1)
        rank = sum(c.rank for c, _, _ in parts)
        return WeightLoraConfig(rank, float(rank), first.targets), tensors

    @torch.no_grad()
    def merge(self, model: Denoiser) -> None:
        if self.config.banded:
            raise ValueError("a weight-lora with bands cannot be merged: its update depends on t")
        for (i, name), lora in self.modules.items():
            lora.base.weight += lora.scale * lora.lora_B @ lora.lora_A
            setattr(model.blocks[i], name, lora.base)


@torch.no_grad()
def truncate(
    config: WeightLoraConfig, tensors: Mapping[str, Tensor], rank: int
) -> tuple[WeightLoraConfig, dict[str, Tensor], float]:
    """(config, tensors, share of the squared norm that is lost) of the nearest update of lower rank (Eckart-Young),
    by QR of both factors and an SVD of their small product."""
    check(1 <= rank <= config.rank, f"rank must be from 1 to {config.rank}, got {rank}")
    kept, found, total = {}, 0.0, 0.0
    for name in tensors:
        if not name.endswith("lora_A.weight"):
            continue
        other = name.replace("lora_A", "lora_B")
        q_b, r_b = torch.linalg.qr(config.scale * tensors[other])
        q_a, r_a = torch.linalg.qr(tensors[name].T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        root = s[:rank].sqrt()
        kept[name] = root[:, None] * (vh[:rank] @ q_a.T)
        kept[other] = (q_b @ u[:, :rank]) * root
        found, total = found + float(s[:rank].square().sum()), total + float(s.square().sum())
    return WeightLoraConfig(rank, float(rank), config.targets), kept, 1.0 - found / max(total, 1e-30)

"""Weight LoRA (arXiv 2106.09685): W + scale * B A on attention and MLP matrices, scale = ALPHA / r."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld.config import ModelConfig, check, check_finite
from tinyld.errors import UsageError
from tinyld.methods.contract import Method
from tinyld.model import LINEARS, Denoiser

ALPHA = 16.0


@dataclass(frozen=True)
class WeightLoraConfig:
    rank: int = 8
    targets: tuple[str, ...] = LINEARS
    rslora: bool = False  # scale ALPHA / sqrt(r) (arXiv 2312.03732)
    dropout: float = 0.0  # share of the numbers that A reads that an update does without

    def __post_init__(self) -> None:
        check_finite(self)
        check(self.rank >= 1, f"rank must be at least 1, got {self.rank}")
        check(0 <= self.dropout < 1, f"dropout is a share in [0, 1), got {self.dropout}")
        check(len(self.targets) > 0, f"targets must name at least one of {', '.join(LINEARS)}")
        check(len(set(self.targets)) == len(self.targets), f"targets names one twice: {', '.join(self.targets)}")
        for target in self.targets:
            check(target in LINEARS, f"targets must be among {', '.join(LINEARS)}, got {target!r}")

    @property
    def scale(self) -> float:
        return ALPHA / (self.rank**0.5 if self.rslora else self.rank)


class LoraLinear(nn.Module):
    """base(x) + scale * B(A(x)); B starts at zero."""

    def __init__(self, base: nn.Linear, config: WeightLoraConfig, generator: torch.Generator | None):
        super().__init__()
        self.base, self.scale, self.dropout, self.enabled = base, config.scale, config.dropout, True
        a = torch.empty(config.rank, base.in_features)
        bound = base.in_features**-0.5  # kaiming_uniform with a = sqrt 5, as PEFT starts A
        self.lora_A = nn.Parameter(a.uniform_(-bound, bound, generator=generator).to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        hidden = F.dropout(x, self.dropout, self.training) @ self.lora_A.T
        return y + hidden @ (self.lora_B.T * self.scale)


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
        return own

    @classmethod
    def expected_parameters(cls, config: WeightLoraConfig, model_config: ModelConfig) -> int:
        sizes = model_config.matrices()
        return model_config.num_layers * config.rank * sum(sum(sizes[t]) for t in config.targets)

    def set_enabled(self, enabled: bool) -> None:
        for module in self.modules.values():
            module.enabled = enabled

    @classmethod
    def combine(
        cls, parts: Sequence[tuple[Any, Mapping[str, Tensor], float]], base: Mapping[str, Tensor]
    ) -> tuple[WeightLoraConfig, dict[str, Tensor]]:
        """Ranks side by side, so that B A is the exact weighted sum of the members' scaled products."""
        first = parts[0][0]
        if any(c.targets != first.targets for c, _, _ in parts):
            raise UsageError("weight-lora adapters of different targets cannot be combined")
        config, tensors = WeightLoraConfig(sum(c.rank for c, _, _ in parts), first.targets), {}
        for name in parts[0][1]:
            if name.endswith("lora_A.weight"):
                tensors[name] = torch.cat([t[name] for _, t, _ in parts], dim=0)
            else:
                tensors[name] = torch.cat([w * c.scale / config.scale * t[name] for c, t, w in parts], dim=1)
        return config, tensors

    @torch.no_grad()
    def merge(self, model: Denoiser) -> None:
        for (i, name), lora in self.modules.items():
            lora.base.weight += lora.scale * lora.lora_B @ lora.lora_A
            setattr(model.blocks[i], name, lora.base)

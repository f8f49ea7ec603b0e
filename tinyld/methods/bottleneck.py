"""Bottleneck adapters (Houlsby et al., arXiv 1902.00751): a small residual MLP after attention and after the MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld.config import ModelConfig, Settings, setting
from tinyld.methods.contract import Method, Parts
from tinyld.model import Denoiser


@dataclass(frozen=True)
class BottleneckConfig(Settings):
    rank: int = setting(16, least=1)  # width of the bottleneck


class BottleneckAdapter(nn.Module):
    """x + up(gelu(down(x))); `up` starts at zero, so a fresh adapter is the identity. x: (B, L, D)."""

    def __init__(self, width: int, rank: int, generator: torch.Generator | None):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        with torch.no_grad():
            self.down.weight.normal_(0.0, width**-0.5, generator=generator)
            for parameter in (self.down.bias, self.up.weight, self.up.bias):
                parameter.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


class Bottleneck(Method):
    name, Config, rates = "adapters", BottleneckConfig, {"adamw": 2e-3}
    summary = "a bottleneck MLP after attention and after the MLP of every block"

    def install(self, model: Denoiser, generator: torch.Generator | None) -> dict[str, nn.Parameter]:
        own: dict[str, nn.Parameter] = {}
        device = model.device
        for i, block in enumerate(model.blocks):
            for seam in ("after_attention", "after_mlp"):
                adapter = BottleneckAdapter(self.model_config.d_model, self.config.rank, generator).to(device)
                setattr(block, seam, adapter)
                own |= {f"blocks.{i}.{seam}.{n}": p for n, p in adapter.named_parameters()}
        return own

    @classmethod
    def expected_parameters(cls, config: BottleneckConfig, model_config: ModelConfig) -> int:
        d, r = model_config.d_model, config.rank
        return 2 * model_config.num_layers * (2 * d * r + r + d)

    @classmethod
    def combine(cls, parts: Parts, base: Mapping[str, Tensor]) -> tuple[BottleneckConfig, dict[str, Tensor]]:
        """Bottlenecks side by side: x + sum_i w_i (adapter_i(x) - x), exactly, everywhere."""
        tensors = {}
        for name in parts[0][1]:
            own = [t[name] for _, t, _ in parts]
            weighted = [w * t[name] for _, t, w in parts]
            if name.endswith("up.weight"):
                tensors[name] = torch.cat(weighted, dim=1)
            elif name.endswith("up.bias"):
                tensors[name] = torch.stack(weighted).sum(0)
            else:
                tensors[name] = torch.cat(own, dim=0)
        return BottleneckConfig(sum(c.rank for c, _, _ in parts)), tensors

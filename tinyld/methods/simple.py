"""Full fine-tuning, which trains all tensors of the base; BitFit (arXiv 2106.10199), the biases; bottleneck adapters
(Houlsby et al., arXiv 1902.00751), a small residual MLP after attention and after the MLP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld.config import ModelConfig, Settings, setting
from tinyld.errors import UsageError
from tinyld.methods.contract import Method
from tinyld.model import Denoiser


@dataclass(frozen=True)
class NoOptions:
    """The config of a method that has none."""


class Full(Method):
    name, Config = "full", NoOptions
    rates, post_norm = {"adamw": 5e-4, "muon": 1e-3}, {"adamw": 2e-4, "muon": 4e-4}

    def install(self, model: Denoiser, generator: torch.Generator | None) -> dict[str, nn.Parameter]:
        return dict(model.named_parameters())

    @classmethod
    def expected_parameters(cls, config: NoOptions, model_config: ModelConfig) -> int:
        return model_config.num_parameters()


class BitFit(Method):
    name, Config, rates = "bitfit", NoOptions, {"adamw": 5e-3}

    def install(self, model: Denoiser, generator: torch.Generator | None) -> dict[str, nn.Parameter]:
        if model.config.num_biases() == 0:
            raise UsageError("bitfit trains biases, and this base has none; take another --method")
        return {n: p for n, p in model.named_parameters() if n.endswith("bias")}

    @classmethod
    def expected_parameters(cls, config: NoOptions, model_config: ModelConfig) -> int:
        return model_config.num_biases()


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

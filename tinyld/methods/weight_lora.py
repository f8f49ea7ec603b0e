"""Weight LoRA (arXiv 2106.09685): W + scale * B A on attention and MLP matrices, scale = alpha / r."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyld.config import ModelConfig, check, check_finite
from tinyld.methods.contract import Method
from tinyld.model import LINEARS, Denoiser


@dataclass(frozen=True)
class WeightLoraConfig:
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = LINEARS
    rslora: bool = False  # scale alpha / sqrt(r) (arXiv 2312.03732)

    def __post_init__(self) -> None:
        check_finite(self)
        check(self.rank >= 1, f"rank must be at least 1, got {self.rank}")
        check(self.alpha > 0, f"alpha must be above 0, got {self.alpha}")
        check(len(self.targets) > 0, f"targets must name at least one of {', '.join(LINEARS)}")
        for target in self.targets:
            check(target in LINEARS, f"targets must be among {', '.join(LINEARS)}, got {target!r}")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class LoraLinear(nn.Module):
    """base(x) + scale * B(A(x)); B starts at zero."""

    def __init__(self, base: nn.Linear, config: WeightLoraConfig, generator: torch.Generator | None):
        super().__init__()
        self.base, self.scale, self.enabled = base, config.scale, True
        a = torch.empty(config.rank, base.in_features)
        bound = base.in_features**-0.5  # kaiming_uniform with a = sqrt 5, as PEFT starts A
        self.lora_A = nn.Parameter(a.uniform_(-bound, bound, generator=generator).to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + (x @ self.lora_A.T) @ (self.lora_B.T * self.scale) if self.enabled else y


class WeightLora(Method):
    name, Config, default_lr = "weight-lora", WeightLoraConfig, 2e-3
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
        d, f = model_config.d_model, model_config.d_ff
        sides = {"up": d + f, "down": f + d}
        return model_config.num_layers * config.rank * sum(sides.get(t, 2 * d) for t in config.targets)

    def set_enabled(self, enabled: bool) -> None:
        for module in self.modules.values():
            module.enabled = enabled

    @torch.no_grad()
    def merge(self, model: Denoiser) -> None:
        for (i, name), lora in self.modules.items():
            lora.base.weight += lora.scale * lora.lora_B @ lora.lora_A
            setattr(model.blocks[i], name, lora.base)

"""What trajectory LoRA is compared with.

Full fine-tuning trains all tensors of the base; BitFit (arXiv 2106.10199) the biases; bottleneck adapters (Houlsby et
al., arXiv 1902.00751) are a small residual MLP after attention and after the MLP; weight LoRA (arXiv 2106.09685) is
W + scale * B A on attention and MLP matrices, scale = ALPHA / r.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld.block import LINEARS
from tinyld.config import ModelConfig, check, setting
from tinyld.methods.contract import Method, MethodConfig
from tinyld.model import Denoiser

ALPHA = 16.0


class Full(Method):
    name, rates, post_norm = "full", {"adamw": 5e-4, "muon": 1e-3}, {"adamw": 2e-4, "muon": 4e-4}

    def install(self, model: Denoiser, generator: torch.Generator | None) -> dict[str, nn.Parameter]:
        return dict(model.named_parameters())

    @classmethod
    def expected_parameters(cls, config: MethodConfig, model_config: ModelConfig) -> int:
        return super().expected_parameters(config, model_config) + model_config.num_parameters()


class BitFit(Method):
    name, rates = "bitfit", {"adamw": 5e-3}

    def install(self, model: Denoiser, generator: torch.Generator | None) -> dict[str, nn.Parameter]:
        own = {n: p for n, p in model.named_parameters() if n.endswith("bias")}
        check(len(own) > 0, "bitfit trains biases, and this base has none; take another --method")
        return own

    @classmethod
    def expected_parameters(cls, config: MethodConfig, model_config: ModelConfig) -> int:
        return super().expected_parameters(config, model_config) + model_config.num_biases()


@dataclass(frozen=True)
class BottleneckConfig(MethodConfig):
    rank: int = setting(16, least=1)  # width of the bottleneck


class BottleneckAdapter(nn.Module):
    """x + up(gelu(down(x))); `up` starts at zero, so a fresh adapter is the identity. x: (B, L, D)."""

    def __init__(self, width: int, rank: int, generator: torch.Generator | None):
        super().__init__()
        self.down, self.up = (nn.utils.skip_init(nn.Linear, *size) for size in ((width, rank), (rank, width)))
        nn.init.normal_(self.down.weight, 0.0, width**-0.5, generator)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


class Bottleneck(Method):
    name, Config, rates = "adapters", BottleneckConfig, {"adamw": 2e-3}

    def install(self, model: Denoiser, generator: torch.Generator | None) -> dict[str, nn.Parameter]:
        own: dict[str, nn.Parameter] = {}
        for i, block in enumerate(model.blocks):
            for seam in ("after_attention", "after_mlp"):
                adapter = BottleneckAdapter(model.config.d_model, self.config.rank, generator).to(model.device)
                setattr(block, seam, adapter)
                own |= {f"blocks.{i}.{seam}.{n}": p for n, p in adapter.named_parameters()}
        return own

    @classmethod
    def expected_parameters(cls, config: BottleneckConfig, model_config: ModelConfig) -> int:
        d, r = model_config.d_model, config.rank
        return super().expected_parameters(config, model_config) + 2 * model_config.num_layers * (2 * d * r + r + d)


@dataclass(frozen=True)
class WeightLoraConfig(MethodConfig):
    rank: int = setting(8, least=1)
    targets: tuple[str, ...] = setting(LINEARS, among=LINEARS)
    rslora: bool = False  # scale ALPHA / sqrt(r) (arXiv 2312.03732)
    dropout: float = setting(0.0, least=0, below=1)  # share of the numbers that A reads that an update does without

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.targets) > 0, f"targets must name at least one of {', '.join(LINEARS)}")
        check(len(set(self.targets)) == len(self.targets), f"targets names one twice: {', '.join(self.targets)}")

    @property
    def scale(self) -> float:
        return ALPHA / (self.rank**0.5 if self.rslora else self.rank)


class LoraLinear(nn.Module):
    """base(x) + scale * B(A(x)); B starts at zero."""

    def __init__(self, base: nn.Linear, config: WeightLoraConfig, generator: torch.Generator | None):
        super().__init__()
        self.base, self.scale, self.dropout = base, config.scale, config.dropout
        bound = base.in_features**-0.5  # kaiming_uniform with a = sqrt 5, as PEFT starts A
        a = torch.empty(config.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(torch.zeros(base.out_features, config.rank))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)  # first: the order of the two decides how gradients add up, to the last bit
        hidden = F.dropout(x, self.dropout, self.training) @ self.lora_A.T
        return y + hidden @ (self.lora_B.T * self.scale)


class WeightLora(Method):
    name, Config, rates = "weight-lora", WeightLoraConfig, {"adamw": 2e-3, "muon": 5e-3}

    def install(self, model: Denoiser, generator: torch.Generator | None) -> dict[str, nn.Parameter]:
        own: dict[str, nn.Parameter] = {}
        for i, block in enumerate(model.blocks):
            for name in self.config.targets:
                lora = LoraLinear(getattr(block, name), self.config, generator).to(model.device)
                setattr(block, name, lora)
                own |= {f"blocks.{i}.{name}.lora_{x}.weight": getattr(lora, f"lora_{x}") for x in "AB"}
        return own

    @classmethod
    def expected_parameters(cls, config: WeightLoraConfig, model_config: ModelConfig) -> int:
        of_rank = model_config.num_layers * sum(sum(model_config.matrices()[t]) for t in config.targets)
        return super().expected_parameters(config, model_config) + config.rank * of_rank

    @torch.no_grad()
    def merge(self, model: Denoiser) -> None:
        for block in model.blocks:
            for name in self.config.targets:
                lora = getattr(block, name)
                lora.base.weight += lora.scale * lora.lora_B @ lora.lora_A
                setattr(block, name, lora.base)

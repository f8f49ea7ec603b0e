"""BitFit (arXiv 2106.10199): every bias of the base trains, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyld.config import ModelConfig
from tinyld.errors import UsageError
from tinyld.methods.contract import Method, task_arithmetic
from tinyld.model import Denoiser


@dataclass(frozen=True)
class BitFitConfig:
    """No options."""


class BitFit(Method):
    name, Config, rates, can_disable = "bitfit", BitFitConfig, {"adamw": 5e-3}, False
    summary = "every bias of the base"

    def install(self, model: Denoiser, generator: torch.Generator | None) -> dict[str, nn.Parameter]:
        if model.config.num_biases() == 0:
            raise UsageError("bitfit trains biases, and this base has none; take another --method")
        return {n: p for n, p in model.named_parameters() if n.endswith("bias")}

    @classmethod
    def expected_parameters(cls, config: BitFitConfig, model_config: ModelConfig) -> int:
        return model_config.num_biases()

    @classmethod
    def combine(
        cls, parts: Sequence[tuple[Any, Mapping[str, Tensor], float]], base: Mapping[str, Tensor]
    ) -> tuple[BitFitConfig, dict[str, Tensor]]:
        return BitFitConfig(), task_arithmetic(parts, base)

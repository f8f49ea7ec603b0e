"""Full fine-tuning: every parameter of the base trains and is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyld.config import ModelConfig
from tinyld.methods.contract import Method, task_arithmetic
from tinyld.model import Denoiser


@dataclass(frozen=True)
class FullConfig:
    """No options."""


class Full(Method):
    name, Config, can_disable = "full", FullConfig, False
    rates, post_norm = {"adamw": 5e-4, "muon": 1e-3}, {"adamw": 2e-4, "muon": 4e-4}
    summary = "every weight of the base"

    def install(self, model: Denoiser, generator: torch.Generator | None) -> dict[str, nn.Parameter]:
        return dict(model.named_parameters())

    @classmethod
    def expected_parameters(cls, config: FullConfig, model_config: ModelConfig) -> int:
        return model_config.num_parameters()

    @classmethod
    def combine(
        cls, parts: Sequence[tuple[Any, Mapping[str, Tensor], float]], base: Mapping[str, Tensor]
    ) -> tuple[FullConfig, dict[str, Tensor]]:
        return FullConfig(), task_arithmetic(parts, base)

"""Methods that train the base's own tensors: full fine-tuning, all of them; BitFit (arXiv 2106.10199), the biases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tinyld.config import ModelConfig
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

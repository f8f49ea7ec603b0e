"""Methods that train the base's own tensors: full fine-tuning, all of them; BitFit (arXiv 2106.10199), the biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyld.config import ModelConfig
from tinyld.errors import UsageError
from tinyld.methods.contract import Method, Parts
from tinyld.model import Denoiser


@dataclass(frozen=True)
class NoOptions:
    """The config of a method that has none."""


class OwnTensors(Method):
    """A method that trains tensors of the base; such adapters are combined by task arithmetic (arXiv 2212.04089)."""

    Config = NoOptions

    @classmethod
    def combine(cls, parts: Parts, base: Mapping[str, Tensor]) -> tuple[NoOptions, dict[str, Tensor]]:
        """base + sum_i w_i (theta_i - base)"""
        names = parts[0][1]
        return NoOptions(), {n: base[n] + sum(w * (own[n] - base[n]) for _, own, w in parts) for n in names}


class Full(OwnTensors):
    name, summary = "full", "every weight of the base"
    rates, post_norm = {"adamw": 5e-4, "muon": 1e-3}, {"adamw": 2e-4, "muon": 4e-4}

    def install(self, model: Denoiser, generator: torch.Generator | None) -> dict[str, nn.Parameter]:
        return dict(model.named_parameters())

    @classmethod
    def expected_parameters(cls, config: NoOptions, model_config: ModelConfig) -> int:
        return model_config.num_parameters()


class BitFit(OwnTensors):
    name, summary, rates = "bitfit", "every bias of the base", {"adamw": 5e-3}

    def install(self, model: Denoiser, generator: torch.Generator | None) -> dict[str, nn.Parameter]:
        if model.config.num_biases() == 0:
            raise UsageError("bitfit trains biases, and this base has none; take another --method")
        return {n: p for n, p in model.named_parameters() if n.endswith("bias")}

    @classmethod
    def expected_parameters(cls, config: NoOptions, model_config: ModelConfig) -> int:
        return model_config.num_biases()

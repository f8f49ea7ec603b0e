"""Frozen weights in fewer bits: bf16, or int8 with one scale a row. What trains on top of them is unchanged.

Matrices and embeddings are stored small and widened whenever they are used (torch.nn.utils.parametrize); biases and
norms stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tinyld.config import check_choice

BASE_DTYPES = ("fp32", "bf16", "int8")


class Int8(nn.Module):
    """Symmetric weight-only quantisation by row: w = values * scale, |values| <= 127."""

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for rows in weight.split(4096):  # few at a time, as what is needed on the way is larger than the matrix
            rows = rows.float()
            scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            parts.append(((rows / scale).round().to(torch.int8), scale))
        return torch.cat([values for values, _ in parts]), torch.cat([scale for _, scale in parts])

    def forward(self, values: Tensor, scale: Tensor) -> Tensor:
        return values.to(scale.dtype) * scale


class Bf16(nn.Module):
    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        return (weight.to(torch.bfloat16),)  # a tuple: torch lets its parts have types of their own

    def forward(self, values: Tensor) -> Tensor:
        return values.float()


def shrink(model: nn.Module, dtype: str) -> None:
    """Freezes the model's matrices and embeddings and keeps them in `dtype`."""
    check_choice("base dtype", dtype, BASE_DTYPES)
    if dtype == "fp32":
        return
    for module in list(model.modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.requires_grad_(False)
            parametrize.register_parametrization(module, "weight", Int8() if dtype == "int8" else Bf16(), unsafe=True)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters as they are kept in memory."""
    return sum(p.numel() * p.element_size() for p in model.parameters())

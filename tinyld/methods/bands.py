"""Timestep bands: what trajectory LoRA's pushes are told of a row's noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Timestep bands (t_lo, t_hi], from high noise to low as the paper lists them ("early" is high noise). Stated here only.
BAND_EDGES = (1.0, 2 / 3, 1 / 3, 0.0)
NUM_BANDS = len(BAND_EDGES) - 1
TIME_WIDTH = 16  # sinusoidal features of t


def band_of(t: Tensor) -> Tensor:
    """Index of the band that each t in (0, 1] falls in; 0 is the highest noise. t: (B,) -> (B,) int64."""
    inner = torch.tensor(BAND_EDGES[1:-1], device=t.device, dtype=t.dtype)
    return (t[:, None] <= inner[None, :]).sum(1)


def time_embedding(t: Tensor) -> Tensor:
    """Sinusoidal features of t in [0, 1]: (B,) -> (B, TIME_WIDTH)."""
    frequency = math.pi * 2.0 ** torch.arange(TIME_WIDTH // 2, device=t.device)
    angle = t[:, None] * frequency[None, :] / 2
    return torch.cat([angle.cos(), angle.sin()], dim=1)


@dataclass(frozen=True)
class Noise:
    """What the units of one forward pass are told, for B rows of L tokens."""

    band: Tensor  # (B,) index of the row's band
    time: Tensor  # (B, TIME_WIDTH)
    prompt_mask: Tensor  # (B, L) bool

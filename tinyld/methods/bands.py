"""Timestep bands, for every method whose rank depends on the noise level."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# Timestep bands (t_lo, t_hi], from high noise to low as the paper lists them ("early" is high noise). Stated here only.
BAND_EDGES = (1.0, 2 / 3, 1 / 3, 0.0)
BAND_NAMES = ("high", "middle", "low")
NUM_BANDS = len(BAND_NAMES)
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


def band_weights(t: Tensor, smooth: bool) -> Tensor:
    """How much each band has a say at t: (B,) -> (B, NUM_BANDS). All of one band's or, with `smooth`, linear in t
    between the middles of neighbouring bands."""
    if not smooth:
        return F.one_hot(band_of(t), NUM_BANDS).to(t.dtype)
    middles = torch.tensor([(hi + lo) / 2 for hi, lo in pairwise(BAND_EDGES)], device=t.device, dtype=t.dtype)
    near = 1.0 - (t.clamp(middles[-1], middles[0])[:, None] - middles).abs() / (middles[0] - middles[1])
    return near.clamp(min=0.0)

"""Timestep bands, and the paper's literal design (LoRA-Diffusion, eq. for x_{t-1}), which `--recipe paper` trains: on
the final state

    h <- h + sigma(t) * sum_i A_i(c) ReLU(B_i [h; Emb(t)])

with k modules, units of its own for every band, and penalties on rank and overlap. Three departures: up-projections
start at zero, so that a fresh adapter changes nothing; h is normalised where B_i reads it; and c, the prompt, is the
frozen base's own states, mean-pooled, which condition the up-projection as a gate on its columns, A_i(c) = A_i diag(1 +
W c).
"""

import math
from collections.abc import Sequence
from itertools import permutations

import torch
import torch.nn.functional as F
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


MODULES = 2  # k
RANKS, SIGMA = (64, 32, 8), (1.0, 0.5, 0.25)  # by band, high noise first
LAMBDA_RANK, LAMBDA_ORTH = 0.01, 0.001


def units_of_bands(ranks: Sequence[int]) -> Tensor:
    """(NUM_BANDS, units) bool, which units a band uses. Those of all modules stand side by side, and in each module
    those of one band after those of another."""
    band = torch.arange(NUM_BANDS).repeat_interleave(torch.tensor(ranks)).repeat(MODULES)  # of each unit
    return band == torch.arange(NUM_BANDS)[:, None]


def prompt_features(h: Tensor, prompt_mask: Tensor) -> Tensor:
    """(B, D): the mean over the prompt's tokens of normalised states h (B, L, D)."""
    share = prompt_mask / prompt_mask.sum(1, keepdim=True).clamp(min=1)
    return (F.layer_norm(h, h.shape[-1:]) * share[..., None]).sum(1)


def penalty(up: Tensor, down: Tensor) -> Tensor:
    """LAMBDA_RANK * sum_i ||A_i B_i||_* + LAMBDA_ORTH * sum_{i != j} ||A_i^T A_j||_F^2, over the modules."""
    ups, downs = up.chunk(MODULES, dim=1), down.chunk(MODULES, dim=0)
    rank = sum(nuclear_norm(*of_module) for of_module in zip(ups, downs, strict=True))
    return LAMBDA_RANK * rank + LAMBDA_ORTH * sum((a.T @ b).square().sum() for a, b in permutations(ups, 2))


def nuclear_norm(up: Tensor, down: Tensor) -> Tensor:
    """||up @ down||_*, the sum of singular values, with the subgradient U V^T of its nonzero part; up: (D, r), down:
    (r, E). Differentiating an SVD fails where singular values meet or vanish, and a fresh `up` is all zeros."""
    with torch.no_grad():
        (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.T)
        u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
        left, right = q_up @ (u * (s > 1e-6 * s.max().clamp(min=1e-12))), vh @ q_down.T
    return ((left.T @ up) * (right @ down.T)).sum()

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
from torch import Tensor, nn

from tinyld.block import take

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


def normal(*shape: int, fan_in: int, generator: torch.Generator | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).normal_(0.0, fan_in**-0.5, generator=generator))


MODULES = 2  # k
RANKS, SIGMA = (64, 32, 8), (1.0, 0.5, 0.25)  # by band, high noise first
LAMBDA_RANK, LAMBDA_ORTH = 0.01, 0.001


class PaperUnits(nn.Module):
    """The rank units of all k modules side by side; in each module those of one band after those of another."""

    def __init__(
        self, ranks: Sequence[int], sigma: Sequence[float], width: int, generator: torch.Generator | None = None
    ):
        super().__init__()
        units = MODULES * sum(ranks)
        self.down = normal(units, width + TIME_WIDTH, fan_in=width, generator=generator)
        self.up = nn.Parameter(torch.zeros(width, units))
        self.gate = nn.Parameter(torch.zeros(units, width))
        band = torch.repeat_interleave(torch.arange(NUM_BANDS), torch.tensor(ranks)).repeat(MODULES)  # of each unit
        sigmas = torch.tensor(sigma)[:, None] * F.one_hot(band, NUM_BANDS).T
        self.register_buffer("sigmas", sigmas, persistent=False)  # (NUM_BANDS, units): 0 where it is another band's

    def forward(self, h: Tensor, positions: Tensor | None, band: Tensor, time: Tensor, prompt_mask: Tensor) -> Tensor:
        """What is added to h (B, L, D), or to it at `positions` (B, M) alone, (B, M, D). Of the rows: band (B,), time
        (B, TIME_WIDTH), prompt_mask (B, L) bool."""
        width, down, up, gate = h.shape[-1], self.down, self.up, self.gate
        share = prompt_mask.to(h.dtype)
        share = share / share.sum(1, keepdim=True).clamp(min=1.0)
        c = (F.layer_norm(h, (width,)) * share[..., None]).sum(1)  # (B, D), the mean over the prompt's tokens
        scale = self.sigmas[band]  # (B, units)
        if bool((scale == scale[:1]).all()):  # one band: the others' units need not run
            used = scale[0].nonzero()[:, 0]
            down, up, gate, scale = down[used], up[:, used], gate[used], scale[:, used]
        if positions is not None:
            h = take(h, positions)
        hidden = F.layer_norm(h, (width,)) @ down[:, :width].T + (time @ down[:, width:].T)[:, None, :]
        scale = scale * (1.0 + c @ gate.T)
        return (F.relu(hidden) * scale[:, None, :]) @ up.T

    def penalty(self) -> Tensor:
        """LAMBDA_RANK * sum_i ||A_i B_i||_* + LAMBDA_ORTH * sum_{i != j} ||A_i^T A_j||_F^2, over the modules."""
        ups, downs = self.up.chunk(MODULES, dim=1), self.down.chunk(MODULES, dim=0)
        rank = sum(nuclear_norm(up, down) for up, down in zip(ups, downs, strict=True))
        return LAMBDA_RANK * rank + LAMBDA_ORTH * sum((a.T @ b).square().sum() for a, b in permutations(ups, 2))


def nuclear_norm(up: Tensor, down: Tensor) -> Tensor:
    """||up @ down||_*, the sum of singular values, with the subgradient U V^T of its nonzero part; up: (D, r), down:
    (r, E). Differentiating an SVD fails where singular values meet or vanish, and a fresh `up` is all zeros."""
    with torch.no_grad():
        (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.T)
        u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
        left, right = q_up @ (u * (s > 1e-6 * s.max().clamp(min=1e-12))), vh @ q_down.T
    return ((left.T @ up) * (right @ down.T)).sum()

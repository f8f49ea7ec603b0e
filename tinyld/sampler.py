"""The reverse process: from masked answer slots to tokens. Takes any denoiser that gives logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyld.config import SampleConfig
from tinyld.diffusion import SCHEDULES


@torch.no_grad()
def decode(
    denoiser: Any,
    x: Tensor,
    answer_mask: Tensor,
    attention_mask: Tensor,
    mask_id: int,
    forbidden: list[int],
    config: SampleConfig,
    generator: torch.Generator | None = None,
    eos_id: int | None = None,
) -> tuple[Tensor, int]:
    """(ids, forward passes): x with its answer slots decoded from all [MASK].

    x, answer_mask, attention_mask: (B, L). `forbidden` ids are never written. The denoiser is told each row's share
    of answer tokens that are still masked as t; rows that are done leave the batch, and the vocabulary head runs on
    masked positions only.

    Where the most confident tokens come first, `eos_id` comes after all others of its row: it is the likeliest token
    of most places of a long slot, and by its confidence alone a text would be ended before it is begun.
    """
    device = x.device
    generator = generator or torch.Generator(device).manual_seed(config.seed)
    x = torch.where(answer_mask, mask_id, x)
    prompt_mask = attention_mask & ~answer_mask
    size = answer_mask.sum(1)  # (B,)
    steps = config.steps or int(size.max())
    schedule = SCHEDULES[config.schedule]
    passes = 0
    for step in range(steps):
        masked = (x == mask_id) & answer_mask
        rows = masked.any(1).nonzero()[:, 0]
        if len(rows) == 0:
            break
        where = masked[rows]
        remaining = where.sum(1)
        real = attention_mask[rows]
        logits = denoiser(
            x[rows],
            remaining / size[rows],
            None if bool(real.all()) else real,
            prompt_mask[rows],
            where=where,
        ).float()  # (N, V)
        passes += 1
        logits[:, forbidden] = -torch.inf
        token, confidence = _draw(logits, config.temperature, generator)
        grid_token = x[rows].masked_scatter(where, token)
        grid_confidence = torch.full(where.shape, -torch.inf, device=device).masked_scatter(where, confidence)
        if eos_id is not None:
            ends = where & (grid_token == eos_id)
            waits = ends & (where & ~ends).any(1, keepdim=True)
            grid_confidence = grid_confidence - waits.float()
        last = step == steps - 1
        if config.sampler == "ancestral":
            now, then = (torch.tensor(1.0 - (step + i) / steps, device=device) for i in (0, 1))
            chance = (schedule.keep_prob(then) - schedule.keep_prob(now)) / schedule.mask_ratio(now)
            draw = torch.rand(where.shape, generator=generator, device=device)
            accept = where if last else where & (draw < chance)
        elif config.sampler == "threshold":
            best = grid_confidence.max(1, keepdim=True).values
            accept = where if last else where & ((grid_confidence >= config.threshold) | (grid_confidence == best))
        else:
            count = torch.ceil(remaining / (steps - step)).to(torch.int64)
            rank = grid_confidence.argsort(stable=True, dim=1, descending=True).argsort(1)
            accept = where & (rank < count[:, None])
        x[rows] = torch.where(accept, grid_token, x[rows])
    return x, passes


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(token, its probability) for logits (N, V), both (N,)."""
    probs = logits.softmax(-1)
    if temperature == 0:
        confidence, token = probs.max(-1)
        return token, confidence
    noisy = torch.softmax(logits / temperature, -1)
    token = torch.multinomial(noisy, 1, generator=generator)[:, 0]
    return token, probs.gather(1, token[:, None])[:, 0]

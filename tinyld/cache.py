"""The state cache: what a frozen base computes below a method's first push, kept so that later epochs start there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tinyld.data import Batch, TaskRows
from tinyld.diffusion import Noised
from tinyld.model import Denoiser
from tinyld.train import Noising


def kept_depths(model: Denoiser) -> tuple[int, int]:
    """The lowest block whose states are not the frozen base's, and how many depths up to it the model's push reads."""
    push = model.push
    return (0, 1) if push is None else (push.first_depth, push.first_depth + 1 if push.reads_depths else 1)


def why_not_cached(model: Denoiser, rows: TaskRows, limit_gb: float) -> str | None:
    """The reason why frozen states cannot be kept for these rows, or None when they can."""
    first_depth, depths = kept_depths(model)
    if first_depth == 0:
        return "the method changes the first block"
    if rows.slot > 1:
        return f"the answer has {rows.slot} tokens, whose masks vary"
    size = int(rows.lengths.sum()) * depths * model.config.d_model * 2 / 2**30
    return None if size <= limit_gb else f"{size:.1f} GB of states, --cache-gb allows {limit_gb:g}"


class StateCache:
    """bf16 states of every token of every row of one-token answers, which have one mask: before the lowest block that
    the model's push acts on, or, where it reads them, before every block up to it. A source of noise for training."""

    def __init__(
        self,
        model: Denoiser,
        rows: TaskRows,
        objective: Noising,
        autocast: Callable[[], torch.autocast],
        advance: Callable[[int], None] = lambda done: None,
    ):
        self.rows, self.objective = rows, objective
        self.starts = np.concatenate([[0], np.cumsum(rows.lengths)])  # of each row among the tokens of all
        first_depth, depths = kept_depths(model)
        self.states = torch.empty(int(self.starts[-1]), depths, model.config.d_model, dtype=torch.bfloat16)
        device, done = model.device, 0
        with torch.no_grad(), autocast():
            for chunk in rows.in_length_order(model.rows_at_once(int(rows.lengths.max()), 128)):
                batch = rows.take(chunk)
                noised = objective.noise(batch, 0)[0].to(device)
                history: list[Tensor] = []
                h = model.run_blocks(model.embed(noised.xt), noised.attention_mask, 0, first_depth, history=history)
                h = torch.stack([state.bfloat16() for state in [*history, h][-depths:]], dim=2)  # (B, L, depths, D)
                real = batch.attention_mask
                self.states[self.token_numbers(batch)[real]] = h.cpu()[real]
                done += len(chunk)
                advance(done)

    def token_numbers(self, batch: Batch) -> Tensor:
        """(B, L): each token's number among those of all rows; padding gets some other row's, or the last one's."""
        numbers = self.starts[batch.rows.numpy()][:, None] + np.arange(batch.x0.shape[1])[None, :]
        return torch.from_numpy(np.minimum(numbers, int(self.starts[-1]) - 1))

    def noise(self, batch: Batch, step: int) -> tuple[Noised, float]:
        """The noise with its frozen states; what padding gets attention never reads."""
        noised, normaliser = self.objective.noise(batch, step)
        return replace(noised, cached=self.states[self.token_numbers(batch)].float()), normaliser

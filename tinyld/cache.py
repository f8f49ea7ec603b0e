"""The state cache: what a frozen base computes below a method's first push, kept so that later epochs start there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from tinyld.data import Batch, TaskRows
from tinyld.diffusion import Noised
from tinyld.model import Denoiser


def why_not_cached(rows: TaskRows, first_depth: int, d_model: int, limit_gb: float, depths: int = 1) -> str | None:
    """The reason why frozen states of `depths` depths cannot be kept for these rows, or None when they can."""
    if first_depth == 0:
        return "the method changes the first block"
    if rows.slot > 1:
        return f"masks vary: the answer has {rows.slot} tokens"
    size = int(rows.lengths.sum()) * depths * d_model * 2 / 2**30
    return None if size <= limit_gb else f"{size:.1f} GB of states, --cache-gb allows {limit_gb:g}"


class StateCache:
    """bf16 states of every token of every row, the (one-token) answer masked: before block `first_depth`, or, with
    `all_depths`, before every block up to it."""

    def __init__(
        self,
        model: Denoiser,
        rows: TaskRows,
        first_depth: int,
        mask_id: int,
        autocast: Callable[[], torch.autocast],
        advance: Callable[[int], None] = lambda done: None,
        all_depths: bool = False,
    ):
        self.offsets = np.concatenate([[0], np.cumsum(rows.lengths)])
        self.lengths = rows.lengths
        depths = first_depth + 1 if all_depths else 1
        self.states = torch.empty(int(self.offsets[-1]), depths, model.config.d_model, dtype=torch.bfloat16)
        device = model.embedding.weight.device
        done = 0
        with torch.no_grad(), autocast():
            for chunk in rows.in_length_order(128):
                batch = rows.take(chunk)
                xt = torch.where(batch.answer_mask, mask_id, batch.x0).to(device)
                real = None if bool(batch.attention_mask.all()) else batch.attention_mask.to(device)
                history: list[torch.Tensor] = []
                h = model.run_blocks(model.embed(xt), real, 0, first_depth, history=history)
                h = torch.stack([*history, h] if all_depths else [h], dim=2)  # (B, L, depths, D)
                place, is_real = self._places(batch)
                self.states[place[is_real]] = h.cpu()[is_real].bfloat16()
                done += len(chunk)
                advance(done)

    def _places(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(place, is_real), both (B, L): where each token's state is kept, and whether it is a token."""
        rows = batch.rows.numpy()
        position = np.arange(batch.x0.shape[1])[None, :]
        place = np.minimum(self.offsets[rows][:, None] + position, len(self.states) - 1)
        return torch.from_numpy(place), torch.from_numpy(position < self.lengths[rows][:, None])

    def __call__(self, batch: Batch, noised: Noised) -> Noised:
        """The noised batch with its frozen states; padding gets some other row's, which attention never reads."""
        place, _ = self._places(batch)
        return replace(noised, cached=self.states[place].float())

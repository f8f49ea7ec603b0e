"""The state cache: what a frozen base computes below a method's first push, kept so that later epochs start there."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tinyld.data import Batch, TaskRows
from tinyld.diffusion import Noised
from tinyld.errors import TinyldError
from tinyld.model import Denoiser
from tinyld.train import Noising

IN_MEMORY_GB = 2.0  # more states than that are kept in a memory-mapped file in $TMPDIR


def why_not_cached(rows: TaskRows, first_depth: int, d_model: int, limit_gb: float, depths: int = 1) -> str | None:
    """The reason why frozen states of `depths` depths cannot be kept for these rows, or None when they can."""
    if first_depth == 0:
        return "the method changes the first block"
    if rows.slot > 1:
        return f"the answer has {rows.slot} tokens, whose masks vary"
    size = int(rows.lengths.sum()) * depths * d_model * 2 / 2**30
    return None if size <= limit_gb else f"{size:.1f} GB of states, --cache-gb allows {limit_gb:g}"


class StateCache:
    """bf16 states of every token of every row of one-token answers, which have one mask: before block `first_depth`,
    or, with `all_depths`, before every block up to it. A source of noise for the training loop."""

    def __init__(
        self,
        model: Denoiser,
        rows: TaskRows,
        objective: Noising,
        first_depth: int,
        autocast: Callable[[], torch.autocast],
        advance: Callable[[int], None] = lambda done: None,
        all_depths: bool = False,
    ):
        self.rows, self.objective = rows, objective
        self.starts = np.concatenate([[0], np.cumsum(rows.lengths)])  # of each row among the tokens of all
        depths = first_depth + 1 if all_depths else 1
        self.states = room_for(int(self.starts[-1]), depths, model.config.d_model)
        device, done = model.embedding.weight.device, 0
        with torch.no_grad(), autocast():
            for chunk in rows.in_length_order(128):
                batch = rows.take(chunk)
                noised = objective.noise(batch, 0)[0].to(device)
                history: list[Tensor] = []
                h = model.run_blocks(model.embed(noised.xt), noised.attention_mask, 0, first_depth, history=history)
                h = torch.stack([*history, h] if all_depths else [h], dim=2)  # (B, L, depths, D)
                real = batch.attention_mask
                self.states[self.token_numbers(batch)[real]] = h.cpu()[real].bfloat16()
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


def room_for(*shape: int) -> Tensor:
    """An empty bf16 tensor in memory, or, a large one, in a file that vanishes with the process.

    The file's blocks are allocated at once: where a sparse one meets a full disk, the write is a SIGBUS.
    """
    size = math.prod(shape)
    if 2 * size <= IN_MEMORY_GB * 2**30:
        return torch.empty(shape, dtype=torch.bfloat16)
    try:
        with tempfile.TemporaryFile(prefix="tinyld-states-") as file:
            os.posix_fallocate(file.fileno(), 0, 2 * size)
            mapped = np.memmap(file, np.int16, mode="r+", shape=(size,))
    except OSError as error:
        raise TinyldError(
            f"{2 * size / 2**30:.1f} GB of frozen states cannot be kept in {tempfile.gettempdir()} "
            f"({error.strerror}); set TMPDIR to a folder with room, or --cache-gb 0"
        ) from None
    return torch.from_numpy(mapped).view(torch.bfloat16).view(shape)

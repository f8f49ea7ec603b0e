"""The state cache: what a frozen base computes below a method's first push, kept so that later epochs start there."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tinyld.config import DiffusionConfig
from tinyld.data import Batch, TaskRows, torch_seeded
from tinyld.diffusion import Noised, add_noise_counted, as_noised, time_at
from tinyld.errors import TinyldError
from tinyld.model import Denoiser

IN_MEMORY_GB = 2.0  # more states than that are kept in a memory-mapped file in $TMPDIR


def why_not_cached(
    rows: TaskRows, first_depth: int, d_model: int, limit_gb: float, depths: int = 1, mask_draws: int = 0
) -> str | None:
    """The reason why frozen states of `depths` depths cannot be kept for these rows, or None when they can."""
    if first_depth == 0:
        return "the method changes the first block"
    if rows.slot > 1 and not mask_draws:
        return f"masks vary: the answer has {rows.slot} tokens; --mask-draws N takes N fixed ones a row"
    size = int(rows.lengths.sum()) * depths * max(mask_draws, 1) * d_model * 2 / 2**30
    return None if size <= limit_gb else f"{size:.1f} GB of states, --cache-gb allows {limit_gb:g}"


class FixedMasks:
    """`draws` noisings of every row, a function of the seed; epoch e trains row i on draw (i + e) mod draws.

    The draws of a row are stratified over t. One draw is all there is of a one-token answer, which is always masked.
    """

    def __init__(self, rows: TaskRows, config: DiffusionConfig, mask_id: int, seed: int, batch_size: int, draws: int):
        self.rows, self.config, self.mask_id, self.draws = rows, config, mask_id, draws
        self.steps_per_epoch = rows.steps_per_epoch(batch_size)
        self.offsets = np.concatenate([[0], np.cumsum(rows.lengths)])
        self.masked = torch.zeros(draws, int(self.offsets[-1]), dtype=torch.bool)
        self.t = torch.zeros(draws, len(rows))
        generator = torch_seeded(seed, 9)
        u = (torch.rand(len(rows), 1, generator=generator) + torch.arange(draws) / draws) % 1.0
        times = time_at(u, config.time_sampling)  # (rows, draws)
        for draw in range(draws):
            for chunk in rows.in_length_order(128):
                batch = rows.take(chunk)
                _, is_masked, t = add_noise_counted(
                    batch.x0, times[batch.rows, draw], batch.answer_mask, mask_id, generator
                )
                place, is_real = self.places(batch)
                self.masked[draw, place[is_real]] = is_masked[is_real]
                self.t[draw, batch.rows] = t.float()

    def places(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(place, is_real), both (B, L): each token's place among those of all rows, and whether it is a token."""
        rows = batch.rows.numpy()
        position = np.arange(batch.x0.shape[1])[None, :]
        place = np.minimum(self.offsets[rows][:, None] + position, int(self.offsets[-1]) - 1)
        return torch.from_numpy(place), torch.from_numpy(position < self.rows.lengths[rows][:, None])

    def draw(self, batch: Batch, step: int) -> Tensor:
        """(B,) the draw of each row at this step."""
        return (batch.rows + step // self.steps_per_epoch) % self.draws

    def noised(self, batch: Batch, draw: Tensor) -> tuple[Noised, float]:
        """(noised batch, normaliser) of each row's draw (B,)."""
        place, is_real = self.places(batch)
        is_masked = self.masked[draw[:, None], place] & is_real
        t = self.t[draw, batch.rows]
        xt = torch.where(is_masked, self.mask_id, batch.x0)
        return as_noised(batch.x0, xt, is_masked, t, 1.0 / t, batch.answer_mask, batch.attention_mask, self.config)

    def noise(self, batch: Batch, step: int) -> tuple[Noised, float]:
        return self.noised(batch, self.draw(batch, step))


class StateCache:
    """bf16 states of every token of every row under its fixed masks: before block `first_depth`, or, with
    `all_depths`, before every block up to it. A source of noise for the training loop, like `FixedMasks`."""

    def __init__(
        self,
        model: Denoiser,
        masks: FixedMasks,
        first_depth: int,
        autocast: Callable[[], torch.autocast],
        advance: Callable[[int], None] = lambda done: None,
        all_depths: bool = False,
    ):
        self.masks = masks
        depths = first_depth + 1 if all_depths else 1
        self.states = room_for(masks.draws, int(masks.offsets[-1]), depths, model.config.d_model)
        device = model.embedding.weight.device
        done = 0
        with torch.no_grad(), autocast():
            for draw in range(masks.draws):
                for chunk in masks.rows.in_length_order(128):
                    batch = masks.rows.take(chunk)
                    noised, _ = masks.noised(batch, torch.full((len(chunk),), draw))
                    noised = noised.to(device)
                    history: list[Tensor] = []
                    h = model.run_blocks(model.embed(noised.xt), noised.attention_mask, 0, first_depth, history=history)
                    h = torch.stack([*history, h] if all_depths else [h], dim=2)  # (B, L, depths, D)
                    place, is_real = masks.places(batch)
                    self.states[draw, place[is_real]] = h.cpu()[is_real].bfloat16()
                    done += len(chunk)
                    advance(done)

    def noise(self, batch: Batch, step: int) -> tuple[Noised, float]:
        """The fixed noise with its frozen states; padding gets some other row's, which attention never reads."""
        draw = self.masks.draw(batch, step)
        noised, normaliser = self.masks.noised(batch, draw)
        place, _ = self.masks.places(batch)
        return replace(noised, cached=self.states[draw[:, None], place].float()), normaliser


def room_for(*shape: int) -> Tensor:
    """An empty bf16 tensor in memory, or, a large one, in a file that vanishes with the process."""
    size = math.prod(shape)
    if 2 * size <= IN_MEMORY_GB * 2**30:
        return torch.empty(shape, dtype=torch.bfloat16)
    try:
        with tempfile.TemporaryFile(prefix="tinyld-states-") as file:
            file.truncate(2 * size)
            mapped = np.memmap(file, np.int16, mode="r+", shape=(size,))
    except OSError as error:
        raise TinyldError(
            f"{2 * size / 2**30:.1f} GB of frozen states cannot be kept in {tempfile.gettempdir()} "
            f"({error.strerror}); set TMPDIR to a folder with room, or --cache-gb 0"
        ) from None
    return torch.from_numpy(mapped).view(torch.bfloat16).view(shape)

"""How cost grows with the work: model size, row length, batch, rows decoded, rows cached, bytes of text."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tinyld.bench import released_base, run_method, run_pretrain, task_rows, timed_eval


@dataclass(frozen=True)
class Point:
    """One size of one kind of work."""

    work: str
    size: str
    run: Callable[[], dict[str, Any]]  # seconds, and a rate under the name of its unit

    @property
    def name(self) -> str:
        return f"{self.work}, {self.size}"


def decode(rows_read: int) -> dict[str, Any]:
    """Decoding of `reviews`, its rows repeated where there are too few."""
    from tinyld.checkpoint import load_base
    from tinyld.data import TaskRows
    from tinyld.tasks import load_split, load_task

    base, task = load_base(released_base()), load_task("reviews")
    examples = load_split(task, "train")
    examples = (examples * (rows_read // len(examples) + 1))[:rows_read]
    rows = TaskRows(examples, task, base.tokenizer, base.model.config.max_length)
    found = timed_eval(base, rows, rows_read)
    return found | {"rows/s": rows_read / found["seconds"]}


def cached(rows_read: int) -> dict[str, Any]:
    """An epoch of the recipe `fast`, whose frozen states of all depths are kept."""
    from tinyld.checkpoint import load_base

    base = load_base(released_base())
    rows = task_rows(base, "reviews", limit=rows_read)
    config = base.model.config
    size = int(rows.lengths.sum()) * (config.num_layers + 1) * config.d_model * 2 / 2**20
    return run_method("reviews", "trajectory-lora", limit=rows_read, epochs=1, recipe="fast") | {"cache MB": size}


def pretrain_on(megabytes: int) -> dict[str, Any]:
    """`tinyld pretrain` on a text file of that size, from the text to 4 steps of the preset nano."""
    import time

    from tinyld.config import PRESETS, VOCAB_SIZES, DiffusionConfig, TrainConfig
    from tinyld.device import DTYPES
    from tinyld.pretrain import pretrain
    from tinyld.runs import RunFolder
    from tinyld.tasks import bundled_data_dir
    from tinyld.tokenizer import read_lines

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        lines = list(read_lines([bundled_data_dir() / "corpus.txt.gz"]))
        with open(path, "w", encoding="utf-8") as file:
            number = 0
            while file.tell() < megabytes * 10**6:
                file.writelines(f"{number + i} {line}\n" for i, line in enumerate(lines))
                number += len(lines)
        started = time.perf_counter()
        found = pretrain(
            lambda: RunFolder.create(Path(folder) / "run", False), [path], [], PRESETS["nano"], VOCAB_SIZES["nano"],
            DiffusionConfig(), TrainConfig(steps=4, batch_size=32), DTYPES["fp32"], quiet=True,
            say=lambda text: None,
        )  # fmt: skip
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "MB/s": megabytes / (seconds - found["seconds"])}


def pretraining() -> list[Point]:
    """Rows of 256 tokens, 32 a step, where the name does not say otherwise (4 a step for `base`)."""
    shapes = [("nano", "nano", 256, 32, 12), ("small", "small", 256, 32, 12), ("base", "base", 256, 4, 3)]
    shapes += [(f"small, rows of {length}", "small", length, 8192 // length, 8) for length in (64, 1024)]
    shapes += [(f"small, {batch} rows a step", "small", 256, batch, 256 // batch) for batch in (8, 128)]
    return [Point("pretraining", name, partial(run_pretrain, *shape)) for name, *shape in shapes]


POINTS = [
    *pretraining(),
    *(Point("decoding, one-token answers", f"{n:,} rows", partial(decode, n)) for n in (250, 1_000, 4_000, 16_000)),
    *(Point("trajectory-lora fast, an epoch", f"{n:,} rows", partial(cached, n)) for n in (500, 1_000, 2_000)),
    *(Point("pretraining from text", f"{n:,} MB", partial(pretrain_on, n)) for n in (10, 100, 1_000)),
]
MEASUREMENTS = {point.name: point.run for point in POINTS}

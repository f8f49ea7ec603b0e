"""How often `best` is right beside how sure it says it is, on test rows: with and without smoothed labels.

    python data/results/calibration.py FILE.csv trec subj [sst2-sentences]

A task's rows are those of $TINYLD_DATA, at most 4,000 to train on, three epochs, seed 0. Of a run whose labels were
smoothed the probabilities are also shown as they were learned, before the smoothing is undone (`answers.by_label`).
`ece` is the expected calibration error of ten equal bins of the likeliest label's probability (Guo et al. 2017), `nats`
the mean of -log of the right label's, of which none is taken to be below 0.0001; `brier` the mean squared error.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from table import tables, write

import tinyld
from tinyld.answers import answers
from tinyld.config import SampleConfig
from tinyld.diffusion import SMOOTHED
from tinyld.rows import load_split
from tinyld.tables import print_table
from tinyld.tasks import load_task

LIMIT, LEAST = 4_000, 1e-4


def calibration(shares: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    """shares: (n, labels), a row's adding up to 1; gold: (n,)."""
    shares = np.maximum(shares, LEAST) / np.maximum(shares, LEAST).sum(1, keepdims=True)
    said, right = shares.max(1), shares.argmax(1) == gold
    bins = np.minimum((10 * said).astype(int), 9)
    gaps = [abs(right[bins == b].mean() - said[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    brier = ((shares - np.eye(shares.shape[1])[gold]) ** 2).sum(1).mean()
    nats = -np.log(shares[np.arange(len(gold)), gold]).mean()
    return {"accuracy": right.mean(), "said": said.mean(), "ece": sum(gaps), "brier": brier, "nats": nats}


def main(file: str, *tasks: str) -> None:
    lines: list[dict[str, Any]] = []
    for name in tasks:
        examples = load_split(load_task(name), "test" if "test" in load_task(name).splits else "dev")
        gold = np.array([example.label for example in examples])
        for smoothed in (0.0, SMOOTHED):
            both = [mock.patch(f"tinyld.{module}.SMOOTHED", smoothed) for module in ("diffusion", "finetuning")]
            with tempfile.TemporaryDirectory() as folder, both[0], both[1]:
                run = tinyld.finetune(name, out=Path(folder) / "run", limit=LIMIT, epochs=3)
                for undone in (False, True) if smoothed else (False,):
                    task = run.tasks[0] if undone else replace(run.tasks[0], smoothed=0.0)
                    found = answers(run, task, examples, SampleConfig())
                    shares = np.array([[each["probabilities"][label] for label in task.labels] for each in found])
                    how = {"task": name, "smoothed": smoothed, "undone": int(undone), "n": len(gold)}
                    lines.append(how | {k: round(float(v), 4) for k, v in calibration(shares, gold).items()})
                    write(Path(file), lines)
    for title, columns, cells in tables(Path(file)):
        print_table(title, columns, cells)


if __name__ == "__main__":
    main(*sys.argv[1:])

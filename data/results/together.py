"""Many tasks, one pass: time to answer the same texts by 1, 2, 4, 8 and 16 adapters, and what one more costs.

    python together.py [--base small] [--rows 512] [--adapters FOLDER ...] > together.csv

Without `--adapters`, of the recipe `fast` and one template, one is made from the bundled reviews in a step, and copied:
how long a push takes does not depend on what it has learned. Beside them as many weight LoRAs, each folded into a base
of its own that is held in memory (the fastest that they can be), and as many logistic regressions (scikit-learn) on one
pass's frozen states of all depths, mean-pooled and at the mask.
"""

import argparse
import csv
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from baselines import frozen_states
from sklearn.linear_model import LogisticRegression

import tinyld
from tinyld.checkpoint import load_base
from tinyld.data import TaskRows
from tinyld.device import autocast
from tinyld.options import base_folder
from tinyld.read import read_text
from tinyld.rows import bundled_data_dir, prompt_of
from tinyld.tasks import load_task
from tinyld.workspace import default_base

COUNTS = (1, 2, 4, 8, 16)


def fastest(work: Callable[[], Any], times: int) -> float:
    """Milliseconds of processor time of the fastest of several runs; what else runs on the machine counts little."""
    took = []
    for _ in range(times):
        started = time.process_time()
        work()
        took.append(1000 * (time.process_time() - started))
    return min(took)


def ours(paths: list[Path], args: Any, texts: list[str], copies: bool) -> Iterator[tuple[int, float, float, float]]:
    """(adapters, milliseconds, milliseconds to add the last, share of answers that are those of an adapter alone)."""
    alone = [tinyld.load(p, args.base, dtype=args.dtype).predict(texts) for p in (paths[:1] if copies else paths)]
    alone = alone * len(paths) if copies else alone
    for count in [c for c in COUNTS if c <= len(paths)]:
        runs = tinyld.load(paths[: max(1, count - 1)], args.base, dtype=args.dtype)
        added = fastest(lambda runs=runs, count=count: runs.add(paths[count - 1]), 1) if count > 1 else 0.0
        found = runs.predict(texts)
        same = sum(
            r["tasks"][path.name].items() <= expected.items()
            for path, rows in zip(paths[:count], alone, strict=False)
            for r, expected in zip(found, rows, strict=True)
        )
        yield count, fastest(lambda runs=runs: runs.predict(texts), args.times), added, same / (count * len(texts))


def folded(args: Any, texts: list[str]) -> Iterator[tuple[int, float]]:
    """(bases, milliseconds): each has a LoRA folded in, which leaves its shape, so that the base itself is timed."""
    base = tinyld.load(args.base or default_base(), dtype=args.dtype)
    for count in COUNTS:
        yield (
            count,
            fastest(lambda count=count: [base.predict(texts, task="reviews") for _ in range(count)], args.times),
        )


def regressions(args: Any, texts: list[str]) -> Iterator[tuple[int, float]]:
    """(logistic regressions, milliseconds), the base's pass included."""
    base, task = load_base(base_folder(args.base or "base", "base")), load_task("reviews")
    rows = [prompt_of(task, {"sentence": text}, "a text") for text in texts]

    def states() -> Any:
        encoded = TaskRows(rows, task, base.tokenizer, base.model.config.max_length)
        with autocast(base.model.device, args.dtype):
            return frozen_states(base, encoded)["all depths, mean and mask"]

    model = LogisticRegression(C=1e-3, max_iter=1000).fit(states()[:64], [i % 2 for i in range(len(texts))][:64])
    for count in COUNTS:
        yield (
            count,
            fastest(lambda count=count: [model.predict(x) for x in [states()] for _ in range(count)], args.times),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", help="base, or a released one's name; the released base if not given")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--adapters", nargs="*", type=Path)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    lines = read_text(bundled_data_dir() / "reviews" / "train.tsv").splitlines()[1:]
    texts = [line.split("\t")[0] for line in lines[: args.rows]]
    longer = [" ".join((texts + texts)[i : i + 4]) for i in range(len(texts))]
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(("how", "tasks", "rows", "milliseconds", "of one", "adding one", "same answers"))
    with tempfile.TemporaryDirectory() as folder:
        paths = args.adapters
        if not paths:
            first, *copies = paths = [Path(folder) / f"task-{i}" for i in range(max(COUNTS))]
            rows = [(text, "good" if i % 2 else "bad") for i, text in enumerate(texts[:64])]
            tinyld.finetune(rows, out=first, recipe="fast", steps=1, base=args.base)
            for copy in copies:
                shutil.copytree(first, copy)
        ways = {
            "trajectory-lora fast, one pass": ours(paths, args, texts, not args.adapters),
            "the same, texts of four sentences": ours(paths, args, longer, not args.adapters),
            "weight-lora folded in, a pass each": folded(args, texts),
            "logistic regressions, one pass": regressions(args, texts),
        }
        for name, measured in ways.items():
            one = 0.0
            for count, took, *more in measured:
                one = one or took
                added, same = (round(more[0], 1), f"{more[1]:.4f}") if more else ("", "")
                table.writerow((name, count, len(texts), round(took, 1), round(took / one, 3), added, same))
                sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Many tasks, one pass: seconds to answer the same texts by 1, 2, 4, 8 and 16 adapters, and what one more costs.

    python together.py [--base small] [--rows 512] [--adapters FOLDER ...] > together.csv

Without `--adapters`, of the recipe `fast` and one template, one is made from the bundled reviews in a step, and copied:
how long a push takes does not depend on what it has learned.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tinyld
from tinyld.read import read_text
from tinyld.rows import bundled_data_dir

COUNTS = (1, 2, 4, 8, 16)


def fastest(work: Callable[[], Any], times: int) -> float:
    """Milliseconds of processor time of the fastest of several runs; what else runs on the machine counts little."""
    took = []
    for _ in range(times):
        started = time.process_time()
        work()
        took.append(1000 * (time.process_time() - started))
    return min(took)


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
    with tempfile.TemporaryDirectory() as folder:
        paths = args.adapters
        if not paths:
            first, *copies = paths = [Path(folder) / f"task-{i}" for i in range(max(COUNTS))]
            rows = [(text, "good" if i % 2 else "bad") for i, text in enumerate(texts[:64])]
            tinyld.finetune(rows, out=first, recipe="fast", steps=1, base=args.base)
            for copy in copies:
                shutil.copytree(first, copy)
        answers, each = [], []
        for path in paths if args.adapters else paths[:1]:
            run = tinyld.load(path, args.base, dtype=args.dtype)
            answers.append(run.predict(texts))
            each.append(fastest(lambda run=run: run.predict(texts), args.times))
        if not args.adapters:
            answers, each = answers * len(paths), each * len(paths)
        table = csv.writer(sys.stdout, lineterminator="\n")
        table.writerow(("adapters", "rows", "milliseconds", "of one", "one at a time", "adding one", "same answers"))
        one = 0.0
        for count in [c for c in COUNTS if c <= len(paths)]:
            runs = tinyld.load(paths[: count - 1], args.base, dtype=args.dtype)
            added = fastest(lambda runs=runs, count=count: runs.add(paths[count - 1]), 1)
            found = runs.predict(texts)
            same = sum(
                r["tasks"][path.name].items() <= expected.items()
                for path, rows in zip(paths[:count], answers, strict=False)
                for r, expected in zip(found, rows, strict=True)
            )
            took = fastest(lambda runs=runs: runs.predict(texts), args.times)
            one = one or took
            table.writerow((count, len(texts), round(took, 1), round(took / one, 3), round(sum(each[:count]), 1),
                            round(added, 1), f"{same / (count * len(texts)):.4f}"))  # fmt: skip
            sys.stdout.flush()


if __name__ == "__main__":
    main()

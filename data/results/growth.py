"""How our cost grows with model, row length, batch and rows: python data/results/growth.py [--csv FILE]"""

import argparse
import csv
import tempfile
from pathlib import Path

from speed import tinyld  # of this folder

from tinyld.tables import print_table

TEXT = Path(__file__).parents[1] / "corpus.txt.gz"
SHAPES = [("nano", 256, 32, 12), ("small", 256, 32, 12), ("base", 256, 4, 3)]  # preset, tokens a row, rows, steps
SHAPES += [("small", length, 8192 // length, 8) for length in (64, 1024)] + [
    ("small", 256, n, 256 // n) for n in (8, 128)
]
COLUMNS = ("work", "size", "seconds", "rate", "unit", "peak_memory_mb")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i, (preset, length, batch, steps) in enumerate(SHAPES):
            words = ("--preset", preset, "--max-length", str(length), "--batch-size", str(batch), "--steps", str(steps))
            found = tinyld("pretrain", "--data", str(TEXT), *words, "--out", str(folder / f"base{i}"))
            rate = found["tokens"] / found["seconds"]
            rows.append(("pretraining", f"{preset}, {batch} rows of {length} a step", found["seconds"], round(rate),
                         "tokens/s", round(found["peak_memory_mb"])))  # fmt: skip
        for limit in (500, 1_000, 2_000):
            run = folder / f"fast{limit}"
            words = ("--recipe", "fast", "--limit", str(limit), "--epochs", "1", "--out", str(run))
            found = tinyld("finetune", "--task", "reviews", *words)
            rows.append(("trajectory-lora fast, an epoch", f"{limit:,} rows", found["seconds"],
                         round(limit / found["seconds"]), "rows/s", round(found["peak_memory_mb"])))  # fmt: skip
        for limit in (250, 1_000, 3_000):
            found = tinyld("eval", str(folder / "fast500"), "--split", "train", "--limit", str(limit))
            rate = found["rows_per_second"]
            rows.append(("decoding, one-token answers", f"{limit:,} rows", limit / rate, round(rate), "rows/s", None))
    print_table("how cost grows with the work", COLUMNS, rows)
    if options.csv is not None:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()

"""Accuracy against stored size, or training time, one panel a task: python data/results/plots.py small.csv size.svg

Add `seconds` for time in the place of size. Needs the extra `plots` (matplotlib).
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from table import read  # of this folder

from tinyld.report import aggregate

AXES = {"stored_percent": "stored, % of the base", "seconds": "training, seconds"}


def main(source: Path, target: Path, axis: str) -> None:
    found = [row for row in aggregate(read(source)) if row["accuracy"] is not None]
    tasks = sorted({row["task"] for row in found})
    methods = sorted({row["method"] for row in found})
    plt.rcParams["svg.hashsalt"] = "tinyld"  # the same bytes every time
    figure, panels = plt.subplots(1, len(tasks), figsize=(3.2 * len(tasks), 3.0), squeeze=False)
    for panel, task in zip(panels[0], tasks, strict=True):
        for number, method in enumerate(methods):
            rows = [row for row in found if row["task"] == task and row["method"] == method]
            error = [[100 * abs(row["accuracy"] - row[end]) for row in rows] for end in ("low", "high")]
            x, y = [row[axis] for row in rows], [100 * row["accuracy"] for row in rows]
            panel.errorbar(x, y, error, fmt="o", color=f"C{number}", label=method)
        panel.set(title=task, xscale="log", xlabel=AXES[axis], ylabel="accuracy, %" if panel is panels[0][0] else "")
    figure.legend(*panels[0][0].get_legend_handles_labels(), ncols=len(methods), loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), "seconds" if "seconds" in sys.argv[3:] else "stored_percent")

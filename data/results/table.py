"""Tables of the CSV files here, over seeds, with 95% intervals: python data/results/table.py small.csv [--markdown]

A file on one task becomes a row a method; on several tasks, a row a method with its accuracy on each.
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tinyld.errors import plain
from tinyld.report import COLUMNS, TEXTS, Row, aggregate, labels, over_seeds, result_tables, student
from tinyld.tables import percent, print_table, show

Table = tuple[str, Sequence[str], list[list[Any]]]  # title, columns, rows


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of any of the files, numbers as such, gaps as None."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: value(name, text) for name, text in row.items()} for row in csv.DictReader(file)]


def write(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None) -> None:
    """A CSV file of the rows; the first one's columns where none are given."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def value(name: str, text: str) -> Any:
    if name in TEXTS:
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text or None


def tables(path: Path) -> list[Table]:
    rows = read(path)
    if "rows_a_label" in rows[0]:
        return [by_rows(path.stem, rows)]
    if "dev_nll_bound" not in rows[0]:  # not of runs: compositions, seconds
        return [(path.stem, list(rows[0]), [list(row.values()) for row in rows])]
    found = aggregate(dict.fromkeys(COLUMNS) | row for row in rows)
    several = len({row["task"] for row in found}) > 1 and all(row["accuracy"] is not None for row in found)
    is_timed = len({row.get("fast_dtype") for row in rows}) == 1  # on like machines
    return [by_task(path.stem, found, is_timed), *ahead(found)] if several else result_tables(found)


def by_task(title: str, found: Sequence[Row], is_timed: bool) -> Table:
    """A row a method. Of its rows on one task that with the most training rows counts, then the fewest nats on dev.

    The interval of the mean takes the tasks' errors as independent; "% of full" is of the means, against the best full
    fine-tuning of each task on as many rows; seconds are of all tasks together.
    """
    tasks = sorted({row["task"] for row in found})
    alike = ("base", "fingerprint", "method", "recipe", "settings", "optimizer", "training")
    methods: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in found:
        mine = methods.setdefault(tuple(row[column] for column in alike), {})
        best = mine.get(row["task"])
        if best is None or (row["rows"], -row["dev_nll_bound"]) > (best["rows"], -best["dev_nll_bound"]):
            mine[row["task"]] = row
    same = dict.fromkeys(("data", "epochs", "steps", "batch_size", "lr", "tested"))
    named = labels([dict(zip(alike, key, strict=True)) | same for key in methods])
    cells = []
    for label, mine in zip(named, methods.values(), strict=True):
        whole = [mine[task] for task in tasks] if len(mine) == len(tasks) else []
        ends = [(row["low"], row["high"]) for row in whole]
        half = sum(((high - low) / 2) ** 2 for low, high in ends) ** 0.5 / max(1, len(ends))
        full = [row["accuracy"] / row["of_full"] for row in whole if row["of_full"]]
        mean = fmean(row["accuracy"] for row in whole) if whole else None
        cells.append([
            label, *(percent(mine[task]["accuracy"]) if task in mine else None for task in tasks),
            f"{percent(mean)} ± {percent(half)}" if whole else None,
            percent(mean / fmean(full)) if whole and len(full) == len(whole) else None,
            f"{next(iter(mine.values()))['stored_percent']:.2f}",
            *[round(sum(row["seconds"] for row in whole)) if whole else None] * is_timed,
        ])  # fmt: skip
    return title, ["method", *tasks, "mean %", "% of full", "stored %", *["seconds"] * is_timed], cells


def ahead(found: Sequence[Row]) -> list[Table]:
    """By how many points trajectory LoRA (best) is ahead of a weight LoRA of its stored size, to a fifth, on each task;
    nothing where the runs are of several bases.

    The 95% interval of the mean takes the tasks as drawn from all tasks (Student).
    """
    tasks, cells = sorted({row["task"] for row in found}), []
    if len({row["fingerprint"] for row in found}) > 1:
        return []
    found = [row for row in found if "auto" not in row["settings"]]
    for size in sorted({round(row["stored_percent"], 2) for row in found if row["recipe"] == "best"}):
        points = []
        for task in tasks:
            near = [r for r in found if r["task"] == task and 0.8 * size < r["stored_percent"] < 1.25 * size]
            ours = [r["accuracy"] for r in near if r["recipe"] == "best"]
            theirs = [r["accuracy"] for r in near if r["method"] == "weight-lora"]
            if ours and theirs:
                points.append(100 * (max(ours) - max(theirs)))
        if len(points) == len(tasks):
            mean = f"{fmean(points):+.1f} ± {over_seeds(points):.1f}"
            cells.append([f"{size:.1f}", *(f"{p:+.1f}" for p in points), mean])
    return [("points ahead", ["stored %", *tasks, "mean of the tasks"], cells)] if cells else []


def by_rows(title: str, rows: Sequence[Row]) -> Table:
    """A row a method: its mean accuracy over tasks and draws, by the number of labelled rows a label.

    The 95% interval is of the draws: their variance within a task, pooled over the tasks (Student).
    """
    sizes = sorted({row["rows_a_label"] for row in rows})
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows):
        line = [method]
        for size in sizes:
            tasks: dict[str, list[float]] = {}
            for row in rows:
                if (row["method"], row["rows_a_label"]) == (method, size):
                    tasks.setdefault(row["task"], []).append(row["accuracy"])
            if not tasks:
                line.append("-")
                continue
            mean = fmean(fmean(draws) for draws in tasks.values())
            free = sum(len(draws) - 1 for draws in tasks.values())
            text = f"{100 * mean:.1f}"
            if free > 0:
                spread = sum((a - fmean(draws)) ** 2 for draws in tasks.values() for a in draws) / free
                text += f" ± {100 * student(free) * (spread / sum(map(len, tasks.values()))) ** 0.5:.1f}"
            line.append(text)
        cells.append(line)
    return title, ["method", *(f"{size} a label" for size in sizes)], cells


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The table as Markdown."""
    lines = ["| " + " | ".join(plain(show(v)).replace("|", "\\|") for v in row) + " |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


if __name__ == "__main__":
    files = [word for word in sys.argv[1:] if word != "--markdown"]
    for file in files:
        for title, columns, cells in tables(Path(file)):
            if "--markdown" in sys.argv:
                print(f"{title}\n\n{markdown(columns, cells)}\n")
            else:
                print_table(title, columns, cells)

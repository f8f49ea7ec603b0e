"""Tables of many runs: which method is best, how surely, at what size and in what time.

`run_rows` reads a row a run (`COLUMNS`), which `--csv` keeps; `aggregate` makes one of all seeds.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tinyld.config import DiffusionConfig, TrainConfig, to_dict
from tinyld.errors import TinyldError
from tinyld.methods import METHODS
from tinyld.options import ReportOptions
from tinyld.runs import CONFIG, RESULTS, RunFolder
from tinyld.statistics import interval, mean_of, over_seeds
from tinyld.tables import print_table
from tinyld.write import write_atomic

Row = dict[str, Any]
ALIKE = ("task", "split", "base", "fingerprint", "method", "recipe", "settings", "rows", "epochs", "steps")
ALIKE += ("batch_size", "lr", "optimizer", "training")  # what runs share that differ by their seed alone
MEASURED = ("accuracy", "low", "high", "macro_f1", "unreadable", "nll_bound", "nll_stderr", "rows_per_second")
DEV = ("dev_accuracy", "dev_nll_bound")  # at the end of training: what a choice may go by
SIZES = ("stored_parameters", "stored_percent", "stored_bytes")
ENVIRONMENT = ("threads", "tinyld", "torch", "machine", "fast_dtype", "command")
COLUMNS = ("run", *ALIKE, "seed", "trials", "n", *DEV, *MEASURED, *SIZES, "seconds", "peak_memory_mb", *ENVIRONMENT)


def report(options: ReportOptions) -> list[Row]:
    """A row a method (`aggregate`) of all adapters; a row a run goes to `options.csv`."""
    rows = []
    for path in options.runs:
        inside = [path] if (path / CONFIG).exists() else sorted(p.parent for p in path.glob(f"*/{RESULTS}"))
        if not inside:
            raise TinyldError(f"no run in {path}: name evaluated adapters, or a folder of such")
        rows += [row for folder in inside for row in run_rows(RunFolder.open(folder))]
    if options.csv is not None:
        write_csv(options.csv, rows)
    return aggregate(rows)


# ------------------------------------------------------------------------------------------------ a row a run


def run_rows(folder: RunFolder, trials: int = 1) -> list[Row]:
    """A row for every evaluation of an adapter; of dev only where the task was not evaluated on test."""
    config, results = folder.config, folder.read_json(RESULTS)
    if config["kind"] != "adapter":
        raise TinyldError(f"{folder.path} holds a {config['kind']}; report takes adapters")
    found = results.get("eval", {})
    tested = {key.partition("/")[0] for key in found if key.endswith("/test")}
    method, train, base = dict(config["method"]), config["train"], config["base"]
    name = method.pop("name")
    about: Row = {column: None for column in COLUMNS} | {
        "run": folder.path.name,
        "base": Path(base["path"]).name,
        "fingerprint": base["fingerprint"],
        "method": name,
        "recipe": method.pop("recipe", None),
        "settings": settings(name, method, base.get("dtype", "fp32")),
        "rows": config["data"]["rows"],
        "training": unusual(train, config["diffusion"]),
        "trials": trials,
    }
    about |= {column: train.get(column) for column in ("epochs", "steps", "batch_size", "lr", "optimizer", "seed")}
    about |= {column: config["parameters"][column] for column in SIZES}
    about |= {column: results["finetune"].get(column) for column in ("seconds", "peak_memory_mb", *DEV)}
    about |= {column: config["environment"].get(column) for column in ENVIRONMENT}
    rows = []
    for key, evaluation in found.items():
        task, _, split = key.rpartition("/")
        if not (split == "dev" and task in tested):
            measured = {column: evaluation.get(column) for column in ("n", *MEASURED)}
            rows.append(about | {"task": task, "split": split} | measured)
    return rows


def settings(method: str, options: Mapping[str, Any], base_dtype: str) -> str:
    """A method's options that are not as they are by themselves, and what its base is kept in, in words."""
    usual = to_dict(METHODS[method].Config())
    parts = [] if base_dtype == "fp32" else [f"base in {base_dtype}"]
    for name, value in options.items():
        if value in (usual.get(name), list(usual[name]) if isinstance(usual.get(name), tuple) else None):
            continue
        if isinstance(value, list):
            numbers = all(isinstance(v, int | float) for v in value)
            value = value[0] if len(set(value)) == 1 else ("/" if numbers else " ").join(map(str, value))
        parts.append(name.replace("_", " ") + ("" if value is True else f" {value}"))
    return ", ".join(parts)


def unusual(train: Mapping[str, Any], diffusion: Mapping[str, Any]) -> str:
    """What of a run's training has no column and is not as it usually is, in words."""
    told = {"epochs", "steps", "batch_size", "lr", "optimizer", "seed"}
    silent = {"eval_every", "save_minutes", "keep", "recompute", "device"}  # they change no result
    usual = {f.name: f.default for kind in (TrainConfig, DiffusionConfig) for f in fields(kind)}
    given = {k: v for k, v in {**train, **diffusion}.items() if k in usual and k not in told | silent}
    other = [(k.replace("_", " "), v) for k, v in given.items() if v != usual[k]]
    return ", ".join(k if v is True else f"{k} {v}" for k, v in other)


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_atomic(path, text.getvalue().encode())


# ------------------------------------------------------------------------------------------------ a row a method


def aggregate(rows: Iterable[Row]) -> list[Row]:
    """A row for all runs that differ by their seed alone.

    "low" and "high" are the accuracy's 95% interval (`statistics.interval`), "nats" the mean NLL bound of an answer
    token, "nats_half" half of its interval; "of_full" is the share of the best full fine-tuning of the same base on as
    many rows. Runs with the most threads are timed.
    """
    cells: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
        key = tuple(row[column] or "" for column in ALIKE)
        cells.setdefault(key, {}).setdefault(row["seed"], row)  # a copy of a run is no further seed
    found = [one_row(list(runs.values())) for _, runs in sorted(cells.items(), key=lambda item: str(item[0]))]
    for row in found:
        alike = [r for r in found if all(r[k] == row[k] for k in ("task", "split", "fingerprint", "rows"))]
        full = [r["accuracy"] for r in alike if r["method"] == "full" and r["accuracy"] is not None]
        row["of_full"] = row["accuracy"] / max(full) if full and max(full) and row["accuracy"] is not None else None
    return found


def one_row(runs: Sequence[Row]) -> Row:
    first = runs[0]
    row = {column: first[column] for column in (*ALIKE, "trials", "n", *SIZES)} | {"seeds": len(runs)}

    def mean(column: str, of: Sequence[Row] = runs) -> float | None:
        values = [r[column] for r in of if r[column] is not None]
        return mean_of(values) if values else None

    row |= {column: mean(column) for column in (*DEV, "accuracy", "macro_f1", "unreadable")}
    row["low"], row["high"] = None, None
    if row["accuracy"] is not None:
        row["low"], row["high"] = interval([r["accuracy"] for r in runs], first["n"])
    row["nats"] = mean("nll_bound")
    row["nats_half"] = max(1.96 * (mean("nll_stderr") or 0.0), over_seeds([r["nll_bound"] for r in runs]))
    row["threads"] = max(r["threads"] or 0 for r in runs)
    timed = [r for r in runs if (r["threads"] or 0) == row["threads"]]
    return row | {column: mean(column, timed) for column in ("seconds", "peak_memory_mb", "rows_per_second")}


# ------------------------------------------------------------------------------------------------ what is shown


def percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f}"


NARROW = ("method", "accuracy %", "95% interval", "% of full", "nats", "stored %", "seconds")
GROUP = ("task", "base", "fingerprint", "split", "n", "rows")  # what a narrow table is about
TELLS_APART = ("recipe", "settings", "optimizer", "training", "epochs", "steps", "lr")


def result_tables(found: Sequence[Row], wide: bool) -> list[tuple[str, Sequence[str], list[list[Any]]]]:
    """(title, columns, rows): one table of all that is known, or a narrow one for every task, base and amount of rows.

    A narrow one has the accuracy or, where a task has none, the nats.
    """
    if wide or not found:
        columns = [column for column in (found[0] if found else NARROW) if column != "fingerprint"]
        return [("results", columns, [[row[column] for column in columns] for row in found])]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        groups.setdefault(tuple(row[k] for k in GROUP), []).append(row)
    tables = []
    for rows in groups.values():
        cells = [
            {
                "method": label,
                "accuracy %": percent(row["accuracy"]),
                "95% interval": None if row["low"] is None else f"{percent(row['low'])} to {percent(row['high'])}",
                "% of full": percent(row["of_full"]),
                "nats": f"{row['nats']:.3f} ± {row['nats_half']:.3f}",
                "stored %": f"{row['stored_percent']:.2f}",
                "seconds": round(row["seconds"]),
            }
            for label, row in zip(labels(rows), rows, strict=True)
        ]
        hidden = {"accuracy %", "95% interval"} if rows[0]["accuracy"] is None else {"nats"}
        columns = [c for c in NARROW if c not in hidden and any(row[c] is not None for row in cells)]
        seeds = "/".join(map(str, sorted({row["seeds"] for row in rows})))
        title = "{task} on {base}, {rows} training rows, {n} {split} rows, seeds: ".format(**rows[0]) + seeds
        tables.append((title, columns, [[row[c] for c in columns] for row in cells]))
    return tables


def labels(rows: Sequence[Row]) -> list[str]:
    """Each row's method, with as many of its settings as tell it from the others."""
    found = [row["method"] for row in rows]
    for column in TELLS_APART:
        values: dict[str, set[Any]] = {}
        for label, row in zip(found, rows, strict=True):
            values.setdefault(label, set()).add(row[column])
        unit = f"{column} " if column in ("epochs", "steps", "lr") else ""
        for i, (label, row) in enumerate(zip(list(found), rows, strict=True)):
            if len(values[label]) > 1 and row[column]:
                found[i] = f"{label}, {unit}{row[column]}"
    return found


def show(found: Sequence[Row], options: Any) -> None:
    """Prints what `report` or `compare` found: with `options.wide` all of it, else what fits 80 columns."""
    for title, columns, cells in result_tables(found, options.wide):
        print_table(title, columns, cells, options.wide)

"""Tables of many runs: which method is best, how surely, at what size and in what time.

`run_rows` reads a row a run (`COLUMNS`), which `--csv` keeps; `aggregate` makes one of all seeds.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tinyld.checkpoint import base_record
from tinyld.config import TrainConfig, check, check_type, to_dict
from tinyld.errors import TinyldError
from tinyld.evaluate import wilson
from tinyld.methods import METHODS
from tinyld.options import ReportOptions
from tinyld.runs import CONFIG, MANIFEST, RESULTS, ROWS_SUFFIX, RunFolder
from tinyld.tables import MISREAD, percent, print_table
from tinyld.tasks import learned_files
from tinyld.workspace import RUNS, check_writable, say_to_stderr
from tinyld.write import write_atomic

Row = dict[str, Any]
ALIKE = ("task", "split", "base", "fingerprint", "method", "recipe", "settings", "rows", "data", "epochs", "steps")
ALIKE += ("batch_size", "lr", "optimizer", "training", "tested")  # what runs share that differ by their seed alone
ON_ONE_BASE = ("task", "split", "fingerprint", "rows", "tested", "n")  # what a share of full fine-tuning is within
DEV = ("dev_accuracy", "dev_nll_bound")  # at the end of training: what a choice may go by
SIZES = ("stored_parameters", "stored_percent", "stored_bytes")
WRITTEN = ("bleu", "chrf", "rouge_l", "exact_match", "names_held")  # of texts; BLEU and chrF where sacrebleu is there
COLUMNS = ("run", *ALIKE, "seed", "trials", "n", *DEV, "accuracy", "low", "high", "macro_f1", "unreadable", *WRITTEN)
COLUMNS += ("nll_bound", "nll_stderr", *SIZES, "seconds", "threads", "peak_memory_mb", "rows_per_second")
COLUMNS += ("tinyld", "torch", "machine", "fast_dtype", "command")
TEXTS = ("run", "task", "split", "base", "fingerprint", "method", "recipe", "settings", "data", "optimizer")
TEXTS += ("training", "tested", "tinyld", "torch", "machine", "fast_dtype", "command")
ROW: Any = dict.fromkeys(COLUMNS, int | float | None) | dict.fromkeys(TEXTS, str | None)  # types of a row
ROW |= {c: int | float for c in ("n", "seed", "rows", "nll_bound", "seconds", *SIZES)} | {"task": str, "base": str}
TOLD = {*COLUMNS, "eval_every", "save_minutes", "keep", "recompute", "device"}  # and what changes no result


def report(options: ReportOptions) -> list[Row]:
    """A row a method (`aggregate`) of all adapters; a row a run goes to `options.csv`."""
    rows, inputs, without, say = [], list[Path](), list[str](), say_to_stderr(options.quiet)
    for path in options.runs or (RUNS,):
        if path.is_file() and path.name.endswith(ROWS_SUFFIX):  # as runs/* has them
            continue
        check(path.is_dir(), f"no run in {path}: name evaluated adapters, or a folder of such", TinyldError)
        is_run = (path / CONFIG).exists() or (path / MANIFEST).exists()  # or a damaged one
        inside = [] if is_run else sorted(p.parent for p in path.glob(f"*/{RESULTS}"))
        for folder in inside or [path]:
            try:
                run = RunFolder.open(folder)
                found = run_rows(run)
                inputs += learned_files(run.config)
            except TinyldError as error:
                if is_run:
                    raise
                say(f"{error}; it is left out")
                continue
            rows += found
            without += [] if found else [str(folder)]
    if without:
        which = ", ".join(without[:3]) + f" and {len(without) - 3} more" * (len(without) > 3)
        say(f"left out: {which}: adapters alone have a row, once they are evaluated (tinyld eval RUN)")
    check(rows, "none of these is an adapter that was evaluated; tinyld eval RUN does that", TinyldError)
    check_writable(options.csv, inputs)
    if options.csv is not None:
        write_csv(options.csv, rows)
    return aggregate(rows)


def run_rows(folder: RunFolder, trials: int | None = None) -> list[Row]:
    """A row for every evaluation of an adapter, none for other runs; of dev only where the task has no such on test.
    trials: how many learning rates were tried for it, where that is known."""
    config = folder.config
    results = folder.results
    if config["kind"] != "adapter" or "finetune" not in results:  # or it was killed before its end
        return []
    method, train, base = config.get("started_as", config["method"]), config["train"], base_record(config, folder.path)
    name, recipe = method["name"], method.get("recipe")
    if name not in METHODS:
        raise TinyldError(f"{folder.path / CONFIG}: method must be one of {', '.join(METHODS)}, got {name[:60]!r}")
    usual = to_dict(METHODS[name].Config()) | {"base": "in fp32"}
    if method.get("prune"):  # of each seed others are left
        method |= {"ranks": f"auto of {in_short(method['ranks'])}", "prune": usual["prune"]}
    method = {k: v for k, v in method.items() if k in usual and k != "recipe"}  # older runs had more
    trained = {f.name: f.default for f in fields(TrainConfig) if f.name not in TOLD}
    known = config["environment"] | config["parameters"] | train
    known |= {"base": Path(base.path).name, "fingerprint": base.fingerprint, "method": name, "recipe": recipe}
    known |= {"rows": config["data"]["rows"], "trials": trials}
    known["data"] = config["data"].get("sha256", "")[:8]  # of rows as they were asked, templates and answers included
    known["settings"] = unlike({"base": f"in {base.dtype}"} | method, usual)
    known["training"] = unlike({k: v for k, v in train.items() if k in trained}, trained)
    found, rows = results.get("eval", {}), []
    for key, evaluation in found.items():
        task, _, split = key.partition("/")
        if not (split == "dev" and f"{task}/test" in found):
            tested = evaluation.get("sha256", "")[:8]  # the rows that it was measured on, as they were asked
            about = {"run": folder.path.name, "task": task, "split": split, "tested": tested}
            row = results["finetune"] | known | evaluation | about
            rows.append(check_type({c: row.get(c) for c in COLUMNS}, ROW, f"{folder.path}: config or results"))
    return rows


def unlike(given: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """What is given otherwise than usual, in words."""
    parts = []
    for name, value in given.items():
        value = tuple(value) if isinstance(value, list) else value
        if value not in (usual.get(name), None):
            parts.append(name.replace("_", " ") + ("" if value is True else f" {in_short(value)}"))
    return ", ".join(parts)


def in_short(value: Any) -> Any:
    """Several values as one of them where they are the same, else in one word of numbers, or in several."""
    if not isinstance(value, list | tuple):
        return value
    numbers = all(isinstance(v, int | float) for v in value)
    return value[0] if value and all(v == value[0] for v in value) else ("/" if numbers else " ").join(map(str, value))


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_atomic(path, text.getvalue().encode())


def aggregate(rows: Iterable[Row]) -> list[Row]:
    """A row for all runs that differ by their seed alone.

    "low" and "high" are the accuracy's 95% interval (`interval`), "nats" the mean NLL bound of an answer token,
    "nats_half" half of its interval; "of_full" is the share of what the best full fine-tuning of the same base has on
    the same test rows from as many: of its accuracy or, where texts are written, BLEU or else ROUGE-L. Runs with the
    most threads are timed.
    """
    alike: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
        key = tuple(row[column] or "" for column in (*ALIKE, "n"))
        alike.setdefault(key, {}).setdefault(row["seed"], row)  # a copy of a run is no further seed
    found = []
    for _, by_seed in sorted(alike.items(), key=lambda item: str(item[0])):
        runs, first = list(by_seed.values()), next(iter(by_seed.values()))
        threads = max(run["threads"] or 0 for run in runs)
        timed = [run for run in runs if (run["threads"] or 0) == threads]
        row = {column: first[column] for column in (*ALIKE, "trials", "n", *SIZES)}
        row |= {"seeds": len(runs), "threads": threads, "low": None, "high": None, "nats": mean(runs, "nll_bound")}
        row |= {column: mean(runs, column) for column in (*DEV, "accuracy", "macro_f1", "unreadable", *WRITTEN)}
        row |= {column: mean(timed, column) for column in ("seconds", "peak_memory_mb", "rows_per_second")}
        if row["accuracy"] is not None:
            row["low"], row["high"] = interval([run["accuracy"] for run in runs], first["n"])
        of_rows, of_seeds = 1.96 * (mean(runs, "nll_stderr") or 0.0), over_seeds([run["nll_bound"] for run in runs])
        found.append(row | {"nats_half": max(of_rows, of_seeds)})
    for row in found:
        rivals = [r for r in found if all(r[column] == row[column] for column in ON_ONE_BASE)]
        score = next((s for s in ("accuracy", "bleu", "rouge_l") if row[s] is not None), "accuracy")
        full = max((r[score] or 0.0 for r in rivals if r["method"] == "full"), default=0.0)
        row["of_full"] = row[score] / full if full and row[score] is not None else None
    return found


def mean(runs: Sequence[Row], column: str) -> float | None:
    """The mean of the runs that have such a value."""
    values = [run[column] for run in runs if run[column] is not None]
    return fmean(values) if values else None


# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
T_95 += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def interval(accuracies: Sequence[float], n: int) -> tuple[float, float]:
    """95% interval of an accuracy: the wider of Wilson's over the rows (at the mean) and Student's over the seeds."""
    middle, half = fmean(accuracies), over_seeds(accuracies)
    low, high = wilson(middle * n, n)
    return max(min(low, middle - half), 0.0), min(max(high, middle + half), 1.0)


def over_seeds(values: Sequence[float]) -> float:
    """Half of the 95% interval of a mean over seeds, by Student's t; 0 for one seed, which says nothing of it."""
    seeds = len(values)
    return 0.0 if seeds == 1 else student(seeds - 1) * stdev(values) / seeds**0.5


def student(free: int) -> float:
    """The two-sided 95% quantile of Student's t for so many degrees of freedom; of more than there are, the last."""
    return T_95[min(free, len(T_95)) - 1]


# Column -> what it shows of a row; and in a wide table more of them.
SHOWN = {"method": "method", "accuracy %": "accuracy", "95% interval": "interval", "BLEU": "bleu"}
SHOWN |= {"ROUGE-L %": "rouge_l", "exact %": "exact_match", "% of full": "of_full", "nats": "nats"}
SHOWN |= {"stored %": "stored", "seconds": "seconds"}
WIDE = {"macro-F1": "macro_f1", "unreadable %": "unreadable", "chrF": "chrf", "names held": "names_held", "lr": "lr"}
WIDE |= {"epochs": "epochs", "steps": "steps", "seeds": "seeds", "stored bytes": "stored_bytes"}
WIDE |= {"peak MB": "peak_memory_mb", "rows/s": "rows_per_second"}
TELLS_APART = ("data", "recipe", "settings", "optimizer", "training", "epochs", "batch_size", "lr", "tested")


def result_tables(found: Sequence[Row], wide: bool = False) -> list[tuple[str, Sequence[str], list[list[Any]]]]:
    """(title, columns, rows) of a table for every task, base and amount of rows, with the accuracy or, where texts are
    written, their scores and nats; a wide one has more of both."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        groups.setdefault(tuple(row[k] for k in ("task", "base", "fingerprint", "split", "n", "rows")), []).append(row)
    tables = []
    for rows in groups.values():
        cells = []
        for label, row in zip(labels(rows), rows, strict=True):
            shares = ("accuracy", "unreadable", "rouge_l", "exact_match", "of_full")
            told = {name: percent(row[name]) for name in shares}
            told |= {"method": label, "stored": f"{row['stored_percent']:.2f}", "seconds": round(row["seconds"])}
            told["interval"] = None if row["low"] is None else f"{percent(row['low'])} to {percent(row['high'])}"
            told["bleu"] = None if row["bleu"] is None else f"{row['bleu']:.1f}"
            told["nats"] = f"{row['nats']:.3f} ± {row['nats_half']:.3f}"
            cells.append(row | told)
        scored = any(rows[0][score] is not None for score in ("accuracy", "rouge_l"))  # else nats are all there is
        shown = SHOWN | WIDE if wide else {c: k for c, k in SHOWN.items() if c != "nats" or not scored}
        if any((row["unreadable"] or 0) > MISREAD for row in rows):
            shown = {"method": "method", "unreadable %": "unreadable"} | shown
        shown = {c: k for c, k in shown.items() if any(row[k] is not None for row in cells)}
        seeds = "/".join(map(str, sorted({row["seeds"] for row in rows})))
        title = "{task} on {base}, {rows} training rows, {n} {split} rows, seeds: ".format(**rows[0]) + seeds
        tables.append((title, list(shown), [[row[k] for k in shown.values()] for row in cells]))
    return tables


def labels(rows: Sequence[Row]) -> list[str]:
    """Each row's method, with as many of its settings as tell it from the others."""
    found = [row["method"] for row in rows]
    for column in TELLS_APART:
        both = [(label, said(column, row)) for label, row in zip(found, rows, strict=True)]
        different = Counter(label for label, _ in set(both))
        found = [f"{label}, {value}" if value and different[label] > 1 else label for label, value in both]
    return found


def said(column: str, row: Row) -> str:
    """A setting in words; for epochs the steps, where a run was given these."""
    column = "steps" if column == "epochs" and not row["epochs"] else column
    unit = "" if column in ("recipe", "settings", "optimizer", "training") else f"{column.replace('_', ' ')} "
    return f"{unit}{row[column]}" if row[column] else ""


def show(found: Sequence[Row], options: Any) -> None:
    """Prints what `report` or `compare` found, as far as it fits 80 columns, or all of it."""
    for table in result_tables(found, options.wide):
        print_table(*table, options.wide)

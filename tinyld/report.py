"""Results as tables on stdout, from the same dictionaries that are written as JSON. The only way a table is made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tinyld.config import DiffusionConfig, TrainConfig
from tinyld.errors import TinyldError


def show(value: Any) -> str:
    """A number or text as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout; numbers right-aligned."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_header=any(columns))
    for i, column in enumerate(columns):
        numeric = any(isinstance(row[i], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(show(value)) for value in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    # printed by itself: a table breaks its own title to its width
    console.print(escape(title), style="bold", highlight=False, soft_wrap=True)
    console.print(table)


def escape(text: str) -> str:
    """Text without control characters or rich markup, safe to print whatever file it came from."""
    from rich.markup import escape as escape_markup

    return escape_markup("".join(c if c.isprintable() else "?" for c in text))


def print_record(title: str, record: Mapping[str, Any]) -> None:
    """One record, a line a field."""
    print_table(title, ("", ""), [(name.replace("_", " "), show(value)) for name, value in record.items()])


# ------------------------------------------------------------------------------------------------ many runs


RECORD_KEYS = ("kind", "task", "method", "started_as", "base", "train", "diffusion", "data", "parameters", "how")
RECORD_KEYS += ("members", "environment")


def run_record(path: Path) -> dict[str, Any]:
    """All that a table needs of one run: from its folder, or from a JSON file that `tinyld report --save` wrote."""
    from tinyld.runs import RESULTS, RunFolder, read_json

    if path.is_file():
        record = read_json(path)
        shape = {"run": str, "kind": str, "results": dict}
        if not isinstance(record, dict) or not all(isinstance(record.get(k), t) for k, t in shape.items()):
            raise TinyldError(f"{path}: not a result that tinyld report --save wrote")
        return record
    folder = RunFolder.open(path)
    config = folder.config
    if config["kind"] == "base":
        raise TinyldError(f"{path} holds a base; report takes adapters and compositions")
    kept = {k: config[k] for k in RECORD_KEYS if k in config}
    curve = [[round(r["seconds"], 2), r["dev_accuracy"]] for r in folder.metrics() if "dev_accuracy" in r]
    return {"run": path.name, **kept, **({"curve": curve} if curve else {}), "results": folder.read_json(RESULTS)}


def seconds_to(share: float, record: Mapping[str, Any]) -> float | None:
    """Seconds of training, the cache's included, until dev accuracy first was `share` of its own best."""
    curve = record.get("curve", [])
    best = max((accuracy for _, accuracy in curve), default=0.0)
    first = next((seconds for seconds, accuracy in curve if best > 0 and accuracy >= share * best), None)
    return None if first is None else first + record["results"]["finetune"].get("cache_seconds", 0.0)


RESULT_COLUMNS = ("task", "base", "method", "settings", "training", "trials", "seeds", "split", "rows", "accuracy %")
RESULT_COLUMNS += ("95% interval", "% of full", "unreadable %", "nats", "stored %", "bytes", "times smaller")
RESULT_COLUMNS += ("train s", "s to 95%", "peak MB", "rows/s")

NOT_BRIEF = ("trials", "unreadable %", "bytes", "times smaller", "s to 95%", "peak MB", "rows/s")

Cell = tuple[str, str, str, str]  # task, split, method, and all else that sets runs apart but their seed


def result_rows(records: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """A row for all runs that differ by their seed alone, on test where a run was evaluated there, else on dev.

    The interval of one seed is Wilson's over rows; of several, the wider of that (at the mean) and of Student's t over
    seeds, so that neither source of chance is left out. "% of full" is over the best full fine-tuning of the same
    base on as many rows; "nats" is the NLL bound of an answer token with its 95% interval, which is all that a
    generation task has; "trials" are the learning rates that were tried on dev; "s to 95%" is when dev accuracy first
    was 95% of its own best (of ten points a run under `tinyld compare`). Where runs had unlike numbers of threads,
    those with the most are timed.
    """
    cells: dict[Cell, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for record in records:
        if record["kind"] != "adapter":
            continue
        evaluations = record["results"].get("eval", {})
        tested = {key.partition("/")[0] for key in evaluations if key.endswith("/test")}
        for key, found in evaluations.items():
            task, _, split = key.partition("/")
            if "rows_per_second" in found and not (split == "dev" and task in tested):
                cell = (task, split, record["method"]["name"], identity(record))
                cells.setdefault(cell, []).append((record, found))
    means = {cell: _mean(f["accuracy"] for _, f in runs) for cell, runs in cells.items() if "accuracy" in runs[0][1]}
    rows = []
    for cell, runs in sorted(cells.items()):
        task, split, method, _ = cell
        first = runs[0][0]
        alike = _base_and_rows(first)
        full = [c for c in means if c[:3] == (task, split, "full") and _base_and_rows(cells[c][0][0]) == alike]
        whole = max((means[c] for c in full), default=0.0)
        n = runs[0][1]["n"]
        accuracy: tuple[str | None, ...] = (None, None, None, None)
        if cell in means:
            mean = means[cell]
            low, high = interval([f["accuracy"] for _, f in runs], n)
            accuracy = (
                f"{100 * mean:.1f}",
                f"{100 * low:.1f} to {100 * high:.1f}",
                f"{100 * mean / whole:.1f}" if whole else None,
                f"{100 * _mean(f['unreadable'] for _, f in runs):.1f}",
            )
        sizes, trials = first["parameters"], first.get("trials")
        threads = [r.get("environment", {}).get("threads", 0) for r, _ in runs]
        timed = [run for run, count in zip(runs, threads, strict=True) if count == max(threads)]
        reached = [s for s in (seconds_to(0.95, r) for r, _ in timed) if s is not None]
        about = (task, Path(first["base"]["path"]).name, method, settings(first), training(first))
        rows.append(
            (
                *(*about, len(trials) if trials else 1, len(runs), split, n),
                *accuracy,
                nats([f["nll_bound"] for _, f in runs], _mean(f["nll_stderr"] for _, f in runs)),
                f"{sizes['stored_percent']:.2f}",
                sizes["stored_bytes"],
                f"{100 / sizes['stored_percent']:.0f}",
                round(_mean(r["results"]["finetune"]["seconds"] for r, _ in timed)),
                round(_mean(reached)) if reached else None,
                round(_mean(r["results"]["finetune"]["peak_memory_mb"] for r, _ in timed)),
                round(_mean(f["rows_per_second"] for _, f in timed)),
            )
        )
    return rows


def _base_and_rows(record: Mapping[str, Any]) -> tuple[Any, int]:
    return record["base"].get("fingerprint"), record["data"]["rows"]


COMPOSE_COLUMNS = ("run", "method", "how", "adapters", "task", "split", "rows", "own %", "composed %", "points lost")
COMPOSE_COLUMNS += ("95% interval", "routed right %", "speed")


def compose_rows(records: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """A row for every source task of every composition: its own adapter, the composition, and the paired difference.

    "speed" is the composition's rows/s over the own adapters', all tasks together.
    """
    rows = []
    for record in _compositions(records):
        found = record["results"]["compose"]
        methods = "+".join(dict.fromkeys(m["method"]["name"] for m in record["members"]))
        for drop in found["drops"]:
            task = drop["task"]
            routed = found["routing_accuracy"].get(task)
            rows.append(
                (
                    *(record["run"], methods, found["how"], len(record["members"]), task, drop["split"], drop["n"]),
                    f"{100 * drop['own']:.1f}",
                    f"{100 * drop['composed']:.1f}",
                    f"{100 * drop['drop']:.2f}",
                    f"{100 * drop['low']:.2f} to {100 * drop['high']:.2f}",
                    None if routed is None else f"{100 * routed:.1f}",
                    f"{found['cost']['speed']:.2f}",
                )
            )
    return rows


def _compositions(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = sorted((r for r in records if r["kind"] == "composition"), key=lambda r: r["run"])
    for record in found:
        if "compose" not in record["results"]:
            raise TinyldError(f"{record['run']}: a composition that was never measured; compose its members again")
    return found


NEW_TASK_COLUMNS = ("run", "how", "new task", "split", "rows", "answered by", "accuracy %", "95% interval")
NEW_TASK_COLUMNS += ("unreadable %",)


def new_task_rows(records: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """A row for everything that answered a task that is no adapter's own (`--how search`): base, adapters, composed."""
    return [
        (
            *(record["run"], record["results"]["compose"]["how"], found["task"], found["split"], found["n"]),
            Path(found["run"]).name,
            f"{100 * found['accuracy']:.1f}",
            f"{100 * found['low']:.1f} to {100 * found['high']:.1f}",
            f"{100 * found['unreadable']:.1f}",
        )
        for record in _compositions(records)
        for found in record["results"]["compose"]["evaluations"]
        if "accuracy" in found and found["task"] not in [drop["task"] for drop in record["results"]["compose"]["drops"]]
    ]


CHAIN_COLUMNS = ("run", "reads", "then writes", "split", "rows", "read right %", "written as asked %", "95% interval")
CHAIN_COLUMNS += ("distinct %", "NLL written", "NLL of real text")


def chain_rows(records: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """A row for every `tinyld eval --then`: a label read and a text of the other label written, by one run."""
    return [
        (
            *(record["run"], found["task"], found["then"], found["split"], found["n"]),
            f"{100 * found['first_accuracy']:.1f}",
            f"{100 * found['written_as_asked']:.1f}",
            f"{100 * found['low']:.1f} to {100 * found['high']:.1f}",
            f"{100 * found['distinct']:.1f}",
            found["nll_written"],
            found["nll_real"],
        )
        for record in sorted(records, key=lambda r: r["run"])
        for found in record["results"].get("eval", {}).values()
        if "written_as_asked" in found
    ]


TEXT_COLUMNS = ("text", "tokens", "task", "base", "method", "settings", "training", "seeds", "nats of the base alone")
TEXT_COLUMNS += ("nats with it on", "forgotten")


def text_rows(records: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """A row for all runs that differ by their seed alone and were measured on running text (`tinyld eval --text`).

    All are in nats a token with their 95% interval; "forgotten" is the difference of the two bounds, which read the
    same rows under the same masks, with the interval of pairs.
    """
    cells: dict[tuple[str, int, int, str], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for record in records:
        for text, found in record["results"].get("text", {}).items() if record["kind"] == "adapter" else ():
            cell = (text, found["tokens"], found["draws"], record["task"] + identity(record))
            cells.setdefault(cell, []).append((record, found))
    rows = []
    for (text, tokens, *_), runs in sorted(cells.items()):
        first = runs[0][0]
        about = (text, tokens, first["task"], Path(first["base"]["path"]).name, first["method"]["name"])
        bounds = [
            nats([found[mean] for _, found in runs], _mean(found[stderr] for _, found in runs))
            for mean, stderr in (
                ("base_nll_bound", "base_nll_stderr"),
                ("nll_bound", "nll_stderr"),
                ("forgotten", "forgotten_stderr"),
            )
        ]
        rows.append((*about, settings(first), training(first), len(runs), *bounds))
    return rows


def tables(
    records: Sequence[dict[str, Any]], brief: bool = False
) -> list[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]]:
    """(title, columns, rows) of every table that the records fill; that of the adapters where they fill none.

    `brief` leaves out of that one the columns that a first look can do without.
    """
    found = [
        ("results", RESULT_COLUMNS, result_rows(records)),
        ("compositions", COMPOSE_COLUMNS, compose_rows(records)),
        ("new tasks", NEW_TASK_COLUMNS, new_task_rows(records)),
        ("read, then write the opposite", CHAIN_COLUMNS, chain_rows(records)),
        ("forgetting", TEXT_COLUMNS, text_rows(records)),
    ]
    if brief:
        found[0] = ("results", *without(NOT_BRIEF, RESULT_COLUMNS, found[0][2]))
    return [table for table in found if table[2]] or found[:1]


def without(
    left_out: Sequence[str], columns: tuple[str, ...], rows: list[tuple[Any, ...]]
) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """The table without some of its columns."""
    kept = [i for i, column in enumerate(columns) if column not in left_out]
    return tuple(columns[i] for i in kept), [tuple(row[i] for i in kept) for row in rows]


def defaults(kind: type) -> dict[str, Any]:
    """What a run says that was made before `kind` had all of its fields."""
    return {f.name: f.default for f in fields(kind)}


NOT_SHOWN = ("seed", "eval_every", "save_minutes", "keep", "recompute")  # of training: they change no result


def identity(record: Mapping[str, Any]) -> str:
    """Everything that runs of one row must share: method, base, data, noise and training, the seed left out."""
    train = {k: v for k, v in (defaults(TrainConfig) | record["train"]).items() if k not in NOT_SHOWN}
    diffusion = defaults(DiffusionConfig) | record["diffusion"]
    base = {k: record["base"].get(k) for k in ("fingerprint", "dtype")}
    method = {k: v for k, v in (record.get("started_as") or record["method"]).items() if USUAL.get(k) != v}
    parts = [method, base, train, diffusion, record["data"].get("rows"), record["data"].get("limit")]
    return settings(record) + json.dumps(parts, sort_keys=True)


# Options that need no words: every other value is shown.
USUAL: dict[str, Any] = {
    "alpha": 16.0, "rslora": False, "core": False, "targets": ["query", "key", "value", "out", "up", "down"],
    "sigma": [1.0, 0.5, 0.25], "modules": 1, "within": False, "tied": False, "activation": "relu", "sharing": "nested",
    "read": "state", "attend": 0, "conditioning": "none", "lambda_rank": 0.0, "lambda_orth": 0.0, "prune": 0.0,
    "ranks": [],
}  # fmt: skip


def settings(record: Mapping[str, Any]) -> str:
    """A method's options, as the run began, and what its base is kept in and its optimizer is, in a few words."""
    method = record.get("started_as") or record["method"]
    parts = []
    for name, value in method.items():
        if name == "name" or (name in USUAL and value == USUAL[name]):
            continue
        shown = "/".join(map(str, value)) if isinstance(value, list) else value
        parts.append(name if value is True else f"{name.replace('_', ' ')} {shown}")
    dtype = record["base"].get("dtype", "fp32")
    parts += [] if dtype == "fp32" else [f"base in {dtype}"]
    return ", ".join(parts + (["Muon"] if record.get("train", {}).get("optimizer") == "muon" else [])) or "-"


def training(record: Mapping[str, Any]) -> str:
    """Rows, budget, batch size and learning rate of a run, and what else of it is not as it usually is."""
    config = record["train"]
    budgets = ("epochs", "steps", "tokens", "minutes")
    unit = next(name for name in budgets if config[name] is not None)
    shown = f"{record['data']['rows']:,} rows, {config[unit]:g} {unit} of {config['batch_size']}, lr {config['lr']:g}"
    usual = defaults(TrainConfig) | defaults(DiffusionConfig) | {"time_sampling": "uniform"}
    given = config | record["diffusion"]
    told = (*NOT_SHOWN, *budgets, "batch_size", "lr", "optimizer")
    others = [k for k in usual if k not in told and given.get(k, usual[k]) != usual[k]]
    return ", ".join([shown, *(k.replace("_", " ") + ("" if given[k] is True else f" {given[k]}") for k in others)])


# Two-sided 95% quantiles of Student's t for 1 to 9 degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(accuracies: Sequence[float], n: int) -> tuple[float, float]:
    """95% interval of an accuracy over seeds and rows (see `result_rows`)."""
    from tinyld.statistics import wilson

    mean, half = _mean(accuracies), over_seeds(accuracies)
    low, high = wilson(mean * n, n)
    return max(min(low, mean - half), 0.0), min(max(high, mean + half), 1.0)


def nats(bounds: Sequence[float], stderr: float) -> str:
    """Mean NLL bound over seeds and the half of its 95% interval: the wider of that over rows and that over seeds."""
    return f"{_mean(bounds):.3f} ± {max(1.96 * stderr, over_seeds(bounds)):.3f}"


def over_seeds(values: Sequence[float]) -> float:
    """Half of the 95% interval of a mean over seeds, by Student's t; 0 for one seed, which says nothing of it."""
    seeds, mean = len(values), _mean(values)
    if seeds == 1:
        return 0.0
    spread = (sum((v - mean) ** 2 for v in values) / (seeds - 1)) ** 0.5
    return T_95[min(seeds - 1, len(T_95)) - 1] * spread / seeds**0.5


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The table as Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(show(v).replace("|", "\\|") for v in row) + " |" for row in rows]
    return "\n".join(lines)

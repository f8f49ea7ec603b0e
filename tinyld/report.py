"""The rows of every table of results, from the records of many runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyld.errors import TinyldError
from tinyld.records import identity, options, seconds_to, settings, training
from tinyld.statistics import interval, mean_of, nats

RESULT_COLUMNS = ("task", "base", "method", "settings", "training", "trials", "seeds", "split", "rows", "accuracy %")
RESULT_COLUMNS += ("95% interval", "% of full", "unreadable %", "nats", "stored %", "bytes", "times smaller")
RESULT_COLUMNS += ("train s", "threads", "s to 95%", "peak MB", "rows/s")

NOT_BRIEF = ("trials", "unreadable %", "bytes", "times smaller", "s to 95%", "peak MB", "rows/s")

Cell = tuple[str, str, str, str]  # task, split, method, and all else that sets runs apart but their seed

Runs = list[tuple[dict[str, Any], dict[str, Any]]]  # (record, one of its evaluations)


def result_rows(records: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """A row for all runs that differ by their seed alone, on test where a run was evaluated there, else on dev.

    The interval of one seed is Wilson's over rows; of several, the wider of that (at the mean) and of Student's t over
    seeds, so that neither source of chance is left out. "% of full" is over the best full fine-tuning of the same
    base on as many rows; "nats" is the NLL bound of an answer token with its 95% interval, which is all that a
    generation task has; "trials" are the learning rates that were tried on dev; "s to 95%" is when dev accuracy first
    was 95% of its own best (of the `--curve-points` of a run under `tinyld compare`). Where runs had unlike numbers of
    threads, those with the most are timed, and "threads" is how many these had. Rows/s are of decoding, and of texts
    not given, as `compare` writes these in one pass.
    """
    cells = evaluated(records)
    means = accuracies(cells)
    rows = []
    for cell, runs in sorted(cells.items()):
        task, split, method, _ = cell
        first = runs[0][0]
        whole = best_full(cell, cells, means)
        n = runs[0][1]["n"]
        accuracy: tuple[str | None, ...] = (None, None, None, None)
        if cell in means:
            mean = means[cell]
            low, high = interval([f["accuracy"] for _, f in runs], n)
            accuracy = (
                f"{100 * mean:.1f}",
                f"{100 * low:.1f} to {100 * high:.1f}",
                f"{100 * mean / whole:.1f}" if whole else None,
                f"{100 * mean_of(f['unreadable'] for _, f in runs):.1f}",
            )
        sizes, trials = first["parameters"], first.get("trials")
        timed = _timed(runs)
        reached = [s for s in (seconds_to(0.95, r) for r, _ in timed) if s is not None]
        about = (task, base_name(first), method, settings(first), training(first))
        rows.append(
            (
                *(*about, len(trials) if trials else 1, len(runs), split, n),
                *accuracy,
                nats([f["nll_bound"] for _, f in runs], mean_of(f["nll_stderr"] for _, f in runs)),
                f"{sizes['stored_percent']:.2f}",
                sizes["stored_bytes"],
                f"{100 / sizes['stored_percent']:.0f}",
                round(seconds(runs)),
                threads(runs),
                round(mean_of(reached)) if reached else None,
                round(mean_of(r["results"]["finetune"]["peak_memory_mb"] for r, _ in timed)),
                round(mean_of(f["rows_per_second"] for _, f in timed)) if cell in means else None,
            )
        )
    return rows


def evaluated(records: Sequence[dict[str, Any]]) -> dict[Cell, Runs]:
    """The runs of every cell of the results, one a seed, each with its evaluation."""
    cells: dict[Cell, Runs] = {}
    for record in records:
        if record["kind"] != "adapter":
            continue
        evaluations = record["results"].get("eval", {})
        tested = {key.partition("/")[0] for key in evaluations if key.endswith("/test")}
        for key, found in evaluations.items():
            task, _, split = key.partition("/")
            if "rows_per_second" in found and not (split == "dev" and task in tested):
                cell = (task, split, record["method"]["name"], identity(record))
                add_seed(cells.setdefault(cell, []), record, found)
    return cells


def add_seed(runs: Runs, record: dict[str, Any], found: dict[str, Any]) -> None:
    """Adds a run with what was found of it, unless its seed is there: a copy is no further seed."""
    if record["train"]["seed"] not in [r["train"]["seed"] for r, _ in runs]:
        runs.append((record, found))


def accuracies(cells: Mapping[Cell, Runs]) -> dict[Cell, float]:
    """Mean accuracy of the cells whose task has one."""
    return {cell: mean_of(f["accuracy"] for _, f in runs) for cell, runs in cells.items() if "accuracy" in runs[0][1]}


def own_cells(cells: Mapping[Cell, Runs]) -> dict[Cell, Runs]:
    """The cells with an accuracy on the task that their runs were trained on; on its test rows where any were read."""
    own = {
        cell: runs
        for cell, runs in cells.items()
        if "accuracy" in runs[0][1] and runs[0][0]["results"]["finetune"]["task"] == cell[0]
    }
    tested = {cell[0] for cell in own if cell[1] == "test"}
    return {cell: runs for cell, runs in own.items() if cell[1] == "test" or cell[0] not in tested}


def best_full(cell: Cell, cells: Mapping[Cell, Runs], means: Mapping[Cell, float]) -> float:
    """The best accuracy of full fine-tuning of the same base, on the same split and as many rows; 0 without any."""
    alike = _base_and_rows(cells[cell][0][0])
    full = [c for c in means if c[:3] == (*cell[:2], "full") and _base_and_rows(cells[c][0][0]) == alike]
    return max((means[c] for c in full), default=0.0)


METHOD_COLUMNS = ("mean %", "% of full", "stored %", "train s", "threads")


def method_rows(records: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """(columns, rows): a row a method and base, with its accuracy on every task, where there are several tasks.

    Of a method's rows on one task the one with the most training rows counts, then the one with the better dev bound.
    The interval of the mean takes the tasks' errors as independent. "% of full" is of the means over tasks, against the
    best full fine-tuning of each task on as many rows; "train s" is of all tasks together, with the "threads" of each.
    """
    cells = own_cells(evaluated(records))
    means = accuracies(cells)
    tasks = sorted({cell[0] for cell in cells})
    if len(tasks) < 2:
        return (), []
    found: dict[tuple[str, str, str, str], dict[str, Cell]] = {}
    for cell, runs in cells.items():
        first = runs[0][0]
        about = (first["method"]["name"], ", ".join(options(first)) or "-")
        mine = found.setdefault((base_name(first), *about, str(first["base"].get("fingerprint"))), {})
        if cell[0] not in mine or _weight(runs) > _weight(cells[mine[cell[0]]]):
            mine[cell[0]] = cell

    def half(of: Iterable[Cell]) -> float:
        """Of the 95% interval of a mean over tasks."""
        ends = [interval([f["accuracy"] for _, f in cells[c]], cells[c][0][1]["n"]) for c in of]
        return sum(((high - low) / 2) ** 2 for low, high in ends) ** 0.5 / len(ends)

    rows = []
    for (base, method, about, _), mine in sorted(found.items()):
        whole = len(mine) == len(tasks)
        mean = mean_of(means[cell] for cell in mine.values()) if whole else None
        full = [best_full(cell, cells, means) for cell in mine.values()]
        sizes = cells[next(iter(mine.values()))][0][0]["parameters"]
        rows.append(
            (
                *(base, method, about),
                *(f"{100 * means[mine[task]]:.1f}" if task in mine else None for task in tasks),
                None if mean is None else f"{100 * mean:.1f} ± {100 * half(mine.values()):.1f}",
                None if mean is None or not all(full) else f"{100 * mean / mean_of(full):.1f}",
                f"{sizes['stored_percent']:.2f}",
                round(sum(seconds(cells[cell]) for cell in mine.values())) if whole else None,
                "/".join(map(str, sorted({threads(cells[cell]) for cell in mine.values()}))),
            )
        )
    return ("base", "method", "settings", *(f"{task} %" for task in tasks), *METHOD_COLUMNS), rows


def seconds(runs: Runs) -> float:
    """Of training, over the runs with the most threads."""
    return mean_of(r["results"]["finetune"]["seconds"] for r, _ in _timed(runs))


def threads(runs: Runs) -> int:
    """The most that a run had; of those that are timed."""
    return max(record.get("environment", {}).get("threads", 0) for record, _ in runs)


def _weight(runs: Runs) -> tuple[int, float]:
    """What a cell counts in a choice between a method's cells of one task."""
    return runs[0][0]["data"]["rows"], -mean_of(r["results"]["finetune"]["dev_nll_bound"] for r, _ in runs)


def _timed(runs: Runs) -> Runs:
    """Those with the most threads."""
    most = threads(runs)
    return [run for run in runs if threads([run]) == most]


def base_name(record: Mapping[str, Any]) -> str:
    return Path(record["base"]["path"]).name


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
            add_seed(cells.setdefault(cell, []), record, found)
    rows = []
    for (text, tokens, *_), runs in sorted(cells.items()):
        first = runs[0][0]
        about = (text, tokens, first["task"], base_name(first), first["method"]["name"])
        bounds = [
            nats([found[mean] for _, found in runs], mean_of(found[stderr] for _, found in runs))
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

    `brief` leaves out of that one the columns that a first look can do without, and the threads where they are alike.
    """
    found = [
        ("results", RESULT_COLUMNS, result_rows(records)),
        ("methods", *method_rows(records)),
        ("compositions", COMPOSE_COLUMNS, compose_rows(records)),
        ("new tasks", NEW_TASK_COLUMNS, new_task_rows(records)),
        ("read, then write the opposite", CHAIN_COLUMNS, chain_rows(records)),
        ("forgetting", TEXT_COLUMNS, text_rows(records)),
    ]
    if brief:
        found[0] = ("results", *without(NOT_BRIEF, RESULT_COLUMNS, found[0][2]))
        found[:2] = [(title, *without_one_valued("threads", columns, rows)) for title, columns, rows in found[:2]]
    return [table for table in found if table[2]] or found[:1]


def without_one_valued(
    column: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]
) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """The table without a column that says the same in all of its rows."""
    if column in columns and len({row[columns.index(column)] for row in rows}) == 1:
        return without([column], columns, rows)
    return columns, rows


def without(
    left_out: Sequence[str], columns: tuple[str, ...], rows: list[tuple[Any, ...]]
) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """The table without some of its columns."""
    kept = [i for i, column in enumerate(columns) if column not in left_out]
    return tuple(columns[i] for i in kept), [tuple(row[i] for i in kept) for row in rows]

"""`tinyld bench`."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from typing import Any

from tinyld.bench import COMPARISONS, compare, has_peers, in_a_process, needs_peers, start_up
from tinyld.commands.workspace import say_to_stderr
from tinyld.config import check
from tinyld.errors import UsageError
from tinyld.tables import markdown, print_table
from tinyld.tasks import load_split, load_task

COLUMNS = ("what", "ratio", "lowest", "highest", "bar", "met", "our seconds", "peer seconds", "our peak MB")
COLUMNS += ("peer peak MB",)
GROWTH_COLUMNS = ("work", "size", "seconds", "rate or memory", "peak MB")


def grow(only: list[str], as_markdown: bool, json: bool, quiet: bool) -> None:
    """Every point of growth whose work has one of the words `only`; all of them when there is none."""
    from tinyld.growth import POINTS

    chosen = [point for point in POINTS if not only or any(word in point.work for word in only)]
    if not chosen:
        works = dict.fromkeys(point.work for point in POINTS)
        raise UsageError(f"--only {' '.join(only)}: no work has such a word; there are: {'; '.join(works)}")
    say = say_to_stderr(quiet)
    rows = []
    for i, point in enumerate(chosen):
        say(f"-- {i + 1} of {len(chosen)}: {point.name}")
        found = in_a_process(point.name, "growth")
        unit = next((unit for unit in ("tokens/s", "rows/s", "MB/s") if unit in found), None)
        rate = f"{found[unit]:,.0f} {unit}" if unit else f"{found['cache MB']:,.0f} MB kept"
        rows.append((point.work, point.size, round(found["seconds"], 2), rate, round(found["peak_mb"])))
        say(f"   {found['seconds']:.2f} s, {rate}")
    if json:
        return print(jsonlib.dumps([dict(zip(GROWTH_COLUMNS, row, strict=True)) for row in rows]))
    show_table("how cost grows with the work", GROWTH_COLUMNS, rows, as_markdown)


def bench(only: list[str], task: str, turns: int, as_markdown: bool, json: bool, quiet: bool) -> None:
    """Every comparison whose name has one of the words `only`; all of them when there is none."""
    chosen = [c for c in COMPARISONS if not only or any(word in c.what for word in only)]
    starts = not only or any("tinyld" in word or "start" in word for word in only)
    if not chosen and not starts:
        raise UsageError(f"--only {' '.join(only)}: no comparison has such a word; there are: "
                         + "; ".join(c.what for c in COMPARISONS))  # fmt: skip
    check(not load_task(task).is_generation, f"task {task} has no labels; bench times answers of one token")
    load_split(load_task(task), "train", limit=1)
    say = say_to_stderr(quiet)
    top = in_a_process("ceiling", task=task)
    rows = []
    for comparison in chosen:
        if needs_peers(comparison.peer) and not has_peers():
            say(f"-- {comparison.what}: left out, as transformers and peft are not installed (pip install '.[bench]')")
            continue
        row = compare(comparison, task, turns, say)
        if "model_flops_per_s" in row:
            row["% of the ceiling"] = round(100 * row["model_flops_per_s"] / top["flops"], 1)
        rows.append(row)
        say(f"   ratio {row['ratio']} ({row['lowest']} to {row['highest']}), bar {row['bar']}")
    started = start_up(turns) if starts else []
    if json:
        facts = {"ceiling_flops_per_s": top["flops"], "dtype": top["dtype"], "task": task}
        return print(jsonlib.dumps(facts | {"rows": rows, "start": started}))
    rate = f"largest matrix product: {top['flops'] / 1e9:,.0f} GFLOP/s in {top['dtype']}"
    title = f"speed, as a ratio of the peer's time to ours, with rows of {task} ({rate})"
    show_table(title, COLUMNS, [tuple(row.get(c) for c in COLUMNS) for row in rows], as_markdown)
    for row in rows:
        if "% of the ceiling" in row:
            print(f"{row['what']}: our model FLOPs are {row['% of the ceiling']}% of that rate")
        if "our nll" in row:
            print(f"{row['what']}: NLL of what was written {row['our nll']:.3f}, by the peer {row['peer nll']:.3f}")
    if started:
        show_table("start", tuple(started[0]), [tuple(row.values()) for row in started], as_markdown)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], as_markdown: bool) -> None:
    if as_markdown:
        print(f"{title}:\n\n{markdown(columns, rows)}\n")
    else:
        print_table(title, columns, rows)

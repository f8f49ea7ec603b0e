"""`tinyld compose`: one run of several adapters, measured task by task on held-out rows before it is written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyld.checkpoint import Base, load_base_of
from tinyld.composition import Composition, Member, prototype_router, read_member, save_composition
from tinyld.config import SampleConfig, check
from tinyld.data import TaskRows
from tinyld.device import resolve_device
from tinyld.environment import environment
from tinyld.errors import TinyldError
from tinyld.evaluate import Evaluation
from tinyld.options import ComposeOptions
from tinyld.predict import Run
from tinyld.router import measure_routing
from tinyld.rows import load_split
from tinyld.runs import ADAPTER, CONFIG, RESULTS, RunFolder
from tinyld.scores import measure
from tinyld.statistics import paired_difference
from tinyld.tables import percent, print_record, print_table
from tinyld.tasks import from_record
from tinyld.workspace import refuse_inside

TOLD_APART = 0.95  # least share of a task's rows that must be routed to it


def compose(options: ComposeOptions) -> dict[str, Any]:
    """Chooses coefficients, writes the composition, and says what each task gains or loses by it on held-out rows."""
    runs, weights = options.runs, options.weights
    check(len(runs) >= 2, f"compose needs at least two adapters, got {len(runs)}")
    if weights is not None:
        check(options.how in (None, "weights"), f"--weights is a way of its own; leave --how {options.how} or it out")
        check(len(weights) == len(runs), f"--weights needs {len(runs)} numbers, one an adapter")
    check(options.how != "weights" or weights is not None, "--how weights needs --weights")
    folders = [RunFolder.open(run) for run in runs]
    first = folders[0].config
    if "base" not in first:
        raise TinyldError(f"{runs[0]} is a base; compose takes adapters")
    base = load_base_of(first, runs[0], options.base, resolve_device(options.device))
    members = [read_member(folder, base) for folder in folders]
    how = options.how or ("weights" if weights else default_how(members))
    weights = weights or [1 / len(members) if how == "average" else 1.0] * len(members)
    members = [replace(m, weight=float(w)) for m, w in zip(members, weights, strict=True)]
    router = prototype_router(members).to(base.model.device) if how == "router" else None
    composed = Composition(tuple(members), how, router)
    composed.parts(base)  # refuses what cannot be combined before anything is read or written
    known = {m.task["name"]: m for m in members}
    out = options.out or Path("runs") / f"compose-{'-'.join(known).replace(':', '-')}"
    RunFolder.check_free(out, options.force)
    refuse_inside(out, [base.path, *runs])
    for m, other in ((m, known[m.task["name"]]) for m in members):
        if m.task != other.task:
            name = m.task["name"]
            raise TinyldError(
                f"the tasks of {m.run} and {other.run} are both called {name}; rename one and train again"
            )
    rows = {}
    for name, m in known.items():
        task = from_record(m.task, f"{m.run}/{CONFIG}")
        examples = load_split(task, options.split, options.data)
        rows[name] = TaskRows(examples, task, base.tokenizer, base.model.config.max_length)
    owners = [rows[m.task["name"]] for m in members]
    routing = [] if router is None else measure_routing(base, router, owners, labels(members), options.limit)
    for unlike in [r for r in routing if r["right"] < TOLD_APART]:
        problem = (
            f"only {100 * unlike['right']:.0f}% of {unlike['task']}'s rows would go to its adapter: its prompts are "
            "like another task's. Train one with a template of its own, or name the task when you ask (--task)"
        )
        if options.how is None:
            raise TinyldError(f"{problem}; --how router composes them all the same")
        print(f"warning: {problem}", file=sys.stderr)
    result = {"run": str(out), "how": how, "weights": list(weights), "routing": routing}
    result["drops"] = drops(base, composed, owners, options)
    result["parameters"] = sum(t.numel() for m in members for t in m.tensors.values())
    folder = RunFolder.create(out, options.force)  # last, so that nothing is removed before there is something better
    save_composition(folder, base, composed, environment())
    result["bytes"] = folder.files()[ADAPTER]
    folder.write_json(RESULTS, {"compose": result})
    return result


def default_how(members: Sequence[Member]) -> str:
    """A router where rows of different tasks may be told apart, else the mean."""
    routable = all(m.is_push and m.prototype is not None for m in members)
    return "router" if routable and len({m.task["name"] for m in members}) > 1 else "average"


def labels(members: Sequence[Member]) -> list[str]:
    """Each member's task, with its run where the task has several."""
    tasks = [m.task["name"] for m in members]
    return [name if tasks.count(name) == 1 else f"{name} ({m.run})" for name, m in zip(tasks, members, strict=True)]


def drops(
    base: Base, composed: Composition, owners: Sequence[TaskRows], options: ComposeOptions
) -> list[dict[str, Any]]:
    """Each member's rows by its own adapter and by the composition, with the paired difference."""

    def evaluated(rows: TaskRows, of: Composition) -> Evaluation:
        changed = replace(base, model=deepcopy(base.model))
        of.attach(changed)
        run = Run(base.path, changed, [rows.task], {}, options.dtype)
        return measure(run, rows, SampleConfig(), quiet=options.quiet, limit=options.limit)

    found, together = [], {rows.task.name: evaluated(rows, composed) for rows in owners}
    for member, label, rows in zip(composed.members, labels(composed.members), owners, strict=True):
        own = evaluated(rows, Composition((replace(member, weight=1.0),), "sum"))
        both = together[rows.task.name]
        drop, low, high = (None,) * 3 if own.accuracy is None else paired_difference(own.correct(), both.correct())
        found.append({
            "task": rows.task.name, "adapter": label, "split": options.split, "n": own.n,
            "own": own.accuracy, "composed": both.accuracy, "drop": drop, "low": low, "high": high,
            "own_nats": own.nll_bound, "composed_nats": both.nll_bound,
        })  # fmt: skip
    return found


def show(result: dict[str, Any], options: ComposeOptions) -> None:
    """Prints what `compose` found."""
    rows = []
    for d in result["drops"]:
        own, both = (percent(d[k]) if d[k] is not None else f"{d[f'{k}_nats']:.3f} nats" for k in ("own", "composed"))
        lost = None if d["drop"] is None else f"{100 * d['drop']:.2f}"
        between = None if d["low"] is None else f"{100 * d['low']:.2f} to {100 * d['high']:.2f}"
        rows.append((d["adapter"], d["n"], own, both, lost, between))
    coefficients = ", ".join(f"{w:.3g}" for w in result["weights"])
    title = f"{result['run']}: {result['how']}, weights {coefficients}"
    print_table(title, ("task", "rows", "own %", "composed %", "points lost", "95% interval"), rows)
    if result["routing"]:
        names = [r["task"] for r in result["routing"]]
        rows = [
            (r["task"], *(percent(r["goes_to"][n]) for n in names), percent(r["wrongly_refused"]),
             percent(r["wrongly_accepted"]))
            for r in result["routing"]
        ]  # fmt: skip
        print_table("% of each task's rows that go to", ("task", *names, "none", "taken, of other texts"), rows)
    print_record("cost", {name: result[name] for name in ("parameters", "bytes")})

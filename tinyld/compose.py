"""`tinyld compose`: one run of several adapters, measured task by task on held-out rows before it is written."""

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from shlex import quote
from typing import Any

from torch import Tensor

from tinyld.checkpoint import Base, load_exactly
from tinyld.composition import NONE, RoutedPush, Router, save_composition, task_features
from tinyld.config import SampleConfig, check
from tinyld.data import TaskRows, seeded, slot_width
from tinyld.errors import TinyldError
from tinyld.methods import TrajectoryLora
from tinyld.options import ComposeOptions
from tinyld.predict import Run, load
from tinyld.progress import say_truncated
from tinyld.rows import bundled_data_dir, file_in, prompt_of
from tinyld.runs import ADAPTER, PROTOTYPE, RESULTS, RunFolder
from tinyld.scores import measure, rows_for
from tinyld.tables import percent, print_record, print_table
from tinyld.tasks import Task, asked_alike
from tinyld.tokenizer import read_lines
from tinyld.workspace import RUNS, refuse_inside, say_to_stderr

LEAST_RIGHT = 0.95  # share of a task's rows that go to its adapter by their text; below it tasks are to be named
FEW = 20  # rows, with fewer of which no limit is set to what is a task's
REFUSED = 0.1  # share of a task's own rows, above which it is said that they look foreign
STRANGERS = 500  # texts that belong to no task, to count wrong acceptances on


def compose(options: ComposeOptions) -> dict[str, Any]:
    """Writes a composition, and says what each task gains or loses by it on held-out rows."""
    runs, say = options.runs, say_to_stderr(options.quiet)
    check(len(runs) >= 2, f"compose needs at least two adapters, got {len(runs)}")
    loaded: list[Run] = []
    for path in runs:
        run = load(path, options.base, options.device, options.dtype, bases=[own.base for own in loaded])
        kind = run.config["kind"]
        holds = run.config["method"]["name"] if kind == "adapter" else f"a {kind}"
        wanted = f"{path} holds {holds}; compose takes trajectory-lora adapters"
        check(holds == TrajectoryLora.name, wanted, TinyldError)
        loaded.append(run)
        base = loaded[0].base
        own, theirs = (f"on base {of.fingerprint} in {of.dtype}" for of in (run.base, base))
        differ = f"{path} was trained {own}, the others {theirs}; all need the same. tinyld predict RUN RUN asks both"
        check(run.base is base, differ, TinyldError)
    alone = by_task(loaded)
    router = Router(len(runs), base.model.config.d_model).to(base.model.device)
    for i, path in enumerate(runs):
        of_member = {name: tensor[i] for name, tensor in router.state_dict().items() if name != "limits"}
        load_exactly(of_member, RunFolder(path).read_tensors(PROTOTYPE), path / PROTOTYPE)
    out = options.out or RUNS / f"compose-{'-'.join(alone)}"
    RunFolder.check_free(out, options.force)
    refuse_inside(out, [base.path, *runs])
    tasks = [run.tasks[0] for run in alone.values()]
    if options.data is not None:
        files = [*{task.rows_from: file_in(options.data, task, options.split) for task in tasks}.values()]
        one = next((file for file in files if file and files.count(file) > 1), None)
        way_out = f"give a folder with TASK/{options.split}.csv"
        check(one is None, f"{one} cannot be the rows of {', '.join(alone)} all at once: {way_out}")
    split, data, limit = options.split, options.data, options.limit
    rows = {name: rows_for(run, run.tasks[0], split, data, limit) for name, run in alone.items()}
    for of in rows.values():
        say_truncated(say, of.truncated, len(of), base.model.config.max_length)
    routing, by_name, task = [], True, next(iter(alone))
    why = "the tasks are asked differently, or have answers of other lengths"
    if asked_alike(tasks) and len({slot_width(task, base.tokenizer) for task in tasks}) == 1:
        routing = measure_routing(base, router, rows)
        worst = min(routing, key=lambda r: r["right"])
        by_name, task = worst["right"] < LEAST_RIGHT, worst["task"]
        for few in (r for r in routing if r["n"] < FEW):
            say(f"{few['n']} rows of {few['task']} are too few to tell what is unlike them: no text is `foreign` to it")
        for odd in (r for r in routing if r["wrongly_refused"] > REFUSED):
            unlike = "like no task's, by what it was trained on: it has seen few or other texts"
            say(f"{100 * odd['wrongly_refused']:.0f}% of {odd['task']}'s own rows are told as `foreign`, {unlike}")
        why = f"by their texts only {percent(worst['right'])}% of {task}'s rows would go to its adapter"
    if by_name:
        say(f"{why}: name the task of all texts when you ask (tinyld predict {quote(str(out))} --task {task})")
    routed = RoutedPush([run.push for run in alone.values()], router)
    drops = []
    for name, run in alone.items():
        routes = replace(run, push=routed)
        own = measure(run, rows[name], SampleConfig(), quiet=options.quiet)
        # the member that is named answers as it does alone
        both = own if by_name else measure(routes, rows[name], SampleConfig(), quiet=options.quiet)
        alone_right, right = (found.scores.get("accuracy") for found in (own, both))
        drops.append({
            "task": name, "split": options.split, "n": own.n, "own": alone_right, "composed": right,
            "drop": None if right is None else alone_right - right,
            "own_nats": own.nll_bound, "composed_nats": both.nll_bound,
        })  # fmt: skip
    folder = RunFolder.create(out, options.force)  # last, so that nothing is removed before there is something better
    of_each = [(os.path.abspath(run.path), run.config) for run in alone.values()]
    members = [{"run": path} | {name: own[name] for name in ("task", "method", "data")} for path, own in of_each]
    save_composition(folder, base, members, routed, by_name)
    result = {"run": str(out), "by_name": by_name, "routing": routing, "drops": drops}
    result["parameters"] = sum(t.numel() for t in folder.read_tensors(ADAPTER).values())
    result["bytes"] = folder.files()[ADAPTER]["bytes"]
    folder.write_json(RESULTS, {"compose": result})
    return result


def by_task(runs: Sequence[Run]) -> dict[str, Run]:
    """The runs by the names of their tasks; tasks of other files that have one name get that of their run's folder."""
    names = [run.tasks[0].name for run in runs]
    found: dict[str, Run] = {}
    for run, name in zip(runs, names, strict=True):
        task = run.tasks[0]
        twins = [other for other in runs if other.tasks[0].path == task.path and other.tasks[0].name == name]
        twice = f"{' and '.join(str(twin.path) for twin in twins)} are both of a task {name}"
        check(len(twins) < 2, f"{twice}: compose takes one a task", TinyldError)
        if names.count(name) > 1:
            name = run.path.resolve().name
            task = replace(task, name=name, rows_from=name)
            run = replace(run, tasks=[task], config=run.config | {"task": run.config["task"] | {"name": name}})
        same = f"two tasks would be called {name}: give one of the runs' folders another name"
        check(name not in found, same, TinyldError)
        found[name] = run
    return found


def measure_routing(base: Base, router: Router, rows: dict[str, TaskRows]) -> list[dict[str, Any]]:
    """Counts, of each member's task, the share of rows that goes to each member ("right": to the task's own); sets the
    router's limits by half of the rows, and counts on the rest what is refused, and of texts of no task what is taken
    for the task's. rows: by the tasks' names, in the members' order."""
    orders = (seeded(len(of)).permutation(len(of)) for of in rows.values())  # a file may have its labels by turns
    features = {name: task_features(base, of)[order] for (name, of), order in zip(rows.items(), orders, strict=True)}
    router.set_limits([own[::2] if len(own) >= FEW else own[:0] for own in features.values()])
    found, strangers = [], stranger_rows(base, next(iter(rows.values())).task)  # which all are asked alike
    held_for = None if strangers is None else router.choose(task_features(base, strangers))
    for i, name in enumerate(rows):
        rest = features[name][1::2] if len(features[name]) > 1 else features[name]
        nearest = router.nearest(features[name])
        goes = {other: share(nearest == j) for j, other in enumerate(rows)}
        found.append({
            "task": name, "n": len(nearest), "right": goes[name], "goes_to": goes,
            "wrongly_refused": share(router.choose(rest) == NONE),
            "wrongly_accepted": None if held_for is None else share(held_for == i),
        })  # fmt: skip
    return found


def share(hits: Tensor) -> float:
    return float(hits.double().mean())


def stranger_rows(base: Base, task: Task) -> TaskRows | None:
    """Bundled text, a sentence a row, in the task's template; None where that takes more than one text. Two fifths of
    it are of the kind that the bundled tasks `reviews` and `topics` are made of."""
    if len(task.columns) != 1 or task.is_generation:
        return None
    (column,) = task.columns.values()
    lines = islice(read_lines([bundled_data_dir() / "corpus.txt.gz"]), STRANGERS)
    examples = [prompt_of(task, {column: line.partition(". ")[0]}, "corpus.txt.gz") for line in lines]
    return TaskRows(examples, task, base.tokenizer, base.model.config.max_length)


def show(result: dict[str, Any], options: ComposeOptions) -> None:
    """Prints what `compose` found."""
    rows = []
    for d in result["drops"]:
        own, both = (
            f"{percent(d[k])}%" if d[k] is not None else f"{d[f'{k}_nats']:.3f} nats" for k in ("own", "composed")
        )
        rows.append((d["task"], d["n"], own, both, None if d["drop"] is None else f"{100 * d['drop']:.2f}"))
    print_table(result["run"], ("task", "rows", "alone", "composed", "points lost"), rows)
    if routing := result["routing"]:
        shares = ((*r["goes_to"].values(), r["wrongly_refused"], r["wrongly_accepted"]) for r in routing)
        rows = [(r["task"], *map(percent, own)) for r, own in zip(routing, shares, strict=True)]
        names = ("task", *routing[0]["goes_to"], "refused (`foreign`)", "foreign sentences accepted")
        print_table("% of each task's rows, by their text: which adapter they would go to", names, rows)
        if None not in (passed := [r["wrongly_accepted"] for r in routing]):
            print(f"{percent(sum(passed))}% of foreign sentences pass as some task's; of texts like a task's, more")
    print_record("cost", {name: result[name] for name in ("parameters", "bytes")})

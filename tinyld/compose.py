"""`tinyld compose`: one run of several adapters, measured task by task on held-out rows before it is written."""

from __future__ import annotations

from typing import Any

from tinyld.checkpoint import load_base_of
from tinyld.composition import Member, hang, make_router, read_member, save_composition
from tinyld.config import SampleConfig, check
from tinyld.device import resolve_device
from tinyld.environment import environment
from tinyld.errors import TinyldError
from tinyld.evaluate import Evaluation
from tinyld.options import ComposeOptions
from tinyld.predict import Run
from tinyld.router import measure_routing
from tinyld.runs import ADAPTER, CONFIG, RESULTS, RunFolder
from tinyld.scores import measure, rows_for
from tinyld.tables import percent, print_record, print_table
from tinyld.tasks import from_record
from tinyld.workspace import RUNS, refuse_inside, say_to_stderr, say_truncated

LEAST_RIGHT = 0.95  # share of a task's rows that go to its adapter by their text; below it tasks are to be named


def compose(options: ComposeOptions) -> dict[str, Any]:
    """Writes a composition, and says what each task gains or loses by it on held-out rows."""
    runs = options.runs
    check(len(runs) >= 2, f"compose needs at least two adapters, got {len(runs)}")
    folders = [RunFolder.open(run) for run in runs]
    first = folders[0].config
    if "base" not in first:
        raise TinyldError(f"{runs[0]} is a base; compose takes adapters")
    base = load_base_of(first, runs[0], options.base, resolve_device(options.device))
    members: dict[str, Member] = {}
    alone: dict[str, Run] = {}
    for folder in folders:
        member, dtype = read_member(folder, base), folder.config["base"].get("dtype", "fp32")
        if dtype != base.dtype:
            raise TinyldError(f"{folder.path} was trained on the base in {dtype}, the others on it in {base.dtype}")
        other = members.setdefault(name := member.task["name"], member)
        if other is not member:
            way_out = "compose takes one a task; where they are two, train one on a file of another name"
            raise TinyldError(f"{other.run} and {member.run} are both of a task {name}: {way_out}")
        task = from_record(member.task, str(folder.path / CONFIG))
        alone[name] = Run(folder.path, base, [task], folder.config, options.dtype)
    router = make_router(folders, base)
    out = options.out or RUNS / f"compose-{'-'.join(members)}"
    RunFolder.check_free(out, options.force)
    refuse_inside(out, [base.path, *runs])
    rows = {
        name: rows_for(run, run.tasks[0], options.split, options.data, options.limit) for name, run in alone.items()
    }
    for of in rows.values():
        say_truncated(say_to_stderr(options.quiet), of.truncated, len(of), base.model.config.max_length)
    routing = measure_routing(base, router, rows, options.limit)
    worst = min(routing, key=lambda r: r["right"])
    by_name = worst["right"] < LEAST_RIGHT
    if by_name:
        say_to_stderr(options.quiet)(
            f"by their texts only {100 * worst['right']:.0f}% of {worst['task']}'s rows would go to its adapter: "
            f"name the task when you ask (tinyld predict {out} --task {worst['task']}), or train one of them with a "
            "template of its own (finetune --set template='...')"
        )

    def measured(name: str) -> Evaluation:
        return measure(alone[name], rows[name], SampleConfig(), quiet=options.quiet)

    drops = []
    for name, member in members.items():
        base.model.push = member.method.push
        own = both = measured(name)
        if not by_name:  # else the member that is named answers, as it does alone
            hang(base, list(members.values()), router)
            both = measured(name)
        alone_right, right = (found.scores.get("accuracy") for found in (own, both))
        drops.append({
            "task": name, "split": options.split, "n": own.n, "own": alone_right, "composed": right,
            "drop": None if right is None else alone_right - right,
            "own_nats": own.nll_bound, "composed_nats": both.nll_bound,
        })  # fmt: skip
    folder = RunFolder.create(out, options.force)  # last, so that nothing is removed before there is something better
    save_composition(folder, base, list(members.values()), router, by_name, environment())
    parameters = sum(p.numel() for m in members.values() for p in m.method.own.values())
    result = {"run": str(out), "by_name": by_name, "routing": routing, "drops": drops}
    result |= {"parameters": parameters, "bytes": folder.files()[ADAPTER]}
    folder.write_json(RESULTS, {"compose": result})
    return result


def show(result: dict[str, Any], options: ComposeOptions) -> None:
    """Prints what `compose` found."""
    rows = []
    for d in result["drops"]:
        own, both = (percent(d[k]) if d[k] is not None else f"{d[f'{k}_nats']:.3f} nats" for k in ("own", "composed"))
        rows.append((d["task"], d["n"], own, both, None if d["drop"] is None else f"{100 * d['drop']:.2f}"))
    print_table(result["run"], ("task", "rows", "own %", "composed %", "points lost"), rows)
    names = [r["task"] for r in result["routing"]]
    rows = [(r["task"], *(percent(r["goes_to"][n]) for n in names)) for r in result["routing"]]
    print_table("% of each task's rows that would go to each adapter by their text", ("task", *names), rows)
    rows = [(r["task"], percent(r["wrongly_refused"]), percent(r["wrongly_accepted"])) for r in result["routing"]]
    columns = ("task", "own rows held for no task's", "foreign sentences held for its own")
    print_table("% of texts wrongly held for no task's (`adapter` is then null), or for one's", columns, rows)
    print_record("cost", {name: result[name] for name in ("parameters", "bytes")})

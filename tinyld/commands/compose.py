"""`tinyld compose`: choose coefficients, write the composition, and say what each task gains or loses by it."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyld.commands.evaluate import evaluate_run, print_evaluations, rows_for
from tinyld.commands.workspace import RUNS, keep_freed_memory, refuse_inside
from tinyld.config import SampleConfig, check, check_choice
from tinyld.errors import TinyldError, UsageError
from tinyld.runs import ADAPTER, RESULTS, RunFolder, environment
from tinyld.tables import print_record, print_table
from tinyld.tasks import load_task

if TYPE_CHECKING:
    from tinyld.checkpoint import Base
    from tinyld.compose import Composed, Member
    from tinyld.data import TaskRows
    from tinyld.evaluate import Evaluation


@dataclass(frozen=True)
class ComposeJob:
    """What a composition is asked to be and how it is measured."""

    how: str | None
    weights: list[float] | None
    rank: int | None  # combined weight-lora adapters are cut to it
    train_router: int | None  # rows of each task that a router is trained on; None: prototypes
    task: str | None  # search: the new task
    shots: int
    split: str
    data: Path | None
    limit: int | None
    max_drop: float | None
    seed: int
    device: str
    quiet: bool


def fresh(base: Base) -> Base:
    """The base with a denoiser of its own, which may be changed."""
    return replace(base, model=deepcopy(base.model))


def compose(
    runs: list[Path], job: ComposeJob, out: Path | None, base_path: Path | None, force: bool, json: bool
) -> None:
    from tinyld.checkpoint import base_dtype, find_base, load_base
    from tinyld.compose import HOWS, Composed, prototype_router, read_member, save_composition
    from tinyld.device import resolve_device

    keep_freed_memory()
    check(len(runs) >= 2, f"compose needs at least two adapters, got {len(runs)}")
    weights = job.weights
    if weights is not None and job.how not in (None, "weights"):
        raise UsageError(f"--weights is a way of its own; leave --how {job.how} or --weights out")
    check(job.how != "weights" or weights is not None, "--how weights needs --weights")
    check(weights is None or len(weights) == len(runs), f"--weights needs {len(runs)} numbers, one an adapter")
    check((job.how == "search") == (job.task is not None), "--how search and --task NEW go together")
    if job.task is not None and job.task.endswith(".toml"):
        job = replace(job, task=str(Path(job.task).resolve()))
    folders = [RunFolder.open(r) for r in runs]
    first = folders[0].config
    if "base" not in first:
        raise TinyldError(f"{runs[0]} is a base; compose takes adapters")
    where = resolve_device(job.device)
    base = load_base(find_base(first, runs[0], base_path), where, base_dtype(first, str(runs[0])))
    members = [read_member(f, base, 1.0) for f in folders]
    how = job.how or ("weights" if weights else default_how(members))
    check_choice("--how", how, HOWS)
    check(job.train_router is None or how == "router", "--train-router needs --how router")
    if how == "average":
        weights = [1.0 / len(members)] * len(members)
    composed = Composed(members, how, rank=job.rank).with_weights(weights or [1.0] * len(members))
    composed.combined(base)  # refuses what cannot be combined before anything is read or written
    tasks = [load_task(name).name for name in dict.fromkeys(m.task for m in members)]
    check(len(set(tasks)) == len(tasks), f"two different tasks are called {tasks[0]}; rename one's file")
    out = out or RUNS / f"compose-{'-'.join(tasks).replace(':', '-')}"
    RunFolder.check_free(out, force)
    refuse_inside(out, [base.path, *runs])
    rows_of = {name: rows_for(base, load_task(name), job.split, job.data) for name in [m.task for m in members]}
    if job.task is not None:
        rows_of[job.task] = rows_for(base, load_task(job.task), job.split, job.data)
        composed = composed.with_weights(searched(base, composed, job))
    if how == "router":
        composed.router = prototype_router(members) if job.train_router is None else trained(base, members, job)
    measured = Measure(base, composed, rows_of, job).result()
    result = {"how": how, "weights": composed.weights, "norm_lost": composed.lost, **measured}
    folder = RunFolder.create(out, force)  # last, so that --force removes nothing before there is something better
    save_composition(folder, base, composed, environment())
    result["cost"] |= {"bytes": folder.files()[ADAPTER]}
    folder.write_json(RESULTS, {"compose": result})
    if json:
        print(jsonlib.dumps({"run": str(out), **result}))
    else:
        show(out, result)
    worst = max((d["drop"] for d in result["drops"]), default=0.0)
    if job.max_drop is not None and 100 * worst > job.max_drop:
        raise TinyldError(f"the worst drop is {100 * worst:.2f} points, --max-drop allows {job.max_drop:g}")


def default_how(members: Sequence[Member]) -> str:
    """A router where rows of different tasks can be told apart, else the mean."""
    routable = all(m.is_push and m.prototype is not None for m in members)
    return "router" if routable and len({m.task for m in members}) > 1 else "average"


def trained(base: Base, members: Sequence[Member], job: ComposeJob) -> Any:
    """A router trained on the first rows of each member's task."""
    from tinyld.router import task_features, train_router

    check((job.train_router or 0) >= 1, f"--train-router must be at least 1, got {job.train_router}")
    rows = [rows_for(base, load_task(m.task), "train", job.data) for m in members]
    features = [task_features(base, r, job.train_router) for r in rows]
    return train_router(features, job.seed).to(base.model.embedding.weight.device)


def searched(base: Base, composed: Composed, job: ComposeJob) -> list[float]:
    """Coefficients found on a few labelled rows of the new task's train split."""
    from tinyld.data import seeded
    from tinyld.diffusion import nll_bound
    from tinyld.progress import Progress
    from tinyld.search import search_weights

    rows = rows_for(base, load_task(job.task or ""), "train", job.data)
    check(1 <= job.shots <= len(rows), f"--shots must be from 1 to the {len(rows)} rows of train, got {job.shots}")
    batch = rows.take(seeded(job.seed, 6).permutation(len(rows))[: job.shots])
    triple = (batch.x0, batch.answer_mask, batch.attention_mask)

    def loss(weights: list[float]) -> float:
        trial = fresh(base)
        composed.with_weights(weights).attach(trial)
        return nll_bound(trial.model, [triple], base.tokenizer.mask_id, draws=4, seed=job.seed, counted=True).mean

    evaluations = 100
    with Progress("search", evaluations, quiet=job.quiet) as bar:
        weights, _ = search_weights(loss, len(composed.members), evaluations, job.seed, bar.advance_to)
    return weights


class Measure:
    """What a composition does to each of its tasks."""

    def __init__(self, base: Base, composed: Composed, rows_of: dict[str, TaskRows], job: ComposeJob):
        self.base, self.composed, self.rows_of, self.job = base, composed, rows_of, job

    def evaluated(self, task: str, attach: Callable[[Base], None] | None) -> Evaluation:
        base = fresh(self.base)
        if attach is not None:
            attach(base)
        return evaluate_run(base, self.rows_of[task], SampleConfig(), 4, "auto", self.job.quiet, self.job.limit)

    def name(self, task: str) -> str:
        """A task's name, also where it is a user's file."""
        return self.rows_of[task].task.name

    def label(self, member: Member) -> str:
        """The member's task, with its run where the task has several."""
        alone = sum(m.task == member.task for m in self.composed.members) == 1
        return self.name(member.task) + ("" if alone else f" ({self.short(member)})")

    def short(self, member: Member) -> str:
        """A name of the member's run that no other member has: of its folder, its whole path, or with its place."""
        members = self.composed.members
        names, runs = [Path(m.run).name for m in members], [m.run for m in members]
        place = next(i for i, m in enumerate(members) if m is member)
        if runs.count(runs[place]) > 1:
            return f"{runs[place]}, {place + 1}"
        return names[place] if names.count(names[place]) == 1 else runs[place]

    def result(self) -> dict[str, Any]:
        from tinyld.compose import Composed
        from tinyld.statistics import paired_difference

        records, drops = [], []
        speed: dict[str, float] = {"own": 0.0, "composed": 0.0}  # seconds in all
        for task in self.rows_of:
            found = {"base": self.evaluated(task, None)}
            own = sum(m.task == task for m in self.composed.members)
            for member in self.composed.members:
                if member.task == task or self.job.task == task:  # for a new task every adapter is shown
                    label = "own" if member.task == task and own == 1 else self.short(member)
                    found[label] = self.evaluated(task, Composed([replace(member, weight=1.0)], "sum").attach)
            composed = self.evaluated(task, self.composed.attach)
            for label, alone in found.items():
                if label == "base" or not own:
                    continue
                speed["own"] += alone.n / alone.rows_per_second
                speed["composed"] += composed.n / composed.rows_per_second
                if alone.accuracy is not None and composed.accuracy is not None:
                    mean, low, high = paired_difference(alone.correct(), composed.correct())
                    drops.append(
                        {"task": self.name(task), "adapter": label, "split": self.job.split, "n": alone.n}
                        | {"own": alone.accuracy, "composed": composed.accuracy}
                        | {"drop": mean, "low": low, "high": high}
                    )
            found["composed"] = composed
            records += [{"run": label, "split": self.job.split, **e.record()} for label, e in found.items()]
        cost = {
            "members": len(self.composed.members),
            "parameters": sum(t.numel() for m in self.composed.members for t in m.tensors.values()),
            "speed": speed["own"] / speed["composed"] if speed["composed"] else None,
        }
        return {"evaluations": records, "drops": drops, **self.routing(), **self.interference(), "cost": cost}

    def routing(self) -> dict[str, Any]:
        """Of each task's rows, the share that goes mostly to each member."""
        from tinyld.router import task_features

        router, members = self.composed.router, self.composed.members
        if router is None:
            return {"routing_accuracy": {}, "confusion": []}
        confusion, accuracy = [], {}
        for place, member in enumerate(members):
            chosen = router(task_features(self.base, self.rows_of[member.task], self.job.limit)).argmax(1)
            confusion.append([float((chosen == j).float().mean()) for j in range(len(members))])
            accuracy[self.label(member)] = confusion[-1][place]
        return {"routing_accuracy": accuracy, "confusion": confusion}

    def interference(self) -> dict[str, Any]:
        from tinyld.interference import interference

        members = [m for m in self.composed.members if m.is_push]
        pushes = {self.label(m): m.push(self.base) for m in members}
        if len(pushes) < 2:
            return {"interference": None}
        rows = {self.label(m): self.rows_of[m.task] for m in members}
        return {"interference": interference(self.base, pushes, rows, self.base.tokenizer.mask_id)}


def show(out: Path, result: dict[str, Any]) -> None:
    coefficients = ", ".join(f"{w:.3g}" for w in result["weights"])
    print_evaluations(f"{out}: {result['how']}, weights {coefficients}", result["evaluations"])
    if result["drops"]:
        rows = [
            (d["task"], d["adapter"], f"{100 * d['drop']:.2f}", f"{100 * d['low']:.2f} to {100 * d['high']:.2f}")
            for d in result["drops"]
        ]
        print_table(
            "points lost against the task's own adapter, same rows", ("task", "against", "drop", "95% interval"), rows
        )
    if result["confusion"]:
        names = list(result["routing_accuracy"])
        rows = [(n, *(f"{100 * s:.1f}" for s in r)) for n, r in zip(names, result["confusion"], strict=True)]
        print_table("% of a task's rows that go to each adapter", ("task", *names), rows)
    if result["interference"]:
        pairs = result["interference"]["pairs"]
        columns = tuple(pairs[0])
        rows = [
            (" / ".join(p["pair"]), *(p[c] if p[c] is None else round(p[c], 3) for c in columns[1:])) for p in pairs
        ]
        print_table("interference", tuple(c.replace("_", " ") for c in columns), rows)
        ranks = {f"effective rank {n}": round(r, 2) for n, r in result["interference"]["effective_rank"].items()}
        print_record("each adapter", ranks)
    cost = result["cost"] | ({} if result["norm_lost"] is None else {"squared norm lost": result["norm_lost"]})
    print_record("cost (speed: rows/s of the composition over the own adapters')", cost)

"""The whole grid: every task by every method, tuned alike, over several seeds. Each cell is a process and a run folder.

A cell is `OUT/<task>_<variant>_lr<rate>_s<seed>`. What is finished is read, what was interrupted goes on, so that the
same command again does only what is missing. Tuning: seed 0 at every rate of the grid, the best on dev by decoded
accuracy (then by NLL bound) goes on to the other seeds. Test rows are read once, by the chosen runs. With several
`jobs`, as many processes run side by side, each with its share of the threads. No torch here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tinyld.config import check
from tinyld.errors import TinyldError, UsageError
from tinyld.interrupt import Interrupted, StopSignals
from tinyld.page import can_plot, page
from tinyld.records import run_record
from tinyld.report import RESULT_COLUMNS, result_rows
from tinyld.runs import ADAPTER, RESULTS, RunFolder, make_folder, read_json, to_json, write_atomic
from tinyld.tables import markdown
from tinyld.tasks import load_task

GRID = (1.0, 0.5, 2.0, 4.0, 0.25)  # multiples of a method's default learning rate, in the order they are tried
SET_HERE = ("task", "method", "seed", "epochs", "steps", "tokens", "minutes", "batch-size", "limit", "eval-every")
SET_HERE += ("data", "base", "device", "out", "resume")
TABLE, SUMMARY, COMMANDS, PAGE = "table.md", "results.json", "commands.json", "page.html"
Say = Callable[[str], None]
Job = Callable[[], Any]


@dataclass(frozen=True)
class Variant:
    """A method with options of its own: `weight-lora`, or `trajectory-lora:ranks=64/32/8:blocks=3` (/ for commas).

    `lr=X` among them moves the grid of learning rates, which is otherwise around the method's usual one.
    """

    text: str
    lr: float
    optimizer: str = "adamw"  # where the options name none

    @property
    def method(self) -> str:
        return self.text.partition(":")[0]

    @property
    def options(self) -> list[str]:
        return [option for option in self.text.split(":")[1:] if not option.startswith("lr=")]

    @property
    def flags(self) -> list[str]:
        flags = ["--method", self.method]
        for option in self.options:
            name, equals, value = option.partition("=")
            flags += [f"--{name.replace('_', '-')}", *([value.replace("/", ",")] if equals else [])]
        if self.optimizer != "adamw" and "--optimizer" not in flags:
            flags += ["--optimizer", self.optimizer]
        return flags

    @property
    def name(self) -> str:
        """As part of a folder's name."""
        text = ":".join([self.method, *self.options])
        return "".join(c if c.isalnum() or c in "-.=%" else "-" for c in text)


Usual = Callable[[str | None, str | None], tuple[float, str]]  # (optimizer, recipe), where given -> (rate, optimizer)


def variants(text: str, usual: Mapping[str, Usual]) -> list[Variant]:
    """`all`, or variants with commas between them; `usual` has every known method's rate and optimizer."""
    names = list(usual) if text == "all" else text.split(",")
    for name in names:
        if name.partition(":")[0] not in usual:
            raise UsageError(
                f"--methods takes {', '.join(usual)} or all, with options as in weight-lora:budget=0.7%; got {name!r}"
            )
    found = []
    for name in names:
        method, *options = name.split(":")
        given = {key: value for key, _, value in (option.partition("=") for option in options)}
        rate, optimizer = usual[method](given.get("optimizer"), given.get("recipe"))
        try:
            rate = float(given.get("lr", rate))
        except ValueError:
            raise UsageError(f"--methods: lr takes a number, got {given['lr']!r}") from None
        check(0 < rate < 1, f"--methods: lr must be between 0 and 1, got {rate:g}")
        found.append(Variant(name, rate, optimizer))
        for option in found[-1].options:
            key = option.partition("=")[0].replace("_", "-")
            check(key not in SET_HERE, f"--methods: {key} is the same for all methods; give it as --{key}")
    unique = {variant.name for variant in found}
    check(len(unique) == len(found), f"--methods names one twice: {text!r}")
    return found


@dataclass(frozen=True)
class Cell:
    """One fine-tuning run of the grid."""

    folder: Path
    command: list[str]  # of tinyld, what makes it

    @property
    def finished(self) -> bool:
        return (self.folder / ADAPTER).is_file() and (self.folder / RESULTS).is_file()

    def dev(self) -> tuple[float, float]:
        """(accuracy, -NLL bound) on dev: what tuning goes by. A generation task has no accuracy."""
        found = RunFolder(self.folder).read_json(RESULTS)["finetune"]
        return found.get("dev_accuracy", 0.0), -found["dev_nll_bound"]


@dataclass
class Compare:
    """What is asked for; `run` does it."""

    out: Path
    tasks: Sequence[str]
    methods: Sequence[Variant]
    seeds: int
    trials: int  # learning rates tried a method and task
    flags: Sequence[str]  # passed to every `tinyld finetune`
    data: Path | None
    base: Path | None
    fingerprint: str  # of the base, so that its place may hold another one later
    device: str
    budget_minutes: float | None
    quiet: bool
    say: Say
    limits: Sequence[int | None] = (None,)  # training rows that each method gets; None is all
    eval_every: Mapping[tuple[str, int | None], int] = field(default_factory=dict)  # steps, by task and limit
    jobs: int = 1  # runs side by side; each has as many threads as if all were going, however few are left
    launcher: Launcher = field(default_factory=lambda: Launcher())
    started: float = field(default_factory=time.monotonic)
    spent: list[float] = field(default_factory=list)  # seconds of each cell run here
    met: int = 0  # cells that were run here or found finished
    ending: bool = False  # no more runs begin

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.found: dict[int, list[dict[str, Any]]] = {}  # records of what is done, by its place in the grid
        check(1 <= self.trials <= len(GRID), f"--trials must be from 1 to {len(GRID)}, got {self.trials}")
        check(self.seeds >= 1, f"--seeds must be at least 1, got {self.seeds}")
        check(len(self.tasks) > 0, "compare needs at least one --task")
        check(len(set(self.limits)) == len(self.limits), "--limit names a number of rows twice")
        names = [load_task(task).name for task in self.tasks]
        check(len(set(names)) == len(names), f"--task names one twice: {', '.join(names)}")

    def cell(self, task: str, variant: Variant, lr: float, seed: int, limit: int | None = None) -> Cell:
        rows = f"_n{limit}" if limit else ""
        folder = self.out / f"{load_task(task).name.replace(':', '-')}_{variant.name}_lr{lr:g}{rows}_s{seed}"
        command = ["finetune", "--task", task, *variant.flags, "--lr", f"{lr:g}", "--seed", str(seed), *self.flags]
        command += ["--limit", str(limit)] if limit else []
        every = self.eval_every.get((task, limit))
        command += ["--eval-every", str(every)] if every else []
        command += ["--data", str(self.data)] if self.data else []
        command += ["--base", str(self.base)] if self.base else []
        command += ["--device", self.device]
        return Cell(folder, [*command, "--out", str(folder), "--json"])

    def rates(self, variant: Variant) -> list[float]:
        return [float(f"{variant.lr * multiple:.3g}") for multiple in GRID[: self.trials]]

    def rows(self) -> list[tuple[str, int | None, Variant]]:
        """The grid: what each row of its table is about."""
        return [(task, limit, variant) for task in self.tasks for limit in self.limits for variant in self.methods]

    def total(self) -> int:
        return len(self.rows()) * (self.trials + self.seeds - 1)

    def out_of_time(self) -> bool:
        return self.budget_minutes is not None and time.monotonic() - self.started > 60 * self.budget_minutes

    def run(self) -> list[dict[str, Any]]:
        """Runs what is missing; returns the records of every (task, rows, method) whose seeds are all there.

        Each row goes by stages (`stages`), whose jobs may run side by side; the first rows' jobs go first.
        """
        make_folder(self.out)
        seeds = range(self.seeds)
        self.claim([self.cell(t, v, lr, seed, n) for t, n, v in self.rows() for lr in self.rates(v) for seed in seeds])
        rows = [self.stages(i, *row) for i, row in enumerate(self.rows())]
        ready: list[list[Job]] = [next(row, []) for row in rows]
        running: dict[Future[Any], int] = {}  # to the row that waits for it
        with StopSignals() as stop, ThreadPoolExecutor(self.jobs) as pool:
            try:
                while running or any(ready):
                    while any(ready) and len(running) < self.jobs:
                        i = next(i for i, jobs in enumerate(ready) if jobs)
                        running[pool.submit(ready[i].pop(0))] = i
                    done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                    if stop.received:
                        raise Interrupted(stop.received)
                    for job in done:
                        i = running.pop(job)
                        job.result()
                        if not ready[i] and i not in running.values():
                            ready[i] = next(rows[i], [])
            except BaseException:
                self.ending = True
                self.launcher.stop()  # the others save and end
                raise
        return self.records()

    def records(self) -> list[dict[str, Any]]:
        """Of all that is done so far, in the order of the grid."""
        return [record for i in sorted(self.found) for record in self.found[i]]

    def stages(self, i: int, task: str, limit: int | None, variant: Variant) -> Iterator[list[Job]]:
        """The jobs of one row of the grid, stage by stage: each begins when all of the one before have ended.

        Every rate with seed 0, the other seeds at the best rate, their evaluation; then its records are written down
        with all others. It ends early when the budget of time is used up.
        """
        tried = {lr: self.cell(task, variant, lr, 0, limit) for lr in self.rates(variant)}
        yield [partial(self.finish, cell) for cell in tried.values()]
        if not all(cell.finished for cell in tried.values()):
            return
        best = max(tried, key=lambda lr: tried[lr].dev())
        chosen = [self.cell(task, variant, best, seed, limit) for seed in range(self.seeds)]
        if self.seeds > 1:
            yield [partial(self.finish, cell) for cell in chosen[1:]]
        if not all(cell.finished for cell in chosen):
            return
        yield [partial(self.evaluate, task, cell) for cell in chosen]
        trials = [
            {"lr": lr, "dev_accuracy": cell.dev()[0], "dev_nll_bound": -cell.dev()[1]} for lr, cell in tried.items()
        ]
        self.found[i] = [run_record(cell.folder) | {"trials": trials} for cell in chosen]
        self.write(self.records())

    def claim(self, cells: Sequence[Cell]) -> None:
        """Writes down what makes each cell; TinyldError when one was made otherwise, as it must not pass for this."""
        path = self.out / COMMANDS
        known = read_json(path) if path.exists() else {}
        for cell in cells:
            words = [word for word in cell.command if word != "--json"]
            asked = f"{' '.join(['tinyld', *words])} (base {self.fingerprint})"
            if cell.folder.exists() and known.get(cell.folder.name) != asked:
                made_by = known.get(cell.folder.name, "a command that is not known")
                raise TinyldError(f"{cell.folder} was made by {made_by}, and not by {asked}; choose another --out")
            known[cell.folder.name] = asked
        write_atomic(path, to_json(known))

    def finish(self, cell: Cell) -> None:
        """Runs a cell unless it is finished, or the budget of time is used up."""
        if not cell.finished and self.out_of_time():
            return
        with self.lock:
            left = self.total() - self.met
            self.met += 1
        if cell.finished:
            return
        minutes = left * sum(self.spent) / max(1, len(self.spent)) / min(self.jobs, left) / 60
        eta = f"; about {minutes:.0f} min left" if self.spent else ""
        self.say(f"-- {left} of {self.total()} runs to go{eta}: tinyld {' '.join(cell.command)}")
        began = time.monotonic()
        folder = RunFolder(cell.folder)
        if cell.folder.exists() and not folder.is_run() and not folder.checkpoints():
            shutil.rmtree(cell.folder)  # ours, and cut short before it had anything
        if folder.checkpoints():  # with the threads that it began with, as other ones are refused
            threads = folder.config.get("environment", {}).get("threads")
            self.launch(["finetune", "--resume", str(cell.folder), "--json"], threads)
        else:
            self.launch([*cell.command, *(["--force"] if folder.is_run() else [])])
        seconds = time.monotonic() - began
        self.spent.append(seconds)
        found = folder.read_json(RESULTS)["finetune"]
        right = f"{100 * found['dev_accuracy']:.1f}%, " if "dev_accuracy" in found else ""
        self.say(f"   {cell.folder.name}: dev {right}NLL bound {found['dev_nll_bound']:.4f}, {seconds:.0f} s")

    def launch(self, command: list[str], threads: int | None = None) -> None:
        """Runs tinyld unless the grid is ending; bars of progress are shown where only one process has them."""
        if self.ending:
            raise TinyldError("another run of the grid failed")
        quiet = ["--quiet"] if self.quiet or self.jobs > 1 else []
        self.launcher.run([*command, *quiet], threads or (threads_each(self.jobs) if self.jobs > 1 else None))

    def evaluate(self, task: str, cell: Cell) -> None:
        """On test, or on dev where the task has no test rows."""
        loaded = load_task(task)
        split = "test" if "test" in loaded.splits else "dev"
        if f"{loaded.name}/{split}" not in RunFolder(cell.folder).read_json(RESULTS).get("eval", {}):
            where = ["--data", str(self.data)] if self.data else []
            base = ["--base", str(self.base)] if self.base else []
            once = ["--steps", "1"] if loaded.is_generation else []  # what is written has no accuracy: its nats count
            device = ["--device", self.device]
            self.launch(["eval", str(cell.folder), "--split", split, *once, *where, *base, *device, "--json"])

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        write_atomic(self.out / SUMMARY, to_json(list(records)))
        write_atomic(self.out / TABLE, (markdown(RESULT_COLUMNS, result_rows(records)) + "\n").encode())
        if can_plot():
            write_atomic(self.out / PAGE, page(records, " ".join(["tinyld", *sys.argv[1:]])).encode())


def threads_each(jobs: int) -> int:
    """Every job's share of the threads that this process may use."""
    may_use = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, int(os.environ.get("OMP_NUM_THREADS") or may_use or 1) // jobs)


class Launcher:
    """Runs tinyld in processes of their own, so that their memory and their failures are their own."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped = False

    def run(self, command: list[str], threads: int | None = None) -> None:
        """Runs one process to its end, with that many threads or all; TinyldError when it fails."""
        limit = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        words = [sys.executable, "-m", "tinyld", *command]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=os.environ | limit)
        self.running.add(process)
        if self.stopped:
            process.terminate()
        try:
            code = process.wait()
        finally:
            self.running.discard(process)
        if code:
            raise TinyldError(f"tinyld {' '.join(command)} failed; finished runs are kept, the same command goes on")

    def stop(self) -> None:
        """Hands a stop on to all of them: they end their step and save."""
        self.stopped = True
        for process in tuple(self.running):
            process.terminate()

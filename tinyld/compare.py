"""Which method is best for your rows: every task by every method, tuned alike, over several seeds.

A cell is a process and a run folder, `OUT/<task>_<variant>_lr<rate>_s<seed>`. What is finished is read, what was
interrupted goes on, so that the same command again does only what is missing. Tuning: seed 0 at every rate, the best on
dev by accuracy (then by NLL bound) goes on to the other seeds. Test rows are read once, by the chosen runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tinyld.checkpoint import fingerprint, read_model_config
from tinyld.config import ModelConfig, check
from tinyld.errors import TinyldError, UsageError
from tinyld.interrupt import Interrupted, StopSignals
from tinyld.methods import METHODS, make_config
from tinyld.options import METHOD_OPTIONS, CompareOptions, FinetuneOptions
from tinyld.report import Row, aggregate, run_rows, write_csv
from tinyld.rows import bundled_data_dir, load_split
from tinyld.runs import ADAPTER, RESULTS, RunFolder
from tinyld.tasks import Task, load_task
from tinyld.write import make_folder

RATES = (1.0, 0.5, 2.0, 4.0, 0.25)  # multiples of a method's usual learning rate, in the order they are tried
SET_HERE = ("task", "data", "base", "limit", "method", "seed", "epochs", "steps", "tokens", "minutes", "batch_size")
SET_HERE += ("device", "out", "force", "resume", "json", "quiet")
Job = Callable[[], Any]


def compare(options: CompareOptions) -> list[Row]:
    """Runs what is missing of the grid; one row a method (`report.aggregate`), and a row a run in `options.csv`."""
    base = RunFolder.open(options.base or bundled_data_dir() / "base")
    methods = variants(options.methods, read_model_config(base))
    grid = Grid(options, [load_task(task) for task in options.task], methods, fingerprint(base))
    for task in grid.tasks:
        for split in ("dev", grid.tested_on(task)):
            load_split(task, split, options.data, limit=1)
        rows = len(load_split(task, "train", options.data))
        for limit in options.limit:
            check(limit <= rows, f"--limit {limit}: {task.name} has {rows:,} training rows")
    rows = grid.run()
    if options.csv is not None:
        write_csv(options.csv, rows)
    if len(grid.found) < len(grid.rows()):
        print("the budget of time is used up; the same command goes on where this one stopped", file=sys.stderr)
    return aggregate(rows)


@dataclass(frozen=True)
class Variant:
    """A method with options of its own: `weight-lora`, or `trajectory-lora:ranks=64/32/8:blocks=3` (/ for commas).

    `lr=X` among them moves the learning rates that are tried, which are otherwise around the method's usual one.
    """

    method: str
    sets: tuple[str, ...]  # name=value
    lr: float
    optimizer: str

    @property
    def name(self) -> str:
        """As part of a folder's name."""
        return "".join(c if c.isalnum() or c in "-.=%" else "-" for c in ":".join([self.method, *self.sets]))

    @property
    def flags(self) -> list[str]:
        optimizer = [] if any(text.startswith("optimizer=") for text in self.sets) else [f"optimizer={self.optimizer}"]
        return ["--method", self.method, *(word for text in [*self.sets, *optimizer] for word in ("--set", text))]


def variants(text: str, model_config: ModelConfig) -> list[Variant]:
    """`all`, or variants with commas between them; UsageError for options that a method does not have."""
    found = []
    for name in list(METHODS) if text == "all" else text.split(","):
        method, *given = name.split(":")
        if method not in METHODS:
            raise UsageError(
                f"--methods takes {', '.join(METHODS)} or all, with options as in weight-lora:rank=8; got {name!r}"
            )
        sets = [option.replace("/", ",") if "=" in option else f"{option}=true" for option in given]
        for option in sets:
            key = option.partition("=")[0].replace("-", "_")
            check(key not in SET_HERE, f"--methods: {key} is the same for all methods; give it as --{key}")
        try:
            options = FinetuneOptions.of({"method": method}, sets)
            make_config(method, {name: getattr(options, name) for name in METHOD_OPTIONS}, model_config)
        except UsageError as error:
            raise UsageError(f"--methods {name}: {error}") from None
        rate, optimizer = METHODS[method].usual(model_config, options.optimizer, options.recipe)
        rate = rate if options.lr is None else options.lr
        check(0 < rate < 1, f"--methods {name}: lr must be between 0 and 1, got {rate:g}")
        found.append(Variant(method, tuple(o for o in sets if not o.startswith("lr=")), rate, optimizer))
    check(len({variant.name for variant in found}) == len(found), f"--methods names one twice: {text!r}")
    return found


@dataclass(frozen=True)
class Cell:
    """One fine-tuning run of the grid."""

    folder: Path
    command: list[str]  # of tinyld, what makes it

    @property
    def finished(self) -> bool:
        return (self.folder / ADAPTER).is_file() and (self.folder / RESULTS).is_file()

    @property
    def score(self) -> tuple[float, float]:
        """(accuracy, -NLL bound) on dev: what tuning goes by. A generation task has no accuracy."""
        found = RunFolder(self.folder).read_json(RESULTS)["finetune"]
        return found.get("dev_accuracy", 0.0), -found["dev_nll_bound"]


@dataclass
class Grid:
    """What is asked for; `run` does it. With several jobs each has as many threads as if all were going."""

    options: CompareOptions
    tasks: Sequence[Task]
    methods: Sequence[Variant]
    fingerprint: str  # of the base, as its path may hold another one later
    launcher: Launcher = field(default_factory=lambda: Launcher())
    spent: list[float] = field(default_factory=list)  # seconds of each cell run here
    met: int = 0  # cells that were run here or found finished
    found: dict[int, list[Row]] = field(default_factory=dict)  # of what is done, by its place in `rows`

    def __post_init__(self) -> None:
        self.started, self.lock = time.monotonic(), threading.Lock()
        trials, limits = self.options.trials, self.options.limit
        check(1 <= trials <= len(RATES), f"--trials must be from 1 to {len(RATES)}, got {trials}")
        check(len(self.tasks) > 0, "compare needs at least one --task")
        check(len(set(limits)) == len(limits), "--limit names a number of rows twice")
        names = [task.name for task in self.tasks]
        check(len(set(names)) == len(names), f"--task names one twice: {', '.join(names)}")

    def cell(self, task: Task, variant: Variant, lr: float, seed: int, limit: int | None = None) -> Cell:
        options = self.options
        rows = f"_n{limit}" if limit else ""
        folder = options.out / f"{task.name.replace(':', '-')}_{variant.name}_lr{lr:g}{rows}_s{seed}"
        name = options.task[self.tasks.index(task)]
        command = ["finetune", "--task", name, *variant.flags, "--lr", f"{lr:g}", "--seed", str(seed)]
        command += ["--epochs", f"{options.epochs:g}"] if options.steps is None else ["--steps", str(options.steps)]
        command += ["--batch-size", str(options.batch_size), *(["--limit", str(limit)] if limit else [])]
        return Cell(folder, [*command, *self.where, "--out", str(folder), "--json"])

    @cached_property
    def where(self) -> list[str]:
        """The flags of every command that say what it reads, and on what it runs."""
        paths = {"--data": self.options.data, "--base": self.options.base}
        return [w for flag, path in paths.items() if path for w in (flag, str(path))] + [
            "--device",
            self.options.device,
        ]

    def rates(self, variant: Variant) -> list[float]:
        return [float(f"{variant.lr * multiple:.3g}") for multiple in RATES[: self.options.trials]]

    def rows(self) -> list[tuple[Task, int | None, Variant]]:
        """The grid: what each row of its table is about."""
        limits = self.options.limit or (None,)
        return [(task, limit, variant) for task in self.tasks for limit in limits for variant in self.methods]

    def total(self) -> int:
        return len(self.rows()) * (self.options.trials + self.options.seeds - 1)

    def out_of_time(self) -> bool:
        budget = self.options.budget_minutes
        return budget is not None and time.monotonic() - self.started > 60 * budget

    def run(self) -> list[Row]:
        """Runs what is missing; a row for every run of each (task, rows, method) whose seeds are all there."""
        make_folder(self.options.out)
        with RunFolder(self.options.out).locked():
            self.check_cells()
            self.run_stages([self.stages(i, *row) for i, row in enumerate(self.rows())])
        return [row for i in sorted(self.found) for row in self.found[i]]

    def run_stages(self, rows: Sequence[Iterator[list[Job]]]) -> None:
        """Runs the jobs of all rows side by side, those of the first rows first."""
        ready: list[list[Job]] = [next(row, []) for row in rows]
        running: dict[Future[Any], int] = {}  # to the row that waits for it
        with StopSignals() as stop, ThreadPoolExecutor(self.options.jobs) as pool:
            try:
                while running or any(ready):
                    while any(ready) and len(running) < self.options.jobs:
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
                self.launcher.stop()  # the others save and end
                raise

    def stages(self, i: int, task: Task, limit: int | None, variant: Variant) -> Iterator[list[Job]]:
        """The jobs of one row of the grid, stage by stage: each begins when all of the one before have ended.

        Every rate with seed 0, the other seeds at the best rate, their evaluation. It ends early when the budget of
        time is used up.
        """
        tried = {lr: self.cell(task, variant, lr, 0, limit) for lr in self.rates(variant)}
        yield [partial(self.finish, cell) for cell in tried.values()]
        if not all(cell.finished for cell in tried.values()):
            return
        best = max(tried, key=lambda lr: tried[lr].score)
        chosen = [self.cell(task, variant, best, seed, limit) for seed in range(self.options.seeds)]
        if len(chosen) > 1:
            yield [partial(self.finish, cell) for cell in chosen[1:]]
        if not all(cell.finished for cell in chosen):
            return
        yield [partial(self.evaluate, task, cell) for cell in chosen]
        self.found[i] = [row for cell in chosen for row in run_rows(RunFolder(cell.folder), len(tried))]

    def check_cells(self) -> None:
        """TinyldError when a cell was made otherwise than this command would, as it must not pass for it."""
        seeds, limits = range(self.options.seeds), self.rows()
        for cell in [self.cell(t, v, lr, seed, n) for t, n, v in limits for lr in self.rates(v) for seed in seeds]:
            folder = RunFolder(cell.folder)
            if not folder.is_run():
                continue
            asked, base = " ".join(["tinyld", *cell.command]), self.fingerprint
            made = folder.config["environment"]["command"].removesuffix(" --quiet").removesuffix(" --force")
            if (made, folder.config["base"]["fingerprint"]) != (asked, base):
                raise TinyldError(
                    f"{cell.folder} was made by {made}, and not by {asked}, on base {base}; choose another --out"
                )

    def finish(self, cell: Cell) -> None:
        """Runs a cell unless it is finished, or the budget of time is used up."""
        if not cell.finished and self.out_of_time():
            return
        with self.lock:
            left = self.total() - self.met
            self.met += 1
        if cell.finished:
            return
        minutes = left * sum(self.spent) / max(1, len(self.spent)) / min(self.options.jobs, left) / 60
        eta = f"; about {minutes:.0f} min left" if self.spent else ""
        self.say(f"-- {left} of {self.total()} runs to go{eta}: tinyld {' '.join(cell.command)}")
        began, folder = time.monotonic(), RunFolder(cell.folder)
        if folder.checkpoints():
            self.launch(["finetune", "--resume", str(cell.folder), "--json"])
        else:
            self.launch([*cell.command, *(["--force"] if folder.is_run() else [])])
        seconds = time.monotonic() - began
        self.spent.append(seconds)
        accuracy, bound = cell.score
        self.say(f"   {cell.folder.name}: dev {100 * accuracy:.1f}%, NLL bound {-bound:.4f}, {seconds:.0f} s")

    def say(self, text: str) -> None:
        if not self.options.quiet:
            print(text, file=sys.stderr, flush=True)

    def launch(self, command: list[str]) -> None:
        """Runs tinyld; bars of progress are shown where only one process has them."""
        several = self.options.jobs > 1
        quiet = ["--quiet"] if self.options.quiet or several else []
        self.launcher.run([*command, *quiet], threads_each(self.options.jobs) if several else None)

    def evaluate(self, task: Task, cell: Cell) -> None:
        split = self.tested_on(task)
        if f"{task.name}/{split}" not in RunFolder(cell.folder).read_json(RESULTS).get("eval", {}):
            once = ["--steps", "1"] if task.is_generation else []  # what is written has no accuracy: its nats count
            self.launch(["eval", str(cell.folder), "--split", split, *once, *self.where, "--json"])

    def tested_on(self, task: Task) -> str:
        return "test" if "test" in task.splits else "dev"


def threads_each(jobs: int) -> int:
    """Every job's share of the threads that this process may use."""
    may_use = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, int(os.environ.get("OMP_NUM_THREADS") or may_use or 1) // jobs)


class Launcher:
    """Runs tinyld in processes of their own, so that their memory and their failures are their own."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped, self.lock = False, threading.Lock()

    def run(self, command: list[str], threads: int | None = None) -> None:
        """Runs one process to its end, with that many threads or all; TinyldError when it fails."""
        limit = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        with self.lock:
            if self.stopped:
                raise TinyldError("another run of the grid failed")
            words = [sys.executable, "-m", "tinyld", *command]
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=os.environ | limit)
            self.running.add(process)
        try:
            code = process.wait()
        finally:
            with self.lock:
                self.running.discard(process)
        if code:
            raise TinyldError(f"tinyld {' '.join(command)} failed; finished runs are kept, the same command goes on")

    def stop(self) -> None:
        """Hands a stop on to all of them: they end their step and save."""
        with self.lock:
            self.stopped = True
            for process in tuple(self.running):
                process.terminate()

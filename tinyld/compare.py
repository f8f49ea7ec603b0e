"""Which method is best for your rows: every task by every method, tuned alike, over several seeds.

A run of the grid is a process and a folder, `OUT/<task>_<variant>_lr<rate>_s<seed>`. What is finished is read, what was
interrupted goes on, so that the same command again does only what is missing. Tuning: seed 0 at every rate, the best on
dev by accuracy (then by NLL bound) goes on to the other seeds. Test rows are read once, by the chosen runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import count, product

from tinyld.checkpoint import fingerprint, read_model_config
from tinyld.config import ModelConfig, check
from tinyld.errors import TinyldError, UsageError
from tinyld.methods import METHODS, make_config
from tinyld.options import METHOD_OPTIONS, CompareOptions, FinetuneOptions
from tinyld.report import Row, aggregate, run_rows, write_csv
from tinyld.rows import load_split
from tinyld.runs import ADAPTER, RESULTS, RunFolder
from tinyld.tasks import Task, load_task
from tinyld.workspace import default_base, say_to_stderr
from tinyld.write import make_folder

RATES = (1.0, 0.5, 2.0, 4.0, 0.25)  # multiples of a method's usual learning rate, in the order they are tried
SET_HERE = ("task", "data", "base", "limit", "method", "seed", "epochs", "steps", "tokens", "minutes", "batch_size")
SET_HERE += ("device", "out", "force", "resume", "json", "quiet")


def compare(options: CompareOptions) -> list[Row]:
    """Runs what is missing of the grid; one row a method (`report.aggregate`), and a row a run in `options.csv`."""
    base = RunFolder(options.base or default_base())
    methods = variants(options.methods, read_model_config(base))
    grid = Grid(options, [load_task(task) for task in options.task], methods, fingerprint(base))
    for task in grid.tasks:
        for split in ("dev", tested_on(task)):
            load_split(task, split, options.data, limit=1)
        rows = len(load_split(task, "train", options.data))
        for limit in options.limit:
            check(limit <= rows, f"--limit {limit}: {task.name} has {rows:,} training rows")
    rows = grid.run()
    if options.csv is not None:
        write_csv(options.csv, rows)
    return aggregate(rows)


def tested_on(task: Task) -> str:
    return "test" if "test" in task.splits else "dev"


@dataclass(frozen=True)
class Variant:
    """A method with options of its own."""

    name: str  # as part of a folder's name
    flags: list[str]
    lr: float  # around which rates are tried


def variants(text: str, model_config: ModelConfig) -> list[Variant]:
    """`all`, or methods with commas between them, options behind colons, / in the place of their commas:
    `weight-lora,trajectory-lora:ranks=64/32/8:lr=0.01`. UsageError for options that a method does not have.

    `lr` moves the learning rates that are tried, which are otherwise around the method's usual one.
    """
    found = []
    for name in list(METHODS) if text == "all" else text.split(","):
        method, *given = name.split(":")
        known = f"--methods takes {', '.join(METHODS)} or all, with options as in weight-lora:rank=8; got {name!r}"
        check(method in METHODS, known)
        sets = [option.replace("/", ",") if "=" in option else f"{option}=true" for option in given]
        for option in sets:
            key = option.partition("=")[0].replace("-", "_")
            check(key not in SET_HERE, f"--methods: {key} is the same for all methods; give it as --{key}")
        try:
            options = FinetuneOptions.of({"method": method}, sets)
            make_config(method, {name: getattr(options, name) for name in METHOD_OPTIONS}, model_config)
        except UsageError as error:
            raise UsageError(f"--methods {name}: {error}") from None
        rate, _ = METHODS[method].usual(model_config, options.optimizer, options.recipe)
        rate = rate if options.lr is None else options.lr
        check(0 < rate < 1, f"--methods {name}: lr must be between 0 and 1, got {rate:g}")
        sets = [option for option in sets if not option.startswith("lr=")]
        flags = ["--method", method, *(word for option in sets for word in ("--set", option))]
        found.append(Variant(re.sub(r"[^A-Za-z0-9.=%-]", "-", ":".join([method, *sets])), flags, rate))
    check(len({variant.name for variant in found}) == len(found), f"--methods names one twice: {text!r}")
    return found


@dataclass(frozen=True)
class Cell:
    """One fine-tuning run of the grid."""

    lr: float
    folder: RunFolder
    command: list[str]  # of tinyld, what makes it

    @property
    def finished(self) -> bool:
        return all((self.folder.path / name).is_file() for name in (ADAPTER, RESULTS))

    @property
    def score(self) -> tuple[float, float]:
        """(accuracy, -NLL bound) on dev: what tuning goes by. A generation task has no accuracy."""
        found = self.folder.read_json(RESULTS)["finetune"]
        return found.get("dev_accuracy", 0.0), -found["dev_nll_bound"]


@dataclass
class Grid:
    """What is asked for; `run` does it, a row of the table after the other or `--jobs` of them side by side.

    With several jobs each has as many threads as if all were going.
    """

    options: CompareOptions
    tasks: Sequence[Task]
    methods: Sequence[Variant]
    fingerprint: str  # of the base, as its path may hold another one later
    launcher: Launcher = field(default_factory=lambda: Launcher())

    def __post_init__(self) -> None:
        options, names = self.options, [task.name for task in self.tasks]
        check(options.trials <= len(RATES), f"--trials must be from 1 to {len(RATES)}, got {options.trials}")
        check(len(names) > 0, "compare needs at least one --task")
        check(len(set(options.limit)) == len(options.limit), "--limit names a number of rows twice")
        check(len(set(names)) == len(names), f"--task names one twice: {', '.join(names)}")
        self.say, self.met = say_to_stderr(options.quiet), count(1)  # runs that were met so far
        self.rows = list(product(self.tasks, options.limit or (None,), self.methods))
        paths = {"--data": options.data, "--base": options.base, "--device": options.device}
        self.where = [word for flag, path in paths.items() if path is not None for word in (flag, str(path))]
        self.total = len(self.rows) * (options.trials + options.seeds - 1)

    def cell(self, task: Task, limit: int | None, variant: Variant, lr: float, seed: int) -> Cell:
        options, rows = self.options, [] if limit is None else ["--limit", str(limit)]
        name = f"{task.name.replace(':', '-')}_{variant.name}_lr{lr:g}{f'_n{limit}' if limit else ''}_s{seed}"
        asked = options.task[self.tasks.index(task)]
        budget = ["--epochs", f"{options.epochs:g}"] if options.steps is None else ["--steps", str(options.steps)]
        command = ["finetune", "--task", asked, *variant.flags, "--lr", f"{lr:g}", "--seed", str(seed), *budget]
        command += ["--batch-size", str(options.batch_size), *rows, *self.where, "--out", str(options.out / name)]
        return Cell(lr, RunFolder(options.out / name), [*command, "--json", "--force"])

    def rates(self, variant: Variant) -> list[float]:
        return [float(f"{variant.lr * multiple:.3g}") for multiple in RATES[: self.options.trials]]

    def run(self) -> list[Row]:
        """Runs what is missing; a row for every run that was chosen."""
        make_folder(self.options.out)
        with RunFolder(self.options.out).locked(), ThreadPoolExecutor(self.options.jobs) as pool:
            for row in self.rows:
                for lr, seed in product(self.rates(row[-1]), range(self.options.seeds)):
                    self.check_cell(self.cell(*row, lr, seed))
            try:
                jobs = [pool.submit(self.run_row, *row) for row in self.rows]
                for job in as_completed(jobs):
                    job.result()
            except BaseException:
                self.launcher.stop()  # the others save and end
                raise
        return [row for job in jobs for row in job.result()]

    def run_row(self, task: Task, limit: int | None, variant: Variant) -> list[Row]:
        """Every rate with seed 0, the other seeds at the best rate, their evaluation."""
        tried = [self.cell(task, limit, variant, lr, 0) for lr in self.rates(variant)]
        for cell in tried:
            self.train(cell)
        best = max(tried, key=lambda cell: cell.score)
        chosen = [best, *(self.cell(task, limit, variant, best.lr, seed) for seed in range(1, self.options.seeds))]
        for cell in chosen[1:]:
            self.train(cell)
        for cell in chosen:
            if f"{task.name}/{tested_on(task)}" not in cell.folder.read_json(RESULTS).get("eval", {}):
                once = ["--steps", "1"] if task.is_generation else []  # what is written has no accuracy: its nats count
                self.launch(["eval", str(cell.folder.path), "--split", tested_on(task), *once, *self.where, "--json"])
        return [row for cell in chosen for row in run_rows(cell.folder, len(tried))]

    def check_cell(self, cell: Cell) -> None:
        """TinyldError when a cell was made otherwise than this command would, as it must not pass for it."""
        if cell.folder.is_run():
            asked, config = " ".join(["tinyld", *cell.command]), cell.folder.config
            made = config["environment"]["command"].removesuffix(" --quiet")
            if (made, config["base"]["fingerprint"]) != (asked, self.fingerprint):
                raise TinyldError(
                    f"{cell.folder.path} was made by {made}, and not by {asked}, on base {self.fingerprint}; "
                    "choose another --out"
                )

    def train(self, cell: Cell) -> None:
        """Runs a cell unless it is finished."""
        number = next(self.met)
        if cell.finished:
            return
        self.say(f"-- run {number} of {self.total}: tinyld {' '.join(cell.command)}")
        resume = ["finetune", "--resume", str(cell.folder.path), "--json"]
        self.launch(resume if cell.folder.checkpoints() else cell.command)
        accuracy, bound = cell.score
        self.say(f"   {cell.folder.path.name}: dev {100 * accuracy:.1f}%, NLL bound {-bound:.4f}")

    def launch(self, command: list[str]) -> None:
        """Runs tinyld; bars of progress are shown where only one process has them."""
        several = self.options.jobs > 1
        quiet = ["--quiet"] if self.options.quiet or several else []
        self.launcher.run([*command, *quiet], threads_each(self.options.jobs) if several else None)


def threads_each(jobs: int) -> int:
    """Every job's share of the threads that this process may use."""
    may_use = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, int(os.environ.get("OMP_NUM_THREADS") or may_use or 1) // jobs)


class Launcher:
    """Runs tinyld in processes of their own, so that their memory and their failures are their own."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[bytes]] = []
        self.stopped, self.lock = False, threading.Lock()

    def run(self, command: list[str], threads: int | None = None) -> None:
        """Runs one process to its end, with that many threads or all; TinyldError when it fails."""
        limit = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        with self.lock:
            if self.stopped:
                raise TinyldError("another run of the grid failed")
            words = [sys.executable, "-m", "tinyld", *command]
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=os.environ | limit)
            self.running.append(process)
        if process.wait():
            raise TinyldError(f"tinyld {' '.join(command)} failed; finished runs are kept, the same command goes on")

    def stop(self) -> None:
        """Hands a stop on to all of them: they end their step and save."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()  # which does nothing to one that has ended

"""Which method is best for your rows: every task by every method, tuned alike, over several seeds.

A run of the grid is a process and a folder, `OUT/<task>_<variant>_lr<rate>_s<seed>`. What is finished is read, what was
interrupted goes on, so that the same command again does only what is missing. Tuning: seed 0 at every rate, the best on
dev by accuracy (then by NLL bound) goes on to the other seeds. Test rows are read once, by the chosen runs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, product
from typing import NamedTuple

from tinyld.checkpoint import fingerprint, read_shape
from tinyld.config import ModelConfig, check
from tinyld.errors import TinyldError, UsageError
from tinyld.methods import METHODS, make_config
from tinyld.options import METHOD_OPTIONS, CompareOptions, FinetuneOptions
from tinyld.report import Row, aggregate, run_rows, write_csv
from tinyld.rows import load_split
from tinyld.runs import ADAPTER, RESULTS, RunFolder
from tinyld.tasks import Task, load_task
from tinyld.workspace import check_writable, default_base, say_to_stderr
from tinyld.write import make_folder

RATES = (1.0, 0.5, 2.0, 4.0, 0.25)  # multiples of a method's usual learning rate, in the order they are tried
SET_HERE = ("task", "data", "base", "limit", "method", "seed", "epochs", "steps", "tokens", "minutes", "batch_size")
SET_HERE += ("device", "out", "force", "resume", "json", "quiet")


def compare(options: CompareOptions) -> list[Row]:
    """Runs what is missing of the grid; one row a method (`report.aggregate`), and a row a run in `options.csv`."""
    check_writable(options.csv)
    base = RunFolder(options.base or default_base())
    methods = variants(options.methods, read_shape(base.path)[0])
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


class Variant(NamedTuple):
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
        usual, _ = METHODS[method].usual(model_config, options.optimizer, options.recipe)
        rate = usual if options.lr is None else options.lr
        sets = [option for option in sets if not option.startswith("lr=")]
        flags = ["--method", method, *(word for option in sets for word in ("--set", option))]
        name = re.sub(r"[^A-Za-z0-9.=%-]", "-", ":".join([method, *sets]))
        found.append(Variant(name, flags, rate))
    return found


@dataclass(frozen=True)
class Cell:
    """One fine-tuning run of the grid."""

    lr: float
    folder: RunFolder
    command: list[str]  # of tinyld, what makes it

    @property
    def score(self) -> tuple[float, float]:
        """(accuracy, -NLL bound) on dev: what tuning goes by. A generation task has no accuracy."""
        found = self.folder.read_json(RESULTS)["finetune"]
        return found.get("dev_accuracy", 0.0), -found["dev_nll_bound"]


class Grid:
    """What is asked for; `run` does it, a row of the table after the other."""

    def __init__(self, options: CompareOptions, tasks: Sequence[Task], methods: Sequence[Variant], fingerprint: str):
        """fingerprint: of the base, as its path may hold another one later."""
        alone = options.steps is None or options.epochs == CompareOptions.epochs
        check(alone, "give --steps or --epochs, not both")
        self.options, self.tasks, self.fingerprint = options, tasks, fingerprint
        self.say, self.met = say_to_stderr(options.quiet), count(1)  # runs that were met so far
        self.rows = list(product(tasks, options.limit or (None,), methods))
        paths = {"--data": options.data, "--base": options.base, "--device": options.device}
        self.more = [word for flag, path in paths.items() if path is not None for word in (flag, str(path))]
        self.quiet = ["--quiet"] if options.quiet else []
        self.total = len(self.rows) * (options.trials + options.seeds - 1)

    def cell(self, task: Task, limit: int | None, variant: Variant, lr: float, seed: int) -> Cell:
        options, rows = self.options, [] if limit is None else ["--limit", str(limit)]
        name = f"{task.name.replace(':', '-')}_{variant.name}_lr{lr:g}{f'_n{limit}' if limit else ''}_s{seed}"
        asked = options.task[self.tasks.index(task)]
        budget = ["--epochs", f"{options.epochs:g}"] if options.steps is None else ["--steps", str(options.steps)]
        command = ["finetune", "--task", asked, *variant.flags, "--lr", f"{lr:g}", "--seed", str(seed), *budget]
        command += ["--batch-size", str(options.batch_size), *rows, *self.more, "--out", str(options.out / name)]
        return Cell(lr, RunFolder(options.out / name), [*command, "--json", "--force"])

    def rates(self, variant: Variant) -> list[float]:
        return [float(f"{variant.lr * multiple:.3g}") for multiple in RATES[: self.options.trials]]

    def run(self) -> list[Row]:
        """Runs what is missing; a row for every run that was chosen."""
        make_folder(self.options.out)
        with RunFolder(self.options.out).locked():
            for row in self.rows:
                for lr, seed in product(self.rates(row[-1]), range(self.options.seeds)):
                    self.check_cell(self.cell(*row, lr, seed))
            return [found for row in self.rows for found in self.run_row(*row)]

    def run_row(self, task: Task, limit: int | None, variant: Variant) -> list[Row]:
        """Every rate with seed 0, the other seeds at the best rate, their evaluation."""
        tried = [self.trained(self.cell(task, limit, variant, lr, 0)) for lr in self.rates(variant)]
        best = max(tried, key=lambda cell: cell.score)
        others = [self.cell(task, limit, variant, best.lr, seed) for seed in range(1, self.options.seeds)]
        chosen = [best, *map(self.trained, others)]
        for cell in chosen:
            if f"{task.name}/{tested_on(task)}" not in cell.folder.read_json(RESULTS).get("eval", {}):
                launch(["eval", str(cell.folder.path), "--split", tested_on(task), *self.more, "--json", *self.quiet])
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

    def trained(self, cell: Cell) -> Cell:
        """The cell, which is run unless it is finished."""
        number, path = next(self.met), cell.folder.path
        if not all((path / name).is_file() for name in (ADAPTER, RESULTS)):
            self.say(f"-- run {number} of {self.total}: tinyld {' '.join(cell.command)}")
            resume = ["finetune", "--resume", str(path), "--json"]
            launch([*(resume if cell.folder.checkpoints() else cell.command), *self.quiet])
            accuracy, bound = cell.score
            self.say(f"   {path.name}: dev {100 * accuracy:.1f}%, NLL bound {-bound:.4f}")
        return cell


def launch(command: list[str]) -> None:
    """Runs tinyld in a process of its own, so that its memory and its failures are its own; TinyldError when it fails.

    A stop is handed on to it: it ends its step and saves.
    """
    process = subprocess.Popen([sys.executable, "-m", "tinyld", *command], stdout=subprocess.DEVNULL)
    try:
        failed = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if failed:
        raise TinyldError(f"tinyld {' '.join(command)} failed; finished runs are kept, the same command goes on")

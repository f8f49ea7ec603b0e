"""Which method is best for your rows: every task by every method, tuned alike, over several seeds.

A run of the grid is a folder, `OUT/<task>_<variant>_lr<rate>_s<seed>`. What is finished is read, what was interrupted
goes on, so that the same command again does only what is missing. Tuning: seed 0 at every rate, the best on dev by
accuracy (then by NLL bound) goes on to the other seeds. Test rows are read once, by the chosen runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from typing import NamedTuple

from tinyld.checkpoint import fingerprint, read_shape
from tinyld.config import ModelConfig, Reading, check
from tinyld.data import TaskRows
from tinyld.datafile import task_and_rows
from tinyld.errors import TinyldError, UsageError
from tinyld.finetuning import config_of, finetune, rows_to_learn, usual_epochs
from tinyld.interrupt import Interrupted
from tinyld.methods import METHODS, make_config
from tinyld.options import METHOD_OPTIONS, CompareOptions, EvalOptions, FinetuneOptions, RowOptions
from tinyld.report import Row, aggregate, run_rows, write_csv
from tinyld.rows import file_in, files_of, load_split
from tinyld.runs import ADAPTER, RESULTS, RunFolder
from tinyld.scores import eval as evaluate
from tinyld.tasks import Task, unlike
from tinyld.workspace import check_writable, default_base, say_to_stderr
from tinyld.write import make_folder, to_json

RATES = (1.0, 0.5, 2.0, 4.0, 0.25)  # multiples of a method's usual learning rate, in the order they are tried
SET_HERE = ("task", "data", "base", "limit", "method", "seed", "epochs", "steps", "tokens", "minutes", "batch_size")
SET_HERE += ("device", "out", "force", "resume", "json", "quiet", "mask_token", "max_length", "chat")


def compare(options: CompareOptions) -> list[Row]:
    """Runs what is missing of the grid; one row a method (`report.aggregate`), and a row a run in `options.csv`."""
    base = RunFolder(options.base or default_base())
    shape, tokenizer = read_shape(base.path, options.reading())
    methods, tasks, inputs = variants(options.methods, shape), [], [options.data]
    for name in options.task or (None,):
        task, data, held_out = task_and_rows(options, name, tokenizer, shape.max_length)
        split = tested_on(task, data, held_out)
        inputs += files_of(task, data, options.data)
        tested = load_split(task, split, data, None, held_out)
        rows = len(load_split(task, "train", data, None, held_out))
        asked = Asked(task, name, split, TaskRows(tested, task, tokenizer, shape.max_length).digest(), {})
        for limit in options.limit or (None,):
            check(limit is None or limit <= rows, f"--limit {limit}: {task.name} has {rows:,} training rows")
            if options.out.is_dir():  # runs that are there must have learned these
                learned = rows_to_learn(task, {"folder": data, "held_out": held_out, "limit": limit})
                digests = [TaskRows(of, task, tokenizer, shape.max_length).digest() for of in learned]
                asked.digests[limit] = dict(zip(("sha256", "dev_sha256"), digests, strict=True))
        tasks.append(asked)
    check_writable(options.csv, inputs)
    rows = Grid(options, tasks, methods, fingerprint(base, options.reading())).run()
    if options.csv is not None:
        write_csv(options.csv, rows)
    return aggregate(rows)


def tested_on(task: Task, data: Path | None, held_out: bool) -> str:
    """The split that the chosen runs are measured on: test rows where there are some."""
    found = "test" in task.splits if data is None else file_in(data, task, "test", held_out)
    return "test" if found else "dev"


class Asked(NamedTuple):
    """A task of the grid."""

    task: Task
    name: str | None  # as --task has it
    split: str  # that the chosen runs are measured on
    tested: str  # digest of its rows
    digests: dict[int | None, dict[str, str]]  # of train and dev rows, by the number of rows to learn


class Variant(NamedTuple):
    """A method with options of its own."""

    name: str  # as part of a folder's name
    method: str
    sets: list[str]  # name=value
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
            settings = make_config(method, {name: getattr(options, name) for name in METHOD_OPTIONS}, model_config)
        except UsageError as error:
            raise UsageError(f"--methods {name}: {error}") from None
        if METHODS[method].expected_parameters(settings, model_config) == 0:  # bitfit, where there are no biases
            check(text == "all", f"--methods: {method} has nothing to train in this base")
            continue
        usual, _ = METHODS[method].usual(model_config, options.optimizer, options.recipe)
        rate = usual if options.lr is None else options.lr
        check(0 < rate < 1, f"--methods {name}: lr must be between 0 and 1, got {rate:g}")
        sets = [option for option in sets if not option.startswith("lr=")]
        name = re.sub(r"[^A-Za-z0-9.=%-]", "-", ":".join([method, *sets]))
        found.append(Variant(name, method, sets, rate))
    return found


def score(run: Path) -> tuple[float, float]:
    """(accuracy, -NLL bound) on dev: what tuning goes by. A generation task has no accuracy."""
    found = RunFolder(run).read_json(RESULTS)["finetune"]
    return found.get("dev_accuracy", 0.0), -found["dev_nll_bound"]


class Grid:
    """What is asked for; `run` does it, a row of the table after the other."""

    def __init__(self, options: CompareOptions, tasks: Sequence[Asked], methods: Sequence[Variant], fingerprint: str):
        """fingerprint: of the base, as its path may hold another one later."""
        check(options.steps is None or options.epochs is None, "give --steps or --epochs, not both")
        named = {"--task": [a.task.name for a in tasks], "--methods": [v.name for v in methods]}
        named["--limit"] = list(options.limit)
        for flag, values in named.items():
            check(len(set(values)) == len(values), f"{flag} names one twice: {', '.join(map(str, values))}")
        self.options, self.fingerprint = options, fingerprint
        self.say, self.met = say_to_stderr(options.quiet), count(1)  # runs that were met so far
        self.rows = list(product(tasks, options.limit or (None,), methods))
        self.total = len(self.rows) * (options.trials + options.seeds - 1)

    def cell(self, asked: Asked, limit: int | None, variant: Variant, lr: float, seed: int) -> FinetuneOptions:
        """What makes one run of the grid."""
        options = self.options
        name = f"{asked.task.name}_{variant.name}_lr{lr:g}{f'_n{limit}' if limit else ''}_s{seed}"
        given = {name: getattr(options, name) for name in ("base", "batch_size", "device", "quiet")}
        given |= options.only(Reading) | options.only(RowOptions) | {"epochs": options.epochs, "steps": options.steps}
        given |= {"task": asked.name, "limit": limit, "method": variant.method, "lr": lr, "seed": seed}
        return FinetuneOptions.of(given | {"out": options.out / name, "force": True}, variant.sets)

    def rates(self, variant: Variant) -> list[float]:
        return [float(f"{variant.lr * multiple:.3g}") for multiple in RATES[: self.options.trials]]

    def run(self) -> list[Row]:
        """Runs what is missing; a row for every run that was chosen."""
        make_folder(self.options.out)
        with RunFolder(self.options.out).locked():
            for row in self.rows:
                config_of(replace(self.cell(*row, row[-1].lr, 0), quiet=True))  # refuses what cannot be made
                for lr, seed in product(self.rates(row[-1]), range(self.options.seeds)):
                    self.check_cell(row[0], self.cell(*row, lr, seed))
            try:
                return [found for row in self.rows for found in self.run_row(*row)]
            except Interrupted as error:
                raise Interrupted(error.exit_code - 128, "the same command goes on") from None
            except TinyldError as error:
                raise TinyldError(f"{error}; finished runs are kept, the same command goes on") from None

    def run_row(self, asked: Asked, limit: int | None, variant: Variant) -> list[Row]:
        """Every rate with seed 0, the other seeds at the best rate, their evaluation."""
        options, task, split = self.options, asked.task, asked.split
        tried = {lr: self.trained(self.cell(asked, limit, variant, lr, 0)) for lr in self.rates(variant)}
        best = max(tried, key=lambda lr: score(tried[lr]))
        others = [self.cell(asked, limit, variant, best, seed) for seed in range(1, options.seeds)]
        chosen = [tried[best], *map(self.trained, others)]
        for path in chosen:
            found = RunFolder(path).read_json(RESULTS).get("eval", {}).get(f"{task.name}/{split}", {})
            if found.get("sha256") != asked.tested:
                about = {name: getattr(options, name) for name in ("base", "device", "quiet")}
                evaluate(EvalOptions(runs=(path,), split=split, **about))
        return [row for path in chosen for row in run_rows(RunFolder(path), len(tried))]

    def check_cell(self, cell: Asked, options: FinetuneOptions) -> None:
        """TinyldError when a cell was made otherwise than this command would, as it must not pass for it."""
        folder = RunFolder(Path(options.out or ""))
        if folder.is_run():
            made, asked = folder.config, json.loads(to_json(config_of(replace(options, quiet=True))))
            made["method"], asked["base"]["fingerprint"] = made.get("started_as", made["method"]), self.fingerprint
            del asked["base"]["path"]
            if not cell.digests.get(options.limit, {}).items() <= made["data"].items():
                raise TinyldError(f"{folder.path} was made of other rows; choose another --out")
            if asked["train"]["epochs"] is asked["train"]["steps"] is None:
                rows = made["data"]["rows"], made["train"]["batch_size"]
                asked["train"]["epochs"] = usual_epochs(cell.task, *rows)
            if differs := unlike(made["task"], asked.pop("task")):
                raise TinyldError(f"{folder.path} was made for another task: {differs}; choose another --out")
            for part, settings in asked.items():
                for name, value in settings.items() if isinstance(settings, dict) else ():
                    if (was := made[part].get(name)) != value:
                        how = f"its {name} was {was}, and would be {value}"
                        raise TinyldError(f"{folder.path} was made otherwise: {how}; choose another --out")

    def trained(self, options: FinetuneOptions) -> Path:
        """The folder of a run of the grid, which is made unless it is finished."""
        number, folder = next(self.met), RunFolder(Path(options.out or ""))
        is_there = all((folder.path / name).is_file() for name in (ADAPTER, RESULTS))
        if not (is_there and "finetune" in folder.read_json(RESULTS)):
            self.say(f"-- run {number} of {self.total}: {folder.path.name}")
            again = FinetuneOptions(resume=folder.path, quiet=options.quiet, base=options.base)
            finetune(again if folder.checkpoints() else options)
            found = folder.read_json(RESULTS)["finetune"]
            right = f"{100 * found['dev_accuracy']:.1f}%, " if "dev_accuracy" in found else ""
            self.say(f"   dev {right}NLL bound {found['dev_nll_bound']:.4f}")
        return folder.path

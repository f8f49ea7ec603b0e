"""Which method is best for your rows: every task by every method, tuned alike, over several seeds.

A run of the grid is a folder, `OUT/<task>_<method>_lr<rate>_s<seed>_<digest of all else that was asked>`. What is
finished is read, what was interrupted goes on, so that the same command again does only what is missing, and another
one makes runs of its own. Tuning: seed 0 at every rate, the best on dev by accuracy (then by NLL bound) goes on to the
other seeds; one at which training diverges is out, and a line of the table that has no other. Test rows are read once,
by the chosen runs.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import NamedTuple

from tinyld.checkpoint import fingerprint, read_shape
from tinyld.config import ModelConfig, check
from tinyld.data import TaskRows
from tinyld.datafile import task_and_rows
from tinyld.errors import Diverged, TinyldError, UsageError
from tinyld.finetuning import config_of, finetune, rows_to_learn
from tinyld.interrupt import Interrupted
from tinyld.methods import METHODS
from tinyld.options import CompareOptions, EvalOptions, FinetuneOptions
from tinyld.report import Row, aggregate, run_rows, write_csv
from tinyld.rows import file_in, files_of, load_split
from tinyld.runs import ADAPTER, RunFolder
from tinyld.scores import eval as evaluate
from tinyld.workspace import check_writable, default_base, say_to_stderr
from tinyld.write import make_folder, sha256

RATES = (1.0, 0.5, 2.0, 4.0, 0.25)  # multiples of a method's usual learning rate, in the order they are tried
SET_HERE = ("method", "seed", "tokens", "minutes", "force", "resume", *CompareOptions.__dataclass_fields__)


class Line(NamedTuple):
    """A line of the table, of which there are several runs: a method on a task."""

    task: str
    split: str  # that the chosen runs are measured on
    tested: str  # digest of its rows
    options: FinetuneOptions  # of its runs, but for lr, seed and out
    rates: list[float]
    name: str  # of a run's folder, with places for lr and seed


def compare(options: CompareOptions) -> list[Row]:
    """Runs what is missing of the grid; one row a method (`report.aggregate`), and a row a run in `options.csv`."""
    lines = lines_of(options)
    make_folder(options.out)
    with RunFolder(options.out).locked():
        numbers, found = count(1), list[Row]()
        try:
            for line in lines:
                try:
                    found += run_line(line, options, numbers, len(lines))
                except Diverged as error:
                    if line is lines[-1] and not found:
                        raise
                    rows = f" of {line.options.limit} rows" if line.options.limit else ""
                    which = f"{line.name.rpartition('_lr')[0]}{rows}"
                    say_to_stderr(options.quiet)(f"   {which} is left out: {error}")
        except Interrupted as error:
            raise Interrupted(error.signum, "the same command goes on") from None
        except TinyldError as error:
            raise TinyldError(f"{error}; finished runs are kept, the same command goes on") from None
    if options.csv is not None:
        write_csv(options.csv, found)
    return aggregate(found)


def lines_of(options: CompareOptions) -> list[Line]:
    """What the grid's table will have; UsageError for what cannot be made, before anything runs."""
    base, multiples = RunFolder(options.base or default_base()), RATES[: options.trials]
    shape, tokenizer = read_shape(base.path, options.reading())
    base_print, inputs, lines = fingerprint(base, options.reading()), [options.data], []
    for task_name in options.task or (None,):
        task, data, held_out = task_and_rows(options, task_name, tokenizer, shape.max_length)
        inputs += files_of(task, data, options.data)
        has_tests = "test" in task.splits if data is None else file_in(data, task, "test", held_out)
        split = "test" if has_tests else "dev"
        if not has_tests and options.trials > 1:
            chosen = "learning rates are chosen by the dev rows that are scored, so that figures are a little too good"
            say_to_stderr(options.quiet)(f"{task.name} has no test rows: {chosen}; a folder with test.csv has others")
        tested = TaskRows(load_split(task, split, data, None, held_out), task, tokenizer, shape.max_length).digest()
        rows = len(load_split(task, "train", data, None, held_out))
        for limit in options.limit or (None,):
            check(limit is None or limit <= rows, f"--limit {limit}: {task.name} has {rows:,} training rows")
            learned = repr(rows_to_learn(task, {"folder": data, "held_out": held_out, "limit": limit}))
            rows_print = sha256(learned.encode(errors="surrogatepass"))
            for name, method, sets in variants(options.methods, shape):
                own = {"task": task_name, "limit": limit, "method": method, "force": True}
                try:
                    made = FinetuneOptions.of(options.only(FinetuneOptions) | own, sets)
                    config = config_of(replace(made, quiet=True))  # refuses what cannot be made
                    lr = config["train"].pop("lr")
                    highest = lr * max(multiples)
                    check(highest < 1, f"lr {lr:g} is tried up to {highest:g}, which must be below 1")
                except UsageError as error:
                    raise UsageError(f"--methods {':'.join([method, *sets])}: {error}") from None
                del config["base"]["path"]  # which may hold another base later
                asked = sha256(repr((config, base_print, rows_print)).encode(errors="surrogatepass"))[:8]
                rates = [float(f"{lr * multiple:.3g}") for multiple in multiples]
                run = f"{task.name}_{name}_lr{{:g}}{f'_n{limit}' if limit else ''}_s{{}}_{asked}"
                lines.append(Line(task.name, split, tested, made, rates, run))
    names = [line.name for line in lines]
    twice = next((name for name in names if names.count(name) > 1), None)
    check(twice is None, f"--task, --limit or --methods names one twice: {twice}")
    check_writable(options.csv, inputs)
    return lines


def variants(text: str, shape: ModelConfig) -> Iterator[tuple[str, str, list[str]]]:
    """(name as part of a folder's, method, options as name=value) of `all`, or of methods with commas between them,
    options behind colons, / in the place of their commas: `weight-lora,trajectory-lora:ranks=64/32/8:lr=0.01`. `lr`
    moves the learning rates that are tried, which are otherwise around the method's usual one."""
    for given in list(METHODS) if text == "all" else text.split(","):
        method, *sets = given.split(":")
        known = f"--methods takes {', '.join(METHODS)} or all, with options as in weight-lora:rank=8; got {given!r}"
        check(method in METHODS, known)
        if method == "bitfit" and shape.num_biases() == 0:
            check(text == "all", f"--methods: {method} has nothing to train in this base")
            continue
        sets = [option.replace("/", ",") if "=" in option else f"{option}=true" for option in sets]
        for option in sets:
            key = option.partition("=")[0].replace("-", "_")
            check(key not in SET_HERE, f"--methods: {key} is the same for all methods; give it as --{key}")
        named = ":".join([method, *(option for option in sets if not option.startswith("lr="))])
        yield re.sub(r"[^A-Za-z0-9.=%-]", "-", named), method, sets


def run_line(line: Line, options: CompareOptions, numbers: Iterator[int], lines: int) -> list[Row]:
    """Every rate with seed 0, the other seeds at the best rate, their evaluation: what is missing of it. A row for each
    run that was chosen. `numbers` of runs go on from line to line."""
    say, total = say_to_stderr(options.quiet), lines * (options.trials + options.seeds - 1)
    about = {name: getattr(options, name) for name in ("base", "quiet")}

    def trained(lr: float, seed: int) -> tuple[float, float, RunFolder]:
        """(accuracy on dev, 0 of a task that writes; less its NLL bound; the run, which is made unless finished)."""
        folder, number = RunFolder(options.out / line.name.format(lr, seed)), next(numbers)
        is_made = not ((folder.path / ADAPTER).is_file() and "finetune" in folder.results)
        if is_made:
            say(f"-- run {number} of {total}: {folder.path.name}")
            again = FinetuneOptions(resume=folder.path, **about)
            finetune(again if folder.checkpoints() else replace(line.options, lr=lr, seed=seed, out=folder.path))
        found = folder.results["finetune"]
        right, nats = found.get("dev_accuracy"), found["dev_nll_bound"]
        if is_made:
            say(f"   dev {f'{100 * right:.1f}%, ' if right is not None else ''}NLL bound {nats:.4f}")
        return right or 0.0, -nats, folder

    diverged = list[Diverged]()

    def attempt(lr: float, seeds: range) -> list[tuple[float, float, RunFolder]]:
        """The runs by these seeds; none where training diverges."""
        try:
            return [trained(lr, seed) for seed in seeds]
        except Diverged as error:
            diverged.append(error)
            say(f"   training diverged: lr {lr:g} is left out")
            return []

    tried = {lr: found for lr in line.rates for found in attempt(lr, range(1))}
    chosen = list[RunFolder]()
    while tried and len(chosen) < options.seeds:
        best = max(tried, key=lambda lr: tried[lr][:2])
        chosen = [run for *_, run in (tried.pop(best), *attempt(best, range(1, options.seeds)))]
    if len(chosen) < options.seeds:
        raise diverged[-1]
    rows = []
    for run in chosen:
        found = run.results.get("eval", {}).get(f"{line.task}/{line.split}", {})
        if found.get("sha256") != line.tested:
            how = about | {"device": options.device, "dtype": run.config["train"]["dtype"]}
            evaluate(EvalOptions(runs=(run.path,), split=line.split, **how))
        rows += [row for row in run_rows(run, options.trials) if (row["task"], row["split"]) == (line.task, line.split)]
    return rows

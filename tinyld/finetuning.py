"""Fine-tuning: a base, a task and a method -> an adapter in a run folder; and the going on with an interrupted run.

What a run is, from the options of a new one or as an old one recorded it, is its config.json.
"""

import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from tinyld.checkpoint import Base, check_frozen, load_base, load_base_of, method_record, read_shape, sizes
from tinyld.composition import prompt_prototype
from tinyld.config import BUDGETS, Reading, TrainConfig, check, from_dict, to_dict
from tinyld.coverage import learn_coverage
from tinyld.data import TaskRows, answer_ids, some_of, torch_seeded
from tinyld.datafile import described, task_and_rows
from tinyld.device import autocast, resolve_device, resolve_dtype
from tinyld.diffusion import SMOOTHED, noise_answers, token_nll
from tinyld.distributed import Processes
from tinyld.errors import TinyldError
from tinyld.evaluate import evaluate
from tinyld.interrupt import Interrupted
from tinyld.methods import METHODS, TrajectoryLora, make_config, read_config
from tinyld.methods.contract import AUTO
from tinyld.options import METHOD_OPTIONS, FinetuneOptions, Training, refuse_idle
from tinyld.progress import Progress, Say, say_learned, say_numbers, say_some, say_truncated
from tinyld.rows import Example, learned_rows, learned_too, load_split
from tinyld.runs import ADAPTER, CONFIG, PROTOTYPE, RESULTS, RunFolder, Spectator, environment, is_writer
from tinyld.spelling import learn_spelling
from tinyld.tables import MISREAD, percent, print_record
from tinyld.tasks import LEARNED, Task, from_record, to_record
from tinyld.train import Noise, TrainingRun, kept_depths, why_not_cached, with_states
from tinyld.workspace import RUNS, default_base, keep_freed_memory, refuse_inside, say_to_stderr

DEV_ROWS = 1_000  # dev rows that are scored while training; `tinyld eval` reads all
# Where nothing is said, three epochs; of few rows twenty, between 90 and 220 updates, as three epochs of 100 rows are
# 12 updates, which teach nothing. Writing takes longer to learn: eight epochs, between 1,600 and 4,800 updates. No row
# is read more than EPOCHS times. Labels of MANY rows are learned in one epoch: on SST-2's 67,349 phrases three had
# about three points less by full fine-tuning, and one less by `best`. Texts are read BATCH at once, as each has more to
# teach than a label: after 9,600 of WebNLG `best` had 1.65 nats for 1.71 by 32 at once, `full` 1.19 for 1.25
# (data/results/writing-variants.csv); labels are learned as well by 32.
FEW, WRITING, EPOCHS, MANY, BATCH = (20, 90, 220), (8, 1_600, 4_800), 100, 30_000, 8
HELD_OUT = ("accuracy", "scored_accuracy", "unreadable", "nll_bound")  # of dev rows, while training
SHARES = "accuracy scored_accuracy unreadable exact_match exact_spelling rouge_l names_held".split()
SHARES += ["repeated_4grams", "repeated_sentence"]
VERBS = {"base": "pretrain", "adapter": "finetune"}  # that makes a run of each kind, whose results it names
SCARCE = 64  # rows a label, up to which full fine-tuning learned more (data/results/few-rows.csv)
RARE = 20  # rows, from which on a label that one of them has is said
WRITTEN = 100  # dev rows of a generation task that are written at its end: it takes several passes a text


def finetune(options: FinetuneOptions) -> dict[str, Any]:
    """Trains an adapter in a new run folder, or goes on with one; returns its results, which are also in the folder.
    Nothing is written before everything has been read and checked."""
    keep_freed_memory()
    if options.resume is not None:
        return resume(options)
    config = config_of(options)
    out = options.out or RUNS / f"{config['task']['name']}-{options.method}-s{options.seed}"
    if is_writer():
        RunFolder.check_free(out, options.force)
    refuse_inside(out, [Path(path) for path in (config["base"]["path"], config["data"]["folder"]) if path])
    return train_adapter(config, out, options)


def config_of(options: FinetuneOptions) -> dict[str, Any]:
    """A new run's config.json, but for what only its base and rows can tell: what was left open is filled in, the task
    of a file, the method's learning rate and optimizer."""
    base, method = options.base or default_base(), options.method
    reading = Reading(**options.only(Reading))
    shape, tokenizer = read_shape(base, reading)
    training = options.only(TrainConfig)
    lr, optimizer = METHODS[method].usual(shape, options.optimizer, options.recipe)
    training |= {"lr": lr if options.lr is None else options.lr, "optimizer": optimizer}
    check_frozen(method, options.base_dtype)
    idle = "--optimizer muon has no effect with --method bitfit, which trains no matrix"
    check((method, optimizer) != ("bitfit", "muon"), idle)
    if method != TrajectoryLora.name:
        refuse_idle(options, ["cache_gb"], f"with --method {method}, which keeps no states")
    task, data, held_out = task_and_rows(options, options.task, tokenizer, shape.max_length)
    told = [] if task.path.suffix == ".toml" else [described(task)]
    if told := told + ["one row in ten is held out as dev rows"] * held_out:
        say_to_stderr(options.quiet)("; ".join(told))
    training["batch_size"] = options.batch_size or (BATCH if task.is_generation else TrainConfig.batch_size)
    open_ended = all(training[budget] is None for budget in BUDGETS)
    train = to_dict(TrainConfig(**training | ({"epochs": 1.0} if open_ended else {})))
    given = {name: getattr(options, name) for name in METHOD_OPTIONS}
    check(task.is_generation or not options.pointer, "--set pointer copies into texts: it has no effect on labels")
    if task.is_generation and options.pointer is None:
        given["pointer"] = AUTO
    settings = make_config(method, given, shape)
    kept = {"path": str(base.resolve()), "dtype": options.base_dtype}
    kept |= {} if reading == Reading() else {"reading": to_dict(reading)}
    train |= {"epochs": None} if open_ended else {}  # for `usual_epochs` to tell
    own = {"kind": "adapter", "task": to_record(task), "method": {"name": method, **to_dict(settings)}, "base": kept}
    rows = {"folder": data and os.path.abspath(data), "held_out": held_out, "limit": options.limit}
    return own | {"train": train, "cache_gb": options.cache_gb, "data": rows}


def usual_epochs(task: Task, rows: int, batch_size: int) -> float:
    """Passes over so many training rows where nothing is said."""
    updates, (epochs, least, most) = math.ceil(rows / batch_size), WRITING if task.is_generation else FEW
    wanted = max(least, min(most, epochs * updates))
    usual = 1 if rows >= MANY and not task.is_generation else 3
    return float(min(EPOCHS, max(usual, math.ceil(wanted / updates))))


def rows_to_learn(task: Task, data: dict[str, Any]) -> tuple[list[Example], list[Example]]:
    """What a run learns and the dev rows that it is measured on; data: of its config."""
    dev = load_split(task, "dev", data["folder"] and Path(data["folder"]), None, data["held_out"])
    return learned_rows(task, data), [dev[i] for i in some_of(len(dev), WRITTEN if task.is_generation else DEV_ROWS)]


@contextmanager
def run_folder(
    out: Path, config: dict[str, Any], facts: dict[str, Any], options: Training, processes: Processes,
    begun: RunFolder | None, files: Mapping[str, bytes] = {},
) -> Iterator[tuple[RunFolder, dict[str, Any]]]:  # fmt: skip
    """(the folder of a new run or of one that was `begun`, locked; its results, which are written once the block has
    filled them in). Its config is written, with `facts` that its base or text told, and before, where it is new, the
    `files`."""
    folder = (begun or RunFolder.create(out, options.force)) if processes.rank == 0 else Spectator(out)
    processes.meet()  # nobody reads before it is there
    with folder.locked():
        if begun:
            folder.check_unchanged(config, facts["data"], say_to_stderr(options.quiet))
        else:
            for name, content in files.items():
                folder.write(name, content)
            config["environment"] = environment(config["train"]["device"])
        config |= facts
        folder.write_json(CONFIG, config)  # of one that was begun it may have a new rate
        results: dict[str, Any] = {}
        try:
            yield folder, results
        except Interrupted as error:
            if "--resume" in str(error):  # and says more
                raise
            raise Interrupted(error.signum, f"go on with --resume {quote(str(out))}") from None
        folder.close_log()
        folder.write_json(RESULTS, {VERBS[config["kind"]]: results} | folder.results)  # it may be evaluated already
        folder.remove_checkpoints()


def say_what_is_odd(say: Say, train: TaskRows, dev: TaskRows, base: Base) -> None:
    """What of a run's rows is not read or learned as it stands, or looks like a mistake."""
    task, examples = train.task, train.examples
    for name, rows in (("training", train), ("dev", dev)):
        say_truncated(say, rows.truncated, len(rows), base.model.config.max_length, f"{name} rows")
        unread = f"{name} rows are mostly words that the base has no token for"
        say_some(say, base.tokenizer.unread(ids.tolist() for ids in rows.ids), len(rows), unread)
        long = f"are longer than answer_tokens, {rows.slot} (the longest has {rows.longest}), and not learned whole"
        long += "" if task.is_users else ": a task file may allow more"
        odd = "hold characters that the base has no token for, and are read without them"
        for n, why in ((rows.cut_answers, long), (rows.unwritable, odd)):
            if n > 0:
                say(f"the answers of {n:,} of {len(rows):,} {name} rows {why}")
    say_learned(say, learned_too(task, examples, dev.examples), len(dev), "dev rows")
    labels_of = Counter(asked for asked, _ in {(e.asked, e.label) for e in examples})
    if doubtful := {e.asked: e.before or e.after for e in examples if labels_of[e.asked] > 1}:
        one = next(iter(doubtful.values()))[:60]
        say(f"{len(doubtful):,} training texts have more than one label, such as {one!r}")
    say_numbers(say, task, [*examples, *dev.examples])
    counted, in_dev = (Counter(e.label for e in rows.examples) for rows in (train, dev))
    labels = [(label, counted[i], in_dev[i]) for i, label in enumerate(task.labels)]
    if unseen := [label for label, n, _ in labels if n == 0]:
        say(f"no training row has label {' or '.join(unseen)}")
    if unmeasured := [label for label, n, of_dev in labels if n > 0 and of_dev == 0]:
        say(f"no dev row has label {' or '.join(unmeasured)}: whether that is learned is not measured")
    rare = [label for label, n, _ in labels if n == 1]
    if rare and len(train) >= RARE:
        say(f"one training row alone has label {' or '.join(rare)}; is that misspelt?")


@torch.inference_mode(False)  # whatever the caller is in
@torch.enable_grad()
def train_adapter(
    config: dict[str, Any], out: Path, options: Training, begun: RunFolder | None = None
) -> dict[str, Any]:
    """Trains as the config says, in a new run or one that was `begun`; its results, which are also in results.json."""
    where, data, train = str(out / CONFIG), config["data"], config["train"]
    quiet, say = options.quiet or not is_writer(), say_to_stderr(options.quiet)
    task = from_record(config["task"], where)
    examples, dev = rows_to_learn(task, data)
    if not begun and all(train[budget] is None for budget in BUDGETS):
        train["epochs"] = usual_epochs(task, len(examples), train["batch_size"])
    training = from_dict(TrainConfig, train, where)
    device = resolve_device(training.device)
    low = partial(autocast, device, resolve_dtype(training.dtype, device))
    processes, kept = Processes.join(device), config["base"]
    if begun:
        base = load_base_of(config, out, getattr(options, "base", None), device)
    else:
        base = load_base(Path(kept["path"]), device, kept["dtype"], Reading(**kept.get("reading", {})))
    model, tokenizer = base.model, base.tokenizer
    if task.is_generation:
        coverage = None if task.is_infill else learn_coverage(examples)
        spelling = learn_spelling(examples, task.is_infill, tokenizer.rewritten) if tokenizer.lowers else None
        task = replace(task, deletes=tokenizer.delete_id is not None, spelling=spelling, coverage=coverage)
    train_rows, dev_rows = (TaskRows(e, task, tokenizer, model.config.max_length) for e in (examples, dev))
    started_as = config.get("started_as", config["method"])
    kind, settings = read_config(started_as, where)
    method = kind(settings, model, torch_seeded(training.seed, 0))
    counts, began = sizes(method, base), method_record(method)
    data |= {"rows": len(train_rows), "truncated": train_rows.truncated}
    digests = {"sha256": train_rows.digest(), "dev_sha256": dev_rows.digest()}
    facts = {"data": data | digests, "base": kept | {"fingerprint": base.fingerprint}, "parameters": counts}
    one_token = task.labels and train_rows.slot == 1  # others are learned token by token
    words = torch.tensor(answer_ids(task, tokenizer), device=device)[:, 0] if one_token else None
    learned = to_dict(task if words is None else replace(task, smoothed=SMOOTHED))
    facts["task"] = config["task"] | {name: learned[name] for name in LEARNED if learned[name]}
    with run_folder(out, config, facts, options, processes, begun) as (folder, results):
        say(
            f"{method.name} on {task.name}: {len(train_rows):,} {'answers' if task.is_generation else 'rows'}; "
            f"trainable {counts['trainable_parameters']:,}, stored {counts['stored_parameters']:,} "
            f"({counts['stored_percent']:.2f}% of the base, {counts['stored_bytes']:,} bytes), "
            f"base {counts['base_parameters']:,} ({base.bytes / 2**20:.1f} MiB as {base.dtype})"
        )
        say_what_is_odd(say, train_rows, dev_rows, base)
        if method.name == TrajectoryLora.name and len(train_rows) <= SCARCE * len(task.labels):
            say("few rows: --method full is one to three points more accurate, and stores all of the base")
        started = time.perf_counter()
        delete = tokenizer.delete_id if task.deletes else None
        noise: Noise = partial(noise_answers, mask_id=tokenizer.mask_id, delete=delete)
        reason = why_not_cached(model, train_rows, config["cache_gb"])
        steps, epochs = training.steps, training.epochs
        in_updates = steps is not None and steps * training.batch_size <= len(train_rows)
        again = not in_updates and (epochs is None or epochs > 1)  # rows are read more than once
        if again and reason is None:
            with low(), Progress("cache", len(train_rows), quiet=quiet, unit="rows") as bar:
                noise = with_states(noise, model, train_rows, bar.advance_to)
        elif again and kept_depths(model) is not None:
            say(f"frozen states are not cached: {reason}")
        cache_seconds = time.perf_counter() - started

        def held_out() -> dict[str, float]:
            found = evaluate(model, dev_rows, tokenizer, answer=not task.is_generation).record()
            return {f"dev_{k}": found[k] for k in HELD_OUT if k in found}

        run = TrainingRun(
            model, method.own, train_rows, noise, training, folder, held_out, f"{method.name} {task.name}",
            method.penalty, method.after_update, partial(token_nll, words=words), processes=processes, quiet=quiet,
        ).train(begun is not None)  # fmt: skip
        metrics = run.metrics
        method.finish()
        now = method_record(method)
        with low():
            if now != began:  # what was measured last is not what is stored
                trained = {"trainable_parameters": counts["trainable_parameters"]}
                counts, metrics = sizes(method, base) | trained, held_out()
                config |= {"method": now, "started_as": started_as, "parameters": counts}
                say(f"stored {counts['stored_parameters']:,} parameters ({counts['stored_percent']:.2f}% of the base)")
            if task.is_generation:
                written = evaluate(model, dev_rows, tokenizer, draws=1)
                metrics = metrics | {f"dev_{k}": v for k, v in written.scores.items()} | {"dev_written": written.n}
        if (misread := metrics.get("dev_unreadable", 0)) > MISREAD:
            likely = f"predict's, the likeliest labels, are right for {percent(metrics['dev_scored_accuracy'])}%"
            say(f"{percent(misread)}% of dev answers are no label's word, and wrong; {likely}; train longer")
        folder.write_tensors(ADAPTER, method.own)
        if method.name == TrajectoryLora.name:
            folder.write_tensors(PROTOTYPE, prompt_prototype(base, train_rows))
        if now != began:
            folder.write_json(CONFIG, config)
        results |= {"task": task.name, "method": method.name, "rows": len(train_rows), "steps": run.step}
        results |= {"seconds": round(run.seconds + cache_seconds, 2), "cache_seconds": round(cache_seconds, 2)}
        results |= {"peak_memory_mb": run.peak_memory_mb, **counts, "dev_rows": len(dev_rows), **metrics}
    return {"run": str(out), **results}


def show(result: dict[str, Any], options: FinetuneOptions) -> None:
    """Prints what training found, shares in percent as `eval` does."""
    shares = {f"dev_{name}": f"dev_{name}_%" for name in SHARES}
    print_record("finetune", {shares.get(k, k): percent(v) if k in shares else v for k, v in result.items()})


def resume(options: Training) -> dict[str, Any]:
    """Goes on with an interrupted pretraining or fine-tuning run; all its settings are in its config."""
    from tinyld import pretrain  # which resumes by this module, as either verb takes a run of either kind

    assert options.resume is not None
    others = {field.name for field in fields(options)} - {"resume", "lr", "base", "json", "quiet"}
    refuse_idle(options, others, "with --resume, which goes on as it began: leave it out")
    folder = RunFolder.open(options.resume)
    with folder.locked() if is_writer() else nullcontext():  # before it is asked whether the run is finished
        out, config = folder.path, folder.config
        made = f"{out} was made by tinyld compose or merge: nothing is left to train; of a base, pretrain --init {out}"
        check(config["kind"] in VERBS and "merged" not in config, made)
        verb = VERBS[config["kind"]]
        moved = getattr(options, "base", None)
        check(moved is None or verb == "finetune", f"--base has no effect on {out}, which is a base itself")
        results = folder.results
        if verb not in results:
            rows = config["data"].get("folder")
            gone = rows is not None and not os.path.lexists(rows)
            check(not gone, f"{rows} is gone: put it back there to go on with {out}, or begin a new run", TinyldError)
            if (lr := options.lr) is not None:  # it may have diverged at its own
                config["train"] |= to_dict(from_dict(TrainConfig, config["train"] | {"lr": lr}, str(out / CONFIG)))
            return (pretrain.train_base if verb == "pretrain" else train_adapter)(config, out, options, folder)
        say_to_stderr(options.quiet)(f"{out} is finished already; to train longer or on more rows, begin a new run")
        if is_writer():  # it may have been killed while it tidied up
            folder.remove_checkpoints()
        return {"run": str(out), **results[verb]}

"""Fine-tuning: a base, a task and a method -> an adapter in a run folder; and the going on with an interrupted run."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyld.cache import StateCache, why_not_cached
from tinyld.checkpoint import (
    Adapted,
    attach,
    check_base,
    check_frozen,
    load_base,
    method_record,
    read_model_config,
    sizes,
)
from tinyld.config import BUDGETS, DiffusionConfig, TrainConfig, from_dict, to_dict
from tinyld.data import TaskRows, torch_seeded
from tinyld.datafile import data_file, make_task, read_split
from tinyld.device import autocast, resolve_device, resolve_dtype
from tinyld.distributed import Processes
from tinyld.environment import check_unchanged, environment, is_writer
from tinyld.errors import TinyldError, UsageError
from tinyld.evaluate import evaluate
from tinyld.methods import METHODS, TrajectoryLora, make_config
from tinyld.methods.bands import BAND_EDGES
from tinyld.options import METHOD_OPTIONS, FinetuneOptions, Training
from tinyld.progress import Progress
from tinyld.router import prompt_prototype
from tinyld.runs import ADAPTER, CONFIG, INITIAL, PROTOTYPE, RESULTS, TOKENIZER, RunFolder
from tinyld.tasks import Task, from_record, load_task, to_record
from tinyld.tokenizer import Tokenizer
from tinyld.train import Noising, Objective, TrainingRun
from tinyld.workspace import RUNS, default_base, keep_freed_memory, refuse_inside, say_to_stderr, say_truncated

DEV_ROWS = 1_000  # dev rows scored while training; the final evaluation reads all


@dataclass(frozen=True)
class Job:
    """A fine-tuning run with nothing left open: what a new one was asked, or what an old one recorded."""

    task: Task
    method: str
    settings: dict[str, Any]  # of the method: what was given, or all of them of a run that goes on
    base: Path
    base_dtype: str
    data: Path | None
    held_out: bool  # dev rows are a part of the file `data`
    limit: int | None
    cache_gb: float
    diffusion: DiffusionConfig
    training: TrainConfig


def finetune(options: FinetuneOptions) -> dict[str, Any]:
    """Trains an adapter in a new run folder, or goes on with one; returns its results, which are also in the folder.

    Nothing is written before everything has been read and checked.
    """
    keep_freed_memory()
    if options.resume is not None:
        return resume(options)
    job = job_of(options)
    out = options.out or RUNS / f"{job.task.name.replace(':', '-')}-{job.method}-s{job.training.seed}"
    if is_writer():
        RunFolder.check_free(out, options.force)
    refuse_inside(out, [job.base, *([job.data] if job.data else [])])
    summary = _run(job, out, lambda: RunFolder.create(out, options.force), options)
    return {"run": str(out), **summary}


def job_of(options: FinetuneOptions) -> Job:
    """What was left open is filled in: the task of a file, the method's learning rate and optimizer, 3 epochs."""
    base, method = options.base or default_base(), options.method
    folder = RunFolder.open(base)
    settings = {name: getattr(options, name) for name in METHOD_OPTIONS}
    training = options.only(TrainConfig)
    lr, optimizer = METHODS[method].usual(read_model_config(folder), options.optimizer, options.recipe)
    training |= {"lr": lr if options.lr is None else options.lr, "optimizer": optimizer}
    if all(training[budget] is None for budget in BUDGETS):
        training["epochs"] = 3.0
    config = TrainConfig(**training)
    check_frozen(method, options.base_dtype)
    data, held_out = options.data, options.data is not None and options.data.is_file()
    if options.task is not None or data is None:
        task = load_task(options.task or "reviews")
        unused = [name for name in ("text_column", "label_column") if getattr(options, name) is not None]
        if unused:
            raise UsageError(f"{unused[0]} is for --data without --task; a task has columns of its own")
    else:
        data, held_out, file = data_file(data)
        task = make_task(options, file, Tokenizer.load(base / TOKENIZER))
    diffusion = DiffusionConfig(loss=options.loss)
    return Job(task, method, settings, base, options.base_dtype, data, held_out, options.limit, options.cache_gb,
               diffusion, config)  # fmt: skip


def _run(
    job: Job, out: Path, open_folder: Callable[[], RunFolder], options: Training, resumed: dict[str, Any] | None = None
) -> dict[str, Any]:
    """`resumed` is the config.json of the run that goes on, None for a new one."""
    device = resolve_device(job.training.device)
    resolve_dtype(job.training.dtype, device)
    processes = Processes.join(device)
    examples = [
        read_split(job.task, "train", job.data, job.limit, job.held_out),
        read_split(job.task, "dev", job.data, None, job.held_out),
    ]
    base = load_base(job.base, device, job.base_dtype)
    shape = base.model.config
    if resumed is None:
        config = make_config(job.method, job.settings, shape)
    else:
        check_base(resumed, base, out)
        config = from_dict(METHODS[job.method].Config, job.settings, str(out / CONFIG))
    train_rows, dev_rows = (TaskRows(rows, job.task, base.tokenizer, shape.max_length) for rows in examples)
    adapted = attach(base, job.method, config, job.task.name, torch_seeded(job.training.seed, 0))
    folder = processes.open_run(out, open_folder)
    with folder.locked():
        return run_training(folder, job, adapted, train_rows, dev_rows, options, processes, resumed is not None)


def run_training(
    folder: RunFolder,
    job: Job,
    adapted: Adapted,
    train_rows: TaskRows,
    dev_rows: TaskRows,
    options: Training,
    processes: Processes,
    resume: bool,
) -> dict[str, Any]:
    """Trains the attached method and returns the run's results, which are also in its results.json."""
    base, method = adapted.base, adapted.method
    model, tokenizer = base.model, base.tokenizer
    quiet, say = options.quiet or not is_writer(), say_to_stderr(options.quiet)
    device = model.embedding.weight.device
    counts = sizes(method, base)
    if resume:
        check_unchanged(folder.path, folder.config, train_rows.digest(), options.allow_changed)
    else:
        folder.write_json(CONFIG, _record(job, adapted, train_rows, counts))
    say(
        f"{method.name} on {train_rows.task.name}: {len(train_rows):,} rows; "
        f"trainable {counts['trainable_parameters']:,}, stored {counts['stored_parameters']:,} "
        f"({counts['stored_percent']:.2f}% of the base, {counts['stored_bytes']:,} bytes), "
        f"base {counts['base_parameters']:,} ({base.bytes / 2**20:.1f} MiB as {base.dtype})"
    )
    say_truncated(say, train_rows.truncated, len(train_rows), model.config.max_length)
    dtype = resolve_dtype(job.training.dtype, device)
    started = time.perf_counter()
    objective = _objective(job, adapted, train_rows, dtype, quiet, say)
    cache_seconds = time.perf_counter() - started

    def held_out() -> dict[str, float]:
        answer = not dev_rows.task.is_generation  # a text that was written has no accuracy, and takes a pass a token
        found = evaluate(model, dev_rows, tokenizer, limit=DEV_ROWS, answer=answer).record()
        return {f"dev_{k}": found[k] for k in ("accuracy", "unreadable", "masked_acc", "nll_bound") if k in found}

    result = TrainingRun(
        model, method.own, train_rows, objective, job.training, folder, held_out,
        f"{method.name} {train_rows.task.name}", method.penalty, method.after_update, processes=processes, quiet=quiet,
    ).train(resume, options.from_step)  # fmt: skip
    started_as, metrics = method_record(method), result.metrics
    method.finish()
    changed = method_record(method) != started_as
    if changed:  # what was measured last is not what is stored
        counts = sizes(method, base)
        with autocast(device, dtype):
            metrics = held_out()
        say(f"stored {counts['stored_parameters']:,} parameters ({counts['stored_percent']:.2f}% of the base)")
    folder.write_tensors(ADAPTER, method.own)
    if method.name == TrajectoryLora.name:
        folder.write_tensors(PROTOTYPE, prompt_prototype(base, train_rows))
    if changed and is_writer():
        now = {"method": method_record(method), "started_as": started_as, "parameters": counts}
        folder.write_json(CONFIG, folder.config | now)
    summary = {
        "task": train_rows.task.name,
        "method": method.name,
        "rows": len(train_rows),
        "steps": result.step,
        "seconds": round(result.seconds + cache_seconds, 2),
        "cache_seconds": round(cache_seconds, 2),
        "peak_memory_mb": result.peak_memory_mb,
        **counts,
        **metrics,
    }
    folder.close_log()
    folder.write_json(RESULTS, {"finetune": summary})
    folder.remove_checkpoints()
    return summary


def _record(job: Job, adapted: Adapted, rows: TaskRows, counts: dict[str, Any]) -> dict[str, Any]:
    """The run's config.json."""
    base = adapted.base
    return {
        "kind": "adapter",
        "task": to_record(job.task),
        "method": method_record(adapted.method),
        "base": {"path": str(base.path.resolve()), "fingerprint": base.fingerprint, "dtype": base.dtype},
        "band_edges": list(BAND_EDGES),
        "diffusion": to_dict(job.diffusion),
        "train": to_dict(job.training),
        "cache_gb": job.cache_gb,
        "data": {
            "folder": job.data and str(job.data.resolve()),
            "held_out": job.held_out,
            "limit": job.limit,
            "rows": len(rows),
            "truncated": rows.truncated,
            "sha256": rows.digest(),
        },
        "parameters": counts,
        "environment": environment(),
    }


def _objective(
    job: Job, adapted: Adapted, rows: TaskRows, dtype: Any, quiet: bool, say: Callable[[str], None]
) -> Noising:
    """What a step is trained on: rows noised anew, or, where they fit, the frozen states of rows noised once."""
    model, config = adapted.base.model, job.training
    device, mask_id = model.embedding.weight.device, adapted.base.tokenizer.mask_id
    reason = why_not_cached(model, rows, job.cache_gb)
    objective: Noising = Objective(job.diffusion, mask_id, counted=True, seed=config.seed)
    if reason is not None:
        if model.push is not None and model.push.first_depth > 0:
            say(f"frozen states are not cached: {reason}")
        return objective
    with Progress("cache", len(rows), quiet=quiet) as bar:
        return StateCache(model, rows, objective, lambda: autocast(device, dtype), bar.advance_to)


def resume(options: Training) -> dict[str, Any]:
    """Goes on with an interrupted pretraining or fine-tuning run; all its settings are in its config."""
    assert options.resume is not None
    keep_freed_memory()
    folder = RunFolder.open(options.resume)
    with folder.locked() if is_writer() else nullcontext():  # before it is asked whether the run is finished
        return {"run": str(folder.path), **_go_on(folder, options)}


def _go_on(folder: RunFolder, options: Training) -> dict[str, Any]:
    from tinyld.pretrain import go_on  # which resumes by this module, as either verb takes a run of either kind

    out, config = folder.path, folder.config
    if config["kind"] == "composition":
        raise UsageError(f"{out} is a composition; there is nothing in it to train")
    if "merged" in config:
        raise UsageError(f"{out} was made by tinyld merge and has nothing left to train; pretrain --init {out} goes on")
    verb = "pretrain" if config["kind"] == "base" else "finetune"
    results = folder.read_json(RESULTS) if (out / RESULTS).exists() else {}
    if verb in results:
        if options.from_step is not None:
            raise TinyldError(f"{out} is finished already; step {options.from_step} has no checkpoint to go on from")
        say_to_stderr(options.quiet)(f"{out} is finished already")
        if is_writer():  # it may have been killed while it tidied up
            folder.remove(INITIAL)
            folder.remove_checkpoints()
        return results[verb]
    where = str(out / CONFIG)
    diffusion = from_dict(DiffusionConfig, config["diffusion"], where)
    training = from_dict(TrainConfig, config["train"], where)
    if config["kind"] == "base":
        return go_on(folder, diffusion, training, options)
    settings = dict(config.get("started_as", config["method"]))
    method, data = settings.pop("name"), config["data"]
    job = Job(
        from_record(config["task"], where), method, settings, Path(config["base"]["path"]), config["base"]["dtype"],
        data["folder"] and Path(data["folder"]), data["held_out"], data["limit"], config["cache_gb"], diffusion,
        training,
    )  # fmt: skip
    return _run(job, out, lambda: folder, options, config)

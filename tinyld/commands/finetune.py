"""`tinyld finetune`, and the going on with an interrupted run of any kind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyld.commands.workspace import (
    RUNS,
    default_base,
    finish,
    keep_freed_memory,
    refuse_inside,
    say_to_stderr,
)
from tinyld.config import BUDGETS, DiffusionConfig, TrainConfig, check, from_dict
from tinyld.distributed import Processes, is_writer
from tinyld.errors import TinyldError, UsageError
from tinyld.runs import CONFIG, INITIAL, RESULTS, RunFolder
from tinyld.tasks import load_split, load_task


@dataclass(frozen=True)
class FinetuneJob:
    """What a fine-tuning run is asked to do; `resume` rebuilds it from the run's config.json."""

    task: str
    method: str
    options: dict[str, Any]  # of the method
    base: Path
    data: Path | None
    limit: int | None
    diffusion: DiffusionConfig
    training: TrainConfig
    cache_gb: float
    base_dtype: str


def finetune_job(
    task: str,
    method: str,
    options: dict[str, Any],
    base: Path | None,
    data: Path | None,
    limit: int | None,
    diffusion: DiffusionConfig,
    training: dict[str, Any],
    cache_gb: float = 4.0,
    base_dtype: str = "fp32",
) -> FinetuneJob:
    """The job with what was left open filled in: the method's learning rate and optimizer, 3 epochs, the base."""
    from tinyld.checkpoint import check_frozen, read_model_config
    from tinyld.methods import METHODS

    if method not in METHODS:
        raise UsageError(f"--method must be one of {', '.join(METHODS)}, got {method!r}")
    where = base or default_base()
    shape = read_model_config(RunFolder.open(where))
    lr, optimizer = METHODS[method].usual(shape, training.get("optimizer"), options.get("recipe"))
    usual = {"lr": lr, "optimizer": optimizer}
    training = training | {name: value for name, value in usual.items() if training.get(name) is None}
    if all(training.get(budget) is None for budget in BUDGETS):
        training = {**training, "epochs": 3.0}
    check(cache_gb >= 0, f"cache_gb must be at least 0, got {cache_gb}")
    if task.endswith(".toml"):
        task = str(Path(task).resolve())
    config = TrainConfig(**training)
    check_frozen(method, base_dtype)
    return FinetuneJob(task, method, options, where, data, limit, diffusion, config, cache_gb, base_dtype)


def finetune(job: FinetuneJob, out: Path | None, force: bool, json: bool, quiet: bool) -> Path:
    """Runs a job in a new folder, which it returns; nothing is written before everything has been read and checked."""
    keep_freed_memory()
    name = load_task(job.task).name.replace(":", "-")
    out = out or RUNS / f"{name}-{job.method}-s{job.training.seed}"
    if is_writer():
        RunFolder.check_free(out, force)
    refuse_inside(out, [job.base])
    summary = _run_finetune(job, out, lambda: RunFolder.create(out, force), None, quiet)
    finish("adapter", {"run": str(out), **summary}, json)
    return out


def _run_finetune(
    job: FinetuneJob,
    out: Path,
    open_folder: Callable[[], RunFolder],
    resumed: dict[str, Any] | None,
    quiet: bool,
    from_step: int | None = None,
    allow_changed: bool = False,
) -> dict[str, Any]:
    """`resumed` is the config.json of the run that goes on, None for a new one."""
    from tinyld.checkpoint import attach, check_base, load_base
    from tinyld.data import TaskRows, torch_seeded
    from tinyld.device import resolve_device, resolve_dtype
    from tinyld.finetune import finetune as run
    from tinyld.methods import METHODS, make_config

    device = resolve_device(job.training.device)
    resolve_dtype(job.training.dtype, device)
    processes = Processes.join(device)
    quiet = quiet or not is_writer()
    task = load_task(job.task)
    examples = {
        "train": load_split(task, "train", job.data, limit=job.limit),
        "dev": load_split(task, "dev", job.data),
    }
    base = load_base(job.base, device, job.base_dtype)
    shape = base.model.config
    if resumed is None:
        config = make_config(job.method, job.options, shape)
    else:
        check_base(resumed, base, out)
        config = from_dict(METHODS[job.method].Config, job.options, str(out / CONFIG))
    train_rows, dev_rows = (TaskRows(rows, task, base.tokenizer, shape.max_length) for rows in examples.values())
    adapted = attach(base, job.method, config, job.task, torch_seeded(job.training.seed, 0))
    folder = processes.open_run(out, open_folder)
    with folder.locked():
        return run(
            folder, adapted, train_rows, dev_rows, job.diffusion, job.training, job.cache_gb, job.data, job.limit,
            resumed is not None, from_step, allow_changed, processes, quiet, say_to_stderr(quiet),
        )  # fmt: skip


def resume(out: Path, from_step: int | None, allow_changed: bool, json: bool, quiet: bool) -> None:
    """Goes on with an interrupted pretraining or fine-tuning run; all its settings are in its config."""
    keep_freed_memory()
    folder = RunFolder.open(out)
    with folder.locked() if is_writer() else nullcontext():  # before it is asked whether the run is finished
        title, summary = _go_on(folder, from_step, allow_changed, quiet or not is_writer())
    finish(title, {"run": str(out), **summary}, json)


def _go_on(folder: RunFolder, from_step: int | None, allow_changed: bool, quiet: bool) -> tuple[str, dict[str, Any]]:
    """(what it is, its summary) of the run in `folder`, once it is finished."""
    from tinyld.device import resolve_device
    from tinyld.pretrain import pretrain as run
    from tinyld.pretrain import save_dtype_of

    out, config = folder.path, folder.config
    if config["kind"] == "composition":
        raise UsageError(f"{out} is a composition; there is nothing in it to train")
    if "merged" in config:
        raise UsageError(f"{out} was made by tinyld merge and has nothing left to train; pretrain --init {out} goes on")
    title, verb = ("pretrained base", "pretrain") if config["kind"] == "base" else ("adapter", "finetune")
    results = folder.read_json(RESULTS) if (out / RESULTS).exists() else {}
    if verb in results:
        if from_step is not None:
            raise TinyldError(f"{out} is finished already; --from-step {from_step} has no checkpoint to go on from")
        say_to_stderr(quiet)(f"{out} is finished already")
        if is_writer():  # it may have been killed while it tidied up
            folder.remove(INITIAL)
            folder.remove_checkpoints()
            folder.remove_leftovers()
        return title, results[verb]
    where = str(out / CONFIG)
    diffusion, training = (
        from_dict(DiffusionConfig, config["diffusion"], where),
        from_dict(TrainConfig, config["train"], where),
    )
    if config["kind"] == "base":
        shape = {k: v for k, v in config["model"].items() if k != "vocab_size"}
        processes = Processes.join(resolve_device(training.device))
        return title, run(
            lambda: processes.open_run(out, lambda: folder), [Path(p) for p in config["data"]["files"]],
            [Path(p) for p in config["valid"]], shape, config["model"]["vocab_size"], diffusion, training,
            save_dtype_of(config), keep_init=config.get("keep_init", 0.0),
            resume=True, from_step=from_step, allow_changed=allow_changed, processes=processes,
            quiet=quiet, say=say_to_stderr(quiet),
        )  # fmt: skip
    options = dict(config.get("started_as", config["method"]))
    name = options.pop("name")
    data = config["data"]
    job = FinetuneJob(
        config["task"], name, options, Path(config["base"]["path"]), data["folder"] and Path(data["folder"]),
        data["limit"], diffusion, training, config["cache_gb"], config["base"].get("dtype", "fp32"),
    )  # fmt: skip
    return title, _run_finetune(job, out, lambda: folder, config, quiet, from_step, allow_changed)

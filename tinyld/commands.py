"""One function per verb: resolve, load, call the library, write the run folder, print the result.

torch comes in through the functions, so that `tinyld --help`, `info` and `tasks` need none.
"""

from __future__ import annotations

import ctypes
import json as jsonlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyld.config import DiffusionConfig, ModelConfig, SampleConfig, TrainConfig, check, from_dict
from tinyld.errors import TinyldError, UsageError
from tinyld.report import print_record, print_table
from tinyld.runs import ADAPTER, CONFIG, MANIFEST, MODEL, RESULTS, RunFolder, environment
from tinyld.tasks import Task, bundled_data_dir, load_split, load_task

if TYPE_CHECKING:
    from tinyld.base import Base
    from tinyld.compose import Composition
    from tinyld.data import TaskRows
    from tinyld.evaluate import Evaluation

RUNS = Path("runs")


def keep_freed_memory() -> None:
    """Tells glibc to reuse freed blocks instead of returning them: activations are then not page-faulted in anew
    every step, which is worth about 10% of a step on two cores (measured). Elsewhere it does nothing."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        except (OSError, AttributeError):
            pass


def default_base() -> Path:
    """The released base."""
    return bundled_data_dir() / "base"


def say_to_stderr(quiet: bool) -> Callable[[str], None]:
    return (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))


def newest_run(kinds: Sequence[str]) -> Path:
    """The run in `runs/` that was finished last."""
    found = [p.parent for p in RUNS.glob(f"*/{ADAPTER}")] + [p.parent for p in RUNS.glob(f"*/{MODEL}")]
    found = [p for p in found if RunFolder(p).config["kind"] in kinds]
    if not found:
        raise TinyldError(f"no finished run in {RUNS}/: name one, or make one with: tinyld finetune --task reviews")
    return max(found, key=lambda p: (p / CONFIG).stat().st_mtime_ns)


# ------------------------------------------------------------------------------------------------ pretrain


def pretrain(
    out: Path,
    data: list[Path],
    valid: list[Path],
    shape: dict[str, int],
    vocab_size: int,
    diffusion: DiffusionConfig,
    config: TrainConfig,
    save_dtype: str,
    init: str | None,
    trim_vocab: int | None,
    convert_only: bool,
    force: bool,
    json: bool,
    quiet: bool,
) -> None:
    from tinyld.hf import find_encoder
    from tinyld.pretrain import SAVE_DTYPES, load_start
    from tinyld.pretrain import pretrain as run
    from tinyld.tokenizer import find_text_files
    from tinyld.train import resolve_device, resolve_dtype

    keep_freed_memory()
    data = data or [bundled_data_dir() / "corpus.txt.gz"]
    find_text_files([*data, *valid])
    ModelConfig(vocab_size=vocab_size, **shape)
    resolve_dtype(config.dtype, resolve_device(config.device))
    RunFolder.check_free(out, force)
    encoder = None
    if init is not None:
        encoder = load_start(find_encoder(init), shape["max_length"])
        refuse_inside(out, [find_encoder(init)])
    summary = run(
        lambda: RunFolder.create(out, force), data, valid, shape, vocab_size, diffusion, config,
        SAVE_DTYPES[save_dtype], encoder, trim_vocab, convert_only, quiet=quiet, say=say_to_stderr(quiet),
    )  # fmt: skip
    finish("pretrained base", {"run": str(out), **summary}, json)


def resume(out: Path, json: bool, quiet: bool) -> None:
    """Goes on with an interrupted pretraining or fine-tuning run; all its settings are in its config."""
    from tinyld.pretrain import pretrain as run
    from tinyld.pretrain import save_dtype_of

    keep_freed_memory()
    folder = RunFolder.open(out)
    config = folder.config
    if not folder.checkpoints():
        raise TinyldError(f"nothing to resume in {out}: it is finished, or was stopped before its first checkpoint")
    where = str(out / CONFIG)
    diffusion, training = (
        from_dict(DiffusionConfig, config["diffusion"], where),
        from_dict(TrainConfig, config["train"], where),
    )
    if config["kind"] == "base":
        shape = {k: v for k, v in config["model"].items() if k != "vocab_size"}
        summary = run(
            lambda: folder, [Path(p) for p in config["data"]["files"]], [Path(p) for p in config["valid"]], shape,
            config["model"]["vocab_size"], diffusion, training, save_dtype_of(config), resume=True, quiet=quiet,
            say=say_to_stderr(quiet),
        )  # fmt: skip
        return finish("pretrained base", {"run": str(out), **summary}, json)
    options = dict(config["method"])
    name = options.pop("name")
    data = config["data"]
    job = FinetuneJob(
        config["task"], name, options, Path(config["base"]["path"]), data["folder"] and Path(data["folder"]),
        data["limit"], diffusion, training, config["cache_gb"],
    )  # fmt: skip
    summary = _run_finetune(job, lambda: folder, config, quiet)
    return finish("adapter", {"run": str(out), **summary}, json)


def finish(title: str, summary: dict[str, Any], json: bool) -> None:
    if json:
        print(jsonlib.dumps(summary))
    else:
        print_record(title, summary)


# ------------------------------------------------------------------------------------------------ finetune


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
) -> FinetuneJob:
    """The job with what was left open filled in: the method's learning rate, 3 epochs, the released base."""
    from tinyld.methods import METHODS

    if method not in METHODS:
        raise UsageError(f"--method must be one of {', '.join(METHODS)}, got {method!r}")
    if training.get("lr") is None:
        training = {**training, "lr": METHODS[method].default_lr}
    if all(training.get(budget) is None for budget in ("steps", "tokens", "minutes", "epochs")):
        training = {**training, "epochs": 3.0}
    check(cache_gb >= 0, f"cache_gb must be at least 0, got {cache_gb}")
    if task.endswith(".toml"):
        task = str(Path(task).resolve())
    config = TrainConfig(**training)
    return FinetuneJob(task, method, options, base or default_base(), data, limit, diffusion, config, cache_gb)


def finetune(job: FinetuneJob, out: Path | None, force: bool, json: bool, quiet: bool) -> Path:
    """Runs a job in a new folder, which it returns; nothing is written before everything has been read and checked."""
    keep_freed_memory()
    name = load_task(job.task).name.replace(":", "-")
    out = out or RUNS / f"{name}-{job.method}-s{job.training.seed}"
    RunFolder.check_free(out, force)
    refuse_inside(out, [job.base])
    summary = _run_finetune(job, lambda: RunFolder.create(out, force), None, quiet)
    finish("adapter", {"run": str(out), **summary}, json)
    return out


def refuse_inside(out: Path, inputs: Sequence[Path]) -> None:
    """TinyldError when --force would remove a folder that the command reads."""
    for path in inputs:
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            raise TinyldError(f"--out {out} holds {path}, which this command reads; choose another --out")


def _run_finetune(
    job: FinetuneJob, open_folder: Callable[[], RunFolder], resumed: dict[str, Any] | None, quiet: bool
) -> dict[str, Any]:
    """`resumed` is the config.json of the run that goes on, None for a new one."""
    from tinyld.adapter import attach, check_base
    from tinyld.base import load_base
    from tinyld.data import TaskRows, torch_seeded
    from tinyld.finetune import finetune as run
    from tinyld.methods import METHODS, make_config
    from tinyld.train import resolve_device, resolve_dtype

    device = resolve_device(job.training.device)
    resolve_dtype(job.training.dtype, device)
    task = load_task(job.task)
    examples = {
        "train": load_split(task, "train", job.data, limit=job.limit),
        "dev": load_split(task, "dev", job.data),
    }
    base = load_base(job.base, device)
    shape = base.model.config
    if resumed is None:
        config = make_config(job.method, job.options, shape)
    else:
        check_base(resumed, base, open_folder().path)
        config = from_dict(METHODS[job.method].Config, job.options, str(open_folder().path / CONFIG))
    train_rows, dev_rows = (TaskRows(rows, task, base.tokenizer, shape.max_length) for rows in examples.values())
    adapted = attach(base, job.method, config, job.task, torch_seeded(job.training.seed, 0))
    return run(
        open_folder(), adapted, train_rows, dev_rows, job.diffusion, job.training, job.cache_gb, job.data, job.limit,
        resumed is not None, quiet, say_to_stderr(quiet),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ eval


def load_run(path: Path, base_path: Path | None, device: str) -> tuple[Base, list[str]]:
    """The run's denoiser as a Base, and the tasks it was made for (none for a base)."""
    from tinyld.adapter import find_base, load_adapter
    from tinyld.base import load_base
    from tinyld.compose import load_composition
    from tinyld.train import resolve_device

    where = resolve_device(device)
    folder = RunFolder.open(path)
    config = folder.config
    if config["kind"] == "base":
        return load_base(path, where), []
    if config["kind"] == "adapter":
        adapted = load_adapter(folder, default_base(), base_path, where)
        return adapted.base, [adapted.task]
    base = load_base(find_base(config, path, base_path, default_base()), where)
    base.model.push = load_composition(folder, base).to(where)
    return base, [m["task"] for m in config["members"]]


def rows_for(base: Base, task: Task, split: str, data: Path | None) -> TaskRows:
    """A split's rows; `data` may be a folder or one file of rows."""
    from tinyld.data import TaskRows

    file = data if data is not None and not data.is_dir() else None
    examples = load_split(task, split, None if file else data, file)
    return TaskRows(examples, task, base.tokenizer, base.model.config.max_length)


def evaluate_run(
    base: Base, rows: TaskRows, sampling: SampleConfig, draws: int, dtype: str, quiet: bool, limit: int | None = None
) -> Evaluation:
    from tinyld.evaluate import evaluate
    from tinyld.progress import Progress
    from tinyld.train import autocast, resolve_dtype

    device = base.model.embedding.weight.device
    n = len(rows) if limit is None else min(limit, len(rows))
    with Progress(f"eval {rows.task.name}", n, quiet=quiet) as bar, autocast(device, resolve_dtype(dtype, device)):
        return evaluate(base.model, rows, base.tokenizer, sampling, draws, limit=limit, advance=bar.advance_to)


def eval(
    runs: list[Path],
    task: str | None,
    split: str,
    data: Path | None,
    base_path: Path | None,
    sampling: SampleConfig,
    draws: int,
    limit: int | None,
    dtype: str,
    device: str,
    predictions: Path | None,
    json: bool,
    quiet: bool,
) -> None:
    keep_freed_memory()
    runs = runs or [newest_run(("adapter", "composition"))]
    if predictions is not None and (predictions.is_dir() or not predictions.parent.is_dir()):
        raise TinyldError(f"{predictions}: cannot be written (not a file in a folder that exists)")
    records = []
    lines = ["run\ttask\tprompt\tgold\tanswer"]
    source = str(data) if data is not None and not data.is_dir() else split
    for run in runs:
        base, tasks = load_run(run, base_path, device)
        if task is not None:
            tasks = [task]
        if not tasks:
            raise UsageError(f"{run} is a base: say which task to evaluate with --task")
        for name in tasks:
            rows = rows_for(base, load_task(name), split, data)
            found = evaluate_run(base, rows, sampling, draws, dtype, quiet, limit)
            record = {"run": str(run), "split": source, **found.record()}
            records.append(record)
            lines += [f"{run}\t{rows.task.name}\t" + "\t".join(map(one_line, p)) for p in found.predictions]
            if limit is None:  # a part is no result of the run
                remember(run, f"{rows.task.name}/{source}", {**record, "environment": environment()})
    if predictions is not None:
        from tinyld.runs import write_atomic

        write_atomic(predictions, ("\n".join(lines) + "\n").encode())
    if json:
        print(jsonlib.dumps(records))
    else:
        print_evaluations("evaluation", records)


def eval_text(
    runs: list[Path],
    text: list[Path],
    base_path: Path | None,
    draws: int,
    dtype: str,
    device: str,
    json: bool,
    quiet: bool,
) -> None:
    """NLL bound of running text under each run's denoiser (adapters are on), beside what pretraining recorded."""
    from tinyld.data import TextRows, tokenize_documents
    from tinyld.evaluate import text_nll
    from tinyld.progress import Progress
    from tinyld.tokenizer import find_text_files, read_lines
    from tinyld.train import autocast, resolve_dtype

    lines = list(read_lines(find_text_files(text)))
    records = []
    for run in runs or [default_base()]:
        base, _ = load_run(run, base_path, device)
        config, where = base.model.config, base.model.embedding.weight.device
        rows = TextRows(tokenize_documents(lines, base.tokenizer), config.max_length, base.tokenizer.bos_id)
        with Progress("eval text", len(rows), quiet=quiet) as bar, autocast(where, resolve_dtype(dtype, where)):
            bound = text_nll(base.model, rows, base.tokenizer.mask_id, draws, advance=bar.advance_to)
        records.append(
            {"run": str(run), "rows": bound.n, "tokens": bound.n * rows.width, "nll_bound": bound.mean}
            | {"nll_stderr": bound.stderr, "draws": draws}
        )
    if json:
        print(jsonlib.dumps(records))
    else:
        print_table("NLL bound, nats per token", tuple(records[0]), [tuple(r.values()) for r in records])


def one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def remember(run: Path, key: str, record: dict[str, Any]) -> None:
    """Keeps an evaluation in the run's results.json; a read-only run (the released base, say) is left alone."""
    folder = RunFolder(run)
    if not (run / MANIFEST).exists() or run.resolve() == default_base().resolve():
        return
    results = folder.read_json(RESULTS) if (run / RESULTS).exists() else {}
    results.setdefault("eval", {})[key] = record
    folder.write_json(RESULTS, results)


def percent(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 2)


def print_evaluations(title: str, records: Sequence[dict[str, Any]]) -> None:
    """One row an evaluation; rates in percent, NLL in nats per answer token."""
    columns = ("run", "task", "split", "n", "accuracy %", "95% interval", "scored %", "macro-F1 %", "unreadable %")
    columns += ("masked_acc %", "NLL bound", "rows/s")
    rows = []
    for r in records:
        interval = f"{100 * r['low']:.1f} to {100 * r['high']:.1f}" if "low" in r else None
        rates = [percent(r.get(k)) for k in ("scored_accuracy", "macro_f1", "unreadable", "masked_acc")]
        bound = f"{r['nll_bound']:.4f} ± {r['nll_stderr']:.4f}"
        decoded = (percent(r.get("accuracy")), interval)
        rows.append((r["run"], r["task"], r["split"], r["n"], *decoded, *rates, bound, round(r["rows_per_second"])))
    print_table(title, columns, rows)


# ------------------------------------------------------------------------------------------------ compose


def compose(
    runs: list[Path],
    how: str | None,
    weights: list[float] | None,
    out: Path | None,
    base_path: Path | None,
    split: str,
    data: Path | None,
    limit: int | None,
    device: str,
    force: bool,
    json: bool,
    quiet: bool,
) -> None:
    from tinyld.adapter import find_base
    from tinyld.base import load_base
    from tinyld.compose import Composition, member_from, save_composition
    from tinyld.train import resolve_device

    keep_freed_memory()
    check(len(runs) >= 2, f"compose needs at least two adapters, got {len(runs)}")
    if how == "router" and weights is not None:
        raise UsageError("--weights sets a sum; the router finds its own (leave --how router or --weights out)")
    summed = how == "sum" or weights is not None
    weights = weights or [1.0] * len(runs)
    check(len(weights) == len(runs), f"--weights needs {len(runs)} numbers, one an adapter, got {len(weights)}")
    folders = [RunFolder.open(r) for r in runs]
    where = resolve_device(device)
    first = folders[0].config
    if "base" not in first:
        raise TinyldError(f"{runs[0]} is a base; compose takes trajectory-lora adapters")
    base = load_base(find_base(first, runs[0], base_path, default_base()), where)
    members = [member_from(f, base, w) for f, w in zip(folders, weights, strict=True)]
    out = out or RUNS / "compose-{}".format("-".join(Path(m.task).stem.replace(":", "-") for m in members))
    RunFolder.check_free(out, force)
    refuse_inside(out, [base.path, *runs])
    composed = Composition(members, routed=not summed).to(where)
    rows_of = {m.task: rows_for(base, load_task(m.task), split, data) for m in members}
    folder = RunFolder.create(out, force)
    save_composition(folder, base, composed, environment())
    records = []
    routing = {}
    for place, member in enumerate(members):
        rows = rows_of[member.task]
        if composed.routed:
            routing[member.task] = routed_share(base, composed, rows, place)
        for label, push in (("base", None), ("own", member.push.to(where)), ("composed", composed)):
            base.model.push = push
            found = evaluate_run(base, rows, SampleConfig(), 4, "auto", quiet, limit)
            records.append({"run": label, "split": split, **found.record()})
    base.model.push = None
    result = {"how": "router" if composed.routed else "sum", "weights": weights, "routing_accuracy": routing}
    folder.write_json(RESULTS, {"compose": {**result, "evaluations": records}})
    if json:
        print(jsonlib.dumps({"run": str(out), **result, "evaluations": records}))
        return
    shares = ", ".join(f"{task} {100 * share:.1f}%" for task, share in routing.items())
    title = (
        f"rows routed to their own adapter: {shares}" if routing else f"weights {', '.join(f'{w:g}' for w in weights)}"
    )
    print_evaluations(f"{out}: {title}", records)


def routed_share(base: Base, composed: Composition, rows: TaskRows, place: int) -> float:
    """Share of the rows that the router sends to member `place`."""
    import numpy as np
    import torch

    hits = 0
    with torch.no_grad():
        for chunk in np.array_split(np.arange(len(rows)), -(-len(rows) // 100)):
            batch = rows.take(chunk)
            device = base.model.embedding.weight.device
            prompt_mask = (batch.attention_mask & ~batch.answer_mask).to(device)
            hits += int((composed.route(base.model.embed(batch.x0.to(device)), prompt_mask) == place).sum())
    return hits / len(rows)


# ------------------------------------------------------------------------------------------------ sample, info, tasks


def sample(
    run: Path | None,
    prompt: str,
    length: int,
    num: int,
    base_path: Path | None,
    sampling: SampleConfig,
    device: str,
    json: bool,
) -> None:
    """Fills `length` masked tokens at `{answer}`, or after the prompt."""
    import torch

    from tinyld.sampler import decode

    base, _ = load_run(run or default_base(), base_path, device)
    tokenizer, config = base.tokenizer, base.model.config
    before, mark, after = prompt.partition("{answer}")
    head, tail = tokenizer.encode(before), tokenizer.encode(after)
    total = len(head) + length + len(tail) + 2
    check(total <= config.max_length, f"prompt and answer have {total} tokens, the base takes {config.max_length}")
    row = [tokenizer.bos_id, *head, *[tokenizer.mask_id] * length, *tail, *([tokenizer.eos_id] if mark else [])]
    where = base.model.embedding.weight.device
    x = torch.tensor([row] * num, device=where)
    answer = torch.zeros_like(x, dtype=torch.bool)
    answer[:, 1 + len(head) : 1 + len(head) + length] = True
    out, passes = decode(
        base.model, x, answer, torch.ones_like(answer), tokenizer.mask_id, tokenizer.never_written, sampling
    )
    texts = [tokenizer.decode(r[answer[0]].tolist()) for r in out]
    if json:
        print(jsonlib.dumps({"samples": texts, "forward_passes": passes}))
    else:
        for text in texts:
            print(text)


def export(run: Path, out: Path) -> None:
    """Writes a base as a transformers folder."""
    from tinyld.base import load_base
    from tinyld.hf import export_bert

    base = load_base(run)
    export_bert(base.path, base.model.config, dict(base.model.named_parameters()), base.tokenizer, out)
    print(f"wrote {out}: load it with transformers.AutoModelForMaskedLM.from_pretrained({str(out)!r})")


def info(path: Path, json: bool) -> None:
    """What a run is, from its JSON files; every file is checked against the manifest."""
    folder = RunFolder.open(path)
    config = folder.config
    files = folder.files()
    for name in files:
        folder.read(name)
    record: dict[str, Any] = {"run": str(path), "kind": config["kind"]}
    if config["kind"] == "base":
        record |= {"parameters": from_dict(ModelConfig, config["model"], str(path / CONFIG)).num_parameters()}
        record |= {f"model {k}": v for k, v in config["model"].items()}
        record |= {"text tokens": config["data"]["tokens"]}
    elif config["kind"] == "adapter":
        record |= {"task": config["task"], "base": config["base"]["fingerprint"]}
        record |= {
            f"method {k}": v if isinstance(v, str | int | float) else str(v) for k, v in config["method"].items()
        }
        record |= config["parameters"]
    else:
        record |= {f"member {m['task']}": f"{m['run']} x {m['weight']:g}" for m in config["members"]}
    if RESULTS in files:
        results = folder.read_json(RESULTS)
        record |= {
            k: v
            for k, v in results.get(config["kind"] == "base" and "pretrain" or "finetune", {}).items()
            if k not in record
        }
        for key, found in results.get("eval", {}).items():
            if "accuracy" in found:
                text = f"{100 * found['accuracy']:.1f}% ({100 * found['low']:.1f} to {100 * found['high']:.1f})"
            else:
                text = f"NLL bound {found['nll_bound']:.3f}"
            record[f"eval {key}"] = text
    for name, size in files.items():
        record[f"file {name}"] = f"{size:,} bytes, sha256 {folder.digest(name)[:16]}"
    record["command"] = config.get("environment", {}).get("command")
    finish(config["kind"], record, json)


def tasks(json: bool) -> None:
    from tinyld.tasks import BUNDLED_TASKS, builtin_tasks

    records = [
        {
            "task": t.name,
            "labels": ", ".join(t.labels) or "(text)",
            "answers": ", ".join(t.verbalizer.values()) or f"{t.answer_tokens} tokens",
            "template": t.template,
            "rows": " / ".join(f"{n:,}" for n in t.rows.values()) or "-",
            "needs": "nothing" if t.name in (*BUNDLED_TASKS, "write") else "data or network",
        }
        for t in builtin_tasks()
    ]
    if json:
        print(jsonlib.dumps(records))
    else:
        print_table("built-in tasks", tuple(records[0]), [tuple(r.values()) for r in records])


def report(runs: list[Path], save: Path | None, as_markdown: bool, json: bool) -> None:
    """A table of many runs; `save` keeps a small JSON of each, from which the same table can be made again."""
    from tinyld.report import run_record

    paths: list[Path] = []
    for path in runs:
        found = sorted(path.glob("*.json")) if path.is_dir() and not (path / CONFIG).exists() else [path]
        if not found:
            raise TinyldError(f"no run and no saved result in {path}")
        paths += found
    records = [run_record(p) for p in paths]
    keep_records(records, save)
    show_results(records, as_markdown, json)


def keep_records(records: Sequence[dict[str, Any]], folder: Path | None) -> None:
    """Writes each run's record to a JSON file of its own."""
    from tinyld.runs import to_json, write_atomic

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for record in records:
            write_atomic(folder / f"{record['run']}.json", to_json(record))


def show_results(records: Sequence[dict[str, Any]], as_markdown: bool, json: bool) -> None:
    from tinyld.report import RESULT_COLUMNS, markdown, result_rows

    rows = result_rows(records)
    if json:
        print(jsonlib.dumps([dict(zip(RESULT_COLUMNS, row, strict=True)) for row in rows]))
    elif as_markdown:
        print(markdown(RESULT_COLUMNS, rows))
    else:
        print_table("results", RESULT_COLUMNS, rows)


def compare(
    tasks: list[str],
    methods: str,
    seeds: int,
    trials: int,
    flags: list[str],
    data: Path | None,
    base: Path | None,
    budget_minutes: float | None,
    out: Path,
    save: Path | None,
    json: bool,
    quiet: bool,
) -> None:
    """The grid of `tinyld.compare`, and its table."""
    from tinyld.compare import Compare, variants
    from tinyld.methods import METHODS

    for task in tasks:
        for split in ("train", "dev"):
            load_split(load_task(task), split, data, limit=1)
    chosen = variants(methods, {name: method.default_lr for name, method in METHODS.items()})
    grid = Compare(out, tasks, chosen, seeds, trials, flags, data, base, budget_minutes, quiet, say_to_stderr(False))
    records = grid.run()
    keep_records(records, save)
    show_results(records, False, json)
    if len(records) < len(tasks) * len(chosen) * seeds:
        say_to_stderr(False)("the budget of time is used up; the same command goes on where this one stopped")


# ------------------------------------------------------------------------------------------------ demo


def demo(out: Path, limit: int | None, epochs: float, force: bool, quiet: bool) -> None:
    """Two bundled tasks, one adapter each, evaluated and composed: the whole path in one command."""

    if out.exists() and not force:
        raise TinyldError(f"{out} exists: choose another --out, or --force to replace it")
    say = say_to_stderr(quiet)
    runs = []
    records = []
    for name in ("reviews", "topics"):
        say(f"-- tinyld finetune --method trajectory-lora --task {name} --out {out / name}")
        job = finetune_job(
            name, "trajectory-lora", {}, None, None, limit, DiffusionConfig(time_sampling="uniform"), {"epochs": epochs}
        )
        runs.append(finetune(job, out / name, force, False, quiet))
        say(f"-- tinyld eval {out / name} --split test")
        base, _ = load_run(runs[-1], None, "auto")
        rows = rows_for(base, load_task(name), "test", None)
        found = evaluate_run(base, rows, SampleConfig(), 4, "auto", quiet)
        records.append({"run": str(runs[-1]), "split": "test", **found.record()})
        remember(runs[-1], f"{name}/test", records[-1])
    print_evaluations("each adapter on its own task", records)
    say(f"-- tinyld compose {runs[0]} {runs[1]} --split test --out {out / 'composed'}")
    compose(runs, None, None, out / "composed", None, "test", None, None, "auto", force, False, quiet)

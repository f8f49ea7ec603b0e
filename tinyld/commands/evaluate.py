"""`tinyld eval`, of tasks and of running text."""

from __future__ import annotations

import functools
import json as jsonlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyld.commands.workspace import default_base, keep_freed_memory, newest_run
from tinyld.config import SampleConfig
from tinyld.errors import TinyldError, UsageError
from tinyld.runs import RESULTS, RunFolder, environment
from tinyld.tables import print_record, print_table
from tinyld.tasks import Task, load_split, load_task

if TYPE_CHECKING:
    from tinyld.checkpoint import Base
    from tinyld.data import TaskRows
    from tinyld.diffusion import Estimate
    from tinyld.evaluate import Evaluation


def load_run(path: Path, base_path: Path | None, device: str, dtype: str | None = None) -> tuple[Base, list[str]]:
    """The run's denoiser as a Base, and the tasks it was made for (none for a base, or a LoRA in PEFT's layout).

    The base's frozen matrices are kept in `dtype`, or else as when the run was made.
    """
    from tinyld.checkpoint import base_dtype, check_frozen, find_base, load_adapter, load_base
    from tinyld.compose import attach_static, load_composition
    from tinyld.device import resolve_device
    from tinyld.methods import WeightLora
    from tinyld.peft import is_peft, load_peft

    where = resolve_device(device)
    if is_peft(path):
        base = load_base(base_path or default_base(), where, dtype or "fp32")
        attach_static(base, (WeightLora.name, *load_peft(path, base.model.config, base.fingerprint)), path)
        return base, []
    folder = RunFolder.open(path)
    config = folder.config
    if config["kind"] == "base":
        return load_base(path, where, dtype or "fp32"), []
    if config["kind"] == "adapter":
        adapted = load_adapter(folder, base_path, where, dtype)
        return adapted.base, [adapted.task]
    kept_in = base_dtype(config, str(path)) if dtype is None else dtype
    check_frozen((config.get("static") or {}).get("name", ""), kept_in)
    base = load_base(find_base(config, path, base_path), where, kept_in)
    load_composition(folder, base)
    return base, [m["task"] for m in config["members"]]


def rows_for(base: Base, task: Task, split: str, data: Path | None, limit: int | None = None) -> TaskRows:
    """A split's rows, the first `limit` of them; `data` may be a folder or one file of rows."""
    from tinyld.data import TaskRows

    file = data if data is not None and not data.is_dir() else None
    examples = load_split(task, split, None if file else data, file, limit)
    return TaskRows(examples, task, base.tokenizer, base.model.config.max_length)


def evaluate_run(
    base: Base, rows: TaskRows, sampling: SampleConfig, draws: int, dtype: str, quiet: bool, limit: int | None = None
) -> Evaluation:
    from tinyld.device import autocast, resolve_dtype
    from tinyld.evaluate import evaluate
    from tinyld.progress import Progress

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
    base_dtype: str | None,
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
    check_predictions(predictions)
    records, unkept = [], []
    lines = ["run\ttask\tprompt\tgold\tanswer"]
    source = str(data) if data is not None and not data.is_dir() else split
    for run in runs:
        base, tasks = load_run(run, base_path, device, base_dtype)
        if task is not None:
            tasks = [task]
        if not tasks:
            raise UsageError(f"{run} was made for no task: say which to evaluate with --task")
        for name in tasks:
            rows = rows_for(base, load_task(name), split, data)
            found = evaluate_run(base, rows, sampling, draws, dtype, quiet, limit)
            record = {"run": str(run), "split": source, **found.record()}
            records.append(record)
            lines += [f"{run}\t{rows.task.name}\t" + "\t".join(map(one_line, p)) for p in found.predictions]
            key = f"{rows.task.name}/{source}"
            why = why_unusual(run, rows.task, sampling, data, limit, base_dtype)
            if why is None:
                unkept.append(remember(run, key, {**record, "environment": environment()}))
            elif not quiet:
                print(f"{run}: {key} is not kept in {RESULTS}, as it is {why}", file=sys.stderr)
    if predictions is not None:
        from tinyld.runs import write_atomic

        write_atomic(predictions, ("\n".join(lines) + "\n").encode())
    if json:
        print(jsonlib.dumps(records))
    else:
        print_evaluations("evaluation", records)
    raise_first(unkept)


def why_unusual(
    run: Path, task: Task, sampling: SampleConfig, data: Path | None, limit: int | None, base_dtype: str | None
) -> str | None:
    """Why an evaluation is not the run's own result: decoded otherwise, or of other rows than go with its own.

    How a generation task's texts are sampled makes no difference to their nats; a file of rows has a name of its own.
    """
    if limit is not None:
        return f"of {limit:,} rows at most"
    if base_dtype is not None:
        return f"on the base in {base_dtype}"
    folder = RunFolder(run)
    own = folder.config.get("data", {}).get("folder") if folder.is_run() else None
    own = own or os.environ.get("TINYLD_DATA")
    if data is not None and data.is_dir() and (own is None or data.resolve() != Path(own).resolve()):
        return f"of the rows in {data}"
    return None if task.is_generation or sampling == SampleConfig() else "decoded otherwise than by default"


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
    """NLL bound of running text under each run's denoiser, and for adapters, which are on, under their base alone.

    All read the same rows under the same masks, so that the two bounds differ by what the adapter forgot.
    """
    from tinyld.corpus import tokenize
    from tinyld.data import TextRows
    from tinyld.device import autocast, resolve_dtype
    from tinyld.evaluate import text_nll
    from tinyld.progress import Progress
    from tinyld.tokenizer import find_text_files, read_lines

    files = find_text_files(text)

    @functools.cache
    def measure(run: Path, kept_in: str | None) -> tuple[Estimate, int]:
        base, _ = load_run(run, base_path, device, kept_in)
        config, where = base.model.config, base.model.embedding.weight.device
        rows = TextRows(tokenize(read_lines(files), base.tokenizer).stream, config.max_length, base.tokenizer.bos_id)
        with Progress("eval text", len(rows), quiet=quiet) as bar, autocast(where, resolve_dtype(dtype, where)):
            bound = text_nll(base.model, rows, base.tokenizer.mask_id, draws, advance=bar.advance_to)
        return bound, bound.n * rows.width

    records, unkept = [], []
    for run in runs or [default_base()]:
        below = base_below(run, base_path)
        bound, tokens = measure(run.resolve(), None if below else "fp32")
        record = {"run": str(run), "rows": bound.n, "tokens": tokens, "draws": draws}
        record |= {"nll_bound": bound.mean, "nll_stderr": bound.stderr}
        if below is not None:
            alone, _ = measure(*below)
            forgotten = bound.minus(alone)
            record |= {"base_nll_bound": alone.mean, "base_nll_stderr": alone.stderr}
            record |= {"forgotten": forgotten.mean, "forgotten_stderr": forgotten.stderr}
            kept = {**record, "environment": environment()}
            unkept.append(remember(run, ", ".join(path.resolve().name for path in text), kept, "text"))
        records.append(record)
    if json:
        print(jsonlib.dumps(records))
    else:
        columns = tuple(max(records, key=len))
        print_table("NLL bound, nats per token", columns, [tuple(map(r.get, columns)) for r in records])
    raise_first(unkept)


def base_below(run: Path, base_path: Path | None) -> tuple[Path, str] | None:
    """The base that an adapter or a composition stands on, and the type that it is kept in there; None for a base."""
    from tinyld.checkpoint import base_dtype, find_base
    from tinyld.peft import is_peft

    if is_peft(run):
        return (base_path or default_base()).resolve(), "fp32"
    config = RunFolder.open(run).config
    if config["kind"] == "base":
        return None
    return find_base(config, run, base_path).resolve(), base_dtype(config, str(run))


def check_predictions(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise TinyldError(f"{path}: cannot be written (not a file in a folder that exists)")


def one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def remember(run: Path, key: str, record: dict[str, Any], kind: str = "eval") -> TinyldError | None:
    """Keeps an evaluation in the run's results.json, or returns why not; the released base is left alone."""
    folder = RunFolder(run)
    if not folder.is_run() or run.resolve() == default_base().resolve():
        return None
    try:
        with folder.locked():
            results = folder.read_json(RESULTS) if (run / RESULTS).exists() else {}
            results.setdefault(kind, {})[key] = record
            folder.write_json(RESULTS, results)
    except TinyldError as error:
        return error
    return None


def raise_first(errors: Sequence[TinyldError | None]) -> None:
    """What could not be kept ends the command in an error, but only once everything measured has been shown."""
    for error in filter(None, errors):
        raise error


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


def eval_chain(
    run: Path,
    task: str,
    then: str,
    judge: Path,
    split: str,
    data: Path | None,
    base_path: Path | None,
    sampling: SampleConfig,
    limit: int | None,
    dtype: str,
    device: str,
    predictions: Path | None,
    json: bool,
    quiet: bool,
) -> None:
    """Reads each row's label, writes a text of the other label by `then`, and has `judge` say what was written."""
    from tinyld.chain import judge_chain, write_opposites
    from tinyld.device import autocast, resolve_dtype
    from tinyld.progress import Progress
    from tinyld.runs import write_atomic

    keep_freed_memory()
    check_predictions(predictions)
    base, tasks = load_run(run, base_path, device)
    writer = load_task(then)
    if writer.name not in [load_task(name).name for name in tasks]:
        raise UsageError(f"--then {then}: {run} was not made for it, but for {', '.join(tasks) or 'no task'}")
    judging, _ = load_run(judge, base_path, device)
    plain, _ = load_run(base.path, None, device)
    rows = rows_for(base, load_task(task), split, data, limit)
    real_texts = [e.answer for e in load_split(writer, split, data if data is None or data.is_dir() else None)]
    where = base.model.embedding.weight.device
    with Progress("write", len(rows), quiet=quiet) as bar, autocast(where, resolve_dtype(dtype, where)):
        written = write_opposites(base, rows, writer, sampling, bar.advance_to)
        source = str(data) if data is not None and not data.is_dir() else split
        record = {"run": str(run), "task": rows.task.name, "then": writer.name, "judge": str(judge), "split": source}
        record |= judge_chain(written, rows, judging, plain, real_texts[: len(rows)])
    unkept = []
    if limit is None:
        kept = {**record, "nll_bound": record["nll_written"], "environment": environment()}
        unkept.append(remember(run, f"{rows.task.name}+{writer.name}/{source}", kept))
    if predictions is not None:
        labels = rows.task.labels
        lines = ["prompt\tgold\tread\tasked\ttext"]
        for w in written:
            names = [labels[w.gold], labels[w.read] if w.read >= 0 else "", labels[w.asked]]
            lines.append("\t".join(map(one_line, [w.prompt, *names, w.text])))
        write_atomic(predictions, ("\n".join(lines) + "\n").encode())
    if json:
        print(jsonlib.dumps(record))
    else:
        print_record("read, then write the opposite", record)
    raise_first(unkept)

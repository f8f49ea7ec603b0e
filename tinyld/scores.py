"""`tinyld eval`: what a run's answers are worth, of tasks and of running text, kept in its results and shown."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyld.checkpoint import base_record, find_base, load_base
from tinyld.config import Reading, SampleConfig, check, check_ours, types_of
from tinyld.corpus import tokenize
from tinyld.data import TaskRows, TextRows
from tinyld.device import autocast, resolve_device, resolve_dtype
from tinyld.diffusion import Estimate
from tinyld.environment import environment
from tinyld.errors import TinyldError, plain
from tinyld.evaluate import Evaluation, evaluate, text_nll
from tinyld.options import EvalOptions
from tinyld.parse import refuse_idle
from tinyld.predict import Run, load
from tinyld.progress import Progress
from tinyld.rows import file_in, files_of, load_split, to_learn
from tinyld.runs import RESULTS, RunFolder, is_foreign
from tinyld.tables import WIDTH, percent, print_table
from tinyld.tasks import Task
from tinyld.tokenizer import find_text_files, read_lines
from tinyld.workspace import check_writable, default_base, keep_freed_memory, newest_run, say_to_stderr, say_truncated
from tinyld.write import write_atomic

Record = dict[str, Any]
MOST_CONFUSED = 8  # mistakes that are shown where the confusion matrix does not fit
# Column -> what it shows of a record, in percent where its name ends so; and, in a wide table, more of them.
OF_LABELS = (
    {"accuracy %": "accuracy", "95% interval": "interval"},
    {"± NLL": "nll_stderr", "macro-F1 %": "macro_f1", "scored %": "scored_accuracy", "unreadable %": "unreadable"}
    | {"rows/s": "rows_per_second"},
)
OF_TEXTS = (
    {"BLEU": "bleu", "chrF": "chrf", "ROUGE-L %": "rouge_l", "exact %": "exact_match", "names %": "names_held"},
    {"± NLL": "nll_stderr", "length ratio": "length_ratio", "repeated 4-grams %": "repeated_4grams"}
    | {"repeated sentence %": "repeated_sentence", "rows/s": "rows_per_second", "passes a row": "passes_per_row"},
)


def rows_for(run: Run, task: Task, split: str, data: Path | None = None, limit: int | None = None) -> TaskRows:
    """A split's rows, the first `limit` of them: of `data`, a folder or one file, or where the task has its own."""
    held_out, made = False, [r for r in run.config.get("members", [run.config]) if "task" in r]
    own = next((r.get("data", {}) for r in made if r["task"]["name"] == task.name), {})
    if data is None and own.get("folder"):  # it was trained on those
        folder = Path(own["folder"])
        lacks = file_in(folder, task, split, own["held_out"]) is None
        elsewhere = task.builtin or split in task.data
        if not (folder.exists() or elsewhere):
            way_out = f"say by --data where it is, or a folder with {task.name}/{split}.csv"
            raise TinyldError(f"{folder}, whose rows {run.path} was trained on, is gone; {way_out}")
        if not (lacks and elsewhere):
            data, held_out = folder, own["held_out"]
        if held_out and own.get("sha256") not in (None, learned(run, task, folder, own)):
            raise changed(folder, run)
    elif data is not None and data.is_file() and own.get("held_out"):  # maybe the very rows that it was trained on
        held_out = own.get("sha256") == learned(run, task, data, own)
        if not held_out and os.path.realpath(data) == os.path.realpath(own["folder"]):
            raise changed(data, run)
    examples = load_split(task, split, data, limit, held_out)
    return TaskRows(examples, task, run.base.tokenizer, run.base.model.config.max_length)


def changed(file: Path, run: Run) -> TinyldError:
    problem = f"{file} has changed since {run.path} was trained on it: which rows were held out is not known"
    return TinyldError(f"{problem}; train again, or give a file of other rows by --data")


def learned(run: Run, task: Task, file: Path, own: Record) -> str | None:
    """The digest of the rows that training would read of a file of rows, of which some are held out."""
    if len(load_split(task, "train", file, 2)) < 2:  # of which none can be held out
        return None
    examples = to_learn(task, load_split(task, "train", file, own.get("limit"), True))
    return TaskRows(examples, task, run.base.tokenizer, run.base.model.config.max_length).digest()


def measure(
    run: Run, rows: TaskRows, sampling: SampleConfig, draws: int = 4, quiet: bool = True, limit: int | None = None
) -> Evaluation:
    """What `run` makes of rows, with a bar of progress."""
    model, n = run.base.model, len(rows) if limit is None else min(limit, len(rows))
    device = model.device
    with Progress(f"eval {rows.task.name}", n, quiet=quiet) as bar, autocast(device, resolve_dtype(run.dtype, device)):
        return evaluate(model, rows, run.base.tokenizer, sampling, draws, limit=limit, advance=bar.advance_to)


def eval(options: EvalOptions) -> list[Record]:
    """A record a run and task, also kept in the runs' results."""
    keep_freed_memory()
    if options.text:
        return eval_text(options)
    sampling, say = options.sampling(), say_to_stderr(options.quiet)
    data, predictions = options.data, options.predictions
    check_writable(predictions, [data])  # before anything is loaded; what a run reads is known once it is
    records, lines = [], ["run\ttask\tprompt\tgold\tanswer"]
    source = str(data) if data is not None and not data.is_dir() else options.split
    check(source == options.split or options.split == EvalOptions.split, f"--split has no effect on the file {data}")
    for path in options.runs or [newest_run()]:
        how = (options.device, options.dtype, options.base_dtype, options.task, options.reading())
        run = load(path, options.base, *how)
        named = options.task is not None or not run.tasks
        tasks = [run.task_named(options.task)] if named else run.tasks
        one = len(tasks) == 1 or source == options.split
        check(one, f"{path} has tasks {', '.join(t.name for t in tasks)}; say by --task whose rows {source} holds")
        for task in tasks:
            rows = rows_for(run, task, options.split, data)
            if run.config.get("by_name"):
                run.let_answer(task.name)
            own = run.config.get("data", {}).get("folder")
            check_writable(predictions, files_of(task, data, own, os.environ.get("TINYLD_DATA")))
            found = measure(run, rows, sampling, options.draws, options.quiet, options.limit)
            say_truncated(say, found.truncated, found.n, run.base.model.config.max_length)
            record = {"run": str(path), "split": source, **found.record(), "sha256": rows.digest()}
            records.append(record)
            lines += [f"{path}\t{task.name}\t" + "\t".join(map(plain, p)) for p in found.predictions]
            key = f"{task.name}/{source}"
            why = why_unusual(run, sampling, options)
            if why is None:
                record |= remember(path, key, {**record, "environment": environment()})
            else:
                say(f"{path}: {key} is not kept in {RESULTS}, as it is {why}")
    if predictions is not None:
        write_atomic(predictions, ("\n".join(lines) + "\n").encode(errors="surrogatepass"))
    return records


def why_unusual(run: Run, sampling: SampleConfig, options: EvalOptions) -> str | None:
    """Why an evaluation is not the run's own result: decoded otherwise, or of other rows than go with its own (a file
    of rows has a name of its own)."""
    if options.limit is not None:
        return f"of {options.limit:,} rows at most"
    if options.base_dtype is not None:
        return f"on the base in {options.base_dtype}"
    if run.is_composition and options.task is not None:
        return f"of {options.task}'s adapter alone"
    data, own = options.data, run.config.get("data", {}).get("folder") or os.environ.get("TINYLD_DATA")
    if data is not None and data.is_dir() and (own is None or os.path.realpath(data) != os.path.realpath(own)):
        return f"of the rows in {data}"
    return None if sampling == SampleConfig() else "decoded otherwise than by default"


def eval_text(options: EvalOptions) -> list[Record]:
    """NLL bound of running text under each run's denoiser, and for adapters, which are on, under their base alone.

    All read the same rows under the same masks, so that the two bounds differ by what the adapter forgot.
    """
    unread = ("task", "split", "data", "limit", "predictions", "base_dtype", "wide", *types_of(SampleConfig))
    refuse_idle(options, unread, "on the running text of --text")
    device, files = resolve_device(options.device), find_text_files(options.text)

    @functools.cache
    def bound_of(path: Path, alone_in: str | None = None, reading: Reading | None = None) -> tuple[Estimate, int]:
        """(bound, tokens) of a run, or of a base alone whose matrices are kept in `alone_in`."""
        alone = alone_in is not None
        base = load_base(path, device, alone_in, reading) if alone else load(path, options.base, options.device).base
        stream = tokenize(read_lines(files), base.tokenizer).stream
        rows = TextRows(stream, base.model.config.max_length, base.tokenizer.bos_id)
        arithmetic = autocast(device, resolve_dtype(options.dtype, device))
        with Progress("eval text", len(rows), quiet=options.quiet) as bar, arithmetic:
            bound = text_nll(base.model, rows, base.tokenizer.mask_id, options.draws, advance=bar.advance_to)
        return bound, bound.n * rows.width

    records = []
    for path in options.runs or [default_base()]:
        config = {"kind": "base"} if is_foreign(path) else RunFolder.open(path).config
        is_base = config["kind"] == "base"
        check(not is_base or options.base is None, f"{path} is a base itself: --base has no effect on it")
        check_ours(Reading() if is_base else options.reading())
        is_one = config["kind"] != "composition"
        check(is_one, f"{path} is a composition: --text is for one adapter, as its members are")
        bound, tokens = bound_of(path.resolve(), "fp32" if is_base else None, options.reading())
        record = {"run": str(path), "rows": bound.n, "tokens": tokens, "draws": options.draws}
        record |= {"nll_bound": bound.mean, "nll_stderr": bound.stderr}
        if not is_base:
            below, then = find_base(config, path, options.base), base_record(config, path)
            alone, _ = bound_of(below.resolve(), then.dtype, then.reading)
            forgotten = bound.minus(alone)
            record |= {"base_nll_bound": alone.mean, "base_nll_stderr": alone.stderr}
            record |= {"forgotten": forgotten.mean, "forgotten_stderr": forgotten.stderr}
            key = ", ".join(text.resolve().name for text in options.text)
            record |= remember(path, key, {**record, "environment": environment()}, "text")
        records.append(record)
    return records


def remember(run: Path, key: str, record: Record, kind: str = "eval") -> dict[str, str]:
    """Keeps an evaluation in the run's results.json, or says why not as `problem`; the released base is left alone."""
    folder = RunFolder(run)
    if not folder.is_run() or run.resolve() == default_base().resolve():
        return {}
    try:
        with folder.locked():
            results = folder.read_json(RESULTS) if (run / RESULTS).exists() else {}
            results.setdefault(kind, {})[key] = record
            folder.write_json(RESULTS, results)
    except TinyldError as error:
        return {"problem": str(error)}
    return {}


def show(records: list[Record], options: EvalOptions) -> None:
    if options.text:
        columns = max(map(tuple, records), key=len)
        return print_table("NLL bound, nats per token", columns, [tuple(map(r.get, columns)) for r in records])
    show_evaluations("evaluation", records, options.wide)
    for record in records:
        show_classes(record)


def show_evaluations(title: str, records: Sequence[Record], wide: bool = False) -> None:
    """One row an evaluation, those of written texts in a table of their own; NLL in nats per answer token."""
    for name, (columns, more) in {"accuracy": OF_LABELS, "rouge_l": OF_TEXTS}.items():
        rows = [
            r
            | {"rows of": f"{r['task']} {r['split']}", "nll": f"{r['nll_bound']:.4f}"}
            | {"interval": f"{100 * r['low']:.1f} to {100 * r['high']:.1f}" if "low" in r else None}
            for r in records
            if name in r
        ]
        shown = {"run": "run", "rows of": "rows of", "n": "n", **columns, "NLL bound": "nll", **(more if wide else {})}
        cells = [[percent(r.get(k)) if c.endswith("%") else r.get(k) for c, k in shown.items()] for r in rows]
        if rows:
            print_table(title, list(shown), cells, wide)
    for note in dict.fromkeys(r["note"] for r in records if "note" in r):
        print(note)


def show_classes(record: Record) -> None:
    """Precision, recall and F1 of each label, and what its rows were answered, or the most frequent mistakes."""
    if "classes" not in record:
        return
    columns = ("label", "rows", "precision %", "recall %", "F1 %")
    rows = [(k, c["n"], *(percent(c[p]) for p in ("precision", "recall", "f1"))) for k, c in record["classes"].items()]
    always = f"always the most frequent label: {percent(record['majority'])}% right"
    print()
    print_table(f"{record['task']} {record['split']}, label by label ({always})", columns, rows)
    said = [*record["classes"], *(["unreadable"] if record["unreadable"] else [])]
    if max(map(len, said)) + sum(len(s) + 3 for s in said) <= WIDTH:
        print()
        counts = [(label, *(row[s] for s in said)) for label, row in record["confusion"].items()]
        print_table("rows of each label, by what was answered", ("", *said), counts)
    else:
        answered = [(label, s, n) for label, row in record["confusion"].items() for s, n in row.items()]
        wrong = [(label, s, n) for label, s, n in answered if n and s != label]
        print()
        print_table(
            "most frequent mistakes", ("label", "answered", "rows"), sorted(wrong, key=lambda w: -w[2])[:MOST_CONFUSED]
        )

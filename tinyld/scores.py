"""`tinyld eval`: what a run's answers are worth, of tasks and of running text, kept in its results and shown."""

import contextlib
import csv
import io
import os
from pathlib import Path
from typing import Any

from tinyld.checkpoint import Base, load_base
from tinyld.config import SampleConfig, check, types_of
from tinyld.corpus import tokenize
from tinyld.data import TaskRows, TextRows, slot_width
from tinyld.device import autocast
from tinyld.diffusion import Estimate
from tinyld.errors import TinyldError
from tinyld.evaluate import Evaluation, evaluate, text_nll
from tinyld.options import EvalOptions, flag, refuse_idle
from tinyld.predict import Run, load
from tinyld.progress import Progress, say_learned, say_numbers, say_truncated
from tinyld.read import clean
from tinyld.rows import Example, file_in, files_of, learned_rows, learned_too, load_split, to_learn
from tinyld.runs import RESULTS, RunFolder, environment
from tinyld.tables import WIDTH, percent, print_table
from tinyld.tasks import Task, learned_files, trained
from tinyld.tokenizer import find_text_files, read_lines
from tinyld.workspace import check_writable, default_base, keep_freed_memory, newest_run, say_to_stderr
from tinyld.write import write_atomic

Record = dict[str, Any]
MOST_CONFUSED = 8  # mistakes that are shown
# Column -> what it shows of a record, in percent where its name ends so; and, in a wide table, more of them.
SHOWN = {"run": "run", "rows of": "rows of", "n": "n", "accuracy %": "accuracy", "95% interval": "interval"}
SHOWN |= {"BLEU": "bleu", "chrF": "chrf", "ROUGE-L %": "rouge_l", "exact %": "exact_match", "names %": "names_held"}
SHOWN |= {"NLL bound": "nll"}
WIDE = {"± NLL": "nll_stderr", "macro-F1 %": "macro_f1", "scored %": "scored_accuracy", "unreadable %": "unreadable"}
WIDE |= {"length ratio": "length_ratio", "repeated 4-grams %": "repeated_4grams"}
WIDE |= {
    "spelled exactly %": "exact_spelling",
    "repeated sentence %": "repeated_sentence",
    "rows/s": "rows_per_second",
    "passes a row": "passes_per_row",
}


def data_of(run: Run, task: Task) -> dict[str, Any]:
    """What the run's config says of the data that it was trained on for the task; nothing where it was not."""
    return next((made.get("data", {}) for made in trained(run.config) if made["task"]["name"] == task.name), {})


def rows_for(
    run: Run, task: Task, split: str, data: Path | None = None, limit: int | None = None, say: Any = None
) -> TaskRows:
    """A split's rows, the first `limit` of them: of `data`, a folder or one file, or where the task has its own."""
    own = data_of(run, task)
    trained_on, is_told = own.get("folder") and Path(own["folder"]), data is not None
    if data is None and trained_on:
        elsewhere = task.builtin or split in task.data
        gone = f"{trained_on}, whose rows {run.path} was trained on, is gone; say by --data where it is"
        check(trained_on.exists() or elsewhere, f"{gone}, or a folder with {task.name}/{split}.csv", TinyldError)
        if file_in(trained_on, task, split, own["held_out"]) or not elsewhere:
            data = trained_on
    elif data is not None and trained_on and own.get("held_out") and data.is_dir():
        is_there = os.path.realpath(data) == os.path.realpath(trained_on.parent)
        cut = is_there and (split == "train" or file_in(data, task, split) is None)  # dev rows were held out of train
        data = trained_on if cut else data
    held_out = False
    if data is not None and data.is_file() and own.get("held_out"):  # are these the rows, of which some were held out?
        learned, is_there = list[Example](), os.path.realpath(data) == os.path.realpath(trained_on)
        with contextlib.suppress(TinyldError):  # of one row nothing is held out
            learned = load_split(task, "train", data, own["limit"], True)
        held_out = run.rows(to_learn(task, learned), task).digest() == own["sha256"]
        changed = f"{data} has changed since {run.path} was trained on it: which rows were held out is not known"
        check(held_out or not is_there, f"{changed}; train again, or give a file of other rows by --data", TinyldError)
        if say and not held_out:
            say(f"{data} is not the file that {run.path} learned: every row counts, learned ones too")
        elif say and is_told:
            say(f"{data}: {len(learned):,} of its rows were learned by {run.path}, and are left out")
    return run.rows(load_split(task, split, data, limit, held_out), task)


def measure(run: Run, rows: TaskRows, sampling: SampleConfig, draws: int = 4, quiet: bool = True) -> Evaluation:
    """What `run` makes of rows, with a bar of progress."""
    model = run.model
    arithmetic = autocast(model.device, run.dtype)
    with Progress(f"eval {rows.task.name}", len(rows), quiet=quiet, unit="rows") as bar, arithmetic:
        return evaluate(model, rows, run.base.tokenizer, sampling, draws, advance=bar.advance_to)


def eval(options: EvalOptions) -> list[Record]:
    """A record a run and task, also kept in the runs' results."""
    keep_freed_memory()
    if options.text:
        return eval_text(options)
    sampling, say = options.sampling(), say_to_stderr(options.quiet)
    data, predictions = options.data, options.predictions
    check_writable(predictions, [data])  # before anything is loaded; what a run reads is known once it is
    records, table = [], io.StringIO()
    lines = csv.writer(table, "excel-tab", lineterminator="\n")  # which quotes texts that have quotes
    lines.writerow(("run", "task", "prompt", "gold", "answer"))
    source = str(data) if data is not None and not data.is_dir() else options.split
    check(source == options.split or options.split == EvalOptions.split, f"--split has no effect on the file {data}")
    for path in options.runs or [newest_run()]:
        how = (options.device, options.dtype, options.base_dtype, options.task, options.reading())
        run = load(path, options.base, *how)
        tasks = [run.task_named(options.task)] if options.task is not None or not run.tasks else run.tasks
        one = len(tasks) == 1 or source == options.split
        check(one, f"{path} has tasks {', '.join(t.name for t in tasks)}; say by --task whose rows {source} holds")
        if len(options.runs) < 2:  # of several, another one may heed it
            width = max(slot_width(t, run.base.tokenizer) for t in tasks)
            options.check_width(width, tasks)
        for task in tasks:
            read = files_of(task, data, os.environ.get("TINYLD_DATA"))
            check_writable(predictions, [*learned_files(run.config), *read])
            rows = rows_for(run, task, options.split, data, options.limit, say)
            say_numbers(say, task, rows.examples)
            if run.config.get("by_name"):
                run.let_answer(task)
            if options.split != "train":
                with contextlib.suppress(TinyldError, KeyError):  # its training rows are gone, or it has none
                    learned = learned_too(task, learned_rows(task, data_of(run, task)), rows.examples)
                    say_learned(say, learned, len(rows), f"{source} rows")
            found = measure(run, rows, sampling, options.draws, options.quiet)
            say_truncated(say, found.truncated, found.n, run.base.model.config.max_length)
            record = {"run": str(path), "split": source, **found.record(), "sha256": rows.digest()}
            records.append(record)
            lines.writerows((path, task.name, *map(clean, p)) for p in found.predictions)
            key = f"{task.name}/{source}"
            if why := why_unusual(run, options):
                say(f"{path}: {key} is not kept in {RESULTS}, as it is by {why}")
            else:
                remember(path, "eval", key, record, options.device)
    if predictions is not None:
        write_atomic(predictions, table.getvalue().encode(errors="surrogatepass"))
    return records


def why_unusual(run: Run, options: EvalOptions) -> str:
    """The options by which an evaluation is not the run's own result: it is decoded otherwise, or of other rows than go
    with its own (a file of rows has a name of its own)."""
    default, own = EvalOptions(), run.config.get("data", {}).get("folder") or os.environ.get("TINYLD_DATA")
    names = ["limit", "draws", "base_dtype", *types_of(SampleConfig), *["task"] * run.is_composition]
    found = [name for name in names if getattr(options, name) != getattr(default, name)]
    data = options.data
    if data is not None and data.is_dir() and (own is None or os.path.realpath(data) != os.path.realpath(own)):
        found.append("data")
    return ", ".join(f"{flag(name)} {getattr(options, name)}" for name in found)


def eval_text(options: EvalOptions) -> list[Record]:
    """NLL bound of running text under each run's denoiser, and for adapters, which are on, under their base alone. All
    read the same rows under the same masks, so that the two bounds differ by what the adapter forgot."""
    unread = ("task", "split", "data", "limit", "predictions", "base_dtype", "wide", *types_of(SampleConfig))
    refuse_idle(options, unread, "on the running text of --text")
    files = find_text_files(options.text)

    def bound_of(base: Base) -> Estimate:
        device, stream = base.model.device, tokenize(read_lines(files), base.tokenizer).stream
        rows = TextRows(stream, base.model.config.max_length, base.tokenizer.bos_id)
        arithmetic = autocast(device, options.dtype)
        with Progress("eval text", len(rows), quiet=options.quiet, unit="rows") as bar, arithmetic:
            return text_nll(base.model, rows, base.tokenizer.mask_id, options.draws, advance=bar.advance_to)

    records, of_bases = [], dict[tuple[Any, ...], Estimate]()
    for path in options.runs or [default_base()]:
        run = load(path, options.base, options.device, options.dtype, reading=options.reading())
        check(not run.is_composition, f"{path} is a composition: --text is for one adapter, as its members are")
        bound = bound_of(run.base)
        tokens = bound.n * (run.base.model.config.max_length - 1)
        record = {"run": str(path), "rows": bound.n, "tokens": tokens, "draws": options.draws}
        record |= {"nll_bound": bound.mean, "nll_stderr": bound.stderr}
        if run.config["kind"] != "base":
            own = run.base
            key = (own.fingerprint, own.dtype, own.reading)
            if key not in of_bases:  # once for all its adapters
                of_bases[key] = bound_of(load_base(own.path, own.model.device, own.dtype, own.reading))
            base, forgotten = of_bases[key], bound.minus(of_bases[key])
            record |= {"base_nll_bound": base.mean, "base_nll_stderr": base.stderr}
            record |= {"forgotten": forgotten.mean, "forgotten_stderr": forgotten.stderr}
            remember(path, "text", ", ".join(text.resolve().name for text in options.text), record, options.device)
        records.append(record)
    return records


def remember(run: Path, kind: str, key: str, record: Record, device: str) -> None:
    """Keeps an evaluation in the run's results.json, or says in it why not; the released bases are left alone."""
    folder = RunFolder(run)
    if not folder.is_run() or run.resolve().parent == default_base().parent.resolve():
        return
    try:
        with folder.locked():
            results = folder.results
            results.setdefault(kind, {})[key] = record | {"environment": environment(device)}
            folder.write_json(RESULTS, results)
    except TinyldError as error:
        record["problem"] = f"{run} was measured, and keeps nothing of it: {error}"


def show(records: list[Record], options: EvalOptions) -> None:
    """A row an evaluation, written texts in a table of their own, NLL in nats per answer token; then the labels."""
    if options.text:
        columns = max(map(tuple, records), key=len)
        return print_table("NLL bound, nats per token", columns, [tuple(map(r.get, columns)) for r in records])
    misread = any(r.get("unreadable") for r in records)  # where `predict` gives other labels
    names = SHOWN | (WIDE if options.wide else {k: WIDE[k] for k in ("scored %", "unreadable %") if misread})
    told = [r | {"rows of": f"{r['task']} {r['split']}", "nll": f"{r['nll_bound']:.4f}"} for r in records]
    for row in told:
        row["interval"] = f"{percent(row['low'])} to {percent(row['high'])}" if "low" in row else None
    for score in ("accuracy", "rouge_l"):
        if rows := [row for row in told if score in row]:
            shown = {c: k for c, k in names.items() if any(r.get(k) is not None for r in rows)}
            cells = [[percent(r.get(k)) if c.endswith("%") else r.get(k) for c, k in shown.items()] for r in rows]
            print_table("evaluation", list(shown), cells, options.wide)
    for note in dict.fromkeys(r["note"] for r in records if "note" in r):
        print(note)
    if misread:
        print("accuracy is of the words that are written, scored % of the likeliest labels, which predict gives")
    for record in records:
        if "classes" in record:
            show_classes(record, f"{record['run']}: " * (len(records) > 1))


def show_classes(record: Record, whose: str) -> None:
    """Precision, recall and F1 of each label, and what its rows were answered, or the most frequent mistakes."""
    columns = ("label", "rows", "precision %", "recall %", "F1 %")
    rows = [(k, c["n"], *(percent(c[p]) for p in ("precision", "recall", "f1"))) for k, c in record["classes"].items()]
    always = f"always the most frequent label: {percent(record['majority'])}% right"
    print()
    print_table(f"{whose}{record['task']} {record['split']}, label by label ({always})", columns, rows)
    print()
    *said, unreadable = next(iter(record["confusion"].values()))
    said += [unreadable] if record["unreadable"] else []
    if max(map(len, said)) + sum(len(s) + 3 for s in said) <= WIDTH:
        counts = [(label, *(row[s] for s in said)) for label, row in record["confusion"].items()]
        print_table(f"{whose}rows of each label, by what was answered", ("", *said), counts)
    else:
        answered = [(label, s, n) for label, row in record["confusion"].items() for s, n in row.items()]
        wrong = sorted(((*pair, n) for *pair, n in answered if n and pair[0] != pair[1]), key=lambda w: -w[2])
        if wrong:
            print_table(f"{whose}most frequent mistakes", ("label", "answered", "rows"), wrong[:MOST_CONFUSED])

"""`tinyld predict`: lines as soon as they are there, or files; out go JSON Lines, CSV, or a table."""

import csv
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyld.answers import OURS, Record, examples_of, own_name, under
from tinyld.config import check
from tinyld.data import seed_of, slot_width
from tinyld.datafile import refuse_table
from tinyld.errors import TinyldError, plain, show
from tinyld.options import PredictOptions
from tinyld.predict import load
from tinyld.progress import Progress, further, say, say_some, say_truncated
from tinyld.read import LONGEST, SUFFIXES, Row, lines_of, read_rows
from tinyld.rows import files_of
from tinyld.tasks import Task, learned_files
from tinyld.workspace import check_writable, keep_freed_memory, say_to_stderr
from tinyld.write import write_atomic

CHUNK, WRITTEN = 1024, 256  # rows of a file that are read, sorted by length, and answered together; of written ones
READ = 1 << 17  # bytes of text read at once: some thousand lines
HIDDEN = r"[\x7f-\x9f\u202a-\u202e\u2066-\u2069]"  # control characters that JSON leaves as they are
Rows = list[Row]


def input_rows(options: PredictOptions, source: str, tasks: Sequence[Task]) -> Rows | Iterator[Rows]:
    """The rows to answer, by the columns of the first task: all of them, or those of stdin in parts as they come. A
    text alone is enough where the task reads one. A file is read whole, so that a bad row is known at once."""
    column, columns, suffix = options.column, tasks[0].inputs, Path(source).suffix.lower()
    lines = source == "-" or suffix == ".txt"
    check(not options.text or source == "-", "give a file or --text, not both")
    check(column is None or not lines, "--column is for a file with columns; a line is one text")
    if len(columns) > 1:
        check(column is None, f"--column is for tasks of one text, not {', '.join(columns)}")
        check(not lines, f"the task reads {' and '.join(columns)}: give a .csv, .tsv or .jsonl that has both")
    if options.text:
        return [(f"--text, number {i}", {columns[0]: text}) for i, text in enumerate(options.text, 1)]
    if source == "-":
        return piped_lines(tasks)
    known = lines or suffix in SUFFIXES
    check(known, f"{source}: the name must end in .txt, {', '.join(SUFFIXES)}; for a text itself --text")
    rows = list(read_rows(Path(source), empty=True))
    if lines:
        refuse_table([(where, row["text"]) for where, row in rows], columns[0])
        column = "text"
    elif len(columns) == 1 and column is None and columns[0] not in rows[0][1]:  # another task's text, if any
        column = next((name for own in tasks if (name := own.inputs[0]) in rows[0][1]), None)
        lacks = f"{rows[0][0]}: no column {show(columns[0])}, found {show(', '.join(map(str, rows[0][1])))}"
        check(column is not None, f"{lacks}; say by --column which it is", TinyldError)
    if column is not None:  # it is called as the first task's, and no other one as any task's
        taken = {name for own in tasks for name in own.inputs}
        for where, row in rows:
            check(column in row, f"{where}: no column {column!r}, found {', '.join(row)}")
        rows = [(where, under({column: columns[0]}, row, taken)) for where, row in rows]
    examples_of(rows, tasks[0])  # refuses what cannot be asked
    return rows


def piped_lines(tasks: Sequence[Task]) -> Iterator[Rows]:
    """The lines of stdin, those written so far, with no waiting for more; no table that has the first task's column.
    Of a line that one of the tasks cannot read, TinyldError once those before it were answered; where lines are typed
    it is told, and they go on."""
    check(sys.stdin is not None, "stdin is closed: give a file, or --text")
    column, typed = tasks[0].inputs[0], sys.stdin.isatty()
    if typed:
        print("a text a line; Ctrl-D ends", file=sys.stderr)
    first, rest, part = 1, b"", b"-"
    while part:
        part = sys.stdin.buffer.read1(READ)
        whole, end, rest = (rest + part).rpartition(b"\n")
        if not part or len(rest) > LONGEST:  # the last line may have no end
            end, rest = end + rest, b""
        rows, problem, lines = Rows(), None, whole + end
        try:
            for where, line in lines_of(io.BytesIO(lines), "stdin", first):
                if first == 1 and not rows:
                    refuse_table([(where, line)], column)
                for own in tasks:
                    examples_of([(where, dict.fromkeys(own.inputs, line))], own)
                rows.append((where, {column: line}))
        except TinyldError as error:
            problem = error
        first += len(lines.splitlines())
        if rows:
            yield rows
        if problem and not typed:
            raise problem
        if problem:
            say(f"tinyld: {problem}")


def predict(options: PredictOptions) -> None:
    """Answers every text of the input, in its order; prints as soon as a chunk is done, or writes `out` whole."""
    keep_freed_memory()
    sampling, say, out = options.sampling(), say_to_stderr(options.quiet), options.out
    paths, source = options.runs_and_input()
    several, ending = len(paths) > 1, out.suffix.lower() if out else ""
    as_csv = options.csv or ending == ".csv"
    check(not (as_csv and options.json), "give --csv or --json, not both; a name that ends in .csv is for --csv")
    check(as_csv or ending in ("", ".jsonl"), f"--out {out}: the name must end in .csv or .jsonl, or give --csv")
    check(not options.csv or ending != ".jsonl", f"--csv: --out {out} is no name of a CSV")
    check(not several or options.task is None, "--task is for one run; several answer for their own tasks")
    how = (options.device, options.dtype, options.base_dtype, options.task, options.reading())
    run: Any = load(paths if several else paths[0], options.base, *how)
    runs = list(run.runs.values()) if several else [run]
    task = run.task if several else run.task_named(options.task)
    routed = run.tasks if not several and run.is_routed else []
    tasks, bases = [r.tasks[0] for r in runs] if several else [task, *routed], [r.base for r in runs]
    for own in tasks:
        own.columns_in(task)  # refuses what no row suits
    if several and len(groups := run.groups()) > 1:
        shares = "; ".join(", ".join(names) for names in groups)
        why = "runs share one if they are of --recipe fast, on one base, with one prompt and answers of one token"
        say(f"{len(groups)} passes a text: {shares} ({why})")
    options.check_width(max(map(slot_width, tasks, [b.tokenizer for b in bases])), tasks)
    learned = [file for r in runs for file in learned_files(r.config)] if out else []
    check_writable(out, [*options.runs, *learned, *(file for t in tasks for file in files_of(t))])
    labels = [label for t in routed for label in t.labels if options.task is None]
    as_table = not (as_csv or options.json or out) and sys.stdout.isatty()
    ascii_only = out is None and "utf" not in (sys.stdout.encoding or "").lower()
    header, whole, truncated, total, empty, unread, partly = list[str](), list[str](), 0, 0, 0, 0, 0
    given, known = input_rows(options, source, tasks), 0
    if isinstance(given, list):
        known, size = len(given), WRITTEN if task.is_generation else CHUNK
        every = dict.fromkeys((name for _, row in given for name in row) if as_csv else (), "")  # a header of them all
        parts = ([(where, every | row) for where, row in given[i : i + size]] for i in range(0, known, size))
    bar = Progress("predict", known, quiet=options.quiet or not known, unit="rows")
    bar.quiet |= bar.on_terminal and out is None and not os.path.isfile("/dev/stdout")  # answers may appear there, too
    with bar:
        for rows in parts if known else given:
            drawn = replace(sampling, seed=seed_of(sampling.seed, total)) if total else sampling
            records = run.answer(rows, task, drawn, further(bar.advance_to, total))
            if as_csv:
                lines = csv_lines(records, header, labels)
                if out is None and sys.stdout.isatty():
                    lines = [plain(line[:-1]) + "\n" for line in lines]
            else:
                lines = [table_line(r) if as_table else json_line(r, ascii_only) for r in records]
            if out is None:
                print("".join(lines), end="", flush=True)
            whole += lines if out else []
            total += len(records)
            texts, tokenizer = [[str(row[c]) for c in task.inputs] for _, row in rows], bases[0].tokenizer
            empty += sum(not all(map(str.strip, parts_of)) for parts_of in texts)
            ids = tokenizer.encode_batch(map(" ".join, texts))
            unread += tokenizer.unread(ids)
            partly += task.is_generation * sum(tokenizer.unk_id in own for own in ids)
            truncated += sum(any(r["truncated"] for r in x.get("tasks", {"": x}).values()) for x in records)
    if out is not None:
        write_atomic(out, "".join(whole).encode(errors="replace" if as_csv else "backslashreplace"))  # half of an emoji
    lacks = "texts are empty" if len(task.inputs) == 1 else f"rows lack a text ({' or '.join(task.inputs)})"
    say_some(say, empty, total, f"{lacks}; their answers say nothing")
    odd = "texts are mostly words that the base has no token for; their answers say nothing"
    say_some(say, unread, total, odd)
    say_some(say, partly, total, "prompts hold characters that the base has no token for, and are read without them")
    say_truncated(say, truncated, total, min(b.model.config.max_length for b in bases))


def json_line(record: Record, ascii_only: bool) -> str:
    text = json.dumps(record, ensure_ascii=ascii_only) + "\n"
    return re.sub(HIDDEN, lambda found: f"\\u{ord(found[0]):04x}", text)


def csv_lines(records: list[Record], header: list[str], labels: list[str]) -> list[str]:
    """Every label's probability is a column, and of several runs each one's answer and its probability. `header` is
    filled by the first record, and by the probabilities of `labels`."""
    table, lines, more = list[Record](), [], [f"p({label})" for label in labels]
    for record in records:
        ours = {f"p({label})": p for label, p in record.get("probabilities", {}).items()}
        for name, found in record.get("tasks", {}).items():
            ours |= {name: found.get("label", found.get("answer")), f"p({name})": found.get("probability")}
        kept = {k: v for k, v in record.items() if k not in ("probabilities", "tasks")}
        row = {own_name(k, record) if k in ours or k in more else k: v for k, v in kept.items()} | ours
        odd = {k: json.dumps(v, ensure_ascii=False) for k, v in row.items() if isinstance(v, list | dict | bool)}
        table.append(row | odd)
    if table and not header:
        header += dict.fromkeys([*(name for name in table[0] if name not in more), *more])  # whichever task is first
        table.insert(0, dict(zip(header, header, strict=True)))
    for row in table:
        file = io.StringIO()
        csv.writer(file).writerow([row.get(name, "") for name in header])  # quotes what holds a part of its line end
        lines.append(file.getvalue().removesuffix("\r\n") + "\n")
    return lines


def table_line(record: dict[str, Any]) -> str:
    """What was answered, and the text, in the width of the terminal; of several runs a line each, below the text."""
    width = shutil.get_terminal_size().columns
    text = plain(record.get("text", " | ".join(str(v) for k, v in record.items() if k not in OURS)) or "(empty)")

    def beside(before: str, after: str) -> str:
        """Between them as much of the text as there is room for: what was answered is never cut."""
        room = max(width - len(before) - len(after), 16)
        return before + (text if len(text) <= room else text[: room - 3] + "...") + after + "\n"

    def said(found: dict[str, Any]) -> str:
        if "label" not in found:
            return ""
        wide = min(24, max(map(len, found.get("probabilities", [""]))))  # as the longest of its task, within reason
        return plain(f"{found['label']:<{wide}} {100 * found['probability']:5.1f}%")

    if "tasks" in record:
        each = [plain(f"  {k}: {said(v).strip() or v.get('answer')}") + "\n" for k, v in record["tasks"].items()]
        return beside("", "") + "".join(each)
    by = record.get("adapter", "")  # of a composition
    by = plain(f"like no task ({by}): " if record.get("foreign") else by and f"{by} ")
    label = said(record)
    return beside(by + label + "  " * bool(label), "" if label else plain(f"  -> {record.get('answer')}"))

"""`tinyld predict`: lines as soon as they are there, or files; out go JSON Lines, CSV, or a table."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from tinyld.answers import OURS, input_columns, own_name, under
from tinyld.config import check
from tinyld.errors import TinyldError, plain
from tinyld.options import PredictOptions
from tinyld.predict import load
from tinyld.read import decode, opened
from tinyld.rows import SUFFIXES, files_of, read_rows
from tinyld.workspace import check_writable, keep_freed_memory, say_to_stderr, say_truncated
from tinyld.write import write_atomic

CHUNK = 1024  # rows of a file that are read, sorted by length, and answered together
READ = 1 << 17  # bytes of text read at once: some thousand lines
HIDDEN = r"[\x7f-\x9f\u202a-\u202e\u2066-\u2069]"  # control characters that JSON leaves as they are
LONGEST = 1 << 24  # bytes of a line
Rows = list[tuple[str, dict[str, Any]]]  # (where it stands, column -> value)


def chunks(options: PredictOptions, source: str, columns: Sequence[str]) -> Iterator[Rows]:
    """The rows to answer, in parts. columns: what the task reads; a text alone is enough where it is one."""
    path, column = Path(source), options.column
    lines = source == "-" or path.suffix.lower() == ".txt"
    check(not options.text or source == "-", "give a file or --text, not both")
    check(not lines or column is None, "--column is for a file with columns; a line is one text")
    if lines:
        check(len(columns) == 1, f"the task reads {' and '.join(columns)}: give a .csv, .tsv or .jsonl that has both")
        for part in [enumerate(options.text, 1)] if options.text else lines_of(source):
            where = "--text, number" if options.text else f"{source}: line"
            yield [(f"{where} {number}", {columns[0]: text}) for number, text in part]
        return
    is_table = path.suffix.lower() in SUFFIXES
    check(is_table, f"{path}: the name must end in .txt, {', '.join(SUFFIXES)}; for a text itself --text")
    check(column is None or len(columns) == 1, f"--column is for tasks of one text, not {', '.join(columns)}")
    rows = read_rows(path, empty=True)
    while part := list(islice(rows, CHUNK)):
        for where, row in part if column is not None else ():
            check(column in row, f"{where}: no column {column!r}, found {', '.join(row)}")
        yield part if column is None else [(where, under({column: columns[0]}, row)) for where, row in part]


def lines_of(source: str) -> Iterator[list[tuple[int, str]]]:
    """(number, text) of the lines that are there: of a pipe what was written so far, with no waiting for more."""
    piped, name = source == "-", "stdin" if source == "-" else source
    check(not piped or sys.stdin is not None, "stdin is closed: give a file, or --text")
    if piped and sys.stdin.isatty():
        print("a text a line; Ctrl-D ends", file=sys.stderr)
    first, rest, part = 1, b"", b"-"
    with nullcontext(sys.stdin.buffer) if piped else opened(Path(source)) as stream:
        while part:
            part = stream.read1(READ)  # type: ignore[attr-defined]
            block, end, rest = (rest + part).rpartition(b"\n")
            if not part:  # the last line may have no end
                block = end = rest
            if end:
                lines = decode(block, name, first).split("\n")
                yield [(number, line.removesuffix("\r")) for number, line in enumerate(lines, first)]
                first += len(lines)
            if len(rest) > LONGEST:
                raise TinyldError(f"{name}: line {first} is longer than {LONGEST >> 20} MB; is it text?")


def predict(options: PredictOptions) -> None:
    """Answers every text of the input, in its order; prints as soon as a chunk is done, or writes `out` whole."""
    keep_freed_memory()
    sampling, say, out = options.sampling(), say_to_stderr(options.quiet), options.out
    paths, source = options.runs_and_input()
    several = len(paths) > 1
    as_csv = options.csv or (out is not None and out.suffix.lower() == ".csv")
    check(not (as_csv and options.json), "give --csv or --json, not both; a name that ends in .csv is for --csv")
    ending = "" if out is None or as_csv else out.suffix.lower()
    check(ending in ("", ".jsonl", ".json"), f"--out {out}: the name must end in .csv or .jsonl, or give --csv")
    check(not several or options.task is None, "--task is for one run; several answer for their own tasks")
    how = (options.device, options.dtype, options.base_dtype, options.task, options.reading())
    run: Any = load(paths if several else paths[0], options.base, *how)
    runs = list(run.runs.values()) if several else [run]
    task = run.task if several else run.task_named(options.task)
    tasks, bases = [r.tasks[0] for r in runs] if several else [task], [r.base for r in runs]
    if several and len(groups := run.groups()) > 1:
        shares = "; ".join(", ".join(names) for names in groups)
        say(f"{len(groups)} passes a text, as templates, bases or methods differ: {shares}")
    check_writable(out, [*options.runs, *(file for t in tasks for file in files_of(t))])
    labels = [label for t in run.tasks for label in t.labels] if not several and run.asks_alike else []
    text_of, whole, truncated, total = formatter(options, as_csv, labels), [], 0, 0
    for rows in chunks(options, source, input_columns(task)):
        records = run.answer(rows, task, sampling)
        if out is not None:
            whole.append(text_of(records))
        else:
            print(text_of(records), end="", flush=True)
        total += len(records)
        truncated += sum(any(r["truncated"] for r in x.get("tasks", {"": x}).values()) for x in records)
    if out is not None:
        write_atomic(out, "".join(whole).encode(errors="replace" if as_csv else "backslashreplace"))  # half of an emoji
    say_truncated(say, truncated, total, min(b.model.config.max_length for b in bases))


def formatter(options: PredictOptions, as_csv: bool, labels: Sequence[str]) -> Callable[[list[dict[str, Any]]], str]:
    """What makes lines of records: of CSV, of JSON, or on a terminal of a table. labels: whose probabilities a CSV has
    besides those of its first row."""
    to_file, header = options.out is not None, []
    if as_csv:
        cell = str if to_file else plain  # a file keeps control characters
        return lambda records: _csv(records, header, cell, [cell(f"p({label})") for label in labels])
    if not (to_file or options.json) and sys.stdout.isatty():
        return lambda records: "".join(map(_table_line, records))
    ascii_only = not to_file and "utf" not in (sys.stdout.encoding or "").lower()

    def as_json(records: list[dict[str, Any]]) -> str:
        text = "".join(json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records)
        return re.sub(HIDDEN, lambda found: f"\\u{ord(found[0]):04x}", text)

    return as_json


def _csv(
    records: Sequence[dict[str, Any]], header: list[str], cell: Callable[[object], str], more: Sequence[str]
) -> str:
    """Lines of CSV; every label's probability is a column, and of several runs each one's answer and its probability.
    `header` is filled by the first record, and by `more`; TinyldError for a later record that has other columns."""
    flat = []
    for record in records:
        ours = {f"p({label})": p for label, p in record.get("probabilities", {}).items()}
        for name, found in record.get("tasks", {}).items():
            ours |= {name: found.get("label", found.get("answer")), f"p({name})": found.get("probability")}
        kept = {k: v for k, v in record.items() if k not in ("probabilities", "tasks")}
        row = {own_name(k, record) if k in ours or k in more else k: v for k, v in kept.items()} | ours
        flat.append({cell(k): cell(v) if isinstance(v, str) else v for k, v in row.items()})
    lines = []
    if flat and not header:
        header += dict.fromkeys([*flat[0], *more])
        lines.append(header)
    if stray := set().union(*flat) - set(header):
        raise TinyldError(f"a later row has a column {min(stray)!r}, the first has not: leave CSV for JSON lines")
    return "".join(map(_csv_line, [*lines, *([row.get(name, "") for name in header] for row in flat)]))


def _csv_line(values: Sequence[object]) -> str:
    file = io.StringIO()
    csv.writer(file).writerow(values)  # which quotes what holds a part of its own line end
    return file.getvalue().removesuffix("\r\n") + "\n"


def _table_line(record: dict[str, Any]) -> str:
    """What was answered, and the text, in the width of the terminal."""
    width = shutil.get_terminal_size().columns
    text = record.get("text", " | ".join(str(v) for k, v in record.items() if k not in OURS)) or "(empty)"
    by = record.get("adapter", "") or "like no task:"  # of a composition
    several = record.get("tasks", {by if "adapter" in record else "": record}).items()
    said = [f"{name} {f['label']:<12} {100 * f['probability']:5.1f}%".strip() for name, f in several if "label" in f]
    written = [f"{name} -> {f['answer']}".strip() for name, f in several if "answer" in f]
    before, text, after = plain("  ".join([*said, ""])), plain(text), plain("  ".join(["", *written]))
    room = max(width - len(before) - len(after), 16)  # for the text: what was answered is never cut
    return before + (text if len(text) <= room else text[: room - 3] + "...") + after + "\n"

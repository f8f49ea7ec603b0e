"""What `predict` reads and writes: lines as soon as they are there, files; JSON Lines, CSV, a table. No torch."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from tinyld.config import check
from tinyld.errors import TinyldError, plain
from tinyld.options import PredictOptions
from tinyld.rows import SUFFIXES, read_rows
from tinyld.write import write_atomic

CHUNK = 1024  # rows of a file that are read, sorted by length, and answered together
READ = 1 << 17  # bytes of text read at once: some thousand lines
LONGEST = 1 << 24  # bytes of a line
Rows = list[tuple[str, dict[str, Any]]]  # (where it stands, column -> value)


def chunks(options: PredictOptions, columns: Sequence[str]) -> Iterator[Rows]:
    """The rows to answer, in parts. columns: what the task reads; a text alone is enough where it is one."""
    path = Path(options.input)
    lines = bool(options.text) or options.input == "-" or path.suffix == ".txt"
    check(not options.text or options.input == "-", "give INPUT or --text, not both")
    check(not lines or options.column is None, "--column is for a file with columns; a line is one text")
    if lines:
        check(len(columns) == 1, f"the task reads {' and '.join(columns)}: give a .csv, .tsv or .jsonl that has both")
        parts = [list(enumerate(options.text, 1))] if options.text else _lines_of(options.input)
        for part in parts:
            yield [(f"{options.input}: line {number}", {columns[0]: text}) for number, text in part]
        return
    check(path.suffix.lower() in SUFFIXES, f"{path}: the name must end in .txt, {', '.join(SUFFIXES)}")
    check(options.column is None or len(columns) == 1, f"--column is for tasks of one text, not {', '.join(columns)}")
    rows = iter(read_rows(path))
    while part := list(islice(rows, CHUNK)):
        if options.column is not None:
            for where, row in part:
                check(options.column in row, f"{where}: no column {options.column!r}, found {', '.join(row)}")
            part = [(w, {**{k: v for k, v in r.items() if k != options.column}, columns[0]: r[options.column]})
                    for w, r in part]  # fmt: skip
        yield part


def _lines_of(name: str) -> Iterator[list[tuple[int, str]]]:
    """(number, text) of the lines that are there: of a pipe what was written so far, with no waiting for more."""
    if name == "-":
        if sys.stdin is None:
            raise TinyldError("stdin is closed: give a file, or --text")
        if sys.stdin.isatty():
            print("a text a line; Ctrl-D ends", file=sys.stderr)
        yield from _split(sys.stdin.buffer, "stdin")
        return
    try:
        with open(name, "rb") as file:
            yield from _split(file, name)
    except OSError as error:
        raise TinyldError(f"{name}: cannot be read ({error.strerror})") from None


def _split(stream: BinaryIO, name: str) -> Iterator[list[tuple[int, str]]]:
    done, rest = 0, b""

    def text(line: bytes, number: int) -> tuple[int, str]:
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        try:
            return number, line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError:
            raise TinyldError(f"{name}: line {number}: not UTF-8; save it as UTF-8") from None

    while part := stream.read1(READ):  # type: ignore[attr-defined]
        *lines, rest = (rest + part).split(b"\n")
        if len(rest) > LONGEST:
            raise TinyldError(f"{name}: line {done + len(lines) + 1} is longer than {LONGEST >> 20} MB; is it text?")
        if lines:
            yield [text(line, done + i) for i, line in enumerate(lines, 1)]
        done += len(lines)
    if rest:
        yield [text(rest, done + 1)]


@contextmanager
def printer(options: PredictOptions) -> Iterator[Callable[[Rows], None]]:
    """Writes records: to stdout at once, or to a file when all of them are there."""
    as_csv = options.csv or (options.out is not None and options.out.suffix == ".csv")
    table = options.out is None and not as_csv and not options.json and sys.stdout.isatty()
    whole: list[str] = []
    header: list[str] = []
    ascii_only = options.out is None and "utf" not in (sys.stdout.encoding or "").lower()

    def write(records: Any) -> None:
        if as_csv:
            text = _csv(records, header)
        elif table:
            text = "".join(map(_table_line, records))
        else:
            text = "".join(json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records)
        if options.out is not None:
            whole.append(text)
        else:
            sys.stdout.write(text)
            sys.stdout.flush()

    if options.out is not None and (options.out.is_dir() or not options.out.parent.is_dir()):
        raise TinyldError(f"{options.out}: cannot be written (not a file in a folder that exists)")
    yield write
    if options.out is not None:
        write_atomic(options.out, "".join(whole).encode(errors="surrogatepass"))


def _csv(records: Sequence[dict[str, Any]], header: list[str]) -> str:
    """Lines of CSV; every label's probability is a column. `header` is filled by the first record."""
    flat = []
    for record in records:
        shares = {f"p({label})": p for label, p in record.get("probabilities", {}).items()}
        flat.append({k: v for k, v in record.items() if k != "probabilities"} | shares)
    file = io.StringIO()
    if flat and not header:
        header += flat[0]
        csv.writer(file, lineterminator="\n").writerow(header)
    csv.DictWriter(file, header, restval="", extrasaction="ignore", lineterminator="\n").writerows(flat)
    return file.getvalue()


def _table_line(record: dict[str, Any]) -> str:
    """label, probability and text in the width of the terminal."""
    width = os.get_terminal_size().columns if sys.stdout.isatty() else 80
    names = [str(v) for k, v in record.items() if k not in ("label", "probability", "probabilities", "decoded",
             "truncated", "adapter", "answer")]  # fmt: skip
    text = record.get("text") or " | ".join(names)
    if "answer" in record:
        line = f"{text} -> {record['answer']}"
    else:
        line = f"{record['label']:<12} {100 * record['probability']:5.1f}%  {text}"
    line = plain(line)
    return (line if len(line) <= width else line[: width - 3] + "...") + "\n"

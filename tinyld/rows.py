"""Files of rows (TSV, CSV, JSONL): where a task's are, and what of it each row asks. Text only."""

from __future__ import annotations

import csv
import io
import os
import string
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyld import download
from tinyld.config import check, check_choice
from tinyld.errors import TinyldError, show
from tinyld.read import ROWS_BYTES, as_object, clean, parse_json, read_text

if TYPE_CHECKING:
    from tinyld.tasks import Task

SPLITS = ("train", "dev", "test")
SUFFIXES = (".tsv", ".csv", ".jsonl")
BUNDLED_TASKS = ("reviews", "topics")  # need no file of the user's and no network


@dataclass(frozen=True)
class Example:
    before: str  # prompt text ahead of the answer slot
    after: str  # prompt text behind it
    answer: str  # the verbalizer's words, or the text to generate; "" where it is asked for
    label: int | None  # index into `Task.labels`; None for a generation task


def bundled_data_dir() -> Path:
    """The rows that come with tinyld: inside an installed package, or `data/` at the top of a checkout."""
    package = Path(__file__).parent
    inside = package / "bundled"
    return inside if inside.exists() else package.parent / "data"


def _in_folder(folder: Path, names: tuple[str, ...], split: str) -> Path | None:
    """The first of folder/NAME/SPLIT.tsv, .csv, .jsonl that is there; NAME "" is the folder itself."""
    paths = [folder / name / f"{split}{suffix}" for name in names for suffix in SUFFIXES]
    return next((path for path in paths if path.is_file()), None)


def find_file(task: Task, split: str, data: Path | None = None) -> Path:
    """The split's file: in `data`, else the task's own, in $TINYLD_DATA, the cache, the bundled data, or fetched."""
    name = task.rows_name
    if data is not None:
        if found := _in_folder(data, (name, ""), split):
            return found
        what = "no such folder" if not data.is_dir() else f"neither {name}/{split}.tsv nor {split}.tsv in it"
        raise TinyldError(f"no {split} rows of {task.name} in {data}: {what} (.csv and .jsonl are read too)")
    if split in task.data:
        return task.data[split]
    cache = download.cache_dir() / "data"
    if task.builtin:
        own = os.environ.get("TINYLD_DATA")
        if own and not Path(own).is_dir():
            raise TinyldError(f"TINYLD_DATA={own} is no folder; correct it or unset it")
        for folder in ([Path(own)] if own else []) + [cache, bundled_data_dir()]:
            if found := _in_folder(folder, (name,), split):
                if folder == cache:
                    download.check_cached(found, task.label_counts.get(split))
                return found
    elif not task.splits:
        raise TinyldError(f"task {task.name}: its file {task.path} is gone; give the {split} rows by --data DIR")
    if split not in task.splits:
        which = f"task {task.name}" if task.builtin else str(task.path)
        raise TinyldError(f"{which} has no {split} split; it has {', '.join(task.splits)}")
    if not task.builtin:
        raise TinyldError(f"{task.path}: names no file for {split}; add it to the [data] table or pass --data DIR")
    columns = (*task.columns.values(), task.pair and task.pair.column, task.answer_column, task.label_column)
    way_out = (
        f"put the file ({', '.join(dict.fromkeys(filter(None, columns)))} columns) at {cache / name / split}.tsv "
        f"or at DIR/{name}/{split}.tsv with --data DIR; task {BUNDLED_TASKS[0]} needs no download"
    )
    if name in BUNDLED_TASKS:
        raise TinyldError(f"no {split} rows of {name} in {bundled_data_dir()}: they are gone; reinstall tinyld")
    if task.source is None:
        raise TinyldError(f"no {split} rows of {task.name}, which has no official download: {way_out}")
    try:
        return download.download_task(name, task.source) / f"{split}.tsv"
    except download.NetworkError as error:
        raise TinyldError(f"no {split} rows of {task.name}: {error}; {way_out}") from None


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, column -> value) for each row of a TSV, CSV or JSONL file that is not blank."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise TinyldError(f"{path}: the name must end in {', '.join(SUFFIXES)}")
    text = read_text(path, ROWS_BYTES)
    if not text.strip():
        raise TinyldError(f"{path}: the file is empty")
    if suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"{path}: line {number}"
                yield where, as_object(parse_json(line, where), where)
        return
    header: list[str] | None = None
    for number, values in _csv_lines(text, path) if suffix == ".csv" else _tsv_lines(text):
        where = f"{path}: line {number}"
        if header is None:
            header = [clean(value) for value in values]
            if len(set(header)) != len(header):
                raise TinyldError(f"{where}: two columns of one name in {show(', '.join(header))}")
        elif len(values) != len(header):
            kind = "comma" if suffix == ".csv" else "tab"
            raise TinyldError(f"{where}: {len(values)} columns, the header has {len(header)}; look for a stray {kind}")
        else:
            yield where, dict(zip(header, values, strict=True))


def _tsv_lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """No quoting: a quote is an ordinary character (csv.QUOTE_NONE)."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r").split("\t")


def _csv_lines(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the largest that a C long holds everywhere
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    start = 1
    try:
        for values in reader:
            if values:
                yield start, values
            start = reader.line_num + 1
    except csv.Error as error:
        raise TinyldError(f"{path}: line {start}: {error}; check the quotes") from None


# ---------------------------------------------------------------------------------------------- prompts, answers


def _cell(row: dict[str, Any], column: str, where: str) -> str:
    """The row's text in `column`, cleaned; refuses a missing, empty or structured value."""
    if column not in row:
        raise TinyldError(
            f"{where}: no column {show(column)}, found {show(', '.join(row))}; "
            "rename it or map it in the task's [columns] table"
        )
    value = row[column]
    if isinstance(value, bool):
        value = str(value).lower()
    if not isinstance(value, str | int | float):
        raise TinyldError(f"{where}: column {show(column)} must hold text or a number, got {show(value)}")
    text = clean(str(value))
    if not text:
        raise TinyldError(f"{where}: column {show(column)} is empty; fill it in or delete the row")
    return text


def _fields(task: Task, row: dict[str, Any], where: str) -> dict[str, str]:
    """Template field -> text."""
    fields = {name: _cell(row, column, where) for name, column in task.columns.items()}
    if task.pair:
        text = _cell(row, task.pair.column, where)
        parts = [part.strip() for part in text.split(clean(task.pair.separator))]
        if len(parts) != 2 or not all(parts):
            raise TinyldError(
                f"{where}: column {show(task.pair.column)} must hold two texts with {task.pair.separator!r} between, "
                f"got {show(text)}"
            )
        fields |= zip(task.pair.fields, parts, strict=True)
    return fields


def _labels(task: Task, rows: Sequence[tuple[str, dict[str, Any]]]) -> list[int]:
    """The rows' labels as ints: all of them names, or all of them numbers where the task's names are none."""
    texts = [_cell(row, str(task.label_column), where) for where, row in rows]
    known = {name: i for i, name in enumerate(task.label_names)}
    if texts[:1] != [] and texts[0] not in known and not any(name.isdigit() for name in known):
        known = {str(i): i for i in range(len(known))}
    for (where, _), text in zip(rows, texts, strict=True):
        if text not in known:
            names = ", ".join(f"{i} or {name}" for i, name in enumerate(task.label_names))
            raise TinyldError(f"{where}: unknown label {show(text)}; allowed: {names}; all numbers or all names")
    return [known[text] for text in texts]


def load_split(
    task: Task, split: str, data: Path | None = None, file: Path | None = None, limit: int | None = None
) -> list[Example]:
    """The first `limit` examples of a split, in file order; `file` or the folder `data` goes before all other paths.

    Raises TinyldError, naming file and line, for a file that is missing, not UTF-8, without rows, or with a row that
    lacks a column, has too many, or bears an unknown label.
    """
    check(limit is None or limit >= 1, f"limit must be at least 1, got {limit}")
    check_choice("split", split, SPLITS)
    path = Path(file) if file is not None else find_file(task, split, Path(data) if data is not None else None)
    rows = list(islice(read_rows(path), limit))
    if not rows:
        raise TinyldError(f"{path}: a header but no rows")
    prompts = _prompts(task, rows)
    if task.is_generation:
        answers = [_cell(row, str(task.answer_column), where) for where, row in rows]
        return [replace(prompt, answer=answer) for prompt, answer in zip(prompts, answers, strict=True)]
    answers = list(task.verbalizer.values())
    labels = _labels(task, rows)
    return [replace(p, answer=answers[label], label=label) for p, label in zip(prompts, labels, strict=True)]


def prompt_of(task: Task, row: dict[str, Any], where: str) -> Example:
    """An example without an answer, of a row that needs no label: what `predict` asks."""
    return _prompts(task, [(where, row)])[0]


def _prompts(task: Task, rows: Sequence[tuple[str, dict[str, Any]]]) -> list[Example]:
    fields = [_fields(task, row, where) for where, row in rows]
    if task.is_generation and task.label_column is not None:  # its label is a part of the prompt
        for row, label in zip(fields, _labels(task, rows), strict=True):
            row["label"] = task.label_names[label]
    return [Example(*_fill(task.template, row), "", None) for row in fields]


def _fill(template: str, fields: dict[str, str]) -> tuple[str, str]:
    """The prompt text ahead of and behind {answer}."""
    halves = [""]
    for literal, name, _, _ in string.Formatter().parse(template):
        halves[-1] += literal
        if name == "answer":
            halves.append("")
        elif name is not None:
            halves[-1] += fields[name]
    return halves[0].strip(), halves[1].strip()

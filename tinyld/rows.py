"""Files of rows: where a task's are, and their rows as they stand. TSV, CSV and JSONL."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyld import download
from tinyld.errors import TinyldError, show
from tinyld.read import ROWS_BYTES, as_object, clean, parse_json, read_text

if TYPE_CHECKING:
    from tinyld.tasks import Task

SUFFIXES = (".tsv", ".csv", ".jsonl")
BUNDLED_TASKS = ("reviews", "topics")  # need no file of the user's and no network


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

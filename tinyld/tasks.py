"""Tasks: a template, a verbalizer and rows -> prompt text around an answer. Text only: no tokens, no torch.

A task is a TOML file, one of `builtin_tasks/` or a user's own; its rows are a TSV, CSV or JSONL file per split.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import string
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tinyld import download
from tinyld.config import check, check_choice, from_dict
from tinyld.download import clean, show
from tinyld.errors import TinyldError, UsageError

SPLITS = ("train", "dev", "test")
SUFFIXES = (".tsv", ".csv", ".jsonl")
METRICS = ("accuracy", "nll")
BUILTIN_DIR = Path(__file__).parent / "builtin_tasks"
BUNDLED_TASKS = ("reviews", "topics")  # need no file of the user's and no network


@dataclass(frozen=True)
class Pair:
    """One file column that holds two template fields, e.g. `first ||| second`."""

    column: str
    fields: tuple[str, ...]
    separator: str = download.PAIR

    def __post_init__(self) -> None:
        check(len(self.fields) == 2, f"fields must be two names, got {len(self.fields)}")
        check(bool(self.separator.strip()), "separator must not be blank")


@dataclass(frozen=True)
class Task:
    name: str
    description: str
    template: str  # e.g. "{sentence} it was {answer} ."; exactly one {answer}
    verbalizer: dict[str, str]  # label name -> answer words; empty for a generation task
    columns: dict[str, str]  # template field -> file column, for every field that needs one
    pair: Pair | None
    label_column: str | None  # None: the task reads no label
    label_names: tuple[str, ...]  # of the file's labels, in the order of their int
    answer_column: str | None  # generation: the column that is the answer
    answer_tokens: int  # generation: width of the answer slot in tokens; 0 for a label task
    metric: str
    splits: tuple[str, ...]
    data: dict[str, Path]  # a user's own task: split -> file
    rows_name: str  # folder name of the rows: the task's own, or that of the task it borrows rows from
    source: download.Source | None  # official download
    builtin: bool
    path: Path  # of the file it was read from

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names in the order of their int; empty for a generation task."""
        return tuple(self.verbalizer)

    @property
    def is_generation(self) -> bool:
        return not self.verbalizer

    @property
    def label_counts(self) -> dict[str, dict[str, int]]:
        """Official split -> label -> rows, as published: before dev (and test) are cut from a set that has none."""
        return self.source.label_counts if self.source else {}

    @property
    def rows(self) -> dict[str, int]:
        """Official split -> rows, as published."""
        return {split: sum(counts.values()) for split, counts in self.label_counts.items()}


@dataclass(frozen=True)
class Example:
    before: str  # prompt text ahead of the answer slot
    after: str  # prompt text behind it
    answer: str  # the verbalizer's words, or the text to generate
    label: int | None  # index into `Task.labels`; None for a generation task


# ---------------------------------------------------------------------------------------------- task files


@dataclass(frozen=True)
class _File:
    """The keys of a task's TOML file."""

    template: str
    name: str | None = None  # else the file's name
    description: str = ""
    metric: str | None = None  # else accuracy for a label task, nll for a generation task
    verbalizer: dict[str, str] | None = None
    columns: dict[str, str] | None = None  # template field -> file column, where their names differ
    pair: dict[str, Any] | None = None  # the keys of Pair
    label_column: str | None = None  # else "label"
    answer_column: str | None = None
    answer_tokens: int | None = None  # else 32
    rows_from: str | None = None  # the label task whose text a generation task writes
    splits: tuple[str, ...] = ()  # of a built-in task
    data: dict[str, str] | None = None  # split -> file, relative to the TOML's folder
    download: dict[str, Any] | None = None  # of a built-in task: the keys of _Download


@dataclass(frozen=True)
class _Download:
    format: str
    files: tuple[dict[str, Any], ...]
    label_counts: dict[str, dict[str, int]]


def builtin_names() -> list[str]:
    return sorted(path.stem for path in BUILTIN_DIR.glob("*.toml"))


def builtin_tasks() -> list[Task]:
    """Every built-in task, by name."""
    return [load_task(name) for name in builtin_names()]


def load_task(name_or_path: str) -> Task:
    """The built-in task of that name, or the one in a .toml file; `write:TASK` is `write` on the rows of TASK."""
    name, colon, rows_from = str(name_or_path).partition(":")
    if colon and name in builtin_names() and _parse(_toml_path(name)).rows_from is not None:
        return _build(_toml_path(name), rows_from)
    return _build(_toml_path(str(name_or_path)))


# What a run keeps of its task: all that asking and reading an answer takes. Where rows lie is not a part of it.
_RECORD = ("template", "verbalizer", "columns", "label_column", "answer_column", "answer_tokens", "metric")


def to_record(task: Task) -> dict[str, Any]:
    """The task as plain JSON types, for a run's config.json."""
    record = {name: getattr(task, name) for name in _RECORD}
    record |= {"name": task.name, "label_names": list(task.label_names), "path": None}
    record["pair"] = None if task.pair is None else {**vars(task.pair), "fields": list(task.pair.fields)}
    if not task.builtin and task.path.suffix == ".toml":
        record["path"] = str(task.path.resolve())
    return record


def from_record(record: dict[str, Any], where: str) -> Task:
    """The task that `to_record` wrote; rows of a built-in one are found by its name, of a user's own by its file.

    TinyldError where the record is damaged, or where the file it was read from says otherwise today.
    """
    values = {name: record[name] for name in _RECORD}
    values |= {"name": record["name"], "label_names": tuple(record["label_names"])}
    own = None if record["path"] is None else Path(record["path"])
    twin = None
    if record["name"].partition(":")[0] in builtin_names() and own is None:
        twin = load_task(record["name"])
    elif own is not None and own.is_file():
        twin = load_task(str(own))
    if twin is not None:
        now = to_record(twin)
        differ = [f"{key} was {record[key]!r}, is {now[key]!r}" for key in _RECORD if now[key] != record[key]]
        if differ:
            raise TinyldError(f"{where}: task {twin.name} has changed since: {'; '.join(differ)}")
        return twin
    pair = None if record["pair"] is None else Pair(**{**record["pair"], "fields": tuple(record["pair"]["fields"])})
    return Task(
        description="", pair=pair, splits=(), data={}, rows_name=record["name"], source=None, builtin=False,
        path=own or Path(record["name"]), **values,
    )  # fmt: skip


def prompt_of(task: Task, row: dict[str, Any], where: str) -> Example:
    """An example without an answer, of a row that needs no label: what `predict` asks."""
    fields = _fields(task, row, where)
    if task.is_generation and task.label_column is not None:
        fields["label"] = task.label_names[_label(task, row, where)]
    before, after = _fill(task.template, fields)
    return Example(before, after, "", None)


def _toml_path(name_or_path: str) -> Path:
    if name_or_path in builtin_names():
        return BUILTIN_DIR / f"{name_or_path}.toml"
    if name_or_path.endswith(".toml"):
        return Path(name_or_path)
    raise TinyldError(f"no task {show(name_or_path)}; built in: {', '.join(builtin_names())}; or give a .toml file")


def _parse(path: Path) -> _File:
    try:
        raw = tomllib.loads(_read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise TinyldError(f"{path}: not valid TOML: {error}") from None
    file = from_dict(_File, raw, str(path))
    for table in ("verbalizer", "columns", "data"):
        for key, value in (getattr(file, table) or {}).items():
            if not isinstance(value, str):
                raise TinyldError(f"{path}: [{table}] {show(key)} must be text in quotes, got {show(value)}")
    return file


def _build(path: Path, rows_from: str | None = None) -> Task:
    """The task in `path`, a generation task on the rows of `rows_from` if given."""
    file, builtin = _parse(path), path.parent == BUILTIN_DIR
    name, template = file.name or path.stem, clean(file.template)
    data = {split: path.parent / os.path.expanduser(value) for split, value in (file.data or {}).items()}
    try:
        check(re.fullmatch(r"\w[\w .-]*", name) is not None, f"name must be letters, digits and -, got {show(name)}")
        for split in (*data, *file.splits):
            check(split in SPLITS, f"unknown split {show(split)}; allowed: {', '.join(SPLITS)}")
        check(builtin or not (file.download or file.splits), "download and splits are for built-in tasks; use [data]")
        fields = _template_fields(template)
        verbalizer = _verbalizer(file.verbalizer or {})
        pair = from_dict(Pair, file.pair, f"{path}: [pair]") if file.pair is not None else None
        for field in file.columns or {}:
            check(field in fields, f"[columns] maps {show(field)}, which the template does not name")
        for field in pair.fields if pair else ():
            check(field in fields, f"[pair] splits off {show(field)}, which the template does not name")
        columns = {f: f for f in fields if not pair or f not in pair.fields} | (file.columns or {})
        label_column = (file.label_column or "label") if verbalizer else None
        _check_kind(file, fields, columns)
        task = Task(
            name=name,
            description=file.description,
            template=template,
            verbalizer=verbalizer,
            columns=columns,
            pair=pair,
            label_column=label_column,
            label_names=tuple(verbalizer),
            answer_column=file.answer_column,
            answer_tokens=0 if verbalizer else file.answer_tokens or 32,
            metric=file.metric or ("accuracy" if verbalizer else "nll"),
            splits=tuple(file.splits or data or SPLITS),
            data=data,
            rows_name=name,
            source=_source(file.download, path) if file.download else None,
            builtin=builtin,
            path=path,
        )
        if file.rows_from is not None:
            lender = rows_from or file.rows_from
            if rows_from is None and lender.endswith(".toml"):
                lender = str(path.parent / lender)
            task = _borrow_rows(task, lender, renamed=rows_from is not None)
        return task
    except UsageError as error:
        raise TinyldError(f"{path}: {error}") from None


def _check_kind(file: _File, fields: list[str], columns: dict[str, str]) -> None:
    """Raises UsageError where a label task and a generation task are mixed up."""
    if file.verbalizer:
        for key in ("answer_column", "answer_tokens", "rows_from"):
            check(
                getattr(file, key) is None, f"{key} is for generation tasks, a [verbalizer] for label tasks; drop one"
            )
        label = file.label_column or "label"
        check("label" not in fields and label not in columns.values(), "the template shows the label; use {answer}")
        check(bool(fields), "the template names no column, e.g. {sentence}")
        check_choice("metric", file.metric or "accuracy", METRICS)
    else:
        has_answer = (file.answer_column is None) != (file.rows_from is None)
        check(has_answer, "give one of: a [verbalizer] (label task), answer_column or rows_from (generation task)")
        check(file.label_column is None, "label_column is for label tasks; name the column in the template instead")
        check(file.answer_tokens is None or file.answer_tokens >= 1, "answer_tokens must be at least 1")
        check_choice("metric", file.metric or "nll", ("nll",))


def _template_fields(template: str) -> list[str]:
    """The names in the template other than {answer}, each once."""
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise UsageError(f"template {show(template)}: {error}; write {{{{ and }}}} for braces") from None
    for field, spec, conversion in parts:
        plain = field.isidentifier() and not spec and not conversion
        check(plain, f"template {show(template)}: a field is a plain name in braces, got {show(field)}")
    names = [field for field, _, _ in parts]
    count = names.count("answer")
    check(count == 1, f"template {show(template)} must hold {{answer}} once, not {count} times")
    return [name for name in dict.fromkeys(names) if name != "answer"]


def _verbalizer(raw: dict[str, str]) -> dict[str, str]:
    verbalizer: dict[str, str] = {}
    owner: dict[str, str] = {}  # answer in lower case -> label
    for label, words in raw.items():
        label, words = clean(label), clean(words)
        check(bool(label and words), f"[verbalizer] has an empty label or answer at {show(label)}")
        other = owner.setdefault(words.lower(), label)
        check(
            other == label, f"labels {show(other)} and {show(label)} share the answer {show(words)}; give each its own"
        )
        verbalizer[label] = words
    check(len(verbalizer) != 1, "[verbalizer] needs at least two labels, got 1")
    return verbalizer


def _source(raw: dict[str, Any], path: Path) -> download.Source:
    file = from_dict(_Download, raw, f"{path}: [download]")
    check_choice("download format", file.format, tuple(download.CONVERTERS))
    files = tuple(from_dict(download.RemoteFile, remote, f"{path}: [[download.files]]") for remote in file.files)
    return download.Source(file.format, files, file.label_counts)


def _borrow_rows(task: Task, lender: str, renamed: bool) -> Task:
    """The generation task reading the files of the label task `lender`, whose text becomes the answer."""
    path = _toml_path(lender)
    rows = _build(path) if _parse(path).verbalizer else None  # a generation task lends nothing, so no cycles
    if rows is None or rows.pair or len(rows.columns) != 1:
        raise UsageError(f"cannot write the rows of {show(lender)}: that takes a label task with one text column")
    return replace(
        task,
        name=f"{task.name}:{rows.name}" if renamed else task.name,
        columns={field: column for field, column in task.columns.items() if field != "label"},
        answer_column=next(iter(rows.columns.values())),
        label_column=rows.label_column if "label" in task.columns else None,
        label_names=rows.label_names,
        splits=rows.splits,
        data=rows.data,
        rows_name=rows.rows_name,
        source=rows.source,
        builtin=rows.builtin,
    )


# ---------------------------------------------------------------------------------------------- finding files


def bundled_data_dir() -> Path:
    """The rows that come with tinyld: inside an installed package, or `data/` at the top of a checkout."""
    package = Path(__file__).parent
    inside = package / "bundled"
    return inside if inside.exists() else package.parent / "data"


def _in_folder(folder: Path, names: tuple[str, ...], split: str) -> Path | None:
    """The first of folder/NAME/SPLIT.tsv, .csv, .jsonl that is there; NAME "" is the folder itself."""
    places = [folder / name / f"{split}{suffix}" for name in names for suffix in SUFFIXES]
    return next((place for place in places if place.is_file()), None)


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
    if task.builtin:
        cache = download.cache_dir() / "data"
        own = os.environ.get("TINYLD_DATA")
        if own and not Path(own).is_dir():
            raise TinyldError(f"TINYLD_DATA={own} is no folder; correct it or unset it")
        for folder in ([Path(own)] if own else []) + [cache, bundled_data_dir()]:
            if found := _in_folder(folder, (name,), split):
                if folder == cache:
                    download.check_cached(found)
                return found
    if split not in task.splits:
        where = f"task {task.name}" if task.builtin else str(task.path)
        raise TinyldError(f"{where} has no {split} split; it has {', '.join(task.splits)}")
    if not task.builtin:
        raise TinyldError(f"{task.path}: names no file for {split}; add it to the [data] table or pass --data DIR")
    target = cache / name / f"{split}.tsv"
    way_out = (
        f"put the file ({', '.join(_needed_columns(task))} columns) at {target} or at DIR/{name}/{split}.tsv "
        f"with --data DIR; task {BUNDLED_TASKS[0]} needs no download"
    )
    if name in BUNDLED_TASKS:
        raise TinyldError(
            f"no {split} rows of {name} in {bundled_data_dir()}: the bundled data is gone; reinstall tinyld"
        )
    if task.source is None:
        raise TinyldError(f"no {split} rows of {task.name}, which has no official download: {way_out}")
    try:
        return download.download_task(name, task.source) / f"{split}.tsv"
    except download.NetworkError as error:
        raise TinyldError(f"no {split} rows of {task.name}: {error}; {way_out}") from None


# ---------------------------------------------------------------------------------------------- reading rows


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise TinyldError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise TinyldError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise TinyldError(
            f"{path}: line {line}: not UTF-8 (byte {error.start} of the file); save it as UTF-8"
        ) from None


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, column -> value) for each row that is not blank."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise TinyldError(f"{path}: the name must end in {', '.join(SUFFIXES)}")
    text = _read_text(path)
    if not text.strip():
        raise TinyldError(f"{path}: the file is empty")
    if suffix == ".jsonl":
        yield from _read_jsonl(text, path)
        return
    lines = _read_csv(text, path) if suffix == ".csv" else _read_tsv(text)
    header: list[str] | None = None
    for number, values in lines:
        if header is None:
            header = [clean(value) for value in values]
            if len(set(header)) != len(header):
                raise TinyldError(f"{path}: line {number}: two columns of one name in {show(', '.join(header))}")
        elif len(values) != len(header):
            kind = "tab" if suffix == ".tsv" else "comma"
            raise TinyldError(
                f"{path}: line {number}: {len(values)} columns, the header has {len(header)}; look for a stray {kind}"
            )
        else:
            yield f"{path}: line {number}", dict(zip(header, values, strict=True))


def _read_tsv(text: str) -> Iterator[tuple[int, list[str]]]:
    """No quoting: a quote is an ordinary character (csv.QUOTE_NONE)."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r").split("\t")


def _read_csv(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
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


def _read_jsonl(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path}: line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TinyldError(f"{where}: not JSON ({error}); one object a line is expected") from None
        if not isinstance(row, dict):
            raise TinyldError(f"{where}: expected an object, got {show(line)}")
        yield where, row


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
    text = clean(value if isinstance(value, str) else str(value))
    if not text:
        raise TinyldError(f"{where}: column {show(column)} is empty; fill it in or delete the row")
    return text


def _needed_columns(task: Task) -> list[str]:
    """The file columns that the task reads."""
    pair = task.pair.column if task.pair else None
    named = (*task.columns.values(), pair, task.answer_column, task.label_column)
    return [column for column in dict.fromkeys(named) if column is not None]


def _fields(task: Task, row: dict[str, Any], where: str) -> dict[str, str]:
    """Template field -> text."""
    fields = {field: _cell(row, column, where) for field, column in task.columns.items()}
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


def _label(task: Task, row: dict[str, Any], where: str) -> int:
    """The row's label as an int. A label's name goes before its int, should names be digits."""
    text = _cell(row, task.label_column, where)
    if text in task.label_names:
        return task.label_names.index(text)
    if text.isascii() and text.isdigit() and len(text) < 9 and int(text) < len(task.label_names):
        return int(text)
    names = ", ".join(f"{i} or {name}" for i, name in enumerate(task.label_names))
    raise TinyldError(f"{where}: unknown label {show(text)}; allowed: {names}")


def load_split(
    task: Task, split: str, data: Path | None = None, file: Path | None = None, limit: int | None = None
) -> list[Example]:
    """The first `limit` examples of a split, in file order; `file` or the folder `data` goes before all other places.

    Raises TinyldError, naming file and line, for a file that is missing, not UTF-8, without rows, or with a row that
    lacks a column, has too many, or bears an unknown label.
    """
    check(limit is None or limit >= 1, f"limit must be at least 1, got {limit}")
    check_choice("split", split, SPLITS)
    path = Path(file) if file is not None else find_file(task, split, Path(data) if data is not None else None)
    examples = []
    for where, row in islice(read_rows(path), limit):
        fields = _fields(task, row, where)
        label = None
        if task.label_column is not None:
            label = _label(task, row, where)
            fields["label"] = task.label_names[label]
        before, after = _fill(task.template, fields)
        if task.is_generation:
            examples.append(Example(before, after, _cell(row, task.answer_column, where), None))
        else:
            examples.append(Example(before, after, task.verbalizer[task.labels[label]], label))
    if not examples:
        raise TinyldError(f"{path}: a header but no rows")
    return examples


def prompt_for_label(task: Task, label: str) -> Example:
    """What asks a generation task for a text of `label`; UsageError when its prompt is not the label alone."""
    fields = [field for _, field, _, _ in string.Formatter().parse(task.template) if field not in (None, "answer")]
    check(task.is_generation and fields == ["label"], f"task {task.name} does not write from a label alone")
    check(label in task.label_names, f"task {task.name} knows no label {label!r}; it has {', '.join(task.label_names)}")
    before, after = _fill(task.template, {"label": label})
    return Example(before, after, "", None)


def example_of_text(task: Task, text: str, label: int) -> Example:
    """A label task's example of one text; UsageError when it reads more than one."""
    check(not task.is_generation and len(task.columns) == 1, f"task {task.name} does not label one text")
    before, after = _fill(task.template, {next(iter(task.columns)): text})
    return Example(before, after, task.verbalizer[task.labels[label]], label)


def _fill(template: str, fields: dict[str, str]) -> tuple[str, str]:
    """The prompt text ahead of and behind {answer}."""
    halves = [""]
    for literal, field, _, _ in string.Formatter().parse(template):
        halves[-1] += literal
        if field == "answer":
            halves.append("")
        elif field is not None:
            halves[-1] += fields[field]
    return halves[0].strip(), halves[1].strip()

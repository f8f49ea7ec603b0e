"""Tasks: a template, a verbalizer and rows -> prompt text around an answer. Text only: no tokens, no torch.

A task is a TOML file, one of `builtin_tasks/` or a user's own; its rows are a TSV, CSV or JSONL file per split.
"""

from __future__ import annotations

import os
import re
import string
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tinyld import download
from tinyld.config import check, check_choice, from_dict
from tinyld.errors import TinyldError, UsageError, show
from tinyld.formats import PAIR
from tinyld.read import as_object, clean, read_toml
from tinyld.rows import BUNDLED_TASKS, SPLITS, SUFFIXES, Example, bundled_data_dir, load_split, prompt_of, read_rows

__all__ = [  # rows and tasks are asked for here
    "BUNDLED_TASKS", "SPLITS", "SUFFIXES", "Example", "Pair", "Task", "builtin_names", "builtin_tasks",
    "bundled_data_dir", "clean", "from_record", "load_split", "load_task", "prompt_of", "read_rows", "to_record",
]  # fmt: skip

BUILTIN_DIR = Path(__file__).parent / "builtin_tasks"


@dataclass(frozen=True)
class Pair:
    """One file column that holds two template fields, e.g. `first ||| second`."""

    column: str
    fields: tuple[str, ...]
    separator: str = PAIR

    def __post_init__(self) -> None:
        check(len(self.fields) == 2, f"fields must be two names, got {len(self.fields)}")
        check(bool(self.separator.strip()), "separator must not be blank")


@dataclass(frozen=True)
class Task:
    """What asking and reading an answer takes, down to `metric`; and where rows are."""

    name: str
    template: str  # e.g. "{sentence} it was {answer} ."; exactly one {answer}
    verbalizer: dict[str, str]  # label name -> answer words; empty for a generation task
    columns: dict[str, str]  # template field -> file column, for every field that needs one
    pair: Pair | None
    label_column: str | None  # None: the task reads no label
    label_names: tuple[str, ...]  # of the file's labels, in the order of their int
    answer_column: str | None  # generation: the column that is the answer
    answer_tokens: int  # generation: width of the answer slot in tokens; 0 for a label task
    metric: str
    spec: str  # what load_task makes it from: a built-in name, or the whole path of a .toml file
    path: Path  # of the file it was read from
    rows_name: str  # folder name of the rows: the task's own, or that of the task it borrows rows from
    description: str = ""
    splits: tuple[str, ...] = ()
    data: dict[str, Path] = field(default_factory=dict)  # a user's own task: split -> file
    source: download.Source | None = None  # official download
    builtin: bool = False

    def __post_init__(self) -> None:
        """UsageError where the parts do not fit each other."""
        plain_name = re.fullmatch(r"\w[\w .-]*(:\w[\w .-]*)?", self.name) is not None
        check(plain_name, f"name must be letters, digits and -, got {show(self.name)}")
        for split in (*self.data, *self.splits):
            check(split in SPLITS, f"unknown split {show(split)}; allowed: {', '.join(SPLITS)}")
        fields, paired = _template_fields(self.template), self.pair.fields if self.pair else ()
        for name in self.columns:
            check(name in fields, f"[columns] maps {show(name)}, which the template does not name")
        for name in paired:
            check(name in fields, f"[pair] splits off {show(name)}, which the template does not name")
        if self.is_generation:
            check(self.answer_tokens >= 1, "answer_tokens must be at least 1")
            check_choice("metric", self.metric, ("nll",))
            return
        check("label" not in (*fields, *self.columns.values()), "the template shows the label; use {answer}")
        check(bool(fields), "the template names no column, e.g. {sentence}")
        check(len(self.verbalizer) > 1, "[verbalizer] needs at least two labels, got 1")
        check_choice("metric", self.metric, ("accuracy", "nll"))
        owner: dict[str, str] = {}  # answer in lower case -> label
        for label, words in self.verbalizer.items():
            check(bool(label and words), f"[verbalizer] has an empty label or answer at {show(label)}")
            other = owner.setdefault(words.lower(), label)
            shared = f"labels {show(other)} and {show(label)} share the answer {show(words)}; give each its own"
            check(other == label, shared)

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


# ---------------------------------------------------------------------------------------------- task files


@dataclass(frozen=True)
class _File:
    """The keys of a task's TOML file."""

    template: str
    name: str | None = None  # else the file's name
    description: str = ""
    metric: str | None = None  # else accuracy for a label task, nll for a generation task
    verbalizer: dict[str, str] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)  # template field -> file column, where their names differ
    pair: Pair | None = None
    label_column: str | None = None  # else "label"
    answer_column: str | None = None
    answer_tokens: int | None = None  # else 32
    rows_from: str | None = None  # the label task whose text a generation task writes
    splits: tuple[str, ...] = ()  # of a built-in task
    data: dict[str, str] = field(default_factory=dict)  # split -> file, relative to the TOML's folder
    download: download.Source | None = None  # of a built-in task

    def __post_init__(self) -> None:
        """UsageError where a label task and a generation task are mixed up."""
        if self.verbalizer:
            for key in ("answer_column", "answer_tokens", "rows_from"):
                mixed = f"{key} is for generation tasks, a [verbalizer] for label tasks; drop one"
                check(getattr(self, key) is None, mixed)
            return
        has_answer = (self.answer_column is None) != (self.rows_from is None)
        check(has_answer, "give one of: a [verbalizer] (label task), answer_column or rows_from (generation task)")
        check(self.label_column is None, "label_column is for label tasks; name the column in the template instead")


def builtin_names() -> list[str]:
    return sorted(path.stem for path in BUILTIN_DIR.glob("*.toml"))


def builtin_tasks() -> list[Task]:
    """Every built-in task, by name."""
    return [load_task(name) for name in builtin_names()]


def load_task(name_or_path: str) -> Task:
    """The built-in task of that name, or the one in a .toml file; `write:TASK` is `write` on the rows of TASK."""
    writer, lender = _split_spec(str(name_or_path))
    if writer is None:
        return _build(_toml_path(lender))
    task = _borrow_rows(_build(_toml_path(writer)), lender)
    return replace(task, name=f"{writer}:{task.rows_name}", spec=f"{writer}:{_absolute(lender)}")


def _split_spec(spec: str) -> tuple[str | None, str]:
    """(`write`, `TASK`) of `write:TASK`; (None, the task) otherwise."""
    name, colon, lender = spec.partition(":")
    if colon and name in builtin_names() and _parse(_toml_path(name)).rows_from is not None:
        return name, lender
    return None, spec


def _absolute(spec: str) -> str:
    return str(Path(spec).resolve()) if spec.endswith(".toml") else spec


def _toml_path(spec: str) -> Path:
    if spec in builtin_names():
        return BUILTIN_DIR / f"{spec}.toml"
    if spec.endswith(".toml"):
        return Path(spec)
    raise TinyldError(f"no task {show(spec)}; built in: {', '.join(builtin_names())}; or give a .toml file")


def _parse(path: Path) -> _File:
    return from_dict(_File, read_toml(path), str(path))


def _build(path: Path) -> Task:
    file, builtin = _parse(path), path.parent == BUILTIN_DIR
    name, template = file.name or path.stem, clean(file.template)
    verbalizer = {clean(label): clean(words) for label, words in file.verbalizer.items()}
    data = {split: path.parent / os.path.expanduser(value) for split, value in file.data.items()}
    try:
        check(builtin or not (file.download or file.splits), "download and splits are for built-in tasks; use [data]")
        paired = file.pair.fields if file.pair else ()
        task = Task(
            name=name,
            template=template,
            verbalizer=verbalizer,
            columns={name: name for name in _template_fields(template) if name not in paired} | file.columns,
            pair=file.pair,
            label_column=(file.label_column or "label") if verbalizer else None,
            label_names=tuple(verbalizer),
            answer_column=file.answer_column,
            answer_tokens=0 if verbalizer else 32 if file.answer_tokens is None else file.answer_tokens,
            metric=file.metric or ("accuracy" if verbalizer else "nll"),
            spec=path.stem if builtin else _absolute(str(path)),
            path=path,
            rows_name=name,
            description=file.description,
            splits=tuple(file.splits or data or SPLITS),
            data=data,
            source=file.download,
            builtin=builtin,
        )
        if file.rows_from is None:
            return task
        lender = str(path.parent / file.rows_from) if file.rows_from.endswith(".toml") else file.rows_from
        return _borrow_rows(task, lender)
    except UsageError as error:
        raise TinyldError(f"{path}: {error}") from None


def _template_fields(template: str) -> list[str]:
    """The names in the template other than {answer}, each once."""
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise UsageError(f"template {show(template)}: {error}; write {{{{ and }}}} for braces") from None
    for name, spec, conversion in parts:
        is_plain = name.isidentifier() and not spec and not conversion
        check(is_plain, f"template {show(template)}: a field is a plain name in braces, got {show(name)}")
    names = [name for name, _, _ in parts]
    count = names.count("answer")
    check(count == 1, f"template {show(template)} must hold {{answer}} once, not {count} times")
    return [name for name in dict.fromkeys(names) if name != "answer"]


def _borrow_rows(task: Task, lender: str) -> Task:
    """The generation task reading the files of the label task `lender`, whose text becomes the answer."""
    path = _toml_path(lender)
    rows = _build(path) if _parse(path).verbalizer else None  # a generation task lends nothing, so no cycles
    if rows is None or rows.pair or len(rows.columns) != 1:
        raise TinyldError(
            f"{task.path}: cannot write the rows of {show(lender)}: that takes a label task with one text column"
        )
    return replace(
        task,
        columns={name: column for name, column in task.columns.items() if name != "label"},
        answer_column=next(iter(rows.columns.values())),
        label_column=rows.label_column if "label" in _template_fields(task.template) else None,
        label_names=rows.label_names,
        **{name: getattr(rows, name) for name in ("splits", "data", "rows_name", "source", "builtin")},
    )


# ---------------------------------------------------------------------------------------------- in a run's config


# What a run keeps of its task, but for where rows are; beside it `path`, the spec of one that a file describes.
_KEPT = (
    "name", "template", "verbalizer", "columns", "pair", "label_column", "label_names", "answer_column",
    "answer_tokens", "metric",
)  # fmt: skip


def to_record(task: Task) -> dict[str, Any]:
    """The task as plain JSON types, for a run's config.json."""
    record = {name: value for name, value in asdict(task).items() if name in _KEPT}
    record |= {"label_names": list(task.label_names), "path": None if task.spec == task.name else task.spec}
    if task.pair is not None:
        record["pair"]["fields"] = list(task.pair.fields)
    return record


def from_record(record: dict[str, Any], where: str) -> Task:
    """The task that `to_record` wrote; rows of a built-in one are found by its name, of a user's own by its file.

    TinyldError where the record is damaged, or where the built-in task of its name or its file says otherwise today.
    Without that file, or made from none, a task asks and reads answers all the same.
    """
    kept = {name: value for name, value in as_object(record, where).items() if name != "path"}
    name, path = kept.get("name"), record.get("path")
    spec = str(name if path is None else path)
    whole = {"spec": spec, "path": Path(spec), "rows_name": str(name), "splits": []}
    task = from_dict(Task, {**kept, **whole}, where)
    if not (spec.endswith(".toml") and os.path.lexists(_split_spec(spec)[1])) and (
        path is not None or spec.partition(":")[0] not in builtin_names()
    ):
        return task
    today = load_task(spec)
    now = to_record(today)
    changed = [f"{key} was {show(record[key])}, is {show(now[key])}" for key in _KEPT if record[key] != now[key]]
    if changed:
        raise TinyldError(
            f"{where}: its task {name} has changed since then in {today.path}: {'; '.join(changed)}; "
            "put that back, or give the new task a name of its own"
        )
    return today

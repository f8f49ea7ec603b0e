"""Tasks: a template, a verbalizer and rows -> prompt text around an answer. Text only: no tokens, no torch.

A task is a TOML file, one of `builtin_tasks/` or a user's own; its rows are a TSV, CSV or JSONL file per split.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tinyld.config import check, check_choice, from_dict
from tinyld.download import Source
from tinyld.errors import TinyldError, UsageError, show
from tinyld.read import as_object, clean, read_toml
from tinyld.rows import SPLITS, Example, bundled_data_dir, load_split, prompt_of, read_rows

__all__ = ["SPLITS", "Example", "bundled_data_dir", "load_split", "prompt_of", "read_rows"]  # are asked for here too

BUILTIN_DIR = Path(__file__).parent / "builtin_tasks"
# What a run keeps of its task; beside it `path`, the spec of one that a file describes.
KEPT = (
    "name", "template", "verbalizer", "columns", "label_column", "label_names", "answer_column", "answer_tokens",
    "metric",
)  # fmt: skip


@dataclass(frozen=True)
class TaskFile:
    """The keys of a task's TOML file."""

    template: str  # e.g. "{sentence} it was {answer} ."; exactly one {answer}; "{text}" alone: a gap in it is filled
    name: str | None = None  # else the file's name
    description: str = ""
    metric: str | None = None  # else accuracy for a label task, nll for a generation task
    verbalizer: dict[str, str] = field(default_factory=dict)  # label -> answer words; empty for a generation task
    columns: dict[str, str] = field(default_factory=dict)  # template field -> file column, where their names differ
    label_column: str | None = None  # else "label"
    # generation: the column that is the answer; several that are all right are a JSON list, or have ` ||| ` between
    answer_column: str | None = None
    answer_tokens: int | None = None  # generation: width of the answer slot in tokens; else 32
    rows_from: str | None = None  # generation: the label task whose text it writes
    splits: tuple[str, ...] = ()  # of a built-in task
    data: dict[str, str] = field(default_factory=dict)  # split -> file, relative to the TOML's folder
    download: Source | None = None  # of a built-in task

    def __post_init__(self) -> None:
        """UsageError where a label task and a generation task are mixed up."""
        if self.verbalizer:
            for key in ("answer_column", "answer_tokens", "rows_from"):
                mixed = f"{key} is for generation tasks, a [verbalizer] for label tasks; drop one"
                check(getattr(self, key) is None, mixed)
            return
        way_out = "give one of: a [verbalizer] (label task), answer_column or rows_from (generation task)"
        check(self.answer_column is None or self.rows_from is None, way_out)
        check(
            not self.is_infill or "{answer}" not in self.template, f"{way_out}, or no {{answer}} (fill a gap in a text)"
        )
        check(self.label_column is None, "label_column is for label tasks; name the column in the template instead")

    @property
    def is_infill(self) -> bool:
        """Whether what is written is a gap inside a text."""
        return not self.verbalizer and self.answer_column is None and self.rows_from is None


@dataclass(frozen=True, kw_only=True)
class Task(TaskFile):
    """What asking and reading an answer takes, and where rows are: a file's keys with what it leaves open filled in.

    `columns` has every field of the template that needs one; fields of one column stand in it in the template's order,
    with ` ||| ` between. A task that reads no label has no `label_column`, a label task has 0 `answer_tokens`.
    """

    name: str = field()
    metric: str = field()
    answer_tokens: int = field()
    label_names: tuple[str, ...]  # of the file's labels, in the order of their int
    spec: str  # what load_task makes it from (a built-in name, or the whole path of a .toml file), or a file of rows
    path: Path  # of the file it was read from
    rows_name: str  # folder name of the rows: the task's own, or that of the task it borrows rows from
    builtin: bool = False

    def __post_init__(self) -> None:
        """UsageError where the parts do not fit each other."""
        plain_name = re.fullmatch(r"\w[\w .-]*", self.name) is not None
        check(plain_name, f"name must be letters, digits and -, got {show(self.name)}")
        for split in (*self.data, *self.splits):
            check(split in SPLITS, f"unknown split {show(split)}; allowed: {', '.join(SPLITS)}")
        fields = _template_fields(self.template, self.is_infill)
        for name in self.columns:
            check(name in fields, f"[columns] maps {show(name)}, which the template does not name")
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
    def reads(self) -> tuple[Any, ...]:
        """What a run is asked, whatever the columns' names: the template with numbers for them."""
        template, columns = self.template, list(self.columns.values())
        for i, name in enumerate(self.columns):
            template = template.replace(f"{{{name}}}", f"{{{i}}}")
        return template, *map(columns.index, columns)

    @property
    def asks(self) -> tuple[Any, ...]:
        """What a run learns: what it is asked, and the answers."""
        return *self.reads, self.answer_tokens, *sorted(self.verbalizer.values())

    @property
    def label_counts(self) -> dict[str, dict[str, int]]:
        """Official split -> label -> rows, as published: before dev (and test) are cut from a set that has none."""
        return self.download.label_counts if self.download else {}

    @property
    def rows(self) -> dict[str, int]:
        """Official split -> rows, as published."""
        return {split: sum(counts.values()) for split, counts in self.label_counts.items()}


def builtin_names() -> list[str]:
    return sorted(path.stem for path in BUILTIN_DIR.glob("*.toml"))


def builtin_tasks() -> list[Task]:
    """Every built-in task, by name."""
    return [load_task(name) for name in builtin_names()]


def load_task(name_or_path: str, lends: bool = False) -> Task:
    """The built-in task of that name, or the one in a .toml file; `lends`: a label task is asked for."""
    spec = str(name_or_path)
    builtin = spec in builtin_names()
    if not builtin and not spec.endswith(".toml"):
        raise TinyldError(f"no task {show(spec)}; built in: {', '.join(builtin_names())}; or give a .toml file")
    path = BUILTIN_DIR / f"{spec}.toml" if builtin else Path(spec)
    file = from_dict(TaskFile, read_toml(path), str(path))
    if lends and not file.verbalizer:
        raise UsageError("it has no labels")
    name, template = file.name or path.stem, clean(file.template)
    verbalizer = {clean(label): clean(words) for label, words in file.verbalizer.items()}
    given = {
        "name": name,
        "template": template,
        "metric": file.metric or ("accuracy" if verbalizer else "nll"),
        "verbalizer": verbalizer,
        "label_column": (file.label_column or "label") if verbalizer else None,
        "answer_tokens": 0 if verbalizer else 32 if file.answer_tokens is None else file.answer_tokens,
        "splits": tuple(file.splits or file.data or SPLITS),
        "data": {split: str(path.parent / os.path.expanduser(value)) for split, value in file.data.items()},
    }
    try:
        check(builtin or not (file.download or file.splits), "download and splits are for built-in tasks; use [data]")
        given["columns"] = {name: name for name in _template_fields(template, file.is_infill)} | file.columns
        task = Task(
            **vars(file) | given, label_names=tuple(verbalizer), path=path, rows_name=name, builtin=builtin,
            spec=spec if builtin else str(path.resolve()),
        )  # fmt: skip
    except UsageError as error:
        raise TinyldError(f"{path}: {error}") from None
    if file.rows_from is None:
        return task
    return _borrow_rows(task, str(path.parent / file.rows_from) if file.rows_from.endswith(".toml") else file.rows_from)


def _template_fields(template: str, is_infill: bool = False) -> list[str]:
    """The names in the template other than {answer}, each once."""
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise UsageError(f"template {show(template)}: {error}; write {{{{ and }}}} for braces") from None
    for name, spec, conversion in parts:
        is_plain = name.isidentifier() and not spec and not conversion
        check(is_plain, f"template {show(template)}: a field is a plain name in braces, got {show(name)}")
    names = [name for name, _, _ in parts]
    if is_infill:
        alone = f"template {show(template)}: without {{answer}} it is one text and nothing else, e.g. {{text}}"
        check(len(names) == 1 and template == f"{{{names[0]}}}", alone)
        return names
    count = names.count("answer")
    check(count == 1, f"template {show(template)} must hold {{answer}} once, not {count} times")
    return [name for name in dict.fromkeys(names) if name != "answer"]


def _borrow_rows(task: Task, lender: str) -> Task:
    """The generation task reading the files of the label task `lender`, whose text becomes the answer."""
    try:
        rows = load_task(lender, lends=True)  # so that there are no cycles
        check(len(rows.columns) == 1, "it has more than one text")
    except UsageError as error:
        wanted = f"that takes a label task with one text column, and {error}"
        raise TinyldError(f"{task.path}: cannot write the rows of {show(lender)}: {wanted}") from None
    return replace(
        task,
        columns={name: column for name, column in task.columns.items() if name != "label"},
        answer_column=next(iter(rows.columns.values())),
        label_column=rows.label_column if "label" in _template_fields(task.template) else None,
        **{name: getattr(rows, name) for name in ("label_names", "splits", "data", "rows_name", "download", "builtin")},
    )


# ---------------------------------------------------------------------------------------------- in a run's config


def to_record(task: Task) -> dict[str, Any]:
    """The task as plain JSON types, for a run's config.json."""
    record = {name: value for name, value in asdict(task).items() if name in KEPT}
    return record | {"label_names": list(task.label_names), "path": None if task.spec == task.name else task.spec}


def from_record(record: dict[str, Any], where: str) -> Task:
    """The task that `to_record` wrote; rows of a built-in one are found by its name, of a user's own by its file.

    TinyldError where the record is damaged, or where the built-in task of its name or its file says otherwise today.
    Without that file, or made from a file of rows, a task asks and reads answers all the same.
    """
    record = as_object(record, where)
    kept = {name: value for name, value in record.items() if name != "path"}
    name, path = str(kept.get("name")), record.get("path")
    spec = name if path is None else str(path)
    task = from_dict(Task, {**kept, "spec": spec, "path": Path(spec), "rows_name": name}, where)
    is_here = os.path.lexists(spec) and spec.endswith(".toml") if path else name in builtin_names()
    if not is_here:
        return task
    today = load_task(spec)
    if changed := unlike(record, to_record(today)):
        raise TinyldError(
            f"{where}: its task {name} has changed since then in {today.path}: {changed}; "
            "put that back, or give the new task a name of its own"
        )
    return today


def unlike(then: dict[str, Any], now: dict[str, Any], keys: Iterable[str] = KEPT) -> str:
    """How two records of a task differ, in words."""
    return "; ".join(f"{key} was {show(then[key])}, is {show(now[key])}" for key in keys if then[key] != now[key])

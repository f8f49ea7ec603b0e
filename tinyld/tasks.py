"""Tasks: how a text is asked (a template), how an answer is read (a verbalizer), and what of that a run keeps.

A task is a TOML file, one of `builtin_tasks/` or a user's own; its rows are a TSV, CSV or JSONL file per split.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tinyld.config import check, check_choice, from_dict, types_of
from tinyld.coverage import Coverage
from tinyld.download import Source
from tinyld.errors import TinyldError, show
from tinyld.read import clean, read_toml
from tinyld.rows import SPLITS, files_of
from tinyld.spelling import Spelling

BUILTIN_DIR = Path(__file__).parent / "builtin_tasks"
LEARNED = ("spelling", "coverage", "smoothed", "deletes")  # by a run
OURS = ("splits", "rows_from", "download", "path", *LEARNED)  # keys of a built-in task, or filled in; no user's
# What a run keeps of its task; beside it `path`, of the file that describes one.
KEPT = ("name", "template", "verbalizer", "columns", "label_column", "answer_column", "answer_tokens")


@dataclass(frozen=True)
class Task:
    """The keys of a task's TOML file, with what it leaves open filled in. A task that writes has no verbalizer.

    `columns` has every field of the template but {answer}; fields of one column stand in it in the template's order,
    with ` ||| ` between.
    """

    template: str  # e.g. "{sentence} it was {answer} ."; exactly one {answer}; "{text}" alone: a gap in it is filled
    name: str = ""  # else the file's name
    description: str = ""
    verbalizer: dict[str, str] = field(default_factory=dict)  # label -> answer words
    columns: dict[str, str] = field(default_factory=dict)  # template field -> file column, where their names differ
    label_column: str | None = None  # else "label", of a label task
    answer_column: str | None = None  # several right answers are a JSON list, or have ` ||| ` between
    answer_tokens: int | None = None  # width of the slot of an answer that is written; else 32
    data: dict[str, str] = field(default_factory=dict)  # split -> file, relative to the TOML's folder
    # OURS, in no file of a user's
    splits: tuple[str, ...] = ()
    rows_from: str = ""  # the task whose rows it reads, where it has none
    download: Source | None = None
    path: Path = Path()  # of its file, or of the file of rows that it was made from
    spelling: Spelling | None = None  # of its texts, as a run learned it, where its base writes small letters alone
    coverage: Coverage | None = None  # of its prompts by its texts, where those say what these name
    smoothed: float = 0.0  # share of a label's probability that a run learned to give to all labels alike
    deletes: bool = False  # whether a run learned to say which masks are too many

    def __post_init__(self) -> None:
        """Fills in what is left open; UsageError where the parts do not fit each other."""
        check(re.fullmatch(r"\w[\w .-]*", self.name), f"name must be letters, digits and -, got {show(self.name)}")
        check(0 <= self.smoothed < 1, f"smoothed must be at least 0 and below 1, got {self.smoothed}")
        for split in (*self.data, *self.splits):
            check_choice("a split", split, SPLITS)
        template, fields = clean(self.template), self._fields()
        verbalizer = {clean(label): clean(words) for label, words in self.verbalizer.items()}
        for name in self.columns:
            check(name in fields, f"[columns] maps {show(name)}, which the template does not name")
        columns = {name: name for name in fields} | self.columns
        mixed = "answer_column and answer_tokens are for tasks that write, [verbalizer], label_column for label tasks"
        if self.is_generation:
            check(self.label_column is None, mixed)
            width, label_column = 32 if self.answer_tokens is None else self.answer_tokens, None
            check(width >= 1, "answer_tokens must be at least 1")
        else:
            check(self.answer_column is None and not self.answer_tokens, mixed)
            width, label_column = 0, "label" if self.label_column is None else self.label_column
            check(len(verbalizer) > 1, f"[verbalizer] needs at least two labels, got {len(verbalizer)}")
            check(all((*verbalizer, *verbalizer.values())), "[verbalizer] has an empty label or answer")
        shown = (label_column or self.answer_column) in columns.values()
        check(not shown, "the template shows the label or the answer's column; use {answer}")
        data = {split: str(self.path.parent / os.path.expanduser(file)) for split, file in self.data.items()}
        filled = {"template": template, "verbalizer": verbalizer, "columns": columns, "label_column": label_column}
        filled |= {"answer_tokens": width, "data": data, "splits": tuple(self.splits or self.data or SPLITS)}
        for name, value in (filled | {"rows_from": self.rows_from or self.name}).items():
            object.__setattr__(self, name, value)

    def learned_as(self, other: Task) -> Task:
        """This task with what a run learned of the other one."""
        return replace(self, **{name: getattr(other, name) for name in LEARNED})

    def _fields(self) -> list[str]:
        """The names in the template other than {answer}, each once."""
        template, known = f"template {show(self.template)}", r"{{|}}|{([^\W\d]\w*)}"
        names = [name for name in re.findall(known, self.template) if name]
        is_plain = not re.search("[{}]", re.sub(known, "", self.template))
        check(is_plain, f"{template}: a field is a plain name in braces; write {{{{ and }}}} for braces")
        fields = [name for name in dict.fromkeys(names) if name != "answer"]
        if self.is_infill:
            kinds = "a [verbalizer] (label task), answer_column (task that writes), no {answer} (fill a gap)"
            check("answer" not in names, f"give one of: {kinds}")
            alone = len(names) == 1 and clean(self.template) == f"{{{names[0]}}}"
            check(alone, f"{template}: without {{answer}} it is one text and nothing else, e.g. {{text}}")
        else:
            check(names.count("answer") == 1, f"{template} must hold {{answer}} once")
            check(fields, f"{template} must hold a column, e.g. {{text}}")
        return fields

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names in the order of their int; empty for a generation task."""
        return tuple(self.verbalizer)

    @property
    def is_generation(self) -> bool:
        return not self.verbalizer

    @property
    def is_infill(self) -> bool:
        """Whether what is written is a gap inside a text."""
        return self.is_generation and self.answer_column is None

    @property
    def builtin(self) -> bool:
        return self.path.parent == BUILTIN_DIR

    @property
    def inputs(self) -> list[str]:
        """The columns that asking takes: all that the task reads but the answer."""
        return list(dict.fromkeys(self.columns.values()))

    @property
    def reads(self) -> tuple[Any, ...]:
        """What a run is asked, whatever the columns' names: the template with numbers for them."""
        columns = list(self.columns.values())
        numbers = {name: f"{{{i}}}" for i, name in enumerate(self.columns)} | {"answer": "{answer}"}
        return self.template.format_map(numbers), *map(columns.index, columns)

    @property
    def is_users(self) -> bool:
        """Whether a user wrote its file."""
        return not self.builtin and self.path.suffix == ".toml"

    @property
    def asks(self) -> tuple[Any, ...]:
        """What a run learns: what it is asked, and the answers."""
        return *self.reads, self.answer_tokens, *sorted(self.verbalizer.values())

    def columns_in(self, first: Task) -> dict[str, str]:
        """Of each column that this task reads, the one in rows of the `first` task: of the same name where both read
        the same columns, else the one that stands in its place."""
        own, theirs = self.inputs, first.inputs
        differ = f"task {self.name} reads {', '.join(own)}, task {first.name} {', '.join(theirs)}"
        check(len(own) == len(theirs), f"{differ}: no row suits both, so ask each by itself")
        return dict(zip(own, own if {*own} == {*theirs} else theirs, strict=True))

    def asked_of(self, first: Task) -> tuple[Any, ...]:
        """What it is asked of rows of the `first`: where two tasks are alike, their prompts are the same."""
        as_many = len(self.inputs) == len(first.inputs)
        return self.reads, as_many and tuple(self.columns_in(first).values())


def asked_alike(tasks: Sequence[Task]) -> bool:
    """Whether all label texts, and are asked of them in the same words, so that a text by itself may tell its task."""
    return not any(task.is_generation for task in tasks) and len({task.asked_of(tasks[0]) for task in tasks}) == 1


def builtin_names() -> list[str]:
    return sorted(path.stem for path in BUILTIN_DIR.glob("*.toml"))


def load_task(name_or_path: str) -> Task:
    """The built-in task of that name, or the one in a .toml file."""
    spec, names = str(name_or_path), builtin_names()
    if spec not in names and not spec.endswith(".toml"):
        raise TinyldError(f"no task {show(spec)}; built in: {', '.join(names)}; or give a .toml file")
    path = BUILTIN_DIR / f"{spec}.toml" if spec in names else Path(os.path.abspath(spec))
    said = {"name": path.stem} | read_toml(path)
    allowed = [key for key in types_of(Task) if spec in names or key not in OURS]
    unknown = ", ".join(map(show, said.keys() - allowed))
    renaming = 'columns of other names are in a table [columns], such as text = "message"'
    check(not unknown, f"{path}: unknown key {unknown}; allowed: {', '.join(allowed)}; {renaming}", TinyldError)
    return from_dict(Task, said | {"path": path}, str(path))


def to_record(task: Task) -> dict[str, Any]:
    """The task as plain JSON types, for a run's config.json."""
    return {name: getattr(task, name) for name in KEPT} | {"path": None if task.builtin else str(task.path)}


def from_record(record: dict[str, Any], where: str) -> Task:
    """The task that `to_record` wrote. TinyldError where the built-in task of its name, or a user's file, says another
    today; without that file, or made from a file of rows, a task asks and reads answers all the same."""
    path = record.get("path")
    file = BUILTIN_DIR / f"{record.get('name')}.toml" if path is None else Path(str(path))
    own = {key: value for key, value in record.items() if key in (*KEPT, *LEARNED)}
    then = from_dict(Task, own | {"path": file}, where)
    if file.suffix != ".toml" or not os.path.lexists(file):
        return then
    today = load_task(then.name if path is None else str(path))
    if changed := unlike(to_record(then), to_record(today), KEPT[1:]):
        way_out = "put that back; a new task goes into a file of its own (runs keep theirs)"
        raise TinyldError(f"{where}: its task {then.name} has changed since then in {today.path}: {changed}; {way_out}")
    return replace(today.learned_as(then), name=then.name)  # which a composition may have changed


def trained(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The `task` and `data` of what was trained for the run with this config: itself, a composition's members, or the
    adapter that was folded into a base; none for another base."""
    return [made for made in config.get("members", [config.get("merged", config)]) if "task" in made]


def learned_files(config: dict[str, Any]) -> list[Path]:
    """The files that a run, or each member of a composition, was made from; config: the run's."""
    found = []
    for made in trained(config):
        folder = made.get("data", {}).get("folder")
        found += [Path(path) for path in (folder, made["task"].get("path")) if path]
        with contextlib.suppress(TinyldError):  # where the task has changed since, they are all that is known
            found += files_of(from_record(made["task"], ""), folder)
    return found


def unlike(then: dict[str, Any], now: dict[str, Any], keys: Iterable[str] = KEPT) -> str:
    """How two records of a task differ, the order of labels too, in words."""
    found = []
    for key in keys:
        was, own = then[key], now[key]
        if isinstance(was, dict) and isinstance(own, dict) and was != own:
            names = [name for name in was | own if was.get(name) != own.get(name)]
            found += [f"{key} of {name} was {show(was.get(name))}, is {show(own.get(name))}" for name in names]
        elif str(was) != str(own):
            found.append(f"{key} was {show(was)}, is {show(own)}")
    return "; ".join(found)

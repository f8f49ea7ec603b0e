"""A task's rows: where their files are, and what each row asks. Text only."""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyld import download
from tinyld.config import check
from tinyld.errors import TinyldError, show
from tinyld.read import PAIR, SUFFIXES, Row, clean, parted, read_rows
from tinyld.writing import fold

if TYPE_CHECKING:
    from tinyld.tasks import Task

SPLITS = ("train", "dev", "test")
GAP, GAP_MARK = re.compile("_{3,}"), "____"  # where a text is to be filled
GAPS = 4  # that training makes in each text
HELD_OUT = 10  # one row in so many is kept for dev, where there is no dev file
BUNDLED_TASKS = ("reviews", "topics")  # need no file of the user's and no network


@dataclass(frozen=True)
class Example:
    before: str  # prompt text ahead of the answer slot
    after: str  # prompt text behind it
    answer: str  # the verbalizer's words, or the text to generate; "" where it is asked for
    label: int | None  # index into `Task.labels`; None for a generation task
    references: tuple[str, ...] = ()  # generation, where several texts are right: all of them, `answer` the first
    # whether its row had a number for the label, by the order of `Task.labels`
    is_numbered: bool = field(default=False, compare=False)

    @property
    def asked(self) -> str:
        """The prompt, in one way for all that a base without capitals and accents reads alike."""
        return fold(f"{self.before}\0{self.after}")

    @property
    def right(self) -> tuple[str, ...]:
        """Every answer that is right."""
        return self.references or (self.answer,)

    def cut(self, n: int, tokens: int) -> list[Example]:
        """n examples of the same text, each with a gap where the text itself decides, of so many words that they fit
        the answer's `tokens` nearly always."""
        words = f"{self.before} {self.answer} {self.after}".split()
        rng = random.Random(" ".join(words))
        found = []
        for _ in range(n):
            length = rng.randint(1, max(1, min(tokens // 2, len(words) - 1)))
            start = rng.randrange(len(words) - length + 1)
            parts = words[:start], words[start + length :], words[start : start + length]
            found.append(Example(*map(" ".join, parts), None))
        return found


def bundled_data_dir() -> Path:
    """The rows that come with tinyld: inside an installed package, or `data/` at the top of a checkout."""
    inside = Path(__file__).parent / "bundled"
    return inside if inside.exists() else inside.parents[1] / "data"


def in_folder(folder: Path, split: str) -> Path | None:
    """SPLIT.tsv, .csv or .jsonl in the folder; the dev rows may also be called validation, valid or val."""
    stems = ("dev", "validation", "valid", "val") if split == "dev" else (split,)
    paths = [folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
    found = [path for path in paths if os.path.isfile(path)]
    check(len(found) < 2, f"which are the {split} rows: {' or '.join(map(str, found))}? Leave one of them there")
    return found[0] if found else None


def file_in(data: Path, task: Task, split: str, held_out: bool = False) -> Path | None:
    """The file of a split in `data`, a folder or the one file. Where dev rows are held out of that, the test rows are
    those that stand beside a file called train."""
    if held_out and split == "test":
        if "test" in task.data and os.path.abspath(data) == os.path.abspath(task.data.get("train", "")):
            return Path(task.data["test"])
        return in_folder(data.parent, split) if data.stem == "train" else None
    if held_out or data.is_file():
        return data
    folders = [data / task.rows_from, data]
    if task.path.suffix.lower() in SUFFIXES and task.path.parent == Path(os.path.abspath(data)):  # it was made there
        folders.reverse()
    return in_folder(folders[0], split) or in_folder(folders[1], split)


def find_file(task: Task, split: str, data: Path | None, held_out: bool) -> Path:
    """The split's file: in `data`, else the task's own, in $TINYLD_DATA, the cache, the bundled data, or fetched."""
    name, none = task.rows_from, f"no {split} rows of {task.name}"
    if data is not None:
        found = file_in(data, task, split, held_out)
        check(found or not held_out, f"task {task.name} has no {split} rows: give a file of them with --data")
        check(data.exists(), f"{data}: no such file or folder", TinyldError)
        lacks = f"neither {name}/{split}.tsv nor {split}.tsv in it (.csv and .jsonl are read too)"
        check(found, f"{none} in {data}: {lacks}", TinyldError)
        return found
    if split in task.data:
        return Path(task.data[split])
    own, cache = os.environ.get("TINYLD_DATA"), download.cache_dir() / "data"
    check(not own or os.path.isdir(own), f"TINYLD_DATA={own} is no folder; correct it or unset it", TinyldError)
    for folder in filter(None, (own, cache, bundled_data_dir())) if task.builtin else ():
        if found := in_folder(Path(folder) / name, split):
            published = task.download.rows if folder == cache and task.download else {}
            if split in published and (split == "test" or "dev" in published):  # else dev rows were cut from it
                rows, known = found.read_bytes().count(b"\n") - 1, f"not the {published[split]:,} published ones"
                way_out = "delete it to download them, or keep rows of your own in another folder and say --data DIR"
                problem = f"{found}: has {rows:,} rows, which are {known}; {way_out}"
                check(rows == published[split], problem, TinyldError)
            return found
        there = [other for other in SPLITS if in_folder(Path(folder) / name, other)] if folder == own else []
        way_out = "rows from elsewhere may be among them: add the file, or keep this folder out of $TINYLD_DATA"
        check(not there or split not in task.splits, f"{none} in {own}/{name}, which has {', '.join(there)}; {way_out}")
    way_out, problem = f"give the {split} rows by --data DIR, or all by --data FILE", "it has no official download"
    if not task.builtin:
        way_out = "name their file in its [data] table, or " * (task.is_users and task.path.exists()) + way_out
        raise TinyldError(f"{none}: {task.path} {'names none' if task.path.exists() else 'is gone'}; {way_out}")
    check(split in task.splits, f"{none}: it has {', '.join(task.splits)}; {way_out}", TinyldError)
    if task.download is not None:
        try:
            return download.download_task(name, task.download) / f"{split}.tsv"
        except TinyldError as error:
            problem = str(error)
    columns = dict.fromkeys(filter(None, (*task.inputs, task.answer_column, task.label_column)))
    raise TinyldError(
        f"{none}: {problem}; put the file ({', '.join(columns)} columns) at {cache / name / split}.tsv or at "
        f"DIR/{name}/{split}.tsv with --data DIR; task {BUNDLED_TASKS[0]} needs no download"
    )


def files_of(task: Task, *folders: str | Path | None) -> list[Path]:
    """The files that a task is made of, and those of its rows that are in the folders."""
    given = [Path(folder) for folder in folders if folder]
    inside = [file_in(folder, task, split) for folder in given for split in SPLITS]
    return [task.path, *map(Path, task.data.values()), *given, *filter(None, inside)]


def cell(row: dict[str, Any], column: str, where: str, key: str = "") -> str:
    """The row's text in `column`, cleaned; refuses a missing, empty or structured value. key: of the task file, if
    there is one, which says what the column is called."""
    if column not in row:
        way_out = f"rename one to {column}" + (f", or say which it is by the task file's {key}" if key else "")
        raise TinyldError(f"{where}: no column {show(column)}, found {show(', '.join(map(str, row)))}; {way_out}")
    value = row[column]
    if value is None or (isinstance(value, float) and math.isnan(value)):  # as pandas has what is missing
        raise TinyldError(f"{where}: column {show(column)} has no value; fill it in or delete the row")
    if not isinstance(value, str | int | float):
        raise TinyldError(f"{where}: column {show(column)} must hold text or a number, got {show(value)}")
    try:
        text = str(value).lower() if isinstance(value, bool) else clean(str(value))
    except ValueError:  # Python shows no number of so many digits
        raise TinyldError(f"{where}: column {show(column)} holds a number of thousands of digits") from None
    if not text:
        raise TinyldError(f"{where}: column {show(column)} is empty; fill it in or delete the row")
    return text


def references(row: dict[str, Any], column: str, where: str) -> tuple[str, ...]:
    """The texts in a row's answer column: a JSON list of them, or one cell with ` ||| ` between."""
    parts = row.get(column)
    if isinstance(parts, list):
        check(parts, f"{where}: column {show(column)} is an empty list; fill it in or delete the row", TinyldError)
    else:
        parts = parted(cell(row, column, where, "answer_column"))
        lacks = f"has no text beside a {PAIR.strip()}; remove that"
        check(all(parts), f"{where}: column {show(column)} {lacks}", TinyldError)
    return tuple(cell({column: part}, column, where) for part in parts)


def load_split(
    task: Task, split: str, data: Path | None = None, limit: int | None = None, held_out: bool = False
) -> list[Example]:
    """The first `limit` examples of a split, in file order. `data`: a folder that is searched before all others, or one
    file, all of whose rows are read; `held_out`: of that file the dev rows are one text in ten, chosen by a hash, of
    every label as many as it has texts, and the train rows the others. Rows of one text, whatever its capitals and
    accents, stay together, unless there are few texts."""
    path = find_file(task, split, data, held_out)
    if not held_out or path != data:
        return _examples(task, islice(read_rows(path), limit))
    examples = _examples(task, read_rows(path))
    check(len(examples) > 1, f"{path}: one row; dev rows are held out, so that at least two are needed", TinyldError)
    texts = [f"{e.before}\0{e.after}".encode(errors="surrogatepass") for e in examples]
    asked = [example.asked for example in examples]
    falling = sorted(range(len(texts)), key=lambda i: (texts[i], i), reverse=True)
    first = {asked[i]: i for i in falling}  # a row that stands for all that ask the same
    alone = task.is_infill or len(first) < HELD_OUT * max(1, len(task.labels))
    stands_for = [i if alone else first[text] for i, text in enumerate(asked)]
    by_text = sorted({*stands_for}, key=lambda i: (hashlib.sha256(texts[i]).digest(), i))
    named = zip(stands_for, ["" if e.label is None else task.labels[e.label] for e in examples], strict=True)
    label = dict(sorted(named, reverse=True))  # of a text, whatever the order of rows and labels: the first by name
    of_label: dict[str, list[int]] = {}
    for i in by_text:
        of_label.setdefault(label[i], []).append(i)
    share = {i: (n + 0.5) / len(own) for own in of_label.values() for n, i in enumerate(own)}  # of its label's texts
    dev = set(sorted(by_text, key=share.__getitem__)[: max(1, len(by_text) // HELD_OUT)])
    return [e for i, e in zip(stands_for, examples, strict=True) if (i in dev) == (split == "dev")][:limit]


def _examples(task: Task, rows: Iterable[Row]) -> list[Example]:
    examples, answers, gaps = [], list(task.verbalizer.values()), 0
    labels = {name: i for i, name in enumerate(task.labels)}
    alike = {_alike(name): name for name in labels}
    # All labels may be numbers instead, where no name is one, and the order is not just that of the rows.
    no_number = not any(re.fullmatch(r"[-+.\d]+", name) for name in labels)
    may_be_numbers = no_number and task.path.suffix.lower() not in SUFFIXES
    for where, row in rows:
        if task.is_infill:
            (column,) = task.columns.values()
            text, found = GAP.subn(" ", cell(row, column, where))
            gaps += found > 0
            check(text.strip(), f"{where}: no word to make a gap of; delete the line", TinyldError)
            examples += Example(text, "", "", None).cut(1, task.answer_tokens)
            continue
        example = prompt_of(task, row, where)
        if task.is_generation:
            right = references(row, str(task.answer_column), where)
            examples.append(replace(example, answer=right[0], references=right if len(right) > 1 else ()))
            continue
        name = cell(row, str(task.label_column), where, "label_column" * task.is_users)
        if may_be_numbers and not examples and _alike(name) not in alike:
            labels = {str(i): i for i in range(len(labels))}
            alike = {name: name for name in labels}
        name = name if name in labels else alike.get(_alike(name), name)
        if name not in labels:
            numbers = f", or for all rows the numbers from 0 to {len(labels) - 1}" if may_be_numbers else ""
            unknown = f"unknown label {show(name)}{' among numbers' * (name in task.labels)}"
            raise TinyldError(f"{where}: {unknown}; allowed: {', '.join(task.labels)}{numbers}")
        i, is_numbered = labels[name], name not in task.labels
        examples.append(replace(example, answer=answers[i], label=i, is_numbered=is_numbered))
    if 2 * gaps > len(examples):
        raise TinyldError(f"{where}: most texts have a gap; give whole texts, in which tinyld makes gaps by itself")
    return examples


def _alike(label: str) -> str:
    """What labels share that differ by who wrote them: pandas has 1.0 for 1 beside a gap, Python True for true."""
    return re.sub(r"^([-+]?\d+)\.0$", r"\1", label.casefold())


def prompt_of(task: Task, row: dict[str, Any], where: str, empty: str = "") -> Example:
    """An example without an answer, of a row that needs no label: what `predict` asks. `empty` is asked for a blank
    text, which is refused without it."""
    fields, key = dict[str, str](), "[columns]" * task.is_users
    for column in task.inputs:
        names = [name for name, own in task.columns.items() if own == column]
        is_blank = bool(empty) and isinstance(row.get(column), str) and not clean(row[column])
        text = PAIR.join([empty] * len(names)) if is_blank else cell(row, column, where, key)
        parts = [text] if len(names) == 1 else parted(text)
        if len(parts) != len(names) or not all(parts):
            wanted = f"{len(names)} texts with {PAIR!r} between"
            raise TinyldError(f"{where}: column {show(column)} must hold {wanted}, got {show(text)}")
        fields |= zip(names, parts, strict=True)
    if task.is_infill:
        (text,) = fields.values()
        parts = GAP.split(text)
        wrong = f"{len(parts) - 1 or 'no'} gaps in the text, which must hold one {GAP_MARK}"
        check(len(parts) == 2, f"{where}: {wrong}", TinyldError)
    else:
        parts = task.template.format_map(fields | {"answer": "\0"}).split("\0")  # which no cleaned text holds
    return Example(parts[0].strip(), parts[1].strip(), "", None)


def learned_rows(task: Task, data: dict[str, Any]) -> list[Example]:
    """What a run learns; data: of its config."""
    folder = data["folder"] and Path(data["folder"])
    return to_learn(task, load_split(task, "train", folder, data["limit"], data["held_out"]))


def learned_too(task: Task, learned: Iterable[Example], measured: Iterable[Example]) -> int:
    """How many of the measured examples were learned: what they ask and, where texts are written, their answer."""
    asked, known = ([(e.asked, task.is_generation and e.answer) for e in of] for of in (measured, learned))
    return sum(map(set(known).__contains__, asked))


def to_learn(task: Task, examples: Sequence[Example]) -> list[Example]:
    """What training reads: every right answer; of a text that is filled, several gaps."""
    if task.is_infill:
        return [own for example in examples for own in example.cut(GAPS, task.answer_tokens)]
    return [replace(example, answer=text) for example in examples for text in example.right]

"""A task made from a file of rows that nothing else is known of. No torch."""

import contextlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from tinyld.config import check
from tinyld.errors import TinyldError, show
from tinyld.options import RowOptions, refuse_idle
from tinyld.read import SUFFIXES, TABLES, clean, parse_json, read_rows
from tinyld.rows import cell, in_folder, references
from tinyld.tasks import Task, load_task
from tinyld.tokenizer import Tokenizer

MAX_LABELS = 200
WORDY = 3  # words of a label, beyond which it may be meant to be written
GAP_TOKENS = 16  # of the answer, where a .txt file teaches to fill gaps
WRITING = "{text} : {answer}"  # the prompt of a file with answers to write, where none is given
MINE = ("text_column", "label_column", "answer_column", "template")  # options of a file of rows alone


def task_and_rows(
    options: RowOptions, name: str | None, tokenizer: Tokenizer, max_length: int
) -> tuple[Task, Path | None, bool]:
    """(the task, where its rows are, whether dev rows are held out of them): the task of that name, whose file may name
    train rows alone, or else that of --data, a file or a folder with train and maybe dev rows, or `reviews`."""
    data = options.data
    if name is not None or data is None:
        refuse_idle(options, MINE, "but for --data without --task; a task has columns of its own")
        task = load_task("reviews" if name is None else name)
        if data is None and "train" in task.data and "dev" not in task.data:
            data = Path(task.data["train"])
            check(data.is_file(), f"{task.path}: [data]: {data} is no file: correct `train`", TinyldError)
        return task, data, data is not None and data.is_file()
    train, dev = (in_folder(data, "train"), in_folder(data, "dev")) if data.is_dir() else (data, None)
    if train is None:
        raise TinyldError(f"no train.csv, .tsv or .jsonl in {data}; for rows in {data}/NAME/ give --task NAME too")
    task = make_task(options, train, tokenizer, max_length)
    return (task, data, False) if dev else (task, train, True)


def make_task(options: RowOptions, file: Path, tokenizer: Tokenizer, max_length: int) -> Task:
    """The task of a file: of a .txt to fill gaps in texts, else to write the answers in its answer column, or to label
    its texts. max_length: of the base's rows, in tokens; an answer may be half of it."""
    path, template = Path(os.path.abspath(file)), clean(options.template)
    name = re.sub(r"[^\w.-]+", "-", path.stem if path.stem != "train" else path.parent.name).strip("-.") or "mine"
    if file.suffix.lower() == ".txt":
        refuse_idle(options, MINE, f"on the lines of {file}: a gap is filled")
        refuse_table([(where, row["text"]) for where, row in read_rows(file)])
        return Task("{text}", name, path=path, answer_tokens=GAP_TOKENS)
    fields = re.findall(r"(?<!{){(\w+)}", template)
    way_out = "each once, and no other; a task file says which columns others are"
    check(sorted(fields) == ["answer", "text"], f"template must hold {{text}} and {{answer}}, {way_out}")
    rows = list(read_rows(file))
    text, label = _columns(options, file, [row for _, row in rows])
    is_named = label in ("label", options.label_column, options.answer_column)
    for where, row in rows if is_named else ():
        is_names = (row.get(text), row.get(label)) == (text, label)
        check(not is_names, f"{where}: names the columns once more; delete the line")
    for column in (text, label):
        lack = [where for where, row in rows if isinstance(row.get(column), str) and not clean(row[column])]
        if len(lack) > 1:
            many = f"is empty, as it is in {len(lack) - 1:,} more of {len(rows):,} rows; fill it in or delete them"
            raise TinyldError(f"{lack[0]}: column {show(column)} {many}")
    if options.answer_column is not None:
        answers = [answer for where, row in rows for answer in references(row, label, where)]
        longest = max(len(tokenizer.encode(tokenizer.blank + answer)) for answer in answers)
        width, template = min(longest + 1, max_length // 2), WRITING if template == RowOptions.template else template
        return Task(template, name, columns={"text": text}, answer_column=label, answer_tokens=width, path=path)
    labels = list(dict.fromkeys(cell(row, label, where) for where, row in rows))
    has_header = is_named or file.suffix.lower() not in TABLES or folded(label) not in map(folded, labels)
    way_out = f"put a line `text,label` before it, or say --label-column {show(label)}"
    check(has_header, f"{file}: its first line is read as a header, but {show(label)} is one of the labels; {way_out}")
    _check_labels(labels, f"{file}: column {label!r}", len(rows))
    if all(isinstance(folded(name), Decimal) for name in labels):
        labels.sort(key=folded)
    words = answer_words(labels, tokenizer, tokenizer.blank_before(template))
    verbalizer = dict(zip(labels, words, strict=True))
    return Task(template, name, verbalizer=verbalizer, columns={"text": text}, label_column=label, path=path)


def refuse_table(lines: Sequence[tuple[str, str]], column: str = "text") -> None:
    """TinyldError where texts, (where, line), are a table: the first line is that of one that has the column, or JSON
    Lines, or all have a tab."""
    for where, line in lines[:1]:
        names = [name.strip(' "').casefold() for name in re.split(r"[,;\t](?! )", line)]
        said = f"names columns, {column} among them" if len(names) > 1 else f"is {show(line)}, the name of a column"
        with contextlib.suppress(TinyldError):
            if line.startswith("{") and parse_json(line, where, dict):
                said, column = "is JSON", names[0]
        if column.casefold() in names:
            raise TinyldError(f"{where} {said}: a table is given as a file, whose name ends in {', '.join(SUFFIXES)}")
        tabbed = len(lines) > 1 and all("\t" in line for _, line in lines)
        file = where.partition(": line")[0]
        check(not tabbed, f"{file}: all lines have a tab: name it .tsv, with a first line that names the columns")


def _check_labels(labels: list[str], where: str, rows: int) -> None:
    """UsageError for what can hardly be meant: one label, two that look like one, one in quotes, or nearly as many as
    rows."""
    check(len(labels) >= 2, f"{where} holds the one label {labels[0]!r}; at least two are needed")
    alike: dict[Any, str] = {}
    for label in labels:
        other = alike.setdefault(folded(label), label)
        way_out = "write them alike, or say in a task file which labels there are"
        check(other == label, f"{where}: labels {show(other)} and {show(label)} look like one label; {way_out}")
        way_out = "which are letters to a .tsv; save it as .csv, with no blanks before quotes, or remove them"
        check(not re.fullmatch('".*"', label), f"{where}: label {label} is in quotes, {way_out}")
    many = len(labels) > min(MAX_LABELS, max(10, rows // 2)) or 2 < rows == len(labels)
    way_out = "is it the --label-column? Texts to write are an --answer-column"
    check(not many, f"{where} holds {len(labels)} different labels; {way_out}")


def described(task: Task) -> str:
    """What was made of a file, in a line: so that a column that was guessed wrongly is seen at once."""
    (text,) = task.columns.values()
    if task.is_generation:
        answers = "to have gaps" if task.is_infill else f"answers in {task.answer_column!r}, each learned as one line"
        return f"texts are in column {text!r}, {answers}"
    labels = task.verbalizer.items()
    shown = [k + f" (written {words!r})" * (words != k) for i, (k, words) in enumerate(labels) if i < 6 or words != k]
    few = ", ".join(shown[:20]) + ", ..." * (len(shown[:20]) < len(labels))
    are_texts = len(labels) > 6 and sum(len(label.split()) for label in task.labels) > WORDY * len(labels)
    hint = "; texts to write are an --answer-column" * are_texts
    return f"texts are in column {text!r}, labels in {task.label_column!r}: {len(labels)} ({few}){hint}"


def folded(label: str) -> Any:
    """What labels that are meant to be one have in common: without case, odd spellings of characters, or 1 for 1.0."""
    label = re.sub(r"[\xad\u200b-\u200f\u2060\ufeff]", "", label)  # which have no width
    with contextlib.suppress(ArithmeticError):  # of large ones a float holds but 15 digits
        if "_" not in label and (number := Decimal(label)).is_finite():
            return number
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", label)).strip().casefold()


def _columns(options: RowOptions, file: Path, rows: list[dict[str, Any]]) -> tuple[str, str]:
    """(text column, label or answer column): as told, or by their names, or the one that is left of two; where none is
    told, the one with more different values is text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text, label = options.text_column, options.label_column or options.answer_column
    check(None in (options.label_column, options.answer_column), "give --label-column or --answer-column, not both")
    for name in (text, label):
        check(name is None or name in names, f"{file}: no column {name!r}; it has {', '.join(names)}")
    text = text or ("text" if "text" in names and label != "text" else None)
    label = label or ("label" if "label" in names and text != "label" else None)
    if len(names) == 2:
        left = [name for name in names if name not in (text, label)]
        left.sort(key=lambda name: len({str(row.get(name)) for row in rows}))
        label = label or left.pop(0)
        text = text or left.pop()
    if text is None or label is None:
        there = ", ".join(names) or "none"
        gaps = "texts whose gaps are to be learned are lines of a .txt"
        check(len(names) > 1, f"{file}: texts and labels take two columns; found {there}; {gaps}")
        lacks = [name for name, found in (("text", text), ("label", label)) if found is None]
        way_out = f"say so with {' and '.join(f'--{name}-column' for name in lacks)}"
        way_out += " (or --answer-column, of texts to write)" * (label is None)
        which = f"which of its columns {'are' if len(lacks) > 1 else 'is'} {' and '.join(lacks)}"
        raise TinyldError(f"{file}: {which}? It has {there}; {way_out}")
    return text, label


def answer_words(labels: list[str], tokenizer: Tokenizer, blank: str = "") -> list[str]:
    """A word of one token for each label, all different: its name, else a word in it, of those that fewest labels hold
    the longest, else a letter. The order of labels decides nothing."""
    words, taken = dict[str, str](), {tokenizer.unk_id}
    spare = [*"abcdefghijklmnopqrstuvwxyz", *map(str, range(1000)), *sorted(tokenizer.inner.get_vocab())]
    parts = {label: re.findall(r"[^\W_]+", label) for label in sorted(labels)}
    held = Counter(word for own in parts.values() for word in set(own))
    parts = {label: sorted(own, key=lambda word: (held[word], -len(word))) for label, own in parts.items()}
    for candidates in ({label: [label] for label in parts}, parts, dict.fromkeys(parts, spare)):
        for label, choice in candidates.items():
            for word in choice if label not in words else ():
                ids = tokenizer.encode(blank + word)
                if len(ids) == 1 and ids[0] not in taken:
                    words[label] = word
                    taken.add(ids[0])
                    break
    check(len(words) == len(labels), f"the base's vocabulary has too few words for {len(labels)} labels")
    return [words[label] for label in labels]

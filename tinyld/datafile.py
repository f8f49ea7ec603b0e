"""A user's rows: which of a file train and which are held out, and a task made from a file that has none. No torch."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

from tinyld.config import check
from tinyld.errors import TinyldError, show
from tinyld.options import FinetuneOptions
from tinyld.parse import refuse_idle
from tinyld.rows import Example, cell, in_folder, load_split, read_rows, references
from tinyld.tasks import KEPT, Task, from_record
from tinyld.tokenizer import Tokenizer

HELD_OUT = 10  # one row in so many is kept for dev, where there is no dev file
MAX_LABELS = 200
GAP_TOKENS = 16  # of the answer, where a .txt file teaches to fill gaps
WRITING = "{text} : {answer}"  # the prompt of a file with answers to write, where none is given


def read_split(
    task: Task, split: str, data: Path | None, limit: int | None = None, held_out: bool = False
) -> list[Example]:
    """The first `limit` examples of a split. `data`: a folder, or one file, all of whose rows are read; `held_out`: of
    that file the dev rows are one in ten, chosen by their text, and the train rows the others."""
    if data is None or not data.is_file():
        return load_split(task, split, data, limit=limit)
    examples = load_split(task, "train", file=data, limit=None if held_out else limit)
    if not held_out:
        return examples
    check(split != "test", f"task {task.name} has no test rows: give a file of them with --data")
    check(len(examples) >= 2, f"{data}: one row; dev rows are held out, so that at least two are needed")
    by_text = sorted(range(len(examples)), key=lambda i: (_digest(examples[i]), i))
    dev = set(by_text[: max(1, len(examples) // HELD_OUT)])
    return [e for i, e in enumerate(examples) if (i in dev) == (split == "dev")][:limit]


def _digest(example: Example) -> bytes:
    return hashlib.sha256(f"{example.before}\0{example.after}".encode(errors="surrogatepass")).digest()


def data_file(data: Path) -> tuple[Path, bool, Path]:
    """(where rows are, whether dev rows are held out of it, the file of train rows). `data`: a file, or a folder with
    train and maybe dev rows."""
    if not data.is_dir():
        return data, True, data
    train, dev = (in_folder(data, ("",), split) for split in ("train", "dev"))
    if train is None:
        raise TinyldError(f"no train.csv, .tsv or .jsonl in {data}; for rows in {data}/NAME/ give --task NAME too")
    return (data, False, train) if dev else (train, True, train)


def make_task(options: FinetuneOptions, file: Path, tokenizer: Tokenizer, max_length: int) -> Task:
    """The task of a file that nothing else is known of: of a .txt to fill gaps in texts, else to write the answers in
    its answer column, or to label its texts. max_length: of the base's rows, in tokens; an answer may be half of it."""
    real = Path(os.path.realpath(file))  # which a loop of links has, too
    name = re.sub(r"[^\w.-]+", "-", file.stem if file.stem != "train" else real.parent.name).strip("-.")
    record: dict[str, Any] = dict.fromkeys(KEPT) | {"name": name or "mine", "path": str(real)}
    if file.suffix.lower() == ".txt":
        idle = ["text_column", "label_column", "answer_column", "template"]
        refuse_idle(options, idle, f"on the lines of {file}: a gap is filled")
        own = {"template": "{text}", "columns": {"text": "text"}, "answer_tokens": GAP_TOKENS, "metric": "nll"}
        return from_record(record | {"verbalizer": {}, "label_names": []} | own, str(file))
    once = all(options.template.count(field) == 1 for field in ("{text}", "{answer}"))
    check(once, f"template must hold {{text}} and {{answer}}, each once, got {options.template!r}")
    numbered = list(read_rows(file))
    rows = [row for _, row in numbered]
    text, label = _columns(options, file, rows)
    if options.answer_column is not None:
        answers = [answer for where, row in numbered for answer in references(row, label, where)]
        longest = max(len(tokenizer.encode(answer)) for answer in answers)
        own = {"verbalizer": {}, "label_names": [], "columns": {"text": text}, "answer_column": label, "metric": "nll"}
        own["template"] = WRITING if options.template == FinetuneOptions.template else options.template
        return from_record(record | own | {"answer_tokens": min(longest + 1, max_length // 2)}, str(file))
    labels = list(dict.fromkeys(cell(row, label, where) for where, row in numbered))
    check(len(labels) >= 2, f"{file}: column {label!r} holds the one label {labels[0]!r}; at least two are needed")
    alike: dict[Any, str] = {}
    for name in labels:
        other = alike.setdefault(folded(name), name)
        way_out = "write them alike, or say in a task file which labels there are"
        check(other == name, f"{file}: labels {show(other)} and {show(name)} look like one label; {way_out}")
    many = len(labels) > min(MAX_LABELS, max(10, len(rows) // 2)) or 2 < len(rows) == len(labels)
    problem = f"{file}: column {label!r} holds {len(labels)} different labels; is it the --label-column?"
    check(not many, f"{problem} Texts to write are an --answer-column")
    record |= {
        "template": options.template,
        "verbalizer": dict(zip(labels, answer_words(labels, tokenizer), strict=True)),
        "columns": {"text": text},
        "label_column": label,
        "label_names": labels,
        "answer_tokens": 0,
        "metric": "accuracy",
    }
    return from_record(record, str(file))


def described(task: Task) -> str:
    """What was made of a file, in a line: so that a column that was guessed wrongly is seen at once."""
    (text,) = task.columns.values()
    if task.label_column is not None:
        few = ", ".join(task.labels[:6]) + (", ..." if len(task.labels) > 6 else "")
        return f"texts are in column {text!r}, their labels in {task.label_column!r}: {len(task.labels)} ({few})"
    return f"texts are in column {text!r}, " + (
        f"answers in {task.answer_column!r}" if task.answer_column else "to have gaps"
    )


def folded(label: str) -> Any:
    """What labels that are meant to be one have in common: without case, odd spellings of characters, or 1 for 1.0."""
    try:
        return float(label)
    except ValueError:
        return re.sub(r"[\s\u200b-\u200f\u2060]+", " ", unicodedata.normalize("NFKC", label)).casefold()


def _columns(options: FinetuneOptions, file: Path, rows: list[dict[str, Any]]) -> tuple[str, str]:
    """(text column, label or answer column): as told, or by their names, or the one that is left of two; where none is
    told, the one with more different values is text."""
    names = list(rows[0])
    text, label = options.text_column, options.label_column or options.answer_column
    check(None in (options.label_column, options.answer_column), "give --label-column or --answer-column, not both")
    for name in (text, label):
        check(name is None or name in names, f"{file}: no column {name!r}; it has {', '.join(names)}")
    text = text or ("text" if "text" in names and label != "text" else None)
    label = label or ("label" if "label" in names and text != "label" else None)
    left = [name for name in names if name not in (text, label)]
    if len(names) == 2 and (text is None or label is None):
        left.sort(key=lambda name: len({str(row.get(name)) for row in rows}))
        label = label or left.pop(0)
        text = text or left.pop()
    if text is None or label is None:
        check(
            len(names) > 1, f"{file}: it has the one column {names[0]}; texts and labels take two, with a comma between"
        )
        raise TinyldError(
            f"{file}: which of its columns are text and label? It has {', '.join(names)}; "
            "say so with --text-column and --label-column (or --answer-column, of texts to write)"
        )
    return text, label


def answer_words(labels: list[str], tokenizer: Tokenizer) -> list[str]:
    """A word of one token for each label, all different: its name, else the longest word in it, else a letter."""

    def token(word: str) -> int | None:
        ids = tokenizer.encode(word)
        return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_id and ids[0] not in taken else None

    words: dict[str, str] = {}
    taken: set[int] = set()
    spare = [*"abcdefghijklmnopqrstuvwxyz", *map(str, range(1000)), *tokenizer.inner.get_vocab()]
    for candidates in (
        lambda label: [label],
        lambda label: sorted(re.findall(r"[^\W_]+", label), key=len, reverse=True),
        lambda label: spare,
    ):
        for label in labels:
            if label not in words:
                word = next((w for w in candidates(label) if token(w) is not None), None)
                if word is not None:
                    words[label] = word
                    taken.add(tokenizer.encode(word)[0])
    check(len(words) == len(labels), f"the base's vocabulary has too few words for {len(labels)} labels")
    return [words[label] for label in labels]

"""Tasks: what a TOML and a file of rows become, and the one line a user reads when either is wrong."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import refuses

from tinyld import rows
from tinyld.datafile import described
from tinyld.errors import TinyldError
from tinyld.rows import GAPS, SPLITS, Example, bundled_data_dir, load_split, prompt_of, to_learn
from tinyld.tasks import Task, builtin_names, from_record, load_task, to_record
from tinyld.writing import fold

SHARED = Path(__file__).parents[2] / "shared" / "data"
MOOD = """
template = "{text} i feel {answer} ."
[verbalizer]
sad = "down"
happy = "very well"
[data]
train = "mood.csv"
dev = "mood.jsonl"
"""
REPLY = 'template = "{label} : {answer}"\nanswer_column = "reply"\n'

pytestmark = pytest.mark.usefixtures("elsewhere")


def user_task(folder: Path, toml: str = MOOD) -> Task:
    return load_task(str(rows_file(folder, "mood.toml", toml)))


def rows_file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(folder: Path, content: str | bytes, task: Task | str = MOOD, name: str = "a.csv") -> list[Example]:
    """The examples of a file of rows, for a task or the one of a TOML."""
    task = user_task(folder, task) if isinstance(task, str) else task
    return load_split(task, "train", rows_file(folder, name, content))


def test_every_file_format_reads_the_same(tmp_path: Path) -> None:
    for name, content in (
        ("a.TSV", 'text\tlabel\r\nsaid "no\t0\r\n\r\n'), ("a.csv", 'label,text\n\nsad,"said ""no"\n\n,\n'),
        ("a.jsonl", '{"label": 0, "text": "said \\"no"}\n\n'),
        ("a.jsonl", '\ufeff{"text": " said\\n\\t \\"no ", "label": "sad", "more": [1]}'),
        ("a.tsv", '\ufefftext\tlabel\nsaid\x01\x1b \u2028"no\tsad\n'),
        ("a.tsv", '"text"\t"label"\n"said ""no"\t"sad"\n'), ("a.csv", '\ufeff"text","label"\r\n"said ""no",sad'),
        ("a.csv", 'text\tlabel\nsaid "no\tsad\n'), ("a.tsv", 'text\tlabel\n"said ""no"\tsad\n'),
        ("a.csv", 'id;text;label;;\r7,5;said "no;sad;;\r;;;;\r'), ("a.tsv", 'text,label\nsaid "no,sad\n'),
        ("a.csv", 'id;text;label;a note (long, brief)\n7,5;said "no;sad;\n'),
        ("a.csv", '"id\n(a, b)";text;label\n7;said "no;sad\n'), ("a.tsv", 'text;label\nsaid "no;sad'),
        ("a.csv", 'text,label,good; bad\nsaid "no,sad,\n'),
        ("a.csv", 'text\tlabel\nsaid "no\tsad\n'.encode("utf-16")),
    ):  # fmt: skip
        assert read(tmp_path, content, name=name) == [Example('said "no i feel', ".", "down", 0)]


def test_columns_of_other_names_are_mapped_and_the_first_rows_read_alone(tmp_path: Path) -> None:
    task = user_task(tmp_path, 'label_column = "y"\n' + MOOD + '[columns]\ntext = "x"\n')
    rows_file(tmp_path, "mood.csv", "x,y\nsun,happy\n,\nrain,sad\na,unheard of\n")
    assert load_split(task, "train", limit=1) == [Example("sun i feel", ".", "very well", 1)]


def test_blanks_behind_the_commas_of_a_header_are_no_part_of_cells(tmp_path: Path) -> None:
    (found,) = read(tmp_path, 'label, text\nsad, "rain, ""wind"""\n')
    assert found.before == 'rain, "wind" i feel'
    assert read(tmp_path, 'label,text\nsad, rain "wind"\n')[0].before == 'rain "wind" i feel'


def test_fields_of_one_column_are_parted_in_it(tmp_path: Path) -> None:
    (found,) = read(tmp_path, "sentence\tlabel\nit rains ||| it is wet\t1\n", load_task("mrpc"), "a.tsv")
    assert found == Example("it rains ?", ", it is wet", "yes", 1)
    for text in ("only one half", "a ||| b ||| c", "a |||"):
        with pytest.raises(TinyldError, match=r"line 2: column 'sentence' must hold 2 texts with ' \|\|\| ' between"):
            read(tmp_path, f"sentence\tlabel\n{text}\t1\n", load_task("rte"), "a.tsv")


def test_labels_are_all_names_or_all_numbers_that_are_no_names(tmp_path: Path) -> None:
    for names, labels, found in (
        ("sad happy", "1 0", [1, 0]), ("sad happy", "happy sad", [1, 0]), ("1 0", "1 0", [0, 1]),
        ("sad happy", "1 sad", None), ("sad happy", "sad 1", None), ("1 2 3", "0 1", None), ("sad happy", "01 0", None),
        ("1.0 2.0", "1 0", None), ("0 1", "1.0 0", [1, 0]),
        ("v1 v2", "v1.0 v2", None), ("false true", "True False", [1, 0]),
        ("0.0 1.0", "1 0.0", [1, 0]), ("sad happy", "1.0 0", [1, 0]),
    ):  # fmt: skip
        words = "".join(f'"{name}" = "word{i}"\n' for i, name in enumerate(names.split()))
        task = user_task(tmp_path, f'template = "{{text}} {{answer}}"\n[verbalizer]\n{words}')
        content = "text,label\n" + "".join(f"x,{label}\n" for label in labels.split())
        refused = pytest.raises(TinyldError, match="unknown label .*; allowed: ")
        with nullcontext() if found else refused:
            assert [example.label for example in read(tmp_path, content, task)] == found


def test_a_tenth_of_the_rows_of_every_label_is_held_out_whatever_their_order(tmp_path: Path) -> None:
    def parted(rows: list[str]) -> tuple[list[Example], list[Example]]:
        """Train and dev rows, of which none ask the same."""
        found = set()
        for order in (rows, rows[::-1]):
            file = rows_file(tmp_path, "mine.csv", "\n".join(["text,label", *order]))
            train, dev = (load_split(user_task(tmp_path), split, file, held_out=True) for split in ("train", "dev"))
            assert {fold(e.before) for e in dev}.isdisjoint(fold(e.before) for e in train)
            found.add(frozenset(e.before for e in dev))
        assert len(found) == 1 and len(train) + len(dev) == len(rows)
        return train, dev

    rows = [f"text {i},{'sad' if i < 60 else 'happy'}" for i in range(80)]
    dev = [e.label for e in parted(rows)[1]]
    assert (dev.count(0), dev.count(1)) == (6, 2)
    both = [f"text {i},{label}" for i in range(20) for label in ("sad", "happy")]
    parted([*both, *rows[20:]])
    spelled = [f"{say(f'café {i} wörd')},{'sad' if i % 2 else 'happy'}" for say in (str, str.upper) for i in range(40)]
    spelled += [row.replace("é", "e") for row in spelled[:40]]
    assert len(parted(spelled)[1]) == 12, "which a base may read as one text"
    for said in [f"w{i}" for i in range(40)]:  # a text that comes again and again is on one side, whichever that is
        parted([*rows, *[f"{said},sad"] * 40])


def test_a_task_that_writes_reads_its_answers_from_a_column(tmp_path: Path) -> None:
    task = user_task(tmp_path, REPLY)
    assert (task.is_generation, task.is_infill, task.labels, task.answer_tokens) == (True, False, (), 32)
    both = ("good day", "hi there")
    for name, content, right in (
        ("a.csv", "label,reply\nhello,good day\n", both[:1]),
        ("a.csv", "label,reply\nhello,good day ||| hi there\n", both),
        ("a.csv", "label,reply\nhello,good day|||hi there\n", both),
        ("a.csv", "label,reply\nhello,a |||| b\n", ("a |||| b",)),
        ("a.jsonl", '{"label": "hello", "reply": ["good day", " hi  there"]}\n', both),
    ):
        (found,) = read(tmp_path, content, task, name)
        assert (found.before, found.answer, found.label, found.right) == ("hello :", right[0], None, right)
        assert [(e.before, e.answer) for e in to_learn(task, [found])] == [("hello :", text) for text in right]
    for reply in ("[]", '["a", ""]', '["a", ["b"]]', '"a ||| "', "null"):
        why = "is empty|is an empty list|must hold text|has no value|has no text beside a [|]+;"
        with pytest.raises(TinyldError, match=f"a.jsonl: line 1: column 'reply' ({why})"):
            read(tmp_path, f'{{"label": "x", "reply": {reply}}}', task, "a.jsonl")


def test_a_text_file_makes_a_task_that_fills_gaps(tmp_path: Path) -> None:
    lines = ["the rain fell on the town all day", "sun", "a form ____ with a _____ gap"]
    task = user_task(tmp_path, 'template = "{text}"\nanswer_tokens = 6\n[data]\ntrain = "texts.txt"\n')
    rows_file(tmp_path, "texts.txt", "\n\n".join(lines))
    examples = load_split(task, "train")
    whole = [" ".join(f"{e.before} {e.answer} {e.after}".split()) for e in examples]
    assert task.is_infill and whole == [lines[0], "sun", "a form with a gap"]
    assert all(1 <= len(e.answer.split()) <= 3 for e in examples), "half as many words as the answer has tokens"
    assert examples == load_split(task, "train"), "the gaps of a text are always the same"
    learnt = to_learn(task, examples)
    assert len(learnt) == GAPS * 3 and len({(e.before, e.after) for e in learnt[:GAPS]}) > 1
    many = examples[0].cut(200, 6)
    assert {len(e.answer.split()) for e in many} == {1, 2, 3}
    assert {e.before == "" for e in many} == {e.after == "" for e in many} == {True, False}
    assert prompt_of(task, {"text": "the rain ____ on us"}, "") == Example("the rain", "on us", "", None)
    assert prompt_of(task, {"text": "_____"}, "") == Example("", "", "", None)
    for text, gaps in (("the rain", "no"), ("a ____ b ___ c", "2")):
        refuses(f"line 3: {gaps} gaps in the text, which must hold one ____", prompt_of, task, {"text": text}, "line 3")
    (tmp_path / "lines.txt").write_text("a ____ b c\nthe sea and the sun\nwhat ___ is\n")
    with pytest.raises(TinyldError, match="lines.txt: line 3: most texts have a gap; give whole texts"):
        load_split(task, "train", tmp_path / "lines.txt")


@pytest.mark.parametrize("name", ["reviews", "mrpc", "write", "mood.toml"])
def test_a_task_comes_back_from_its_record(tmp_path: Path, name: str) -> None:
    user_task(tmp_path)
    task = load_task(name)
    record = json.loads(json.dumps(to_record(task)))
    old = record | {"metric": "accuracy", "label_names": list(task.labels)}
    assert from_record(record, "config.json: task") == task == from_record(old, "config.json: task")
    (tmp_path / "mood.toml").unlink()
    again = from_record(record, "config.json: task")  # a run that was moved to another machine
    asked = dict.fromkeys(again.columns.values(), "rain ||| snow" if name == "mrpc" else "rain")
    assert to_record(again) == record
    assert prompt_of(again, asked, "line 1") == prompt_of(task, asked, "line 1")
    if not task.builtin:
        refuses("mood.toml is gone; give the train rows by --data DIR", load_split, again, "train")


def test_a_task_of_a_file_of_rows_is_no_built_in_one_of_its_name(tmp_path: Path) -> None:
    record = to_record(user_task(tmp_path)) | {"name": "imdb", "path": str(tmp_path / "imdb.csv")}
    for _ in range(2):  # without the file, and with it
        task = from_record(record, "config.json: task")
        assert to_record(task) == record and not task.builtin
        refuses("imdb.csv .*; give the train rows by --data DIR", load_split, task, "train")
        with pytest.raises(TinyldError, match="unknown label '1'; allowed: sad, happy$"):  # what is 1 was never said
            read(tmp_path, "text,label\nsun,1\n", task, "imdb.csv")


def test_a_task_file_is_known_by_one_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = user_task(tmp_path).path
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert load_task(f"../{path.name}").path == load_task(f"./../sub/../{path.name}").path == path


def test_a_task_that_has_changed_since_is_refused_with_what_differs(tmp_path: Path) -> None:
    record = to_record(user_task(tmp_path))
    for old, new, what in (
        ("i feel", "i am", r"template was '{text} i feel {answer} \.', is '{text} i am {answer} \.'"),
        ('"very well"', '"good"', "verbalizer of happy was 'very well', is 'good';"),
        ('sad = "down"\nhappy = "very well"', 'happy = "very well"\nsad = "down"', "verbalizer was "),
    ):
        user_task(tmp_path, MOOD.replace(old, new))
        refuses(f"has changed since then in .*mood.toml.*{what}", from_record, record, "config.json: task")


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    damaged = to_record(user_task(tmp_path)) | {"template": 3}
    refuses("config.json: task: template: '3' is not of type str", from_record, damaged, "config.json: task")


FILE_ERRORS = [
    ("a.md", "text\n", [".tsv, .csv, .jsonl or .txt"]),
    ("a.csv", "text,label\n", ["there are no rows in it"]),
    ("a.csv", " \n\n", ["there are no rows in it"]),
    ("a.csv", "sun,1\nrain,0\n", ["line 2", "no column 'text'", "found 'sun, 1'", "[columns]"]),
    ("a.csv", "text,text\na,b\n", ["line 1", "each by a name of its own, got 'text, text'"]),
    ("a.csv", "text;note, label\nrain;4,5\n", ["may be parted by ',' or by ';'; put cells"]),
    ("a.csv", "sep=;\ntext;label\na;0\n", ["line 1", "this line must name the columns"]),
    ("a.csv", "text,label\na,0\nb,c,1\n", ["line 3", "3 columns", "header has 2", "stray ','"]),
    ("a.csv", "text|label\na, b|0\n", ["line 2", "header has 1", "parted by , ; or tabs"]),
    ("a.csv", "text,label\ncaf\xe9,0\n".encode("latin-1"), ["line 2: not UTF-8; save it as UTF-8 (Excel: CSV UTF-8)"]),
    ("a.tsv", "text\tlabel\na\t0\nb\n", ["line 3", "1 columns", "header has 2", r"stray '\t'"]),
    ("a.csv", 'text,label\na,0\n"b,1\nc,1\n', ["line 3", "quotes"]),
    ("a.tsv", 'text\tlabel\na\t0\n"b\nc"\t1\n', ["line 3", "several lines here", "save it with commas"]),
    ("a.tsv", 'label\ttext\n0\t"b\nc" d "\t1\n', ["line 3", "several lines here"]),
    ("a.csv", "text,label\na,0\nb,angry\x1b[2J\n", ["line 3", "'angry [2J'", "allowed: sad, happy, or", "0 to 1"]),
    ("a.csv", f"text,label\nb,{'9' * 5000}\n", ["unknown label '999", "...'"]),
    ("a.csv", "text,Label\na,0\n", ["no column 'label', found 'text, Label'", "by the task file's label_column"]),
    ("a.csv", b"text,label\na,0\nb\0,1\n", ["line 3: a zero byte"]),
    ("a.jsonl", "[1]\n", ["line 1", "not of type dict: give an object a line"]),
    ("a.jsonl", '{"text": "a", "label": 0}\n{"te\n', ["line 2", "damaged, not JSON"]),
]


ASK, LABELS = 'template = "{t} {answer}"\n', '[verbalizer]\na = "x"\nb = "y"\n'
TOML_ERRORS = [
    ("template = ", ["not valid TOML"]),
    ("", ["missing key 'template'"]),
    (f'{ASK}[verbalizer]\na = "x"\nb = 2\n', ["verbalizer: 'b'", "is not of type str"]),
    ('template = "{t} it was ."\n' + LABELS, ["must hold {answer} once"]),
    ('template = "{answer}"\n' + LABELS, ["must hold a column"]),
    ('template = "{t {answer}"\n' + LABELS, ["template", "for braces"]),
    ('template = "{t.x} {answer}"\n' + LABELS, ["plain name in braces"]),
    ('template = "{label} {answer}"\n' + LABELS, ["shows the label"]),
    (f'answer_column = "t"\n{ASK}', ["shows the label or the answer"]),
    (ASK, ["[verbalizer]", "answer_column"]),
    ('template = "{a} and {b}"', ["is one text and nothing else"]),
    (f'{ASK}[verbalizer]\na = "x"\n"a " = "y"\n', ["at least two labels, got 1"]),
    (f'{ASK}[verbalizer]\na = "x"\n"" = "y"\n', ["an empty label or answer"]),
    (f'answer_column = ""\n{ASK}{LABELS}', ["answer_column and answer_tokens are for tasks that write"]),
    (f'answer_column = "z"\n{ASK}{LABELS}', ["answer_column and answer_tokens are for tasks that write"]),
    (f'answer_column = "z"\nlabel_column = "z"\n{ASK}', ["label_column for label tasks"]),
    (f'answer_column = "z"\nanswer_tokens = 0\n{ASK}', ["answer_tokens must be at least 1"]),
    (f'name = "../up"\n{ASK}{LABELS}', ["name must be", "'../up'"]),
    (f'{ASK}{LABELS}[data]\nvalid = "x.tsv"\n', ["a split must be one of train, dev, test, got 'valid'"]),
    (f'{ASK}{LABELS}[columns]\nu = "x"\n', ["[columns] maps 'u'"]),
    (f'path = "x"\n{ASK}{LABELS}', ["unknown key 'path'; allowed: template", "answer_tokens, data"]),
    (f'text_column = "x"\n{ASK}{LABELS}', ['are in a table [columns], such as text = "message"']),
]


@pytest.mark.parametrize(("name", "content", "parts"), FILE_ERRORS + [("mood.toml", *of) for of in TOML_ERRORS])
def test_a_bad_file_is_refused_in_a_line_naming_it(tmp_path: Path, name: str, content: Any, parts: list[str]) -> None:
    with pytest.raises(TinyldError) as caught:
        user_task(tmp_path, content) if name == "mood.toml" else read(tmp_path, content, name=name)
    message, file = str(caught.value), str(tmp_path / name)
    assert message.startswith(file) and message.isprintable() and len(message) < len(file) + 300
    assert all(part in message for part in parts)


def test_places_are_searched_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place is filled in turn, the last searched first, and must then be the one that is read."""
    monkeypatch.setattr(rows, "bundled_data_dir", lambda: tmp_path / "bundled")
    monkeypatch.setenv("TINYLD_DATA", str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    folder, task = tmp_path / "given", replace(load_task("sst2"), download=None)
    for place, data in (
        ("bundled/sst2/dev.tsv", None), ("cache/data/sst2/dev.tsv", None), ("own/sst2/dev.tsv", None),
        ("given/dev.jsonl", folder), ("given/sst2/dev.csv", folder), ("file.tsv", tmp_path / "file.tsv"),
    ):  # fmt: skip
        sep = "," if place.endswith("csv") else "\t"
        row = json.dumps({"sentence": place, "label": 0})
        rows_file(tmp_path, place, row if place.endswith("jsonl") else f"sentence{sep}label\n{place}{sep}0\n")
        assert load_split(task, "dev", data)[0].before == f"{place} it was"
    for place in ("cache/data", "own"):
        rows_file(tmp_path, f"{place}/subj/train.tsv", "text\tlabel\na\t0\n")
    others = "no dev rows of subj in .*own/subj, which has train; rows from elsewhere may"
    refuses(others, load_split, load_task("subj"), "dev")
    rows_file(folder, "sst2/dev.tsv", "sentence\tlabel\na\t0\n")
    refuses("which are the dev rows: .*dev.tsv or .*dev.csv", load_split, task, "dev", folder)
    rows_file(tmp_path, "theirs/validation.csv", "sentence,label\na,0\n")
    assert len(load_split(task, "dev", tmp_path / "theirs")) == 1, "what others call it"


def test_rows_that_are_not_there_are_an_error_and_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user_task(tmp_path)
    for task, split, data, message in (
        ("sst2", "dev", tmp_path, "no dev rows of sst2 in .*: neither sst2/dev.tsv nor dev.tsv in it"),
        ("sst2", "dev", tmp_path / "nowhere", "no such file or folder"),
        ("sst2", "test", None, "no test rows of sst2: it has train, dev; give the test rows by --data DIR"),
        ("mood.toml", "test", None, "no test rows of mood: .*mood.toml names none; name their file in its .data. tab"),
        ("mood.toml", "train", None, "mood.csv: cannot be read .No such file"),
    ):
        refuses(message, load_split, load_task(task), split, data)
    refuses(r"no task 'ss\\x1bt'; built in: ag-news, .*reviews.*; or give a .toml file", load_task, "ss\x1bt")
    for name, cause in (("sst2", "could not download http://127.0.0.1:9"), ("webnlg", "no official download")):
        with pytest.raises(TinyldError, match=cause) as caught:
            load_split(load_task(name), "train")
        columns = "input, references" if name == "webnlg" else "sentence, label"
        assert f"put the file ({columns} columns) at {tmp_path}/cache/data/{name}/train.tsv" in str(caught.value)
        assert f"DIR/{name}/train.tsv with --data DIR" in str(caught.value)
    assert not list(tmp_path.rglob("*.tsv")) and not (tmp_path / "cache").exists()
    monkeypatch.setenv("TINYLD_DATA", "/no/such/folder")
    refuses("TINYLD_DATA=/no/such/folder is no folder", load_split, load_task("sst2"), "dev")


def test_built_in_tasks_are_whole() -> None:
    for task in map(load_task, builtin_names()):
        assert load_task(task.name) == task and task.description and task.builtin
        assert all(" " not in words and words == words.lower() for words in task.verbalizer.values())
        for url, digest in task.download.files.items() if task.download else ():
            assert url.startswith("https://") and re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{64}", digest)


@pytest.mark.skipif(not (bundled_data_dir() / "reviews").is_dir(), reason="the bundled data is not here")
@pytest.mark.parametrize("name", ["reviews", "topics", "write"])
def test_bundled_tasks_need_no_network_and_no_files(name: str) -> None:
    for split in SPLITS:
        examples = load_split(task := load_task(name), split)
        assert len(examples) >= 100
        assert {e.label for e in examples} == (set(range(len(task.labels))) or {None})
    if name == "write":
        assert {e.before for e in examples} == {"a negative review :", "a positive review :"}


@pytest.mark.skipif(not SHARED.is_dir(), reason="no data sets in shared/data")
def test_real_data_has_every_label_and_the_published_counts() -> None:
    for task in map(load_task, (n for n in builtin_names() if (SHARED / n).is_dir())):
        names = (SHARED / task.name / "labels.txt").read_text().split() if task.labels else []
        assert task.labels == tuple(names[: len(task.labels)])
        for split in task.splits:
            examples = load_split(task, split, SHARED)
            assert {e.label for e in examples} == (set(range(len(task.labels))) or {None})
            if task.name in ("sst2", "cola", "rte", "mrpc") or (split == "test" and task.name in ("trec", "ag-news")):
                assert len(examples) == task.download.rows[split]


def test_every_label_that_is_written_as_another_word_is_said() -> None:
    words = {f"number {letter}": letter for letter in "abcdefgh"}
    said = described(Task("{text} {answer}", "t", "", words))
    assert all(f"{label} (written {word!r})" in said for label, word in words.items())
    assert "8 (a, b, c, d, e, f, ...)" in described(Task("{text} {answer}", "t", "", {k: k for k in "abcdefgh"}))

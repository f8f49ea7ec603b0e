"""Tasks: what a TOML and a file of rows become, and the one line a user reads when either is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tinyld import rows, tasks
from tinyld.errors import TinyldError, UsageError
from tinyld.rows import GAPS, to_learn
from tinyld.tasks import (
    Example,
    builtin_names,
    builtin_tasks,
    bundled_data_dir,
    from_record,
    load_split,
    load_task,
    prompt_of,
    to_record,
)

SHARED = Path(__file__).parents[2] / "shared" / "data"
LABEL_TASKS = [task.name for task in builtin_tasks() if not task.is_generation]
MOOD = """
template = "{text} i feel {answer} ."
[verbalizer]
sad = "down"
happy = "very well"
[data]
train = "mood.csv"
dev = "mood.jsonl"
"""


pytestmark = pytest.mark.usefixtures("elsewhere")


def user_task(folder: Path, toml: str = MOOD) -> tasks.Task:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mood.toml").write_text(toml)
    return load_task(str(folder / "mood.toml"))


def rows_file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_row_becomes_the_text_around_the_answer(tmp_path: Path) -> None:
    rows_file(tmp_path, "mood.csv", 'text,label\n"rain, again",sad\nsun,happy\n')
    train = load_split(user_task(tmp_path), "train")
    assert train == [Example("rain, again i feel", ".", "down", 0), Example("sun i feel", ".", "very well", 1)]


def test_fields_of_one_column_are_parted_in_it(tmp_path: Path) -> None:
    file = rows_file(tmp_path, "train.tsv", "sentence\tlabel\nit rains ||| it is wet\t1\n")
    expected = Example("it rains ?", ", it is wet", "yes", 1)
    assert load_split(load_task("mrpc"), "train", data=tmp_path) == [expected]
    for text in ("only one half", "a ||| b ||| c", "a |||"):
        rows_file(tmp_path, "train.tsv", f"sentence\tlabel\n{text}\t1\n")
        with pytest.raises(TinyldError, match=r"line 2: column 'sentence' must hold 2 texts with ' \|\|\| ' between"):
            load_split(load_task("rte"), "dev", file=file)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", 'text\tlabel\nsaid "no\tsad\n'),
        ("a.TSV", 'text\tlabel\r\nsaid "no\t0\r\n\r\n'),
        ("a.csv", 'label,text\nsad,"said ""no"\n'),
        ("a.jsonl", '{"label": 0, "text": "said \\"no"}\n\n'),
        ("a.jsonl", '\ufeff{"text": " said\\n\\t \\"no ", "label": "sad", "more": [1]}'),
        ("a.tsv", '\ufefftext\tlabel\nsaid\x00\x1b \u2028"no\tsad\n'),
    ],
)
def test_every_file_format_reads_the_same(tmp_path: Path, name: str, content: str) -> None:
    file = rows_file(tmp_path, name, content)
    assert load_split(user_task(tmp_path), "train", file=file) == [Example('said "no i feel', ".", "down", 0)]


def test_columns_of_other_names_are_mapped(tmp_path: Path) -> None:
    toml = 'label_column = "y"\n' + MOOD + '[columns]\ntext = "x"\n'
    file = rows_file(tmp_path, "a.csv", "x,y\nsun,happy\n,\n")
    assert load_split(user_task(tmp_path, toml), "dev", file=file) == [Example("sun i feel", ".", "very well", 1)]


@pytest.mark.parametrize(
    ("names", "labels", "found"),
    [
        (("sad", "happy"), ("1", "0"), [1, 0]),
        (("sad", "happy"), ("happy", "sad"), [1, 0]),
        (("1", "0"), ("1", "0"), [0, 1]),
        (("sad", "happy"), ("1", "sad"), None),
        (("sad", "happy"), ("sad", "1"), None),
        (("1", "2", "3"), ("0", "1"), None),
        (("1", "2", "3"), ("0", "0"), None),
        (("sad", "happy"), ("01", "0"), None),
        (("-1", "+1"), ("0", "1"), None),
        (("1.0", "2.0"), ("1", "0"), None),
    ],
)
def test_labels_are_all_names_or_all_numbers_that_are_no_names(
    tmp_path: Path, names: tuple[str, ...], labels: tuple[str, ...], found: list[int] | None
) -> None:
    words = "".join(f'"{name}" = "word{i}"\n' for i, name in enumerate(names))
    task = user_task(tmp_path, 'template = "{text} {answer}"\n[verbalizer]\n' + words)
    file = rows_file(tmp_path, "a.csv", "text,label\n" + "".join(f"x,{label}\n" for label in labels))
    if found is not None:
        assert [example.label for example in load_split(task, "dev", file=file)] == found
        return
    with pytest.raises(TinyldError, match="unknown label .*; allowed: "):
        load_split(task, "dev", file=file)


def test_limit_reads_the_first_rows_only(tmp_path: Path) -> None:
    file = rows_file(tmp_path, "a.csv", "text,label\na,sad\nb,sad\nc,unheard of\n")
    assert [e.before[0] for e in load_split(user_task(tmp_path), "train", file=file, limit=2)] == ["a", "b"]
    with pytest.raises(UsageError, match="at least 1, got 0"):
        load_split(user_task(tmp_path), "train", file=file, limit=0)


def test_a_generation_task_of_the_user_reads_its_answer_from_a_column(tmp_path: Path) -> None:
    toml = 'template = "{label} : {answer}"\nanswer_column = "reply"\nanswer_tokens = 8\n[data]\ntrain = "a.csv"\n'
    rows_file(tmp_path, "a.csv", "label,reply\nhello,good day\n")
    task = user_task(tmp_path, toml)
    assert (task.is_generation, task.labels, task.answer_tokens, task.metric) == (True, (), 8, "nll")
    assert load_split(task, "train") == [Example("hello :", "", "good day", None)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "label,reply\nhello,good day ||| hi there\n"),
        ("a.jsonl", '{"label": "hello", "reply": ["good day", " hi  there"]}\n'),
        ("a.jsonl", '{"label": "hello", "reply": "good day|||hi there"}\n'),
    ],
)
def test_a_row_may_have_several_references(tmp_path: Path, name: str, content: str) -> None:
    task = user_task(tmp_path, 'template = "{label} : {answer}"\nanswer_column = "reply"\n')
    (example,) = load_split(task, "train", file=rows_file(tmp_path, name, content))
    assert example == Example("hello :", "", "good day", None, ("good day", "hi there"))
    assert [(e.before, e.answer) for e in example.each()] == [("hello :", "good day"), ("hello :", "hi there")]
    assert Example("a", "b", "c", 0).each() == [Example("a", "b", "c", 0)]


@pytest.mark.parametrize("reply", ["[]", '["a", ""]', '["a", ["b"]]', '"a ||| "', "[[1]]", "null"])
def test_references_that_are_none_are_refused(tmp_path: Path, reply: str) -> None:
    task = user_task(tmp_path, 'template = "{label} : {answer}"\nanswer_column = "reply"\n')
    with pytest.raises(
        TinyldError, match=r"a.jsonl: line 1: column 'reply' (is empty|is an empty list|must hold text)"
    ):
        load_split(task, "dev", file=rows_file(tmp_path, "a.jsonl", f'{{"label": "x", "reply": {reply}}}'))


INFILL = 'template = "{text}"\nanswer_tokens = 6\n[data]\ntrain = "texts.txt"\n'


def test_a_text_file_makes_a_task_that_fills_gaps(tmp_path: Path) -> None:
    lines = ["the rain fell on the town all day", "sun", "a form ____ with a _____ gap"]
    rows_file(tmp_path, "texts.txt", "\n\n".join(lines))
    task = user_task(tmp_path, INFILL)
    assert (task.is_infill, task.is_generation, task.answer_tokens, task.labels) == (True, True, 6, ())
    examples = load_split(task, "train")
    whole = [" ".join(f"{e.before} {e.answer} {e.after}".split()) for e in examples]
    assert whole == [lines[0], "sun", "a form with a gap"]
    assert all(1 <= len(e.answer.split()) <= 3 for e in examples), "half as many words as the answer has tokens"
    assert examples == load_split(task, "train"), "the gaps of a text are always the same"
    learnt = to_learn(task, examples)
    assert len(learnt) == GAPS * 3 and len({(e.before, e.after) for e in learnt[:GAPS]}) > 1
    assert {len(e.answer.split()) for e in examples[0].cut(200, 3)} == {1, 2, 3}
    assert (
        {e.before == "" for e in examples[0].cut(200, 3)}
        == {e.after == "" for e in examples[0].cut(200, 3)}
        == {True, False}
    )


def test_a_gap_is_asked_for_where_it_is_marked(tmp_path: Path) -> None:
    task = user_task(tmp_path, INFILL)
    assert prompt_of(task, {"text": "the rain ____ on us"}, "") == Example("the rain", "on us", "", None)
    assert prompt_of(task, {"text": "_____"}, "") == Example("", "", "", None)
    for text, count in (("the rain", 0), ("a ____ b ___ c", 2)):
        with pytest.raises(UsageError, match=f"line 3: {count} gaps in the text; mark one with ____"):
            prompt_of(task, {"text": text}, "line 3")


def test_webnlg_has_its_official_rows_and_several_references() -> None:
    if not (SHARED / "webnlg").is_dir():
        pytest.skip("no such data set in shared/data")
    found = {split: load_split(load_task("webnlg"), split, data=SHARED) for split in tasks.SPLITS}
    assert [len(rows) for rows in found.values()] == [6_940, 872, 971]
    assert [sum(len(e.each()) for e in rows) for rows in found.values()] == [18_102, 2_268, 2_495]


WRITER = 'template = "a {label} review : {answer}"\nrows_from = "%s"\n'


def test_a_task_that_writes_borrows_rows_and_label_words_of_a_label_task(tmp_path: Path) -> None:
    rows_file(tmp_path, "sst2/dev.tsv", "sentence\tlabel\na fine film\t1\n")
    task = user_task(tmp_path, WRITER % "sst2")
    assert task.metric == "nll" and task.answer_tokens > 0
    assert load_split(task, "dev", data=tmp_path) == [Example("a positive review :", "", "a fine film", None)]
    for lender in ("mrpc", "write", "nope"):
        with pytest.raises(TinyldError, match="cannot write the rows of|no task"):
            user_task(tmp_path, WRITER % lender)


# ---------------------------------------------------------------------------------------------- a run's record


@pytest.mark.parametrize("name", ["reviews", "mrpc", "write", "mood.toml"])
def test_a_task_comes_back_from_its_record(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    user_task(tmp_path)
    task = load_task(name)
    record = json.loads(json.dumps(to_record(task)))
    again = from_record(record, "config.json: task")
    assert to_record(again) == record and again.splits == task.splits and again.name == task.name
    (tmp_path / "mood.toml").unlink()
    again = from_record(record, "config.json: task")  # a run that was moved to another machine
    asked = {column: "rain" for column in again.columns.values()} | {"label": again.label_names[0]}
    asked |= {"sentence": "rain ||| snow"} if name == "mrpc" else {}
    assert to_record(again) == record
    assert prompt_of(again, asked, "line 1") == prompt_of(task, asked, "line 1")
    if not task.builtin:
        with pytest.raises(TinyldError, match="mood.toml is gone; give the train rows by --data DIR"):
            load_split(again, "train")


def test_a_task_of_a_file_of_rows_is_no_built_in_one_of_its_name(tmp_path: Path) -> None:
    record = to_record(user_task(tmp_path)) | {"name": "imdb", "path": str(tmp_path / "imdb.csv")}
    for _ in range(2):  # without the file, and with it
        task = from_record(record, "config.json: task")
        assert (
            to_record(task) == record and not task.builtin and task.verbalizer == {"sad": "down", "happy": "very well"}
        )
        with pytest.raises(TinyldError, match="imdb.csv .*; give the train rows by --data DIR"):
            load_split(task, "train")
        file = rows_file(tmp_path, "imdb.csv", "text,label\nsun,1\n")
        with pytest.raises(TinyldError, match="unknown label '1'; allowed: sad, happy$"):  # what is 1 was never said
            load_split(task, "dev", file=file)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("i feel", "i am", "template was '{text} i feel {answer} .', is '{text} i am {answer} .'"),
        ('"down"', '"low"', "verbalizer was "),
        ("{text}", "{words}", "columns was "),
        ('sad = "down"\nhappy = "very well"', 'happy = "very well"\nsad = "down"', "label_names was "),
    ],
)
def test_a_task_that_has_changed_since_is_refused_with_what_differs(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    record = to_record(user_task(tmp_path))
    user_task(tmp_path, MOOD.replace(old, new))
    with pytest.raises(TinyldError, match="has changed since then in .*mood.toml") as raised:
        from_record(record, "config.json: task")
    assert message in str(raised.value)
    with pytest.raises(TinyldError, match="template was 'x {sentence} {answer}'"):
        from_record(to_record(load_task("reviews")) | {"template": "x {sentence} {answer}"}, "config.json: task")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": 3}, "template: '3' is not of type str"),
        ({"template": "no slot"}, "must hold {answer} once"),
        ({"verbalizer": {"a": "x"}}, "at least two labels"),
        ({"verbalizer": {"a": 1, "b": "y"}}, "verbalizer: 'a': '1' is not of type str"),
        ({"metric": None}, "metric: 'None' is not of type str"),
        ({"more": 1}, "unknown key 'more'"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    record = to_record(user_task(tmp_path))
    with pytest.raises(TinyldError) as raised:
        from_record(record | change, "config.json: task")
    assert message in str(raised.value) and "config.json: task" in str(raised.value)
    with pytest.raises(TinyldError, match="config.json: task: .*template"):
        from_record({"name": "reviews", "path": None}, "config.json: task")


FILE_ERRORS = [
    ("missing.csv", None, ["missing.csv: no such file"]),
    ("a.txt", "text\n", ["a.txt", ".tsv, .csv, .jsonl"]),
    ("a.csv", "", ["a.csv: the file is empty"]),
    ("a.jsonl", " \n\n", ["a.jsonl: the file is empty"]),
    ("a.csv", "text,label\n", ["a.csv: a header but no rows"]),
    ("a.csv", "sun,1\nrain,0\n", ["line 2", "no column 'text'", "found 'sun, 1'", "[columns]"]),
    ("a.jsonl", '{"txt": 1}\n', ["line 1", "no column 'text'", "'txt'"]),
    ("a.csv", "text,text\na,b\n", ["line 1", "two columns of one name"]),
    ("a.csv", "text,label\na,0\nb,c,1\n", ["line 3", "3 columns", "header has 2", "stray ','"]),
    ("a.tsv", "text\tlabel\na\t0\nb\n", ["line 3", "1 columns", "header has 2", r"stray '\t'"]),
    ("a.csv", 'text,label\na,0\n"b,1\n', ["line 3", "quotes"]),
    ("a.csv", "text,label\na,0\nb,angry\x1b[2J\n", ["line 3", "'angry [2J'", "0 or sad, 1 or happy"]),
    ("a.csv", "text,label\nb,2\n", ["unknown label '2'"]),
    ("a.csv", "text,label\nb,-1\n", ["unknown label '-1'"]),
    ("a.csv", f"text,label\nb,{'9' * 5000}\n", ["unknown label '999", "...'"]),
    ("a.csv", "text,label\n \t,0\n", ["line 2", "'text' is empty"]),
    ("a.csv", "text,label\na,\n", ["line 2", "'label' is empty"]),
    ("a.csv", b"text,label\na,0\ncaf\xe9,0\n", ["line 3", "not UTF-8", "byte 18 "]),
    ("a.jsonl", "{\n", ["line 1", "not JSON"]),
    ("a.jsonl", "[" * 100_000 + "\n", ["line 1", "not JSON"]),
    ("a.jsonl", "[1]\n", ["line 1", "expected an object"]),
    ("a.jsonl", '{"text": null, "label": 0}\n', ["line 1", "'text' must hold text or a number", "'None'"]),
    ("a.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "label": [0]}\n', ["line 2", "'label' must hold"]),
]


@pytest.mark.parametrize(("name", "content", "parts"), FILE_ERRORS)
def test_a_bad_file_is_refused_in_one_line_that_names_it(
    tmp_path: Path, name: str, content: str | bytes | None, parts: list[str]
) -> None:
    file = rows_file(tmp_path, name, content) if content is not None else tmp_path / name
    with pytest.raises(TinyldError) as caught:
        load_split(user_task(tmp_path), "train", file=file)
    message = str(caught.value)
    assert message.startswith(str(file)) and message.isprintable() and len(message) < len(str(file)) + 300
    for part in parts:
        assert part in message


VERBALIZER = '[verbalizer]\na = "x"\nb = "y"\n'
TOML_ERRORS = [
    ("template = ", ["not valid TOML"]),
    ("", ["missing key 'template'"]),
    ('template = "{t} {answer}"\ntemplat = 1\n', ["unknown key 'templat'", "allowed: template"]),
    ("template = 5", ["5", "str"]),
    ('template = "{t} it was ."\n' + VERBALIZER, ["must hold {answer} once, not 0"]),
    ('template = "{answer} {t} {answer}"\n' + VERBALIZER, ["once, not 2"]),
    ('template = "{t {answer}"\n' + VERBALIZER, ["template", "for braces"]),
    ('template = "{} {answer}"\n' + VERBALIZER, ["plain name in braces"]),
    ('template = "{t.x} {answer}"\n' + VERBALIZER, ["plain name in braces"]),
    ('template = "{t!r} {answer}"\n' + VERBALIZER, ["plain name in braces"]),
    ('template = "{answer}"\n' + VERBALIZER, ["names no column"]),
    ('template = "{label} {answer}"\n' + VERBALIZER, ["shows the label"]),
    ('template = "{t} {answer}"\ncolumns = {t = "label"}\n' + VERBALIZER, ["shows the label"]),
    ('template = "{t} {answer}"\n', ["[verbalizer]", "answer_column"]),
    ('template = "{t} {answer}"\n[verbalizer]\na = "x"\n', ["at least two labels"]),
    ('template = "{t} {answer}"\n[verbalizer]\na = "x"\nb = "X "\n', ["'a' and 'b' share the answer 'X'"]),
    ('template = "{t} {answer}"\n[verbalizer]\na = "x"\nb = " "\n', ["empty label or answer at 'b'"]),
    ('template = "{t} {answer}"\n[verbalizer]\na = "x"\nb = 2\n', ["verbalizer: 'b'", "is not of type str"]),
    ('template = "{t} {answer}"\nmetric = "f1"\n' + VERBALIZER, ["metric must be one of accuracy, nll", "'f1'"]),
    ('template = "{t} {answer}"\nanswer_column = "z"\n' + VERBALIZER, ["answer_column is for generation tasks"]),
    ('template = "{t} {answer}"\nanswer_column = "z"\nanswer_tokens = 0\n', ["answer_tokens must be at least 1"]),
    ('template = "{t} {answer}"\nanswer_column = "z"\nmetric = "accuracy"\n', ["metric must be one of nll"]),
    ('template = "{t} {answer}"\nname = "../up"\n' + VERBALIZER, ["name must be", "'../up'"]),
    (
        'template = "{t} {answer}"\n' + VERBALIZER + '[data]\nvalid = "x.tsv"\n',
        ["unknown split 'valid'", "train, dev, test"],
    ),
    ('template = "{t} {answer}"\n' + VERBALIZER + '[columns]\nu = "x"\n', ["[columns] maps 'u'"]),
    ('template = "{t} {answer}"\nsplits = ["dev"]\n' + VERBALIZER, ["for built-in tasks; use [data]"]),
    ('template = "{answer}"\nrows_from = "mood.toml"\n', ["cannot write the rows of", "mood.toml"]),
]


@pytest.mark.parametrize(("toml", "parts"), TOML_ERRORS)
def test_a_bad_task_file_is_refused_in_one_line_that_names_it(tmp_path: Path, toml: str, parts: list[str]) -> None:
    with pytest.raises(TinyldError) as caught:
        user_task(tmp_path, toml)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "mood.toml")) and message.isprintable()
    for part in parts:
        assert part in message


def test_an_unknown_task_lists_the_built_in_ones() -> None:
    with pytest.raises(TinyldError, match=r"no task 'ss\\x1bt'; built in: ag-news, .*reviews.*; or give a .toml file"):
        load_task("ss\x1bt")


# ---------------------------------------------------------------------------------------------- finding files


def test_places_are_searched_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place is filled in turn, the last searched first, and must then be the one that is read."""
    monkeypatch.setattr(rows, "bundled_data_dir", lambda: tmp_path / "bundled")
    monkeypatch.setenv("TINYLD_DATA", str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    folder, task = tmp_path / "given", replace(load_task("sst2"), download=None)
    places = [
        tmp_path / "bundled/sst2/dev.tsv",
        tmp_path / "cache/data/sst2/dev.tsv",
        tmp_path / "own/sst2/dev.tsv",
        folder / "dev.jsonl",
        folder / "sst2/dev.csv",
        tmp_path / "file.tsv",
    ]
    for i, place in enumerate(places):
        text, sep = f"row {i}", "," if place.suffix == ".csv" else "\t"
        row = json.dumps({"sentence": text, "label": 0})
        rows_file(tmp_path, str(place), row if place.suffix == ".jsonl" else f"sentence{sep}label\n{text}{sep}0\n")
        data = folder if i >= 3 else None
        file = place if place.name == "file.tsv" else None
        assert load_split(task, "dev", data=data, file=file)[0].before == f"row {i} it was"
    rows_file(tmp_path, str(folder / "sst2/dev.tsv"), "sentence\tlabel\na\t0\n")
    with pytest.raises(TinyldError, match="which are the dev rows: .*dev.tsv or .*dev.csv"):
        load_split(task, "dev", data=folder)


def test_rows_that_are_not_there_are_an_error_and_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user_task(tmp_path)
    for task, split, data, message in (
        ("sst2", "dev", tmp_path, "no dev rows of sst2 in .*: neither sst2/dev.tsv nor dev.tsv in it"),
        ("sst2", "dev", tmp_path / "nowhere", "no such folder"),
        ("sst2", "test", None, "task sst2 has no test split; it has train, dev"),
        ("sst2", "valid", None, "split must be one of train, dev, test, got 'valid'"),
        (str(tmp_path / "mood.toml"), "test", None, "mood.toml has no test split; it has train, dev"),
        (str(tmp_path / "mood.toml"), "train", None, "mood.csv: no such file"),
    ):
        with pytest.raises(TinyldError, match=message):
            load_split(load_task(task), split, data)
    monkeypatch.setenv("TINYLD_DATA", "/no/such/folder")
    with pytest.raises(TinyldError, match="TINYLD_DATA=/no/such/folder is no folder"):
        load_split(load_task("sst2"), "dev")


@pytest.mark.parametrize("name", [n for n in builtin_names() if n not in ("reviews", "topics", "write")])
def test_offline_the_error_says_which_file_to_put_where(tmp_path: Path, name: str) -> None:
    with pytest.raises(TinyldError) as caught:
        load_split(load_task(name), "train")
    message = str(caught.value)
    columns = "input, references" if name == "webnlg" else "sentence, label"
    assert f"put the file ({columns} columns) at {tmp_path}/cache/data/{name}/train.tsv" in message
    assert f"DIR/{name}/train.tsv with --data DIR" in message and "task reviews needs no download" in message
    bare = name in ("sst2-sentences", "rt-critics", "webnlg")
    cause = "no official download" if bare else "could not download http://127.0.0.1:9"
    assert cause in message and message.isprintable()
    assert not list(tmp_path.rglob("*.tsv")) and not list(tmp_path.rglob("*.part"))


# ---------------------------------------------------------------------------------------------- the built-in tasks


@pytest.mark.parametrize("name", LABEL_TASKS)
def test_built_in_label_tasks_are_whole(name: str) -> None:
    task = load_task(name)
    assert task.name == name and task.description and task.metric == "accuracy" and task.builtin
    assert task.labels == tuple(task.verbalizer) and task.answer_tokens == 0
    assert all(" " not in words and words == words.lower() for words in task.verbalizer.values())
    for counts in task.label_counts.values():
        assert tuple(counts) == task.labels
    for remote in task.download.files if task.download else ():
        assert remote.url.startswith("https://") and len(remote.sha256 or "0" * 64) == 64


@pytest.mark.parametrize("name", ["reviews", "topics", "write"])
@pytest.mark.parametrize("split", tasks.SPLITS)
def test_bundled_tasks_need_no_network_and_no_files(name: str, split: str) -> None:
    if not (bundled_data_dir() / "reviews").is_dir():
        pytest.skip("the bundled data is not here")
    task = load_task(name)
    examples = load_split(task, split)
    assert len(examples) >= 100
    assert {e.label for e in examples} == ({None} if task.is_generation else set(range(len(task.labels))))


@pytest.mark.parametrize("name", [name for name in LABEL_TASKS if name not in ("reviews", "topics")])
def test_real_data_matches_the_labels_and_counts(name: str) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip("no such data set in shared/data")
    task = load_task(name)
    assert task.labels == tuple((SHARED / name / "labels.txt").read_text().split("\n")[: len(task.labels)])
    for split in task.splits:
        examples = load_split(task, split, data=SHARED)
        assert {e.label for e in examples} == set(range(len(task.labels)))
        if name in ("sst2", "cola", "rte", "mrpc") or (split == "test" and name in ("trec", "ag-news")):
            assert len(examples) == task.rows[split]


def test_importing_tasks_loads_nothing_slow() -> None:
    slow = ("torch", "numpy", "rich", "urllib.request", "zipfile", "tarfile", "ssl")
    code = f"import sys, tinyld.tasks; print([m for m in {slow!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

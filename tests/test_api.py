"""Python: rows in, a run out; and a CSV alone on the command line. On a tiny base."""

import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock
from uuid import UUID

import numpy as np
import pytest
import torch
from conftest import QUICK, ROWS, assert_refused, cli, good, handling, python, refuses

import tinyld
from tinyld import finetuning, from_python
from tinyld.datafile import answer_words
from tinyld.interrupt import Interrupted
from tinyld.methods import METHODS
from tinyld.options import FinetuneOptions
from tinyld.rows import bundled_data_dir
from tinyld.runs import RunFolder, environment
from tinyld.tokenizer import Tokenizer

OURS = "trajectory-lora"
pytestmark = pytest.mark.usefixtures("elsewhere")


def made_on(place: Path) -> list[object]:
    """Options of finetune: a run of two steps in `run`."""
    return ["--base", place / "base", "--steps", 2, "--method", "bitfit", "--out", "run"]


def test_the_package_is_typed_and_has_no_other_names() -> None:
    assert (Path(tinyld.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        tinyld.nonsense  # noqa: B018


def test_rows_become_a_task_and_a_loaded_run(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tinyld.finetune(ROWS, base=place / "base", out="runs/mine", **QUICK)
    assert capfd.readouterr() == ("", ""), "it is silent"
    found = run.predict(["rain", "sun"])
    assert [f["text"] for f in found] == ["rain", "sun"] and {f["label"] for f in found} <= {"sad", "happy"}
    assert run.predict("rain") == found[:1] or run.predict("rain")[0]["label"] == found[0]["label"]
    config = RunFolder(Path("runs/mine")).config
    assert config["task"]["verbalizer"] == {"sad": "sad", "happy": "happy"} and config["data"]["held_out"]
    assert config["data"]["rows"] == 36, "of 40, four are held out"
    (scores,) = good("eval", "runs/mine", "--json").json
    assert scores["n"] == 4 and scores["task"] == "mine-rows"
    assert "is finished already" in good("finetune", "--resume", "runs/mine", "--json").stderr
    assert tinyld.load("runs/mine", base=place / "base").predict("rain")[0]["label"] == found[0]["label"]


class Frame:
    """As a DataFrame of pandas: an iteration gives the names of its columns."""

    columns = ("message", "kind", "day")

    def __init__(self, *rows: tuple[Any, ...]):
        self.rows = rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def to_dict(self, orient: str) -> list[dict[str, Any]]:
        assert orient == "records"
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def test_a_table_of_pandas_is_its_rows(place: Path) -> None:
    columns, day = {"text_column": "message", "label_column": "kind"}, date(2020, 1, 1)
    run = tinyld.finetune(Frame(*((*row, day) for row in ROWS)), base=place / "base", out="mine", **columns, **QUICK)
    (found,) = run.predict(Frame(("rain", "n/a", day)))
    assert (found["text"], found["kind"], found["day"]) == ("rain", "n/a", day)
    assert found["label"] in run.tasks[0].labels


def learning(*rows: Any, **more: Any) -> Any:
    return lambda run, base: tinyld.finetune(list(rows), **{"base": base, "out": "mine"} | QUICK | more)


@pytest.mark.parametrize(("call", "part"), [
    (learning(*ROWS, method="magic"), "--method must be one of"),
    (learning(*ROWS, lr="fast"), "--lr: 'fast' is not a number"), (learning(*ROWS, base=3), "--base: '3' is not of"),
    (learning(*ROWS, method=OURS, ranks=64), "ranks needs 3 values"),
    (learning(("a", "b", "c")), "a row is"), (learning(1, 2), "a row is"),
    (learning(("rain", ""), ("sun", "happy")), "line 1: column 'label' is empty; fill it in or delete the row"),
    (learning(("a", "x"), (" ", "y"), ("", "x")), "line 2: column 'text' is empty, as it is in 1 more of 3 rows"),
    (learning(("rain", None), ("sun", "happy")), "line 1: column 'label' has no value; fill it in"),
    (learning(("rain", {1}), ("sun", "happy")), "a row holds texts and numbers"),
    (learning(*((str(i), f"l{i}") for i in range(9))), "9 different labels"),
    (learning(("a", "Good"), ("b", "good")), "'Good' and 'good' look like one label"),
    (learning(("a", 1), ("b", "1.0")), "'1' and '1.0' look like one label"),
    (learning(("a", "é"), ("b", "e\u0301")), "look like one label"),
    (learning(("a", "sad"), ("b", "sad\u200b")), "look like one label"),
    (lambda run, base: tinyld.load(None), "runs are a list, one column of a table, or one of them, got 'None'"),
    (lambda run, base: tinyld.load([run.path], task="mine"), "task and reading are for one run"),
    (lambda run, base: tinyld.load(run.path, base=base, device=torch.device("cpu")), "device must be auto, cpu"),
    (lambda run, base: tinyld.finetune("x" * 5000), "no task 'xxx"),
    (lambda run, base: tinyld.load(run.path, base="x" * 5000), "no run in xxx"),
    (lambda run, base: tinyld.load(run.path, base=5), "a base is the path of its folder, got 5"),
    (lambda run, base: tinyld.load(run.path, task="reviews"), "was made for another task"),
    (lambda run, base: run.predict(np.array("rain")), "texts are a list"),
    (lambda run, base: run.predict([{"text": np.array([1, 2])}]), "text 1: column 'text' must hold text or a number"),
    (lambda run, base: run.predict(["rain", float("nan")]), "text 2: column 'text' has no value; fill it in"),
    (lambda run, base: run.predict("rain", column="x"), "there is no option 'column'; allowed: sampler, steps"),
    (lambda run, base: run.write([5]), "a prompt is a text"),
    (lambda run, base: run.write("a {answer} {answer}"), "holds {answer} once"),
    (lambda run, base: run.write("a ____ b"), "a place in a prompt is marked by {answer}"),
    (lambda run, base: run.write("a", length="4"), "length must be a whole number"),
    (lambda run, base: run.write("a", temperature=1e-9), "temperature must be 0, or at least 0.001"),
    (lambda run, base: run.write("a", lenghts=3), "there is no option 'lenghts'; allowed: sampler"),
    (lambda run, base: run.predict(type("Table", (list,), {"columns": 1})()), "one column of a table"),
    (lambda run, base: tinyld.finetune(""), "no task ''"),
    (lambda run, base: tinyld.finetune(ROWS, out=b"o"), "out is the path of a folder"),
    (lambda run, base: tinyld.finetune(ROWS, out="o", rang=4), "there is no option 'rang'; allowed: "),
    (lambda run, base: tinyld.finetune(ROWS, out="o", data="x.csv"), "no option data here"),
])  # fmt: skip
def test_what_makes_no_task_or_is_of_another_kind_is_refused(call: Any, part: str, place: Path) -> None:
    run = tinyld.load(place / "mood")
    with pytest.raises(tinyld.TinyldError, match=re.escape(part)) as caught:
        call(run, place / "base")
    assert not list(Path().iterdir()) and os.getcwd() not in str(caught.value), "no file that is there no more"


def test_what_was_trained_is_counted_with_the_units_that_were_dropped(place: Path) -> None:
    tinyld.finetune(ROWS, base=place / "base", out="run", ranks="auto", budget="9%", steps=5, quiet=True)
    counts = RunFolder(Path("run")).config["parameters"]
    assert counts["trainable_parameters"] == 2 * counts["stored_parameters"] > 0


def test_what_tables_hold_besides_texts_does_no_harm(place: Path) -> None:
    learn = partial(tinyld.finetune, base=place / "base", **QUICK)
    rows = [{"text": f"{text} \ud83d", "label": label, "note": float("nan")} for text, label in ROWS]
    run = learn(rows, out="mine")
    assert run.predict(np.array([1, 2]))[0]["text"] == 1
    assert run.predict([{"text": "rain", "n": np.float32(3)}])[0]["n"] == 3.0
    odd = {"size": float("inf"), "price": Decimal("1.5"), "id": UUID(int=0)}
    assert learn([row | odd for row in rows], out="odd").tasks[0].labels == run.tasks[0].labels
    numbered = learn(
        [{0: f"{text} {i}", 1: int(label == "sad")} for i, (text, label) in enumerate(ROWS)], out="numbered"
    )
    assert numbered.predict([{0: "rain", 1: 0}])[0]["label"] in ("0", "1"), "columns of a table without names"
    assert len(learn(np.array(ROWS), out="array", steps=np.int64(1)).tasks[0].labels) == 2
    assert len(run.write("rain \ud83d", length=2)) == 1
    assert learn([(t, np.int64(k == "sad")) for t, k in ROWS], out="n").tasks[0].labels == ("0", "1")
    with pytest.raises(tinyld.TinyldError, match="line 2: column 'text' has no value; fill it in or delete the row"):
        learn([rows[0], rows[1] | {"text": float("nan")}], out="other")
    refuses("text 1: column 'text' holds a number of thousands of digits", run.predict, [10**5000])
    ids = learn([("rain", 2**53 + (k == "sad")) for _, k in ROWS], out="ids").tasks[0].labels
    assert ids == (f"{2**53}", f"{2**53 + 1}")
    learn(ROWS, out="zero", template="{text}\0{answer} \udce9")


@pytest.mark.parametrize("method", METHODS)
def test_the_callers_own_randomness_is_left_as_it_was(method: str, place: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    given = {"budget": "9%"} if method in ("weight-lora", "adapters", "trajectory-lora") else {}
    tinyld.finetune(ROWS, base=place / "base", out="mine", **QUICK | {"method": method} | given)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_who_wants_no_gradients_can_train(mode: Any, place: Path) -> None:
    with mode():
        run = tinyld.finetune(ROWS, base=place / "base", out="mine", recipe="best", **QUICK | {"method": OURS})
        assert run.predict(["rain"])[0]["label"] in ("sad", "happy")


def test_python_goes_on_with_a_run_and_keeps_what_was_measured_of_it(place: Path) -> None:
    before = tinyld.finetune(ROWS, base=place / "base", out="mine", **QUICK)
    folder, scores = RunFolder(Path("mine")), {"mine-rows/dev": {"n": 4, "nll_bound": 1.0, "nll_stderr": None}}
    folder.write_json("results.json", {"eval": scores})  # killed before it wrote its own
    rows = Path("mine-rows.jsonl").rename("away.jsonl")
    refuses("mine-rows.jsonl is gone: put it back there to go on", tinyld.finetune, resume="mine", base=place / "base")
    rows.rename("mine-rows.jsonl")
    run = tinyld.finetune(resume="mine", base=place / "base")
    assert run.predict(["rain"]) == before.predict(["rain"])
    assert run.results["eval"] == scores and 0 <= run.results["finetune"]["dev_accuracy"] <= 1
    assert tinyld.load(place / "base").results["pretrain"]
    refuses("--data has no effect with --resume", tinyld.finetune, "x.csv", resume="mine", kind=tinyld.UsageError)
    refuses("with --resume", tinyld.finetune, np.array(ROWS), resume="mine", kind=tinyld.UsageError)


@pytest.mark.parametrize(("change", "other", "usual"), [
    (torch.set_default_dtype, torch.float64, torch.float32), (torch.set_default_device, "meta", None),
])  # fmt: skip
def test_other_defaults_of_torch_are_refused(change: Any, other: Any, usual: Any, place: Path) -> None:
    run = tinyld.load(place / "mood")
    change(other)
    try:
        for call in (lambda: tinyld.load(place / "mood"), lambda: run.predict(["rain"])):
            refuses(f"default d.* is {other}; call torch.{change.__name__}", call, kind=tinyld.UsageError)
    finally:
        change(usual)


def test_labels_are_not_learned_with_certainty(place: Path) -> None:
    """Of two the right one is wanted with 0.9; what is said is without that goal's tenth for either."""
    run = tinyld.finetune(ROWS, base=place / "base", out="mine", method="full", epochs=30, lr=1e-2, batch_size=8)
    found = run.predict([text for text, _ in ROWS])
    assert [f["label"] for f in found] == [label for _, label in ROWS]
    learned = good("eval", "mine", "--split", "train", "--json").json[0]["nll_bound"]
    assert learned == pytest.approx(-math.log(0.9), abs=0.02), "and not 0"
    assert np.mean([f["probability"] for f in found]) > 0.98, "of a label that is as sure as any was learned to be"


def test_rows_of_two_callers_do_not_mix(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn = partial(tinyld.finetune, base=place / "base", out="mine", force=True, **QUICK)
    learn(ROWS)
    kept = Path("mine-rows.jsonl").read_bytes()
    with RunFolder(Path("mine")).locked(), pytest.raises(tinyld.TinyldError, match="another process is writing in it"):
        learn(ROWS[:20])
    assert Path("mine-rows.jsonl").read_bytes() == kept
    trained = from_python._within
    monkeypatch.setattr(from_python, "_within", lambda made: (trained(made), Path("mine-rows.jsonl").write_text("{}")))
    refuses("mine-rows.jsonl was replaced meanwhile", learn, ROWS)


def test_a_signal_stops_training_unless_the_caller_handles_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answered(signum: int) -> None:
        monkeypatch.setattr(finetuning, "evaluate", lambda *_, **__: signal.raise_signal(signum) or found)
        tinyld.finetune(ROWS, base=place / "base", out=f"mine-{signum}", **QUICK)

    found, heard = SimpleNamespace(record=lambda: {"nll_bound": 1.0}), list[int]()
    with handling(signal.SIGTERM, lambda *_: heard.append(1)):
        answered(signal.SIGTERM)
        assert heard and signal.getsignal(signal.SIGTERM) is not None
    with handling(signal.SIGINT, signal.default_int_handler):  # which a shell's & takes away
        with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT: step 1 is saved; go on with --resume"):
            answered(signal.SIGINT)


def test_what_is_stopped_before_its_first_step_says_how_it_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "TrainingRun", MagicMock(side_effect=Interrupted(signal.SIGTERM)))
        with pytest.raises(KeyboardInterrupt, match="stopped by SIGTERM: go on with --resume mine$"):
            tinyld.finetune(ROWS, base=place / "base", out="mine", **QUICK)
    assert tinyld.finetune(resume="mine").results["finetune"]["steps"] == QUICK["steps"]


def test_a_run_of_python_keeps_no_arguments_of_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tinyld.cli")
    assert environment()["command"] == "in Python"


def test_rows_that_are_kept_beside_a_run_replace_nothing_of_the_users(place: Path) -> None:
    learn = partial(tinyld.finetune, base=place / "base", out="mine", **QUICK)
    Path("mine-rows.jsonl").write_text("precious")
    refuses("mine-rows.jsonl exists and holds other rows", learn, ROWS)
    assert Path("mine-rows.jsonl").read_text() == "precious" and len(list(Path().iterdir())) == 1
    Path("mine-rows.jsonl").unlink()
    learn(ROWS)
    learn(ROWS[:20], force=True)
    assert RunFolder(Path("mine")).config["data"]["rows"] == 18
    kept = Path("mine-rows.jsonl").read_bytes()
    with pytest.raises(tinyld.UsageError, match="^rows: column 'label' holds the one label"):
        learn([("rain", "sad")] * 9, force=True)
    assert Path("mine-rows.jsonl").read_bytes() == kept, "the run that stays keeps its rows"


def test_a_csv_alone_is_enough(place: Path) -> None:
    """No task file, and columns of other names: of two, the one that says more is the text."""
    before = "kind,opinion\n" + "".join(f'{label}!,"{t} {i}"\n' for i, (t, label) in enumerate(ROWS))
    Path("opinions.csv").write_text(before)
    good("finetune", "--data", "opinions.csv", *made_on(place))
    task = RunFolder(Path("run")).config["task"]
    assert task["columns"] == {"text": "opinion"} and task["label_column"] == "kind" and task["name"] == "opinions"
    assert task["verbalizer"] == {"sad!": "sad", "happy!": "happy"}
    Path("new.csv").write_text("opinion\nrain\nthe sun\n")
    lines = good("predict", "run", "new.csv", "--csv").stdout.splitlines()
    assert lines[0].startswith("text,label,probability") and len(lines) == 3
    assert [good("eval", "run", "--split", split, "--json").json[0]["n"] for split in ("train", "dev")] == [36, 4]
    assert_refused(cli("eval", "run", "--split", "test"), 2, "has no test rows")
    measured = good("eval", "run", "--json").json[0]["nll_bound"]
    Path("opinions.csv").write_text(before + "sad!,a sea\n" * 9)
    for way in ([], ["--data", "opinions.csv"]):
        assert "opinions.csv has changed since run was trained on it" in cli("eval", "run", *way).stderr
    Path("opinions.csv").write_text(before)
    Path("opinions.csv").rename("moved.csv")
    assert "is gone; say by --data where it is" in cli("eval", "run").stderr
    moved = good("eval", "run", "--data", "moved.csv", "--json")
    assert (moved.json[0]["n"], moved.json[0]["nll_bound"]) == (4, measured), "and none that it learned"
    assert "moved.csv: 36 of its rows were learned by run, and are left out" in moved.stderr
    Path("others.csv").write_text(before.replace("rain", "sun"))
    others = good("eval", "run", "--data", "others.csv", "--json")
    assert others.json[0]["n"] == 40 and "others.csv is not the file that run learned" in others.stderr


def test_a_table_of_runs_replaces_no_file_that_one_of_them_learned(place: Path) -> None:
    before = "text,label\n" + "".join(f'"{text} {i}",{label}\n' for i, (text, label) in enumerate(ROWS))
    Path("mine.csv").write_text(before)
    good("finetune", "--data", "mine.csv", *made_on(place))
    good("eval", "run")
    assert_refused(cli("report", "run", "--csv", "mine.csv"), 1, "mine.csv: cannot be written (it is an input")
    assert Path("mine.csv").read_text() == before
    good("report", "run", "--csv", "table.csv")
    for split in ("train", "dev"):
        Path("rows").mkdir(exist_ok=True)
        Path("rows", f"{split}.csv").write_text(before)
    good("finetune", "--data", "rows", *made_on(place), "--out", "of-folder")
    for args in (["predict", "of-folder", "--out"], ["eval", "of-folder", "--predictions"]):
        assert_refused(cli(*args, "rows/dev.csv", text="rain\n"), 1, "rows/dev.csv: cannot be written (it is an input")
    good("finetune", "--data", "mine.csv", *made_on(place), "--method", "weight-lora", "--out", "lora")
    good("merge", "lora", "--out", "merged")
    assert_refused(cli("predict", "merged", "--out", "mine.csv", text="rain\n"), 1, "mine.csv: cannot be written (it")
    assert good("eval", "merged", "--json").json[0]["n"] == 4, "nor is one measured on what it learned"


@pytest.mark.parametrize(("method", "copies", "told"), [(OURS, 3, True), (OURS, 4, False), ("bitfit", 1, False)])
def test_few_rows_are_said_to_teach_a_whole_base_more(place: Path, method: str, copies: int, told: bool) -> None:
    Path("mine.csv").write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in ROWS * copies))
    made = ["--base", place / "base", "--steps", 1, "--method", method]
    assert ("--method full is one to three" in good("finetune", "--data", "mine.csv", *made).stderr) == told


def test_what_numbers_stand_for_is_said(place: Path) -> None:
    """In the order of a user's own task, which may be another than that of whoever wrote the numbers."""
    Path("own.toml").write_text('template = "{text} i feel {answer} ."\n[verbalizer]\nhappy = "well"\nsad = "down"\n')
    for name, label in (("names", str), ("numbers", ["sad", "happy"].index)):
        Path(f"{name}.csv").write_text("text,label\n" + "".join(f'"{text}",{label(own)}\n' for text, own in ROWS))
        ran = good("finetune", "--task", "own.toml", "--data", f"{name}.csv", *made_on(place), "--out", name)
        told = "labels are numbers, read in the order of the task's [verbalizer]: 0 as happy, 1 as sad; is that right?"
        assert (told in ran.stderr) == (name == "numbers")
        assert (told in good("eval", "names", "--data", f"{name}.csv").stderr) == (name == "numbers")


def test_labels_that_look_like_a_mistake_are_said(place: Path) -> None:
    """One that a single row has, and texts that may be meant to be written; neither is refused."""
    lines = [f'"{text} {i}",{label}' for i, (text, label) in enumerate(ROWS)]
    Path("mine.csv").write_text("\n".join(["text,label", *lines, "a sea,hapy", ""]))
    ran = good("finetune", "--data", "mine.csv", *made_on(place))
    assert "one training row alone has label hapy; is that misspelt?" in ran.stderr
    assert "no dev row has label hapy: whether that is learned is not measured" in ran.stderr
    assert "more than one label" not in ran.stderr
    assert "are training rows" not in ran.stderr
    Path("both").mkdir()
    Path("both/train.csv").write_text(Path("mine.csv").read_text() + "A sea,sad\n")
    Path("both/dev.csv").write_text("\n".join(["text,label", *(row.upper() for row in lines[:6]), "new,SAD"]).lower())
    ran = good("finetune", "--data", "both", *made_on(place), "--out", "both-run")
    assert "6 of 7 dev rows are training rows, too" in ran.stderr
    assert "1 training texts have more than one label, such as 'A sea it was'" in ran.stderr
    assert "6 of 7 dev rows are training rows, too" in good("eval", "both-run", "--split", "dev").stderr
    Path("both/test.csv").write_text("text,label\nall new,sad\n")
    assert "training rows" not in good("eval", "both-run", "--split", "test").stderr
    Path("both/test.csv").write_text(f"text,label\nall new,sad\n{lines[0]}\n")
    assert "1 of 2 test rows are training rows, too" in good("eval", "both-run", "--split", "test").stderr
    lines = [f"who is {i},she lives in town number {i % 8}" for i in range(24)]
    Path("asked.csv").write_text("\n".join(["text,label", *lines, ""]))
    ran = good("finetune", "--data", "asked.csv", *made_on(place), "--out", "asked")
    assert "texts to write are an --answer-column" in ran.stderr


def test_what_a_spreadsheet_writes_is_read_and_what_was_made_of_it_is_said(place: Path) -> None:
    rows = "".join(f'{i};"{t}; {i}";{k}\n' for i, (t, k) in enumerate(ROWS))
    Path("mine.csv").write_text(f"\ufeffID;Headline;Kind\n{rows}")
    mine = ["finetune", "--data", "mine.csv", *made_on(place)]
    refused = "mine.csv: which of its columns are text and label? It has ID, Headline, Kind; say so with --text-column"
    assert_refused(cli(*mine), 1, refused)
    ran = good(*mine, "--text-column", "Headline", "--label-column", "Kind")
    assert "texts are in column 'Headline', labels in 'Kind': 2 (" in ran.stderr
    assert "one row in ten is held out as dev rows" in ran.stderr
    Path("bare.csv").write_text("".join(f'"{t}",{k}\n' for t, k in ROWS))
    assert_refused(cli("finetune", "--data", "bare.csv", *made_on(place)), 2, "its first line is read as a header, but")


def test_a_task_file_may_name_its_training_rows_alone(place: Path) -> None:
    """A tenth of them is then held out, as of a file of rows; test rows are its own."""
    rows = [f'"{text} {i}",{label}\n' for i, (text, label) in enumerate(ROWS)]
    Path("some.csv").write_text("text,label\n" + "".join(rows))
    Path("asked.csv").write_text("text,label\n" + "".join(rows[:3]))
    task = 'template = "{text} it was {answer} ."\n[verbalizer]\nsad = "down"\nhappy = "well"\n'
    Path("some.toml").write_text(task + '[data]\ntrain = "some.csv"\ntest = "asked.csv"\n')
    ran = good("finetune", "--task", "some.toml", *made_on(place), "--out", "some", "--json")
    assert (ran.json["rows"], ran.json["dev_rows"]) == (36, 4) and "one row in ten is held out" in ran.stderr
    for split, n in (("train", 36), ("dev", 4), ("test", 3)):
        assert good("eval", "some", "--split", split, "--json", "--quiet").json[0]["n"] == n
    good("finetune", "--task", place / "mood.toml", "--data", "some.csv", *made_on(place))
    assert good("eval", "run", "--json", "--quiet").json[0]["n"] == 4, "of the rows that it learned, not of its task's"


def test_a_file_with_an_answer_column_makes_a_task_that_writes(place: Path) -> None:
    rows = [{"ask": f"name the {t}", "reply": ["the sun", f"{t} it is"], "id": i} for i, (t, _) in enumerate(ROWS)]
    made = {"base": place / "base", "text_column": "ask", "answer_column": "reply"} | QUICK
    run = tinyld.finetune(rows, out="mine", **made)
    task = run.config["task"]
    assert (task["template"], task["answer_column"], task["verbalizer"]) == ("{text} : {answer}", "reply", {})
    longest = max(len(run.base.tokenizer.encode(answer)) for row in rows for answer in row["reply"])
    assert task["answer_tokens"] == min(longest + 1, run.base.model.config.max_length // 2)
    assert run.config["data"]["rows"] == 72  # both answers of each row but the tenth that is held out
    written = run.write(["name the rain"], lengths=3, steps=2)
    assert len(written) == 1
    assert written == [row["answer"] for row in run.predict(["name the rain"], lengths=3, steps=2)]
    Path("odd.csv").write_text("ask,reply\n" + "".join(f"name {i},rain 漢 sun\n" for i in range(20)))
    columns = ["--text-column", "ask", "--answer-column", "reply"]
    ran = good("finetune", "--data", "odd.csv", *columns, *made_on(place))
    assert "the answers of 18 of 18 training rows hold characters that the base has no token for" in ran.stderr
    task = 'template = "{ask} : {answer}"\nanswer_column = "reply"\nanswer_tokens = 1\n[data]\n'
    Path("short.toml").write_text(task + 'train = "odd.csv"\ndev = "odd.csv"\n')
    ran = good("finetune", "--task", "short.toml", *made_on(place), "--out", "short")
    assert "the answers of 20 of 20 training rows are longer than answer_tokens, 1 (the longest has " in ran.stderr
    with pytest.raises(tinyld.UsageError, match="--label-column or --answer-column, not both"):
        tinyld.finetune(rows, out="other", label_column="id", **made)


def test_labels_get_words_that_the_vocabulary_has_as_one_token_each(tokenizer: Tokenizer) -> None:
    assert answer_words(["good", "bad"], tokenizer) == ["good", "bad"]
    assert answer_words(["very good", "not_good", "good"], tokenizer) == ["very", "not", "good"]
    for labels in (["very bad", "very good"], ["very good", "very bad"]):
        assert answer_words(labels, tokenizer) == [label.split()[1] for label in labels], "what tells them apart"
    words = answer_words(["1", "2", "3", "Zürich-ß", "good"], tokenizer)
    assert len({tuple(tokenizer.encode(w)) for w in words}) == 5 and words[4] == "good"
    assert all(len(tokenizer.encode(w)) == 1 and tokenizer.unk_id not in tokenizer.encode(w) for w in words)


def test_a_folder_of_rows_is_learned_by_its_path(place: Path) -> None:
    Path("set").mkdir()
    for name, rows in (("train", ROWS), ("val", ROWS[:5])):
        Path(f"set/{name}.csv").write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
    tinyld.finetune("set", base=place / "base", out="run", **QUICK)
    assert RunFolder(Path("run")).config["data"]["rows"] == len(ROWS)
    assert good("eval", "run", "--json").json[0]["n"] == 5, "the dev rows"
    shutil.copytree("set", "set/set")
    Path("set/set/train.csv").write_text("text,label\nrain,sad\nsun,happy\n")
    tinyld.finetune("set", base=place / "base", out="run", force=True, **QUICK)
    assert RunFolder(Path("run")).config["data"]["rows"] == len(ROWS), "not those of the folder in it"
    shutil.rmtree("set/set")
    Path("set/val.csv").unlink()
    tinyld.finetune("set", base=place / "base", out="run", force=True, **QUICK)
    for split, n in (("dev", 4), ("train", 36)):
        for more in ((), ("--data", "set")):
            assert good("eval", "run", "--split", split, *more, "--json").json[0]["n"] == n


def test_options_are_read_as_a_user_writes_them() -> None:
    options = FinetuneOptions(base="a/b", budget="0.7%", ranks="4,2,1", targets="query,value")
    assert (options.base, options.ranks, options.targets) == (Path("a/b"), (4, 2, 1), ("query", "value"))
    assert options.budget == pytest.approx(0.007) == FinetuneOptions(budget="0.007").budget
    assert FinetuneOptions(budget="70%").budget == 0.7 and FinetuneOptions(budget=0.7).budget == 0.7
    given = FinetuneOptions.of({"rank": 4}, ["lr=1e-3", "base-dtype=int8", "rslora=true"])
    assert given == FinetuneOptions(rank=4, lr=1e-3, base_dtype="int8", rslora=True)


def test_a_released_base_is_loaded_by_its_name() -> None:
    assert tinyld.load("small").base.fingerprint == tinyld.load(bundled_data_dir() / "small").base.fingerprint


@pytest.mark.parametrize(("given", "expected"), [
    ({}, "5000"),
    ({"GOMP_SPINCOUNT": "7"}, "7"),
    ({"OMP_WAIT_POLICY": "active"}, "None"),
])  # fmt: skip
def test_threads_wait_briefly_for_one_that_has_no_core_unless_the_user_says_how(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    code = "import tinyld, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    assert python("-c", code).stdout == f"{expected} False\n", "it is said before torch is loaded"

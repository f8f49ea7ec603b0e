"""Answers to new texts: the loop, the filter, files, and Python, on runs of a tiny base."""

import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAST, QUICK, ROWS, assert_refused, cli, good, refuses, tree
from torch import Tensor

import tinyld
from tinyld.answers import by_label
from tinyld.compose import compose
from tinyld.config import SampleConfig
from tinyld.data import Batch
from tinyld.errors import UsageError
from tinyld.evaluate import label_logp
from tinyld.finetuning import BATCH, EPOCHS, FEW, MANY, WRITING, usual_epochs
from tinyld.model import Denoiser
from tinyld.options import ComposeOptions, EvalOptions
from tinyld.predict import ONE_AT_A_TIME
from tinyld.progress import Progress
from tinyld.rows import GAPS
from tinyld.runs import RESULTS, RunFolder
from tinyld.scores import eval, remember
from tinyld.tasks import Task, load_task
from tinyld.texts import piped_lines, table_line
from tinyld.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("elsewhere")

TINY_LORA = {"steps": 2, "ranks": "2,2,2", "blocks": 1, "quiet": True}
ask = partial(cli, "predict")


def records(*args: object, text: str | bytes = "") -> list[dict[str, Any]]:
    return [json.loads(line) for line in good("predict", *args, text=text).stdout.splitlines()]


def test_labels_are_scored_by_the_chain_rule(model: Denoiser, tokenizer: Tokenizer) -> None:
    """Against a sum that is written out: every token given those before it, the rest masked."""
    words = ("not good", "great", "very very great", "very bad")
    answers = [tuple(tokenizer.encode(w)) for w in words]
    head, tail = tokenizer.encode("the film was it was"), tokenizer.encode(".")
    x0 = torch.tensor([[tokenizer.bos_id, *head, 0, 0, 0, *tail, tokenizer.eos_id]] * 2)
    mask, start = torch.zeros_like(x0, dtype=torch.bool), 1 + len(head)
    mask[:, start : start + 3] = True
    batch = Batch(x0, mask, torch.ones_like(mask), torch.arange(2))
    passes = []
    hook = model.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        found = label_logp(model, batch, answers, tokenizer)
        hook.remove()

        def logp(xt: Tensor, t: float, real: Tensor | None = None) -> Tensor:
            return model(xt, torch.full((2,), t), real, ~mask).log_softmax(-1)[0, start : start + 3]

        whole = torch.where(mask, tokenizer.mask_id, x0)
        ends = logp(whole, 1.0)[:, tokenizer.eos_id].exp()
        for k, answer in enumerate(answers):
            n = len(answer)
            total = float((1 - ends[:n]).log().sum() + (ends[n].log() if n < 3 else 0.0))
            for i, token in enumerate(answer):
                xt, real = whole.clone(), torch.ones_like(mask)
                xt[:, start : start + i] = torch.tensor(answer[:i])
                if n < 3:
                    xt[:, start + n] = tokenizer.eos_id
                    real[:, start + n + 1 : start + 3] = False
                total += float(logp(xt, (n - i) / n, real)[i, token])
            assert found[0, k] == found[1, k] == pytest.approx(total, abs=1e-4)
        assert len(passes) == 1 + 1 + 3 + 3, "one for all lengths; then one a beginning: of one token, of two, of three"
    mood = Task("{text} {answer}", "mood", verbalizer={"a": "x", "b": "y"})
    record = by_label(torch.tensor([[0.0, 1.0]]), mood)
    assert record["label"] == ["b"] and sum(record["probabilities"][0].values()) == pytest.approx(1, abs=1e-3)
    smoothed = by_label(torch.tensor([[0.4, 0.6], [0.09, 0.91]]).log(), replace(mood, smoothed=0.2))["probabilities"]
    assert smoothed == [{"a": 0.375, "b": 0.625}, {"a": 0.0011, "b": 0.9989}], "0.8 of this and 0.1 are what was given"
    sure = by_label(torch.tensor([[0.02, 0.98], [0.01, 0.99]]).log(), replace(mood, smoothed=0.2))["probability"]
    assert 0.999 < sure[0] < sure[1] < 1, "of two that are surer than was learned the surer one is told"


def test_a_task_that_writes_learns_every_reference_and_is_scored_as_it_writes(place: Path) -> None:
    found = RunFolder(place / "tell").read_json(RESULTS)["finetune"]
    assert found["rows"] == 15 and found["dev_written"] == 10, "ten rows, five of them with two references"
    assert 0 <= found["dev_rouge_l"] <= 1 and "dev_nll_bound" in found and "dev_accuracy" not in found
    (record,) = eval(EvalOptions(runs=(place / "tell",), quiet=True))
    assert record["rouge_l"] == pytest.approx(found["dev_rouge_l"])
    kept = RunFolder(place / "tell").read_json(RESULTS)["eval"]["tell/dev"]
    assert kept["rouge_l"] == record["rouge_l"] and kept["rows_per_second"] > 0


def test_few_rows_are_read_more_often_and_texts_by_fewer_at_once(place: Path) -> None:
    mood, tell = (load_task(str(place / f"{name}.toml")) for name in ("mood", "tell"))
    epochs, least, most = FEW
    assert usual_epochs(mood, 40, 32) == least / 2 and usual_epochs(mood, 300, 32) == epochs
    assert usual_epochs(mood, 640, 32) == most / 20 and usual_epochs(mood, 80, 1) == 3
    _, least, most = WRITING
    assert usual_epochs(tell, 15, BATCH) == EPOCHS and usual_epochs(tell, 30, 1) == math.ceil(least / 30)
    assert usual_epochs(tell, 400, 1) == 8 and usual_epochs(tell, 1_200, 1) == most / 1_200
    assert usual_epochs(tell, 18_102, 8) == usual_epochs(tell, 67_349, 8) == usual_epochs(mood, MANY - 1, 32) == 3
    assert usual_epochs(mood, MANY, 32) == 1
    for name, batch_size, more in (("mood", 32, {}), ("tell", BATCH, {"steps": 1})):
        tinyld.finetune(place / f"{name}.toml", base=place / "base", out=name, method="bitfit", **more)
        assert RunFolder(Path(name)).config["train"]["batch_size"] == batch_size
    assert RunFolder(Path("mood")).config["train"]["epochs"] == FEW[1] / 2


def test_a_text_file_teaches_to_fill_gaps(place: Path) -> None:
    tinyld.finetune(place / "text.txt", base=place / "base", out="fill", limit=20, **QUICK)
    found = RunFolder(Path("fill")).read_json(RESULTS)["finetune"]
    assert found["rows"] == 20 * GAPS and "dev_rouge_l" in found
    one, other, empty = records("fill", text="the rain ____ sun .\n____ and the sea\n\n")
    assert one["filled"] == f"the rain {one['answer']} sun ." and other["filled"] == f"{other['answer']} and the sea"
    assert empty["filled"] == empty["answer"] == "" and "label" not in one
    Path("none.txt").write_text("")
    assert ask("fill", "none.txt").code == 0, "as with an empty pipe"
    for bad, problem in ((b"\xff", "not UTF-8; send"), (b"no gap", "no gaps in the text")):
        ran = ask("fill", text=b"the ____ is\nit ____ rain\n" + bad + b"\nthe ____ is\n")
        assert ran.code == 1 and f"stdin: line 3: {problem}" in ran.stderr
        assert len(ran.stdout.splitlines()) == 2, "those before it are answered"
    refused = "number 1: no gaps in the text, which must hold one ____\n"
    assert ask("fill", "--text", "the rain").stderr.endswith(refused)
    (record,) = eval(EvalOptions(runs=(Path("fill"),), quiet=True))
    assert record["n"] == 30, "a tenth of the 300 lines, the same that training held out"
    Path("gaps.txt").write_text("a ____ sea\nthe ____ sky\n" + "the rain fell on the town\n" * 18)
    tinyld.finetune("gaps.txt", base=place / "base", out="gaps", **QUICK)
    ran = good("eval", "gaps", "--data", "gaps.txt", "--json")
    assert ran.json[0]["n"] == 2 and "18 of its rows were learned" in ran.stderr


@pytest.mark.parametrize("name", ["mood", "reviewed"])
def test_what_predict_says_is_what_eval_finds(name: str, place: Path) -> None:
    """The decoded answers are eval's; for answers of one token the label is the one that eval scores best."""
    run = tinyld.load(place / "mood")
    if name == "reviewed":
        run = tinyld.finetune(ROWS, base=place / "base", out="one", **QUICK)
    rows = "".join(f'"""Oh {t} {"very " * 3 * i}",{label}\n' for i, (t, label) in enumerate(ROWS[:9]))
    Path("rows.csv").write_text(f"text,label\n{rows}")
    (scores,) = good("eval", run.path, "--data", "rows.csv", "--predictions", "p.tsv", "--json").json
    header, *lines = csv.reader(Path("p.tsv").read_text().splitlines(), "excel-tab")
    assert header == ["run", "task", "prompt", "gold", "answer"] and lines[0][0] == str(run.path)
    assert lines[1][1:4] == [run.tasks[0].name, '"Oh sun and sea very very very it was ____ .', "happy"]
    found = records(run.path, "rows.csv")
    assert [r["decoded"] for r in found] == [line[4] for line in lines] and scores["n"] == 9
    right = sum(r["label"] == r["given_label"] for r in found) / 9
    assert name == "mood" or right == pytest.approx(scores["scored_accuracy"])
    assert scores["truncated"] == sum(r["truncated"] for r in found) > 0


def test_every_line_in_has_a_line_out_in_its_order(place: Path) -> None:
    assert "empty" not in good("predict", place / "mood", text="rain\n").stderr
    texts = ["rain", "", "the sun \U0001f600", "  ", "very " * 60, "rain"]
    found = records(place / "mood", text="\n".join(texts))
    assert [r["text"] for r in found] == texts
    assert [r["truncated"] for r in found] == [False] * 4 + [True, False]
    assert all(set(r) == {"text", "label", "probability", "probabilities", "decoded", "truncated"} for r in found)
    assert all(r["label"] in ("sad", "happy") and r["probability"] == max(r["probabilities"].values()) for r in found)
    assert found[0]["probability"] == pytest.approx(found[5]["probability"], abs=2e-3), "whatever is beside it"
    assert records(place / "mood", "--text", "rain")[0]["label"] == found[0]["label"]
    said = ask(place / "mood", text="\n".join(texts)).stderr
    assert "1 of 6 rows are longer" in said and "2 of 6 texts are empty; their answers say nothing" in said
    assert "longer" not in ask(place / "mood", "--quiet", text="\n".join(texts)).stderr
    assert "no token for" not in said
    odd = ask(place / "mood", text="\u90e8\u5c4b\nrain\n\U0001f92c\U0001f92c\n").stderr
    assert "2 of 3 texts are mostly words that the base has no token for; their answers say nothing" in odd
    told = "1 of 2 prompts hold characters that the base has no token for, and are read without them"
    assert told in ask(place / "tell", text="rain and the sun \U0001f600\nrain\n").stderr and told not in odd
    assert ask(place / "mood", text="").stdout == ""
    Path("new.txt").write_bytes(content := b"\xef\xbb\xbfrain\r\nsun\rsea")  # of Windows, and of an old Mac
    for asked in (["new.txt"], []):
        assert [r["text"] for r in records(place / "mood", *asked, text=content)] == ["rain", "sun", "sea"]


@pytest.mark.parametrize(("names", "among"), [
    (["mood"], {75}), (["tell"], {25, 75}), (["fast-a", "fast-b", "fast-d"], {67}),
])  # fmt: skip
def test_answering_a_file_says_how_far_it_is(
    names: list[str], among: set[int], place: Path, fast: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """75: after a chunk; less: a pass over one that is written gets on, too; 67: two runs of three share a pass."""
    monkeypatch.setattr("tinyld.texts.Progress", partial(Progress, every=0.0))
    monkeypatch.setattr("tinyld.texts.CHUNK", 40 if len(names) > 1 else 30)
    monkeypatch.setattr("tinyld.texts.WRITTEN", 30)
    Path("new.txt").write_text("rain\n" * 40)
    asked = [*(place / name for name in names), "new.txt", "--out", "out.jsonl"]
    said = ask(*asked).stderr
    shares = [int(n) for n in re.findall(r"predict (\d+)%", said)]
    assert shares == sorted(shares) and shares[-1] == 100 and among <= set(shares) and " rows/s\n" in said
    assert "predict" not in ask(*asked, "--quiet").stderr
    assert "predict" not in ask(*asked[:-3], text="rain\n").stderr


@pytest.mark.parametrize(("suffix", "header", "line"), [
    ("csv", "id,text,label\n", '{id},"{text}",{label}\n'), ("tsv", "id\ttext\tlabel\n", "{id}\t{text}\t{label}\n"),
    ("jsonl", "", '{{"id": "{id}", "text": "{text}", "label": "{label}"}}\n'),
])  # fmt: skip
def test_files_are_read_by_column_and_the_others_are_kept(suffix: str, header: str, line: str, place: Path) -> None:
    rows = [{"id": str(i), "text": text, "label": label} for i, (text, label) in enumerate(ROWS)]
    file = Path(f"new.{suffix}")
    file.write_text(header + "".join(line.format(**row) for row in rows))
    found = records(place / "mood", file)
    assert [(r["id"], r["text"], r["given_label"]) for r in found] == [tuple(row.values()) for row in rows]
    by_id = records(place / "mood", file, "--column", "id")
    assert [(r["text"], r["given_text"], r["given_label"]) for r in by_id] == [tuple(row.values()) for row in rows]
    assert ask(place / "mood", file, "--out", "all.jsonl").stdout == ""
    assert [json.loads(line) for line in Path("all.jsonl").read_text().splitlines()] == found
    table = list(csv.DictReader(io.StringIO(ask(place / "mood", file, "--csv").stdout)))
    assert [r["label"] for r in table] == [r["label"] for r in found] and float(table[0]["p(sad)"]) > 0


def test_what_stands_in_a_file_comes_back_row_by_row(place: Path) -> None:
    for name, content, found in (
        ("holes.csv", 'text,id\nrain,1\n,\n"","  "\n\nsun,4\n', [("rain", "1"), ("", ""), ("", "  "), ("sun", "4")]),
        ("quoted.tsv", 'text\nrain\n""\n"""sun"""\n', [("rain", None), ("", None), ('"sun"', None)]),
        ("lone.csv", "text\nrain\n\nsun\n", [("rain", None), ("", None), ("sun", None)]),  # as a spreadsheet saves it
    ):
        Path(name).write_bytes(content.encode())
        assert [(r["text"], r.get("id")) for r in records(place / "mood", name)] == found, name
    texts = ["a\rb", "c\nd", "\ud83d rain", 'say "x", y']
    Path("odd.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name in ("odd-out.jsonl", "odd-out.csv"):
        ask(place / "mood", "odd.jsonl", "--out", name)
    assert [json.loads(line)["text"] for line in Path("odd-out.jsonl").read_text("utf-8").splitlines()] == texts
    with open("odd-out.csv", encoding="utf-8", newline="") as file:
        assert [r["text"] for r in csv.DictReader(file)] == [*texts[:2], "? rain", texts[3]]
    mixed = [{"text": "ra\u200bin\n", "b": True}, {"text": "sun", "id": ["é", 1]}]
    Path("mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    table = list(csv.DictReader(io.StringIO(ask(place / "mood", "mixed.jsonl", "--csv").stdout, newline="")))
    assert [(r["text"], r["b"], r["id"]) for r in table] == [("ra\u200bin\n", "true", ""), ("sun", "", '["é", 1]')]
    toml = (place / "same.toml").read_text().replace("same.csv", "pairs.csv")
    Path("pairs.toml").write_text(f'{toml}[columns]\na = "both"\nb = "both"\n')
    Path("pairs.csv").write_text("both,label\n" + "rain ||| sun,sad\nsea ||| sky,happy\n" * 5)
    tinyld.finetune("pairs.toml", base=place / "base", out="pairs", **QUICK)
    assert [r["text"] for r in records("pairs", text="rain ||| sun\n\nsea ||| sky\n")][1] == ""


def test_many_samples_are_those_of_few_written_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tinyld.load(place / "base")
    whole = run.fill("rain", 4, 5, SampleConfig())
    monkeypatch.setattr(Denoiser, "rows_at_once", lambda self, length, most, asked=0: min(most, 2))
    assert run.fill("rain", 4, 5, SampleConfig()) == whole
    refuses("the steps of at most 2 such texts", run.fill, "rain", 4, 5, SampleConfig(), print, kind=tinyld.UsageError)
    refuses("the steps of one length", run.fill, "rain", 4, 2, SampleConfig(lengths=2), print, kind=tinyld.UsageError)


def test_a_text_for_no_task_is_written_as_sample_does_or_greedily(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tinyld.load(place / "base")
    own = base.fill("the", 8, 1, SampleConfig("revise", temperature=0.6))[0]
    assert base.write("the", length=8) == own
    monkeypatch.setattr("tinyld.predict.is_foreign", lambda path: True)
    assert base.write("the", length=8) == base.fill("the", 8, 1, SampleConfig())[0] != own


def test_a_text_without_a_prompt_begins_where_another_one_ends(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, heads = tinyld.load(place / "base"), []
    tokenizer = run.base.tokenizer
    decode, name = tinyld.predict.decode, "tinyld.predict.decode"
    monkeypatch.setattr(name, lambda model, x, *a: heads.append(x[0].tolist()) or decode(model, x, *a))
    for prompt in ("", "{answer} .", "the"):
        run.fill(prompt, 2, 1, SampleConfig())
    masks, end = [tokenizer.mask_id] * 2, tokenizer.eos_id
    dot, the = tokenizer.encode("."), tokenizer.encode("the")
    assert [head[1:] for head in heads] == [[end, *masks], [end, *masks, *dot, end], [*the, *masks]]


def test_a_released_base_is_left_as_it_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Path(shutil.copytree(place / "base", "data/small"))
    before = (base / RESULTS).read_bytes()
    for released in ("data", "elsewhere"):
        monkeypatch.setattr("tinyld.scores.default_base", lambda released=released: Path(released) / "base")
        remember(base, "eval", "reviews/dev", {"accuracy": 0.5}, "cpu")
        assert ((base / RESULTS).read_bytes() == before) == (released == "data")


def test_a_terminal_shows_the_answer_whole_and_as_much_of_the_text_as_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    line = table_line({"text": "what " * 20, "answer": "a long answer"})
    assert line.startswith("what what") and line.endswith("...  -> a long answer\n") and len(line) == 41
    assert table_line({"text": "", "label": "sad", "probability": 0.5}).endswith("  (empty)\n")
    line = table_line({"text": "x", "label": "sad", "probability": 0.5, "adapter": "mood", "foreign": True})
    assert line.startswith("like no task (mood): sad")
    shares = {"sad": 0.5, "rather happy": 0.5}
    line = table_line({"text": "x", "label": "sad", "probability": 0.5, "probabilities": shares})
    assert line == "sad           50.0%  x\n", "in columns, whatever the label"
    both = {"text": "what " * 20, "tasks": {"mood": {"label": "sad", "probability": 0.5}, "write": {"answer": "a sea"}}}
    first, *lines = table_line(both).splitlines()
    assert len(first) == 40 and lines == ["  mood: sad  50.0%", "  write: a sea"], "of several runs a line each"


def test_a_task_of_two_texts_takes_both(place: Path) -> None:
    Path("new.csv").write_text("a,b\nrain,sun\nsea,\n")
    found = records(place / "same", "new.csv")
    assert [(r["a"], r["b"]) for r in found] == [("rain", "sun"), ("sea", "")] and "text" not in found[0]
    assert tinyld.load(place / "same").predict([("rain", "sun")])[0]["label"] == found[0]["label"]
    Path("same.csv").write_text("text,b,label\n" + "rain,sun,sad\nsea,sky,happy\n" * 5)
    Path("same.toml").write_text((place / "same.toml").read_text().replace("{a}", "{text}"))
    run = tinyld.finetune("same.toml", base=place / "base", out="pair", **QUICK)
    assert run.predict([("rain", "sun")])[0]["text"] == "rain", "a column that is called so keeps its name"


def test_a_task_that_writes_gives_its_answer(place: Path) -> None:
    (found,) = records(place / "tell", text="rain\n")
    assert set(found) == {"text", "answer", "truncated"} and found["text"] == "rain"
    run = tinyld.load(place / "tell")
    assert run.write(["rain", "sun"])[0] == found["answer"] == run.predict(["rain"])[0]["answer"]
    (written,) = (base := tinyld.load(place / "base")).write("the {answer} .", length=2)
    assert base.write(["the {answer} ."], length=2) == [written]
    assert len(set(base.write(["the"] * 4, length=8, temperature=1.0))) > 1, "each draws for itself"


def test_rows_of_another_part_of_the_input_draw_otherwise(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyld.texts.WRITTEN", 4)
    Path("new.txt").write_text("rain\n" * 8)
    found = [r["answer"] for r in records(place / "tell", "new.txt", "--temperature", 2)]
    assert found == [r["answer"] for r in records(place / "tell", "new.txt", "--temperature", 2)]
    assert found[:4] != found[4:]


def test_a_composition_says_who_answered(place: Path) -> None:
    for name in ("mood", "same"):
        tinyld.finetune(place / f"{name}.toml", base=place / "base", out=f"lora-{name}", **TINY_LORA)
    compose(ComposeOptions(runs=("lora-mood", "lora-same"), out="both", quiet=True))
    text = ROWS[0][0] + "\n"
    (found,) = records("both", "--task", "mood", text=text)
    assert found["adapter"] == "lora-mood"
    alone = records("lora-mood", text=text)[0]
    assert found["probabilities"] == pytest.approx(alone["probabilities"], abs=2e-3)
    Path("alias.toml").write_text((place / "mood.toml").read_text().replace('"mood', f'"{place}/mood'))
    assert records("both", "--task", "alias.toml", text=text) == [found], "whose rows are asked as its own are"
    ran = ask("both", text="rain\n")
    assert ran.code == 2 and "has tasks mood, same; say which with --task" in ran.stderr


def test_tasks_that_are_asked_alike_are_routed_without_their_names(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, labels in (("weather", ("sad", "happy")), ("food", ("good", "bad"))):
        rows = [{name: f"{text} {name} {name}", "label": labels[i % 2]} for i, (text, _) in enumerate(ROWS * 5)]
        made = {"base": place / "base", "text_column": name, "label_column": "label"} | TINY_LORA
        tinyld.finetune(rows, out=name, **made)
    compose(ComposeOptions(runs=("weather", "food"), out="both", quiet=True))
    texts = [f"{ROWS[0][0]} weather weather", "qq zz qq xx qq zz ww", f"{ROWS[0][0]} food food"]
    Path("asked.txt").write_text("\n".join(texts))
    Path("new.csv").write_text("weather,label\n" + "rain weather,sad\nsun weather,happy\n")
    run, new, of_both = tinyld.load("both"), Path("new.csv"), partial(EvalOptions, runs=(Path("both"),), quiet=True)
    found = run.predict(texts)
    assert [(r["text"], r["foreign"]) for r in found] == list(zip(texts, [False, True, False], strict=True))
    assert found[1]["adapter"] in ("weather", "food"), "who answered is said all the same"
    compose(ComposeOptions(runs=("weather", "food"), out="few", limit=4, quiet=True))
    assert not any(r["foreign"] for r in tinyld.load("few").predict(texts)), "of four rows no limit is known"
    assert list(found[0]["probabilities"]) == ["sad", "happy"] and set(found[2]["probabilities"]) == {"good", "bad"}
    alone = run.fill("rain", 3, 2, SampleConfig())
    Path("food.csv").write_text("food,n\n" + "rain food food,1\n")
    for more, labels in (([], {"good", "bad"}), (["--task", "weather-rows"], {"sad", "happy"})):
        (other,) = records("both", "food.csv", *more)
        assert (other["text"], set(other["probabilities"])) == ("rain food food", labels), "any member's column is read"
    with monkeypatch.context() as nothing_read:
        nothing_read.setattr("tinyld.composition.batch_features", None)
        (named,) = run.predict(texts[:1], task="food-rows")
    assert set(named["probabilities"]) == {"good", "bad"} and run.base.model.push is run.push.pushes[1]
    assert run.fill("rain", 3, 2, SampleConfig()) == alone and run.base.model.push is run.push
    assert tinyld.load("both", task="food-rows").predict(texts[:1]) == [named] and run.predict([]) == []
    measured = [(r["task"], r["n"]) for r in eval(of_both())]
    assert measured == [("weather-rows", 20), ("food-rows", 20)], "of each one's own rows"
    assert [r["n"] for r in eval(of_both(task="weather-rows", data=new))] == [2]
    for refused, part in (
        (lambda: eval(of_both(data=new)), "say by --task whose rows new.csv holds"),
        (lambda: eval(of_both(text=(Path("asked.txt"),))), "both is a composition: --text is for one adapter"),
        (lambda: tinyld.load(["both", "food"]), "both is a composition; name the runs"),
    ):
        refuses(part, refused, kind=tinyld.UsageError)
    both = [{"weather": texts[2], "food": "qq"}, {"food": "qq", "weather": texts[0]}]
    assert [r["text"] for r in run.predict(both)] == [texts[2], texts[0]], "not what the other one reads"
    Path("mixed.csv").write_text(f'weather,food,p(bad)\n"{texts[0]}",x,1\n"{texts[2]}",y,2\n')
    table = list(csv.DictReader(io.StringIO(ask("both", "mixed.csv", "--csv").stdout)))
    assert [(r["text"], r["food"], r["given_p(bad)"]) for r in table] == [(texts[0], "x", "1"), (texts[2], "y", "2")]
    header, *rows = csv.reader(ask("both", "asked.txt", "--csv").stdout.splitlines())
    assert {"p(sad)", "p(happy)", "p(good)", "p(bad)"} < set(header) and rows[2][header.index("p(bad)")]
    named = next(csv.reader(ask("both", "asked.txt", "--csv", "--task", "food-rows").stdout.splitlines()))
    assert {"p(good)", "p(bad)"} < set(named) and "p(sad)" not in named
    Path("asked.txt").write_text("\n".join(texts[::-1]))
    assert next(csv.reader(ask("both", "asked.txt", "--csv").stdout.splitlines())) == header, "whichever answers first"


def test_many_tasks_answer_as_alone_in_one_pass(fast: list[Path], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the rain", "sun and sea", "", "very " * 60]
    alone = {path.name: tinyld.load(path).predict(texts) for path in fast}
    passes = []
    frozen = Denoiser.frozen
    monkeypatch.setattr(Denoiser, "frozen", lambda *given: passes.append(1) or frozen(*given))
    for paths, groups in ((fast[:3], 1), (fast, 2), ([*fast, place / "mood"], 3)):
        runs = tinyld.load(paths)
        passes.clear()
        found = runs.predict(texts)
        assert [r["text"] for r in found] == texts and len(runs.groups()) == groups
        assert groups == 3 or len(passes) == groups, "the base runs once a template"
        for name in (path.name for path in fast if path in paths):
            one = [{"text": r["text"]} | r["tasks"][name] for r in found]
            shares = all("decoded" not in r for r in one)
            assert one == [{k: v for k, v in r.items() if k != "decoded" or not shares} for r in alone[name]]
    assert set(found[0]["tasks"]["mood"]) == {"label", "probability", "probabilities", "decoded", "truncated"}
    assert len({json.dumps(r["probabilities"]) for r in found[0]["tasks"].values()}) == 5
    runs = tinyld.load(fast[:1])
    base = runs.runs["fast-a"].base
    with ThreadPoolExecutor(1) as pool, ONE_AT_A_TIME:
        adding = pool.submit(runs.add, fast[1])
        with pytest.raises(TimeoutError):  # while another thread may ask
            adding.result(0.2)
    assert adding.result().base is base and list(runs.predict("rain")[0]["tasks"]) == ["fast-a", "fast-b"]
    refuses("is given twice", runs.add, fast[1])
    refuses("was made for no task", runs.add, place / "base", kind=tinyld.UsageError)
    for rows, part in (([{"said": "rain"}], "no column 'text'"), ([None], "'text' has no value")):
        refuses(part, tinyld.load(fast[:2]).predict, rows)
    refuses("same reads a, b", tinyld.load([fast[0], place / "same"]).predict, "rain", kind=tinyld.UsageError)
    assert "Denoiser" not in repr(runs), "a notebook shows it"


def test_runs_of_one_name_all_answer_and_none_twice(place: Path) -> None:
    for folder in ("other", "."):
        shutil.copytree(place / "mood", Path(folder) / "m")
    runs = tinyld.load(["other/m", "m"], base=place / "base")
    assert list(runs.runs) == ["m", str(Path("m").resolve())]
    for again in ("other/../m", Path("m").resolve()):
        refuses("is given twice", runs.add, again, kind=tinyld.UsageError)
    os.chdir("m")
    assert list(tinyld.load([".", "../other/m"], base=place / "base").runs) == ["m", "../other/m"]


def test_threads_may_share_what_is_loaded(fast: list[Path]) -> None:
    runs, texts = tinyld.load(fast[:2]).runs, ["rain", "the sun is", "a sea"] * 20
    right = {name: run.predict(texts) for name, run in runs.items()}
    with ThreadPoolExecutor(4) as pool:
        found = [(name, pool.submit(runs[name].predict, texts)) for name in [*runs] * 10]
        assert all(each.result() == right[name] for name, each in found)


def test_a_child_of_a_process_that_answers_in_a_thread_answers_too(fast: list[Path]) -> None:
    run = tinyld.load(fast[0])
    asking = threading.Thread(target=lambda: [run.predict(["rain"]) for _ in range(20)])
    asking.start()
    child = os.fork()
    if child == 0:
        os._exit(0 if ONE_AT_A_TIME.acquire(timeout=5) else 1)
    asking.join()
    assert os.waitpid(child, 0)[1] == 0


def test_a_base_that_others_hang_their_pushes_on_answers_by_itself(fast: list[Path], place: Path) -> None:
    base = tinyld.load(place / "base")
    before = base.predict(["rain"], task=str(place / "a.toml"))
    run = tinyld.load(fast[0], bases=[base.base])
    answered = run.predict(["rain"])
    assert base.predict(["rain"], task=str(place / "a.toml")) == before and run.predict(["rain"]) == answered


def test_texts_may_come_of_other_threads_that_ask_too(fast: list[Path]) -> None:
    with ThreadPoolExecutor(1) as pool:
        for run in (tinyld.load(fast[0]), tinyld.load(fast[:2])):
            texts = (pool.submit(run.predict, [text]).result(timeout=60)[0]["text"] for text in ("rain", "sea"))
            assert [r["text"] for r in run.predict(texts)] == ["rain", "sea"]


def test_columns_of_two_tasks_meet_by_name_whatever_their_order(place: Path) -> None:
    text = (place / "same.toml").read_text().replace("same.csv", str(place / "same.csv"))
    for name, template in (("ab", "{a} {b}"), ("ba", "{b} {a}")):
        Path(f"{name}.toml").write_text(text.replace("{a} {b}", template))
        tinyld.finetune(f"{name}.toml", base=place / "base", out=name, **FAST)
    rows = [{"a": "rain , the rain", "b": "sun"}]
    alone, runs = tinyld.load("ba").predict(rows)[0], tinyld.load(["ab", "ba"])
    assert runs.predict(rows)[0]["tasks"]["ba"]["probabilities"] == alone["probabilities"]
    assert len(runs.groups()) == 2, "their prompts differ"
    Path("said.csv").write_text("said,label\n" + "rain,sad\nsun,happy\n" * 9)
    tinyld.finetune("said.csv", text_column="said", base=place / "base", out="said", **QUICK)
    runs = tinyld.load([place / "mood", "said"])
    assert len(runs.predict([{"text": "rain"}])[0]["tasks"]) == 2, "a file may call the text as the first run does"
    with pytest.raises(tinyld.UsageError, match="said reads said, which the rows have beside text: ask it by itself"):
        runs.predict([{"text": "rain"}, {"text": "rain", "said": "sun"}])


def test_many_tasks_are_asked_on_the_command_line(fast: list[Path], place: Path) -> None:
    Path("new.csv").write_text("id,text\n1,rain\n2,the sun\n")
    expected = [{"id": str(i), **r} for i, r in enumerate(tinyld.load(fast[:2]).predict(["rain", "the sun"]), 1)]
    ran = ask(*fast[:2], "new.csv")
    assert [json.loads(line) for line in ran.stdout.splitlines()] == expected and ran.stderr == ""
    ran = ask(*fast, text="rain\n")
    assert "2 passes a text: fast-a, fast-b, fast-c; fast-d (runs share one if they are of --recipe fast" in ran.stderr
    (row,) = csv.DictReader(io.StringIO(ask(*fast[:2], "--csv", text="rain\n").stdout))
    assert set(row) == {"text", "fast-a", "p(fast-a)", "fast-b", "p(fast-b)"}
    for runs in (("mood", "tell"), ("tell", "mood")):
        good("predict", *(place / name for name in runs), "--text", "rain", "--set", "lengths=3")
    alone = records(fast[0], "--temperature", 0.5, text="rain\n")[0]
    assert {"text": "rain"} | records(*fast[:2], "--temperature", 0.5, text="rain\n")[0]["tasks"]["fast-a"] == alone
    refuses("temperature must be at least 0", tinyld.load(fast[:2]).predict, "rain", temperature=-1, kind=UsageError)


def test_a_named_column_is_what_every_run_reads(fast: list[Path], place: Path) -> None:
    """Another column that has the name of a task's own is kept beside it."""
    Path("its.csv").write_text("said,n\nrain,1\n")
    (found,) = records(*fast[:2], "its.csv")
    assert found["text"] == "rain" and set(found["tasks"]) == {"fast-a", "fast-b"}, "the second one's column is there"
    Path("both.csv").write_text("text,said,Said\nthe sun,rain,x\n")
    first, *_ = records(*fast[:2], "both.csv", "--column", "said")
    expected = tinyld.load(fast[:2]).predict("rain")[0]
    assert first == {"given_text": "the sun", "text": "rain", "Said": "x", "tasks": expected["tasks"]}
    shutil.copy("both.csv", "new.csv")
    ran = ask(fast[0], "both.csv", "new.csv")
    assert ran.code == 2 and "predict reads one file, got both.csv and new.csv" in ran.stderr


def test_a_run_predicts_the_same_when_it_was_moved_and_its_task_file_is_gone(place: Path) -> None:
    before = records(place / "mood", text="rain\nsun\n")
    files = {p.name: p.read_bytes() for p in (place / "mood").iterdir()}
    shutil.copytree(place / "mood", "moved")
    os.rename(place / "mood.toml", place / "gone.toml")
    try:
        assert records("moved", "--base", place / "base", text="rain\nsun\n") == before
    finally:
        os.rename(place / "gone.toml", place / "mood.toml")
    assert {p.name: p.read_bytes() for p in (place / "mood").iterdir()} == files, "nothing is written into the run"


@pytest.mark.parametrize(("name", "old", "new"), [
    ("mood", "very well", "good"), ("other", "very well", "good"), ("other", "it was", "i feel"),
])  # fmt: skip
def test_another_task_than_the_runs_is_refused_with_the_difference(name: str, old: str, new: str, place: Path) -> None:
    task = (place / "mood.toml").read_text()
    assert old in task
    Path(f"{name}.toml").write_text(task.replace(old, new))
    for verb in ("predict", "eval"):
        ran = cli(verb, place / "mood", "--task", f"{name}.toml", "--quiet", text="rain\n")
        assert ran.code == 1 and old in ran.stderr and new in ran.stderr
    Path("same.toml").write_text(task.replace("text}", "said}"))
    assert tinyld.load(place / "mood").predict("rain", task="same.toml")[0]["label"] in ("sad", "happy")


@pytest.mark.parametrize(("args", "text", "code", "part"), [
    ("{place}/base", "rain", 2, "was made for no task"),
    ("{place}/same", "rain", 2, "reads a and b: give a .csv"),
    ("{place}/mood {place}/header.csv", "", 1, "header.csv: there are no rows in it"),
    ("{place}/mood new.md", "", 2, "the name must end in .txt, .tsv, .csv, .jsonl"),
    ("{place}/mood new.txt", "", 1, "new.txt: cannot be read (No such file or directory)"),
    ("{place}/mood new.txt --text rain", "", 2, "give a file or --text, not both"),
    ("{place}/mood --column text", "rain", 2, "--column is for a file with columns"),
    ("{place}/mood other.csv", "", 1, "line 2: no column 'text', found 'a, b'; say by --column which it is"),
    ("{place}/mood {place}/same", "rain", 2, "reads a, b, task mood text: no row suits both, so ask each by itself"),
    ("{place}/mood {place}/mood.csv --column words", "", 2, "mood.csv: line 2: no column 'words'"),
    *((f"{{place}}/mood bad.csv --out {out}", "", 1, "cannot be written") for out in ("link.csv", "/proc/x.csv")),
    ("{place}/mood bad.csv --out new.csv", "", 1, "line 2002: 2 columns"),  # before the first is answered
    ("{place}/mood bad.jsonl", "", 1, "line 2001: no column 'text'"),
    ("{place}/mood --out nowhere/x.csv", "rain", 1, "cannot be written"),
    ("{place}/mood", b"\xff\n", 1, "stdin: line 1: not UTF-8; send it as UTF-8"),
    ("{place}/mood --sampler ancestral --set threshold=0.4", "rain", 2, "go with threshold, klass, entropy"),
    ("{place}/mood", 'label,text\n2,"rain, sun"\n', 1, "stdin: line 1 names columns, text among them: a table is"),
    ("{place}/mood", '{"words": "rain"}\n', 1, "stdin: line 1 is JSON: a table is given as a file"),
    ("{place}/mood tabs.txt", "", 2, "tabs.txt: all lines have a tab: name it .tsv"),
    ("{place}/mood", "text\nrain\n", 1, "stdin: line 1 is 'text', the name of a column: a table is"),
    ("{place}/mood table.txt", "", 1, "table.txt: line 1 names columns, text among them"),
    ("{place}/mood --csv --out new.jsonl", "rain", 2, "--csv: --out new.jsonl is no name of a CSV"),
    ("{place}/mood --set lengths=3", "rain", 2, "--set lengths has no effect where answers are labels"),
    ("{place}/fast-a {place}/fast-b --task a", "rain", 2, "--task is for one run"),
    ("nowhere", "rain", 1, "no run in nowhere"),
    ("{place}/mood nowhere", "rain", 1, "nowhere: no such run or file"),
    ("{place}/mood.csv {place}/mood", "", 1, "mood.csv: expected config.json, found a file, no folder"),
])  # fmt: skip
@pytest.mark.usefixtures("fast")
def test_what_cannot_be_answered_is_refused_in_a_line(args: str, text: Any, code: int, part: str, place: Path) -> None:
    Path("table.txt").write_text("label,text\nsad,rain\n")
    Path("tabs.txt").write_text("Id\tWords\n1\train\n")
    Path("other.csv").write_text("a,b\nx,y\n")
    Path("bad.csv").write_text("text\n" + "rain\n" * 2000 + "sun,sea\n")
    Path("bad.jsonl").write_text('{"text": "rain"}\n' * 2000 + '{"said": "rain"}\n')
    Path("real.csv").touch()
    Path("link.csv").symlink_to("real.csv")
    before = tree(Path())
    assert_refused(ask(*args.format(place=place).split(), text=text), code, part)
    assert tree(Path()) == before


def start(*args: object, verb: str = "predict", **more: Any) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "tinyld", verb, *map(str, args)]
    environment = os.environ | {"PYTHONPATH": str(Path(tinyld.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **more)


def test_a_filter_lives_and_answers_each_line_at_once(place: Path) -> None:
    took = []
    with start(place / "mood", stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        for text in ("rain", "sun", "sea"):
            process.stdin.write(f"{text}\n".encode())
            process.stdin.flush()
            began = time.monotonic()
            assert json.loads(process.stdout.readline())["text"] == text
            took.append(time.monotonic() - began)
        process.stdin.close()
    assert process.returncode == 0
    assert min(took[1:]) < 0.5, "60 ms on an idle machine"


def test_what_is_typed_goes_on_after_a_line_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    class Terminal(io.BytesIO):
        def read1(self, size: int | None = -1) -> bytes:
            return self.readline()

    stdin = io.TextIOWrapper(Terminal(b"rain\n\xff\nsea\n\xfe\nsun"))
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", stdin)
    found = [row for rows in piped_lines([load_task(str(place / "mood.toml"))]) for row in rows]
    assert [(where, *row.values()) for where, row in found] == [
        ("stdin: line 1", "rain"), ("stdin: line 3", "sea"), ("stdin: line 5", "sun"),
    ]  # fmt: skip
    assert re.findall(r"stdin: line \d", capsys.readouterr().err) == ["stdin: line 2", "stdin: line 4"]


def test_a_full_disk_and_a_reader_that_is_gone_end_it_cleanly(place: Path) -> None:
    with open("/dev/full", "wb") as full:
        for process in (start(place / "mood", stdout=full), start(verb="--help", stdout=full)):
            _, stderr = process.communicate(b"rain\n" * 9)
            assert process.returncode == 1 and stderr.startswith(b"tinyld: ") and stderr.count(b"\n") == 1, stderr
    process = start(place / "mood", stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, stderr = process.communicate(b"rain\n" * 9)
    assert process.returncode != 0 and stderr == b""

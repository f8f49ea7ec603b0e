"""A row a run, a row a method over its seeds, and tables that fit."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_refused, cli, refuses

from tinyld.config import TrainConfig, to_dict
from tinyld.evaluate import wilson
from tinyld.methods import METHODS
from tinyld.options import ReportOptions
from tinyld.report import COLUMNS, aggregate, interval, labels, report, result_tables, run_rows, show, student, unlike
from tinyld.runs import ADAPTER, CONFIG, RESULTS, RunFolder
from tinyld.tables import print_table


def row(method: str, seed: int, accuracy: float | None, **changes: Any) -> dict[str, Any]:
    """What a CSV has of one run."""
    found = dict.fromkeys(COLUMNS) | {"task": "mood", "split": "dev", "base": "small", "fingerprint": "f"}
    found |= {"method": method, "recipe": "", "settings": "", "training": "", "rows": 1_000, "epochs": 3.0, "lr": 1e-3}
    found |= {"run": f"{method}-{seed}", "seed": seed, "n": 400, "accuracy": accuracy, "nll_bound": 0.5}
    found |= {"nll_stderr": 0.1, "stored_percent": 0.5, "seconds": 10.0, "threads": 1, "optimizer": "adamw"}
    return found | changes


def run_folder(path: Path, **changes: Any) -> RunFolder:
    """An evaluated adapter, as finetune and eval leave it."""
    method = {"name": "weight-lora", **to_dict(METHODS["weight-lora"].Config())}
    base = {"path": "/x/small", "fingerprint": "f"}
    config = {"kind": "adapter", "task": {"name": "mood"}, "method": method, "base": base, "data": {"rows": 9}}
    config["train"] = to_dict(TrainConfig(epochs=3.0, seed=2, lr=1e-3))
    config["parameters"] = {"stored_parameters": 5, "stored_percent": 0.5, "stored_bytes": 20}
    config["environment"] = {"threads": 2, "command": "tinyld finetune --task mood"}
    folder = RunFolder.create(path, force=True)
    folder.write_json(CONFIG, config | changes)
    found = {"n": 400, "accuracy": 0.75, "low": 0.7, "high": 0.8, "nll_bound": 0.5, "nll_stderr": 0.1}
    evaluations = {"mood/dev": found, "mood/test": found | {"n": 300}, "other/dev": found}
    finetune = {"seconds": 4.5, "peak_memory_mb": 100.0, "dev_accuracy": 0.7, "dev_nll_bound": 0.6}
    folder.write_json(RESULTS, {"finetune": finetune, "eval": evaluations})
    folder.write(ADAPTER, b"")
    return folder


def test_ranks_that_were_found_are_called_auto_as_each_seed_finds_others(tmp_path: Path) -> None:
    settings = {"name": "trajectory-lora", **to_dict(METHODS["trajectory-lora"].Config())}
    now, then = settings | {"ranks": [3, 2, 1, 4, 4, 4]}, settings | {"ranks": [8, 8, 8], "prune": 0.5}
    (found, _) = run_rows(run_folder(tmp_path / "run", method=now, started_as=then))
    assert found["settings"] == "ranks auto of 8"


def test_a_run_is_shown_on_test_once_it_has_been_tested(tmp_path: Path) -> None:
    rows = run_rows(run_folder(tmp_path / "run"), trials=3)
    assert [(r["task"], r["split"], r["n"]) for r in rows] == [("mood", "test", 300), ("other", "dev", 400)]
    assert rows[0]["seed"] == 2 and rows[0]["trials"] == 3 and rows[0]["threads"] == 2 and rows[0]["base"] == "small"
    assert rows[0]["dev_nll_bound"] == 0.6 and rows[0]["stored_bytes"] == 20 and rows[0]["command"].startswith("tinyld")
    assert set(rows[0]) == set(COLUMNS)


def test_what_report_writes_as_csv_is_a_row_a_run(tmp_path: Path) -> None:
    run_folder(tmp_path / "runs" / "one")
    run_folder(tmp_path / "runs" / "two")
    file = tmp_path / "all.csv"
    found = report(ReportOptions(runs=(tmp_path / "runs",), csv=file))
    with open(file, newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert len(rows) == 4 and list(rows[0]) == list(COLUMNS)
    assert rows[0]["trials"] == "", "nobody knows how many rates were tried"
    assert (rows[0]["run"], rows[0]["accuracy"], rows[0]["steps"]) == ("one", "0.75", "")
    assert [r["seeds"] for r in found] == [1, 1], "a copy of a run is no further seed"
    assert all(isinstance(r["accuracy"], float) and isinstance(r["n"], int) for r in json.loads(json.dumps(found)))


@pytest.mark.parametrize(("unreadable", "shown"), [(0.01, False), (0.6, True)])
def test_methods_whose_answers_are_no_labels_words_are_not_ranked_in_silence(unreadable: float, shown: bool) -> None:
    row = dict.fromkeys(COLUMNS) | {"task": "mood", "method": "full", "rows": 9, "n": 8, "seed": 0, "base": "small"}
    row |= {"accuracy": 0.1, "low": 0.0, "high": 0.2, "nll_bound": 0.5, "nll_stderr": 0.1, "seconds": 1.0}
    row |= {"stored_percent": 1.0, "stored_parameters": 3, "stored_bytes": 12, "unreadable": unreadable}
    ((_, columns, ((*cells,),)),) = result_tables(aggregate([row]))
    assert ("unreadable %" in columns) == ("60.0" in cells) == shown


def test_what_is_no_evaluated_adapter_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("{}")
    for name in ("nowhere", "file"):
        refuses("no run in .*: name evaluated adapters", report, ReportOptions(runs=(tmp_path / name,)))
    run_folder(tmp_path / "new").write_json(RESULTS, {"finetune": {}})
    for kind in ("base", "composition"):
        run_folder(tmp_path / kind, kind=kind)
    (tmp_path / "mine-rows.jsonl").write_text("{}")
    none = tuple(tmp_path / name for name in ("new", "base", "composition", "mine-rows.jsonl"))
    refuses("none of these is an adapter that was evaluated", report, ReportOptions(runs=none))
    run_folder(tmp_path / "good")
    assert len(report(ReportOptions(runs=(*none, tmp_path / "good")))) == 2
    left_out = ", ".join(map(str, none[:3]))
    assert capsys.readouterr().err.count(f"left out: {left_out}: adapters alone have a row, once they are") == 2
    assert len(report(ReportOptions(runs=(tmp_path,)))) == 2
    assert f"left out: {tmp_path}/base, {tmp_path}/composition, {tmp_path}/new: " in capsys.readouterr().err
    run_folder(tmp_path / "other", kind="base")
    report(ReportOptions(runs=(tmp_path,)))
    assert f"{tmp_path}/new and 1 more: " in capsys.readouterr().err
    folder = run_folder(tmp_path / "damaged")
    folder.write_json(RESULTS, {"finetune": {}, "eval": {"mood/dev": {"accuracy": 7}}})
    refuses("results.json: eval: 'mood/dev': accuracy", report, ReportOptions(runs=(folder.path,)))
    capsys.readouterr()
    assert len(report(ReportOptions(runs=(tmp_path,)))) == 2, "of a folder of runs the others are shown"
    assert re.search("damaged/results.json: eval: 'mood/dev': accuracy .*; it is left out", capsys.readouterr().err)


def test_whatever_sets_two_runs_apart_is_told_in_words(tmp_path: Path) -> None:
    usual = to_dict(METHODS["weight-lora"].Config())
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in usual.items()}
    assert unlike(plain, usual) == ""
    shown = unlike(plain | {"rank": 3, "rslora": True, "targets": ["query", "key"]}, usual)
    assert set(shown.split(", ")) == {"rank 3", "targets query key", "rslora"}
    assert unlike({"ranks": [9, 9, 9]}, {}) == "ranks 9" and unlike({"ranks": [9, 4, 1]}, {}) == "ranks 9/4/1"
    trained = to_dict(TrainConfig(epochs=1.0))
    for field, expected in (("warmup", "warmup 7"), ("clip", "clip 7"), ("steps", ""), ("device", "")):
        changes = {"train": trained | {field: 7}, "base": {"path": "b", "fingerprint": "f", "dtype": "int8"}}
        (row, _) = run_rows(run_folder(tmp_path / field, **changes))
        assert row["training"] == expected and row["settings"] == "base in int8"


@pytest.mark.parametrize(("name", "keys", "value"), [  # file, keys, the value there; None: it is taken away
    *((CONFIG, (name,), {}) for name in ("method", "base")), (CONFIG, ("base", "path"), 5),
    (CONFIG, ("base", "fingerprint"), []), (CONFIG, ("method", "recipe"), []), (CONFIG, ("task", "path"), 5),
    (CONFIG, ("train", "seed"), {}), (CONFIG, ("train", "optimizer"), []), (CONFIG, ("model",), []),
    (RESULTS, ("eval", "mood/test", "sha256"), 5), (RESULTS, ("eval", "mood/test", "n"), None),
    (RESULTS, ("eval", "mood/test", "nll_bound"), None), (RESULTS, ("eval", "mood/test", "bleu"), "x"),
    (RESULTS, ("finetune", "peak_memory_mb"), "x"), (RESULTS, ("finetune", "seconds"), None), (RESULTS, ("text",), 5),
])  # fmt: skip
def test_a_crafted_run_is_refused_in_a_line(name: str, keys: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    record = whole = folder.read_json(name)
    for key in keys[:-1]:
        record = record[key]
    record.pop(keys[-1], None)
    record |= {} if value is None else {keys[-1]: value}
    folder.write_json(name, whole)
    assert_refused(cli("report", folder.path), 1, f"tinyld: {folder.path}")


def test_what_is_odd_but_harmless_in_a_config_changes_no_figure(tmp_path: Path) -> None:
    lists = {"name": "weight-lora", "targets": [["query"]], "rank": 3}
    train = to_dict(TrainConfig(epochs=3.0)) | {"accuracy": 0.99, "warmup": [{}]}
    (found, _) = run_rows(run_folder(tmp_path / "run", method=lists, train=train))
    assert found["accuracy"] == 0.75 and "rank 3" in found["settings"]


def test_seeds_are_averaged_and_compared_with_the_best_full() -> None:
    rows = [row("full", 0, 0.9), row("full", 1, 0.8), row("full", 0, 0.7, lr=2e-3), row("bitfit", 0, 0.68)]
    found = {(r["method"], r["lr"]): r for r in aggregate([*rows, *rows])}
    best = found["full", 1e-3]
    assert best["seeds"] == 2 and best["accuracy"] == pytest.approx(0.85) and best["of_full"] == pytest.approx(1)
    assert (best["low"], best["high"]) == interval([0.9, 0.8], 400)
    assert found["bitfit", 1e-3]["of_full"] == pytest.approx(0.8)
    assert best["nats"] == pytest.approx(0.5) and best["nats_half"] == pytest.approx(0.196)


@pytest.mark.parametrize("change", [
    *({name: "x"} for name in ("settings", "fingerprint", "training", "recipe", "data")), {"rows": 7}, {"n": 5},
])  # fmt: skip
def test_runs_of_other_settings_or_bases_get_a_row_of_their_own(change: dict[str, Any]) -> None:
    rows = aggregate([row("full", 0, 0.9), row("full", 1, 0.6, **change)])
    assert [r["seeds"] for r in rows] == [1, 1]
    shares = {r["accuracy"]: r["of_full"] for r in rows}
    alone = not change.keys().isdisjoint(("fingerprint", "rows", "n"))
    assert shares[0.6] == pytest.approx(1.0 if alone else 0.6 / 0.9), "each base has a full of its own"


def test_runs_with_fewer_threads_are_not_timed() -> None:
    (found,) = aggregate([row("full", 0, 0.8, threads=2), row("full", 1, 0.8, seconds=30.0)])
    assert (found["seeds"], found["seconds"], found["threads"]) == (2, 10.0, 2)


def test_an_interval_holds_both_the_rows_chance_and_the_seeds() -> None:
    assert interval([0.8], 100) == wilson(80, 100)
    low, high = interval([0.7, 0.9], 10_000)
    assert low < 0.7 and high > 0.9  # two seeds 20 points apart say little, however many rows there are
    assert interval([0.8, 0.8, 0.8], 100) == pytest.approx(wilson(80, 100))
    assert (student(1), student(16), student(99)) == (12.706, 2.120, 2.042)


def test_a_method_is_told_from_the_others_by_as_few_words_as_do() -> None:
    rows = [
        row("full", 0, 0.9, optimizer="muon", settings="x"), row("full", 0, 0.9, settings="x"),
        row("bitfit", 0, 0.8, settings="y"), row("lora", 0, 0.8, settings="rank 1"),
        row("lora", 0, 0.8, settings="rank 8"), row("lora", 0, 0.8, settings="rank 8", lr=2e-3),
        row("adapters", 0, 0.8, batch_size=8), row("adapters", 0, 0.8, batch_size=16),
        row("tuned", 0, 0.8, data="a1"), row("tuned", 0, 0.8, data="b2"),
        row("short", 0, 0.8, epochs=None, steps=5), row("short", 0, 0.8, epochs=10.0),
        row("other", 0, 0.8, tested="a1"), row("other", 1, 0.8, tested="b2"),
    ]  # fmt: skip
    assert len(aggregate(rows[-2:])) == 2, "they were measured on other rows"
    assert labels(rows) == [
        *("full, muon", "full, adamw", "bitfit"),
        *("lora, rank 1", "lora, rank 8, lr 0.001", "lora, rank 8, lr 0.002"),
        *("adapters, batch size 8", "adapters, batch size 16", "tuned, data a1", "tuned, data b2"),
        *("short, steps 5", "short, epochs 10.0", "other, tested a1", "other, tested b2"),
    ]


def test_each_task_has_a_table_with_what_its_answers_have() -> None:
    texts = {"task": "write", "rouge_l": 0.5, "exact_match": 0.25}
    rows = [row("full", 0, 0.9), row("bitfit", 0, 0.45), row("bitfit", 0, None, **texts)]
    rows.append(row("full", 0, None, **texts | {"bleu": 40.0, "rouge_l": 0.8}))
    (title, columns, cells), (_, written, texts) = result_tables(aggregate(rows))
    assert title == "mood on small, 1000 training rows, 400 dev rows, seeds: 1"
    assert columns == ["method", "accuracy %", "95% interval", "% of full", "stored %", "seconds"]
    assert cells[0] == ["bitfit", "45.0", "40.2 to 49.9", "50.0", "0.50", 10]
    assert written == ["method", "BLEU", "ROUGE-L %", "exact %", "% of full", "stored %", "seconds"]
    _, (_, wide, cells) = result_tables(aggregate(rows), wide=True)
    assert {*written, "nats", "seeds"} < set(wide) and cells[0][wide.index("epochs")] == 3
    assert [text[1:5] for text in texts] == [[None, "50.0", "25.0", "62.5"], ["40.0", "80.0", "25.0", "100.0"]]


LONG = "trajectory-lora, ranks 89, blocks 6, read mix, attend 30, read attended, dropout 0.1, tied, muon, base in int8"


def test_a_table_fits_80_columns_and_breaks_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("full", 0, 0.9123), row("bitfit", 0, 0.8, settings=LONG), row("bitfit", 0, 0.7, settings=LONG + " x")]
    show(aggregate(rows), ReportOptions())
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "88.1 to 93.6" in out and " 91.2 " in out
    print_table("few", ["method", *(f"column {i}" for i in range(7))], [["full", *range(7)]])
    assert re.search(r"^method +full *$", capsys.readouterr().out, flags=re.M), "nor a short word"
    columns = ["method", *(f"column {i}" for i in range(12))]
    print_table("many", columns, [["full", *(1_000_000 + i for i in range(12))]])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert re.search(r"^column 11 +1,000,011 *$", out, flags=re.M), "rows that do not fit are shown a line a column"


def test_text_from_outside_is_shown_without_control_characters_or_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("t\x1b[2J", ("a", "b"), [("[red]x\x1b]0;y\x07", "é\n"), ("\u202e", 1)])
    out = capsys.readouterr().out
    print_table(":smile:", (":heart:", "b"), [("a :smile:", "b\\"), ("c", 1)])
    words = {word.strip() for word in re.split("  +|\n", capsys.readouterr().out)}
    assert {":smile:", ":heart:", "a :smile:", "b\\"} <= words
    assert "[red]x?]0;y?" in out and "\x1b" not in out and "\x07" not in out and "\u202e" not in out

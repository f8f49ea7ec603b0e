"""The grid: what runs, what is not run again, how a rate is chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS, cli, good
from test_report import run_folder

from tinyld import compare
from tinyld.compare import Asked, Grid, variants
from tinyld.config import PRESETS, ModelConfig
from tinyld.errors import TinyldError, UsageError
from tinyld.finetuning import config_of
from tinyld.options import CompareOptions, EvalOptions, FinetuneOptions
from tinyld.report import aggregate
from tinyld.runs import ADAPTER, RESULTS, RunFolder
from tinyld.tasks import load_task

MODEL = ModelConfig(vocab_size=8_192, **PRESETS["small"])


class Trainer:
    """Stands in for training and evaluation: writes runs whose dev accuracy depends on method, rate and seed alone."""

    def __init__(self) -> None:
        self.ran: list[Any] = []

    def finetune(self, options: FinetuneOptions) -> None:
        self.ran.append(options)
        made = config_of(options)
        made |= {"base": made["base"] | {"fingerprint": "f"}}
        made["data"] |= {"rows": 10}
        folder = run_folder(Path(options.out), **made)
        accuracy = 0.9 if options.lr == 2e-3 else 0.8
        found = {"task": options.task, "dev_nll_bound": 1.4 - accuracy, "seconds": 1.0, "peak_memory_mb": 1.0}
        found |= {"dev_accuracy": accuracy} if options.task == "reviews" else {}
        folder.write_json(RESULTS, {"finetune": found})

    def evaluate(self, options: EvalOptions) -> None:
        self.ran.append(options)
        folder = RunFolder(options.runs[0])
        results, task = folder.read_json(RESULTS), folder.config["task"]["name"]
        found = {"n": 500, "sha256": "rows", "rows_per_second": 9.0, "nll_bound": 0.7, "nll_stderr": 0.1}
        found |= {"accuracy": 0.5, "unreadable": 0.0} if task == "reviews" else {}
        folder.write_json(RESULTS, results | {"eval": {f"{task}/{options.split}": found}})


@pytest.fixture(autouse=True)
def real_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `grid` replaces is put back."""
    monkeypatch.setattr(compare, "finetune", compare.finetune)
    monkeypatch.setattr(compare, "evaluate", compare.evaluate)


def asked(*tasks: str) -> list[Asked]:
    return [Asked(load_task(name), name, "dev" if name == "write" else "test", "rows", {}) for name in tasks]


def grid(out: Path, trainer: Any, task: tuple[str, ...] = ("reviews",), base: str = "f", **changes: Any) -> Grid:
    options = CompareOptions(**{"out": out, "task": task, "epochs": 1.0, "device": "cpu", "quiet": True} | changes)
    methods = variants("full:lr=0.001,bitfit:lr=0.01", MODEL)
    compare.finetune, compare.evaluate = trainer.finetune, trainer.evaluate
    return Grid(options, asked(*task), methods, base)


def trained(trainer: Trainer) -> list[str]:
    return [o.out.name for o in trainer.ran if isinstance(o, FinetuneOptions)]


def test_every_rate_is_tried_once_and_the_best_on_dev_gets_the_other_seeds(tmp_path: Path) -> None:
    trainer = Trainer()
    rows = grid(tmp_path, trainer).run()
    assert trained(trainer)[:5] == [f"reviews_full_lr{lr}_s0" for lr in ("0.001", "0.0005", "0.002")] + [
        f"reviews_full_lr0.002_s{seed}" for seed in (1, 2)
    ]
    assert len(trained(trainer)) == 10 == grid(tmp_path, trainer).total
    assert [(row["lr"], row["seed"], row["trials"]) for row in rows[:3]] == [(2e-3, seed, 3) for seed in range(3)]
    evaluated = [o for o in trainer.ran if isinstance(o, EvalOptions)]
    assert len(evaluated) == 6 and {o.split for o in evaluated} == {"test"}, "only what was chosen meets the test rows"
    assert [(row["method"], row["seeds"]) for row in aggregate(rows)] == [("bitfit", 3), ("full", 3)]
    again = Trainer()
    assert grid(tmp_path, again).run() == rows and again.ran == [], "the same command again runs nothing"


def test_a_generation_task_goes_by_its_nats(tmp_path: Path) -> None:
    trainer = Trainer()
    rows = grid(tmp_path, trainer, ("write", "reviews")).run()
    assert [row["lr"] for row in rows[:3]] == [2e-3] * 3
    row = next(row for row in aggregate(rows) if row["task"] == "write")
    assert row["nats"] == pytest.approx(0.7) and row["nats_half"] == pytest.approx(0.196)
    assert row["accuracy"] is row["low"] is row["of_full"] is row["unreadable"] is None


def test_what_was_interrupted_goes_on_and_what_was_cut_short_is_made_again(tmp_path: Path) -> None:
    trainer = Trainer()
    grid(tmp_path, trainer, trials=2, seeds=1).run()
    first, second = (RunFolder(tmp_path / f"reviews_full_lr{lr}_s0") for lr in ("0.001", "0.0005"))
    for folder in (first, second):
        (folder.path / ADAPTER).unlink()
    first.save_checkpoint(10, {}, {}, 1)

    class Resuming(Trainer):
        def finetune(self, options: FinetuneOptions) -> None:
            if options.resume is None:
                return super().finetune(options)
            self.ran.append(options)
            first.write(ADAPTER, b"")

    again = Resuming()
    grid(tmp_path, again, trials=2, seeds=1).run()
    assert again.ran[0] == FinetuneOptions(resume=first.path, quiet=True)
    assert again.ran[1].force and again.ran[1].out == second.path
    assert len(again.ran) == 2, "what was tested stays so"


@pytest.mark.parametrize(("changes", "said"), [
    ({"epochs": 2.0}, "its epochs was 1.0, and would be 2.0"), ({"base": "g"}, "its fingerprint was f, and would be g"),
])  # fmt: skip
def test_a_run_that_was_made_otherwise_is_refused_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    grid(tmp_path, Trainer()).run()
    trainer = Trainer()
    with pytest.raises(TinyldError, match=f"reviews_full_lr0.001_s0 was made otherwise: {said}; choose another --out"):
        grid(tmp_path, trainer, **changes).run()
    assert trainer.ran == []


def test_a_run_of_a_task_that_has_changed_is_no_run_of_it(tmp_path: Path) -> None:
    file, words = tmp_path / "mood.toml", '[verbalizer]\na = "bad"\nb = "good"\n[data]\ntrain = "x.csv"\n'
    for template in ("{text} is {answer}", "{text} was {answer}"):
        file.write_text(f'template = "{template}"\n{words}')
        asked = grid(tmp_path / "grid", Trainer(), (str(file),))
        if template == "{text} is {answer}":
            asked.run()
        else:
            with pytest.raises(TinyldError, match="was made for another task: template was .* is .*; choose another"):
                asked.run()


def test_variants_carry_their_options(tmp_path: Path) -> None:
    (one,) = variants("weight-lora:budget=0.7%:targets=query/key", MODEL)
    assert (one.method, one.sets) == ("weight-lora", ["budget=0.7%", "targets=query,key"])
    (moved,) = variants("weight-lora:lr=0.2:rank=3:rslora", MODEL)
    assert moved.lr == 0.2 and moved.name == "weight-lora-rank=3-rslora=true"
    made = grid(tmp_path, Trainer())
    cell = made.cell(made.rows[0][0], 50, moved, 0.2, 1)
    assert cell.out.name == "reviews_weight-lora-rank=3-rslora=true_lr0.2_n50_s1"
    assert (cell.rank, cell.rslora, cell.lr, cell.limit, cell.seed) == (3, True, 0.2, 50, 1)
    adamw, muon = variants("trajectory-lora:optimizer=adamw,trajectory-lora", MODEL)
    assert muon.lr != adamw.lr
    assert variants("trajectory-lora:recipe=fast", MODEL)[0].lr != muon.lr, "the grid is around the recipe's usual rate"
    assert len(variants("all", MODEL)) == 5
    no_biases = {name: False for name in ("qkv_bias", "out_bias", "mlp_bias", "head_bias")}
    bare = replace(MODEL, norm="rms", activation="silu", gated=True, **no_biases)
    assert "bitfit" not in [variant.method for variant in variants("all", bare)]
    with pytest.raises(UsageError, match="--methods: bitfit has nothing to train in this base"):
        variants("full,bitfit", bare)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora", "--methods takes full, .* or all, .* got 'lora'"),
        ("full:epochs=2", "epochs is the same for all methods; give it as --epochs"),
        ("full:lr=x", "--methods full:lr=x: .*'x' is not a number"),
        ("full:lr=2", "lr must be between 0 and 1, got 2"),
        ("full:rank=2", "--methods full:rank=2: --rank is not an option of full"),
        ("full:depth=2", "--methods full:depth=2: --set depth=2: there is no option"),
    ],
)
def test_wrong_variants_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        variants(text, MODEL)


@pytest.mark.parametrize("twice", [{"task": ("reviews", "reviews")}, {"limit": (5, 5)}])
def test_what_is_named_twice_is_refused(tmp_path: Path, twice: dict[str, Any]) -> None:
    options = CompareOptions(out=tmp_path, **twice)
    tasks = asked(*(options.task or ["reviews"]))
    for methods in (variants("full", MODEL), variants("full,full:lr=0.001", MODEL)):
        with pytest.raises(UsageError, match=f"--({next(iter(twice))}|methods) names one twice"):
            Grid(options, tasks, methods, "f")
    with pytest.raises(UsageError, match="--methods names one twice: full, full"):
        Grid(CompareOptions(out=tmp_path), tasks[:1], methods, "f")


def test_every_number_of_rows_is_tuned_and_run_for_itself(tmp_path: Path) -> None:
    trainer = Trainer()
    assert len(grid(tmp_path, trainer, limit=(50, 60), seeds=1, trials=1).run()) == 4
    assert trained(trainer)[::2] == ["reviews_full_lr0.001_n50_s0", "reviews_full_lr0.001_n60_s0"]
    assert trainer.ran[0].limit == 50


def test_a_method_that_cannot_be_made_is_refused_before_anything_runs(tmp_path: Path) -> None:
    trainer = Trainer()
    made = grid(tmp_path, trainer)
    options = CompareOptions(out=tmp_path, task=("reviews",), quiet=True)
    with pytest.raises(UsageError, match="--optimizer muon has no effect with --method bitfit"):
        Grid(options, [made.rows[0][0]], variants("full,bitfit:optimizer=muon", MODEL), "f").run()
    assert trainer.ran == []


def test_a_run_that_fails_is_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    class Failing(Trainer):
        def evaluate(self, options: EvalOptions) -> None:
            raise TinyldError("no rows")

    with pytest.raises(TinyldError, match="^no rows; finished runs are kept, the same command goes on$"):
        grid(tmp_path, Failing()).run()


@pytest.mark.parametrize(("splits", "measured"), [(None, "dev"), (("train", "dev"), "dev"), (("train", "test"), "test"),
                                                  (("train", "dev", "test"), "test")])  # fmt: skip
def test_methods_are_compared_on_a_file_of_ones_own(
    place: Path, tmp_path: Path, splits: tuple[str, ...] | None, measured: str
) -> None:
    mine = tmp_path / ("mine.csv" if splits is None else "mine")
    for name in splits or ("",):
        file = mine / f"{name}.csv" if splits else mine
        file.parent.mkdir(exist_ok=True)
        file.write_text("said,mood\n" + "".join(f'"{text}",{label}\n' for text, label in ROWS))
    args = ["compare", "--data", mine, "--text-column", "said", "--label-column", "mood", "--base", place / "base"]
    args += ["--methods", "bitfit,full", "--seeds", 1, "--trials", 1, "--out", tmp_path / "grid", "--json", "--quiet"]
    rows = good(*args).json
    assert {row["method"] for row in rows} == {"bitfit", "full"} and {row["split"] for row in rows} == {measured}
    made = RunFolder(next((tmp_path / "grid").glob("mine_full*")))
    assert made.config["train"]["epochs"] > 3, "as many as finetune chooses for so few rows"
    for more, problem in ((["--epochs", 2], "its epochs was"), (["--steps", 3], "its steps was")):
        assert problem in cli(*args, *more).stderr
    written = (made.path / ADAPTER).stat().st_mtime_ns
    assert good(*args).json == rows and (made.path / ADAPTER).stat().st_mtime_ns == written, "nothing is run again"
    train = mine if splits is None else mine / "train.csv"
    assert "it is an input" in cli(*args, "--csv", train).stderr
    if measured == "test":
        (mine / "test.csv").write_text("said,mood\nrain,sad\nsun,happy\n")
        assert {row["n"] for row in good(*args).json} == {2}, "measured again, as the rows are others"
        assert (made.path / ADAPTER).stat().st_mtime_ns == written
        (found,) = good("eval", made.path, "--split", "test", "--json", "--base", place / "base").json
        assert found["n"] == 2 and RunFolder(made.path).read_json(RESULTS)["eval"]["mine/test"]["n"] == 2
    train.write_text(train.read_text() + "a sea,sad\n" * 4)
    assert "mine_bitfit_lr0.005_s0 was made of other rows; choose another --out" in cli(*args).stderr

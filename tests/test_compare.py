"""The grid: what runs, what is not run again, how a rate is chosen."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS, cli, good, refuses
from test_report import run_folder

from tinyld import compare
from tinyld.compare import variants
from tinyld.config import PRESETS, ModelConfig
from tinyld.data import TaskRows
from tinyld.errors import Diverged, TinyldError, UsageError
from tinyld.finetuning import config_of
from tinyld.options import CompareOptions, EvalOptions, FinetuneOptions
from tinyld.runs import ADAPTER, RESULTS, RunFolder

MODEL = ModelConfig(**PRESETS["small"])


class Trainer:
    """Stands in for training and evaluation: writes runs whose dev accuracy depends on method, rate and seed alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[Any] = []
        monkeypatch.setattr(compare, "finetune", self.finetune)
        monkeypatch.setattr(compare, "evaluate", self.evaluate)
        monkeypatch.setattr(TaskRows, "digest", lambda rows: "rows")

    def finetune(self, options: FinetuneOptions) -> None:
        self.ran.append(options)
        if options.resume is not None:
            return RunFolder(options.resume).write(ADAPTER, b"")
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

    def grid(self, out: Path, **changes: Any) -> list[dict[str, Any]]:
        """The table, after `ran` holds what this run of the verb did."""
        self.ran.clear()
        options = {"out": out, "task": "reviews", "epochs": 1.0, "device": "cpu", "quiet": True, "base": "small"}
        options |= {"methods": "full:lr=0.001,bitfit:lr=0.01"}
        return compare.compare(CompareOptions(**options | changes))

    @property
    def trained(self) -> list[str]:
        """The names of the folders, but for the digest."""
        return [o.out.name.rpartition("_")[0] for o in self.ran if isinstance(o, FinetuneOptions)]


@pytest.fixture()
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    return Trainer(monkeypatch)


def test_every_rate_is_tried_once_and_the_best_on_dev_gets_the_other_seeds(trainer: Trainer, tmp_path: Path) -> None:
    rows = trainer.grid(tmp_path)
    first = "0.001_s0", "0.0005_s0", "0.002_s0", "0.002_s1", "0.002_s2"
    assert trainer.trained[:5] == [f"reviews_full_lr{name}" for name in first]
    assert len(trainer.trained) == 10
    evaluated = [o for o in trainer.ran if isinstance(o, EvalOptions)]
    assert len(evaluated) == 6 and {o.split for o in evaluated} == {"test"}, "only what was chosen meets the test rows"
    assert [(row["method"], row["seeds"], row["trials"]) for row in rows] == [("bitfit", 3, 3), ("full", 3, 3)]
    assert rows[1]["lr"] == 2e-3
    assert trainer.grid(tmp_path) == rows and trainer.ran == [], "the same command again runs nothing"


def test_a_generation_task_goes_by_its_nats(trainer: Trainer, tmp_path: Path) -> None:
    row = next(r for r in trainer.grid(tmp_path, task=("write", "reviews")) if (r["task"], r["lr"]) == ("write", 2e-3))
    assert row["nats"] == pytest.approx(0.7) and row["nats_half"] == pytest.approx(0.196)
    assert row["accuracy"] is row["low"] is row["of_full"] is row["unreadable"] is None


def test_what_was_interrupted_goes_on_and_what_was_cut_short_is_made_again(trainer: Trainer, tmp_path: Path) -> None:
    trainer.grid(tmp_path, trials=2, seeds=1)
    first, second = (RunFolder(next(tmp_path.glob(f"reviews_full_lr{lr}_s0*"))) for lr in ("0.001", "0.0005"))
    for folder in (first, second):
        (folder.path / ADAPTER).unlink()
    first.save_checkpoint(10, {}, {}, 1)
    trainer.grid(tmp_path, trials=2, seeds=1)
    assert trainer.ran[0] == FinetuneOptions(resume=first.path, quiet=True, base="small")
    assert trainer.ran[1].force and trainer.ran[1].out == second.path
    assert len(trainer.ran) == 2, "what was tested stays so"


@pytest.mark.parametrize("changes", [{"epochs": 2.0}, {"base": None}, {"batch_size": 8}, {"limit": 50}])
def test_a_run_that_was_made_otherwise_is_none_of_the_grid(trainer: Trainer, tmp_path: Path, changes: Any) -> None:
    trainer.grid(tmp_path)
    trainer.grid(tmp_path, **changes)
    assert len(trainer.trained) == 10 and len(list(tmp_path.iterdir())) == 20


def test_a_run_of_a_task_or_of_rows_that_have_changed_is_none_of_the_grid(trainer: Trainer, tmp_path: Path) -> None:
    task = tmp_path / "mood.toml"
    words = '[verbalizer]\na = "bad"\nb = "good"\n[data]\ntrain = "x.csv"\ndev = "x.csv"\n'
    for verb, more in (("is", ""), ("was", ""), ("is", "sun,b\n")):
        task.write_text(f'template = "{{text}} {verb} {{answer}}"\n{words}')
        (tmp_path / "x.csv").write_text("text,label\n" + "rain,a\nsea,b\n" * 5 + more)
        trainer.grid(tmp_path / "grid", task=str(task), trials=1, seeds=1, methods="full")
        assert len(trainer.trained) == 1


def test_variants_carry_their_options(trainer: Trainer, tmp_path: Path) -> None:
    (one,) = variants("weight-lora:budget=0.7%:targets=query/key", MODEL)
    assert one[1:] == ("weight-lora", ["budget=0.7%", "targets=query,key"])
    trainer.grid(tmp_path, methods="weight-lora:lr=0.2:rank=3:rslora", limit=(50, 60), seeds=2, trials=1)
    names = [f"reviews_weight-lora-rank=3-rslora=true_lr0.2_n{n}_s{seed}" for n in (50, 60) for seed in (0, 1)]
    assert trainer.trained == names, "every number of rows is tuned and run for itself"
    cell = trainer.ran[1]
    assert (cell.rank, cell.rslora, cell.lr, cell.limit, cell.seed) == (3, True, 0.2, 50, 1)
    usual = ",".join(f"trajectory-lora{more}" for more in ("", ":optimizer=adamw", ":recipe=fast"))
    trainer.grid(tmp_path, methods=usual, seeds=1, trials=1)
    rates = {o.lr for o in trainer.ran if isinstance(o, FinetuneOptions)}
    assert len(rates) == 3, "the grid is around the optimizer's and the recipe's usual rate"
    assert len(list(variants("all", MODEL))) == 5
    no_biases = {name: False for name in ("qkv_bias", "out_bias", "mlp_bias", "head_bias")}
    bare = replace(MODEL, norm="rms", activation="silu", gated=True, **no_biases)
    assert "bitfit" not in [method for _, method, _ in variants("all", bare)]
    refuses("--methods: bitfit has nothing to train in this base", list, variants("full,bitfit", bare), kind=UsageError)


@pytest.mark.parametrize(("changes", "message"), [
    ({"methods": "lora"}, "--methods takes full, .* or all, .* got 'lora'"),
    ({"methods": "full:epochs=2"}, "epochs is the same for all methods; give it as --epochs"),
    ({"methods": "full:lr=x"}, "--methods full:lr=x: .*'x' is not a number"),
    ({"methods": "full:lr=0.6"}, "--methods full:lr=0.6: lr 0.6 is tried up to 1.2, which must be below 1"),
    ({"methods": "full:lr=-2"}, "--methods full:lr=-2: --lr must be above 0"),
    ({"methods": "full:rank=2"}, "--methods full:rank=2: --set rank is not an option of full"),
    ({"methods": "full:depth=2"}, "--methods full:depth=2: --set depth=2: there is no option"),
    ({"methods": "full,bitfit:optimizer=muon"}, "--optimizer muon has no effect with --method bitfit"),
    ({"methods": "full,full:lr=0.002"}, "--task, --limit or --methods names one twice: reviews_full"),
    ({"limit": 10**6}, "--limit 1000000: reviews has .* training rows"),
])  # fmt: skip
def test_what_cannot_be_made_is_refused_at_once(changes: Any, message: str, trainer: Trainer, tmp_path: Path) -> None:
    refuses(message, trainer.grid, tmp_path, kind=UsageError, **changes)
    assert trainer.ran == []


def test_rates_that_are_chosen_by_the_rows_of_the_table_are_said(
    trainer: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rates, told in (("mine", 2, True), ("mine", 1, False), ("mine/test", 2, False)):
        file = tmp_path / "mine" / f"{'test' if name.endswith('test') else 'train'}.csv"
        file.parent.mkdir(exist_ok=True)
        file.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in ROWS))
        trainer.grid(tmp_path / f"{name}{rates}", task=(), data=tmp_path / "mine", trials=rates, seeds=1, quiet=False)
        assert ("chosen by the dev rows that are scored" in capsys.readouterr().err) == told, (name, rates)


def test_a_rate_at_which_training_diverges_is_left_out(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(options: FinetuneOptions) -> None:
        if {options.lr, (options.lr, options.seed)} & bad:
            raise Diverged("the loss (nan)")
        trainer.finetune(options)

    monkeypatch.setattr(compare, "finetune", diverge)
    bad = {1e-3, 2e-3}
    (row,) = trainer.grid(tmp_path, methods="full:lr=0.001", quiet=False)
    assert (row["lr"], row["seeds"], row["trials"]) == (5e-4, 3, 3), "it was tried, too"
    assert "training diverged: lr 0.002 is left out" in capsys.readouterr().err
    bad = {(2e-3, 1)}
    (row,) = trainer.grid(tmp_path / "seed", methods="full:lr=0.001")
    assert (row["lr"], row["seeds"], row["trials"]) == (1e-3, 3, 3), "by its second seed alone"
    bad = {1e-3, 2e-3, 5e-4}
    (row,) = trainer.grid(tmp_path / "two", methods="full:lr=0.001,bitfit", quiet=False)
    assert row["method"] == "bitfit" and "reviews_full is left out: the loss (nan)" in capsys.readouterr().err
    with pytest.raises(TinyldError, match="nan.*; finished runs are kept, the same command goes on$"):
        trainer.grid(tmp_path / "all", methods="full:lr=0.001")


@pytest.mark.parametrize(("splits", "measured"), [(None, "dev"), (("train", "dev"), "dev"), (("train", "test"), "test"),
                                                  (("train", "dev", "test"), "test")])  # fmt: skip
def test_methods_are_compared_on_a_file_of_ones_own(place: Path, tmp_path: Path, splits: Any, measured: str) -> None:
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
    written = (made.path / ADAPTER).stat().st_mtime_ns
    assert good(*args).json == rows and (made.path / ADAPTER).stat().st_mtime_ns == written, "nothing is run again"
    assert "it is an input" in cli(*args, "--csv", mine if splits is None else mine / "train.csv").stderr
    if measured == "test":
        (mine / "test.csv").write_text("said,mood\nrain,sad\nsun,happy\n")
        assert {row["n"] for row in good(*args).json} == {2}, "measured again, as the rows are others"
        assert (made.path / ADAPTER).stat().st_mtime_ns == written

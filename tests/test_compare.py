"""The grid: what runs, what is not run again, how a rate is chosen."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tinyld import compare
from tinyld.compare import Grid, variants
from tinyld.config import PRESETS, ModelConfig
from tinyld.errors import TinyldError, UsageError
from tinyld.interrupt import Interrupted
from tinyld.options import CompareOptions
from tinyld.report import aggregate
from tinyld.runs import ADAPTER, CONFIG, RESULTS, RunFolder
from tinyld.tasks import load_task

MODEL = ModelConfig(vocab_size=8_192, **PRESETS["small"])


class Trainer:
    """Stands in for the processes: writes runs whose dev accuracy depends on method, rate and seed alone."""

    def __init__(self) -> None:
        self.ran: list[list[str]] = []

    def run(self, command: list[str]) -> None:
        self.ran.append(command)
        option = {command[i]: command[i + 1] for i in range(1, len(command) - 1) if command[i].startswith("--")}
        if command[0] == "eval":
            folder = RunFolder(Path(command[1]))
            results = folder.read_json(RESULTS)
            found = {"n": 500, "rows_per_second": 9.0, "nll_bound": 0.7, "nll_stderr": 0.1}
            if folder.config["task"]["name"] == "reviews":
                found |= {"accuracy": 0.5, "unreadable": 0.0}
            results["eval"] = {f"{folder.config['task']['name']}/{option['--split']}": found}
            return folder.write_json(RESULTS, results)
        lr, seed = float(option["--lr"]), int(option["--seed"])
        folder = RunFolder.create(Path(option["--out"]), "--force" in command)
        config: dict[str, Any] = {
            "kind": "adapter",
            "task": {"name": option["--task"]},
            "method": {"name": option["--method"]},
        }
        config["train"] = {"epochs": 1.0, "batch_size": 32, "lr": lr, "seed": seed, "optimizer": "adamw"}
        config |= {"base": {"path": "base", "fingerprint": "f"}, "data": {"rows": 10}}
        config["parameters"] = {"stored_percent": 1.0, "stored_bytes": 4, "stored_parameters": 1}
        config["environment"] = {"command": " ".join(["tinyld", *command]), "threads": 1}
        folder.write_json(CONFIG, config)
        accuracy = 0.9 if lr == 2e-3 else 0.8
        found = {"task": option["--task"], "dev_nll_bound": 1.4 - accuracy, "seconds": 1.0, "peak_memory_mb": 1.0}
        found |= {"dev_accuracy": accuracy} if option["--task"] == "reviews" else {}
        folder.write_json(RESULTS, {"finetune": found})
        folder.write(ADAPTER, b"")


@pytest.fixture(autouse=True)
def real_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `grid` replaces is put back."""
    monkeypatch.setattr(compare, "launch", compare.launch)


def grid(out: Path, trainer: Any, task: tuple[str, ...] = ("reviews",), base: str = "f", **changes: Any) -> Grid:
    options = CompareOptions(**{"out": out, "task": task, "epochs": 1.0, "device": "cpu", "quiet": True} | changes)
    methods = variants("full:lr=0.001,bitfit:lr=0.01", MODEL)
    compare.launch = trainer.run
    return Grid(options, [load_task(name) for name in task], methods, base)


def trained(trainer: Trainer) -> list[str]:
    return [Path(c[c.index("--out") + 1]).name for c in trainer.ran if c[0] == "finetune"]


def test_every_rate_is_tried_once_and_the_best_on_dev_gets_the_other_seeds(tmp_path: Path) -> None:
    trainer = Trainer()
    rows = grid(tmp_path, trainer).run()
    assert trained(trainer)[:5] == [f"reviews_full_lr{lr}_s0" for lr in ("0.001", "0.0005", "0.002")] + [
        f"reviews_full_lr0.002_s{seed}" for seed in (1, 2)
    ]
    assert len(trained(trainer)) == 10 == grid(tmp_path, trainer).total
    assert [(row["lr"], row["seed"], row["trials"]) for row in rows[:3]] == [(2e-3, seed, 3) for seed in range(3)]
    evaluated = [c for c in trainer.ran if c[0] == "eval"]
    assert len(evaluated) == 6 and all("test" in c for c in evaluated), "only what was chosen meets the test rows"
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
    assert not any("--steps" in c for c in trainer.ran if c[0] == "eval"), "written as users write"


def test_what_was_interrupted_goes_on_and_what_was_cut_short_is_made_again(tmp_path: Path) -> None:
    trainer = Trainer()
    grid(tmp_path, trainer, trials=2, seeds=1).run()
    first, second = (RunFolder(tmp_path / f"reviews_full_lr{lr}_s0") for lr in ("0.001", "0.0005"))
    for folder in (first, second):
        (folder.path / ADAPTER).unlink()
    first.save_checkpoint(10, {}, {}, 1)

    class Resuming(Trainer):
        def run(self, command: list[str]) -> None:
            if "--resume" not in command:
                return super().run(command)
            self.ran.append(command)
            first.write(ADAPTER, b"")

    again = Resuming()
    grid(tmp_path, again, trials=2, seeds=1).run()
    assert again.ran[0][:3] == ["finetune", "--resume", str(first.path)]
    assert again.ran[1][-2:] == ["--force", "--quiet"] and str(second.path) in again.ran[1]
    assert [c[0] for c in again.ran] == ["finetune", "finetune"], "what was tested stays so"


@pytest.mark.parametrize(("changes", "said"), [({"epochs": 2.0}, "--epochs 2 .*base f"), ({"base": "g"}, "base g")])
def test_a_run_that_was_made_otherwise_is_refused_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    grid(tmp_path, Trainer()).run()
    trainer = Trainer()
    with pytest.raises(TinyldError, match=f"was made by tinyld finetune .*--epochs 1 .* and not by .*{said}"):
        grid(tmp_path, trainer, **changes).run()
    assert trainer.ran == []


def test_two_grids_in_one_folder_are_one_too_many(tmp_path: Path) -> None:
    class Meanwhile(Trainer):
        def run(self, command: list[str]) -> None:
            with pytest.raises(TinyldError, match="another process is writing"):
                grid(tmp_path, self).run()
            super().run(command)

    trainer = Meanwhile()
    assert len(grid(tmp_path, trainer, trials=1, seeds=1).run()) == 2 and len(trainer.ran) == 4


def test_variants_carry_their_options(tmp_path: Path) -> None:
    (one,) = variants("weight-lora:budget=0.7%:targets=query/key", MODEL)
    assert one.flags == ["--method", "weight-lora", "--set", "budget=0.7%", "--set", "targets=query,key"]
    (moved,) = variants("weight-lora:lr=0.2:rank=3:rslora", MODEL)
    assert moved.lr == 0.2 and moved.name == "weight-lora-rank=3-rslora=true"
    made = grid(tmp_path, Trainer())
    cell = made.cell(made.tasks[0], 50, moved, 0.2, 1)
    assert cell.folder.path.name == "reviews_weight-lora-rank=3-rslora=true_lr0.2_n50_s1"
    adamw, muon = variants("trajectory-lora:optimizer=adamw,trajectory-lora", MODEL)
    assert muon.lr != adamw.lr
    assert variants("trajectory-lora:recipe=fast", MODEL)[0].lr != muon.lr, "the grid is around the recipe's usual rate"
    assert len(variants("all", MODEL)) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora", "--methods takes full, .* or all, .* got 'lora'"),
        ("full:epochs=2", "epochs is the same for all methods; give it as --epochs"),
        ("full:lr=x", "--methods full:lr=x: .*'x' is not a number"),
        ("full:rank=2", "--methods full:rank=2: --rank is not an option of full"),
        ("full:depth=2", "--methods full:depth=2: --set takes name=value"),
    ],
)
def test_wrong_variants_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        variants(text, MODEL)


def test_every_number_of_rows_is_tuned_and_run_for_itself(tmp_path: Path) -> None:
    trainer = Trainer()
    assert len(grid(tmp_path, trainer, limit=(50, 60), seeds=1, trials=1).run()) == 4
    assert trained(trainer)[::2] == ["reviews_full_lr0.001_n50_s0", "reviews_full_lr0.001_n60_s0"]
    first = next(c for c in trainer.ran if c[0] == "finetune" and "full" in c)
    assert first[first.index("--limit") + 1] == "50"


def test_a_process_that_fails_is_an_error_and_a_stop_is_handed_on_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TinyldError, match="tinyld info nowhere failed; finished runs are kept"):
        compare.launch(["info", "nowhere"])
    told: list[str] = []

    class Process:
        """Stands in for one that trains while the signal comes."""

        def __init__(self, command: list[str], **options: Any):
            pass

        def wait(self) -> int:
            if not told:
                raise Interrupted(signal.SIGTERM)
            return 143

        def terminate(self) -> None:
            told.append("terminate")

    monkeypatch.setattr("tinyld.compare.subprocess.Popen", Process)
    with pytest.raises(Interrupted) as stopped:
        compare.launch(["finetune"])
    assert stopped.value.exit_code == 143 and told == ["terminate"]

"""The grid: what runs, what is not run again, how a rate is chosen."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tinyld.compare import Grid, Launcher, threads_each, variants
from tinyld.config import PRESETS, ModelConfig
from tinyld.errors import TinyldError, UsageError
from tinyld.interrupt import Interrupted, raise_at_signals, stop_signals
from tinyld.options import CompareOptions
from tinyld.report import aggregate
from tinyld.runs import ADAPTER, CONFIG, RESULTS, RunFolder
from tinyld.tasks import load_task

MODEL = ModelConfig(vocab_size=8_192, **PRESETS["small"])


class Trainer:
    """Stands in for the processes: writes runs whose dev accuracy depends on method, rate and seed alone."""

    def __init__(self) -> None:
        self.ran: list[list[str]] = []
        self.given: set[int | None] = set()  # threads
        self.told = threading.Event()

    def stop(self) -> None:
        self.told.set()

    def run(self, command: list[str], threads: int | None = None) -> None:
        self.ran.append(command)
        self.given.add(threads)
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
        config |= {"base": {"path": "base", "fingerprint": "f"}, "diffusion": {}, "data": {"rows": 10}}
        config["parameters"] = {"stored_percent": 1.0, "stored_bytes": 4, "stored_parameters": 1}
        config["environment"] = {"command": " ".join(["tinyld", *command]), "threads": 1}
        folder.write_json(CONFIG, config)
        accuracy = 0.9 if lr == 2e-3 else 0.8
        found = {"task": option["--task"], "dev_nll_bound": 1.4 - accuracy, "seconds": 1.0, "peak_memory_mb": 1.0}
        found |= {"dev_accuracy": accuracy} if option["--task"] == "reviews" else {}
        folder.write_json(RESULTS, {"finetune": found})
        folder.write(ADAPTER, b"")


def grid(out: Path, trainer: Any, task: tuple[str, ...] = ("reviews",), base: str = "f", **changes: Any) -> Grid:
    options = CompareOptions(**{"out": out, "task": task, "epochs": 1.0, "device": "cpu", "quiet": True} | changes)
    methods = variants("full:lr=0.001,bitfit:lr=0.01", MODEL)
    return Grid(options, [load_task(name) for name in task], methods, base, trainer)


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
        def run(self, command: list[str], threads: int | None = None) -> None:
            if "--resume" not in command:
                return super().run(command, threads)
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
        def run(self, command: list[str], threads: int | None = None) -> None:
            with pytest.raises(TinyldError, match="another process is writing"):
                grid(tmp_path, Trainer()).run()
            super().run(command, threads)

    trainer = Meanwhile()
    assert len(grid(tmp_path, trainer, trials=1, seeds=1).run()) == 2 and len(trainer.ran) == 4


def test_variants_carry_their_options(tmp_path: Path) -> None:
    (one,) = variants("weight-lora:budget=0.7%:targets=query/key", MODEL)
    assert one.flags == ["--method", "weight-lora", "--set", "budget=0.7%", "--set", "targets=query,key"]
    (moved,) = variants("weight-lora:lr=0.2:rank=3:rslora", MODEL)
    assert moved.lr == 0.2 and moved.name == "weight-lora-rank=3-rslora=true"
    compare = grid(tmp_path, Trainer())
    cell = compare.cell(compare.tasks[0], 50, moved, 0.2, 1)
    assert cell.folder.path.name == "reviews_weight-lora-rank=3-rslora=true_lr0.2_n50_s1"
    adamw, muon = variants("trajectory-lora:optimizer=adamw,trajectory-lora", MODEL)
    assert muon.lr != adamw.lr
    assert variants("trajectory-lora:recipe=fast", MODEL)[0].lr != muon.lr, "the grid is around the recipe's usual rate"
    assert len(variants("all", MODEL)) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora", "--methods takes full, .* or all, .* got 'lora'"),
        ("full,full", "names one twice"),
        ("full,full:lr=0.001", "names one twice"),
        ("full:epochs=2", "epochs is the same for all methods; give it as --epochs"),
        ("full:lr=x", "--methods full:lr=x: .*'x' is not a number"),
        ("full:lr=2", "lr must be between 0 and 1, got 2"),
        ("full:rank=2", "--methods full:rank=2: --rank is not an option of full"),
        ("full:depth=2", "--methods full:depth=2: --set takes name=value"),
    ],
)
def test_wrong_variants_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        variants(text, MODEL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "--trials must be at least 1"),
        ({"trials": 99}, "--trials must be"),
        ({"seeds": 0}, "--seeds"),
        ({"task": ("reviews", "reviews")}, "--task names one twice"),
        ({"task": ()}, "at least one --task"),
        ({"limit": (5, 5)}, "--limit names a number of rows twice"),
    ],
)
def test_impossible_grids_are_refused(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        grid(tmp_path, Trainer(), **changes)


def test_every_number_of_rows_is_tuned_and_run_for_itself(tmp_path: Path) -> None:
    trainer = Trainer()
    assert len(grid(tmp_path, trainer, limit=(50, 60), seeds=1, trials=1).run()) == 4
    assert trained(trainer)[::2] == ["reviews_full_lr0.001_n50_s0", "reviews_full_lr0.001_n60_s0"]
    first = next(c for c in trainer.ran if c[0] == "finetune" and "full" in c)
    assert first[first.index("--limit") + 1] == "50"


def test_runs_go_side_by_side_with_a_share_of_the_threads_and_end_in_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where fewer are left: a seed that is added later would have other bits and seconds than those before it."""

    class Meeting(Trainer):
        """The first runs of the two methods end when both have begun."""

        def run(self, command: list[str], threads: int | None = None) -> None:
            if any(lr in command for lr in ("0.001", "0.01")):
                both.wait(10)
            super().run(command, threads)

    monkeypatch.setenv("OMP_NUM_THREADS", "14")
    both, trainer = threading.Barrier(2), Meeting()
    grid(tmp_path / "two", trainer, jobs=2, seeds=1).run()
    both, more = threading.Barrier(1), Meeting()
    found = grid(tmp_path / "two", more, jobs=2).run()
    alone = grid(tmp_path / "one", Trainer()).run()
    assert aggregate(found) == aggregate(alone) and [r["run"] for r in found] == [r["run"] for r in alone]
    assert trainer.given == more.given == {7} and all("--quiet" in c for c in trainer.ran)


class Failing(Trainer):
    """Bitfit fails, or is interrupted, while full trains."""

    def __init__(self, interrupted: bool) -> None:
        super().__init__()
        self.both, self.interrupted = threading.Barrier(2), interrupted

    def run(self, command: list[str], threads: int | None = None) -> None:
        self.both.wait(10)
        if "bitfit" in command and not self.interrupted:
            raise TinyldError("no")
        if "bitfit" in command:
            os.kill(os.getpid(), signal.SIGTERM)
        assert self.told.wait(10)
        self.ran.append(command)
        raise TinyldError("it was stopped")


def test_when_one_fails_or_a_signal_comes_the_others_are_stopped_and_no_more_begin(tmp_path: Path) -> None:
    trainer = Failing(interrupted=False)
    with pytest.raises(TinyldError, match="^no$"):
        grid(tmp_path / "fails", trainer, jobs=2).run()
    assert len(trainer.ran) == 1
    before = {signum: signal.getsignal(signum) for signum in stop_signals()}
    trainer = Failing(interrupted=True)
    try:
        raise_at_signals()
        with pytest.raises(Interrupted) as stopped:
            grid(tmp_path / "stops", trainer, jobs=2).run()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert stopped.value.exit_code == 143 and len(trainer.ran) == 2


class Process:
    """Stands in for subprocess.Popen: ends once it is told to, or after its time."""

    seconds = 10.0
    started: list[Process] = []

    def __init__(self, command: list[str], env: dict[str, str], **options: Any):
        self.told, self.threads = threading.Event(), env.get("OMP_NUM_THREADS")
        self.started.append(self)

    def wait(self) -> int:
        return 143 if self.told.wait(self.seconds) else 0

    def terminate(self) -> None:
        self.told.set()


def test_a_stop_is_handed_on_to_every_process_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyld.compare.subprocess.Popen", Process)
    monkeypatch.setattr(Process, "started", [])
    launcher = Launcher()
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(launcher.run, ["finetune"]) for _ in range(2)]
        while len(launcher.running) < 2:
            time.sleep(0.001)
        launcher.stop()
        for run in [*runs, pool.submit(launcher.run, ["eval"])]:  # nor may one begin after it
            with pytest.raises(TinyldError, match="failed; finished runs are kept|another run of the grid failed"):
                run.result(5)
    assert all(p.told.is_set() for p in Process.started) and len(Process.started) == 2


@pytest.mark.parametrize(("given", "jobs", "threads"), [(None, 2, 4), (None, 9, 1), ("6", 2, 3), ("1", 2, 1)])
def test_methods_side_by_side_share_the_threads(
    monkeypatch: pytest.MonkeyPatch, given: str | None, jobs: int, threads: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr("tinyld.compare.os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert threads_each(jobs) == threads
    monkeypatch.setattr("tinyld.compare.subprocess.Popen", Process)
    monkeypatch.setattr(Process, "started", [])
    monkeypatch.setattr(Process, "seconds", 0.0)
    for count in (threads, None):
        Launcher().run(["eval"], count)
    assert [p.threads for p in Process.started] == [str(threads), given]

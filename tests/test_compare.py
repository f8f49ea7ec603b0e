"""The grid: what runs, what is not run again, how a rate is chosen."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tinyld.compare import SUMMARY, TABLE, Compare, Launcher, threads_each, variants
from tinyld.errors import TinyldError, UsageError
from tinyld.interrupt import Interrupted
from tinyld.report import RESULT_COLUMNS, result_rows
from tinyld.runs import ADAPTER, CONFIG, RESULTS, RunFolder

USUAL = {
    "full": lambda optimizer, recipe: (1e-3 if optimizer is None else 4e-3, optimizer or "adamw"),
    "bitfit": lambda optimizer, recipe: (2e-2 if recipe else 1e-2, optimizer or "adamw"),
}


class Trainer:
    """Stands in for the processes: writes runs whose dev accuracy depends on method, rate and seed alone."""

    def __init__(self, best_lr: float = 2e-3):
        self.best_lr = best_lr
        self.ran: list[list[str]] = []

    def stop(self) -> None:
        """Nothing runs on: every run here ends before it returns."""

    def run(self, command: list[str], threads: int | None = None) -> None:
        self.ran.append(command)
        option = {command[i]: command[i + 1] for i in range(1, len(command) - 1) if command[i].startswith("--")}
        if command[0] == "eval":
            folder = RunFolder(Path(command[1]))
            results = folder.read_json(RESULTS)
            found = {"n": 500, "rows_per_second": 9.0, "nll_bound": 0.7, "nll_stderr": 0.1}
            if folder.config["task"] == "reviews":
                found |= {"accuracy": 0.5, "unreadable": 0.0}
            results["eval"] = {f"{folder.config['task']}/{option['--split']}": found}
            return folder.write_json(RESULTS, results)
        lr, seed = float(option["--lr"]), int(option["--seed"])
        folder = RunFolder.create(Path(option["--out"]), "--force" in command)
        config: dict[str, Any] = {"kind": "adapter", "task": option["--task"], "method": {"name": option["--method"]}}
        config["train"] = {"epochs": 1.0, "batch_size": 32, "lr": lr, "seed": seed}
        config |= {"base": {"path": "base", "fingerprint": "f"}, "diffusion": {}}
        config |= {"data": {"rows": 10}, "parameters": {"stored_percent": 1.0, "stored_bytes": 4}}
        folder.write_json(CONFIG, config)
        accuracy = 0.9 if lr == self.best_lr else 0.8
        found = {"task": option["--task"], "dev_nll_bound": 1.4 - accuracy, "seconds": 1.0, "peak_memory_mb": 1.0}
        found |= {"dev_accuracy": accuracy} if option["--task"] == "reviews" else {}
        folder.write_json(RESULTS, {"finetune": found})
        folder.write(ADAPTER, b"")


def grid(out: Path, trainer: Trainer, tasks: tuple[str, ...] = ("reviews",), **changes: Any) -> Compare:
    options: dict[str, Any] = {"seeds": 3, "trials": 3, "flags": ["--epochs", "1"], "data": None, "base": None}
    options |= {
        "fingerprint": "f",
        "device": "cpu",
        "budget_minutes": None,
        "quiet": True,
        "say": lambda text: None,
        "launcher": trainer,
    }
    methods = variants("full,bitfit", USUAL)
    return Compare(out, tasks, methods, **(options | changes))


def trained(trainer: Trainer) -> list[str]:
    return [Path(c[c.index("--out") + 1]).name for c in trainer.ran if c[0] == "finetune"]


def test_every_rate_is_tried_once_and_the_best_on_dev_gets_the_other_seeds(tmp_path: Path) -> None:
    trainer = Trainer(best_lr=2e-3)
    records = grid(tmp_path, trainer).run()
    full = [name for name in trained(trainer) if "_full_" in name]
    assert full == [f"reviews_full_lr{lr}_s0" for lr in ("0.001", "0.0005", "0.002")] + [
        f"reviews_full_lr0.002_s{seed}" for seed in (1, 2)
    ]
    assert len(trained(trainer)) == 10 == grid(tmp_path, trainer).total()
    assert [r["train"]["lr"] for r in records[:3]] == [2e-3] * 3 and [r["train"]["seed"] for r in records[:3]] == [
        0,
        1,
        2,
    ]
    assert [t["dev_accuracy"] for t in records[0]["trials"]] == [0.8, 0.8, 0.9]
    evaluated = [c for c in trainer.ran if c[0] == "eval"]
    assert len(evaluated) == 6 and all("test" in c for c in evaluated), "only what was chosen meets the test rows"
    assert json.loads((tmp_path / SUMMARY).read_text()) == records
    assert (tmp_path / TABLE).read_text().count("| reviews |") == 2


def test_a_generation_task_goes_by_its_nats_and_has_no_accuracy(tmp_path: Path) -> None:
    said: list[str] = []
    records = grid(tmp_path, Trainer(best_lr=2e-3), ("write",), say=said.append).run()
    assert [r["train"]["lr"] for r in records[:3]] == [2e-3] * 3
    row = dict(zip(RESULT_COLUMNS, result_rows(records)[0], strict=True))
    assert row["nats"] == "0.700 ± 0.196" and row["accuracy %"] is row["% of full"] is row["unreadable %"] is None
    assert any("write_full_lr0.002_s2: dev NLL bound 0.5000" in line for line in said)


def test_only_texts_are_written_in_one_pass(tmp_path: Path) -> None:
    trainer = Trainer()
    grid(tmp_path, trainer, ("write", "reviews")).run()
    asked = {Path(c[1]).name.partition("_")[0]: "--steps" in c for c in trainer.ran if c[0] == "eval"}
    assert asked == {"write": True, "reviews": False}


def test_the_same_command_again_runs_nothing(tmp_path: Path) -> None:
    first = grid(tmp_path, Trainer()).run()
    trainer = Trainer()
    assert grid(tmp_path, trainer).run() == first and trainer.ran == []


def test_what_was_interrupted_goes_on_and_what_was_cut_short_is_made_again(tmp_path: Path) -> None:
    compare = grid(tmp_path, Trainer())
    first, second = (compare.cell("reviews", compare.methods[0], lr, 0) for lr in (1e-3, 5e-4))
    compare.claim([first, second])
    RunFolder.create(first.folder).write_json(CONFIG, {"kind": "adapter", "environment": {"threads": 2}})
    (first.folder / "checkpoints" / "00000010").mkdir(parents=True)
    RunFolder.create(second.folder).write_json(CONFIG, {"kind": "adapter"})

    class Stop(Exception):
        pass

    def launch(command: list[str], threads: int | None) -> None:
        ran.append(command)
        if len(ran) == 2:
            raise Stop
        found = {"dev_accuracy": 0.5, "dev_nll_bound": 0.5}
        RunFolder(first.folder).write_json(RESULTS, {"finetune": found})
        RunFolder(first.folder).write(ADAPTER, b"")

    ran: list[list[str]] = []
    compare.launcher.run = launch
    with pytest.raises(Stop):
        compare.run()
    assert ran[0][:3] == ["finetune", "--resume", str(first.folder)]
    assert ran[1][-2:] == ["--force", "--quiet"] and str(second.folder) in ran[1]


def test_a_cell_that_another_command_made_is_refused_before_anything_runs(tmp_path: Path) -> None:
    grid(tmp_path, Trainer()).run()
    trainer = Trainer()
    with pytest.raises(TinyldError, match="was made by tinyld finetune .*--epochs 1 .* and not by .*--epochs 2"):
        grid(tmp_path, trainer, flags=["--epochs", "2"]).run()
    assert trainer.ran == []


def test_a_cell_on_another_base_and_a_cell_of_no_manifest(tmp_path: Path) -> None:
    compare = grid(tmp_path, Trainer())
    cell = compare.cell("reviews", compare.methods[0], 1e-3, 0)
    compare.claim([cell])
    cell.folder.mkdir()
    (cell.folder / CONFIG).write_text("{")  # killed between config.json and manifest.json
    assert len(compare.run()) == 6
    with pytest.raises(TinyldError, match=r"was made by .*\(base f\), and not by .*\(base g\)"):
        grid(tmp_path, Trainer(), fingerprint="g").run()


def test_out_of_time_it_begins_no_run_and_reports_what_is_whole(tmp_path: Path) -> None:
    trainer = Trainer()
    assert grid(tmp_path, trainer, budget_minutes=0.0).run() == [] and trainer.ran == []
    assert len(grid(tmp_path, trainer).run()) == 6


def test_variants_carry_their_options(tmp_path: Path) -> None:
    (one,) = variants("bitfit:budget=0.7%:rslora", USUAL)
    assert one.flags == ["--method", "bitfit", "--budget", "0.7%", "--rslora"] and one.lr == 1e-2
    (moved,) = variants("full:lr=0.2:rank=3", USUAL)
    assert moved.flags == ["--method", "full", "--rank", "3"] and moved.lr == 0.2
    assert grid(tmp_path, Trainer()).cell("reviews", moved, 0.2, 1).folder.name == "reviews_full-rank=3_lr0.2_s1"
    assert [v.method for v in variants("all", USUAL)] == ["full", "bitfit"]
    for text, message in (
        ("lora", "--methods takes full, bitfit or all, .* got 'lora'"),
        ("full,full", "names one"),
        ("full,full:lr=0.001", "names one"),
        ("full:epochs=2", "epochs is the same for all methods"),
        ("full:lr=x", "got 'x'"),
    ):
        with pytest.raises(UsageError, match=message):
            variants(text, USUAL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "--trials must be from 1 to"),
        ({"trials": 99}, "--trials must be"),
        ({"seeds": 0}, "--seeds"),
        ({"tasks": ("reviews", "reviews")}, "--task names one twice"),
        ({"tasks": ()}, "at least one --task"),
    ],
)
def test_impossible_grids_are_refused(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        grid(tmp_path, Trainer(), **changes)


def test_every_number_of_rows_is_tuned_and_run_for_itself(tmp_path: Path) -> None:
    trainer = Trainer()
    compare = grid(tmp_path, trainer, limits=(50, None), eval_every={("reviews", 50): 7}, seeds=1, trials=1)
    assert len(compare.run()) == compare.total() == 4
    assert [n for n in trained(trainer) if "_full_" in n] == ["reviews_full_lr0.001_n50_s0", "reviews_full_lr0.001_s0"]
    first, last = (c for c in trainer.ran if c[0] == "finetune" and "full" in c)
    assert first[first.index("--limit") + 1] == "50" and first[first.index("--eval-every") + 1] == "7"
    assert "--limit" not in last and "--eval-every" not in last


def test_the_page_holds_the_table_and_every_plot_and_loads_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tinyld.page import page

    records = grid(tmp_path, Trainer()).run()
    for record in records:
        record["curve"] = [[0.0, 0.5], [1.0, record["results"]["eval"]["reviews/test"]["accuracy"]]]
    records[0]["data"]["rows"] = 5
    text = page(records, "tinyld compare --task <reviews>")
    assert text.count("<svg") == 4 and "&lt;reviews&gt;" in text and "denoising step" not in text
    assert all(column in text for column in RESULT_COLUMNS)
    assert not re.search(r"(src|href)=.https?:", text) and "<script" not in text
    assert (tmp_path / "page.html").exists()
    for record in records:  # answers of several tokens
        record["results"]["eval"]["reviews/test"]["masked_acc_by_noise"] = [[0.5, 0.25], [1.0, 0.125]]
    text = page(records, "tinyld compare")
    assert text.count("<svg") == 5 and "denoising step and band" in text


def test_runs_go_side_by_side_and_end_in_the_same_table(tmp_path: Path) -> None:
    class Meeting(Trainer):
        """The first method's first rate and seed end when the second ones have begun."""

        def run(self, command: list[str], threads: int | None = None) -> None:
            assert threads == threads_each(2) and "--quiet" in command
            if any(f"_full_lr{end}" in " ".join(command) for end in ("0.001_s0", "0.0005_s0", "0.002_s1", "0.002_s2")):
                both.wait(10)
            super().run(command, threads)

    both = threading.Barrier(2)
    records = grid(tmp_path / "two", Meeting(best_lr=2e-3), jobs=2).run()
    alone = grid(tmp_path / "one", Trainer()).run()
    assert [r["run"] for r in records] == [r["run"] for r in alone]
    assert (tmp_path / "two" / TABLE).read_text() == (tmp_path / "one" / TABLE).read_text()


def test_a_lone_run_has_the_threads_of_one_among_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a seed that is added later would have other bits and seconds than those before it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "14")
    given: list[int | None] = []

    class Noting(Trainer):
        def run(self, command: list[str], threads: int | None = None) -> None:
            given.append(threads)
            super().run(command, threads)

    for seeds in (1, 3):
        grid(tmp_path / str(seeds), Noting(), jobs=7, trials=1, seeds=seeds, tasks=("reviews",)).run()
    assert set(given) == {threads_each(7)} == {2}


def test_the_first_methods_runs_go_first_and_a_stage_waits_for_the_one_before(tmp_path: Path) -> None:
    trainer = Trainer()
    grid(tmp_path, trainer, jobs=2, tasks=("reviews",)).run()
    kinds = [(c[0], "bitfit" in "".join(c)) for c in trainer.ran]
    assert kinds.index(("eval", False)) < kinds.index(("eval", True))
    for method in (False, True):
        assert [kind for kind, m in kinds if m == method] == ["finetune"] * 5 + ["eval"] * 3


def test_when_one_fails_the_others_are_stopped_and_no_more_begin(tmp_path: Path) -> None:
    class Failing(Trainer):
        """Bitfit fails while full trains at its three rates."""

        all_train, told = threading.Barrier(4), threading.Event()

        def stop(self) -> None:
            self.told.set()

        def run(self, command: list[str], threads: int | None = None) -> None:
            self.all_train.wait(10)
            if "bitfit" in command:
                raise TinyldError("no")
            assert self.told.wait(10)
            super().run(command, threads)

    trainer = Failing()
    with pytest.raises(TinyldError, match="^no$"):
        grid(tmp_path, trainer, jobs=4).run()
    assert len(trainer.ran) == 3, "full's rates ended, no seed began"


def test_what_was_interrupted_goes_on_with_the_threads_it_began_with(tmp_path: Path) -> None:
    class Counting(Trainer):
        def run(self, command: list[str], threads: int | None = None) -> None:
            if "--resume" not in command:
                assert threads is None
                return super().run(command, threads)
            assert threads == 3
            super().run(first.command)

    compare = grid(tmp_path, Counting(), seeds=1)
    first = compare.cell("reviews", compare.methods[0], 1e-3, 0)
    compare.claim([first])
    RunFolder.create(first.folder).write_json(CONFIG, {"kind": "adapter", "environment": {"threads": 3}})
    (first.folder / "checkpoints" / "00000010").mkdir(parents=True)
    first.command.append("--force")
    assert len(compare.run()) == 2 and first.command in compare.launcher.ran


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
            with pytest.raises(TinyldError, match="failed; finished runs are kept"):
                run.result(5)
    assert all(p.told.is_set() for p in Process.started) and len(Process.started) == 3 and not launcher.running


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


def test_a_signal_stops_the_grid_and_what_trains(tmp_path: Path) -> None:
    class Interrupting(Trainer):
        told = threading.Event()

        def stop(self) -> None:
            self.told.set()

        def run(self, command: list[str], threads: int | None = None) -> None:
            self.ran.append(command)
            os.kill(os.getpid(), signal.SIGTERM)
            assert self.told.wait(10)
            raise TinyldError("it was stopped")

    trainer = Interrupting()
    with pytest.raises(Interrupted) as stopped:
        grid(tmp_path, trainer).run()
    assert stopped.value.exit_code == 143 and trainer.told.is_set() and len(trainer.ran) == 1


def test_the_methods_optimizer_is_part_of_what_made_a_cell() -> None:
    by_muon = USUAL | {"bitfit": lambda optimizer, recipe: (1e-2, optimizer or "muon")}
    full, bitfit, adamw = variants("full,bitfit,bitfit:optimizer=adamw", by_muon)
    assert "--optimizer" not in full.flags
    assert bitfit.flags == ["--method", "bitfit", "--optimizer", "muon"]
    assert adamw.flags == ["--method", "bitfit", "--optimizer", "adamw"]
    (muon,) = variants("full:optimizer=muon", USUAL)
    assert muon.lr == 4e-3, "the grid is around the method's usual rate for that optimizer"
    (quick,) = variants("bitfit:recipe=fast", USUAL)
    assert quick.lr == 2e-2, "and for that recipe"


def test_a_front_has_a_panel_for_every_base_and_task_with_all_methods_by_name() -> None:
    pytest.importorskip("matplotlib")
    from tinyld.page import fronts

    def at(task: str, base: str, method: str, rows: int, accuracy: float) -> dict:
        found = {"accuracy": accuracy, "n": 400, "rows_per_second": 1.0}
        known = {"method": {"name": method}, "base": {"path": f"/x/{base}", "fingerprint": base}, "task": task}
        known["data"] = {"rows": rows}
        results = {"finetune": {"seconds": 9.0, "task": task}, "eval": {f"{task}/dev": found}}
        config = {"train": {"optimizer": "adamw", "seed": 0}, "diffusion": {}, "parameters": {"stored_percent": 0.5}}
        return known | config | {"kind": "adapter", "results": results}

    records = [at("mood", base, "full", 50, 0.8) for base in ("small", "encoder")]
    assert set(fronts(records)) == {"size.svg", "time.svg"}, "one number of rows is no curve"
    found = fronts([*records, at("kind", "small", "bitfit", 50, 0.7), at("mood", "small", "full", 500, 0.9)])
    assert set(found) == {"size.svg", "time.svg", "rows.svg"}
    for panel in ("mood (small)", "mood (encoder)", "kind (small)"):
        assert panel in found["size.svg"] and panel in found["time.svg"]
    assert "kind (small)" not in found["rows.svg"] and all(name in found["time.svg"] for name in ("full", "bitfit"))
    foreign = at("mood", "small", "full", 50, 0.8)
    foreign["results"]["eval"]["kind/test"] = foreign["results"]["eval"]["mood/dev"]
    assert "kind (small)" not in fronts([foreign])["size.svg"], "a run counts on its own task"
    both = {"run": "both", "kind": "composition", "results": {"eval": foreign["results"]["eval"]}}
    assert set(fronts([*records, both])) == {"size.svg", "time.svg"}
    assert found == fronts([*records, at("kind", "small", "bitfit", 50, 0.7), at("mood", "small", "full", 500, 0.9)])

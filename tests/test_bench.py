"""The benchmark's arithmetic and its names; the measurements themselves are a command, not a test."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tinyld import bench
from tinyld.bench import COMPARISONS, MEASUREMENTS, Comparison
from tinyld.cli import app
from tinyld.commands import bench as commands
from tinyld.errors import TinyldError
from tinyld.growth import MEASUREMENTS as GROWTH
from tinyld.growth import POINTS


def test_every_comparison_has_both_its_measurements() -> None:
    assert {name for c in COMPARISONS for name in (c.ours, c.peer)} | {"ceiling"} == set(MEASUREMENTS)


def test_a_ratio_is_the_median_of_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"ours": iter([1.0, 2.0, 1.0]), "peer": iter([3.0, 3.0, 5.0])}
    found = {"peak_mb": 7.0, "model_flops_per_s": 1.0}
    monkeypatch.setattr(bench, "in_a_process", lambda name, task: found | {"seconds": next(seconds[name])})
    row = bench.compare(Comparison("it", "ours", "peer", 2.5), "reviews", 3, lambda text: None)
    assert (row["ratio"], row["lowest"], row["highest"], row["met"]) == (3.0, 1.5, 5.0, True)
    assert (row["our seconds"], row["peer seconds"], row["model_flops_per_s"]) == (1.0, 3.0, 1.0)
    seconds = {"ours": iter([1.0]), "peer": iter([2.4])}
    assert not bench.compare(Comparison("it", "ours", "peer", 2.5), "reviews", 1, lambda text: None)["met"]


def test_a_measurement_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TinyldError, match="^bench nothing failed: KeyError: 'nothing'$"):
        bench.in_a_process("nothing")


def test_growth_is_a_row_for_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"seconds": 2.0, "peak_mb": 300.4, "MB/s": 5.0}
    monkeypatch.setattr(commands, "in_a_process", lambda name, module: found)
    ran = CliRunner().invoke(app, ["bench", "--growth", "--only", "from text", "--json", "--quiet"])
    rows = json.loads(ran.stdout)
    assert [row["size"] for row in rows] == ["10 MB", "100 MB", "1,000 MB"]
    assert rows[0]["rate or memory"] == "5 MB/s" and rows[0]["peak MB"] == 300
    assert len(GROWTH) == len({point.name for point in POINTS})
    ran = CliRunner().invoke(app, ["bench", "--growth", "--only", "tea"])
    assert ran.exit_code == 2 and "no work has such a word; there are: pretraining; " in ran.stderr


def test_a_word_that_no_comparison_has_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = CliRunner().invoke(app, ["bench", "--only", "tea"])
    assert ran.exit_code == 2 and "no comparison has such a word" in ran.stderr
    ran = CliRunner().invoke(app, ["bench", "--task", "write"])
    assert ran.exit_code == 2 and "task write has no labels" in ran.stderr
    ran = CliRunner().invoke(app, ["bench", "--task", "tea"])
    assert ran.exit_code == 1 and "no task 'tea'" in ran.stderr

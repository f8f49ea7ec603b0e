"""The README's results table is what `tinyld report` makes of data/results, and its commands exist."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tinyld.cli import app
from tinyld.config import DiffusionConfig, TrainConfig
from tinyld.methods import METHODS
from tinyld.records import NOT_SHOWN, run_record, seconds_to, settings
from tinyld.report import (
    CHAIN_COLUMNS,
    COMPOSE_COLUMNS,
    NEW_TASK_COLUMNS,
    RESULT_COLUMNS,
    TEXT_COLUMNS,
    chain_rows,
    compose_rows,
    method_rows,
    new_task_rows,
    result_rows,
    tables,
    text_rows,
)
from tinyld.statistics import interval, wilson
from tinyld.tables import markdown

TOP = Path(__file__).parents[1]
README = (TOP / "README.md").read_text(encoding="utf-8")
RESULTS = (TOP / "data" / "results" / "README.md").read_text(encoding="utf-8")


def record(method: str, seed: int, accuracy: float, lr: float = 1e-3) -> dict:
    found = {"accuracy": accuracy, "n": 400, "unreadable": 0.01, "rows_per_second": 100.0}
    found |= {"nll_bound": 0.5, "nll_stderr": 0.1}
    return {
        "run": f"{method}-{seed}",
        "kind": "adapter",
        "base": {"path": "/x/base", "fingerprint": "f"},
        "diffusion": {"time_sampling": "uniform"},
        "method": {"name": method},
        "task": "mood",
        "train": {"epochs": 3.0, "steps": None, "tokens": None, "minutes": None, "batch_size": 32, "lr": lr}
        | {"seed": seed},
        "data": {"rows": 1_000},
        "parameters": {"stored_percent": 0.5, "stored_bytes": 4_000},
        "results": {
            "finetune": {"task": "mood", "seconds": 10.0, "peak_memory_mb": 100.0},
            "eval": {"mood/dev": found},
        },
    }


def test_seeds_are_averaged_and_compared_with_full() -> None:
    records = [record("full", 0, 0.9), record("full", 1, 0.8), record("bitfit", 0, 0.68)]
    rows = {row[2]: dict(zip(RESULT_COLUMNS, row, strict=True)) for row in result_rows(records)}
    assert rows["full"]["seeds"] == 2 and rows["full"]["accuracy %"] == "85.0"
    assert rows["bitfit"]["% of full"] == "80.0" and rows["bitfit"]["unreadable %"] == "1.0"


def test_a_copy_of_a_run_is_no_further_seed() -> None:
    runs = [record("full", seed, accuracy) for seed, accuracy in enumerate((0.9, 0.8, 0.7))]
    assert result_rows([*runs, *runs]) == result_rows(runs)


def test_the_settings_say_what_the_optimizer_was_where_it_is_not_adamw() -> None:
    plain = record("full", 0, 0.8)
    muon = plain | {"train": plain["train"] | {"optimizer": "muon"}}
    shown = [row[RESULT_COLUMNS.index("settings")] for row in result_rows([plain, muon])]
    assert sorted(shown) == ["-", "Muon"]


OTHERWISE = {
    **{"accumulate": 2, "weight_decay": 0.1, "warmup": 0.1, "decay": "cosine", "clip": 0.5, "ema": 0.998},
    **{"body_lr": 0.1, "body_start": 0.1, "dtype": "fp32", "device": "cuda", "compile": True},
}
NOISED = {"schedule": "cosine", "loss": "elbo", "time_sampling": "bell", "mask_draws": 8}


def test_what_sets_the_training_of_two_rows_apart_is_shown() -> None:
    plain = record("full", 0, 0.8)
    runs = [plain, *(plain | {"train": plain["train"] | {name: value}} for name, value in OTHERWISE.items())]
    runs += [plain | {"diffusion": plain["diffusion"] | {name: value}} for name, value in NOISED.items()]
    column = RESULT_COLUMNS.index("training")
    shown = {row[column].partition("lr ")[2] for row in result_rows(runs)}
    assert len(shown) == len(runs) and {"0.001", "0.001, ema 0.998", "0.001, compile", "0.001, mask draws 8"} < shown
    budget = {"steps", "tokens", "minutes", "epochs", "batch_size", "lr", "optimizer"}
    fields = {f.name for kind in (TrainConfig, DiffusionConfig) for f in dataclasses.fields(kind)}
    assert fields == set(OTHERWISE) | set(NOISED) | budget | set(NOT_SHOWN), "every option is one of these"


def test_what_was_forgotten_is_a_mean_over_seeds_of_the_same_text() -> None:
    found = {"tokens": 100, "draws": 2, "base_nll_bound": 4.0, "base_nll_stderr": 0.1, "nll_stderr": 0.2}
    runs = []
    for seed, forgotten in enumerate((1.0, 2.0)):
        text = found | {"nll_bound": 4 + forgotten, "forgotten": forgotten, "forgotten_stderr": 0.01}
        run = record("full", seed, 0.9)
        runs.append(run | {"results": run["results"] | {"text": {"a.txt": text, f"{seed}.txt": text}}})
    composed = runs[0] | {"kind": "composition"}
    rows = [dict(zip(TEXT_COLUMNS, row, strict=True)) for row in text_rows([*runs, composed])]
    assert [(row["text"], row["seeds"]) for row in rows] == [("0.txt", 1), ("1.txt", 1), ("a.txt", 2)]
    assert rows[0]["forgotten"] == "1.000 ± 0.020" and rows[2]["forgotten"].startswith("1.500 ± 6.35")


def on(task: str, run: dict, rows: int = 1_000, bound: float = 0.5) -> dict:
    """The run as one on another task."""
    found = run["results"]["eval"]["mood/dev"]
    finetune = run["results"]["finetune"] | {"task": task, "dev_nll_bound": bound}
    return run | {
        "task": task,
        "data": {"rows": rows},
        "results": {"finetune": finetune, "eval": {f"{task}/dev": found}},
    }


def test_a_method_has_one_row_for_all_tasks_with_its_mean_over_them() -> None:
    assert method_rows([on("mood", record("full", 0, 0.9))]) == ((), [])
    runs = [on("mood", record("full", 0, 0.9)), on("kind", record("full", 0, 0.7, lr=2e-3))]
    runs += [on("mood", record("bitfit", seed, accuracy)) for seed, accuracy in enumerate((0.8, 0.9))]
    runs += [on("kind", record("bitfit", 0, 0.5)), on("mood", record("adapters", 0, 0.6))]
    columns, rows = method_rows(runs)
    adapters, bitfit, full = (dict(zip(columns, row, strict=True)) for row in rows)
    assert (full["mood %"], full["kind %"], full["% of full"], full["train s"]) == ("90.0", "70.0", "100.0", 20)
    assert (bitfit["mood %"], bitfit["kind %"], bitfit["% of full"]) == ("85.0", "50.0", "84.4")
    assert adapters["kind %"] is adapters["mean %"] is adapters["train s"] is None, "not measured there"
    low, high = (interval(found, 400) for found in ([0.8, 0.9], [0.5]))
    half = ((low[1] - low[0]) ** 2 + (high[1] - high[0]) ** 2) ** 0.5 / 4
    assert bitfit["mean %"] == f"67.5 ± {100 * half:.1f}"


def test_a_method_counts_on_a_task_with_the_most_rows_and_then_the_better_dev_bound() -> None:
    runs = [on("mood", record("full", 0, 0.9)), on("kind", record("full", 0, 0.6), rows=500)]
    runs += [on("kind", record("full", 0, 0.7), bound=0.4), on("kind", record("full", 0, 0.8, lr=2e-3), bound=0.6)]
    columns, (row,) = method_rows(runs)
    assert dict(zip(columns, row, strict=True))["kind %"] == "70.0"


def test_a_method_counts_on_its_own_task_on_one_split_and_base_by_base() -> None:
    runs = [on("mood", record("full", 0, 0.9)), on("kind", record("full", 0, 0.6))]
    foreign = on("mood", record("full", 1, 0.9), rows=9_000)
    foreign["results"]["eval"]["kind/dev"] = foreign["results"]["eval"]["mood/dev"]
    columns, (row,) = method_rows([*runs, foreign])
    assert dict(zip(columns, row, strict=True))["kind %"] == "60.0"
    tested = on("kind", record("bitfit", 0, 0.5))
    tested["results"]["eval"] = {"kind/test": tested["results"]["eval"]["kind/dev"]}
    columns, (_, full) = method_rows([*runs, tested])
    assert dict(zip(columns, full, strict=True))["kind %"] is None, "its dev rows are not the others' test rows"
    namesake = [run | {"base": {"path": "/y/base", "fingerprint": "g"}} for run in runs]
    assert len(method_rows([*runs, *namesake])[1]) == 2


def test_bands_that_share_one_rank_are_shown_by_one_number() -> None:
    run = record("trajectory-lora", 0, 0.9)
    shown = []
    for ranks, sigma in (([9, 9, 9], [1.0, 1.0, 1.0]), ([9, 4, 1], [1.0, 0.5, 0.25])):
        run["method"] |= {"ranks": ranks, "sigma": sigma}
        shown.append(settings(run))
    assert shown == ["ranks 9", "ranks 9/4/1, sigma 1.0/0.5/0.25"]


def test_runs_with_fewer_threads_are_not_timed() -> None:
    records = [record("full", seed, 0.8) | {"environment": {"threads": 2 - seed}} for seed in range(2)]
    slow = records[1]["results"]
    slow["finetune"] = {"seconds": 30.0, "peak_memory_mb": 500.0}
    slow["eval"]["mood/dev"]["rows_per_second"] = 20.0
    (row,) = (dict(zip(RESULT_COLUMNS, row, strict=True)) for row in result_rows(records))
    assert (row["seeds"], row["train s"], row["threads"], row["peak MB"], row["rows/s"]) == (2, 10, 2, 100, 100)


def test_a_brief_table_tells_threads_where_its_rows_had_unlike_numbers_of_them() -> None:
    runs = [on(task, record(method, 0, 0.8)) for task in ("mood", "tone") for method in ("full", "bitfit")]
    one = [run | {"environment": {"threads": 1}} for run in runs]
    assert ["threads" in columns for _, columns, _ in tables(one, brief=True)] == [False, False]
    mixed = [run | {"environment": {"threads": 1 if run["method"]["name"] == "full" else 2}} for run in runs]
    for _, columns, rows in tables(mixed, brief=True):
        shown = {row[columns.index("method")]: str(row[columns.index("threads")]) for row in rows}
        assert shown == {"full": "1", "bitfit": "2"}


def test_each_base_has_a_full_of_its_own_to_be_compared_with() -> None:
    other = {"base": {"path": "/x/encoder", "fingerprint": "g"}}
    stronger = [record("full", 0, 0.9) | other, record("bitfit", 0, 0.81) | other]
    rows = result_rows([record("full", 0, 0.8), record("bitfit", 0, 0.6), *stronger])
    share = {row[1:3]: row[RESULT_COLUMNS.index("% of full")] for row in rows}
    assert share == {
        ("base", "full"): "100.0", ("base", "bitfit"): "75.0",
        ("encoder", "full"): "100.0", ("encoder", "bitfit"): "90.0",
    }  # fmt: skip


def test_only_runs_that_differ_by_their_seed_are_averaged() -> None:
    rows = result_rows([record("full", 0, 0.9), record("full", 0, 0.8, lr=1e-2)])
    assert [row[RESULT_COLUMNS.index("accuracy %")] for row in rows] == ["90.0", "80.0"]
    assert [row[RESULT_COLUMNS.index("% of full")] for row in rows] == ["100.0", "88.9"]


@pytest.mark.parametrize(
    "change",
    [
        {"method": {"name": "full", "alpha": 3.0}},
        {"base": {"path": "/x/base", "fingerprint": "g"}},
        {"base": {"path": "/x/base", "fingerprint": "f", "dtype": "int8"}},
        {"diffusion": {"loss": "elbo"}},
    ],
)
def test_runs_of_other_settings_or_bases_get_a_row_of_their_own(change: dict) -> None:
    assert len(result_rows([record("full", 0, 0.9), record("full", 1, 0.8) | change])) == 2


def test_a_run_from_before_an_option_existed_joins_those_that_left_it_alone() -> None:
    later = record("full", 1, 0.8)
    later["diffusion"] |= {"mask_draws": 0}
    later["train"] |= {"compile": False, "recompute": True}
    assert len(result_rows([record("full", 0, 0.9), later])) == 1
    later["diffusion"]["mask_draws"] = 4
    assert len(result_rows([record("full", 0, 0.9), later])) == 2


def test_seeds_whose_ranks_were_found_while_training_are_averaged() -> None:
    runs = [record("full", seed, 0.9) for seed in (0, 1)]
    for seed, run in enumerate(runs):
        run["started_as"] = {"name": "full", "ranks": [8, 4, 1], "prune": 0.5}
        run["method"] = {"name": "full", "ranks": [seed + 1] * 6}
    (row,) = result_rows(runs)
    assert row[RESULT_COLUMNS.index("seeds")] == 2
    assert row[RESULT_COLUMNS.index("settings")] == "ranks 8/4/1, prune 0.5"


def test_a_run_is_shown_on_test_once_it_has_been_tested() -> None:
    run = record("bitfit", 0, 0.68)
    dev = run["results"]["eval"]["mood/dev"]
    run["results"]["eval"]["mood/test"] = dev | {"accuracy": 0.6, "n": 300}
    (row,) = result_rows([run])
    assert dict(zip(RESULT_COLUMNS, row, strict=True))["split"] == "test"


def test_the_seconds_to_nearly_the_best_are_read_off_the_curve_with_the_cache() -> None:
    run = record("full", 0, 0.9) | {"curve": [[0.0, 0.5], [10.0, 0.8], [20.0, 0.87], [30.0, 0.9], [40.0, 0.89]]}
    run["results"]["finetune"]["cache_seconds"] = 3.0
    assert seconds_to(0.95, run) == 23.0 and seconds_to(0.5, run) == 3.0
    assert seconds_to(0.95, record("full", 0, 0.9)) is None
    (row,) = result_rows([run])
    assert dict(zip(RESULT_COLUMNS, row, strict=True))["s to 95%"] == 23


def test_an_interval_holds_both_the_rows_chance_and_the_seeds() -> None:
    assert interval([0.8], 100) == wilson(80, 100)
    low, high = interval([0.7, 0.9], 10_000)
    assert low < 0.7 and high > 0.9  # two seeds 20 points apart say little, however many rows there are
    same = interval([0.8, 0.8, 0.8], 100)
    assert same == pytest.approx(wilson(80, 100))


def test_a_table_is_valid_markdown() -> None:
    lines = markdown(("a", "b"), [(1, "x|y"), (None, 2.5)]).splitlines()
    assert lines == ["| a | b |", "|---|---|", "| 1 | x\\|y |", "| - | 2.5 |"]


FOLDERS = sorted(path for path in (TOP / "data" / "results").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_table_of_data_results_is_made_from_its_runs(folder: Path) -> None:
    made = tables([run_record(path) for path in sorted(folder.glob("*.json"))])
    assert (folder / "table.md").read_text().split("\n\n")[:-1] == [
        markdown(columns, rows) for _, columns, rows in made
    ]


def test_every_table_of_results_in_the_readmes_is_one_of_data_results() -> None:
    records = [[run_record(path) for path in sorted(folder.glob("*.json"))] for folder in FOLDERS]
    known = [markdown(columns, rows) for runs in records for _, columns, rows in tables(runs, brief=True)]
    shown = re.findall(r"^\| (?:task|run|text|base) \|.*\n(?:\|.*\n)+", README + RESULTS, re.MULTILINE)
    assert len(shown) >= 4 and all(table.strip() in known for table in shown)
    assert all(table in RESULTS for table in known), "and every one of them is there"


def test_a_brief_table_has_the_same_rows_with_fewer_columns() -> None:
    runs = [record("full", 0, 0.9), record("bitfit", 0, 0.8)]
    (_, columns, rows), (_, short, brief) = tables(runs)[0], tables(runs, brief=True)[0]
    assert set(short) < set(columns) and {"seeds", "rows", "accuracy %", "95% interval", "stored %"} < set(short)
    whole = [dict(zip(columns, row, strict=True)) for row in rows]
    assert tables(runs, brief=True)[1:] == tables(runs)[1:]
    assert [dict(zip(short, row, strict=True)) for row in brief] == [{c: row[c] for c in short} for row in whole]


@pytest.mark.parametrize(
    "path",
    sorted(set((TOP / "data" / "results").glob("*.md")) - {TOP / "data" / "results" / "README.md"}),
    ids=lambda path: path.name,
)
def test_the_readme_shows_what_was_counted_and_timed(path: Path) -> None:
    assert path.read_text(encoding="utf-8").strip() in README


def test_a_composition_is_shown_task_by_task() -> None:
    found = {"how": "router", "routing_accuracy": {"mood": 0.995}, "cost": {"speed": 0.9}}
    drop = {"task": "mood", "split": "dev", "n": 400, "own": 0.8, "composed": 0.79}
    found["drops"] = [drop | {"drop": 0.01, "low": 0.002, "high": 0.018}]
    members = [{"method": {"name": "trajectory-lora"}}] * 2
    run = {"run": "both", "kind": "composition", "members": members, "results": {"compose": found}}
    counts = {"split": "dev", "n": 90, "accuracy": 0.6, "low": 0.5, "high": 0.7, "unreadable": 0.1}
    found["evaluations"] = [counts | {"run": "own", "task": "mood"}, counts | {"run": "x/composed", "task": "new"}]
    chain = {"task": "mood", "then": "write", "split": "dev", "n": 9, "first_accuracy": 0.8, "written_as_asked": 0.7}
    chain |= {"low": 0.4, "high": 0.9, "distinct": 1.0, "nll_written": 4.0, "nll_real": 4.5}
    run["results"]["eval"] = {"mood+write/dev": chain}
    (row,) = compose_rows([run, record("full", 0, 0.9)])
    shown = dict(zip(COMPOSE_COLUMNS, row, strict=True))
    assert shown["points lost"] == "1.00" and shown["95% interval"] == "0.20 to 1.80" and shown["own %"] == "80.0"
    (row,) = new_task_rows([run])
    new = dict(zip(NEW_TASK_COLUMNS, row, strict=True))
    assert new["new task"] == "new" and new["answered by"] == "composed" and new["accuracy %"] == "60.0"
    (row,) = chain_rows([run])
    assert dict(zip(CHAIN_COLUMNS, row, strict=True))["written as asked %"] == "70.0"
    assert [title for title, *_ in tables([run])] == ["compositions", "new tasks", "read, then write the opposite"]
    assert shown["method"] == "trajectory-lora" and shown["routed right %"] == "99.5" and result_rows([run]) == []


COMMANDS = [
    shlex.split(line.removeprefix(".venv/bin/"), comments=True)
    for line in re.findall(r"(?:^|`|&& )((?:\.venv/bin/)?tinyld [a-z].*?)(?:$|`)", README + RESULTS, flags=re.MULTILINE)
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_and_option_of_the_readmes_exists(command: list[str]) -> None:
    verb = command[1]
    shown = CliRunner().invoke(app, [verb, "--help"], terminal_width=200)
    assert shown.exit_code == 0
    for word in command[2:]:
        if word.startswith("--"):
            assert re.search(rf"{word}\b", shown.output), f"tinyld {verb} has no {word}"


def test_the_readme_has_the_usual_rates() -> None:
    def shown(rates: dict[str, float]) -> str:
        return ", ".join(f"{'Muon ' * (optimizer == 'muon')}{rate:g}" for optimizer, rate in rates.items())

    for name, method in METHODS.items():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` | "))
        post_norm = f"; {shown(method.post_norm)}" if method.post_norm else ""
        assert row.split(" | ")[3].partition(" (")[0] == shown(method.rates) + post_norm


def test_the_readme_shows_every_verb() -> None:
    verbs = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert verbs == {command[1] for command in COMMANDS}

"""The tables of data/results/README.md are made from the CSV files beside it."""

import re
import shlex
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from conftest import good, python

from tinyld.tables import show

TOP = Path(__file__).parents[1]
RESULTS = TOP / "data" / "results"
README = (RESULTS / "README.md").read_text(encoding="utf-8")
FRONT = (TOP / "README.md").read_text(encoding="utf-8")
CARD = (TOP / "data" / "base" / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(RESULTS))
from table import markdown, read, tables  # noqa: E402

NAMES = {"our seconds": "our_seconds", "peer seconds": "peer_seconds"}


def shown_tables() -> list[tuple[str, list[str], list[list[str]]]]:
    """(CSV file, columns, rows) of every table that says where it is from."""
    found = []
    pattern = r"^from: \[([\w.-]+\.csv)\]\((?:data/results/|\.\./results/)?\1\)\n\n((?:\|.*\n)+)"
    for file, table in re.findall(pattern, FRONT + README + CARD, flags=re.M):
        columns, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        found.append((file, columns, rows))
    return found


def test_every_table_of_figures_says_where_it_is_from() -> None:
    both = FRONT + README
    assert len(shown_tables()) == (both + CARD).count("\nfrom: ") >= 10
    assert len(re.findall(r"^\|---", both, flags=re.M)) == both.count("\nfrom: ") + 1, "but the list of folders"
    assert len(FRONT.splitlines()) <= 200


@pytest.mark.parametrize(("file", "columns", "rows"), shown_tables(), ids=lambda value: str(value)[:24])
def test_its_figures_are_those_that_its_file_gives(file: str, columns: list[str], rows: list[list[str]]) -> None:
    figures = [i for i, column in enumerate(columns) if column != "method"]  # its words are the README's own
    made: set[tuple[str, ...]] = set()
    for _, names, cells in tables(RESULTS / file):
        wanted = [NAMES.get(columns[i], columns[i]) for i in figures]
        if set(wanted) <= set(names):
            made |= {tuple(show(row[names.index(name)]) for name in wanted) for row in cells}
    for row in rows:
        assert tuple(row[i] for i in figures) in made, row


def test_a_figure_in_the_text_that_names_a_file_is_in_it() -> None:
    """The files that have no table in the README: their figures stand in a sentence."""
    for file, figures in (
        ("sizes.csv", "+0.0 ± 0.9, +0.2 ± 1.0, +0.3 ± 2.6"),
        ("tuned.csv", "91.4, 91.2, 88.1"),
        ("five.csv", "88.0, 94.6, 94.9, 83.7, 81.8, 88.6 ± 0.9, 86.1 ± 1.0"),
        ("sst2.csv", "89.0, 89.8, 88.5, 88.3, 86.4, 88.8, 85.0"),
        ("larger.csv", "88.5, 88.4, 94.6, 94.5, 93.8"),
        ("webnlg-guided.csv", "55.6"),
        ("webnlg-mended.csv", "55.27, 55.88, 0.9875, 0.9883, 46.34, 47.21, 0.9892, 0.9926, 45.94, 46.59"),
        ("webnlg-mended.csv", "28.32, 27.57, 35.86, 31.97, 50.38, 50.12, 50.37, 49.71, 49.56"),
        ("guidance.csv", "47.7, 43.8"),
        ("webnlg-once.csv", "47.1, 46.5, 42.8, 55.6, 55.0"),
        ("decoding-lengths.csv", "50.41, 30.43, 52.02, 61.62, 59.05, 24.25, 60.3, 56.77"),
        ("decoding-best.csv", "50.59, 30.55, 50.73, 20.34, 2.17, 2.95"),
        ("learning-curve.csv", "5.518, 6.647"),
        ("spectrum.csv", "164.8, 176.1, 166.5, 39.77, 45.12, 45.31"),
        ("few-rows-rt-critics.csv", "65.6, 60.0 ± 16.1, 64.2 ± 8.7, 64.0 ± 7.7, 69.1 ± 7.3, 67.5 ± 8.0, 67.5 ± 1.9"),
        ("few-rows-rt-critics.csv", "68.2 ± 4.7, 69.2 ± 3.9"),
        ("calibration.csv", "0.0202, 0.0467, 0.2065, 0.3127, 0.0152, 0.0437, 0.144, 0.2825"),
        ("ablations.csv", "80.2, 77.3 to 83.1, 71.4, 68.4 to 74.3, 75.6, 72.7 to 78.3"),
        ("blocks.csv", "89.5 ± 1.3, 90.0 ± 1.2, 90.2 ± 1.2"),
    ):
        made = {show(value) for _, _, rows in tables(RESULTS / file) for row in rows for value in row}
        sentence = README[README.index(f"({file})", README.index("\n## ")) :].partition("\n\n")[0]
        sentence = " ".join(sentence.split())
        for figure in figures.split(", "):
            assert figure in made and re.search(rf"(?<!\w){re.escape(figure)}\b", sentence), (file, figure)


def test_the_means_of_the_regressions_are_those_of_their_file() -> None:
    rows = read(RESULTS / "baselines.csv")
    sentence = README[: README.index("([baselines.csv](baselines.csv); ")].rpartition("\n\n")[2]
    for features in {row["features"] for row in rows}:
        mean = fmean(row["accuracy"] for row in rows if row["features"] == features)
        assert f" {100 * mean:.1f} on " in sentence, features


def test_every_file_is_named_and_every_row_is_a_run_of_its_own() -> None:
    for path in RESULTS.glob("*.csv"):
        assert f"({path.name})" in README, path.name
        rows: list[dict[str, Any]] = read(path)
        if "seed" in rows[0] and "run" in rows[0]:
            runs = [(row["run"], row["task"], row.get("fingerprint"), row.get("command")) for row in rows]
            assert len(set(runs)) == len(runs), path.name


def test_what_info_says_of_memory_is_near_what_was_measured() -> None:
    from foreign import estimated

    rows = [row for row in read(RESULTS / "foreign.csv") if row["run"] != "peft-lora"]
    ratios = [estimated(row) / row["peak"] for row in rows]
    assert len(rows) >= 10 and 0.8 <= min(ratios) and max(ratios) <= 1.2


def test_a_table_is_valid_markdown() -> None:
    lines = markdown(("a", "b"), [(1, "x|y"), (None, 2.5)]).splitlines()
    assert lines == ["| a | b |", "|---|---|", "| 1 | x\\|y |", "| - | 2.5 |"]


def test_the_script_prints_a_table() -> None:
    done = python(str(RESULTS / "table.py"), str(RESULTS / "reviews.csv"), "--markdown")
    assert "| full, muon | 92.4 | 89.7 to 94.4 |" in done.stdout, done.stderr
    lines = [line for line in README.splitlines() if not line.startswith("|")]
    assert len(README.splitlines()) <= 250 and max(map(len, lines)) <= 120


COMMANDS = re.findall(r"(?:^|`|&& )(?:\.venv/bin/)?(tinyld [a-z].*?)(?:$|`|  #)", FRONT + README, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_of_the_page_exists(command: str) -> None:
    words = shlex.split(command)
    shown = good(words[1], "--help").stdout
    for word in words:
        assert not word.startswith("--") or re.search(rf"{word}\b", shown), f"tinyld {words[1]} has no {word}"

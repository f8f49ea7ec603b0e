"""Progress where there is no terminal: plain lines, and a time to the end that is worked out from work done here."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from tinyld.progress import Progress


def test_the_time_left_is_told_once_something_was_done_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress("train", 10.0, every=5.0) as bar:
        for done in (4.0, 4.0, 5.0, 6.0):  # a resumed run: 4 of 10 were done before
            clock[0] += 5.0
            bar.advance_to(done, "9 rows/s", "loss 1")
    said = capsys.readouterr().err.splitlines()
    assert [re.findall(r"eta (\S+)", line) for line in said] == [["-"], ["-"], ["75s"], ["40s"]]
    assert said[-1] == "train 60% 9 rows/s eta 40s loss 1"


def test_quiet_progress_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 1.0, quiet=True, every=0.0) as bar:
        bar.advance_to(0.5)
    assert capsys.readouterr() == ("", "")


def test_it_says_what_is_being_done_and_the_time_left_counts_down_between_reports(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress("train", 10.0, every=0.0) as bar:
        bar.advance_to(0.0)
        clock[0] = 10.0
        bar.advance_to(1.0)
        assert bar.eta == "90s"
        clock[0] = 30.0
        assert bar.eta == "70s"
        clock[0] = 500.0
        bar.doing("dev evaluation")
        assert bar.eta == "0s"
        bar.doing()
    assert capsys.readouterr().err.splitlines()[-2:] == ["train: dev evaluation 10%  eta 0s", "train 10%  eta 0s"]


def test_a_terminal_has_one_line_that_is_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("train [x]", 10.0) as bar:
        bar.advance_to(5.0, "9 rows/s", "loss 1")
        bar.doing("saving")
    *_, last, end = sys.stderr.getvalue().split("\r")
    assert last == "train [x]: saving 50% 9 rows/s eta - loss 1\x1b[K" and end == "\x1b[K"

"""Progress where there is no terminal: plain lines, and a time to the end that is worked out from work done here."""

import io
import re
import sys
import time

import pytest

from tinyld.progress import Progress


def test_time_left_is_of_work_done_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress("train", 10.0, every=5.0) as bar:
        for done in (4.0, 4.0, 5.0, 6.0):  # a resumed run: 4 of 10 were done before
            clock[0] += 5.0
            bar.advance_to(done, "loss 1")
        clock[0] += 10.0
        bar.doing("dev evaluation")
    said = capsys.readouterr().err.splitlines()
    assert [re.findall(r"eta (\S+)", line) for line in said] == [["-"], ["-"], ["50s"], ["30s"], ["20s"]]
    assert said[-2:] == ["train 60% eta 30s loss 1", "train: dev evaluation 60% eta 20s loss 1"]


def test_a_terminal_has_one_line_that_is_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("train [x]", 10.0) as bar:
        bar.advance_to(5.0, "loss 1")
        bar.doing("saving")
    *_, last, end = terminal.getvalue().split("\r")
    assert last == "train [x]: saving 50% eta - loss 1\x1b[K" and end == "\x1b[K"

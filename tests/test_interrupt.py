"""Signals outside of training: one line and their code, also where Python loses what is raised."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# A command whose work is the code in WORK; the signal is sent once it says so.
COMMAND = """
import signal, sys, time, weakref
from tinyld import cli, interrupt

class Thing: pass

def here(lost=None):
    signal.raise_signal(signal.SIGTERM)
    time.sleep(0)  # where Python runs the handler

def work(options):
    thing = Thing()
    found = weakref.ref(thing, here)
    del thing  # the handler raises inside the reference's callback, and Python drops that
    WORK
    return []

signal.signal(signal.SIGTERM, signal.SIG_DFL)
cli.load = lambda name: work
sys.argv = ["tinyld", "tasks", "--json"]
cli.main()
"""


@pytest.mark.parametrize(
    "then",
    [
        "time.sleep(30)",  # waits for ever, as nothing has stopped it
        "pass",  # comes to its end at once
        "interrupt.StopSignals().__enter__()",  # begins to train, which catches signals itself
    ],
)
def test_a_signal_that_python_loses_in_a_callback_stops_all_the_same(then: str) -> None:
    code = COMMAND.replace("WORK", then)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert ran.returncode == 128 + signal.SIGTERM
    assert ran.stderr == "tinyld: stopped by SIGTERM: nothing was lost that had been saved\n"

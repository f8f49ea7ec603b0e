"""Signals of a real process: one line and their code."""

import signal

import pytest
from conftest import python

COMMAND = """
import signal, sys
from tinyld import cli, interrupt

def work(options):
    WORK

signal.signal(signal.SIGTERM, signal.SIG_DFL)
interrupt.SAME = 0.0
cli.load = lambda name: work
sys.argv = ["tinyld", "tasks", "--json"]
cli.main()
"""
STEP = "with interrupt.StopSignals(): signal.raise_signal(signal.SIGTERM)"


@pytest.mark.parametrize(("work", "told"), [("pass", ""), (STEP, "stopping after this step\n")])
def test_a_signal_outside_of_training_or_a_second_one_in_it_ends_the_work(work: str, told: str) -> None:
    again = "signal.raise_signal(signal.SIGTERM)"
    code = COMMAND.replace("WORK", f"{work}; {again}" if told else again)
    ran = python("-c", code)
    assert ran.returncode == 128 + signal.SIGTERM
    assert ran.stderr == f"{told}tinyld: stopped by SIGTERM: nothing was lost that had been saved\n"

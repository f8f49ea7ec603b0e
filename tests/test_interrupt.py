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


AT = """
import signal, sys

class At:
    def find_spec(name, *_):
        if name == "MODULE":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, At)
"""


@pytest.mark.parametrize("module", ["numpy", "numpy.exceptions", "numpy._core.records"])
def test_a_signal_while_torch_imports_numpy_ends_it(module: str) -> None:
    """By C code, which swallows what is raised."""
    code = AT.replace("MODULE", module) + COMMAND.replace("WORK", "import torch; print(torch.ones(1).numpy())")
    ran = python("-c", code)
    assert (ran.returncode, ran.stdout) == (128 + signal.SIGINT, "")
    assert ran.stderr == "tinyld: stopped by SIGINT: nothing was lost that had been saved\n"


def test_a_signal_before_it_begins_shows_no_traceback() -> None:
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell's & takes away
    run = "import runpy; runpy.run_module('tinyld', run_name='__main__')"
    ran = python("-c", AT.replace("MODULE", "typer") + heard + run)
    assert (ran.returncode, ran.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize(("work", "told"), [("pass", ""), (STEP, "stopping after this step\n")])
def test_a_signal_outside_of_training_or_a_second_one_in_it_ends_the_work(work: str, told: str) -> None:
    again = "signal.raise_signal(signal.SIGTERM)"
    code = COMMAND.replace("WORK", f"{work}; {again}" if told else again)
    ran = python("-c", code)
    assert ran.returncode == 128 + signal.SIGTERM
    assert ran.stderr == f"{told}tinyld: stopped by SIGTERM: nothing was lost that had been saved\n"

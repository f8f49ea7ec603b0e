"""Stopping at a signal: the step ends and the state is saved; a second signal exits at once.

One stop may arrive twice, from a terminal or a launcher and from the parent process: what comes within a second of the
first is the first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

SAME = 1.0  # seconds within which a second signal is the first one


class Interrupted(BaseException):
    """A run was stopped by a signal; the exit code is 128 plus its number, as shells have it.

    Not an Exception, as KeyboardInterrupt is none: nothing that handles errors should take it for one.
    """

    def __init__(self, signum: int, message: str = "nothing was lost that had been saved"):
        super().__init__(f"stopped by {signal.Signals(signum).name}: {message}")
        self.exit_code = 128 + signum


def stop_signals() -> list[signal.Signals]:
    """What stops a run: Ctrl-C, a launcher's SIGTERM, and a closed terminal unless nohup has it ignored."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


class StopSignals:
    """Within it the first signal is only noted in `received`, and answered on stderr with what will still be done.

    In another thread than the main one it does nothing.
    """

    def __init__(self, answer: str = "stopping after this step") -> None:
        self.received, self.at, self.answer = 0, 0.0, answer
        self._before: dict[int, Any] = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self.at > SAME:
            os._exit(128 + signum)
        if not self.received:
            self.received, self.at = signum, time.monotonic()
            if self.answer and sys.stderr is not None:
                with contextlib.suppress(OSError, ValueError):  # nobody may read it
                    # not by print, which may just be under way and is not reentrant
                    os.write(sys.stderr.fileno(), f"{self.answer}\n".encode())

    def __enter__(self) -> StopSignals:
        raise_if_one_came()
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


again: threading.Timer | None = None  # that sends a lost signal anew
came = 0  # the last signal that `raise_at_signals` raised for: what handles it, or a C callback, may have lost it
AGAIN = 0.05  # seconds after which a signal that was lost is sent again


def raise_at_signals() -> None:
    """Outside of training a signal is an error like any other: one line and its exit code.

    Python drops what is raised in a callback of C (of a weak reference, a finalizer, ctypes): it is then raised again
    a little later, and at the latest by `raise_if_one_came`.
    """

    def interrupt(signum: int, frame: FrameType | None) -> None:
        global came
        came = signum
        raise Interrupted(signum)

    def unraisable(lost: Any) -> None:
        if isinstance(lost.exc_value, Interrupted):
            global again
            again = threading.Timer(AGAIN, os.kill, (os.getpid(), came))
            again.start()
        else:
            sys.__unraisablehook__(lost)

    for signum in stop_signals():
        signal.signal(signum, interrupt)
    sys.unraisablehook = unraisable


def raise_no_more() -> None:
    """What comes now, when all is done but the interpreter's own end, ends the process as signals do."""
    if again is not None:
        again.cancel()
    for signum in stop_signals():
        signal.signal(signum, signal.SIG_DFL)


def raise_if_one_came() -> None:
    """Raises Interrupted for a signal that came since `raise_at_signals` and stopped nothing."""
    if came:
        raise Interrupted(came)

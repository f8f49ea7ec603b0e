"""Stopping at a signal: SIGTERM and SIGINT let the step end and the state be saved; a second one exits at once.

One stop may arrive twice, from a terminal or a launcher and from the parent process: what comes within a second of the
first is the first.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = 1.0  # seconds within which a second signal is the first one


class Interrupted(BaseException):
    """A run was stopped by a signal; the exit code is 128 plus its number, as shells have it.

    Not an Exception, as KeyboardInterrupt is none: nothing that handles errors should take it for one.
    """

    def __init__(self, signum: int, message: str = "nothing was lost that had been saved"):
        super().__init__(f"stopped by {signal.Signals(signum).name}: {message}")
        self.exit_code = 128 + signum


class StopSignals:
    """Within it the first signal is only noted in `received`. In another thread than the main one it does nothing."""

    def __init__(self) -> None:
        self.received, self.at = 0, 0.0
        self._before: dict[int, Any] = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self.at > SAME:
            os._exit(128 + signum)
        if not self.received:
            self.received, self.at = signum, time.monotonic()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


def raise_at_signals() -> None:
    """Outside of training a signal is an error like any other: one line and its exit code."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    for signum in SIGNALS:
        signal.signal(signum, interrupt)

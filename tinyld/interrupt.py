"""Stopping at a signal: a step of training ends and is saved; elsewhere, or at a second signal, work ends at once."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

SAME = 1.0  # seconds within which a second signal is the first one, sent by the terminal and by the launcher as well


class Interrupted(BaseException):
    """A run was stopped by a signal; the exit code is 128 plus its number, as shells have it. Not an Exception, as
    KeyboardInterrupt is none: nothing that handles errors should take it for one."""

    def __init__(self, signum: int, message: str = "nothing was lost that had been saved"):
        super().__init__(f"stopped by {signal.Signals(signum).name}: {message}")
        self.signum, self.exit_code = signum, 128 + signum


def interrupt_or_end(signum: int, frame: FrameType | None) -> None:
    """Raises Interrupted, in a process of our own. Where something is just being imported that ends at once: C code
    that imports may swallow what is raised, or leave half a module (torch imports NumPy so)."""
    stopped = Interrupted(signum)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            with contextlib.suppress(OSError):
                os.write(2, f"tinyld: {stopped}\n".encode())
            os._exit(stopped.exit_code)
        frame = frame.f_back
    raise stopped


USUAL = (signal.SIG_DFL, signal.default_int_handler, interrupt_or_end)  # handlers that are nobody else's


@contextlib.contextmanager
def handling(handler: Any, after: Any = None) -> Iterator[None]:
    """Within it Ctrl-C, a launcher's SIGTERM, and a closed terminal unless nohup ignores it, go to `handler`; behind it
    to `after`, where that is given, as in a process of our own. In another's they go back to what they went to before,
    and one that the process handles or ignores by itself is left to it."""
    numbers, own = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), after is not None
    taken = [n for n in numbers if signal.getsignal(n) in USUAL or (own and n != signal.SIGHUP)]
    before = {n: signal.signal(n, handler) for n in taken}
    try:
        yield
    finally:
        for signum, found in before.items():
            signal.signal(signum, found if after is None else after)


class StopSignals(contextlib.ExitStack):
    """Within it the first signal is only noted in `received`, and answered on stderr with what will still be done. In
    another thread than the main one it does nothing."""

    def __init__(self, answer: str = "stopping after this step") -> None:
        super().__init__()
        self.received, self.at, self.answer = 0, 0.0, answer

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self.at > SAME:
            raise Interrupted(signum)
        if not self.received:
            self.received, self.at = signum, time.monotonic()
            if self.answer and sys.stderr is not None:
                with contextlib.suppress(OSError, ValueError):  # nobody may read it
                    # not by print, which may just be under way and is not reentrant
                    os.write(sys.stderr.fileno(), f"{self.answer}\n".encode())

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.enter_context(handling(self._note))
        return self

"""What is being done, how far it is and when it will be done, on stderr."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time


def say(line: str, end: str = "\n") -> None:
    """A line on stderr; none where nobody reads it (any more)."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(line, end=end, file=sys.stderr, flush=True)


class Progress:
    """On a terminal one line that is written anew, elsewhere a line every `every` seconds; nothing when `quiet`.

    `total` is in the unit that `advance_to` gets: rows, bytes, or the share of a budget.
    """

    def __init__(self, label: str, total: float, quiet: bool = False, every: float = 15.0):
        self.label, self.total, self.quiet, self.every = label, total, quiet, every
        self.now = self.rate = self.note = ""
        self.done = 0.0
        # Where the work stood at the first report: a resumed run begins late, and what comes before it takes time too.
        self.begun: float | None = None
        self.ends: float | None = None  # when it will be done
        self.on_terminal = sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()

    def __enter__(self) -> Progress:
        self.last = time.monotonic()
        return self

    @property
    def eta(self) -> str:
        """Time that is left, by the mean rate so far."""
        if self.ends is None:
            return "-"
        seconds = max(0, round(self.ends - time.monotonic()))
        return f"{seconds}s" if seconds < 100 else f"{seconds // 60}:{seconds % 60:02d}"

    def doing(self, what: str = "") -> None:
        """Says what is being done besides the work that is counted; without `what`, that this goes on."""
        self.now = what and f": {what}"
        self._report()

    def advance_to(self, done: float, rate: str = "", note: str = "") -> None:
        now = time.monotonic()
        self.done, self.rate, self.note = done, rate, note or self.note
        if self.begun is None:
            self.begun, self.started = done, now
        if done > self.begun:
            self.ends = now + (now - self.started) * (self.total - done) / (done - self.begun)
        self._report()

    def _report(self) -> None:
        if self.quiet or not (self.on_terminal or time.monotonic() - self.last >= self.every):
            return
        self.last, share = time.monotonic(), 100 * min(self.done / max(self.total, 1e-9), 1.0)
        line = f"{self.label}{self.now} {share:.0f}% {self.rate} eta {self.eta} {self.note}".rstrip()
        if self.on_terminal:
            say(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K", end="")
        else:
            say(line)

    def __exit__(self, *_: object) -> None:
        if self.on_terminal and not self.quiet:
            say("\r\x1b[K", end="")

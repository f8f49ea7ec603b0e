"""What is being done, how far it is and when it will be done, on stderr."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time

from tinyld.errors import plain


def say(line: str, end: str = "\n") -> None:
    """A line on stderr; none where nobody reads it (any more)."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True, end=end)


class Progress:
    """A line that is written anew on a terminal, one every `every` seconds elsewhere; nothing when `quiet`.

    `total` is in the unit that `advance_to` gets; a step budget counts steps, a time budget seconds.
    """

    def __init__(self, label: str, total: float, quiet: bool = False, every: float = 15.0):
        self.label, self.total, self.quiet, self.every = plain(label), total, quiet, every
        self.now = self.rate = self.note = ""
        self.done = 0.0
        self.begun: float | None = None  # where the work stood at the first report: a resumed run begins late
        self.ends: float | None = None  # when it will be done
        self.on_terminal = False
        self.started = self.last = time.monotonic()

    def __enter__(self) -> Progress:
        self.started = self.last = time.monotonic()
        self.on_terminal = not self.quiet and sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()
        return self

    @property
    def title(self) -> str:
        return f"{self.label}: {self.now}" if self.now else self.label

    @property
    def eta(self) -> str:
        """Time that is left, by the mean rate so far."""
        if self.ends is None:
            return "-"
        seconds = max(0, round(self.ends - time.monotonic()))
        return f"{seconds}s" if seconds < 100 else f"{seconds // 60}:{seconds % 60:02d}"

    def doing(self, what: str = "") -> None:
        """Says what is being done besides the work that is counted; without `what`, that this goes on."""
        self.now = what
        self._report(at_once=self.on_terminal)

    def advance_to(self, done: float, rate: str = "", note: str = "") -> None:
        self.done, self.rate, self.note = done, rate, note or self.note
        self.begun = done if self.begun is None else self.begun
        if done > self.begun:
            now = time.monotonic()
            self.ends = now + (now - self.started) * (self.total - done) / (done - self.begun)
        self._report()

    def _report(self, at_once: bool = False) -> None:
        if self.quiet or (time.monotonic() - self.last < (0.2 if self.on_terminal else self.every) and not at_once):
            return
        self.last, share = time.monotonic(), min(self.done / self.total, 1.0)
        line = f"{100 * share:.0f}% {self.rate} eta {self.eta} {self.note}".rstrip()
        if not self.on_terminal:
            return say(f"{self.title} {line}")
        line = f"{self.title} [{'#' * round(24 * share):.<24}] {line}"[: shutil.get_terminal_size().columns - 1]
        say(f"\r{line}\x1b[K", end="")

    def __exit__(self, *_: object) -> None:
        if self.on_terminal:
            say("\r\x1b[K", end="")

"""What is being done, how far it is and when it will be done, on stderr. rich is imported only when a bar starts."""

from __future__ import annotations

import contextlib
import sys
import time


def say(line: str) -> None:
    """A line on stderr; none where nobody reads it (any more)."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


class Progress:
    """A bar on a terminal, a line every `every` seconds elsewhere; nothing when `quiet`.

    `total` is in the unit that `advance_to` gets; a step budget counts steps, a time budget seconds.
    """

    def __init__(self, label: str, total: float, quiet: bool = False, every: float = 15.0):
        self.label, self.total, self.quiet, self.every = label, total, quiet, every
        self.now = self.rate = self.note = ""
        self.done = 0.0
        self.begun: float | None = None  # where the work stood at the first report: a resumed run begins late
        self.ends: float | None = None  # when it will be done
        self.bar = None
        self.started = self.last = time.monotonic()

    def __enter__(self) -> Progress:
        self.started = self.last = time.monotonic()
        if not self.quiet and sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            def shown(name: str) -> TextColumn:  # asked for whenever the bar is drawn: the time left counts down
                return TextColumn(f"{{task.fields[here].{name}}}", markup=False)

            columns = (shown("title"), BarColumn(bar_width=24), TaskProgressColumn(), shown("rate"))
            columns += (TimeElapsedColumn(), TextColumn("eta"), shown("eta"), shown("note"))
            self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, here=self)
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
        self._report()

    def advance_to(self, done: float, rate: str = "", note: str = "") -> None:
        self.done, self.rate, self.note = done, rate, note or self.note
        self.begun = done if self.begun is None else self.begun
        if done > self.begun:
            now = time.monotonic()
            self.ends = now + (now - self.started) * (self.total - done) / (done - self.begun)
        self._report()

    def _report(self) -> None:
        if self.bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self.bar.update(self.task, completed=min(self.done, self.total))
        elif not self.quiet and time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            share = 100 * min(self.done / self.total, 1.0)
            say(f"{self.title} {share:.0f}% {self.rate} eta {self.eta} {self.note}".rstrip())

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self.bar.stop()

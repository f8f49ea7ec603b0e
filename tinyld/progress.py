"""Progress bars with rate and ETA, on stderr. rich is imported only when a bar starts."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Progress:
    """A bar on a terminal, a line every `every` seconds elsewhere; nothing when `quiet`.

    `total` is in the unit that `advance_to` gets; a step budget counts steps, a time budget seconds.
    """

    def __init__(self, label: str, total: float, unit: str = "", quiet: bool = False, every: float = 15.0):
        self.label, self.total, self.unit, self.quiet, self.every = label, total, unit, quiet, every
        self.begun: float | None = None  # where the work stood at the first report: a resumed run begins late
        self.note = ""
        self.bar = None
        self.started = self.last = time.monotonic()

    def __enter__(self) -> Progress:
        self.started = self.last = time.monotonic()
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.label, total=self.total, rate="", note="")
        return self

    def advance_to(self, done: float, rate: str = "", note: str = "") -> None:
        self.note = note or self.note
        self.begun = done if self.begun is None else self.begun
        if self.bar is not None:
            self.bar.update(self.task, completed=min(done, self.total), rate=rate, note=self.note)
        elif not self.quiet and time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            elapsed = self.last - self.started
            made = done - self.begun
            eta = f"{elapsed * (self.total - done) / made:.0f}s" if made > 0 else "-"
            share = 100 * min(done / self.total, 1.0)
            print(f"{self.label} {share:.0f}% {rate} eta {eta} {self.note}".rstrip(), file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

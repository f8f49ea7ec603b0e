"""What is being done, how far it is and when it will be done, on stderr."""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

Advance = Callable[[float], None]  # is told how much is done
Say = Callable[[str], None]  # says a line, or nothing where that is wanted


def say(line: str, end: str = "\n") -> None:
    """A line on stderr; none where nobody reads it (any more)."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(line, end=end, file=sys.stderr, flush=True)


def say_some(say: Say, some: int, rows: int, what: str) -> None:
    if some:
        say(f"{some:,} of {rows:,} {what}")


def say_truncated(say: Say, truncated: int, rows: int, max_length: int, which: str = "rows") -> None:
    long = f"{which} are longer than the {max_length} tokens that the base takes"
    say_some(say, truncated, rows, f"{long}: their middle is not read, or what is far from a gap")


def say_learned(say: Say, learned: int, rows: int, which: str) -> None:
    say_some(say, learned, rows, f"{which} are training rows, too: new texts are answered less well")


def say_numbers(say: Say, task: Any, examples: Iterable[Any]) -> None:
    """Tells what numbers stand for where rows have them for the labels of a user's `Task`; a built-in one's are
    published."""
    if task.is_users and any(example.is_numbered for example in examples):
        read = ", ".join(f"{i} as {label}" for i, label in enumerate(task.labels))
        say(f"labels are numbers, read in the order of the task's [verbalizer]: {read}; is that right?")


def unheard(done: float) -> None:
    """An Advance that nobody looks at."""


def further(advance: Advance, before: float, share: float = 1.0) -> Advance:
    """Tells `advance` of a part of the work: what was done `before` it, and of what it does so large a `share`."""
    return lambda done: advance(before + share * done)


class Progress(contextlib.AbstractContextManager):
    """On a terminal one line that is written anew, elsewhere a line every `every` seconds; nothing when `quiet`.

    `total` is in what `advance_to` gets: rows, bytes, or the share of a budget; where that has a `unit`, it is told how
    many are done a second.
    """

    def __init__(self, label: str, total: float, quiet: bool = False, every: float = 15.0, unit: str = ""):
        self.label, self.total, self.quiet, self.every, self.unit = label, total, quiet, every, unit
        self.now = self.note = ""
        self.done, self.last = 0.0, time.monotonic()
        # Where the work stood at the first report: a resumed run begins late, and what comes before it takes time too.
        self.begun: tuple[float, float] | None = None
        self.ends: float | None = None  # when it will be done, by the mean rate so far
        self.on_terminal = sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()

    def doing(self, what: str = "") -> None:
        """Says what is being done besides the work that is counted; without `what`, that this goes on."""
        self.now = what and f": {what}"
        self._report()

    def advance_to(self, done: float, note: str = "") -> None:
        self.done, self.note, now = done, note, time.monotonic()
        begun, started = self.begun = self.begun or (done, now)
        if done > begun:
            self.ends = now + (now - started) * (self.total - done) / (done - begun)
            if self.unit:
                self.note = f"{(done - begun) / max(now - started, 1e-9):,.1f} {self.unit}/s"
        self._report()

    def _report(self) -> None:
        now = time.monotonic()
        if self.quiet or not (self.on_terminal or now - self.last >= self.every):
            return
        self.last, share = now, 100 * min(self.done / max(self.total, 1e-9), 1.0)
        left = None if self.ends is None else max(0, round(self.ends - now))
        eta = "-" if left is None else f"{left}s" if left < 100 else f"{left // 60}:{left % 60:02d}"
        line = f"{self.label}{self.now} {share:.0f}% eta {eta} {self.note}".rstrip()
        if self.on_terminal:
            say(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K", end="")
        else:
            say(line)

    def __exit__(self, *_: object) -> None:
        if self.on_terminal and not self.quiet:
            say("\r\x1b[K", end="")

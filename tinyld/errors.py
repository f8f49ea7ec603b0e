"""The one exception a user can fix: it becomes one line on stderr and exit code 1 (2 for wrong usage)."""

import contextlib
import zlib
from collections.abc import Iterator


def plain(text: object) -> str:
    """Text from outside as it may go to a terminal: line ends, tabs and odd blanks become spaces; control characters,
    escapes, marks that reorder text and halves of surrogate pairs (of undecodable paths) become "?"."""
    joiners = "\u200c\u200d"  # inside words of some scripts, and emoji
    return "".join(c if c.isprintable() or c in joiners else " " if c.isspace() else "?" for c in str(text))


def show(text: object) -> str:
    """`text` quoted for a message: escaped, at most about 60 characters."""
    text = str(text)
    return plain(repr(text if len(text) <= 60 else text[:57] + "..."))


class TinyldError(Exception):
    """Says what is wrong, which value or file, what is allowed and the way out, in one line."""

    exit_code = 1

    def __init__(self, message: object):
        text = plain(message)
        super().__init__(text if len(text) <= 4_000 else f"{text[:2_000]} ... {text[-2_000:]}")


class UsageError(TinyldError):
    """A bad option value or combination, found before any work is done."""

    exit_code = 2


class Diverged(TinyldError):
    """A loss, gradient or weight of a training run is not finite: at another learning rate it may be."""


@contextlib.contextmanager
def failing(path: object, done: str) -> Iterator[None]:
    """What the system refuses within becomes the line "`path`: cannot be `done`"."""
    try:
        yield
    except (OSError, ValueError, EOFError, zlib.error) as error:  # a zero byte in the name; a damaged .gz
        raise TinyldError(f"{path}: cannot be {done} ({getattr(error, 'strerror', None) or error})") from None

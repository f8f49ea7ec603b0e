"""The one exception a user can fix: it becomes one line on stderr and exit code 1 (2 for wrong usage)."""

from __future__ import annotations


class TinyldError(Exception):
    """Says what is wrong, which value or file, what is allowed and the way out, in one line."""

    exit_code = 1


class UsageError(TinyldError):
    """A bad option value or combination, found before any work is done."""

    exit_code = 2

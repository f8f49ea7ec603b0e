"""What changes files on the disk: durable atomic writing, the lock of a folder, and the one place that deletes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tinyld.errors import TinyldError, failing


def write_atomic(path: Path, content: bytes) -> None:
    """Writes `path` whole or not at all, and durably. A pipe or device that it names is written to, not replaced."""
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well, and vanishes otherwise.

    A temporary name that nobody foresees, fsync, rename, fsync of the folder. What is there and is no regular file is
    not replaced: a pipe or a device (/dev/stdout) takes the bytes as they come, a folder or link is refused.
    """
    temporary = path.parent / f".tinyld-{secrets.token_hex(8)}.tmp"
    with failing(path, "written"):
        if is_stream(path):
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)  # an error where nobody reads a pipe
            os.set_blocking(descriptor, True)
            with open(descriptor, "wb") as file:
                yield file
            return
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def is_temporary(name: str) -> bool:
    return re.fullmatch(r"\.tinyld-[0-9a-f]{16}\.tmp", name) is not None


def is_stream(path: Path) -> bool:
    """Whether bytes go into what `path` names; OSError where it is neither that nor a regular file nor free."""
    if not os.path.lexists(path) or stat.S_ISREG(os.lstat(path).st_mode):
        return False
    mode = os.stat(path).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        return True
    if stat.S_ISREG(mode) and path.is_relative_to("/dev"):  # /dev/stdout, where a shell sent it to a file
        return True
    raise OSError(0, "it is a folder" if path.is_dir() else "it is no regular file; where it is a link, name the file")


def sync(path: Path) -> None:
    """Puts a file or a folder's names on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    with failing(path, "made"):
        path.mkdir(parents=True, exist_ok=True)


def clear(folder: Path, ours: Iterable[str] = (), with_folder: bool = False) -> None:
    """The one place that deletes: from a folder the regular files among `ours` and those of temporary names.

    `with_folder`: itself too, when nothing else is in it. Links stay, and a folder that is a link is left alone.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    with failing(folder, "removed"):
        for name in [*filter(is_temporary, sorted(os.listdir(folder))), *ours]:
            path = folder / name
            if path.name == name and os.path.lexists(path) and stat.S_ISREG(os.lstat(path).st_mode):
                path.unlink()
        if with_folder and not os.listdir(folder):
            folder.rmdir()


def to_json(value: Any, indent: int | None = 2, ascii: bool = False) -> bytes:
    """JSON as it is written everywhere, with a line end; never a NaN."""
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=ascii, allow_nan=False) + "\n"
    except ValueError:
        raise TinyldError("a result is not a finite number, so nothing was written") from None
    return text.encode(errors="backslashreplace")  # half of a surrogate pair, of an undecodable path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Within it this process has `folder` to itself; where another one has it, TinyldError at once, unless it may wait.

    The lock is flock's on the folder itself: it ends with the process and leaves no file behind.
    """
    with contextlib.ExitStack() as stack:
        with failing(folder, "written"):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if os.fstat(descriptor).st_ino != os.stat(folder).st_ino:  # replaced by --force meanwhile
                    raise BlockingIOError
            except BlockingIOError:
                raise TinyldError(f"{folder}: another process is writing in it; wait for that") from None
        yield

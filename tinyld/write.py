"""What changes files on the disk: durable atomic writing, and the one place that deletes."""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tinyld.errors import TinyldError, failing


def write_atomic(path: Path, content: bytes) -> None:
    """Writes `path` whole or not at all, and durably: a temporary name that nobody foresees, fsync, rename, fsync of
    the folder. What is no regular file is not replaced: a stream takes the bytes as they come, all else is refused."""
    temporary = path.parent / f".tinyld-{secrets.token_hex(8)}.tmp"
    with failing(path, "written"):
        if is_stream(path):
            ours = os.dup(1) if str(path) == "/dev/stdout" else path  # which has a place where it writes next
            with open(ours, "ab") as stream:
                stream.write(content)
            return
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    return re.fullmatch(r"\.tinyld-[0-9a-f]{16}\.tmp", name) is not None


def is_stream(path: Path) -> bool:
    """Whether `path` is a pipe or a device, such as /dev/stdout, also where a shell sent that to a file; OSError for a
    folder, and for a link to what is none of these."""
    if not os.path.lexists(path) or (path.is_file() and not path.is_symlink()):
        return False
    if path.is_fifo() or path.is_char_device() or (path.is_file() and path.is_relative_to("/dev")):
        return True
    raise OSError(0, "it is a folder" if path.is_dir() else "it is no regular file; where it is a link, name the file")


def make_folder(path: Path) -> None:
    with failing(path, "made"):
        path.mkdir(parents=True, exist_ok=True)


def clear(folder: Path, ours: Iterable[str] = ()) -> None:
    """The one place that deletes: from a folder the regular files among `ours` and those of temporary names. Links
    stay, and a folder that is a link is left alone."""
    with failing(folder, "removed"):
        if folder.is_dir() and not folder.is_symlink():
            for path in (folder / name for name in [*filter(is_temporary, os.listdir(folder)), *ours]):
                if path.is_file() and not path.is_symlink():
                    path.unlink()


def to_json(value: Any, indent: int | None = 2, ascii: bool = False) -> bytes:
    """JSON as it is written everywhere, with a line end; never a NaN."""
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=ascii, allow_nan=False) + "\n"
    except ValueError:
        raise TinyldError("a result is not a finite number, so nothing was written") from None
    return text.encode(errors="backslashreplace")  # half of a surrogate pair, of an undecodable path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

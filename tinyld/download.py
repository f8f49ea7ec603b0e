"""Official data sets: fetched, checked, and kept as `sentence<TAB>label` files in the user cache."""

from __future__ import annotations

import csv
import hashlib
import os
import sys
import tempfile
import zlib
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from tinyld.config import check_choice
from tinyld.errors import TinyldError, plain, show
from tinyld.formats import CONVERTERS, MAX_BYTES, cut
from tinyld.read import clean, read_object
from tinyld.write import make_folder, to_json, write_atomic

TIMEOUT = 30.0  # seconds without a byte
SEEN = "checksums.json"  # in a set's folder: URL -> SHA-256 of what was first downloaded and has no published one


@dataclass(frozen=True)
class RemoteFile:
    url: str
    sha256: str | None = None  # None: what comes out of it is counted all the same


@dataclass(frozen=True)
class Source:
    """Where a task's official data is, and what must come out of it."""

    format: str  # a key of CONVERTERS
    files: tuple[RemoteFile, ...]
    label_counts: dict[str, dict[str, int]]  # official split -> label name -> rows, before any cut

    def __post_init__(self) -> None:
        check_choice("download format", self.format, tuple(CONVERTERS))


def cache_dir() -> Path:
    """`$TINYLD_CACHE`, else `$XDG_CACHE_HOME/tinyld`, else `~/.cache/tinyld`; it need not exist."""
    if own := os.environ.get("TINYLD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "tinyld"


def fetch(remote: RemoteFile, out: BinaryIO, description: str) -> str:
    """Copies what the URL gives to `out`, with a bar on stderr; its SHA-256. TinyldError where that fails or differs.

    `$TINYLD_MIRROR` replaces the scheme and host of every URL.
    """
    import http.client
    from urllib.request import Request, urlopen

    from tinyld.progress import Progress

    url, digest, done = remote.url, hashlib.sha256(), 0
    if mirror := os.environ.get("TINYLD_MIRROR"):
        url = mirror.rstrip("/") + urlsplit(url).path
    scheme = urlsplit(url).scheme
    if scheme not in ("http", "https"):
        raise TinyldError(f"cannot download {show(url)}: only http and https are supported")
    print(f"downloading {description} from {plain(url)}", file=sys.stderr, flush=True)
    try:
        with urlopen(Request(url, headers={"User-Agent": "tinyld"}), timeout=TIMEOUT) as response:
            if urlsplit(response.url).scheme != scheme:
                raise OSError(f"it leads to {show(response.url)}")
            size = int(response.headers.get("Content-Length") or 0)
            with Progress(description, total=max(size, 1), quiet=size == 0) as bar:
                while block := response.read1(1 << 18):
                    done += len(block)
                    if done > MAX_BYTES:
                        raise OSError(f"it is larger than {MAX_BYTES:,} bytes")
                    out.write(block)
                    digest.update(block)
                    bar.advance_to(done, rate=f"{done / 1e6:.1f} MB")
            if done < size:
                raise OSError(f"it broke off after {done:,} of {size:,} bytes")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise TinyldError(f"could not download {url}: {getattr(error, 'reason', None) or error}") from None
    if remote.sha256 not in (None, digest.hexdigest()):
        raise TinyldError(f"{url}: checksum is {digest.hexdigest()}, expected {remote.sha256}; try again later")
    out.seek(0)
    return digest.hexdigest()


def download_task(name: str, source: Source) -> Path:
    """The folder of the cache that now holds the task's splits. Files already there stay as they are.

    TinyldError where a file cannot be had, its rows are not those that `label_counts` promises, or its SHA-256, where
    none is published, is not that of the first time; nothing is left behind then.
    """
    url, first_seen = source.files[0].url, {}
    with ExitStack() as stack:
        files: list[BinaryIO] = []
        for i, remote in enumerate(source.files, 1):
            files.append(stack.enter_context(tempfile.TemporaryFile()))
            digest = fetch(remote, files[-1], name if len(source.files) == 1 else f"{name} ({i}/{len(source.files)})")
            if remote.sha256 is None:
                first_seen[remote.url] = digest
        try:
            splits = CONVERTERS[source.format](files)
        except (ValueError, LookupError, OSError, EOFError, RuntimeError, csv.Error, zlib.error) as error:
            raise TinyldError(f"{url}: not the format that {name} is published in ({show(error)})") from None
    for split, expected in source.label_counts.items():
        found = Counter(label for _, label in splits.get(split, ()))
        if found != Counter(expected):
            has = f"{found.total():,} rows, {show(dict(found))}"
            raise TinyldError(f"{url}: {name} {split} has {has}, expected {expected}; nothing was kept")
    folder = cache_dir() / "data" / name
    make_folder(folder)
    seen = read_object(folder / SEEN) if (folder / SEEN).exists() else {}
    for url, digest in first_seen.items():
        if seen.get(url, digest) != digest:
            was = f"its SHA-256 is {digest}, and was {seen[url]} when it was first downloaded"
            raise TinyldError(f"{url}: {was}; where you trust it, remove {folder}")
    write_atomic(folder / SEEN, to_json(seen | first_seen))
    for split, rows in cut(splits).items():
        path = folder / f"{split}.tsv"
        if not path.exists():
            lines = ["sentence\tlabel\n", *(f"{clean(text)}\t{label}\n" for text, label in rows)]
            write_atomic(path, "".join(lines).encode())
    return folder

"""Official data sets: fetch, check, and keep as `sentence<TAB>label` files in the user cache. It knows no template."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tinyld.errors import TinyldError, plain
from tinyld.formats import CONVERTERS, cut
from tinyld.read import ROWS_BYTES, clean, read_bytes, read_object
from tinyld.write import locked, make_folder, sha256, to_json, write_atomic

TIMEOUT, TOTAL = 30.0, 3600.0  # seconds without a byte, and of a whole download
MAX_BYTES = 2 << 30  # of a download
CHECKSUMS = "checksums.json"  # of the files that were written into a set's folder


class NetworkError(TinyldError):
    """The file could not be had: no network, no such host, an HTTP error, a broken transfer."""


@dataclass(frozen=True)
class Source:
    """Where a task's official data is. What its files hold needs no check beside their digests."""

    format: str  # a key of CONVERTERS
    files: dict[str, str]  # URL -> SHA-256, or MD5 where no other digest is published
    rows: dict[str, int]  # of each official split, before dev (and test) are cut from a set that has none


def cache_dir() -> Path:
    """`$TINYLD_CACHE`, else `$XDG_CACHE_HOME/tinyld`, else `~/.cache/tinyld`; it need not exist."""
    if own := os.environ.get("TINYLD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "tinyld"


def fetch(url: str, digest: str, description: str) -> bytes:
    """What the URL gives, with a bar on stderr. NetworkError, or TinyldError for another digest (SHA-256 or MD5).

    `$TINYLD_MIRROR` replaces the scheme and host of every URL.
    """
    import http.client
    from urllib.request import Request, urlopen

    from tinyld.progress import Progress

    content, deadline = bytearray(), time.monotonic() + TOTAL
    if mirror := os.environ.get("TINYLD_MIRROR"):
        url = mirror.rstrip("/") + urlsplit(url).path
    print(f"downloading {description} from {plain(url)}", file=sys.stderr, flush=True)
    try:
        with urlopen(Request(url, headers={"User-Agent": "tinyld"}), timeout=TIMEOUT) as response:
            size = int(response.headers.get("Content-Length") or 0)
            with Progress(description, total=max(size, 1), quiet=size == 0) as bar:
                while block := response.read1(1 << 18):
                    content += block
                    if len(content) > MAX_BYTES or time.monotonic() > deadline:
                        raise OSError(f"it is larger than {MAX_BYTES:,} bytes or takes over {TOTAL:,.0f} s")
                    bar.advance_to(len(content), rate=f"{len(content) / 1e6:.1f} MB")
            if len(content) < size:
                raise OSError(f"it broke off after {len(content):,} of {size:,} bytes")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NetworkError(f"could not download {url}: {getattr(error, 'reason', None) or error}") from None
    kind = "md5" if len(digest) == 32 else "sha256"
    found = hashlib.new(kind, content, usedforsecurity=False).hexdigest()
    if found != digest:
        raise TinyldError(f"{url}: checksum is {found}, expected {digest}; try again later")
    return bytes(content)


def download_task(name: str, source: Source) -> Path:
    """The folder of the cache that now holds the task's splits. Files already there stay as they are.

    NetworkError where a file cannot be had, TinyldError where it is another one; nothing is left behind then.
    """
    n = len(source.files)
    files = [io.BytesIO(fetch(*file, f"{name} ({i}/{n})")) for i, file in enumerate(source.files.items(), 1)]
    splits = cut(CONVERTERS[source.format](files))
    folder = cache_dir() / "data" / name
    make_folder(folder)
    with locked(folder, wait=True):
        new = {}
        for split, rows in splits.items():
            lines = (f"{clean(text)}\t{label}\n" for text, label in rows)
            if not (folder / f"{split}.tsv").exists():
                new[f"{split}.tsv"] = "".join(["sentence\tlabel\n", *lines]).encode()
        sums = _checksums(folder) | {file: sha256(content) for file, content in new.items()}
        write_atomic(folder / CHECKSUMS, to_json(sums))  # first: no file is ever unlisted
        for file, content in new.items():
            write_atomic(folder / file, content)
    return folder


def _checksums(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUMS
    return dict(read_object(path)) if path.exists() else {}


def check_cached(path: Path, published: int | None = None) -> None:
    """TinyldError when a file of the cache is no longer what `download_task` wrote, or, where a user put it there, has
    not as many rows as are `published`."""
    known, content = _checksums(path.parent).get(path.name), read_bytes(path, ROWS_BYTES)
    if known is not None and sha256(content) != known:
        raise TinyldError(f"{path}: changed or cut off since it was downloaded; delete it to download it again")
    rows = len(content.splitlines()) - 1
    if known is None and published not in (None, rows):
        raise TinyldError(
            f"{path}: has {rows:,} rows, which are not the {published:,} published ones; "
            "delete it to download them, or keep rows of your own in another folder and say --data DIR"
        )

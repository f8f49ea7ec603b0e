"""Official data sets: fetch, check, and keep as `sentence<TAB>label` files in the user cache. It knows no template."""

from __future__ import annotations

import csv
import hashlib
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from tinyld.config import check_choice
from tinyld.errors import TinyldError, plain, show
from tinyld.formats import CONVERTERS, Row, cut
from tinyld.read import clean, opened, read_object
from tinyld.write import locked, make_folder, replacing, to_json, write_atomic

TIMEOUT = 30.0  # seconds without a byte
TOTAL = 3600.0  # seconds of one download
HOSTS = (  # that a download may lead to
    "ai.stanford.edu", "cogcomp.seas.upenn.edu", "dl.fbaipublicfiles.com", "raw.githubusercontent.com",
    "www.cs.cornell.edu",
)  # fmt: skip
MAX_BYTES = 2 << 30  # of a download


class NetworkError(TinyldError):
    """The file could not be had: no network, no such host, an HTTP error, a broken transfer."""


@dataclass(frozen=True)
class RemoteFile:
    url: str
    sha256: str | None = None  # None: recorded at the first download and checked from then on


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


# ---------------------------------------------------------------------------------------------- fetching


def fetch(url: str, target: Path, sha256: str | None = None, description: str = "") -> Path:
    """`target`, holding what `url` gives, with a bar on stderr. Nothing is left at `target` when a check fails.

    The digest must be `sha256`; where that is None, the one recorded in the cache's `checksums.json` at the first
    download. `$TINYLD_MIRROR` replaces the scheme and host of every URL. Raises NetworkError, or TinyldError for a
    wrong digest.
    """
    known = sha256 or _checksums().get(url)
    make_folder(target.parent)
    with replacing(target) as out:
        digest = _transfer(url, out, description or target.name)
        if known is not None and digest != known:
            way_out = "try again later" if sha256 else f"if the new file is right, delete {_checksums_path()}"
            raise TinyldError(f"{url}: checksum is {digest}, expected {known}; the file changed or broke, {way_out}")
    if known is None:
        _record({url: digest})
    return target


def _transfer(url: str, out: BinaryIO, description: str) -> str:
    """The SHA-256 of what was copied from `url` to `out`."""
    import http.client
    from urllib.error import HTTPError

    from tinyld.progress import Progress

    if mirror := os.environ.get("TINYLD_MIRROR"):
        url = mirror.rstrip("/") + urlsplit(url).path
    if urlsplit(url).scheme not in ("http", "https"):
        raise TinyldError(f"cannot download {show(url)}: only http and https are supported")
    print(f"downloading {description} from {plain(url)}", file=sys.stderr, flush=True)
    failures = (OSError, http.client.HTTPException, ValueError)
    deadline = time.monotonic() + TOTAL
    digest, done = hashlib.sha256(), 0
    try:
        response = _open(url)
    except HTTPError as error:
        error.close()
        raise NetworkError(f"could not download {url}: HTTP {error.code} {error.reason}") from None
    except failures as error:
        raise NetworkError(f"could not download {url}: {getattr(error, 'reason', error)}") from None
    with response:
        size = int(response.headers.get("Content-Length") or 0)
        with Progress(description, total=max(size, 1), quiet=size == 0) as bar:
            while True:
                try:
                    block = response.read1(1 << 18)
                except failures as error:
                    raise NetworkError(f"could not download {url}: {error!r} after {done:,} bytes") from None
                if not block:
                    break
                done += len(block)
                if done > MAX_BYTES:
                    raise NetworkError(f"could not download {url}: it is larger than {MAX_BYTES:,} bytes")
                if time.monotonic() > deadline:
                    raise NetworkError(f"could not download {url}: {done:,} bytes took longer than {TOTAL:,.0f} s")
                out.write(block)
                digest.update(block)
                bar.advance_to(done, rate=f"{done / 1e6:.1f} MB")
    if done < size:
        raise NetworkError(f"could not download {url}: it broke off after {done:,} of {size:,} bytes")
    return digest.hexdigest()


def _open(url: str) -> Any:
    """The response; a redirect may only lead to https on a host that the tasks name, or stay where it was."""
    from urllib.request import HTTPRedirectHandler, Request, build_opener

    asked = urlsplit(url)

    class Redirect(HTTPRedirectHandler):
        def redirect_request(self, request: Any, response: Any, *details: Any) -> Request | None:
            target = urlsplit(details[-1])
            listed = target.scheme == "https" and target.hostname in HOSTS
            if not listed and (target.scheme, target.netloc) != (asked.scheme, asked.netloc):
                response.close()
                raise NetworkError(f"could not download {url}: it leads to {show(details[-1])}, which is not listed")
            return super().redirect_request(request, response, *details)

    return build_opener(Redirect).open(Request(url, headers={"User-Agent": "tinyld"}), timeout=TIMEOUT)


def _checksums_path() -> Path:
    return cache_dir() / "checksums.json"


def _checksums() -> dict[str, str]:
    """URL, or path below the cache, -> SHA-256 of what was first had from there or written there."""
    path = _checksums_path()
    if not path.exists():
        return {}
    try:
        known = read_object(path)
        if not all(isinstance(digest, str) for digest in known.values()):
            raise TinyldError(f"{path}: expected checksums")
    except TinyldError as error:
        raise TinyldError(f"{error}; delete it to start anew") from None
    return dict(known)


def _record(digests: dict[str, str | None]) -> None:
    """Adds `digests` to the known ones; None forgets a key. One process at a time."""
    make_folder(cache_dir())
    with locked(cache_dir(), wait=True):
        known = {key: digest for key, digest in {**_checksums(), **digests}.items() if digest is not None}
        write_atomic(_checksums_path(), to_json(dict(sorted(known.items()))))


def download_task(name: str, source: Source) -> Path:
    """The folder of the cache that now holds the task's splits. Files already there stay as they are.

    Raises NetworkError where a file cannot be had, and TinyldError where the rows are not those that `label_counts`
    promises; nothing is left behind then.
    """
    folder = cache_dir() / "data" / name
    known = _checksums()
    try:
        splits = _download_rows(name, source)
    except TinyldError:
        unproven = {remote.url: None for remote in source.files if remote.url not in known}
        if unproven.keys() & _checksums().keys():
            _record(unproven)
        raise
    make_folder(folder)
    for split, rows in cut(splits).items():
        path = folder / f"{split}.tsv"
        if not path.exists():
            data = "".join(["sentence\tlabel\n", *(f"{clean(text)}\t{label}\n" for text, label in rows)]).encode()
            _record({f"data/{name}/{split}.tsv": hashlib.sha256(data).hexdigest()})  # first: no file is ever unlisted
            write_atomic(path, data)
    return folder


def _download_rows(name: str, source: Source) -> dict[str, list[Row]]:
    """The rows of each official split, counted."""
    url = source.files[0].url
    make_folder(cache_dir() / "downloads")
    with tempfile.TemporaryDirectory(dir=cache_dir() / "downloads") as downloads:
        paths = []
        for i, remote in enumerate(source.files):
            part = f" ({i + 1}/{len(source.files)})" if len(source.files) > 1 else ""
            target = Path(downloads) / f"{i}-{Path(urlsplit(remote.url).path).name}"
            paths.append(fetch(remote.url, target, remote.sha256, f"{name}{part}"))
        try:
            splits = CONVERTERS[source.format](paths)
        except (ValueError, IndexError, KeyError, csv.Error) as error:
            raise TinyldError(f"{url}: not the format that {name} is published in ({show(error)})") from None
    for split, expected in source.label_counts.items():
        found = Counter(label for _, label in splits.get(split, ()))
        if found != Counter(expected):
            got, wanted = (f"{sum(c.values()):,} rows ({_counts(c)})" for c in (found, expected))
            raise TinyldError(f"{url}: {name} {split} has {got}, expected {wanted}; nothing was kept")
    return splits


def check_cached(path: Path, counts: dict[str, int] | None = None) -> None:
    """Raises TinyldError when a file of the cache is no longer what `download_task` wrote.

    One that it did not write, which a user put there, must have as many rows of each label as are published.
    """
    known = _checksums().get(path.relative_to(cache_dir()).as_posix())
    with opened(path) as file:
        if known is not None and hashlib.file_digest(file, "sha256").hexdigest() != known:
            raise TinyldError(f"{path}: changed or cut off since it was downloaded; delete it to download it again")
        if known is None and counts:
            found = Counter(line.rstrip().rpartition(b"\t")[2] for line in file.read().splitlines()[1:])
            if sorted(found.values()) != sorted(counts.values()):
                raise TinyldError(
                    f"{path}: has {found.total():,} rows, which are not the {sum(counts.values()):,} published ones; "
                    "delete it to download them, or keep rows of your own in another folder and say --data DIR"
                )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{label} {n:,}" for label, n in sorted(counts.items())[:10]) or "none"

"""Official data sets: fetch, check, convert, and keep as `sentence<TAB>label` files in the user cache.

A set without a dev split gets one from its train split, and a set published as one pool gets dev and test: by the
SHA-1 of the sentence's letters and digits, a tenth each, so repeats stay together and the cut never moves.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from urllib.parse import urlsplit

from tinyld.errors import TinyldError, plain
from tinyld.read import PAIR, clean
from tinyld.write import make_folder, write_atomic

TIMEOUT = 30.0  # seconds without a byte
Row = tuple[str, str]  # sentence, label name


class NetworkError(TinyldError):
    """The file could not be had: no network, no such host, an HTTP error, a broken transfer."""


@dataclass(frozen=True)
class Source:
    """Where a task's official data is. What its files hold needs no check beside their digests."""

    format: str  # a key of FORMATS
    files: dict[str, str]  # URL -> SHA-256, or MD5 where no other digest is published
    rows: dict[str, int]  # of each official split, before dev (and test) are cut from a set that has none


def cache_dir() -> Path:
    """`$TINYLD_CACHE`, else `$XDG_CACHE_HOME/tinyld`, else `~/.cache/tinyld`; it need not exist."""
    if own := os.environ.get("TINYLD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "tinyld"


def download_task(name: str, source: Source) -> Path:
    """The folder of the cache that now holds the task's splits. Files already there stay as they are.

    NetworkError where a file cannot be had, TinyldError where it is another one; nothing is left behind then.
    """
    urls = enumerate(source.files.items(), 1)
    files = {url: fetch(url, digest, f"{name} ({i}/{len(source.files)})") for i, (url, digest) in urls}
    folder = cache_dir() / "data" / name
    make_folder(folder)
    for split, rows in convert(source.format, files).items():
        if not (folder / f"{split}.tsv").exists():
            lines = ["sentence\tlabel\n", *(f"{clean(text)}\t{label}\n" for text, label in rows)]
            write_atomic(folder / f"{split}.tsv", "".join(lines).encode())
    return folder


def fetch(url: str, digest: str, description: str) -> bytes:
    """What the URL gives, with a bar on stderr. NetworkError, or TinyldError for another digest (SHA-256 or MD5).

    `$TINYLD_MIRROR` replaces the scheme and host of every URL.
    """
    import http.client
    from urllib.request import Request, urlopen

    from tinyld.progress import Progress

    content = bytearray()
    if mirror := os.environ.get("TINYLD_MIRROR"):
        url = mirror.rstrip("/") + urlsplit(url).path
    print(f"downloading {description} from {plain(url)}", file=sys.stderr, flush=True)
    try:
        with urlopen(Request(url, headers={"User-Agent": "tinyld"}), timeout=TIMEOUT) as response:
            size = int(response.headers.get("Content-Length") or 0)
            with Progress(description, total=max(size, 1), quiet=size == 0) as bar:
                while block := response.read1(1 << 18):
                    content += block
                    bar.advance_to(len(content), rate=f"{len(content) / 1e6:.1f} MB")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NetworkError(f"could not download {url}: {getattr(error, 'reason', None) or error}") from None
    kind = "md5" if len(digest) == 32 else "sha256"
    found = hashlib.new(kind, content, usedforsecurity=False).hexdigest()
    if found != digest:
        raise TinyldError(f"{url}: checksum of {len(content):,} bytes is {found}, expected {digest}; try again later")
    return bytes(content)


# ---------------------------------------------------------------------------------------------- official formats


def _lines(text: str) -> list[str]:
    headers = ("sentence\tlabel", "index\tsentence1", "Quality\t")
    return [line for line in text.split("\n") if line and not line.startswith(headers)]


def _whole(text: str) -> Iterable[list[str]]:
    return [[line] for line in _lines(text)]


def _tabs(text: str) -> Iterable[list[str]]:
    return [line.split("\t") for line in _lines(text)]


def _question(text: str) -> Iterable[list[str]]:
    """Of lines like `DESC:manner How did ...`; the coarse type is the label."""
    return [re.split(r":\S* ", line, maxsplit=1) for line in _lines(text)]


def _commas(text: str) -> Iterable[list[str]]:
    return csv.reader(StringIO(text, newline=""))


def _review(text: str) -> Iterable[list[str]]:
    return [[re.sub(r"<br\s*/?>", " ", text)]]


# Format -> its files, and what their names say (those outside of an archive are named by their order); the cells of a
# text's rows; which of them are the sentence, or two; which is the label, -1: the file's; what labels are called here.
TONE = {"neg": "negative", "pos": "positive"}
FORMATS: dict[str, tuple[str, Callable[[str], Iterable[list[str]]], tuple[int, ...], int, dict[str, str]]] = {
    "glue-sst2": (r"SST-2/(?P<split>train|dev)\.tsv", _tabs, (0,), 1, {"0": "negative", "1": "positive"}),
    "glue-cola": (r"CoLA/(?P<split>train|dev)\.tsv", _tabs, (3,), 1, {"0": "unacceptable", "1": "acceptable"}),
    "glue-rte": (r"RTE/(?P<split>train|dev)\.tsv", _tabs, (1, 2), 3, {}),
    "mrpc": ("(?P<split>train|test)", _tabs, (3, 4), 0, {"0": "not_equivalent", "1": "equivalent"}),
    "trec": ("(?P<split>train|test)", _question, (1,), 0, {}),
    "ag-news": ("(?P<split>train|test)", _commas, (2,), 0,
                {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"}),
    "subj": (r".*(?P<label>plot|quote)\.tok\.gt9\.5000", _whole, (0,), -1,
             {"plot": "objective", "quote": "subjective"}),
    "mr": (r".*rt-polarity\.(?P<label>neg|pos)", _whole, (0,), -1, TONE),
    "imdb": (r"aclImdb/(?P<split>train|test)/(?P<label>neg|pos)/\d+_\d+\.txt", _review, (0,), -1, TONE),
}  # fmt: skip


def members(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Name -> content of the files in archives, and of those that are none; nothing goes to the disk."""
    import tarfile
    import zipfile

    found: dict[str, bytes] = {}
    for (url, content), name in zip(files.items(), ("train", "test", "dev"), strict=False):
        if url.endswith(".zip"):
            with zipfile.ZipFile(BytesIO(content)) as pack:
                found |= {inside: pack.read(inside) for inside in pack.namelist()}
        elif url.endswith(".tar.gz"):
            with tarfile.open(fileobj=BytesIO(content)) as pack:
                found |= {info.name.removeprefix("./"): pack.extractfile(info).read() for info in pack if info.isfile()}
        else:
            found[name] = content
    return found


def as_text(content: bytes) -> str:
    """UTF-8, or what Windows makes of Latin-1."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    return text.replace("\r\n", "\n")


def convert(source_format: str, files: Mapping[str, bytes]) -> dict[str, list[Row]]:
    """Rows of the train, dev and test splits of a data set, whichever of them are published, of its files by URL."""
    pattern, cells_of, sentence, label_cell, names = FORMATS[source_format]
    contents = members(files)
    splits: dict[str, list[Row]] = defaultdict(list)
    dev_ids = set(_lines(as_text(contents.pop("dev", b""))))  # MRPC: which rows of train are dev rows, by two cells
    for name, content in sorted(contents.items()):
        if found := re.fullmatch(pattern, name):
            own = found.groupdict()
            for cells in cells_of(as_text(content)):
                split = "dev" if "\t".join(cells[1:3]) in dev_ids else own.get("split", "all")
                label = own["label"] if label_cell < 0 else cells[label_cell]
                splits[split].append((PAIR.join(cells[i] for i in sentence), names.get(label, label)))
    if label_cell < 0:  # published label by label: any first few rows are to hold all labels
        splits = {split: sorted(rows, key=lambda row: number_of(row[0])) for split, rows in splits.items()}
    if "dev" in splits:
        return splits
    parts: dict[str, list[Row]] = {"train": [], "dev": [], "test": splits.get("test", [])}
    places = {0: "dev", 1: "test"} if "all" in splits else {0: "dev"}
    for row in splits["all" if "all" in splits else "train"]:
        parts[places.get(number_of(row[0]) % 10, "train")].append(row)
    return parts


def number_of(sentence: str) -> int:
    """From the SHA-1 of the sentence's letters and digits."""
    key = "".join(c for c in sentence.lower() if c.isalnum())
    return int(hashlib.sha1(key.encode(), usedforsecurity=False).hexdigest(), 16)

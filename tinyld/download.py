"""Official data sets: fetch, check, convert, and keep as `sentence<TAB>label` files in the user cache.

A set without a dev split gets one from its train split, and a set published as one pool gets dev and test: by the
SHA-1 of the sentence's letters and digits, a tenth each, so repeats stay together and the cut never moves.
"""

import hashlib
import os
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

from tinyld.errors import TinyldError, plain
from tinyld.progress import Progress
from tinyld.read import PAIR, clean
from tinyld.write import make_folder, write_atomic

TIMEOUT = 30.0  # seconds without a byte
Row = tuple[str, str]  # sentence, label name


@dataclass(frozen=True)
class Source:
    """Where a task's official data is, and in what form. What its files hold needs no check beside their digests."""

    files: dict[str, str]  # URL -> SHA-256, or MD5 where no other digest is published
    rows: dict[str, int]  # of each official split, before dev (and test) are cut from a set that has none
    # Patterns of the names of files with rows, in the archive or train, test, dev for the URLs in their order, and of a
    # row (a header is none). They have between them the groups label, text and maybe split, second (text) and id.
    member: str
    row: str = "(?P<text>.+)"
    quoted: bool = False  # whether quotes in a text are doubled, as in a CSV
    names: dict[str, str] = field(default_factory=dict)  # published label -> ours, where they differ


def cache_dir() -> Path:
    """`$TINYLD_CACHE`, else `$XDG_CACHE_HOME/tinyld`, else `~/.cache/tinyld`; it need not exist."""
    if own := os.environ.get("TINYLD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "tinyld"


def download_task(name: str, source: Source) -> Path:
    """The folder of the cache that now holds the task's splits. Files already there stay as they are."""
    urls = enumerate(source.files.items(), 1)
    files = {url: fetch(url, digest, f"{name} ({i}/{len(source.files)})") for i, (url, digest) in urls}
    folder = cache_dir() / "data" / name
    make_folder(folder)
    for split, rows in convert(source, files).items():
        if not (folder / f"{split}.tsv").exists():
            lines = ["sentence\tlabel\n", *(f"{clean(text)}\t{label}\n" for text, label in rows)]
            write_atomic(folder / f"{split}.tsv", "".join(lines).encode())
    return folder


def fetch(url: str, digest: str, description: str) -> bytes:
    """What the URL gives, with a bar on stderr. TinyldError where that fails or has another digest (SHA-256 or MD5).
    `$TINYLD_MIRROR` replaces the scheme and host of every URL."""
    import http.client
    from urllib.request import Request, urlopen

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
                    bar.advance_to(len(content), f"{len(content) / 1e6:.1f} MB")
            if len(content) < size:
                raise OSError(f"it ended after {len(content):,} of {size:,} bytes")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise TinyldError(f"could not download {url}: {getattr(error, 'reason', None) or error}") from None
    kind = "md5" if len(digest) == 32 else "sha256"
    found = hashlib.new(kind, content, usedforsecurity=False).hexdigest()
    if found != digest:
        raise TinyldError(f"{url}: checksum of {len(content):,} bytes is {found}, expected {digest}; try again later")
    return bytes(content)


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
    """UTF-8, or what Windows makes of Latin-1; without tags of line ends."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    return re.sub(r"<br\s*/?>", " ", text.replace("\r\n", "\n"))


def convert(source: Source, files: Mapping[str, bytes]) -> dict[str, list[Row]]:
    """Rows of the train, dev and test splits of a data set, whichever of them are published, of its files by URL."""
    contents = members(files)
    dev_ids = as_text(contents.pop("dev", b"")).split("\n")  # MRPC: of train's rows
    splits: dict[str, list[Row]] = defaultdict(list)
    for name, content in sorted(contents.items()):
        file = re.fullmatch(source.member, name)
        for row in re.finditer(source.row, as_text(content), re.M) if file else ():
            said = file.groupdict() | row.groupdict()
            split = "dev" if said.get("id") in dev_ids else said.get("split", "all")
            text = PAIR.join(said[part] for part in ("text", "second") if part in said)
            text = text.replace('""', '"') if source.quoted else text
            splits[split].append((text, source.names.get(said["label"], said["label"])))
    if "(?P<label>" in source.member:  # published label by label: any first few rows are to hold all labels
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

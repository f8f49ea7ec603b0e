"""The formats that official data sets are published in -> rows of (sentence, label), and the cut into splits.

A set without a dev split gets one from its train split, and a set published as one pool gets dev and test: by the
SHA-1 of the sentence's letters and digits, a tenth each, so repeats stay together and the cut never moves.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path

from tinyld.errors import TinyldError, show

MAX_BYTES = 2 << 30  # that an archive unpacks to

Row = tuple[str, str]  # sentence, label name


# ---------------------------------------------------------------------------------------------- archives


def read_members(archive: Path, pattern: str) -> dict[str, bytes]:
    """Name -> content of the regular files in a zip or tar whose whole name matches `pattern`; nothing is unpacked.

    Raises TinyldError for a broken archive, for one with a name that leaves its folder, for one that unpacks to more
    than MAX_BYTES, and when nothing matches.
    """
    import tarfile
    import zipfile
    import zlib

    found: dict[str, bytes] = {}
    left = MAX_BYTES

    def take(name: str, size: int, open_member: Callable[[], io.BufferedIOBase | None]) -> None:
        nonlocal left
        name = name.removeprefix("./")
        if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
            raise TinyldError(f"{archive.name}: refused, its path {show(name)} leaves the folder")
        left -= size
        if left < 0:
            raise TinyldError(f"{archive.name}: refused, it unpacks to more than {MAX_BYTES:,} bytes")
        if re.fullmatch(pattern, name):
            with open_member() as member:
                found[name] = member.read(size)

    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as pack:
                for info in pack.infolist():
                    take(info.filename, info.file_size, lambda info=info: pack.open(info))
        else:
            with tarfile.open(archive, "r:*") as pack:
                for info in pack:
                    if info.isfile():
                        take(info.name, info.size, lambda info=info: pack.extractfile(info))
                    else:
                        take(info.name + "/", 0, lambda: io.BytesIO())
    except (OSError, zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError) as error:
        raise TinyldError(f"{archive.name}: not a readable archive: {error}") from None
    if not found:
        raise TinyldError(f"{archive.name}: the archive holds no member {show(pattern)}")
    return found


# ---------------------------------------------------------------------------------------------- converters

PAIR = " ||| "  # joins the two sentences of a pair in our files


def _lines(data: bytes, encoding: str = "utf-8-sig") -> list[str]:
    """Lines without their ends. Latin-1 files hold Windows-1252 characters too; those are repaired."""
    text = data.decode(encoding, errors="replace")
    if encoding == "latin-1":
        text = re.sub(r"[\x80-\x9f]", lambda m: m[0].encode("latin-1").decode("cp1252", errors="replace"), text)
    return [line for line in text.replace("\r\n", "\n").split("\n") if line]


def _glue(
    member: str, row: Callable[[list[str]], Row | None], header: bool = True
) -> Callable[[list[Path]], dict[str, list[Row]]]:
    def convert(paths: list[Path]) -> dict[str, list[Row]]:
        files = read_members(paths[0], rf"{re.escape(member)}/(train|dev)\.tsv")
        return {
            Path(name).stem: [row(line.split("\t")) for line in _lines(data)[header:]] for name, data in files.items()
        }

    return convert


def _mrpc(paths: list[Path]) -> dict[str, list[Row]]:
    """GLUE's split of MSR's train file: its dev rows are those whose two ids stand in the third file."""
    train, test, dev_ids = (_lines(path.read_bytes()) for path in paths)
    in_dev = {tuple(line.split("\t")) for line in dev_ids}
    splits: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    for name, lines in (("train", train), ("test", test)):
        for line in lines[1:]:
            quality, id1, id2, first, second = line.split("\t")
            split = "dev" if name == "train" and (id1, id2) in in_dev else name
            splits[split].append((first + PAIR + second, ("not_equivalent", "equivalent")[int(quality)]))
    return splits


def _trec(paths: list[Path]) -> dict[str, list[Row]]:
    """Lines like `DESC:manner How did ...`; the coarse type is the label."""
    splits = {}
    for name, path in zip(("train", "test"), paths, strict=True):
        parts = [line.split(" ", 1) for line in _lines(path.read_bytes(), "latin-1")]
        splits[name] = [(sentence, kind.split(":")[0]) for kind, sentence in parts]
    return splits


def _line_files(members: dict[str, str]) -> Callable[[list[Path]], dict[str, list[Row]]]:
    """One pool from one file per label in an archive, a sentence a line."""

    def convert(paths: list[Path]) -> dict[str, list[Row]]:
        pool: list[Row] = []
        for member, label in members.items():
            (data,) = read_members(paths[0], rf"(.*/)?{re.escape(member)}").values()
            pool += [(line, label) for line in _lines(data, "latin-1")]
        return {"all": pool}

    return convert


def _ag_news(paths: list[Path]) -> dict[str, list[Row]]:
    """Rows of class 1-4, title, description; the description alone is the sentence."""
    labels = ("World", "Sports", "Business", "Sci/Tech")
    splits = {}
    for name, path in zip(("train", "test"), paths, strict=True):
        reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
        splits[name] = [(text, labels[int(kind) - 1]) for kind, _, text in reader]
    return splits


def _imdb(paths: list[Path]) -> dict[str, list[Row]]:
    splits: dict[str, list[Row]] = {"train": [], "test": []}
    files = read_members(paths[0], r"aclImdb/(train|test)/(neg|pos)/\d+_\d+\.txt")
    for name in sorted(files):
        _, split, kind, _ = name.split("/")
        text = re.sub(r"<br\s*/?>", " ", files[name].decode("utf-8", errors="replace"))
        splits[split].append((text, {"neg": "negative", "pos": "positive"}[kind]))
    return splits


CONVERTERS: dict[str, Callable[[list[Path]], dict[str, list[Row]]]] = {
    "glue-sst2": _glue("SST-2", lambda row: (row[0], ("negative", "positive")[int(row[1])])),
    "glue-cola": _glue("CoLA", lambda row: (row[3], ("unacceptable", "acceptable")[int(row[1])]), header=False),
    "glue-rte": _glue("RTE", lambda row: (row[1] + PAIR + row[2], row[3])),
    "mrpc": _mrpc,
    "trec": _trec,
    "subj": _line_files({"plot.tok.gt9.5000": "objective", "quote.tok.gt9.5000": "subjective"}),
    "mr": _line_files({"rt-polarity.neg": "negative", "rt-polarity.pos": "positive"}),
    "ag-news": _ag_news,
    "imdb": _imdb,
}


def tenth(sentence: str) -> int:
    """0 to 9, from the SHA-1 of the sentence's letters and digits: 0 is dev's, 1 is test's where both are cut."""
    key = "".join(c for c in sentence.lower() if c.isalnum())
    return int(hashlib.sha1(key.encode(), usedforsecurity=False).hexdigest(), 16) % 10


def cut(splits: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """`splits` with train and dev (and test, for the one pool `all`)."""
    if "all" in splits:
        parts: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
        for row in splits["all"]:
            parts[{0: "dev", 1: "test"}.get(tenth(row[0]), "train")].append(row)
        return parts
    if "dev" in splits:
        return splits
    train, dev = [], []
    for row in splits["train"]:
        (dev if tenth(row[0]) == 0 else train).append(row)
    return {**splits, "train": train, "dev": dev}

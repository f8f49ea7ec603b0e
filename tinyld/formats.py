"""The formats that official data sets are published in -> rows of (sentence, label), and the cut into splits.

A set without a dev split gets one from its train split, and a set published as one pool gets dev and test: by the
SHA-1 of the sentence's letters and digits, a tenth each, so repeats stay together and the cut never moves.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable
from io import BytesIO, StringIO
from typing import Any

PAIR = " ||| "  # joins the two sentences of a pair in our files

Row = tuple[str, str]  # sentence, label name
Splits = dict[str, list[Row]]
Converter = Callable[[list[BytesIO]], Splits]


def read_members(archive: BytesIO, pattern: str) -> dict[str, bytes]:
    """Name -> content of the files in a zip or tar whose whole name matches `pattern`; nothing goes to the disk."""
    import tarfile
    import zipfile

    is_zip = zipfile.is_zipfile(archive)
    archive.seek(0)
    pack: Any = zipfile.ZipFile(archive) if is_zip else tarfile.open(fileobj=archive)
    infos = {i.filename: i for i in pack.infolist()} if is_zip else {i.name.removeprefix("./"): i for i in pack}
    opened = pack.open if is_zip else pack.extractfile
    return {name: opened(info).read() for name, info in infos.items() if re.fullmatch(pattern, name)}


def _lines(data: bytes, encoding: str = "utf-8-sig") -> list[str]:
    """Lines without their ends. Latin-1 files hold Windows-1252 characters too; those are repaired."""
    text = data.decode(encoding, errors="replace")
    if encoding == "latin-1":
        text = re.sub(r"[\x80-\x9f]", lambda m: m[0].encode("latin-1").decode("cp1252", errors="replace"), text)
    return [line for line in text.replace("\r\n", "\n").split("\n") if line]


def _glue(folder: str, row: Callable[[list[str]], Row], header: bool = True) -> Converter:
    def convert(files: list[BytesIO]) -> Splits:
        found = read_members(files[0], rf"{folder}/(train|dev)\.tsv")
        return {split: [row(line.split("\t")) for line in _lines(found[f"{folder}/{split}.tsv"])[header:]]
                for split in ("train", "dev")}  # fmt: skip

    return convert


def _mrpc(files: list[BytesIO]) -> Splits:
    """GLUE's split of MSR's train file: its dev rows are those whose two ids stand in the third file."""
    train, test, dev_ids = (_lines(file.read()) for file in files)
    in_dev = {tuple(line.split("\t")) for line in dev_ids}
    splits: Splits = {"train": [], "dev": [], "test": []}
    for name, lines in (("train", train), ("test", test)):
        for line in lines[1:]:
            quality, id1, id2, first, second = line.split("\t")
            split = "dev" if name == "train" and (id1, id2) in in_dev else name
            splits[split].append((first + PAIR + second, ("not_equivalent", "equivalent")[int(quality)]))
    return splits


def _trec(files: list[BytesIO]) -> Splits:
    """Lines like `DESC:manner How did ...`; the coarse type is the label."""
    parts = [[line.split(" ", 1) for line in _lines(file.read(), "latin-1")] for file in files]
    return {
        split: [(text, kind.split(":")[0]) for kind, text in of]
        for split, of in zip(("train", "test"), parts, strict=True)
    }


def _line_files(members: dict[str, str]) -> Converter:
    """One pool from one file per label in an archive, a sentence a line."""

    def convert(files: list[BytesIO]) -> Splits:
        pool: list[Row] = []
        for member, label in members.items():
            (data,) = read_members(files[0], rf"(.*/)?{re.escape(member)}").values()
            pool += [(line, label) for line in _lines(data, "latin-1")]
        return {"all": pool}

    return convert


def _ag_news(files: list[BytesIO]) -> Splits:
    """Rows of class 1-4, title, description; the description alone is the sentence."""
    labels = ("World", "Sports", "Business", "Sci/Tech")
    readers = [csv.reader(StringIO(file.read().decode(), newline="")) for file in files]
    return {
        split: [(text, labels[int(kind) - 1]) for kind, _, text in of]
        for split, of in zip(("train", "test"), readers, strict=True)
    }


def _imdb(files: list[BytesIO]) -> Splits:
    splits: Splits = {"train": [], "test": []}
    for name, data in sorted(read_members(files[0], r"aclImdb/(train|test)/(neg|pos)/\d+_\d+\.txt").items()):
        _, split, kind, _ = name.split("/")
        text = re.sub(r"<br\s*/?>", " ", data.decode("utf-8", errors="replace"))
        splits[split].append((text, {"neg": "negative", "pos": "positive"}[kind]))
    return splits


CONVERTERS: dict[str, Converter] = {
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


def cut(splits: Splits) -> Splits:
    """`splits` with train, dev and test, whichever of them are published."""
    if "dev" in splits:
        return splits
    parts: Splits = {"train": [], "dev": [], "test": list(splits.get("test", ()))}
    places = {0: "dev", 1: "test"} if "all" in splits else {0: "dev"}
    for row in splits["all" if "all" in splits else "train"]:
        parts[places.get(tenth(row[0]), "train")].append(row)
    return parts

"""The formats that official data sets are published in -> rows of (sentence, label), and the cut into splits.

A set without a dev split gets one from its train split, and a set published as one pool gets dev and test: by the
SHA-1 of the sentence's letters and digits, a tenth each, so repeats stay together and the cut never moves.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable
from functools import partial
from io import BytesIO, StringIO
from typing import Any

PAIR = " ||| "  # joins the two sentences of a pair in our files

Row = tuple[str, str]  # sentence, label name
Splits = dict[str, list[Row]]


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


def _glue(folder: str, row: Callable[[list[str]], Row], files: list[BytesIO], header: bool = True) -> Splits:
    found = read_members(files[0], rf"{folder}/(train|dev)\.tsv")
    lines = {split: _lines(found[f"{folder}/{split}.tsv"])[header:] for split in ("train", "dev")}
    return {split: [row(line.split("\t")) for line in own] for split, own in lines.items()}


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


def _line_files(members: dict[str, str], files: list[BytesIO]) -> Splits:
    """One pool from one file per label in an archive, a sentence a line."""
    pool: list[Row] = []
    for member, label in members.items():
        (data,) = read_members(files[0], rf"(.*/)?{re.escape(member)}").values()
        pool += [(line, label) for line in _lines(data, "latin-1")]
    return {"all": mixed(pool)}


def _train_test(rows: Callable[[bytes], list[Row]], files: list[BytesIO]) -> Splits:
    return {split: rows(file.read()) for split, file in zip(("train", "test"), files, strict=True)}


def _trec(data: bytes) -> list[Row]:
    """Lines like `DESC:manner How did ...`; the coarse type is the label."""
    parts = (line.split(" ", 1) for line in _lines(data, "latin-1"))
    return [(text, kind.split(":")[0]) for kind, text in parts]


def _ag_news(data: bytes) -> list[Row]:
    """Rows of class 1-4, title, description; the description alone is the sentence."""
    labels = ("World", "Sports", "Business", "Sci/Tech")
    return [(text, labels[int(kind) - 1]) for kind, _, text in csv.reader(StringIO(data.decode(), newline=""))]


def _imdb(files: list[BytesIO]) -> Splits:
    splits: Splits = {"train": [], "test": []}
    for name, data in sorted(read_members(files[0], r"aclImdb/(train|test)/(neg|pos)/\d+_\d+\.txt").items()):
        _, split, kind, _ = name.split("/")
        text = re.sub(r"<br\s*/?>", " ", data.decode("utf-8", errors="replace"))
        splits[split].append((text, {"neg": "negative", "pos": "positive"}[kind]))
    return {split: mixed(rows) for split, rows in splits.items()}


CONVERTERS: dict[str, Callable[[list[BytesIO]], Splits]] = {
    "glue-sst2": partial(_glue, "SST-2", lambda row: (row[0], ("negative", "positive")[int(row[1])])),
    "glue-cola": partial(
        _glue, "CoLA", lambda row: (row[3], ("unacceptable", "acceptable")[int(row[1])]), header=False
    ),
    "glue-rte": partial(_glue, "RTE", lambda row: (row[1] + PAIR + row[2], row[3])),
    "mrpc": _mrpc,
    "trec": partial(_train_test, _trec),
    "subj": partial(_line_files, {"plot.tok.gt9.5000": "objective", "quote.tok.gt9.5000": "subjective"}),
    "mr": partial(_line_files, {"rt-polarity.neg": "negative", "rt-polarity.pos": "positive"}),
    "ag-news": partial(_train_test, _ag_news),
    "imdb": _imdb,
}


def number_of(sentence: str) -> int:
    """From the SHA-1 of the sentence's letters and digits."""
    key = "".join(c for c in sentence.lower() if c.isalnum())
    return int(hashlib.sha1(key.encode(), usedforsecurity=False).hexdigest(), 16)


def tenth(sentence: str) -> int:
    """0 to 9: 0 is dev's, 1 is test's where both are cut."""
    return number_of(sentence) % 10


def mixed(rows: list[Row]) -> list[Row]:
    """Rows that are published label by label, in an order in which any first few hold all labels."""
    return sorted(rows, key=lambda row: number_of(row[0]))


def cut(splits: Splits) -> Splits:
    """`splits` with train, dev and test, whichever of them are published."""
    if "dev" in splits:
        return splits
    parts: Splits = {"train": [], "dev": [], "test": list(splits.get("test", ()))}
    places = {0: "dev", 1: "test"} if "all" in splits else {0: "dev"}
    for row in splits["all" if "all" in splits else "train"]:
        parts[places.get(tenth(row[0]), "train")].append(row)
    return parts

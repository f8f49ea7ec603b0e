"""The one reader of whatever comes from outside: regular files of a sane size, as text, rows, JSON, TOML or tensors.

What is off is one TinyldError that names the file and what is wrong in it. torch is imported only for tensors.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import stat
import tomllib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from tinyld.config import check, check_type
from tinyld.errors import TinyldError, failing, show

if TYPE_CHECKING:
    from torch import Tensor

# The largest file of each kind, far above any that is meant: all but text is read whole.
SETTINGS_BYTES = 256 << 20  # JSON and TOML; a tokenizer of 250,000 pieces has 20 MB
ROWS_BYTES = 8 << 30
TENSORS_BYTES = 64 << 30
TEXT_BYTES = 1 << 40
LONGEST = 1 << 24  # characters or bytes of a line of text
PAIR = " ||| "  # between texts in one cell

TABLES = {".tsv": "\t", ".csv": ","}  # and what is usually between their cells
SUFFIXES = (*TABLES, ".jsonl")
Row = tuple[str, dict[str, Any]]  # file and line, column -> value
QUOTED = re.compile('(?s)""|"(?=.*"")(?:[^"]|"")+"')  # a cell with quotes or with nothing in it, as CSV has one
OPENED, CLOSED = re.compile('"(?!.*"$)'), re.compile('(?!").*"')  # what a cell of several lines begins and ends with
HEAD = re.compile(r'\s*((?:"(?:[^"]|"")*"(?=[,;\t\r\n]|$)|[^\r\n])*)')  # columns' names; one in quotes may have lines


@contextmanager
def opened(path: Path, limit: int = TEXT_BYTES) -> Iterator[IO[bytes]]:
    """A regular file (or what a link to one names) of at most `limit` bytes, open for reading; no pipe, device or
    folder is opened at all."""
    with failing(path, "read"):
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise TinyldError(f"{path}: not a file but a {'folder' if stat.S_ISDIR(found.st_mode) else 'device'}")
        if found.st_size > limit:
            raise TinyldError(f"{path}: {found.st_size:,} bytes are more than the {limit:,} that such a file may have")
        with open(path, "rb") as file:
            yield file


def read_bytes(path: Path, limit: int = SETTINGS_BYTES) -> bytes:
    with opened(path, limit) as file:
        return file.read()


def read_text(path: Path, limit: int = SETTINGS_BYTES) -> str:
    return decode(read_bytes(path, limit), path)


def decode(content: bytes, path: object, first: int = 1) -> str:
    """UTF-8 text, with or without a byte-order mark, or UTF-16 with one, as Excel's "Unicode Text"; `first` is the
    number of its first line, for the error."""
    problem = "a zero byte, which no text has"  # as of UTF-16 without its mark
    try:
        text = content.decode("utf-16" if content[:2] in (BOM_UTF16_LE, BOM_UTF16_BE) else "utf-8-sig")
        if "\0" not in text:
            return text
        line = first + text.count("\n", 0, text.index("\0"))
    except UnicodeDecodeError as error:
        line, problem = first + error.object.count(b"\n", 0, error.start), "not UTF-8"
    way_out = f"{'send' if path == 'stdin' else 'save'} it as UTF-8"
    way_out += " (Excel: CSV UTF-8)" * str(path).lower().endswith((".csv", ".tsv"))
    raise TinyldError(f"{path}: line {line}: {problem}; {way_out}")


def lines_of(file: IO[bytes], path: object, first: int = 1) -> Iterator[tuple[str, str]]:
    """(where, line) of each line of UTF-8 text that ends in LF, CRLF or CR; `first` is the number of the first one."""
    number = first
    for content in iter(partial(file.readline, LONGEST + 1), b""):
        if len(content) > LONGEST:
            raise TinyldError(f"{path}: line {number} is longer than {LONGEST >> 20} MB; is it text?")
        for line in decode(content, path, number).removesuffix("\n").removesuffix("\r").split("\r"):
            yield f"{path}: line {number}", line
            number += 1


def line_rows(path: Path, limit: int, empty: bool = False, hint: Any = dict) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each line of a .txt, .txt.gz or .jsonl file: an object of types as in `hint`, or the line as its
    `text`; of text blank lines too, if `empty`."""
    suffix = path.suffix.lower()
    way_out = "give an object a line (pandas: orient='records', lines=True)"
    with opened(path, limit) as file:
        for where, line in lines_of(gzip.GzipFile(fileobj=file) if suffix == ".gz" else file, path):
            is_object = suffix != ".jsonl" or line[:1] != "["
            check(is_object, f"{where}: a list is not of type dict: {way_out}", TinyldError)
            if line.strip() or (empty and suffix != ".jsonl"):
                yield where, parse_json(line, where, hint) if suffix == ".jsonl" else {"text": line}


def read_rows(path: Path, empty: bool = False) -> Iterator[Row]:
    """Each row of a TSV, CSV or JSONL file, or of a .txt file, whose lines are the column `text`; with `empty` also
    rows of a table that hold empty cells alone, and blank lines of text. TinyldError where there is none."""
    suffix = path.suffix.lower()
    if suffix not in (*SUFFIXES, ".txt"):
        raise TinyldError(f"{path}: the name must end in {', '.join(SUFFIXES)} or .txt")
    found = empty and suffix == ".txt"  # in which there may be nothing, as in an empty pipe
    for row in _table_rows(path, TABLES[suffix], empty) if suffix in TABLES else line_rows(path, ROWS_BYTES, empty):
        found = True
        yield row
    check(found, f"{path}: there are no rows in it", TinyldError)


def _table_rows(path: Path, separator: str, empty: bool) -> Iterator[Row]:
    text = read_text(path, ROWS_BYTES)
    head = re.match(HEAD, text[: 1 << 20])[1]
    csv.field_size_limit(2**31 - 1)  # the largest that a C long holds everywhere

    def cells(text: str, separator: str, is_plain: bool, **how: bool) -> Any:
        """A reader; in most TSV, which is plain, a quote is an ordinary character."""
        quoting, source = csv.QUOTE_NONE if is_plain else csv.QUOTE_MINIMAL, io.StringIO(text, newline="")
        return csv.reader(source, delimiter=separator, quoting=quoting, skipinitialspace=f"{separator} " in head, **how)

    def columns(separator: str) -> int:
        """By it, where the first rows have as many as the header."""
        widths = {len(v) for v in islice(cells(text[: 1 << 20], separator, separator == "\t"), 20) if any(v)}
        return widths.pop() if len(widths) == 1 else 0

    there = {own: columns(own) for own in (separator, *",;\t") if own in head}  # spreadsheets write ; in much of Europe
    separator = max(there, key=there.__getitem__, default=separator)
    either = " or by ".join(repr(own) for own, n in there.items() if n == there[separator] > 1)
    level = f"{path}: its columns may be parted by {either}; put cells that hold one in quotes"
    check(" or " not in either, level, TinyldError)
    is_plain = separator == "\t" and not all(re.fullmatch('".*"', name.strip()) for name in head.split("\t"))
    reader, header, start, is_open = cells(text, separator, is_plain, strict=True), [], 1, False
    try:
        for values in reader:
            where, start = f"{path}: line {start}", reader.line_num + 1
            values = values or [""] * (len(header) == 1)  # a spreadsheet's empty cell of a lone column
            was_open, is_open = is_open, is_plain and bool(values) and OPENED.match(values[-1]) is not None
            if (was_open and values and CLOSED.fullmatch(values[0])) or (is_open and len(values) < len(header)):
                lines = "a cell in quotes has several lines here, which no table with tabs has"
                raise TinyldError(f"{where}: {lines}; save it with commas")
            if is_plain:  # but for what pandas or Python's csv wrote
                values = [v[1:-1].replace('""', '"') if QUOTED.fullmatch(v) else v for v in values]
            while len(values) > max(1, len(header)) and not values[-1].strip():  # as spreadsheets fill up rows
                values.pop()
            is_blank = not any(value.strip() for value in values)
            if not header and not is_blank:
                header = [clean(value) for value in values]
                way_out = "; delete it" * header[0].startswith("sep=")  # which spreadsheets put before it
                wanted = f"{where}: this line must name the columns, each by a name of its own{way_out}"
                is_header = len(set(header)) == len(header) and not way_out
                check(is_header, f"{wanted}, got {show(', '.join(header))}", TinyldError)
            elif header and values and (empty or not is_blank):
                if len(values) != len(header):
                    stray = f"the header has {len(header)}; look for a stray {separator!r}"
                    stray += " (columns are parted by , ; or tabs)" * (len(header) == 1)
                    raise TinyldError(f"{where}: {len(values)} columns, {stray}")
                yield where, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise TinyldError(f"{path}: line {start}: {error}; check the quotes") from None


def parted(text: str) -> list[str]:
    """The texts in one cell, which have three bars between them, neither more nor fewer."""
    return [part.strip() for part in re.split(r"(?<!\|)\|{3}(?!\|)", text)]


def clean(text: str) -> str:
    """`text` on one line: blanks, control characters and lone surrogates become single spaces, ends are trimmed."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]+", " ", text).strip()


class Record(dict[str, Any]):
    """An object of a JSON file, in which a missing key is an error that names the file."""

    path: object = ""

    def __missing__(self, key: str) -> Any:
        raise TinyldError(f"{self.path}: missing key {key!r}")


def parse_json(text: str | bytes, path: object, hint: Any = Any) -> Any:
    """The JSON value in `text`: no key twice, no NaN or huge number, nothing of another type than `hint` has it (see
    config.check_type). `path` is for the error."""

    def unique(pairs: list[tuple[str, Any]]) -> Record:
        record = Record(pairs)
        record.path = path
        if len(record) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise ValueError(f"key {show(twice)} twice")
        return record

    def number(text: str) -> float:
        if not abs(value := float(text)) <= 1e308:  # NaN is not
            raise ValueError(f"{show(text)} is no finite number")
        return value

    hooks: dict[str, Any] = {"parse_float": number, "parse_constant": number, "object_pairs_hook": unique}
    try:
        text = text if isinstance(text, str) else decode(text, path)  # by itself json takes UTF-16 too
        value = json.loads(text, parse_int=lambda text: int(text) if number(text) else 0, **hooks)
    except (ValueError, RecursionError) as error:
        raise TinyldError(f"{path}: damaged, not JSON ({str(error)[:120]})") from None
    check_type(value, hint, str(path))
    return value


def read_object(path: Path, hint: Any = dict) -> Record:
    return parse_json(read_text(path), path, hint)


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise TinyldError(f"{path}: not valid TOML: {error}") from None


class Said:
    """The settings in an object of JSON, of which every key that says something must be understood."""

    def __init__(self, raw: Mapping[str, Any], where: object, ignored: str = ""):
        self.raw, self.where, self.seen = raw, where, set(ignored.split())

    def refuse(self, key: str, wanted: str) -> NoReturn:
        raise TinyldError(f"{self.where}: {key} must be {wanted}, got {show(self.raw.get(key))}")

    def get(self, key: str, kind: type) -> Any:
        """A value of type `kind`; one whose key ends in ? may be missing or null, and is then 0."""
        optional, key = key.endswith("?"), key.rstrip("?")
        self.seen.add(key)
        value = self.raw.get(key)
        if optional and value is None:
            return kind(0)
        return check_type(value, kind, f"{self.where}: {key}")

    def only(self, allowed: Mapping[str, Any]) -> None:
        """Refuses a key with another value than the one given; missing and null are as good."""
        for key, value in allowed.items():
            self.seen.add(key)
            if self.raw.get(key) not in (value, None):
                self.refuse(key, repr(value))

    def finish(self) -> None:
        """Refuses a key that nobody asked for, unless it is off."""
        for key, value in self.raw.items():
            if key not in self.seen and value not in (None, False, "", [], {}):
                self.refuse(key, "left out: tinyld does not know what it changes")


def parse_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file that was read into memory; TinyldError when it is damaged or not finite."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TinyldError(f"{path}: damaged safetensors file ({str(error)[:100]})") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            finite({name: tensor}, path)
    return tensors


def finite(tensors: Mapping[str, Tensor], path: Path | str) -> dict[str, Tensor]:
    """`tensors` as the float32 that a model computes with; TinyldError for what is no float (whole, complex and 8-bit
    numbers), and for what float32 does not hold."""
    found = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() == 1:
            raise TinyldError(f"{path}: tensor {name!r} has the wrong type: {tensor.dtype}, expected floats")
        found[name] = tensor.float()
        if tensor.numel() and not all(bool(end.isfinite()) for end in found[name].aminmax()):  # NaN is both
            raise TinyldError(f"{path}: tensor {name!r} holds values that are not finite in float32")
    return found

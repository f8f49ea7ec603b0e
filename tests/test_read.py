"""The one reader of whatever comes from outside: what it refuses, each in one line that names the file."""

import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import refuses
from safetensors.torch import save

from tinyld.errors import TinyldError, plain, show
from tinyld.read import finite, parse_tensors, read_object, read_text, read_toml

Read = Callable[[Path], Any]
MANY = b"".join(b'"%d": 1, ' % i for i in range(100_000))


def read_tensors(path: Path) -> Any:
    return parse_tensors(path.read_bytes(), path)


def header(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + b"0000"


BAD: list[tuple[Read, bytes, str]] = [
    (read_object, b"{", "damaged, not JSON .*Expecting property name"),
    (read_object, b'{"a": {"b": 1, "b": 2}}', "damaged, not JSON .*key 'b' twice"),
    (read_object, b"{" + MANY + b'"7": 1}', "damaged, not JSON .*'7' twice"),
    (read_object, b'{"a": NaN}', "damaged, not JSON .*no finite number"),
    (read_object, b"[1e999]", "damaged, not JSON .*no finite number"),
    (read_object, b"[" + b"9" * 5_000 + b"]", "damaged, not JSON .*no finite number"),
    (read_object, b"[" * 100_000, "damaged, not JSON .*recursion"),
    (read_object, b'{"a": 1}}', "damaged, not JSON .*Extra data"),
    (read_object, b"[1]", r"'\[1\]' is not of type dict"),
    (read_toml, b"a = 1\na = 2", "not valid TOML.*overwrite"),
    (read_toml, b"a = " + b"[" * 100_000, "not valid TOML.*recursion"),
    (read_text, b"one\ntwo \xff\n", "line 2: not UTF-8"),
    (partial(read_text, limit=5), b"[1, 2]", "6 bytes are more than the 5"),
    *((read_tensors, content, "damaged safetensors") for content in (b"", struct.pack("<Q", 1 << 60))),
    (read_tensors, header('{"a": 1}'), "damaged safetensors"),
    (read_tensors, header('{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}'), "damaged safetensors"),
    (read_tensors, save({"a": torch.tensor([float("nan")])}), ".*'a' holds values that are not finite"),
]


@pytest.mark.parametrize(("read", "content", "message"), BAD, ids=range(len(BAD)))
def test_a_file_that_is_off_is_refused_by_its_name(read: Read, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.file"
    path.write_bytes(content)
    refuses(f"^{path}: {message}", read, path)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    said = {"pipe": "not a file but a device", ".": "not a file but a folder", "none": "No such file", "a\0b": "null"}
    for name, message in said.items():
        refuses(message, read_text, tmp_path / name)


def test_what_is_well_formed_is_read_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1, -2.5, true, null, "\\u00e9"], "b": {}}')
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
    found = read_object(tmp_path / "link.json")
    assert found == {"a": [1, -2.5, True, None, "é"], "b": {}}
    with pytest.raises(TinyldError, match="link.json: missing key 'c'"):
        found["c"]


def test_what_reaches_a_model_is_finite_in_float32() -> None:
    kept = finite({"a": torch.tensor([1.5], dtype=torch.bfloat16), "b": torch.tensor([2.0])}, "x")
    assert {t.dtype for t in kept.values()} == {torch.float32}
    for tensor in (torch.tensor([1e300], dtype=torch.float64), torch.tensor([float("inf")])):
        refuses("x: tensor 'a' holds values that are not finite", finite, {"a": tensor}, "x")
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        refuses(f"x: tensor 'a' has the wrong type: {dtype}", finite, {"a": torch.zeros(1).to(dtype)}, "x")


def test_text_from_outside_is_plain_on_a_terminal_and_in_errors() -> None:
    for text, shown in (
        ("a\x1b[2Jb", "a?[2Jb"),
        ("a\nb\tc\u00a0d", "a b c d"),
        ("abc\u202edef", "abc?def"),
        ("half \ud83d", "half ?"),
        ("naïve 漢字 👩\u200d🚀", "naïve 漢字 👩\u200d🚀"),
    ):
        assert plain(text) == shown == str(TinyldError(text))
        assert show(text).isprintable() or "\u200d" in text

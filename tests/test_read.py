"""The one reader of whatever comes from outside: what it refuses, each in one line that names the file."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from tinyld import read
from tinyld.config import ModelConfig, from_dict
from tinyld.errors import TinyldError, plain, show
from tinyld.read import finite, parse_tensors, read_object, read_text, read_toml

BAD = [
    ("a.json", "{", "Expecting property name"),
    ("a.json", '{"a": {"b": 1, "b": 2}}', "key 'b' twice"),
    ("a.json", '{"a": NaN}', "no finite number"),
    ("a.json", "[1e999]", "no finite number"),
    ("a.json", "[" + "9" * 400 + "]", "no finite number"),
    ("a.json", "[" * 100_000, "recursion"),
    ("a.json", '{"a": 1}}', "Extra data"),
    ("a.toml", "a = 1\na = 2", "overwrite"),
    ("a.toml", "a = " + "[" * 100_000, "recursion"),
]


def test_a_strict_reading_of_json_and_toml(tmp_path: Path) -> None:
    for name, content, message in BAD:
        (tmp_path / name).write_text(content)
        kind = "damaged, not JSON" if name == "a.json" else "not valid TOML"
        with pytest.raises(TinyldError, match=f"^{tmp_path}/{name}: {kind}.*{message}"):
            (read_object if name == "a.json" else read_toml)(tmp_path / name)


def test_what_is_well_formed_is_read_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1, -2.5, true, null, "\\u00e9"], "b": {}}')
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
    found = read_object(tmp_path / "link.json")
    assert found == {"a": [1, -2.5, True, None, "é"], "b": {}}
    with pytest.raises(TinyldError, match="link.json: missing key 'c'"):
        found["c"]
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(TinyldError, match=r"a.json: expected an object, got '\[1\]'"):
        read_object(tmp_path / "a.json")
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(TinyldError, match="a.txt: line 2: not UTF-8"):
        read_text(tmp_path / "a.txt")


def test_only_regular_files_of_a_sane_size_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.json").write_text("[1, 2]")
    monkeypatch.setattr(read.read_text, "__defaults__", (5,))
    for name, message in (
        ("pipe", "not a file but a device"),
        (".", "not a file but a folder"),
        ("none", "no such file"),
        ("a\0b", "null"),
        ("a.json", "a.json: 6 bytes are more than the 5"),
    ):
        with pytest.raises(TinyldError, match=message):
            read_object(tmp_path / name)


def header(text: str, data: bytes = b"0000") -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + data


def test_a_strict_reading_of_tensors(tmp_path: Path) -> None:
    for content, message in (
        (b"", "damaged safetensors"),
        (struct.pack("<Q", 1 << 60), "damaged safetensors"),
        (header('{"a": 1}'), "damaged safetensors"),
        (header('{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}'), "damaged safetensors"),
        (header('{"a": {"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}}'), "type: torch.float8_e5m2"),
        (save({"a": torch.tensor([float("nan")])}), "'a' holds values that are not finite"),
    ):
        with pytest.raises(TinyldError, match=f"a.safetensors: .*{message}"):
            parse_tensors(content, tmp_path / "a.safetensors")


def test_what_reaches_a_model_is_finite_in_float32() -> None:
    kept = finite({"a": torch.tensor([1.5], dtype=torch.bfloat16), "b": torch.tensor([2.0])}, "x")
    assert {t.dtype for t in kept.values()} == {torch.float32}
    for tensor in (torch.tensor([1e300], dtype=torch.float64), torch.tensor([float("inf")])):
        with pytest.raises(TinyldError, match="x: tensor 'a' holds values that are not finite"):
            finite({"a": tensor}, "x")
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TinyldError, match=f"x: tensor 'a' has the wrong type: {dtype}"):
            finite({"a": torch.zeros(1).to(dtype)}, "x")


def test_a_config_is_checked_against_its_dataclass() -> None:
    for values, message in (
        ([], r"'\[\]' is not of type dict"),
        ({}, "missing key 'vocab_size'"),
        ({"vocab_size": True}, "vocab_size: 'True' is not of type int"),
        ({"vocab_size": 9, "norm_eps": 1e39}, "norm_eps must be below 1"),
        ({"vocab_size": 9, "depth": 1}, "unknown key 'depth'"),
    ):
        with pytest.raises(TinyldError, match=f"a.json: {message}"):
            from_dict(ModelConfig, values, "a.json")  # type: ignore[arg-type]


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

"""Careless and hostile input to whole commands. Run with: pytest -m faults tests/test_hostile.py

A case is a command in a fresh copy of a small world in which one thing is wrong. What must come of it: one line that
names it, exit 1, and nothing written; or, where the content is no fault in itself, the result as without.
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import cli, good, tree

from tinyld.runs import MANIFEST, RunFolder

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("world")]

UGLY = "\x1b[31mred\x07\u202e"
TUNE = "--base tiny --method bitfit --steps 1 --batch-size 4 --dtype fp32 --quiet --out out"
PRETRAIN = "--preset nano --vocab-size 128 --max-length 24 --steps 1 --dtype fp32 --quiet --out out"
COMMANDS = {
    "finetune": f"finetune --task mood.toml {TUNE}",
    "finetune data": f"finetune --data mood.csv {TUNE}",
    "predict": "predict mood mood.csv --base tiny --dtype fp32 --quiet",
    "predict jsonl": "predict mood asked.jsonl --base tiny --dtype fp32 --quiet",
    "report": "report mood",
    "pretrain": f"pretrain --data text.txt {PRETRAIN}",
    "pretrain gz": f"pretrain --data text.txt.gz {PRETRAIN}",
    "sample": "sample tiny --length 4 --num 1 --dtype fp32",
}


@pytest.fixture()
def world(place: Path, tmp_path: Path, elsewhere: None) -> None:
    for name, copy in (("base", "tiny"), ("mood", "mood")):
        shutil.copytree(place / name, copy)
    for name in ("mood.toml", "mood.csv", "text.txt"):
        shutil.copy(place / name, name)
    Path("asked.jsonl").write_text('{"text": "rain"}\n{"text": "sun"}\n')
    Path("text.txt.gz").write_bytes(gzip.compress(Path("text.txt").read_bytes()))
    Path("foreign").mkdir()
    Path("foreign/config.json").write_text('{"name": "an extension"}')
    Path("foreign/manifest.json").write_text('{"files": ["icon"]}')
    Path("foreign/icon").write_text("mine")


def files() -> dict[str, Any]:
    """Every file in this folder with its content, links by their target."""
    return {name: content for name, content in tree(Path()).items() if content is not None}


def refused(args: str, part: str) -> None:
    before = files()
    ran = cli(*args.split(" "))
    assert ran.code in (1, 2) and re.fullmatch("tinyld: [^\x00-\x1f\x7f-\x9f\u202e]*\n", ran.stderr), ran
    assert part in ran.stderr and ran.stdout == ""
    assert files() == before


def put(path: str, content: bytes) -> None:
    """Writes a file; in a run its SHA-256 too, so that it is read at all."""
    folder, name = Path(path).parent, Path(path).name
    if (folder / MANIFEST).exists() and name != MANIFEST:
        RunFolder(folder).write(name, content)
    else:
        Path(path).write_bytes(content)


Change = Callable[[bytes], bytes]


def more(text: str) -> Change:
    return lambda content: content + text.encode()


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


ROWS, ADAPTER = "mood.csv", "mood/adapter.safetensors"
# Of each kind of file one that is off, as a whole command meets it: command, file, what becomes of it, what is said.
# What else may be wrong in it is in the tests of what reads it.
CONTENT: list[tuple[str, str, Change, str]] = [
    ("finetune", ROWS, more(f"rain,{UGLY}\n"), "mood.csv: line 42: unknown label"),
    ("finetune data", ROWS, more("rain,Sad\n"), "Sad"),
    ("predict jsonl", "asked.jsonl", lambda content: content[:-4], "damaged, not JSON"),
    ("predict", ADAPTER, half, "adapter.safetensors: damaged safetensors file"),
    ("report", "mood/results.json", half, "results.json: damaged, not JSON"),
    ("pretrain gz", "text.txt.gz", half, "text.txt.gz: cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "path", "change", "part"), CONTENT, ids=range(len(CONTENT)))
def test_a_damaged_file_is_refused_in_one_line(command: str, path: str, change: Change, part: str) -> None:
    content = Path(path).read_bytes()
    assert change(content) != content
    put(path, change(content))
    refused(COMMANDS[command], part)


PLACES = [  # what is there instead, as a shell makes it
    "true", "ln -s {name} {path}", "ln -s nowhere {path}", "ln -s /dev/zero {path}", "mkfifo {path}", "mkdir {path}",
    "truncate -s 4T {path}",
]  # fmt: skip


@pytest.mark.parametrize("there", PLACES)
@pytest.mark.parametrize(("command", "path"), [
    ("finetune", ROWS), ("finetune", "mood.toml"), ("predict", ADAPTER), ("sample", "tiny/tokenizer.json"),
])  # fmt: skip
def test_what_is_no_file_of_its_kind_is_refused_by_its_name(command: str, path: str, there: str) -> None:
    Path(path).unlink()
    subprocess.run(there.format(path=path, name=Path(path).name), shell=True, check=True)
    refused(COMMANDS[command], Path(path).name)


@pytest.mark.parametrize("out", [
    *("foreign", "foreign --force", "link --force", "text.txt", "text.txt/out", "mood/config.json", "/dev/zero"),
    *("x" * 256, "a\0b", UGLY + "/" + "x" * 256, "\udcff" + "x" * 300),
])  # fmt: skip
@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_nothing_is_written_where_it_cannot_or_must_not_be(command: str, out: str) -> None:
    Path("link").symlink_to("foreign")
    refused(COMMANDS[command].replace("--out out", f"--out {out}"), "")


def test_long_and_ugly_text_is_answered_and_shown_plainly() -> None:
    Path("asked.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (UGLY, "x " * 100_000)))
    ran = good(*COMMANDS["predict jsonl"].split())
    assert len(ran.stdout.splitlines()) == 2 and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", ran.stdout)


@pytest.mark.parametrize("stream", ["<&-", ">&-", "2>&-", ">/dev/full", "| true"])
def test_nobody_needs_to_listen(stream: str) -> None:
    """In real processes, in a locale of ASCII, on a folder whose name is no text."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "LC_ALL": "C", "PYTHONUTF8": "0"}
    odd = Path("mood").rename("caf\u00e9 \udcff")
    (odd / "text.txt").write_text("caf\u00e9 \u6f22\u5b57\n")
    for command in ("tasks --json", f"info '{odd}'", f"predict '{odd}' '{odd}/text.txt' --base tiny --dtype fp32"):
        line = os.fsencode(f"{sys.executable} -m tinyld {command} {stream}")
        ran = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment)
        assert ran.returncode in (0, 1) and "Traceback" not in ran.stderr, (line, ran.stderr)
        assert ran.returncode == 0 or "full" in stream or ">&-" in stream, (line, ran.stderr)

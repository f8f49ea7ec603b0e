"""Careless and hostile input to whole commands. Run with: pytest -m faults tests/test_hostile.py

A case is a command in a fresh copy of a small world in which one thing is wrong: not inside of a file, which is in the
tests of what reads it. What must come of it: one line that names it, exit 1, and nothing written.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import cli, good, tree

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("world")]

UGLY = "\x1b[31mred\x07\u202e"
TUNE = "--base tiny --method bitfit --steps 1 --batch-size 4 --dtype fp32 --quiet --out out"
PRETRAIN = "--preset nano --vocab-size 128 --max-length 24 --steps 1 --dtype fp32 --quiet --out out"
COMMANDS = {
    "finetune": f"finetune --task mood.toml {TUNE}",
    "predict": "predict mood mood.csv --base tiny --dtype fp32 --quiet",
    "predict jsonl": "predict mood asked.jsonl --base tiny --dtype fp32 --quiet",
    "pretrain": f"pretrain --data text.txt {PRETRAIN}",
    "sample": "sample tiny --length 4 --num 1 --dtype fp32",
}


@pytest.fixture()
def world(place: Path, tmp_path: Path, elsewhere: None) -> None:
    for name, copy in (("base", "tiny"), ("mood", "mood")):
        shutil.copytree(place / name, copy)
    for name in ("mood.toml", "mood.csv", "text.txt"):
        shutil.copy(place / name, name)
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


PLACES = [  # what is there instead, as a shell makes it
    "true", "ln -s {name} {path}", "ln -s nowhere {path}", "ln -s /dev/zero {path}", "mkfifo {path}", "mkdir {path}",
    "truncate -s 4T {path}",
]  # fmt: skip


@pytest.mark.parametrize("there", PLACES)
@pytest.mark.parametrize(("command", "path"), [
    ("finetune", "mood.csv"), ("finetune", "mood.toml"), ("predict", "mood/adapter.safetensors"),
    ("sample", "tiny/tokenizer.json"),
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

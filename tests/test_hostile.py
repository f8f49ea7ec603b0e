"""Hostile and careless inputs, by the hundred, over all verbs. Run with: pytest -m faults tests/test_hostile.py

A case is a command of COMMANDS in a fresh copy of a small world in which one thing is mutated: a file inside of what
it names, what stands at such a path, where it writes, an option. All combinations are made from these tables, so that a
new verb or kind of file is a row; a seeded part is run. What must come of it: one line and exit 1 or 2, or the result
that comes without the mutation; where other content is no fault in itself, any result. TINYLD_FAULTS is the share of
TOTAL that is run, TINYLD_FAULTS_OUT where the counts are written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
import tomllib
import traceback
import typing
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load, save
from typer.testing import CliRunner

from tinyld.checkpoint import Base
from tinyld.cli import VERBS, app
from tinyld.config import ModelConfig
from tinyld.hf import export_bert
from tinyld.model import Denoiser
from tinyld.options import kinds
from tinyld.parse import flag
from tinyld.runs import RunFolder
from tinyld.tables import markdown
from tinyld.tokenizer import Tokenizer

pytestmark = pytest.mark.faults

TOTAL, SHARE = 1_000, float(os.environ.get("TINYLD_FAULTS", "1"))
LIMIT_S, LIMIT_BYTES = 10, 1 << 30  # of a case; of seconds those of the processor, as others may use it
REFUSED, SAME, OTHER = "refused", "as without", "another result"  # what comes of a case
CLOCK = ("seconds", "cache_seconds", "rows_per_second", "tokens_per_second", "peak_memory_mb", "time", "command")
UGLY = "\x1b[31mred\x07\x9b2J\u202e"
TEMPORARY = f".tinyld-{'0' * 16}.tmp"
HEADING = "\n## Hostile and careless inputs\n\n"

END = "--dtype fp32 --json --quiet"
TUNE = f"--steps 2 --batch-size 4 {END} --base tiny"
TEXT = f"--data text --preset nano --vocab-size 128 --max-length 32 --steps 2 --batch-size 4 {END}"
LORA = f"finetune --method weight-lora --set rank=2 --task mood.toml {TUNE} --out"
COMPOSE = f"compose push push2 --base tiny --limit 8 {END} --out"
GRID = "--methods bitfit --seeds 1 --trials 1 --steps 2 --json --quiet"
COMMANDS = {  # by names that begin with the verb
    "finetune": f"{LORA} out",
    "finetune data": f"finetune --data rows.csv --method bitfit {TUNE} --out out",
    "finetune data folder": f"finetune --data rows --method bitfit {TUNE} --out out",
    "finetune resume": "finetune --resume stopped --json --quiet",
    "predict": "predict push rows.csv --base tiny --dtype fp32 --quiet",
    "predict csv": "predict push dev.tsv --base tiny --dtype fp32 --quiet --csv",
    "predict lora": "predict lora asked.jsonl --base tiny --dtype fp32 --quiet",
    "predict both": "predict both asked.txt --base tiny --task mood --dtype fp32 --quiet",
    "predict several": "predict push push2 rows.csv --base tiny --dtype fp32 --quiet",
    "eval": f"eval push --base tiny {END}",
    "eval data": f"eval lora --base tiny --data rows.csv {END}",
    "eval text": f"eval tiny --text text --set draws=1 {END}",
    "compose": f"{COMPOSE} out",
    "pretrain": f"pretrain {TEXT} --out out",
    "pretrain init": f"pretrain --init bert --steps 1 --data text {END} --out out",
    "sample push": "sample push --base tiny --length 4 --num 1 --dtype fp32 --json",
    "sample": "sample tiny --length 4 --num 1 --dtype fp32 --json",
    "compare": f"compare --task mood.toml --base tiny {GRID} --out grid",
    "report": "report push lora --json",
    "info": "info push --json",
    "tasks": "tasks --json",
    "merge": "merge lora --base tiny --json --out out",
    "export": "export lora --to peft --base tiny --out out",
    "export hf": "export encoder --out out",
}
WRITES = {"finetune resume": "stopped/", "eval": "push/", "eval data": "lora/", "compare": "grid/"}  # beside out
SETUP = (
    f"pretrain {TEXT} --out tiny", "pretrain --init bert --steps 1 --data text --quiet --out encoder", f"{LORA} lora",
    f"finetune --recipe fast --task mood.toml {TUNE} --out push",
    f"finetune --recipe fast --task tint.toml {TUNE} --out push2", f"{COMPOSE} both", COMMANDS["eval"],
    COMMANDS["eval data"], COMMANDS["compare"],
    f"finetune --method bitfit --task mood.toml {TUNE} --set save_minutes=0 --out stopped",
)  # fmt: skip

# ------------------------------------------------------------------------------------------------ mutations of content

Change = Callable[[random.Random, Any], Any]


def spots(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [spot for key in keys for spot in [(value, key), *spots(value[key])]]


def other_type(rng: random.Random, old: Any) -> Any:
    values: list[Any] = ["7", 7, 0.5, ["x"], [[1]], {"a": 1}, None, "false"]
    alike = (int, float) if isinstance(old, int | float) else type(old)
    return rng.choice([v for v in values if not isinstance(v, alike) and (old is not None or isinstance(v, dict))])


VALUES: dict[str, tuple[Change | None, tuple[type, ...]]] = {  # of JSON and TOML: a value of such types becomes another
    "key dropped": (None, ()),
    "type swapped": (other_type, ()),
    "huge number": (lambda rng, old: rng.choice([1e39, 10**400, 10**30, -(10**19)]), (int, float)),
    "not finite": (lambda rng, old: rng.choice([float("nan"), float("inf")]), (int, float)),
    "ugly text": (lambda rng, old: f"{UGLY}{old}", (str,)),
    "long text": (lambda rng, old: "x" * 100_000, (str,)),
    "half a character": (lambda rng, old: f"{old}\ud800", (str,)),
}
ADDED = {  # to an object
    "key twice": '"zz": 1, "zz": 2',
    "deep nesting": f'"zz": {"[" * 50_000}{"]" * 50_000}',
    "infinity": '"zz": -1e999',
    "number of 9,000 digits": f'"zz": {"9" * 9_000}',
}
BYTES: dict[str, Change] = {  # of any text
    "truncated": lambda rng, text: text[: rng.randrange(1, len(text) - 2)],
    "UTF-16": lambda rng, text: text.decode().encode("utf-16"),
    "not UTF-8": lambda rng, text: text[:9] + b"\xff\xc3" + text[9:],
    "zero byte": lambda rng, text: text[:9] + b"\0" + text[9:],
    "blank": lambda rng, text: b" \n\n",
    "byte-order mark": lambda rng, text: b"\xef\xbb\xbf" + text,
    "line ends of Windows": lambda rng, text: text.replace(b"\n", b"\r\n"),
    "no last line end": lambda rng, text: text.rstrip(),
}
LINES: dict[str, Change] = {  # of a table; the fifth character of its header is what parts columns
    "only a header": lambda rng, lines: lines[:1],
    "columns of one name": lambda rng, lines: [lines[0].replace("label", "text"), *lines[1:]],
    "a cell too many": lambda rng, lines: [*lines, f"{lines[1]}{lines[0][4]}x"],
    "unknown label": lambda rng, lines: [*lines, f"x{lines[0][4]}sideways"],
    "no label": lambda rng, lines: [*lines, f"x{lines[0][4]}"],
    "ugly text": lambda rng, lines: [*lines, UGLY + lines[1]],
    "long text": lambda rng, lines: [*lines, "x " * 100_000 + lines[1]],
    "label of another case": lambda rng, lines: [*lines, f"x{lines[0][4]}GOOD"],
    "label that looks alike": lambda rng, lines: [*lines, f"x{lines[0][4]}go\u200bod"],
    "label a number": lambda rng, lines: [*lines, f"x{lines[0][4]}1.0"],
    "quotes and line ends": lambda rng, lines: [*lines, f'"a ""b"", \nc"{lines[0][4]}good'],
}
TENSORS: dict[str, Callable[[dict[str, Any], str], Any]] = {  # of (tensors, name of the first matrix of floats)
    "NaN": lambda found, name: found[name].view(-1)[:1].fill_(float("nan")),
    "infinity": lambda found, name: found[name].view(-1)[:1].fill_(float("inf")),
    "1e30": lambda found, name: found[name].fill_(1e30),  # finite, but not what comes of it
    "1e300": lambda found, name: found.update({name: found[name].double() + 1e300}),
    "whole numbers": lambda found, name: found.update({name: found[name].long()}),
    "flags": lambda found, name: found.update({name: found[name].bool()}),
    "other shape": lambda found, name: found.update({name: found[name].reshape(-1)}),
    "no elements": lambda found, name: found.update({name: found[name][:0]}),
    "tensor dropped": lambda found, name: found.pop(name),
    "tensor renamed": lambda found, name: found.update({UGLY: found.pop(name)}),
    "tensor added": lambda found, name: found.update({"zz": found[name].clone()}),
}
RAW: dict[str, Change] = {  # of a safetensors file
    "truncated": lambda rng, content: content[: rng.randrange(1, len(content))],
    "longer": lambda rng, content: content + bytes(rng.randrange(1, 99)),
    "huge header": lambda rng, content: (1 << rng.choice([33, 62, 63])).to_bytes(8, "little") + content[8:],
    "odd type": lambda rng, content: content.replace(b"F32", rng.choice([b"F8_", b"C64", b"U99", b"\xff  "]), 1),
}
HEADER = {f"header: {n}": n for n in ("key dropped", "type swapped", "huge number", *ADDED, "not UTF-8", "blank")}
OBJECT = [*VALUES, *ADDED, *BYTES]
KINDS = {"safetensors": [*TENSORS, *RAW, *HEADER], "txt": [*BYTES], "gz": [*BYTES], "tsv": [*LINES, *BYTES]}
KINDS |= {"csv": KINDS["tsv"], "json": OBJECT, "jsonl": OBJECT, "toml": OBJECT, "state": OBJECT}


def to_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {to_toml(v)}" for k, v in value.items()) + "}"
    return f"[{', '.join(map(to_toml, value))}]" if isinstance(value, list) else json.dumps(value).replace("NaN", "nan")


def mutate(format: str, name: str, rng: random.Random, content: bytes) -> bytes:
    """The content of a file of that format, mutated."""
    if name in HEADER:
        end = 8 + int.from_bytes(content[:8], "little")
        header = mutate("json", HEADER[name], rng, content[8:end])
        return len(header).to_bytes(8, "little") + header + content[end:]
    if format == "state":
        found = load(content)
        state = bytearray(mutate("json", name, rng, found["state"].numpy().tobytes()))
        return save(found | {"state": torch.frombuffer(state, dtype=torch.uint8)})
    if format == "safetensors" and name in TENSORS:
        found = dict(sorted(load(content).items()))  # in an order that is the same in every run
        TENSORS[name](found, next((n for n, t in found.items() if t.dim() > 1 and t.is_floating_point()), min(found)))
        return save({n: t.contiguous() for n, t in found.items()})
    if format == "safetensors":
        return RAW[name](rng, content)
    if format in ("tsv", "csv") and name in LINES:
        return "\n".join([*LINES[name](rng, content.decode().splitlines()), ""]).encode()
    if name in ADDED and format == "toml":
        return ADDED[name].replace('"zz": ', "zz = ").replace(", ", "\n").encode() + b"\n" + content
    if name in ADDED:
        return content.replace(b"{", f"{{{ADDED[name]}, ".encode(), 1)
    if name in BYTES and format == "gz":
        return gzip.compress(BYTES[name](rng, gzip.decompress(content)))
    if name in BYTES:
        return BYTES[name](rng, content)
    first, *rest = content.split(b"\n", 1) if format == "jsonl" else [content]
    value = tomllib.loads(first.decode()) if format == "toml" else json.loads(first)
    new, types = VALUES[name]
    container, key = rng.choice([(c, k) for c, k in spots(value) if not types or type(c[k]) in types] or spots(value))
    if new is None:
        del container[key]
    else:
        container[key] = new(rng, container[key])
    if format == "toml":
        return "".join(f"{k} = {to_toml(v)}\n" for k, v in value.items()).encode()
    return b"\n".join([json.dumps(value).encode(), *rest])


# ------------------------------------------------------------------------------------------------ all cases

LINKS = {"a loop": "there", "a link to nothing": "nowhere", "a device": "/dev/zero", "a link": "canary/foreign"}
PLACES = (*LINKS, "nothing", "a pipe", "a foreign folder", "a vast file", "another kind", "a second split")
NAMES = {f"a name of {n} bytes": "x" * n for n in (255, 256)} | {
    "a long name": "x" * 300,
    "a name with a zero": "a\0b",
    "no UTF-8 name": "\udcff",
    "an ugly name": UGLY,
}
BAD = {float: ("nan", "inf", "-1e999", "much"), int: ("-1", "1.5", "many", "9" * 30), str: ("", UGLY, "x" * 3_000)}
BAD |= {Path: ("canary/foreign", "/dev/zero", "nowhere", *NAMES.values())}
LAX = (
    "quotes and line ends", "line ends of Windows", "no last line end", "key dropped", "type swapped", "huge number",
    "ugly text", "long text", "half a character", "zero byte", "blank",
)  # fmt: skip
FREE = r"tokenizer.json|asked|text/|rows.csv|train.tsv|dev.tsv|results.json|manifest.json"  # LAX content is no fault


class Case(NamedTuple):
    command: str  # of COMMANDS
    mutation: str
    path: str = ""  # what is mutated
    format: str = ""  # of its content; none: another thing takes its place
    more: tuple[str, ...] = ()  # arguments at the end
    free: bool = False  # any result is right
    writes: str = "out"  # besides what the command does by itself


def all_cases(world: Path) -> Iterator[Case]:
    for command, line in COMMANDS.items():
        verb, *words = line.split()
        options, extra = VERBS[verb].options, ("mood.toml", "train.tsv", "dev.tsv")
        named = [w for w, before in zip(words, line.split(), strict=False) if (world / w).exists() and before != "--to"]
        inside = [p for w in (*named, *extra) for p in [world / w, *(world / w).rglob("*")]]
        for path in (str(p.relative_to(world)) for p in inside):
            is_checkpoint, text = re.search(r"/\d{8}$", path), path.startswith("text/")
            formats = ("safetensors", "state") if is_checkpoint else (path.rpartition(".")[2],)
            for format in formats if (world / path).is_file() else ():
                for mutation in KINDS.get(format, ()):
                    free = text or verb in ("info", "report") or command.startswith("finetune data")
                    free = free or (verb == "predict" and "label" in mutation) or mutation == "1e30"
                    lax = mutation in LAX or (mutation, format) == ("truncated", "txt")  # of lines, fewer are as good
                    lax = lax or (verb, mutation, format) == ("predict", "truncated", "csv")  # or its last cell shorter
                    free = free or (lax and re.search(FREE, path) is not None)
                    yield Case(command, mutation, path, format, free=free)
            # without some rows others are held out for dev; report leaves out a run that is not finished, and says so
            spared = text or path == "rows/dev.csv" or (verb == "report" and path.endswith("/results.json"))
            yield from (Case(command, kind, path, free=spared) for kind in PLACES)
        for field in dataclasses.fields(options):
            kind, name, group = kinds(options)[field.name], flag(field.name), field.metadata["group"]
            kind = next(iter(typing.get_args(kind)), kind)  # of a tuple: what it holds
            if kind is Path and field.name in ("out", "predictions", "csv") and command != "finetune resume":
                for more in ((), ("--force",)) if "force" in kinds(options) else ((),):
                    for there in (*LINKS, "a pipe", "a foreign folder") if verb != "compare" else ():
                        free = name != "--out" or verb == "predict"
                        yield Case(command, f"out: {there}", "there", "", (name, "there", *more), free)
                    yield Case(command, "out: a run with links", "evil", "", (name, "evil", *more), True, "evil")
                    for own in ("lora/config.json", *(word for word in named if (world / word).is_file())):
                        yield Case(command, "out: an input or a run's file", "", "", (name, own, *more))
                    for what, value in NAMES.items():
                        yield Case(command, f"out: {what}", "", "", (name, value, *more), True, value)
            elif group != "Arguments" and field.name != "out":
                for value in BAD.get(kind, ()):
                    if not (field.name in ("steps", "tokens") and value.isdigit()):  # a run without an end
                        more = (name, value) if group else ("--set", f"{field.name}={value}")
                        yield Case(command, f"{kind.__name__} option", "", "", more, kind is str or value.isdigit())


def chosen(world: Path, verb: str) -> list[Case]:
    """The cases of a verb that are run: one of every mutation, then another one of each, and so on, up to the total."""
    cases, seen = list(all_cases(world)), defaultdict(itertools.count)
    random.Random(0).shuffle(cases)
    cases.sort(key=lambda case: next(seen[case.command.split()[0], case.mutation]))
    few = [case for case in cases[: round(TOTAL * SHARE)] if case.command.split()[0] == verb]
    return sorted(few, key=lambda case: case.command)


# ------------------------------------------------------------------------------------------------ a process of its own

MOOD = """template = "{text} it was {answer} ."
label_column = "label"
verbalizer = {bad = "terrible", good = "great"}
columns = {text = "text"}
data = {train = "train.tsv", dev = "dev.tsv"}
"""
forks = multiprocessing.get_context("forkserver")
PRELOAD = ("compare", "compose", "finetuning", "predict", "pretrain", "report", "scores", "verbs", "hf", "cli")
forks.set_forkserver_preload([f"tinyld.{name}" for name in PRELOAD] + ["typer.testing", "torch._dynamo"])


def tinyld(arguments: list[str]) -> tuple[int, str, str, str]:
    """(exit code, stdout, stderr, the end of a traceback if there is one)."""
    sys.argv = ["tinyld", *arguments]
    ran = CliRunner().invoke(app, arguments, input=b"")
    trace = [] if isinstance(ran.exception, SystemExit | None) else traceback.format_exception(ran.exception)[-3:]
    return ran.exit_code, ran.stdout, ran.stderr, "".join(trace)


def build(world: Path) -> None:
    """Text, rows, tasks, a foreign folder, and by the commands of SETUP a run of every kind."""
    torch.set_num_threads(1)
    copy = world.parent / "copy"  # where each case will be, as runs keep whole paths
    copy.mkdir()
    os.chdir(copy)
    rng = random.Random(0)
    words = "the film plot was is not great terrible good bad dull bright it and but very music".split()
    lines = [" ".join(rng.choices(words, k=rng.randrange(4, 12))) for _ in range(300)]
    rows = ["text\tlabel", *(f"{line}\t{'good' if 'good' in line else 'bad'}" for line in lines)]
    for folder in ("text", "bert", "rows", "canary/photos", "canary/foreign/icons"):
        Path(folder).mkdir(parents=True)
    for name, content in {
        "train.tsv": rows[:20], "dev.tsv": rows[:1] + rows[20:30],
        **{f"rows{name}.csv": [row.replace("\t", ",") for row in rows[:20]] for name in ("", "/train", "/dev")},
        "asked.jsonl": [json.dumps({"text": line, "n": 1}) for line in lines[:4]], "asked.txt": lines[:4],
        "text/lines.txt": lines, "mood.toml": [MOOD], "tint.toml": [MOOD.replace("it was", "i find")],
        "canary/notes.txt": lines, "canary/photos/1.jpg": lines, "canary/foreign/icons/a": lines,
        "canary/foreign/config.json": ['{"name": "an extension", "kind": "theme"}'],
        "canary/foreign/manifest.json": ['{"manifest_version": 3, "files": ["icons/a"]}'],
    }.items():  # fmt: skip
        Path(name).write_text("\n".join(content) + "\n")
    Path("text/more.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    Path("canary/photos/1.jpg").chmod(0o440)
    Path("canary/foreign/link").symlink_to("../photos")
    tokenizer = Tokenizer.train(lines, 128)
    shape = ModelConfig(tokenizer.vocab_size, 16, 1, 2, 32, 32, norm_eps=1e-12, norm_first=False, rotary=False,
                        embedding_norm=True, head_transform=True)  # fmt: skip
    export_bert(Base(copy, Denoiser(shape, torch.Generator().manual_seed(0)), tokenizer, ""), Path("bert"))
    for line in SETUP:
        if "stopped" in line:
            RunFolder.close_log = None  # type: ignore[assignment,method-assign]  # ends it behind its last checkpoint
        ran = tinyld(line.split())
        assert ran[0] == ("stopped" in line), ran
    copy.rename(world)


def snapshot() -> dict[str, Any]:
    """What stands in this folder: path -> mode, and a link's goal or a file's digest."""
    found = {}
    for path in Path().rglob("*"):
        regular = path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 24
        content = hashlib.sha256(path.read_bytes()).hexdigest() if regular else path.is_symlink() and os.readlink(path)
        found[str(path)] = (path.lstat().st_mode, content)
    return found


def told(stdout: str) -> Any:
    """What was printed, without what the clock says, and the weights that were written."""
    without = lambda pairs: {k: v for k, v in pairs if k not in CLOCK}  # noqa: E731
    written = [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path("out").rglob("*.safetensors"))]
    try:
        return written, [json.loads(line, object_pairs_hook=without) for line in stdout.splitlines()]
    except ValueError:
        return written, stdout


def prepare(case: Case, world: Path) -> None:
    """Changes to a fresh copy of the world, in which the case's mutation is made."""
    os.chdir(world)
    shutil.rmtree(world.parent / "copy", ignore_errors=True)
    shutil.copytree(world, world.parent / "copy", symlinks=True)
    os.chdir(world.parent / "copy")
    path, kind = Path(case.path), case.mutation.removeprefix("out: ")
    if case.format:
        content = mutate(case.format, case.mutation, random.Random(repr(case)), path.read_bytes())
        path.write_bytes(content)
        manifest = path.parent / "manifest.json"
        listed = json.loads(manifest.read_text())["files"] if manifest.exists() and path != manifest else {}
        if path.name in listed:  # signed anew, so that it is read at all
            listed[path.name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            manifest.write_text(json.dumps({"files": listed}))
    elif case.path == "evil":
        shutil.copytree("lora", path)
        (path / "kept.txt").write_text("mine")
        (path / "results.json").unlink()
        for name, goal in (("checkpoints", "photos"), ("results.json", "notes.txt"), (TEMPORARY, "notes.txt")):
            (path / name).symlink_to(f"../canary/{goal}")
    elif case.path:
        was_folder = path.is_dir()
        if path.exists():
            path.rename("before")
        if kind in LINKS:
            path.symlink_to(path.name if kind == "a loop" else Path(LINKS[kind]).absolute())
        elif kind == "a foreign folder":
            shutil.copytree("canary/foreign", path, symlinks=True)
        elif kind == "a pipe":
            os.mkfifo(path)
        elif kind == "a vast file" or (kind == "another kind" and was_folder):
            with open(path, "wb") as file:
                file.truncate(1 << 42 if kind == "a vast file" else 9)
        elif kind == "another kind":
            path.mkdir()
        elif kind == "a second split":  # beside the one that is there
            Path("before").rename(path)
            if path.suffix in (".tsv", ".csv"):
                path.with_suffix(".jsonl").write_text('{"text": "x", "label": "good"}\n')


def work(pipe: Any, world: Path, cases: list[Case]) -> None:
    """Runs the cases in turn, and sends (what came of it, what is wrong with that)."""
    torch.set_num_threads(1)
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    without: dict[str, Any] = {}
    for case in cases:
        line = COMMANDS[case.command].split()
        if case.command not in without:
            prepare(Case(case.command, ""), world)
            code, out, err, trace = tinyld(line)
            assert code == 0, (line, err, trace)
            without[case.command] = told(out)
        prepare(case, world)
        before = snapshot()
        reader = os.open(case.path, os.O_RDWR | os.O_NONBLOCK) if case.mutation == "out: a pipe" else os.dup(0)
        began = time.process_time()
        ran = tinyld([*line, *case.more])
        slow = time.process_time() - began > LIMIT_S
        os.close(reader)
        outcome = REFUSED if ran[0] else SAME if told(ran[1]) == without[case.command] else OTHER
        outcome = "slow" if slow else outcome
        problem = f"{ran}" if slow or (outcome == OTHER and not case.free) else ""
        pipe.send(fault(case, before, *ran) or (outcome, problem))


def fault(case: Case, before: dict[str, Any], code: int, out: str, err: str, trace: str) -> tuple[str, str] | None:
    """What must never come of a case, and where it is to be seen."""
    usage = code == 2 and "\nError: " in err
    if trace:
        return "traceback", trace
    if code and not (usage or code in (1, 2) and re.fullmatch("tinyld: .*\n", err)) or len(err) > 9_000:
        return "no line", f"exit code {code}: {err[-9_000:]}"
    if "out of memory" in err:
        return "out of memory", err
    if odd := re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]|(?<![\w\"])(NaN|Infinity)", out + err):
        return "odd output", repr((out + err)[max(0, odd.start() - 99) : odd.end() + 99])
    after, may = snapshot(), ("out", case.writes, WRITES.get(case.command, "out"))
    changed = {p for p in before.keys() | after.keys() if before.get(p) != after.get(p)}
    stray = [p for p in changed if not p.startswith(may) or re.search("canary|kept", p) or p.endswith(".tmp")]
    return ("changed files", f"{stray[:5]} {err}") if stray else None


# ------------------------------------------------------------------------------------------------ tests

COUNTS: list[tuple[str, str, str]] = []  # (verb, mutation, what came of it)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    world = tmp_path_factory.mktemp("hostile") / "world"
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TINYLD_CACHE": str(world.parent / "cache")}
    process = forks.Process(target=build, args=(world,))
    process.start()
    process.join()
    assert process.exitcode == 0
    yield world
    results = list(dict.fromkeys(count[2] for count in COUNTS))
    counts = Counter((name, result) for verb, mutation, result in COUNTS for name in (f"tinyld {verb}", mutation))
    names = sorted({name for name, _ in counts}, key=lambda name: (not name.startswith("tinyld"), name))
    rows = [[name, *(counts[name, result] for result in results)] for name in names]
    text = f"{HEADING}{markdown(('verb, mutation', *results), rows)}\n"
    if "TINYLD_FAULTS_OUT" in os.environ:
        out = Path(os.environ["TINYLD_FAULTS_OUT"])
        out.write_text((out.read_text().split(HEADING)[0] if out.exists() else "") + text)
    print(text)


@pytest.mark.parametrize("verb", dict.fromkeys(line.split()[0] for line in COMMANDS.values()))
def test_what_is_hostile_or_careless_is_refused_in_a_line_or_does_no_harm(verb: str, world: Path) -> None:
    cases, problems = chosen(world, verb), []
    while cases:
        ours, theirs = forks.Pipe()
        process = forks.Process(target=work, args=(theirs, world, list(cases)))
        process.start()
        theirs.close()
        outcome = ""
        while cases and outcome not in ("hangs", "dies"):
            case, (outcome, problem) = cases.pop(0), ("hangs", f"{6 * LIMIT_S} s")
            if ours.poll(6 * LIMIT_S):
                outcome, problem = "dies", "without a word"
                with contextlib.suppress(EOFError):
                    outcome, problem = ours.recv()
            COUNTS.append((verb, case.mutation, outcome))
            if problem:
                problems.append(f"{case}: {outcome}: {problem}")
        process.kill()
        process.join()
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("stream", ["<&-", ">&-", "2>&-", ">/dev/full", "| true"])
def test_nobody_needs_to_listen(stream: str, world: Path) -> None:
    """In real processes, in a locale of ASCII, on a folder whose name is no text."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "LC_ALL": "C", "PYTHONUTF8": "0"}
    odd = world.parent / "caf\u00e9 \udcff"
    shutil.copytree(world / "push", odd, dirs_exist_ok=True)
    shutil.rmtree(world.parent / "copy", ignore_errors=True)  # where what runs keep paths of is
    shutil.copytree(world, world.parent / "copy", symlinks=True)
    for command in ("tasks --json", f"info '{odd}'", f"predict '{odd}' '{odd}/text.txt' --base tiny --dtype fp32"):
        (odd / "text.txt").write_text("caf\u00e9 \u6f22\u5b57\n")
        line = os.fsencode(f"{sys.executable} -m tinyld {command} {stream}")
        ran = subprocess.run(["bash", "-c", line], cwd=world, capture_output=True, text=True, env=environment)
        COUNTS.append((command.split()[0], "streams closed, odd names", "ended well"))
        assert ran.returncode in (0, 1) and "Traceback" not in ran.stderr, (line, ran.stderr)
        assert ran.returncode == 0 or "full" in stream or ">&-" in stream, (line, ran.stderr)

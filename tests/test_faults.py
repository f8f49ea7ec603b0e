"""Faults, counted: kills, signals, damaged files, full disks, dead processes. Run with: pytest -m faults

TINYLD_FAULTS is the share of the full counts (CI runs a twentieth); TINYLD_FAULTS_OUT a file for the table of them.
"""

import contextlib
import csv
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS

from tinyld.checkpoint import load_adapter, load_base
from tinyld.errors import TinyldError
from tinyld.methods import METHODS
from tinyld.rows import load_split
from tinyld.runs import ADAPTER, CONFIG, MANIFEST, MODEL, RESULTS, TOKENIZER, RunFolder
from tinyld.tasks import load_task

sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "results"))
from table import markdown  # noqa: E402

pytestmark = pytest.mark.faults

SHARE = float(os.environ.get("TINYLD_FAULTS", "1"))
LIMIT_S = 60  # a child that takes longer hangs
JOBS = ["pretrain", *METHODS]
STEPS = 10
COUNTS: list[tuple[str, int, str]] = []  # (fault, times, what came of it)


def times(full: int) -> int:
    return max(1, round(full * SHARE))


@pytest.fixture(scope="module", autouse=True)
def counts_are_kept() -> Iterator[None]:
    yield
    table = markdown(("fault", "times", "what came of it"), COUNTS) + "\n"
    if "TINYLD_FAULTS_OUT" in os.environ:
        Path(os.environ["TINYLD_FAULTS_OUT"]).write_text(table)
    print("\n" + table)


forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["tinyld.finetuning", "tinyld.pretrain", "tinyld.cli", "torch._dynamo"])


def child(arguments: list[str], log: str, die_at: int) -> None:
    """`tinyld ARGUMENTS` in this process, its output in `log`; it kills itself in its `die_at`-th fsync, if any."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() hears it: Python's own handler would show this function
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    if die_at:
        calls, fsync = itertools.count(1), os.fsync

        def dies(descriptor: int) -> None:
            if next(calls) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        os.fsync = dies
    sys.argv = ["tinyld", *arguments]
    from tinyld.cli import main

    main()


class World:
    """A folder beside a tiny base, its text and its task, and what each job gives when nothing interrupts it."""

    def __init__(self, path: Path, place: Path):
        self.path, self.place = path, place
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & and nohup have these two ignored, and
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # children would begin deaf to them
        self.expected = {}
        for job in JOBS:
            started = time.monotonic()
            self.finish(self.arguments(job, path / f"whole-{job}"))
            self.expected[job] = (self.facts(path / f"whole-{job}"), time.monotonic() - started)

    def arguments(self, job: str, out: Path, steps: int = STEPS) -> list[str]:
        words = f"finetune --method {job} --task {self.place}/mood.toml --base {self.place}/base"
        if job == "pretrain":
            words = f"pretrain --data {self.place}/text.txt --preset nano --vocab-size 128 --max-length 32"
        common = f"--steps {steps} --batch-size 8 --set eval_every=4 --set save_minutes=0 --dtype fp32 --out {out}"
        return f"{words} {common}".split()

    def start(self, arguments: list[str], die_at: int = 0) -> Any:
        (self.path / "log").write_text("")
        process = forks.Process(target=child, args=(arguments, str(self.path / "log"), die_at))
        process.start()
        return process

    def end(self, process: Any) -> int:
        """Its exit code; negative is the signal that killed it."""
        process.join(LIMIT_S)
        hangs = process.is_alive()
        process.kill()
        process.join()
        assert not hangs, self.said()
        return process.exitcode

    def finish(self, arguments: list[str]) -> None:
        assert self.end(self.start(arguments)) == 0, self.said()

    def said(self) -> str:
        return (self.path / "log").read_text(errors="replace")

    def go_on(self, job: str, out: Path) -> list[str]:
        """The command that a user would give: the first one again until there is a run, then --resume."""
        if not (out / CONFIG).exists():
            return self.arguments(job, out)
        return ["pretrain" if job == "pretrain" else "finetune", "--resume", str(out)]

    def facts(self, run: Path) -> tuple[str, list[dict[str, Any]]]:
        """The digest of a finished run's weights, and its log without the clock."""
        folder = RunFolder(run)
        weights = ADAPTER if (run / ADAPTER).exists() else MODEL
        folder.read(weights)
        log = [{k: v for k, v in r.items() if k != "seconds"} for r in folder.metrics()]
        return folder.digest(weights), log


def wait_for_a_checkpoint(out: Path) -> None:
    deadline = time.monotonic() + 2 * LIMIT_S
    while not RunFolder(out).checkpoints() and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.fixture(scope="module")
def world(place: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), place)


STOPS = {"SIGKILL anywhere": 60, "SIGKILL in a save": 42, "SIGTERM": 25, "SIGINT": 25, "SIGHUP": 25}


@pytest.mark.parametrize("how", STOPS)
def test_a_run_that_is_stopped_time_and_again_ends_with_the_bits_of_one_that_was_not(how: str, world: World) -> None:
    """Jobs in turn are stopped up to eight times each and gone on with; nothing half-written is left. A signal that can
    be heard ends the step, saves, and gives its code."""
    rng, signum = random.Random(how), signal.Signals[how.split()[0]]
    stops = runs = saved = missed = 0
    while stops < times(STOPS[how]):
        job, out = JOBS[runs % len(JOBS)], world.path / f"stopped-{runs}"
        expected, seconds = world.expected[job]
        for _ in range(8):
            dies = how == "SIGKILL in a save"
            process = world.start(world.go_on(job, out), rng.randrange(1, 60) if dies else 0)
            if not dies and stops % 3:  # two in three from the first step on, the rest at any time
                while process.is_alive() and not RunFolder(out).checkpoints():
                    time.sleep(0.005)
            process.join(LIMIT_S if dies else rng.uniform(0, 0.3 if stops % 3 else 1.1) * seconds)
            heard = process.is_alive() and not (out / RESULTS).exists()
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it has ended since, and its fork server has reaped it
                    os.kill(process.pid, signum)
            code, said = world.end(process), world.said()
            assert code in (0, 128 + signum, -signum) or not said, said  # not: before main() has begun
            assert code == 0 or "Traceback" not in said, said
            if "is saved" in said:
                step = int(said.split("step ")[-1].split(" is saved")[0])
                assert int(RunFolder(out).checkpoints()[-1].name) == step
                assert (RunFolder(out).metrics() or [{"step": 0}])[-1]["step"] <= step
                saved += 1
            if code == 0:
                missed += heard  # its results came between the look at them and the signal
                break
            stops += 1
        world.finish(world.go_on(job, out))
        assert world.facts(out) == expected
        assert not list(out.rglob("*.tmp"))
        shutil.rmtree(out)
        runs += 1
    assert missed <= max(1, stops // 10)  # a run that goes on to its end has not heard the signal
    assert saved or stops < 10 or signum == signal.SIGKILL
    told = f"exit code {128 + signum}; {saved} came while training, saved at their step; " * (signum != signal.SIGKILL)
    COUNTS.append((how, stops, f"{told}{runs} runs went on; weights and log of all as without it"))


def damage(content: bytes, rng: random.Random) -> bytes:
    """The content truncated, extended, with bits flipped, a part zeroed, or two parts swapped; never the same."""
    found = content
    while found == content:
        a, b = sorted(rng.randrange(len(content)) for _ in range(2))
        flipped = bytearray(content)
        for _ in range(rng.choice([1, 1, 8])):
            flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        zeroed = content[:a] + bytes(b - a) + content[b:]
        swapped = content[b:] + content[a:b] + content[:a]
        longer = content + rng.randbytes(rng.randrange(1, 200))
        found = rng.choice([content[:a], longer, bytes(flipped), zeroed, swapped])
    return found


def count_damage(kind: str, path: Path, read: Callable[[], Any], is_right: Callable[[bytes, Any], bool]) -> None:
    """A file that is damaged time and again is refused by name in a line, or else what is read of it is right."""
    content, rng, refused = path.read_bytes(), random.Random(kind), 0
    for _ in range(times(1000)):
        damaged = damage(content, rng)
        path.write_bytes(damaged)
        started = time.monotonic()
        try:
            found = read()
        except TinyldError as error:
            assert "\n" not in str(error) and str(path.parent) in str(error), repr(str(error))
            refused += 1
        else:
            assert is_right(damaged, found)
        assert time.monotonic() - started < 5
    rest = f"; {times(1000) - refused:,} read as they stand" if refused < times(1000) else ""
    COUNTS.append((f"damaged {kind}", times(1000), f"{refused:,} refused by name{rest}"))


DAMAGED = {  # the file, and the run that it is of
    "base": (MODEL, "whole-pretrain"), "tokenizer": (TOKENIZER, "whole-pretrain"), "config": (CONFIG, "whole-pretrain"),
    "manifest": (MANIFEST, "whole-pretrain"), "adapter": (ADAPTER, "whole-adapters"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_run_file_is_refused_by_name(kind: str, world: World, tmp_path: Path) -> None:
    name, source = DAMAGED[kind]
    run = shutil.copytree(world.path / source, tmp_path / "run")

    def read() -> Any:
        return load_adapter(RunFolder.open(run)) if kind == "adapter" else load_base(run)

    # only a manifest can lose something that does not matter here: white space, another file's entry
    count_damage(kind, run / name, read, lambda damaged, found: kind == "manifest")


def labels(content: bytes, kind: str) -> list[str] | None:
    """The label of every row by the simplest reading, or None when there is none."""
    try:
        text = content.decode("utf-8-sig")
        if kind == "jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = list(csv.DictReader(text.split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE))
        return [row["label"] for row in rows]
    except (ValueError, KeyError, TypeError, csv.Error):
        return None


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "toml"])
def test_a_damaged_text_is_read_as_it_stands_or_refused_by_name(kind: str, place: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": text, "label": label}) for text, label in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS))
    path, task = tmp_path / f"rows.{kind}", tmp_path / "rows.toml"
    task.write_text((place / "mood.toml").read_text().replace("mood.csv", "rows.tsv" if kind == "toml" else path.name))

    def is_right(damaged: bytes, examples: Any) -> bool:
        return kind == "toml" or [("sad", "happy")[e.label or 0] for e in examples] == (labels(damaged, kind) or [])

    count_damage(kind, path, lambda: load_split(load_task(str(task)), "train"), is_right)


@pytest.mark.parametrize("fault", ["full", "gone"])
def test_a_disk_that_takes_no_more_leaves_the_last_checkpoint(fault: str, world: World, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        job, out = "adapters", disk / "run"
        process = world.start(world.arguments(job, out, steps=4_000))
        wait_for_a_checkpoint(out)
        if fault == "full":
            with open(disk / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass
        else:
            os.rename(out, disk / "moved")
        code = world.end(process)
        said = world.said().strip().splitlines()
        assert code == 1 and said[-1].startswith("tinyld: ") and str(disk) in said[-1], said
        assert not any("Traceback" in line for line in said)
        left = RunFolder(disk / "moved" if fault == "gone" else out)
        assert left.load_checkpoint() is not None
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    COUNTS.append((f"disk {fault}", 1, "one line, exit code 1; the last checkpoint loads"))


def torchrun(arguments: list[str]) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    return subprocess.Popen(
        [*launcher, "-m", "tinyld", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def assert_ends(process: subprocess.Popen[str], code: int) -> None:
    said, _ = process.communicate(timeout=2 * LIMIT_S)
    assert process.returncode == code, said


@pytest.mark.parametrize("job", ["pretrain", "trajectory-lora"])
def test_two_processes_have_the_loss_curve_of_one(job: str, world: World) -> None:
    out = world.path / f"two-{job}"
    assert_ends(torchrun(world.arguments(job, out)), 0)
    alone = [r["loss"] for r in world.expected[job][0][1] if "loss" in r]
    both = [r["loss"] for r in RunFolder(out).metrics() if "loss" in r]
    # sums of the same fp32 numbers in another order, over a few updates
    assert both == pytest.approx(alone, rel=1e-4) and len(both) == len(alone)
    worst = max(abs(a / b - 1) for a, b in zip(alone, both, strict=True))
    COUNTS.append((f"two processes for one, {job}", 1, f"loss curve within {worst:.0e} of one process's"))


def test_a_killed_process_ends_the_others_and_the_run_goes_on(world: World) -> None:
    out = world.path / "killed-rank"
    process = torchrun(world.arguments("full", out, steps=60))
    wait_for_a_checkpoint(out)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert_ends(process, 1)
    assert_ends(torchrun(world.go_on("full", out)), 0)
    assert RunFolder(out).metrics()[-1]["step"] == 60
    COUNTS.append(("one process of two killed", 1, "the other ended, exit code 1; both went on from the checkpoint"))

"""Where runs and bases are, how a verb speaks, and on what a run's bits depend beside its settings."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tinyld
from tinyld.errors import TinyldError, plain
from tinyld.progress import say
from tinyld.rows import bundled_data_dir
from tinyld.runs import ADAPTER, CONFIG, MANIFEST, METRICS, MODEL, TOKENIZER, RunFolder

RUNS = Path("runs")


def keep_freed_memory() -> None:
    """Tells glibc to reuse freed blocks instead of returning them: activations are then not page-faulted in anew
    every step, which is worth about 10% of a step on two cores (measured). Elsewhere it does nothing."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def default_base() -> Path:
    """The released base."""
    return bundled_data_dir() / "base"


def say_to_stderr(quiet: bool) -> Callable[[str], None]:
    """Says a line on stderr, unless `quiet`, and by one process of several."""
    return lambda text: None if quiet or not is_writer() else say(plain(text))


def say_truncated(say: Callable[[str], None], truncated: int, rows: int, max_length: int) -> None:
    if truncated:
        say(
            f"{truncated:,} of {rows:,} rows are longer than the base's {max_length} tokens, or their answers than the "
            "task's, and were cut; what stands next to the answer is kept"
        )


def newest_run(kinds: Sequence[str]) -> Path:
    """The run in `runs/` that was finished last."""
    found = [p.parent for name in (ADAPTER, MODEL) for p in RUNS.glob(f"*/{name}")]
    found = [p for p in found if RunFolder(p).config["kind"] in kinds]
    if not found:
        raise TinyldError(f"no finished run in {RUNS}/: name one, or make one with: tinyld finetune --task reviews")
    return max(found, key=lambda p: (p / CONFIG).stat().st_mtime_ns)


def refuse_inside(out: Path, inputs: Sequence[Path]) -> None:
    """TinyldError when --force would remove a folder that the command reads."""
    for path in inputs:
        real = Path(os.path.realpath(path))
        if Path(os.path.realpath(out)) in (real, *real.parents):
            raise TinyldError(f"--out {out} holds {path}, which this command reads; choose another --out")


def check_writable(path: Path | None, inputs: Iterable[Path | None] = ()) -> None:
    """TinyldError, before any work, for a file that could not be written after it, or that a run or `inputs` need."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        raise TinyldError(f"{path}: cannot be written (not a file in a folder that exists)")
    both = [p for p in inputs if p is not None and os.path.exists(p) and os.path.exists(path)]
    folder = RunFolder(path.parent)
    if any(os.path.samefile(path, p) for p in both) or (
        folder.is_run() and path.name in (MANIFEST, METRICS, *folder.files())
    ):
        raise TinyldError(f"{path}: cannot be written (it is an input or a file of a run); choose another name")


# ------------------------------------------------------------------------------------------------ environment


def check_unchanged(
    path: Path, config: Mapping[str, Any], data_sha256: str, allow: bool, dev_sha256: str | None = None
) -> None:
    """TinyldError unless a run goes on with the data, tokenizer and machine it began with: else its bits would differ.

    An adapter's tokenizer is a part of its base's fingerprint; a base's own must be the one in its manifest.
    """
    if config["kind"] == "base":
        RunFolder(path).read(TOKENIZER)
    then, now = config["environment"], environment()
    depends = ("torch", "threads", "processes", "device", "fast_dtype", "instructions")
    pairs = [(name, then[name], now[name]) for name in depends]
    pairs.append(("data", config["data"]["sha256"][:12], data_sha256[:12]))
    if dev_sha256 is not None:
        pairs.append(("dev rows", config["data"]["dev_sha256"][:12], dev_sha256[:12]))
    changed = ", ".join(f"{name} was {a}, is {b}" for name, a, b in pairs if a != b)
    if changed and not allow:
        raise TinyldError(f"{path} began otherwise: {changed}; --set allow_changed=true goes on all the same")


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_writer() -> bool:
    """Whether this is the process that writes: the only one, or torchrun's first."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def environment() -> dict[str, Any]:
    """Versions and machine facts that a result depends on."""
    import torch

    from tinyld.device import fast_dtype, resolve_device

    return {
        "tinyld": tinyld.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1,
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "fast_dtype": fast_dtype(resolve_device("auto")),  # what `auto` is here
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "command": " ".join(["tinyld", *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }

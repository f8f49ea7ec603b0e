"""Where runs and bases are, and how a verb speaks. Shared by all verbs."""

from __future__ import annotations

import ctypes
import json as jsonlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tinyld.distributed import is_writer
from tinyld.errors import TinyldError
from tinyld.runs import ADAPTER, CONFIG, MODEL, RunFolder
from tinyld.tables import print_record
from tinyld.tasks import bundled_data_dir

RUNS = Path("runs")


def keep_freed_memory() -> None:
    """Tells glibc to reuse freed blocks instead of returning them: activations are then not page-faulted in anew
    every step, which is worth about 10% of a step on two cores (measured). Elsewhere it does nothing."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        except (OSError, AttributeError):
            pass


def default_base() -> Path:
    """The released base."""
    return bundled_data_dir() / "base"


def say_to_stderr(quiet: bool) -> Callable[[str], None]:
    return (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))


def newest_run(kinds: Sequence[str]) -> Path:
    """The run in `runs/` that was finished last."""
    found = [p.parent for p in RUNS.glob(f"*/{ADAPTER}")] + [p.parent for p in RUNS.glob(f"*/{MODEL}")]
    found = [p for p in found if RunFolder(p).config["kind"] in kinds]
    if not found:
        raise TinyldError(f"no finished run in {RUNS}/: name one, or make one with: tinyld finetune --task reviews")
    return max(found, key=lambda p: (p / CONFIG).stat().st_mtime_ns)


def finish(title: str, summary: dict[str, Any], json: bool) -> None:
    if not is_writer():
        return
    if json:
        print(jsonlib.dumps(summary))
    else:
        print_record(title, summary)


def refuse_inside(out: Path, inputs: Sequence[Path]) -> None:
    """TinyldError when --force would remove a folder that the command reads."""
    for path in inputs:
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            raise TinyldError(f"--out {out} holds {path}, which this command reads; choose another --out")

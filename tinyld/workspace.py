"""Where runs and bases are, and how a verb speaks. No torch."""

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tinyld.config import check
from tinyld.errors import TinyldError, failing, plain
from tinyld.progress import say
from tinyld.rows import bundled_data_dir
from tinyld.runs import ADAPTER, MANIFEST, METRICS, RunFolder, is_writer
from tinyld.write import is_stream

RUNS = Path("runs")


def keep_freed_memory(large: bool = True) -> None:
    """Tells glibc to reuse freed blocks, `large` ones too, instead of returning them: activations are then not
    page-faulted in anew every step, which is worth about 10% of a step on two cores (measured). Elsewhere it does
    nothing. The peak of memory counts from here, with what an earlier run of this process left and glibc does not give
    back."""
    block = 1 << 30 if large else 1 << 25  # bytes; the second is what glibc comes to by itself
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")  # of glibc alone
        libc.malloc_trim(0)
        libc.mallopt(-3, block)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2 * block - 1)  # M_TRIM_THRESHOLD
        Path("/proc/self/clear_refs").write_text("5")


def default_base() -> Path:
    """The released base."""
    return bundled_data_dir() / "base"


def say_to_stderr(quiet: bool) -> Callable[[str], None]:
    """Says a line on stderr, unless `quiet`, and by one process of several."""
    return lambda text: None if quiet or not is_writer() else say(plain(text))


def newest_run() -> Path:
    """The adapter or composition in `runs/` that was finished last."""
    found = [path for path in RUNS.glob(f"*/{ADAPTER}") if RunFolder(path.parent).is_run()]
    if not found:
        raise TinyldError(f"no finished run in {RUNS}/: name one, or make one with: tinyld finetune --task reviews")
    return max(found, key=lambda p: p.stat().st_mtime_ns).parent


def refuse_inside(out: Path, inputs: Sequence[Path], texts: Sequence[Path] = ()) -> None:
    """TinyldError when --force would remove a folder that the command reads, or when --out is inside a folder of
    `texts`, and would be read as text next time."""
    new = Path(os.path.realpath(out))
    for path in inputs:
        if Path(os.path.realpath(path)).is_relative_to(new):
            raise TinyldError(f"--out {out} holds {path}, which this command reads; choose another --out")
    for path in texts:
        if path.is_dir() and new.is_relative_to(os.path.realpath(path)):
            raise TinyldError(f"--out {out} is inside {path}, and would be read as text; choose another --out")


def check_writable(path: Path | None, inputs: Iterable[Path | None] = ()) -> None:
    """TinyldError, before any work, for a file that could not be written after it, or that a run or `inputs` need."""
    if path is None:
        return
    check(str(path) != "-", "- names no file: for stdout leave the option out, or give /dev/stdout")
    with failing(path, "written"):
        if not is_stream(path):
            tempfile.TemporaryFile(dir=path.parent).close()
        is_input = path.exists() and any(path.samefile(p) for p in inputs if p is not None and p.exists())
    folder = RunFolder(path.parent)
    if is_input or (folder.is_run() and path.name in (MANIFEST, METRICS, *folder.files())):
        raise TinyldError(f"{path}: cannot be written (it is an input or a file of a run); choose another name")

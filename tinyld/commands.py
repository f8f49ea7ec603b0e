"""One function per verb: resolve, load, call the library, write the run folder, print the result."""

from __future__ import annotations

import ctypes
import json as jsonlib
import sys
from pathlib import Path
from typing import Any

import torch

import tinyld
from tinyld.config import DiffusionConfig, TrainConfig, from_dict
from tinyld.errors import TinyldError
from tinyld.report import print_record
from tinyld.runs import CONFIG, RunFolder

SAVE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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


def bundled_data() -> Path:
    """The `data` folder: inside an installed package, at the top of a checkout."""
    inside = Path(tinyld.__file__).parent / "data"
    return inside if inside.is_dir() else Path(tinyld.__file__).parents[1] / "data"


def _say(quiet: bool) -> Any:
    return (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))


def _finish(summary: dict[str, Any], title: str, json: bool) -> None:
    if json:
        print(jsonlib.dumps(summary))
    else:
        print_record(title, summary)


def pretrain(
    out: Path,
    data: list[Path],
    valid: list[Path],
    shape: dict[str, int],
    vocab_size: int,
    diffusion: DiffusionConfig,
    config: TrainConfig,
    save_dtype: str,
    force: bool,
    json: bool,
    quiet: bool,
) -> None:
    from tinyld.pretrain import pretrain as run
    from tinyld.tokenizer import find_text_files

    keep_freed_memory()
    data = data or [bundled_data() / "corpus.txt.gz"]
    find_text_files([*data, *valid])
    folder = RunFolder.create(out, force)
    summary = run(
        folder, data, valid, shape, vocab_size, diffusion, config, SAVE_DTYPES[save_dtype], quiet=quiet, say=_say(quiet)
    )
    _finish({"run": str(out)} | summary, "pretrained base", json)


def pretrain_resume(out: Path, json: bool, quiet: bool) -> None:
    from tinyld.pretrain import pretrain as run

    keep_freed_memory()
    folder = RunFolder.open(out)
    config = folder.config
    if config["kind"] != "base" or not folder.checkpoints():
        raise TinyldError(f"nothing to resume in {out}: it is finished, or not a pretraining run")
    where = str(out / CONFIG)
    shape = {k: v for k, v in config["model"].items() if k != "vocab_size"}
    summary = run(
        folder,
        [Path(p) for p in config["data"]["files"]],
        [Path(p) for p in config["valid"]],
        shape,
        config["model"]["vocab_size"],
        from_dict(DiffusionConfig, config["diffusion"], where),
        from_dict(TrainConfig, config["train"], where),
        getattr(torch, config["save_dtype"]),
        resume=True,
        quiet=quiet,
        say=_say(quiet),
    )
    _finish({"run": str(out)} | summary, "pretrained base", json)

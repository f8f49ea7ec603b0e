"""What a run's bits depend on beside its settings: versions, machine, data."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tinyld
from tinyld.errors import TinyldError
from tinyld.runs import TOKENIZER, RunFolder


def check_unchanged(path: Path, config: Mapping[str, Any], data: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """TinyldError unless a run goes on with the data and tokenizer it began with; says what of the machine differs.

    An adapter's tokenizer is a part of its base's fingerprint; a base's own must be the one in its manifest.
    """
    if config["kind"] == "base":
        RunFolder(path).read(TOKENIZER)
    for what, key in (("data", "sha256"), ("held-out data", "dev_sha256")):
        if config["data"].get(key, data[key]) != data[key]:
            raise TinyldError(f"{path} began with other {what}: put it back as it was, or begin a new run")
    then, now = config["environment"], environment(config["train"]["device"])
    depends = ("torch", "threads", "processes", "device", "fast_dtype", "instructions")
    if changed := ", ".join(f"{name} was {then[name]}, is {now[name]}" for name in depends if then[name] != now[name]):
        say(f"{path} goes on otherwise than it began, so its last digits may differ: {changed}")


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_writer() -> bool:
    """Whether this is the process that writes: the only one, or torchrun's first."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def environment(device: str = "auto") -> dict[str, Any]:
    """Versions and machine facts that a result depends on, which came about on that device."""
    import torch

    from tinyld.device import fast_dtype, resolve_device

    on = resolve_device(device)
    return {
        "tinyld": tinyld.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1,
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "fast_dtype": fast_dtype(on),  # what `auto` is there
        "device": torch.cuda.get_device_name(on) if on.type == "cuda" else "cpu",
        "command": shlex.join(["tinyld", *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }

"""Adapters of any kind, to and from a run folder: config, weights, and the base they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyld.base import Base, check_amount, load_base, load_exactly
from tinyld.config import to_dict
from tinyld.errors import TinyldError, UsageError
from tinyld.methods import METHODS, Full, Method, read_config
from tinyld.methods.bands import BAND_EDGES
from tinyld.runs import ADAPTER, CONFIG, RunFolder
from tinyld.shrink import BASE_DTYPES


@dataclass
class Adapted:
    """A base with a method attached; `base.model` is the adapted denoiser."""

    base: Base
    method: Method
    task: str  # a built-in task's name or the path of a task file
    config: dict[str, Any]  # the run's config.json; empty for a method that was just attached


def sizes(method: Method, base: Base) -> dict[str, Any]:
    """Trainable, stored and base parameters, and bytes: the one place where they are counted."""
    stored = sum(p.numel() for p in method.own.values())
    count = base.model.config.num_parameters()
    return {
        "trainable_parameters": sum(p.numel() for p in method.own.values() if p.requires_grad),
        "stored_parameters": stored,
        "stored_bytes": sum(p.numel() * p.element_size() for p in method.own.values()),
        "base_parameters": count,
        "base_bytes": base.bytes,
        "stored_percent": 100 * stored / count,
    }


def attach(base: Base, name: str, config: Any, task: str, generator: torch.Generator | None = None) -> Adapted:
    """A fresh method on a base; it changes no logit until it is trained."""
    method = METHODS[name](config, base.model.config)
    method.attach(base.model, generator)
    return Adapted(base, method, task, {})


def method_record(method: Method) -> dict[str, Any]:
    return {"name": method.name, **to_dict(method.config)}


def find_base(config: dict[str, Any], run: Path, override: Path | None, default: Path) -> Path:
    """Where a run's base is: `override` when given, else the path the run recorded, else the bundled one."""
    if override is not None:
        return RunFolder.open(override).path
    recorded = Path(config["base"]["path"])
    for path in (recorded, default):
        if (path / CONFIG).is_file():
            return path
    raise TinyldError(f"the base of {run} is not at {recorded}; say where it is with --base")


def read_method(
    record: dict[str, Any], tensors: dict[str, Tensor], base: Base, folder: RunFolder
) -> tuple[type[Method], Any]:
    """(method, config) from what a run recorded of its method; refuses one that asks for more than `tensors` hold."""
    method, settings = read_config(record, str(folder.path / CONFIG))
    check_amount(method.expected_parameters(settings, base.model.config), tensors, folder.path / ADAPTER)
    return method, settings


def load_adapter(
    folder: RunFolder,
    default_base: Path,
    base_path: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
) -> Adapted:
    """An adapter on its base, kept in `dtype` or else as in training; refuses a base with another fingerprint."""
    config = folder.config
    if config["kind"] != "adapter":
        raise TinyldError(f"{folder.path} holds a {config['kind']}, not an adapter")
    where = str(folder.path / CONFIG)
    found = find_base(config, folder.path, base_path, default_base)
    dtype = base_dtype(config, where) if dtype is None else dtype
    check_frozen(read_config(config["method"], where)[0].name, dtype)
    base = load_base(found, device, dtype)
    check_base(config, base, folder.path)
    check_bands(config, where)
    tensors = folder.read_tensors(ADAPTER)
    method, settings = read_method(config["method"], tensors, base, folder)
    adapted = attach(base, method.name, settings, config["task"])
    load_exactly(adapted.method.own, tensors, folder.path / ADAPTER)
    adapted.config = config
    return adapted


def base_dtype(config: dict[str, Any], where: str) -> str:
    """The type that a run's base was kept in when it was trained."""
    dtype = config["base"].get("dtype", "fp32")
    if dtype not in BASE_DTYPES:
        raise TinyldError(f"{where}: base dtype must be one of {', '.join(BASE_DTYPES)}, got {dtype!r}")
    return str(dtype)


def check_frozen(method: str, dtype: str) -> None:
    """UsageError when a method's own weights would be what `dtype` makes smaller."""
    if dtype != "fp32" and method == Full.name:
        raise UsageError(f"--base-dtype {dtype} is for frozen weights; full trains them all")


def check_bands(config: dict[str, Any], where: str) -> None:
    """TinyldError when a run was made for other timestep bands than this tinyld's."""
    edges = config.get("band_edges", list(BAND_EDGES))
    if edges != list(BAND_EDGES):
        raise TinyldError(f"{where}: its bands end at {edges}, this tinyld's at {list(BAND_EDGES)}")


def check_base(config: dict[str, Any], base: Base, run: Path) -> None:
    """TinyldError when a run was trained on a base other than this one."""
    wanted = config["base"]["fingerprint"]
    if wanted != base.fingerprint:
        raise TinyldError(
            f"{run} was trained on base {wanted}, but {base.path} is base {base.fingerprint}; give its own with --base"
        )

"""What a table needs of one run, from its folder or from a small JSON file, and what it says of itself in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from tinyld.config import BUDGETS, DiffusionConfig, TrainConfig
from tinyld.errors import TinyldError

RECORD_KEYS = ("kind", "task", "method", "started_as", "base", "train", "diffusion", "data", "parameters", "how")
RECORD_KEYS += ("members", "environment")


def run_record(path: Path) -> dict[str, Any]:
    """All that a table needs of one run: from its folder, or from a JSON file that `tinyld report --save` wrote."""
    from tinyld.runs import RESULTS, RunFolder, read_json

    if path.is_file():
        record = read_json(path)
        shape = {"run": str, "kind": str, "results": dict}
        if not isinstance(record, dict) or not all(isinstance(record.get(k), t) for k, t in shape.items()):
            raise TinyldError(f"{path}: not a result that tinyld report --save wrote")
        return record
    folder = RunFolder.open(path)
    config = folder.config
    if config["kind"] == "base":
        raise TinyldError(f"{path} holds a base; report takes adapters and compositions")
    kept = {k: config[k] for k in RECORD_KEYS if k in config}
    curve = [[round(r["seconds"], 2), r["dev_accuracy"]] for r in folder.metrics() if "dev_accuracy" in r]
    return {"run": path.name, **kept, **({"curve": curve} if curve else {}), "results": folder.read_json(RESULTS)}


def seconds_to(share: float, record: Mapping[str, Any]) -> float | None:
    """Seconds of training, the cache's included, until dev accuracy first was `share` of its own best."""
    curve = record.get("curve", [])
    best = max((accuracy for _, accuracy in curve), default=0.0)
    first = next((seconds for seconds, accuracy in curve if best > 0 and accuracy >= share * best), None)
    return None if first is None else first + record["results"]["finetune"].get("cache_seconds", 0.0)


NOT_SHOWN = ("seed", "eval_every", "save_minutes", "keep", "recompute")  # of training: they change no result


# Options that need no words: every other value is shown.
USUAL: dict[str, Any] = {
    "alpha": 16.0, "rslora": False, "core": False, "targets": ["query", "key", "value", "out", "up", "down"],
    "sigma": [1.0, 1.0, 1.0], "modules": 1, "within": False, "tied": False, "activation": "relu", "sharing": "nested",
    "read": "state", "attend": 0, "conditioning": "none", "lambda_rank": 0.0, "lambda_orth": 0.0, "prune": 0.0,
    "ranks": [], "head_width": 1, "read_attended": False, "dropout": 0.0,
}  # fmt: skip


def method_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's method and its options, as it began."""
    method = record.get("started_as") or record["method"]
    return method | ({"head_width": method.get("head_width", 8)} if method.get("attend") else {})


def identity(record: Mapping[str, Any]) -> str:
    """Everything that runs of one row must share: method, base, data, noise and training, the seed left out."""
    train = {k: v for k, v in (defaults(TrainConfig) | record["train"]).items() if k not in NOT_SHOWN}
    diffusion = defaults(DiffusionConfig) | record["diffusion"]
    base = {k: record["base"].get(k) for k in ("fingerprint", "dtype")}
    method = {k: v for k, v in method_of(record).items() if USUAL.get(k) != v}
    parts = [method, base, train, diffusion, record["data"].get("rows"), record["data"].get("limit")]
    return settings(record) + json.dumps(parts, sort_keys=True)


def settings(record: Mapping[str, Any]) -> str:
    """A method's options, as the run began, and what its base is kept in and its optimizer is, in a few words."""
    parts = []
    for name, value in method_of(record).items():
        if name == "name" or (name in USUAL and value == USUAL[name]):
            continue
        alike = isinstance(value, list) and len(set(value)) == 1 < len(value)  # bands that share one rank
        shown = value[0] if alike else "/".join(map(str, value)) if isinstance(value, list) else value
        parts.append(name.replace("_", " ") + ("" if value is True else f" {shown}"))
    dtype = record["base"].get("dtype", "fp32")
    parts += [] if dtype == "fp32" else [f"base in {dtype}"]
    return ", ".join(parts + (["Muon"] if record.get("train", {}).get("optimizer") == "muon" else [])) or "-"


def training(record: Mapping[str, Any]) -> str:
    """Rows, budget, batch size and learning rate of a run, and what else of it is not as it usually is."""
    config = record["train"]
    unit = next(name for name in BUDGETS if config.get(name) is not None)
    shown = f"{record['data']['rows']:,} rows, {config[unit]:g} {unit} of {config['batch_size']}, lr {config['lr']:g}"
    return ", ".join([shown, *unusual(record)])


def unusual(record: Mapping[str, Any]) -> list[str]:
    """What of a run's training is not as it usually is, its budget, batch size, rate and optimizer left out."""
    usual = defaults(TrainConfig) | defaults(DiffusionConfig)
    given = record["train"] | record["diffusion"]
    told = (*NOT_SHOWN, *BUDGETS, "batch_size", "lr", "optimizer")
    others = [k for k in usual if k not in told and given.get(k, usual[k]) != usual[k]]
    return [k.replace("_", " ") + ("" if given[k] is True else f" {given[k]}") for k in others]


def options(record: Mapping[str, Any]) -> list[str]:
    """All that sets a method's runs apart but their task, rows, budget and rate."""
    about = settings(record)
    return [*([] if about == "-" else [about]), *unusual(record)]


def defaults(kind: type) -> dict[str, Any]:
    """What a run says that was made before `kind` had all of its fields."""
    return {f.name: f.default for f in fields(kind)}

"""Bases: a denoiser, its tokenizer and the fingerprint that adapters name it by, to and from a run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tinyld.config import ModelConfig, from_dict
from tinyld.errors import TinyldError
from tinyld.model import Denoiser
from tinyld.runs import CONFIG, MODEL, TOKENIZER, RunFolder, sha256
from tinyld.shrink import shrink, stored_bytes
from tinyld.tokenizer import Tokenizer


@dataclass
class Base:
    """A pretrained denoiser with its tokenizer, as loaded from a run folder."""

    path: Path
    model: Denoiser
    tokenizer: Tokenizer
    fingerprint: str
    dtype: str = "fp32"  # that its frozen weights are kept in
    bytes: int = 0  # of its weights in memory


def fingerprint(folder: RunFolder) -> str:
    """Names a base: a digest of its weights, tokenizer and model config."""
    parts = [folder.digest(MODEL), folder.digest(TOKENIZER), json.dumps(folder.config["model"], sort_keys=True)]
    return sha256(" ".join(parts).encode())[:16]


def save_base(
    folder: RunFolder, model: Denoiser, tensors: Mapping[str, Tensor], tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    folder.write(TOKENIZER, tokenizer.to_json().encode())
    folder.write_tensors(MODEL, {k: v.to(dtype) for k, v in tensors.items()})


def read_model_config(folder: RunFolder) -> ModelConfig:
    """What a base says of its denoiser; TinyldError when the run is an adapter."""
    config = folder.config
    if config["kind"] != "base":
        raise TinyldError(f"{folder.path} is an adapter, not a base; its base is {config.get('base', {}).get('path')}")
    return from_dict(ModelConfig, config["model"], str(folder.path / CONFIG))


def load_base(path: Path, device: torch.device | str = "cpu", dtype: str = "fp32") -> Base:
    """A base from its run folder; every file is checked against the manifest first. dtype: see tinyld.shrink."""
    folder = RunFolder.open(path)
    model_config = read_model_config(folder)
    folder.read(TOKENIZER)
    tokenizer = Tokenizer.load(path / TOKENIZER)
    if tokenizer.vocab_size != model_config.vocab_size:
        raise TinyldError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model_config.vocab_size}"
        )
    tensors = folder.read_tensors(MODEL)
    check_amount(model_config.num_parameters(), tensors, path / MODEL)
    model = Denoiser(model_config)
    load_exactly(dict(model.named_parameters()), tensors, path / MODEL)
    shrink(model, dtype)
    return Base(path, model.to(device).eval(), tokenizer, fingerprint(folder), dtype, stored_bytes(model))


def check_amount(asked: int, tensors: Mapping[str, Tensor], path: Path) -> None:
    """TinyldError when a config asks for far more values than its file holds: nothing is allocated for those."""
    held = sum(t.numel() for t in tensors.values())
    if asked > 2 * held:
        raise TinyldError(f"{path}: holds {held:,} values, but {CONFIG} asks for {asked:,}")


@torch.no_grad()
def load_exactly(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Copies `tensors` into `parameters`; names and shapes must be the same on both sides. `path` is for the error."""
    missing, extra = sorted(set(parameters) - set(tensors)), sorted(set(tensors) - set(parameters))
    if missing or extra:
        parts = [
            f"{word} {', '.join(names[:3])}" for word, names in (("missing", missing), ("unexpected", extra)) if names
        ]
        raise TinyldError(f"{path}: the tensors do not fit: {'; '.join(parts)}")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            shapes = f"{tuple(tensors[name].shape)} in the file, {tuple(parameter.shape)} expected"
            raise TinyldError(f"{path}: tensor {name!r} has the wrong shape: {shapes}")
        if not tensors[name].is_floating_point():
            raise TinyldError(f"{path}: tensor {name!r} has the wrong type: {tensors[name].dtype}, expected floats")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])

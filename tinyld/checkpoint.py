"""Bases and adapters, to and from run folders: weights, tokenizer, config, and the fingerprint that names a base."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyld.config import BASE_DTYPES, ModelConfig, Reading, Settings, check, check_ours, from_dict, setting, to_dict
from tinyld.device import shrink, stored_bytes, to_int8
from tinyld.errors import TinyldError
from tinyld.methods import Full, Method, read_config
from tinyld.model import Denoiser
from tinyld.read import finite
from tinyld.rows import bundled_data_dir
from tinyld.runs import ADAPTER, CONFIG, MODEL, TOKENIZER, RunFolder, is_foreign
from tinyld.tokenizer import Tokenizer
from tinyld.write import sha256


@dataclass(frozen=True)
class BaseRecord(Settings):
    """What a run's config says of its base."""

    path: str
    fingerprint: str
    dtype: str = setting("fp32", among=BASE_DTYPES)  # that it was kept in while training
    reading: Reading = Reading()  # of a public model


@dataclass
class Base:
    """A pretrained denoiser with its tokenizer, as loaded from a folder."""

    path: Path
    model: Denoiser
    tokenizer: Tokenizer
    fingerprint: str
    dtype: str = "fp32"  # that its frozen weights are kept in
    bytes: int = 0  # of its weights in memory
    reading: Reading = Reading()

    def record(self) -> dict[str, Any]:
        return to_dict(BaseRecord(str(self.path.resolve()), self.fingerprint, self.dtype, self.reading))


def fingerprint(folder: RunFolder, reading: Reading | None = None) -> str:
    """Names a base: a digest of its stored weights, its tokenizer and its model config."""
    if is_foreign(folder.path):  # whose weights are all read for it
        return load_base(folder.path, dtype="bf16", reading=reading).fingerprint
    parts = [folder.digest(MODEL), folder.digest(TOKENIZER), json.dumps(folder.config["model"], sort_keys=True)]
    return sha256(" ".join(parts).encode())[:16]


def save_base(folder: RunFolder, tensors: Mapping[str, Tensor], tokenizer: Tokenizer, dtype: str) -> None:
    """Writes a base's tokenizer and weights. Where `dtype` is int8, each matrix X (rows, columns) is, with X.scale
    (rows,) = absmax of a row / 127, and all else bf16."""
    folder.write(TOKENIZER, tokenizer.to_json().encode())
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if dtype == "int8" and tensor.dim() == 2:
            stored[name], scale = to_int8(tensor.detach())
            stored[f"{name}.scale"] = scale[:, 0]
        else:
            stored[name] = tensor.detach().to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    folder.write_tensors(MODEL, stored)


def read_saved(folder: RunFolder) -> dict[str, Tensor]:
    """The tensors that `save_base` stored, matrices in int8 as floats again."""
    tensors, path = folder.read_tensors(MODEL), folder.path / MODEL
    scaled = [n for n, t in tensors.items() if t.dtype == torch.int8 and f"{n}.scale" in tensors]
    for name, scale in finite({n: tensors.pop(f"{n}.scale") for n in scaled}, path).items():
        if tensors[name].dim() != 2 or scale.shape != tensors[name].shape[:1]:
            raise TinyldError(f"{path}: tensor {name!r} needs one scale a row, got {tuple(scale.shape)}")
        tensors[name] = tensors[name].float() * scale[:, None]
    return tensors


def read_shape(path: Path, reading: Reading | None = None) -> tuple[ModelConfig, Tokenizer]:
    """A base's shape and tokenizer, ours or a public one's; TinyldError when the run is an adapter."""
    if is_foreign(path):
        from tinyld.foreign import read_foreign

        return (foreign := read_foreign(path, reading)).model.config, foreign.tokenizer
    check_ours(reading)
    folder = RunFolder.open(path)
    if (record := folder.config)["kind"] != "base":
        kind = "an adapter" if record["kind"] == "adapter" else "a composition"
        raise TinyldError(f"{path} is {kind}, not a base; its base is {base_record(record, path).path}")
    config = from_dict(ModelConfig, record["model"], str(path / CONFIG))
    tokenizer = Tokenizer.parse(folder.read(TOKENIZER), path / TOKENIZER)
    if tokenizer.vocab_size != config.vocab_size:
        raise TinyldError(f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")
    return config, tokenizer


def load_base(
    path: Path, device: torch.device | str = "cpu", dtype: str = "fp32", reading: Reading | None = None
) -> Base:
    """A base from its run folder, every file of which is checked against the manifest first, or a public model from its
    own. dtype: see device.shrink."""
    if is_foreign(path):
        from tinyld.foreign import load_foreign

        return load_foreign(path, device, dtype, reading)
    config, tokenizer = read_shape(path, reading)
    tensors = read_saved(RunFolder(path))
    check_amount(config.num_parameters(), [t.shape for t in tensors.values()], path / MODEL)
    model = Denoiser(config)
    load_exactly(dict(model.named_parameters()), tensors, path / MODEL)
    shrink(model, dtype)
    return Base(path, model.to(device).eval(), tokenizer, fingerprint(RunFolder(path)), dtype, stored_bytes(model))


def check_amount(asked: int, shapes: Iterable[tuple[int, ...]], path: Path) -> None:
    """TinyldError when a config asks for far more values than its file holds: nothing is allocated for those."""
    held = sum(map(math.prod, shapes))
    check(asked <= 2 * held, f"{path}: holds {held:,} values, but {CONFIG} asks for {asked:,}", TinyldError)


@torch.no_grad()
def load_exactly(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Copies `tensors` into `parameters`; names and shapes must be the same on both sides. `path` is for the error."""
    missing, extra = sorted(set(parameters) - set(tensors)), sorted(set(tensors) - set(parameters))
    if missing or extra:
        parts = [f"{word} {', '.join(n[:3])}" for word, n in (("missing", missing), ("unexpected", extra)) if n]
        raise TinyldError(f"{path}: the tensors do not fit: {'; '.join(parts)}")
    for name, tensor in finite(tensors, path).items():
        if tensor.shape != parameters[name].shape:
            shapes = f"{tuple(tensor.shape)} in the file, {tuple(parameters[name].shape)} expected"
            raise TinyldError(f"{path}: tensor {name!r} has the wrong shape: {shapes}")
        parameters[name].copy_(tensor)


def base_record(config: Mapping[str, Any], run: Path) -> BaseRecord:
    return from_dict(BaseRecord, config["base"], f"{run / CONFIG}: base")


def find_base(record: BaseRecord, run: Path) -> Path:
    """The folder of a run's base: the released one that has its fingerprint, else as recorded."""
    released, recorded = [bundled_data_dir() / name for name in ("base", "small")], Path(record.path)
    for path in released:
        if RunFolder(path).is_run() and fingerprint(RunFolder(path)) == record.fingerprint:
            return path
    if not os.path.isfile(recorded / CONFIG) and not is_foreign(recorded):
        known = f"neither a released one ({' and '.join(map(str, released))}) nor at {recorded}"
        raise TinyldError(f"the base of {run}, {record.fingerprint}, is {known}; give its folder with --base")
    return recorded


def load_base_of(
    config: Mapping[str, Any], run: Path, override: Path | None, device: torch.device | str, dtype: str | None = None,
    bases: Sequence[Base] = (),
) -> Base:  # fmt: skip
    """The base of a run as it was read then, kept in `dtype` or else as in training: one of `bases`, or of the folder
    `override`, or of the one that find_base finds."""
    record = base_record(config, run)
    dtype = dtype or record.dtype
    if shared := [base for base in bases if (base.fingerprint, base.dtype) == (record.fingerprint, dtype)]:
        return shared[0]
    base = load_base(override or find_base(record, run), device, dtype, record.reading)
    found = f"{run} was trained on base {record.fingerprint}, but {base.path} is base {base.fingerprint}"
    check(base.fingerprint == record.fingerprint, f"{found}; give its own with --base", TinyldError)
    return base


def load_adapter(
    folder: RunFolder, base_path: Path | None = None, device: torch.device | str = "cpu", dtype: str | None = None,
    bases: Sequence[Base] = (),
) -> tuple[Base, Method]:  # fmt: skip
    """(base, method): an adapter on its base, for which see `load_base_of`."""
    config = folder.config
    check(config["kind"] == "adapter", f"{folder.path} holds a {config['kind']}, not an adapter", TinyldError)
    check_frozen(config["method"]["name"], dtype or "fp32")
    tensors = folder.read_tensors(ADAPTER)
    base = load_base_of(config, folder.path, base_path, device, dtype, bases)
    return base, load_method(config["method"], tensors, base, folder)


def load_method(record: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, folder: RunFolder) -> Method:
    """What a run recorded and stored of its method, on its base; refuses one that asks for more than is stored."""
    kind, settings = read_config(record, str(folder.path / CONFIG))
    asked = kind.expected_parameters(settings, base.model.config)
    check_amount(asked, [t.shape for t in tensors.values()], folder.path / ADAPTER)
    with torch.random.fork_rng([]):  # what it begins as is drawn
        method = kind(settings, base.model)
    load_exactly(method.own, tensors, folder.path / ADAPTER)
    return method


def method_record(method: Method) -> dict[str, Any]:
    return {"name": method.name, **to_dict(method.config)}


def sizes(method: Method, base: Base) -> dict[str, Any]:
    """Trainable, stored and base parameters, and bytes: the one place where they are counted."""
    own, count = method.own.values(), base.model.config.num_parameters()
    stored, size = sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own)
    return {
        "trainable_parameters": stored, "stored_parameters": stored, "stored_bytes": size, "base_parameters": count,
        "base_bytes": base.bytes, "stored_percent": 100 * stored / count,
    }  # fmt: skip


def check_frozen(method: str, dtype: str) -> None:
    idle = f"--base-dtype {dtype} is for frozen weights; full trains them all"
    check(dtype == "fp32" or method != Full.name, idle)

"""Folders of public diffusion language models, as bases: `config.json`, `tokenizer.json` and safetensors, in shards or
not. Everything is checked by names, shapes and ids before any weights are read; tensors are then read one by one into
the type that the base is kept in.
"""

from __future__ import annotations

import hashlib
import json
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor, nn

from tinyld.checkpoint import Base
from tinyld.config import ModelConfig, check_choice, to_dict
from tinyld.device import BASE_DTYPES, shrink, stored_bytes
from tinyld.errors import TinyldError, UsageError
from tinyld.families import BLOCKWISE, FAMILIES, IGNORED, REFUSED, Family, Make, Settings, same
from tinyld.layers import rotary_tables
from tinyld.methods import METHODS, make_config
from tinyld.model import Denoiser
from tinyld.read import as_object, parse_json, read_object, read_text, refuse_pickled
from tinyld.tokenizer import ROLES, Tokenizer, check_patterns, malformed_refused

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
MAX_ROW = 2_048  # tokens of a row, where the caller names no number
FLOATS = ("F64", "F32", "F16", "BF16")
TYPES = typing.get_type_hints(ModelConfig)


class Weights:
    """The tensors of a folder's safetensors files; shapes are known at once, values when asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.files: dict[str, Path] = {}
        names = sorted(p.name for p in folder.iterdir())
        whole, index = [n for n in names if n.endswith(".safetensors")], None
        if INDEX in names:
            index = as_object(read_object(folder / INDEX)["weight_map"], folder / INDEX)
            if not set(map(str, index.values())) <= set(whole):
                raise TinyldError(f"{folder / INDEX}: weight_map must name a file of this folder for every tensor")
        elif len(whole) != 1:
            if not whole:
                refuse_pickled(folder, names)
            raise TinyldError(f"no model in {folder}: expected one safetensors file, or {INDEX}; found {len(whole)}")
        for name in whole if index is None else sorted(set(index.values())):
            with self.opened(folder / name) as file:
                for tensor in file.keys():  # noqa: SIM118 (it is no dict)
                    part = file.get_slice(tensor)
                    if part.get_dtype() not in FLOATS:
                        raise TinyldError(f"{folder / name}: tensor {tensor!r} is {part.get_dtype()}, expected floats")
                    if index is not None and index.get(tensor) != name:
                        raise TinyldError(f"{folder / name}: tensor {tensor!r} is not where {INDEX} says")
                    self.shapes[tensor], self.files[tensor] = tuple(part.get_shape()), folder / name
        missing = sorted(set(index or ()) - set(self.files))
        if missing:
            raise TinyldError(f"{folder / INDEX}: tensor {missing[0]!r} is in none of the files")

    def opened(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise TinyldError(f"{path}: damaged safetensors file ({str(error)[:100]})") from None

    def read(self, name: str) -> Tensor:
        """A copy of one tensor; its file is closed again, so that nothing more of it stays in memory."""
        with self.opened(self.files[name]) as file:
            tensor = file.get_tensor(name)
            tensor = tensor.float() if tensor.dtype == torch.float64 else tensor.clone()
        if not bool(torch.isfinite(tensor).all()):
            raise TinyldError(f"{self.files[name]}: tensor {name!r} holds values that are not finite")
        return tensor


@dataclass
class Foreign:
    """A folder that is understood; no weights are read yet."""

    family: str
    config: ModelConfig
    tokenizer: Tokenizer
    weights: Weights
    longest: int  # tokens that the model was made for
    plan: dict[str, tuple[Make, tuple[str, ...]]]  # our tensor: how it is made, and of which of theirs


def read_foreign(folder: Path, max_length: int | None = None, mask_token: str | None = None) -> Foreign:
    """What a folder holds; TinyldError, in one line, for anything that is not understood or does not fit."""
    if not folder.is_dir():
        raise TinyldError(f"no model in {folder}: no such folder")
    where, weights = folder / CONFIG, Weights(folder)
    bare = not where.exists() and "transformer.wte.weight" in weights.shapes
    raw = {"model_type": "smdm"} if bare else read_object(where)
    kind = str(raw.get("model_type"))[:40]
    blockwise = "bd3lm" in f"{folder.resolve().name} {raw.get('_name_or_path')}".lower()
    if kind in REFUSED or (kind in FAMILIES and blockwise):
        raise TinyldError(f"{where}: this {kind} {REFUSED.get(kind, BLOCKWISE)}, which tinyld does not read")
    if kind not in FAMILIES:
        raise TinyldError(f"{where}: model_type must be one of {', '.join(FAMILIES)}, got {kind!r}")
    family = FAMILIES[kind]
    settings = Settings(raw, where, f"{IGNORED} {family.ignored}")
    shape = {ours: settings.get(key, TYPES[ours]) for ours, key in family.sizes.items()}
    if settings.raw.get("tie_word_embeddings") is None and "tied" not in family.fixed and "weight_tying" not in raw:
        shape["tied"] = f"{family.parts['output']}.weight" not in weights.shapes
    shape |= family.fixed | family.more(settings, weights.shapes)
    settings.only(family.only)
    settings.finish()
    rows, longest = shape["vocab_size"], shape["max_length"]
    if max_length is not None and max_length > longest:
        raise UsageError(f"max_length must be at most the {longest} of {folder}, got {max_length}")
    tokenizer = read_tokenizer(folder, settings, family, rows, mask_token)
    shape |= {"max_length": min(longest, max_length or MAX_ROW), "vocab_size": tokenizer.vocab_size}
    try:  # the rows that pad the vocabulary to a round size are left out
        config = ModelConfig(**shape)
    except (UsageError, OverflowError) as error:
        raise TinyldError(f"{where}: {error}") from None
    held = sum(torch.Size(s).numel() for s in weights.shapes.values())
    if config.num_parameters() > 2 * held:
        raise TinyldError(f"{folder}: holds {held:,} values, but {CONFIG} asks for {config.num_parameters():,}")
    foreign = Foreign(kind, config, tokenizer, weights, longest, {})
    with torch.device("meta"):
        model = Denoiser(config)
    for name, parameter in model.named_parameters():
        wanted = list(parameter.shape)
        if name in ("embedding.weight", "output.weight", "output_bias"):
            wanted[0] += rows - config.vocab_size
        foreign.plan[name] = find_part(weights, config, family, name, torch.Size(wanted))
    used = {theirs for _, names in foreign.plan.values() for theirs in names}
    extra = [n for n in weights.shapes if n not in used and n not in family.ignored.split()]
    if extra:
        raise TinyldError(f"{weights.files[extra[0]]}: tensor {extra[0]!r} has no place in a {kind} of this config")
    return foreign


def find_part(
    weights: Weights, config: ModelConfig, family: Family, name: str, shape: torch.Size
) -> tuple[Make, tuple[str, ...]]:
    """(how one of our tensors is made, of which of theirs), tried on their shapes alone."""
    key, number = re.sub(r"^blocks\.\d+", "blocks", name), re.search(r"\d+", name)
    module, _, suffix = key.rpartition(".")
    entry, tail = (family.parts[key], "") if key in family.parts else (family.parts[module], f".{suffix}")
    make, *names = (same, entry) if isinstance(entry, str) else entry
    names = [n.format(i=number and number[0]) + tail for n in names]
    missing = next((n for n in names if n not in weights.shapes), None)
    if missing:
        raise TinyldError(f"{weights.folder}: no tensor {missing!r}, which its config asks for")
    shapes = [weights.shapes[n] for n in names]
    try:
        fits = make(config, *(torch.empty(s, device="meta") for s in shapes)).shape == shape
    except (RuntimeError, IndexError, ValueError):
        fits = False
    if not fits:
        found = f"{', '.join(map(str, shapes[:2]))} for our {name} of {tuple(shape)}"
        raise TinyldError(f"{weights.files[names[0]]}: tensor {names[0]!r} has the wrong shape: {found}")
    return make, tuple(names)


def read_tokenizer(folder: Path, settings: Settings, family: Family, rows: int, mask_token: str | None) -> Tokenizer:
    """tokenizer.json, with the ids of its special tokens by config, tokenizer_config.json or the family's row."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TinyldError(f"no tokenizer in {folder}: put the tokenizer.json that its model was trained with there")
    text = read_text(path)
    check_patterns(parse_json(text, path), path)
    with malformed_refused(path):
        inner = HFTokenizer.from_str(text)
    extra = folder / "tokenizer_config.json"
    named = read_object(extra) if extra.is_file() else {}
    named = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items()}

    def token(*roles: str) -> int | None:
        """The id that the tokenizer's folder, or else the config, gives a role."""
        for role in roles:
            name, said = named.get(f"{role}_token"), settings.raw.get(f"{role}_token_id")
            said = said[0] if isinstance(said, list) and said else said
            found = inner.token_to_id(name) if isinstance(name, str) else None
            if name is not None and found is None:
                raise TinyldError(f"{extra}: {role}_token {str(name)[:40]!r} is not in tokenizer.json")
            if role == "mask" and None not in (found, said) and found != said:
                raise TinyldError(f"{folder}: mask is {said} in {CONFIG}, {found} in {extra.name}; say --mask-token")
            if found is not None or (isinstance(said, int) and not isinstance(said, bool)):
                return said if found is None else found
        return None

    if mask_token is not None:
        mask = inner.token_to_id(mask_token)
        if mask is None:
            raise UsageError(f"--mask-token {mask_token!r} is no token of {path}")
    else:
        mask = token("mask")
        mask = rows - 1 if mask is None and family.mask is None else mask
        mask = inner.token_to_id(family.mask) if mask is None and family.mask else mask
        if mask is None:
            raise TinyldError(f"{folder}: nothing says which token is the mask; say it with --mask-token")
    size = max(inner.get_vocab().values(), default=-1) + 1
    if size <= mask < min(rows, size + 300):  # rows of the model's that the tokenizer has no name for
        inner.add_special_tokens([f"<|token {i}|>" for i in range(size, mask + 1)])
    eos = token("eos", "sep")
    if eos is None:
        raise TinyldError(f"{folder}: neither {CONFIG} nor {extra.name} says which token ends a text (eos_token)")
    bos, pad = token("bos", "cls"), token("pad")
    unk = inner.token_to_id(named["unk_token"]) if isinstance(named.get("unk_token"), str) else None
    ids = (eos if pad is None else pad, unk, eos if bos is None else bos, eos, mask)
    tokenizer = Tokenizer(inner, str(path), dict(zip(ROLES, ids, strict=True)))
    if not all(i is None or 0 <= i < tokenizer.vocab_size for i in ids) or tokenizer.vocab_size > rows:
        raise TinyldError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}; ids: {ids}")
    return tokenizer


# ------------------------------------------------------------------------------------------------ what others call


@torch.no_grad()
def load_foreign(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: str = "fp32",
    max_length: int | None = None,
    mask_token: str | None = None,
) -> Base:
    """A public model as a base, kept in `dtype` (see tinyld.shrink); memory peaks at the base and one tensor."""
    check_choice("base dtype", dtype, BASE_DTYPES)
    foreign = read_foreign(folder, max_length, mask_token)
    config, weights = foreign.config, foreign.weights
    with torch.device("meta"):
        model = Denoiser(config).eval()
    if config.rotary:
        model.cos, model.sin = (table.to(device) for table in rotary_tables(config))
    digest = hashlib.sha256(f"{json.dumps(to_dict(config), sort_keys=True)}{foreign.tokenizer.to_json()}".encode())
    owners = [(f"{prefix}." if prefix else "", module) for prefix, module in model.named_modules()]
    own = {name: dict(module.named_parameters(prefix=name[:-1], recurse=False)) for name, module in owners}
    for prefix, module in sorted(owners, key=lambda owner: -sum(p.numel() for p in own[owner[0]].values())):
        for name, parameter in own[prefix].items():
            make, names = foreign.plan[name]
            theirs = [weights.read(n) for n in names]
            for tensor in theirs:
                digest.update(tensor.view(torch.uint8).numpy())
            theirs = [t.float() for t in theirs] if make is not same or dtype == "fp32" else theirs
            made = make(config, *theirs)
            made = made if len(made) == len(parameter) else made[: len(parameter)]
            shrinks = isinstance(module, nn.Linear | nn.Embedding) and name.endswith("weight")
            made = made.to(device) if shrinks and dtype != "fp32" else made.to(device).float()
            made = made.clone() if made._base is not None else made  # so that the rest of theirs can go
            setattr(module, name.removeprefix(prefix), nn.Parameter(made))
            del theirs, made
        if isinstance(module, nn.Linear | nn.Embedding):
            shrink(module, dtype)
    return Base(folder, model, foreign.tokenizer, digest.hexdigest()[:16], dtype, stored_bytes(model))


def describe(folder: Path, mask_token: str | None = None, rows: int = 8, length: int = 256) -> dict[str, Any]:
    """What a folder is and what adapting it takes, by method, for batches of `rows` rows of `length` tokens.

    No weights are read. Memory is an estimate: the base in bf16, what is trained in fp32 with its gradient and AdamW's
    two moments, and the activations that the backward pass needs.
    """
    foreign = read_foreign(folder, None, mask_token)
    config = foreign.config
    with torch.device("meta"):
        tensors = list(Denoiser(config).parameters())
    flat = sum(p.numel() for p in tensors if p.dim() == 1)
    matrices, heights = (sum(n) for n in zip(*((p.numel(), p.shape[0]) for p in tensors if p.dim() == 2), strict=True))
    base = {"fp32": 4 * (flat + matrices), "bf16": 4 * flat + 2 * matrices, "int8": 4 * (flat + heights) + matrices}
    sizes = config.matrices()
    block = rows * length * (8 * config.d_model + 2 * sum(outputs for _, outputs in sizes.values()))  # bytes
    methods = {}
    for name, method in METHODS.items():
        try:
            settings = make_config(name, {}, config)
        except UsageError:
            continue
        stored = method.expected_parameters(settings, config)
        if stored == 0:  # bitfit, where there are no biases
            continue
        through = max(getattr(settings, "blocks", config.num_layers), 1) * block  # at least the one block that runs
        kept = base["fp32"] if name == "full" else base["bf16"]
        memory = kept + (12 if name == "full" else 16) * stored + through
        methods[name] = {"stored_parameters": stored, "stored_bytes": 4 * stored, "memory_bytes": memory}
    return {
        "family": foreign.family, "parameters": config.num_parameters(), "layers": config.num_layers,
        "d_model": config.d_model, "heads": config.num_heads, "vocab_size": config.vocab_size,
        "longest_row": foreign.longest, "shifted": config.shifted,
        "mask_token": foreign.tokenizer.inner.id_to_token(foreign.tokenizer.mask_id),
        "end_token": foreign.tokenizer.inner.id_to_token(foreign.tokenizer.eos_id), "base_bytes": base,
        "batch": {"rows": rows, "tokens": length}, "methods": methods,
    }  # fmt: skip

"""Folders of public models: `config.json`, `tokenizer.json` and safetensors, in shards or not, read by tinyld.families.

Everything is checked by names, shapes and ids before any weights are read; tensors are then read one by one into the
type that the base is kept in.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from tinyld.checkpoint import Base
from tinyld.config import ModelConfig, Reading, check_choice, to_dict
from tinyld.device import BASE_DTYPES, shrink, stored_bytes
from tinyld.errors import TinyldError, UsageError, show
from tinyld.families import BLOCKWISE, FAMILIES, IGNORED, REFUSED, Family, Make, Said, same
from tinyld.layers import rotary_tables
from tinyld.model import Denoiser
from tinyld.read import TENSORS_BYTES, as_object, opened, read_bytes, read_object, read_text, refuse_pickled
from tinyld.tokenizer import ROLES, Tokenizer

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
MAX_ROW = 2_048  # tokens of a row, where the caller names no number
FLOATS = ("F64", "F32", "F16", "BF16")
TYPES = typing.get_type_hints(ModelConfig)
# Chat templates by a token that they name: what stands before a prompt, between it and its answer, and at the end. They
# are programs (Jinja), which are never run: one of another form is refused.
CHATS = {
    "<|im_start|>": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "<|start_header_id|>": (
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
}


class Weights:
    """The tensors of a folder's safetensors files; shapes are known at once, values when asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kept: dict[str, tuple[Path, str, str]] = {}  # file, name in it, type
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else ["no such folder"]
        whole, index = [n for n in names if n.endswith(".safetensors")], None
        if INDEX in names:
            index = as_object(read_object(folder / INDEX)["weight_map"], folder / INDEX)
            if not set(map(str, index.values())) <= set(whole):
                raise TinyldError(f"{folder / INDEX}: weight_map must name a file of this folder for every tensor")
        elif len(whole) != 1:
            refuse_pickled(folder, () if whole else names)
            found = ", ".join(names[:8]) or "nothing"
            raise TinyldError(f"no model in {folder}: expected model.safetensors or {INDEX}, found {found}")
        for name in whole if index is None else sorted(set(index.values())):
            with safetensors(folder / name) as file:
                for tensor in file.keys():  # noqa: SIM118 (it is no dict)
                    part = file.get_slice(tensor)
                    if index is not None and index.get(tensor) != name:
                        raise TinyldError(f"{folder / name}: tensor {tensor!r} is not where {INDEX} says")
                    self.shapes[tensor] = tuple(part.get_shape())
                    self.kept[tensor] = (folder / name, tensor, part.get_dtype())
        missing = sorted(set(index or ()) - set(self.shapes))
        if missing:
            raise TinyldError(f"{folder / INDEX}: tensor {missing[0]!r} is in none of the files")

    def renamed(self, prefix: str) -> None:
        """An encoder's names as of today: with their prefix, and no gamma or beta of a norm, as BERT's first files."""
        alone = "" if any(name.startswith(prefix) for name in self.shapes) else prefix
        for at in (self.shapes, self.kept):
            for name in list(at):
                new = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
                at[alone + new] = at.pop(name)

    def read(self, name: str) -> Tensor:
        """A copy of one tensor; its file is closed again, so that nothing more of it stays in memory."""
        path, stored, kind = self.kept[name]
        with safetensors(path) as file:
            tensor = file.get_tensor(stored)
            tensor = tensor.float() if kind == "F64" else tensor.clone()
        if not all(bool(torch.isfinite(part).all()) for part in tensor.view(-1).split(1 << 22)):
            raise TinyldError(f"{path}: tensor {stored!r} holds values that are not finite")
        return tensor


def safetensors(path: Path) -> Any:
    try:
        with opened(path, TENSORS_BYTES):  # a regular one
            return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise TinyldError(f"{path}: damaged safetensors file ({str(error)[:100]})") from None


@dataclass
class Foreign:
    """A folder that is understood; no weights are read yet."""

    family: str
    config: ModelConfig
    tokenizer: Tokenizer
    weights: Weights
    longest: int  # tokens that the model was made for
    has_head: bool  # whether it can write; an encoder without a head gets the identity for one, to be trained
    plan: dict[str, tuple[Make, list[str], torch.Size]]  # our tensor: how it is made, of which of theirs; its shape

    def read(self, name: str, wide: bool = True, seen: Callable[[Tensor], Any] = lambda tensor: None) -> Tensor:
        """One of our tensors, in float32, or with wide=False as stored where it is one of theirs; they are `seen`."""
        make, names, shape = self.plan[name]
        theirs = [self.weights.read(n) for n in names]
        for tensor in theirs:
            seen(tensor)
        made = make(self.config, *(t.float() if wide or make is not same else t for t in theirs))
        made = made[: shape[0]]  # the rows that pad the vocabulary to a round size are left out
        return made.clone() if made._base is not None else made  # so that the rest of theirs can go


def read_foreign(folder: Path, reading: Reading | None = None) -> Foreign:
    """What a folder holds; TinyldError, in one line, for anything that is not understood or does not fit."""
    stamp = tuple(sorted((p.name, s.st_size, s.st_mtime_ns) for p in folder.glob("*") if (s := p.lstat())))
    return _read(folder, reading or Reading(), stamp)


@functools.lru_cache(maxsize=1)  # a run asks for the config, for the tokenizer and for the weights
def _read(folder: Path, reading: Reading, stamp: Any) -> Foreign:
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
    if family.prefix:
        weights.renamed(family.prefix)
    said = Said(raw, where, f"{IGNORED} {family.ignored}")
    shape = {ours: said.get(key, TYPES[ours]) for ours, key in family.sizes.items()}
    if raw.get("tie_word_embeddings") is None and "tied" not in family.fixed and "weight_tying" not in raw:
        shape["tied"] = f"{family.parts['output']}.weight" not in weights.shapes
    shape |= family.fixed | family.more(said, weights.shapes)
    said.only(family.only)
    if not family.prefix:
        said.finish()
    rows, longest, length = shape["vocab_size"], shape["max_length"], reading.max_length
    if length is not None and length > longest and not family.prefix:
        raise UsageError(f"max_length must be at most the {longest} of {folder}, got {length}")
    tokenizer = read_tokenizer(folder, said, family, rows, reading)
    shape |= {"max_length": min(longest, length or MAX_ROW), "vocab_size": tokenizer.vocab_size}
    try:
        config = ModelConfig(**shape)
    except (UsageError, OverflowError) as error:
        raise TinyldError(f"{where}: {error}") from None
    held = sum(torch.Size(s).numel() for s in weights.shapes.values())
    if config.num_parameters() > 2 * held:
        raise TinyldError(f"{folder}: holds {held:,} values, but {CONFIG} asks for {config.num_parameters():,}")
    headless = bool(family.prefix) and f"{family.parts['head_transform.0']}.weight" not in weights.shapes
    foreign = Foreign(kind, config, tokenizer, weights, longest, not headless, {})
    with torch.device("meta"):
        model = Denoiser(config)
    for name, parameter in sorted(model.named_parameters()):
        foreign.plan[name] = plan(foreign, family, name, parameter.shape, rows - config.vocab_size)
    used = {theirs for _, names, _ in foreign.plan.values() for theirs in names}
    for name in weights.shapes:
        if name not in used and name not in family.ignored.split() and not family.prefix:
            raise TinyldError(f"{weights.kept[name][0]}: tensor {name!r} has no place in a {kind} of this config")
    return foreign


def theirs_of(family: Family, name: str) -> tuple[Make, list[str]]:
    """(how one of our tensors is made, of which of a family's)."""
    key, number = re.sub(r"^blocks\.\d+", "blocks", name), re.search(r"\d+", name)
    module, _, suffix = key.rpartition(".")
    entry, tail = (family.parts[key], "") if key in family.parts else (family.parts[module], f".{suffix}")
    make, *names = (same, entry) if isinstance(entry, str) else entry
    return make, [n.format(i=number and number[0]) + tail for n in names]


def plan(
    foreign: Foreign, family: Family, name: str, shape: torch.Size, padding: int
) -> tuple[Make, list[str], torch.Size]:
    """`theirs_of`, tried on shapes alone, and what is ours; `padding` rows of a vocabulary are theirs."""
    weights, (make, names) = foreign.weights, theirs_of(family, name)
    names = [n.rstrip("?") for n in names if not n.endswith("?") or n.rstrip("?") in weights.shapes]
    if not foreign.has_head and name.startswith(("head_transform", "output_bias")):
        ones = float(name == "head_transform.2.weight")
        return lambda config: torch.eye(*shape) if len(shape) == 2 else torch.full(shape, ones), [], shape
    missing = next((n for n in names if n not in weights.shapes), None)
    if missing:
        raise TinyldError(f"{weights.folder}: no tensor {missing}, which its config asks for")
    for file, stored, kind in (weights.kept[n] for n in names):
        if kind not in FLOATS:
            raise TinyldError(f"{file}: tensor {stored!r} is {kind}, expected floats")
    shapes = [weights.shapes[n] for n in names]
    padded = name in ("embedding.weight", "output.weight", "output_bias")
    try:
        made = make(foreign.config, *(torch.empty(s, device="meta") for s in shapes)).shape
    except (RuntimeError, IndexError, ValueError):
        made = torch.Size()
    if made != torch.Size((shape[0] + padding * padded, *shape[1:])):
        found = f"{', '.join(map(str, shapes[:2]))} in {names[0]}, {tuple(shape)} expected"
        raise TinyldError(f"{weights.kept[names[0]][0]}: tensor {name!r} has the wrong shape: {found}")
    return make, names, shape


# ------------------------------------------------------------------------------------------------ tokenizers


def read_tokenizer(folder: Path, said: Said, family: Family, rows: int, reading: Reading) -> Tokenizer:
    """tokenizer.json, with the ids of its special tokens by config, tokenizer_config.json or the family's row; an
    encoder's says them by their names, and may be a vocab.txt."""
    path, extra = folder / "tokenizer.json", folder / "tokenizer_config.json"
    raw = read_object(extra) if extra.is_file() else {}
    named = {k: v.get("content") if isinstance(v, dict) else v for k, v in raw.items()}

    def token(inner: HFTokenizer, *roles: str) -> int | None:
        """The id that the tokenizer's folder, or else the config, gives a role."""
        for role in roles:
            name, stated = named.get(f"{role}_token"), said.raw.get(f"{role}_token_id")
            stated = stated[0] if isinstance(stated, list) and stated else stated
            found = inner.token_to_id(name) if isinstance(name, str) else None
            if name is not None and found is None:
                raise TinyldError(f"{extra}: {role}_token {show(name)} is not in tokenizer.json")
            if role == "mask" and None not in (found, stated) and found != stated:
                raise TinyldError(
                    f"{folder}: mask is {stated} in {CONFIG}, {found} in {extra.name}; say --set mask_token=TOKEN"
                )
            if found is not None or (isinstance(stated, int) and not isinstance(stated, bool)):
                return stated if found is None else found
        return None

    def roles(inner: HFTokenizer) -> dict[str, Any]:
        if reading.mask_token is not None:
            mask = inner.token_to_id(reading.mask_token)
            if mask is None:
                raise UsageError(f"mask_token {reading.mask_token!r} is no token of {path}")
        else:
            mask = token(inner, "mask")
            mask = rows - 1 if mask is None and family.mask is None else mask
            mask = inner.token_to_id(family.mask) if mask is None and family.mask else mask
            if mask is None:
                raise TinyldError(f"{folder}: nothing says which token is the mask; say it by --set mask_token=TOKEN")
        size = max(inner.get_vocab().values(), default=-1) + 1
        if size <= mask < min(rows, size + 300):  # rows of the model's that the tokenizer has no name for
            inner.add_special_tokens([f"<|token {i}|>" for i in range(size, mask + 1)])
        eos, bos = token(inner, "eos", "sep"), token(inner, "bos", "cls")
        chat = read_chat(folder, inner, named.get("chat_template"), bos) if reading.chat else {}
        if eos is None and not chat:
            raise TinyldError(f"{folder}: neither {CONFIG} nor {extra.name} says which token ends a text (eos_token)")
        pad, unk = token(inner, "pad"), named.get("unk_token")
        ids = (eos if pad is None else pad, inner.token_to_id(unk) if isinstance(unk, str) else None,
               eos if bos is None else bos, eos, mask)  # fmt: skip
        return dict(zip(ROLES, ids, strict=True)) | chat

    if path.is_file():
        by_name = family.prefix and reading.mask_token is None and not reading.chat
        tokenizer = Tokenizer.parse(read_bytes(path), path, None if by_name else roles)
    elif family.prefix and (folder / "vocab.txt").is_file():
        tokenizer = from_vocabulary(folder / "vocab.txt", bool(named.get("do_lower_case", True)))
    else:
        raise TinyldError(f"no tokenizer in {folder}: expected tokenizer.json or vocab.txt, of an encoder")
    if tokenizer.vocab_size > rows:
        raise TinyldError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}")
    return tokenizer


def from_vocabulary(path: Path, lowercase: bool) -> Tokenizer:
    """BERT's own tokenizer of a `vocab.txt`, a piece a line."""
    vocab = {piece: i for i, piece in enumerate(read_text(path).split("\n")) if piece}
    inner = HFTokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(prefix="##")
    inner.add_special_tokens([s for s in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if s in vocab])
    return Tokenizer(inner, str(path))


def read_chat(folder: Path, inner: HFTokenizer, template: Any, bos: int | None) -> dict[str, Any]:
    """What a chat puts around a prompt, as ids: `start`, `turn` and its end; without a system's turn."""
    path = folder / "chat_template.jinja"
    template = read_text(path) if path.is_file() else template
    if not isinstance(template, str):
        raise TinyldError(f"no chat template in {folder}: leave chat out")
    known = [c for mark, c in CHATS.items() if mark in template]
    names = {name for parts in known for name in re.findall(r"<\|\w+\|>", "".join(parts))}
    if len(known) != 1 or any(inner.token_to_id(name) is None for name in names):
        raise TinyldError(f"{folder}: its chat template is of no form that tinyld knows ({', '.join(CHATS)}); "
                          "leave chat out")  # fmt: skip
    start, turn, end = (inner.encode(part, add_special_tokens=False).ids for part in known[0])
    begin = [] if bos is None or "bos_token" not in template else [bos]
    return {"start": begin + start, "turn": turn, "eos": end[0]}


# ------------------------------------------------------------------------------------------------ what others call


@torch.no_grad()
def load_foreign(
    folder: Path, device: torch.device | str = "cpu", dtype: str = "fp32", reading: Reading | None = None
) -> Base:
    """A public model as a base, kept in `dtype` (see tinyld.shrink); memory peaks at the base and one tensor."""
    check_choice("base dtype", dtype, BASE_DTYPES)
    foreign = read_foreign(folder, reading)
    config, tokenizer = foreign.config, foreign.tokenizer
    if not foreign.has_head:
        raise TinyldError(f"{folder} has no head that writes words; begin a base with it: tinyld pretrain --init")
    with torch.device("meta"):
        model = Denoiser(config).eval()
    if config.rotary:
        model.cos, model.sin = (table.to(device) for table in rotary_tables(config))
    digest = hashlib.sha256(f"{json.dumps(to_dict(config), sort_keys=True)}{tokenizer.to_json()}".encode())
    owners = [(f"{prefix}." if prefix else "", module) for prefix, module in model.named_modules()]
    own = {name: dict(module.named_parameters(prefix=name[:-1], recurse=False)) for name, module in owners}
    for prefix, module in sorted(owners, key=lambda owner: -sum(p.numel() for p in own[owner[0]].values())):
        is_shrunk = isinstance(module, nn.Linear | nn.Embedding) and dtype != "fp32"
        for name in own[prefix]:
            narrow = is_shrunk and name.endswith("weight")
            made = foreign.read(name, not narrow, lambda t: digest.update(t.view(torch.uint8).numpy())).to(device)
            setattr(module, name.removeprefix(prefix), nn.Parameter(made))
            del made
        if is_shrunk:
            shrink(module, dtype)
    return Base(folder, model, tokenizer, digest.hexdigest()[:16], dtype, stored_bytes(model), reading or Reading())

"""Folders of public models: `config.json`, `tokenizer.json` and safetensors, in shards or not, read by tinyld.families.

Everything is checked by names, shapes and ids before any weights are read; tensors are then read one by one into the
type that the base is kept in.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor, nn

from tinyld.attention import rotary_tables
from tinyld.checkpoint import Base, check_amount
from tinyld.config import ModelConfig, Reading, check, check_type, to_dict, types_of
from tinyld.device import shrink, stored_bytes
from tinyld.errors import TinyldError, UsageError, show
from tinyld.families import FAMILIES, IGNORED, Family, Make, Said, same
from tinyld.model import Denoiser
from tinyld.read import TENSORS_BYTES, opened, read_bytes, read_object, read_text
from tinyld.runs import CONFIG, INDEX, MODEL, TOKENIZER
from tinyld.tokenizer import ROLES, Tokenizer, parse_tokenizer

MAX_ROW = 2_048  # tokens of a row, where the caller names no number
TYPES = types_of(ModelConfig)
FLOATS = ("F64", "F32", "F16", "BF16")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Chat templates that we know by their first token: what stands before a prompt, and between it and its answer, which
# ends as the prompt does. They are programs (Jinja), which are never run: one of another form is refused.
CHATS = (
    ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
)


class Stored(NamedTuple):
    """A tensor in a safetensors file, whose shape is known and whose values are read when asked for."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """A copy; its file is closed again, so that nothing more of it stays in memory."""
        with safetensors(self.path) as file:
            tensor = file.get_tensor(self.name).clone()
        if not all(bool(torch.isfinite(part).all()) for part in tensor.view(-1).split(1 << 22)):
            raise TinyldError(f"{self.path}: tensor {self.name!r} holds values that are not finite")
        return tensor


def safetensors(path: Path) -> Any:
    try:
        with opened(path, TENSORS_BYTES):  # a regular one
            return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise TinyldError(f"{path}: damaged safetensors file ({str(error)[:100]})") from None


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder's one safetensors file, or of those that its index names."""
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else ["no such folder"]
    files = whole = {n for n in names if n.endswith(".safetensors")}
    if MODEL in whole:  # beside which transformers may leave an older index
        files = {MODEL}
    elif INDEX in names:
        files = set(map(str, read_object(folder / INDEX, {"weight_map": dict})["weight_map"].values()))
        if not files <= whole:
            raise TinyldError(f"{folder / INDEX}: weight_map must name a file of this folder for every tensor")
    elif len(whole) != 1:
        pickled = next((name for name in names if not whole and name.endswith(PICKLED)), None)
        way_out = "AutoModel.from_pretrained(DIR).save_pretrained(DIR, safe_serialization=True)"
        risk = "pickled weights can run code when read, so tinyld does not; convert them where you trust them"
        check(not pickled, f"{folder / str(pickled)}: {risk}: {way_out}", TinyldError)
        found = ", ".join(names[:8]) or "nothing"
        raise TinyldError(f"no model in {folder}: expected {MODEL} or {INDEX}, found {found}")
    tensors: dict[str, Stored] = {}
    for path in sorted(folder / name for name in files):
        with safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                if name in tensors:
                    raise TinyldError(f"{path}: tensor {name!r} is in {tensors[name].path} already")
                part = file.get_slice(name)
                tensors[name] = Stored(path, name, part.get_dtype(), tuple(part.get_shape()))
    return tensors


def named_today(tensors: dict[str, Stored], prefix: str) -> dict[str, Stored]:
    """An encoder's tensors with their prefix, and no gamma or beta of a norm, as BERT's first files have."""
    alone = "" if any(name.startswith(prefix) for name in tensors) else prefix
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    return {alone + re.sub("|".join(old), lambda m: old[m[0]], name): tensor for name, tensor in tensors.items()}


class Foreign(NamedTuple):
    """A folder that is understood; no weights are read yet."""

    family: str
    model: Denoiser  # without weights
    tokenizer: Tokenizer
    longest: int  # tokens that the model was made for
    plan: dict[str, tuple[Make, list[Stored]]]  # our tensor: how it is made, of which of theirs; maybe not of a head
    twin: Stored | None  # the head's matrix, stored though it is the embedding's


def read_foreign(folder: Path, reading: Reading | None = None) -> Foreign:
    """What a folder holds; TinyldError, in one line, for anything that is not understood or does not fit."""
    where, tensors, reading = folder / CONFIG, stored_tensors(folder), reading or Reading()
    bare = not where.exists() and "transformer.wte.weight" in tensors
    raw = {"model_type": "smdm"} if bare else read_object(where)
    kind = str(raw.get("model_type"))
    if kind not in FAMILIES:
        raise TinyldError(f"{where}: model_type must be one of {', '.join(FAMILIES)}, got {show(kind)}")
    if "bd3lm" in f"{folder.resolve().name} {raw.get('_name_or_path')}".lower():
        raise TinyldError(f"{where}: this {kind} attends block by block (block-causal), which tinyld does not read")
    family = FAMILIES[kind]
    if family.prefix:
        tensors = named_today(tensors, family.prefix)
    said, shapes = Said(raw, where, f"{IGNORED} {family.ignored}"), {name: t.shape for name, t in tensors.items()}
    shape = {ours: said.get(key, TYPES[ours]) for ours, key in family.sizes.items()}
    if raw.get("tie_word_embeddings") is None and "tied" not in family.fixed and "weight_tying" not in raw:
        shape["tied"] = f"{family.parts['output']}.weight" not in tensors
    shape |= family.fixed | family.more(said, shapes)
    said.only(family.only)
    if not family.prefix:
        said.finish()
    rows, longest, length = shape["vocab_size"], shape["max_length"], reading.max_length
    if length is not None and length > longest:
        raise UsageError(f"max_length must be at most the {longest} of {folder}, got {length}")
    tokenizer = find_tokenizer(folder, raw, family, rows, reading)
    if tokenizer.vocab_size > rows:
        raise TinyldError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}")
    shape |= {"max_length": min(longest, length or MAX_ROW), "vocab_size": tokenizer.vocab_size}
    try:
        config = ModelConfig(**shape)
    except UsageError as error:
        raise TinyldError(f"{where}: {error}") from None
    check_amount(config.num_parameters(), shapes.values(), folder)
    headless = family.prefix and f"{family.parts['head_transform.0']}.weight" not in tensors
    with torch.device("meta"):
        model = Denoiser(config).eval()
    plan = {}
    for name, parameter in sorted(model.named_parameters()):
        if headless and name.startswith(("head_transform", "output_bias")):
            continue
        make, names = theirs_of(family, name)
        if missing := [n for n in names if n not in tensors]:
            raise TinyldError(f"{folder}: no tensor {missing[0]}, which its config asks for")
        plan[name] = make, [tensors[n] for n in names]
        is_padded = name in ("embedding.weight", "output.weight", "output_bias")
        check_fit(name, *plan[name], config, parameter.shape, rows - config.vocab_size if is_padded else 0)
    used = {each for _, stored in plan.values() for each in stored}
    twin = tensors.get(f"{family.parts.get('output')}.weight") if config.tied else None
    used |= {twin} - {None}
    for name, each in tensors.items():
        if each not in used and name not in family.ignored.split() and not family.prefix:
            raise TinyldError(f"{each.path}: tensor {name!r} has no place in a {kind} of this config")
    return Foreign(kind, model, tokenizer, longest, plan, twin)


def theirs_of(family: Family, name: str) -> tuple[Make, list[str]]:
    """(how one of our tensors is made, of which of a family's)."""
    key, number = re.sub(r"^blocks\.\d+", "blocks", name), re.search(r"\d+", name)
    module, _, suffix = key.rpartition(".")
    entry, tail = (family.parts[key], "") if key in family.parts else (family.parts[module], f".{suffix}")
    make, *names = (same, entry) if isinstance(entry, str) else entry
    return make, [n.format(i=number and number[0]) + tail for n in names]


def check_fit(name: str, make: Make, stored: list[Stored], config: ModelConfig, shape: torch.Size, more: int) -> None:
    """TinyldError unless what is made of the stored tensors has floats and `shape`, with `more` rows."""
    for each in stored:
        if each.dtype not in FLOATS:
            raise TinyldError(f"{each.path}: tensor {each.name!r} is {each.dtype}, expected floats")
    try:
        made = make(config, *(torch.empty(each.shape, device="meta") for each in stored)).shape
    except (RuntimeError, IndexError, ValueError):
        made = torch.Size()
    if made != (shape[0] + more, *shape[1:]):
        found = f"{', '.join(str(each.shape) for each in stored[:2])} in {stored[0].name}, {tuple(shape)} expected"
        raise TinyldError(f"{stored[0].path}: tensor {name!r} has the wrong shape: {found}")


def find_tokenizer(folder: Path, said: Mapping[str, Any], family: Family, rows: int, reading: Reading) -> Tokenizer:
    """That of a tokenizer.json, with the special tokens that tokenizer_config.json names, config.json has the ids of
    (`said`), or the family has; an encoder's are known by their names."""
    path, extra = folder / TOKENIZER, folder / "tokenizer_config.json"
    raw = read_object(extra) if extra.is_file() else {}
    named = {k: v.get("content") if isinstance(v, dict) else v for k, v in raw.items()}
    how = "made of a vocab.txt by AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    check(path.is_file(), f"no tokenizer in {folder}: expected {TOKENIZER} ({how})", TinyldError)
    inner, _ = parse_tokenizer(read_bytes(path), path)
    if family.prefix and reading.mask_token is None and not reading.chat:
        return Tokenizer(inner, path)

    def token(*roles: str) -> int | None:
        for role in roles:
            name, stated = named.get(f"{role}_token"), said.get(f"{role}_token_id")
            stated = stated[0] if isinstance(stated, list) and stated else stated
            check_type(stated, int | None, f"{folder / CONFIG}: {role}_token_id")
            found = inner.token_to_id(name) if isinstance(name, str) else None
            if name is not None and found is None:
                raise TinyldError(f"{extra}: {role}_token {show(name)} is not in {TOKENIZER}")
            if role == "mask" and None not in (found, stated) and found != stated:
                doubt = f"mask is {stated} in {CONFIG}, {found} in {extra.name}"
                raise TinyldError(f"{folder}: {doubt}; say --set mask_token=TOKEN")
            if found is not None or stated is not None:
                return stated if found is None else found
        return None

    if (named_mask := reading.mask_token) is not None:
        mask = inner.token_to_id(named_mask)
        check(mask is not None, f"mask_token {named_mask!r} is no token of {path}")
    elif (mask := token("mask")) is None:
        mask = inner.token_to_id(family.mask) if family.mask else rows - 1
    if mask is None:
        raise TinyldError(f"{folder}: nothing says which token is the mask; say it by --set mask_token=TOKEN")
    size = max(inner.get_vocab().values(), default=-1) + 1
    if size <= mask < min(rows, size + 300):  # rows of the model's that the tokenizer has no name for
        inner.add_special_tokens([f"<|token {i}|>" for i in range(size, mask + 1)])
    eos, bos, pad, unk = token("eos", "sep"), token("bos", "cls"), token("pad"), named.get("unk_token")
    chat = read_chat(folder, inner, named.get("chat_template"), bos) if reading.chat else {}
    if eos is None and not chat:
        raise TinyldError(f"{folder}: neither {CONFIG} nor {extra.name} says which token ends a text (eos_token)")
    unk = inner.token_to_id(unk) if isinstance(unk, str) else None
    ids = (eos if pad is None else pad, unk, eos if bos is None else bos, eos, mask)
    return Tokenizer(inner, path, dict(zip(ROLES, ids, strict=True)) | chat)


def read_chat(folder: Path, inner: HFTokenizer, template: Any, bos: int | None) -> dict[str, Any]:
    """What a chat puts around a prompt, as ids: `start`, `turn` and its end; without a system's turn."""
    path = folder / "chat_template.jinja"
    template = read_text(path) if path.is_file() else str(template)
    known = [parts for parts in CHATS if re.match(r"<\|\w+\|>", parts[0])[0] in template]
    if len(known) != 1 or None in map(inner.token_to_id, re.findall(r"<\|\w+\|>", "".join(known[0]))):
        forms = " and ".join(start.partition("user")[0] for start, _ in CHATS)
        raise TinyldError(f"{folder}: no chat template of a form that tinyld knows ({forms}); leave chat out")
    start, turn = (inner.encode(part, add_special_tokens=False).ids for part in known[0])
    start = start if bos is None or "bos_token" not in template else [bos, *start]
    return {"start": start, "turn": turn, "eos": turn[0]}


@torch.no_grad()
def load_foreign(
    folder: Path, device: torch.device | str = "cpu", dtype: str = "fp32", reading: Reading | None = None,
    headless: bool = False,
) -> Base:  # fmt: skip
    """A public model as a base, kept in `dtype` (see device.shrink); memory peaks at the base and one tensor. An
    encoder that has no head to write with is refused unless `headless`, and then gets the identity for one."""
    foreign = read_foreign(folder, reading)
    model, tokenizer, config = foreign.model, foreign.tokenizer, foreign.model.config
    if not (headless or len(foreign.plan) == len(list(model.parameters()))):
        raise TinyldError(f"{folder} has no head that writes words; begin a base with it: tinyld pretrain --init")
    twin, (_, (embedding, *_)) = foreign.twin, foreign.plan["embedding.weight"]
    if twin is not None and not torch.equal(twin.read(), embedding.read()):
        raise TinyldError(f"{folder}: {twin.name!r} is not the embedding's matrix, which its config says it is")
    if config.rotary:
        model.cos, model.sin = (table.to(device) for table in rotary_tables(config))
    digest = hashlib.sha256(f"{json.dumps(to_dict(config), sort_keys=True)}{tokenizer.to_json()}".encode())

    def read(name: str, shape: torch.Size, narrow: bool) -> Tensor:
        """One of our tensors, in float32, or if `narrow` as stored where it is one of theirs."""
        if name not in foreign.plan:  # of a head: it changes nothing until it is trained
            return torch.eye(*shape) if len(shape) == 2 else torch.full(shape, float(name == "head_transform.2.weight"))
        make, stored = foreign.plan[name]
        theirs = [each.read() for each in stored]
        for tensor in theirs:
            digest.update(tensor.view(torch.uint8).numpy())
        made = make(config, *(t if narrow and make is same else t.float() for t in theirs))
        made = made[: shape[0]]  # those that pad the vocabulary to a round size are left out
        return made if made.untyped_storage().nbytes() == made.nbytes else made.clone()  # and not kept in memory

    own = {name: sum(p.numel() for p in module.parameters(False)) for name, module in model.named_modules()}
    for prefix, module in sorted(model.named_modules(), key=lambda found: -own[found[0]]):
        is_shrunk = isinstance(module, nn.Linear | nn.Embedding) and dtype != "fp32"
        for name, parameter in list(module.named_parameters(prefix, recurse=False)):
            made = read(name, parameter.shape, is_shrunk and name.endswith("weight")).to(device)
            setattr(module, name.rpartition(".")[2], nn.Parameter(made))
            del made
        if is_shrunk:
            shrink(module, dtype)
    return Base(folder, model, tokenizer, digest.hexdigest()[:16], dtype, stored_bytes(model), reading or Reading())

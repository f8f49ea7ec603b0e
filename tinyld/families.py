"""Public diffusion language models in folders of their own, as bases: names, shapes and ids only, no transformers.

A folder holds `config.json`, `tokenizer.json` and safetensors, in shards or not. A family is one row of FAMILIES: how
its config says our shape, and which of its tensors are ours. What is not understood is refused by name before any
weights are read; tensors are then read one by one into the type that the base is kept in.
"""

from __future__ import annotations

import hashlib
import json
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor, nn

from tinyld.base import Base
from tinyld.config import ModelConfig, check_choice, to_dict
from tinyld.errors import TinyldError, UsageError
from tinyld.layers import rotary_tables
from tinyld.methods import METHODS, make_config
from tinyld.model import Denoiser
from tinyld.runs import read_json
from tinyld.shrink import BASE_DTYPES, shrink, stored_bytes
from tinyld.tokenizer import ROLES, Tokenizer

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
MAX_ROW = 2_048  # tokens of a row, where the caller names no number
FLOATS = ("F64", "F32", "F16", "BF16")
TYPES = typing.get_type_hints(ModelConfig)


class Settings:
    """A config.json, of which every key that says something must be understood."""

    def __init__(self, raw: Mapping[str, Any], where: Path, ignored: str):
        self.raw, self.where, self.seen = raw, where, set(ignored.split())

    def refuse(self, key: str, wanted: str) -> typing.NoReturn:
        raise TinyldError(f"{self.where}: {key} must be {wanted}, got {str(self.raw.get(key))[:40]!r}")

    def get(self, key: str, kind: type) -> Any:
        """A value of type `kind`; one whose key ends in ? may be missing or null, and is then 0."""
        optional, key = key.endswith("?"), key.rstrip("?")
        self.seen.add(key)
        value = self.raw.get(key)
        if optional and value is None:
            return kind(0)
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, int if kind is bool else (int, kind)):
            self.refuse(key, f"of type {kind.__name__}")
        return value

    def only(self, allowed: Mapping[str, Any]) -> None:
        """Refuses a key with another value than the one given; missing and null are as good."""
        for key, value in allowed.items():
            self.seen.add(key)
            if self.raw.get(key) not in (value, None):
                self.refuse(key, repr(value))

    def theta(self, kind: str = "", key: str = "rope_theta") -> float:
        """The base of plain rotary positions, of one kind of block where there are several."""
        self.seen |= {"rope_parameters", "rope_scaling", key}
        name = "rope_parameters" if self.raw.get("rope_parameters") else "rope_scaling"
        rope = self.raw.get(name) or {}
        rope = rope.get(kind, rope) if isinstance(rope, dict) else {"rope_type": rope}
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            self.refuse(name, "plain rotary positions (no scaling is read)")
        if set(rope) - {"rope_type", "type", "rope_theta"}:
            self.refuse(name, "plain rotary positions (no scaling is read)")
        return float(Settings({key: rope.get("rope_theta", self.raw.get(key))}, self.where, "").get(key, float))

    def finish(self) -> None:
        """Refuses a key that nobody asked for, unless it is off."""
        for key, value in self.raw.items():
            if key not in self.seen and value not in (None, False, "", [], {}):
                self.refuse(key, "left out: tinyld does not know what it changes")


class Weights:
    """The tensors of a folder's safetensors files; shapes are known at once, values when asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.files: dict[str, Path] = {}
        names = sorted(p.name for p in folder.iterdir())
        whole, index = [n for n in names if n.endswith(".safetensors")], None
        if INDEX in names:
            raw = read_json(folder / INDEX)
            index = raw.get("weight_map") if isinstance(raw, dict) else None
            if not isinstance(index, dict) or not set(map(str, index.values())) <= set(whole):
                raise TinyldError(f"{folder / INDEX}: weight_map must name a file of this folder for every tensor")
        elif len(whole) != 1:
            pickled = next((n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))), None)
            if pickled and not whole:
                raise TinyldError(
                    f"{folder / pickled}: pickled weights can run code when read, so tinyld does not; convert them "
                    "where you trust them: AutoModel.from_pretrained(DIR).save_pretrained(DIR, safe_serialization=True)"
                )
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
            tensor = file.get_tensor(name).clone()
        if not bool(torch.isfinite(tensor).all()):
            raise TinyldError(f"{self.files[name]}: tensor {name!r} holds values that are not finite")
        return tensor


# ------------------------------------------------------------------------------------------------ their tensors, ours

Make = Callable[..., Tensor]  # (config, their tensors ...) -> our tensor


def same(config: ModelConfig, tensor: Tensor) -> Tensor:
    return tensor


def pair(config: ModelConfig, gate: Tensor, up: Tensor) -> Tensor:
    return torch.stack([gate, up]).flatten(0, 1)


def third(part: int) -> Make:
    """Queries (0), keys (1) or values (2) of one matrix for all three, one after another."""
    return lambda config, fused: fused.unflatten(0, (3, -1))[part]


def interleaved(part: int) -> Make:
    """The same, where a head's query, key and value are side by side (lit-gpt)."""
    return lambda config, fused: fused.unflatten(0, (config.num_heads, 3, -1))[:, part].flatten(0, 1)


def adaln(chunk: int, of: int, use: Callable[[Tensor, Tensor], Tensor]) -> Make:
    """use(tensor, m), m one of the vectors that MDLM's adaLN makes of its one time, sigma = 0: a constant."""

    def make(config: ModelConfig, tensor: Tensor, *layers: Tensor) -> Tensor:
        half = layers[0].shape[1] // 2
        time = torch.cat([layers[0].new_ones(half), layers[0].new_zeros(half)])  # cosines and sines of 0
        first, bias, second, other, last, end = layers
        time = F.silu(F.linear(F.silu(F.linear(time, first, bias)), second, other))
        return use(tensor, F.linear(time, last, end).unflatten(0, (of, -1))[chunk])

    return make


def scale(norm: Tensor, by: Tensor) -> Tensor:
    return norm * (1.0 + by)


def shift(norm: Tensor, by: Tensor) -> Tensor:
    return by


def gate(weight: Tensor, by: Tensor) -> Tensor:
    return weight * (by[:, None] if weight.dim() == 2 else by)


def never_the_mask(config: ModelConfig, bias: Tensor) -> Tensor:
    return torch.cat([bias[:-1], torch.full_like(bias[-1:], -1e6)])  # as MDLM itself, its "subs" parameterisation


def parts(edges: Mapping[str, Any], prefix: str, block: Mapping[str, Any]) -> dict[str, Any]:
    """Our module -> theirs, or (how it is made, theirs ...); those of a block behind its prefix."""

    def behind(theirs: Any) -> Any:
        return prefix + theirs if isinstance(theirs, str) else (theirs[0], *(prefix + name for name in theirs[1:]))

    return {**edges, **{f"blocks.{ours}": behind(theirs) for ours, theirs in block.items()}}


def fused(name: str, split: Callable[[int], Make]) -> dict[str, Any]:
    return {ours: (split(part), name) for part, ours in enumerate(("query", "key", "value"))}


HF = parts(
    {"embedding": "model.embed_tokens", "final_norm": "model.norm", "output": "lm_head"}, "model.layers.{i}.",
    {"attention_norm": "input_layernorm", "query": "self_attn.q_proj", "key": "self_attn.k_proj",
     "value": "self_attn.v_proj", "query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm",
     "out": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm",
     "up": (pair, "mlp.gate_proj", "mlp.up_proj"), "down": "mlp.down_proj"},
)  # fmt: skip
LLADA = parts(
    {"embedding": "model.transformer.wte", "final_norm": "model.transformer.ln_f",
     "output": "model.transformer.ff_out"}, "model.transformer.blocks.{i}.",
    {"attention_norm": "attn_norm", "query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "attn_out",
     "mlp_norm": "ff_norm", "up": (pair, "ff_proj", "up_proj"), "down": "ff_out"},
)  # fmt: skip
SMDM = parts(
    {"embedding": "transformer.wte", "final_norm": "transformer.ln_f", "output": "lm_head"}, "transformer.h.{i}.",
    {"attention_norm": "norm_1", **fused("attn.attn", interleaved), "out": "attn.proj", "mlp_norm": "norm_2",
     "up": (pair, "mlp.swiglu.w1", "mlp.swiglu.w2"), "down": "mlp.swiglu.w3"},
)  # fmt: skip
MODERNBERT = parts(
    {"embedding": "model.embeddings.tok_embeddings", "embedding_norm": "model.embeddings.norm",
     "final_norm": "model.final_norm", "head_transform.0": "head.dense", "head_transform.2": "head.norm",
     "output": "decoder", "output_bias": (same, "decoder.bias")}, "model.layers.{i}.",
    {"attention_norm": "attn_norm", **fused("attn.Wqkv", third), "out": "attn.Wo", "mlp_norm": "mlp_norm",
     "up": "mlp.Wi", "down": "mlp.Wo"},
)  # fmt: skip
SIGMA = tuple(f"backbone.sigma_map.mlp.{i}.{part}" for i in (0, 2) for part in ("weight", "bias"))
MDLM = parts(
    {"embedding.weight": (same, "backbone.vocab_embed.embedding"), "output": "backbone.output_layer.linear",
     "output_bias": (never_the_mask, "backbone.output_layer.linear.bias")}, "backbone.blocks.{i}.",
    {**fused("attn_qkv", third), "up": "mlp.0"},
)  # fmt: skip
for _ours, _theirs, _chunk, _use in (
    ("blocks.attention_norm.bias", "blocks.{i}.norm1.weight", 0, shift),
    ("blocks.attention_norm.weight", "blocks.{i}.norm1.weight", 1, scale),
    ("blocks.out.weight", "blocks.{i}.attn_out.weight", 2, gate),
    ("blocks.mlp_norm.bias", "blocks.{i}.norm2.weight", 3, shift),
    ("blocks.mlp_norm.weight", "blocks.{i}.norm2.weight", 4, scale),
    ("blocks.down.weight", "blocks.{i}.mlp.2.weight", 5, gate),
    ("blocks.down.bias", "blocks.{i}.mlp.2.bias", 5, gate),
    ("final_norm.bias", "output_layer.norm_final.weight", 0, shift),
    ("final_norm.weight", "output_layer.norm_final.weight", 1, scale),
):
    _at = "backbone." + ("blocks.{i}" if _ours.startswith("blocks") else "output_layer") + ".adaLN_modulation"
    MDLM[_ours] = (adaln(_chunk, 6 if _ours.startswith("blocks") else 2, _use), f"backbone.{_theirs}", *SIGMA,
                   f"{_at}.weight", f"{_at}.bias")  # fmt: skip


# ------------------------------------------------------------------------------------------------ one row a family


@dataclass(frozen=True)
class Family:
    parts: Mapping[str, Any]  # see `parts`
    sizes: Mapping[str, str]  # field of ModelConfig -> key of config.json; one that ends in ? may be missing
    fixed: Mapping[str, Any]  # fields of ModelConfig that no key says
    only: Mapping[str, Any] = field(default_factory=dict)  # keys that may have this value only
    mask: str | None = None  # the mask token where nothing says it; None: it has the last id
    ignored: str = ""  # keys that change no logit, besides IGNORED; and tensors
    more: Callable[[Settings, Weights], Mapping[str, Any]] = lambda settings, weights: {}  # what no table can say


IGNORED = """architectures auto_map model_type torch_dtype dtype transformers_version use_cache initializer_range
    attention_dropout hidden_dropout embedding_dropout residual_dropout mlp_dropout dropout classifier_dropout
    bos_token_id eos_token_id pad_token_id mask_token_id cls_token_id sep_token_id unk_token_id _name_or_path
    max_window_layers sliding_window pretraining_tp output_attentions output_hidden_states return_dict
    chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type gradient_checkpointing"""
RMS = {"norm": "rms", "activation": "silu", "gated": True, "head_bias": False}
HF_SIZES = {
    "vocab_size": "vocab_size", "d_model": "hidden_size", "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_width": "head_dim?",
    "d_ff": "intermediate_size", "max_length": "max_position_embeddings", "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings?",
}  # fmt: skip
ATTENTION_BIAS = {"qkv_bias": "attention_bias?", "out_bias": "attention_bias?"}
HF_ONLY = {"hidden_act": "silu", "use_sliding_window": False, "use_mrope": False, "partial_rotary_factor": 1.0}
QWEN2 = RMS | {"out_bias": False, "mlp_bias": False}


def full_attention(s: Settings, weights: Weights) -> dict[str, Any]:
    s.seen.add("layer_types")
    if any(kind != "full_attention" for kind in s.raw.get("layer_types") or ()):
        s.refuse("layer_types", "full_attention throughout")
    return {"rope_theta": s.theta()}


def dream(s: Settings, weights: Weights) -> dict[str, Any]:
    if s.raw.get("architectures") != ["DreamModel"]:
        s.refuse("architectures", "['DreamModel'] (another class of this model_type is not shifted)")
    return full_attention(s, weights)


def llada(s: Settings, weights: Weights) -> dict[str, Any]:
    s.only({"embedding_size": s.raw.get("vocab_size")})
    root = float(s.get("d_model", int)) ** 0.5
    return {"rope_theta": s.theta(), "embedding_scale": root if s.get("input_emb_norm?", bool) else 1.0}


def mdlm(s: Settings, weights: Weights) -> dict[str, Any]:
    if "backbone_config" in s.raw:
        raise TinyldError(f"{s.where}: this mdlm is e2d2's (it has a backbone_config), which tinyld does not read")
    if s.get("time_conditioning", bool):
        s.refuse("time_conditioning", "false: tinyld's denoiser is not told the time")
    return {"d_ff": 4 * s.get("hidden_dim", int)}


def smdm(s: Settings, weights: Weights) -> dict[str, Any]:
    """Sizes by shape; heads, which no shape tells, by the widths of the published sizes."""
    rows, d = (*weights.shapes.get("transformer.wte.weight", ()), 0, 0)[:2]
    d_ff = (*weights.shapes.get("transformer.h.0.mlp.swiglu.w1.weight", ()), 0)[0]
    width = 80 if (d, d_ff) == (640, 1600) else 64 if d <= 1024 else 128
    if width != 80 and (d_ff != 4 * d or d not in SMDM_WIDTHS):
        raise TinyldError(f"{weights.folder}: no published SMDM has width {d} and an MLP of {d_ff}")
    layers = {m[1] for m in (re.match(r"transformer\.h\.(\d+)\.", name) for name in weights.shapes) if m}
    sizes = {"vocab_size": rows, "d_model": d, "d_ff": d_ff, "num_heads": d // width, "num_layers": len(layers)}
    return {**sizes, "head_rows": rows - 1}


SMDM_WIDTHS = (256, 384, 512, 576, 640, 768, 896, 1024, 1280, 1408, 1536, 1792, 2048, 2176)


def modernbert(s: Settings, weights: Weights) -> dict[str, Any]:
    """Which blocks are local, in today's words or in those of its first files; and both rotary bases."""
    layers, kinds = s.get("num_hidden_layers", int), s.raw.get("layer_types")
    s.seen.add("layer_types")
    every = s.get("global_attn_every_n_layers?", int)
    if kinds is not None:
        every = next((i for i in range(1, len(kinds)) if kinds[i] == "full_attention"), max(len(kinds), 1))
        if kinds != ["sliding_attention" if i % every else "full_attention" for i in range(layers if layers < 999 else 0)]:
            s.refuse("layer_types", "full_attention for every n-th block, from the first on")
    if every < 1:
        s.refuse("layer_types", "a list (or global_attn_every_n_layers a number)")
    return {
        "global_every": every, "rope_theta": s.theta("full_attention", "global_rope_theta"),
        "local_theta": s.theta("sliding_attention", "local_rope_theta"),
    }  # fmt: skip


FAMILIES: dict[str, Family] = {
    "a2d-qwen3": Family(
        HF, HF_SIZES | ATTENTION_BIAS | {"head_width": "head_dim"}, RMS | {"mlp_bias": False, "head_norms": True},
        HF_ONLY, "<|mask|>", more=full_attention,
    ),
    "a2d-qwen2": Family(HF, HF_SIZES, QWEN2, HF_ONLY, "<|mask|>", more=full_attention),
    "a2d-llama": Family(
        HF, HF_SIZES | ATTENTION_BIAS | {"mlp_bias": "mlp_bias?"}, RMS, HF_ONLY, "<|mask|>", more=full_attention
    ),
    "Dream": Family(HF, HF_SIZES, QWEN2 | {"shifted": True}, HF_ONLY, "<|mask|>", more=dream),
    "llada": Family(
        LLADA,
        {"vocab_size": "vocab_size", "d_model": "d_model", "num_heads": "n_heads", "num_layers": "n_layers",
         "kv_heads": "n_kv_heads?", "d_ff": "mlp_hidden_size", "max_length": "max_sequence_length",
         "norm_eps": "rms_norm_eps", "tied": "weight_tying", "qkv_bias": "include_qkv_bias?"},
        QWEN2,
        {"block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True, "alibi": False,
         "include_bias": False, "bias_for_layer_norm": False, "attention_layer_norm": False, "block_group_size": 1,
         "layer_norm_with_affine": True, "scale_logits": False, "multi_query_attention": False, "clip_qkv": None},
        "<|mdm_mask|>",
        "alibi_bias_max attention_layer_norm_with_affine flash_attention init_cutoff_factor init_device init_fn init_std"
        " mlp_ratio precision rope_full_precision", llada,
    ),
    "mdlm": Family(
        MDLM,
        {"vocab_size": "vocab_size", "d_model": "hidden_dim", "num_heads": "n_heads", "num_layers": "n_blocks",
         "max_length": "model_length"},
        {"activation": "gelu_tanh", "tied": False, "qkv_bias": False, "out_bias": False},
        ignored="cond_dim backbone.rotary_emb.inv_freq", more=mdlm,
    ),
    "smdm": Family(SMDM, {}, QWEN2 | {"qkv_bias": False, "max_length": 2_048, "tied": False}, more=smdm),
    "modernbert": Family(
        MODERNBERT,
        {k: v for k, v in HF_SIZES.items() if k not in ("kv_heads", "head_width")} | ATTENTION_BIAS
        | {"norm_eps": "norm_eps", "norm_bias": "norm_bias", "head_bias": "decoder_bias",
           "local_window": "local_attention"},
        {"gated": True, "first_norm": False, "mlp_bias": False, "embedding_norm": True, "head_transform": True},
        {"hidden_activation": "gelu", "classifier_activation": "gelu", "mlp_bias": False, "classifier_bias": False},
        "[MASK]",
        "classifier_pooling deterministic_flash_attn sparse_prediction sparse_pred_ignore_index reference_compile"
        " repad_logits_with_grad position_embedding_type layer_norm_eps initializer_cutoff_factor", modernbert,
    ),
}  # fmt: skip
BLOCKWISE, EXPERTS = "attends block by block (block-causal)", "is a mixture of experts"
REFUSED = {
    "lladamoe": EXPERTS, "llada2_moe": EXPERTS, "bd3lm": BLOCKWISE, "a2d-bd3lm": BLOCKWISE,
    "diffusion_gemma": "is noised uniformly, without a mask",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ a folder


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
    raw = {"model_type": "smdm"} if bare else read_json(where)
    kind = str(raw.get("model_type"))[:40] if isinstance(raw, dict) else ""
    blockwise = "bd3lm" in f"{folder.resolve().name} {raw.get('_name_or_path')}".lower() if kind in FAMILIES else False
    if kind in REFUSED or blockwise:
        raise TinyldError(f"{where}: this {kind} {REFUSED.get(kind, BLOCKWISE)}, which tinyld does not read")
    if kind not in FAMILIES:
        raise TinyldError(f"{where}: model_type must be one of {', '.join(FAMILIES)}, got {kind!r}")
    family = FAMILIES[kind]
    settings = Settings(raw, where, f"{IGNORED} {family.ignored}")
    shape = {ours: settings.get(key, TYPES[ours]) for ours, key in family.sizes.items()}
    if settings.raw.get("tie_word_embeddings") is None and "tied" not in family.fixed and "weight_tying" not in raw:
        shape["tied"] = f"{family.parts['output']}.weight" not in weights.shapes
    shape |= family.fixed | family.more(settings, weights)
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
        foreign.plan[name] = find_part(weights, config, family, name, tuple(wanted))
    used = {theirs for _, names in foreign.plan.values() for theirs in names}
    extra = [n for n in weights.shapes if n not in used and n not in family.ignored.split()]
    if extra:
        raise TinyldError(f"{weights.files[extra[0]]}: tensor {extra[0]!r} has no place in a {kind} of this config")
    return foreign


def find_part(
    weights: Weights, config: ModelConfig, family: Family, name: str, shape: tuple[int, ...]
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
    try:
        found = tuple(make(config, *(torch.empty(weights.shapes[n], device="meta") for n in names)).shape)
    except (RuntimeError, IndexError, ValueError):
        found = weights.shapes[names[0]]
    if found != shape:
        text = f"{found} in the file, {shape} expected"
        raise TinyldError(f"{weights.files[names[0]]}: tensor {names[0]!r} has the wrong shape: {text}")
    return make, tuple(names)


def read_tokenizer(folder: Path, settings: Settings, family: Family, rows: int, mask_token: str | None) -> Tokenizer:
    """tokenizer.json, with the ids of its special tokens by config, tokenizer_config.json or the family's row."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TinyldError(f"no tokenizer in {folder}: put the tokenizer.json that its model was trained with there")
    try:
        inner = HFTokenizer.from_str(path.read_text(encoding="utf-8"))
    except BaseException as error:  # the library raises bare Exception, and PanicException, which is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TinyldError(f"{path}: not a tokenizer file ({str(error)[:80]})") from None
    extra = folder / "tokenizer_config.json"
    named = read_json(extra) if extra.is_file() else {}
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
    if mask == size < rows:  # a row of the model's that the tokenizer has no name for
        inner.add_special_tokens([family.mask or "<|mask|>"])
    eos = token("eos", "sep")
    if eos is None:
        raise TinyldError(f"{folder}: neither {CONFIG} nor {extra.name} says which token ends a text (eos_token)")
    bos, pad = token("bos", "cls"), token("pad")
    unk = inner.token_to_id(named["unk_token"]) if isinstance(named.get("unk_token"), str) else None
    ids = (eos if pad is None else pad, unk, eos if bos is None else bos, eos, mask)
    tokenizer = Tokenizer(inner, str(path), dict(zip(ROLES, ids, strict=True)))
    if not all(i is None or 0 <= i < tokenizer.vocab_size for i in ids) or tokenizer.vocab_size > rows:
        raise TinyldError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}; special: {ids}")
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
    """A public model as a base, kept in `dtype` (see tinyld.shrink); memory peaks at the base and its largest tensor."""
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
            theirs = [t.float() for t in theirs] if make is not same or dtype != "bf16" else theirs
            made = make(config, *theirs)[: len(parameter)].to(device)
            small = dtype == "bf16" and isinstance(module, nn.Linear | nn.Embedding) and name.endswith("weight")
            made = made if small else made.float()
            setattr(module, name.removeprefix(prefix), nn.Parameter(made.clone() if made._base is not None else made))
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
        first = method(settings, config).first_depth
        through = max(config.num_layers - first, 1) * block  # at least the one block that runs
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

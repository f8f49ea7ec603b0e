"""Families of public models, a row each: how a config gives our shape, and which of their tensors are ours.

No files are read here. What is not understood is refused by name; tinyld.foreign reads folders by these rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyld.config import ModelConfig
from tinyld.errors import TinyldError
from tinyld.read import Said

# ------------------------------------------------------------------------------------------------ their tensors, ours

Make = Callable[..., Tensor]  # (config, their tensors ...) -> our tensor; ValueError and the like where they do not fit


def same(config: ModelConfig, tensor: Tensor) -> Tensor:
    return tensor


def alike(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`; ValueError unless it has the other's shape, to which it might be broadcast."""
    if tensor.shape != other.shape:
        raise ValueError(f"{tuple(tensor.shape)} beside {tuple(other.shape)}")
    return tensor


def pair(config: ModelConfig, gate: Tensor, up: Tensor) -> Tensor:
    return torch.cat([gate, alike(up, gate)])


def places(skipped: int) -> Make:
    """Learned positions after the first `skipped`, with the embedding of token type 0, the only one we use, in them."""

    def make(config: ModelConfig, positions: Tensor, *types: Tensor) -> Tensor:
        kept = positions[skipped:][: config.max_length]
        return kept + alike(types[0][0], kept[0]) if types else kept

    return make


def adaln(chunk: int, of: int) -> Make:
    """A tensor under one of the `of` vectors that MDLM's adaLN makes of its one time, sigma = 0: a constant."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = weight @ x
        return y + alike(bias, y)

    def make(config: ModelConfig, tensor: Tensor, *layers: Tensor) -> Tensor:
        half = layers[0].shape[1] // 2
        time = torch.cat([layers[0].new_ones(half), layers[0].new_zeros(half)])  # cosines and sines of 0
        time = F.silu(linear(F.silu(linear(time, *layers[:2])), *layers[2:4]))
        by, role = linear(time, *layers[4:]).unflatten(0, (of, -1))[chunk], ("shift", "scale", "gate")[chunk % 3]
        if role == "gate":
            return tensor * (by[:, None].expand_as(tensor) if tensor.dim() == 2 else alike(by, tensor))
        return by if role == "shift" else tensor * (1.0 + alike(by, tensor))

    return make


def never_the_mask(config: ModelConfig, bias: Tensor) -> Tensor:
    return torch.cat([bias[:-1], torch.full_like(bias[-1:], -1e6)])  # as MDLM itself, its "subs" parameterisation


def parts(edges: Mapping[str, Any], prefix: str, block: Mapping[str, Any]) -> dict[str, Any]:
    """Our module or tensor -> theirs, or (how it is made, theirs ...)."""

    def behind(theirs: Any) -> Any:
        return prefix + theirs if isinstance(theirs, str) else (theirs[0], *(prefix + name for name in theirs[1:]))

    return {**edges, **{f"blocks.{ours}": behind(theirs) for ours, theirs in block.items()}}


def fused(name: str, by_head: bool = False) -> dict[str, Any]:
    """Queries, keys and values of one matrix: one after another, or side by side in every head (lit-gpt)."""

    def split(part: int) -> Make:
        return lambda config, qkv: qkv.unflatten(0, (config.num_heads if by_head else 1, 3, -1))[:, part].flatten(0, 1)

    return {ours: (split(part), name) for part, ours in enumerate(("query", "key", "value"))}


SKIPPED = {"roberta": 2}  # learned positions that are never used
BERT_BLOCK = (
    "attention.self.query attention.self.key attention.self.value attention.output.dense attention.output.LayerNorm "
    "intermediate.dense output.dense output.LayerNorm"
)


def encoder(kind: str, head: str, blocks: str = "encoder.layer", block: str = BERT_BLOCK) -> dict[str, Any]:
    """`head` and `block`: the family's names of the parts here, in this order."""
    at, ours = f"{kind}.embeddings.", "query key value out attention_norm up down mlp_norm".split()
    dense, norm, bias = head.split()
    types = [] if kind == "distilbert" else [f"{at}token_type_embeddings.weight"]
    positions = (places(SKIPPED.get(kind, 0)), f"{at}position_embeddings.weight", *types)
    return parts(
        {"embedding": f"{at}word_embeddings", "positions.weight": positions, "embedding_norm": f"{at}LayerNorm",
         "embedding_projection": f"{kind}.embeddings_project", "head_transform.0": dense, "head_transform.2": norm,
         "output_bias": (same, bias)},
        f"{kind}.{blocks}.{{i}}.", dict(zip(ours, block.split(), strict=True)),
    )  # fmt: skip


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
    {"attention_norm": "norm_1", **fused("attn.attn", by_head=True), "out": "attn.proj", "mlp_norm": "norm_2",
     "up": (pair, "mlp.swiglu.w1", "mlp.swiglu.w2"), "down": "mlp.swiglu.w3"},
)  # fmt: skip
MODERNBERT = parts(
    {"embedding": "model.embeddings.tok_embeddings", "embedding_norm": "model.embeddings.norm",
     "final_norm": "model.final_norm", "head_transform.0": "head.dense", "head_transform.2": "head.norm",
     "output": "decoder", "output_bias": (same, "decoder.bias")}, "model.layers.{i}.",
    {"attention_norm": "attn_norm", **fused("attn.Wqkv"), "out": "attn.Wo", "mlp_norm": "mlp_norm",
     "up": "mlp.Wi", "down": "mlp.Wo"},
)  # fmt: skip
MDLM = parts(
    {"embedding.weight": (same, "backbone.vocab_embed.embedding"), "output": "backbone.output_layer.linear",
     "output_bias": (never_the_mask, "backbone.output_layer.linear.bias")}, "backbone.blocks.{i}.",
    {**fused("attn_qkv"), "up": "mlp.0"},
)  # fmt: skip
for _at, _of, _chunks in (
    ("blocks.{i}", 6, ((0, "blocks.attention_norm.bias", "norm1.weight"), (5, "blocks.down.bias", "mlp.2.bias"),
                       (1, "blocks.attention_norm.weight", "norm1.weight"), (2, "blocks.out.weight", "attn_out.weight"),
                       (3, "blocks.mlp_norm.bias", "norm2.weight"), (4, "blocks.mlp_norm.weight", "norm2.weight"),
                       (5, "blocks.down.weight", "mlp.2.weight"))),
    ("output_layer", 2, ((0, "final_norm.bias", "norm_final.weight"), (1, "final_norm.weight", "norm_final.weight"))),
):  # fmt: skip
    _layers = ("sigma_map.mlp.0", "sigma_map.mlp.2", f"{_at}.adaLN_modulation")
    _layers = tuple(f"backbone.{layer}.{part}" for layer in _layers for part in ("weight", "bias"))
    MDLM |= {ours: (adaln(chunk, _of), f"backbone.{_at}.{theirs}", *_layers) for chunk, ours, theirs in _chunks}


# ------------------------------------------------------------------------------------------------ one row a family

Shapes = Mapping[str, tuple[int, ...]]  # of their tensors
More = Callable[[Said, Shapes], Mapping[str, Any]]


@dataclass(frozen=True)
class Family:
    parts: Mapping[str, Any]  # see `parts`
    sizes: Mapping[str, str]  # field of ModelConfig -> key of config.json; one that ends in ? may be missing
    fixed: Mapping[str, Any]  # fields of ModelConfig that no key says
    only: Mapping[str, Any] = field(default_factory=dict)  # keys that may have this value only
    mask: str | None = None  # the mask token where nothing says it; None: it has the last id
    ignored: str = ""  # keys that change no logit, besides IGNORED; and tensors
    more: More = lambda said, shapes: {}  # fields that no table can say
    # Of an encoder: what its tensors' names begin with, but where it was saved alone. Its folder may lack our head, and
    # hold keys and tensors of others.
    prefix: str = ""


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


def bert(s: Said, shapes: Shapes) -> dict[str, Any]:
    longest = s.get("max_position_embeddings", int) - SKIPPED.get(s.raw["model_type"], 0)
    return {"max_length": longest, "norm_eps": s.get("layer_norm_eps?", float) or 1e-12}


def theta(s: Said, kind: str = "", key: str = "rope_theta") -> float:
    """The base of plain rotary positions, of one kind of block where there are several."""
    s.seen |= {"rope_parameters", "rope_scaling", key}
    name = "rope_parameters" if s.raw.get("rope_parameters") else "rope_scaling"
    rope = s.raw.get(name) or {}
    rope = rope.get(kind, rope) if isinstance(rope, dict) else {"rope_type": rope}
    plain = isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) == "default"
    if not plain or set(rope) - {"rope_type", "type", "rope_theta"}:
        s.refuse(name, "plain rotary positions (no scaling is read)")
    return float(Said({key: rope.get("rope_theta", s.raw.get(key))}, s.where).get(key, float))


def full_attention(s: Said, shapes: Shapes) -> dict[str, Any]:
    s.seen.add("layer_types")
    kinds = s.raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        s.refuse("layer_types", "full_attention throughout")
    return {"rope_theta": theta(s)}


def dream(s: Said, shapes: Shapes) -> dict[str, Any]:
    if s.raw.get("architectures") != ["DreamModel"]:
        s.refuse("architectures", "['DreamModel'] (another class of this model_type is not shifted)")
    return full_attention(s, shapes)


def llada(s: Said, shapes: Shapes) -> dict[str, Any]:
    s.only({"embedding_size": s.raw.get("vocab_size")})
    root = float(s.get("d_model", int)) ** 0.5
    return {"rope_theta": theta(s), "embedding_scale": root if s.get("input_emb_norm?", bool) else 1.0}


def mdlm(s: Said, shapes: Shapes) -> dict[str, Any]:
    if "backbone_config" in s.raw:
        raise TinyldError(f"{s.where}: this mdlm is e2d2's (it has a backbone_config), which tinyld does not read")
    if s.get("time_conditioning", bool):
        s.refuse("time_conditioning", "false: tinyld's denoiser is not told the time")
    return {"d_ff": 4 * s.get("hidden_dim", int)}


def smdm(s: Said, shapes: Shapes) -> dict[str, Any]:
    """Sizes by shape; heads, which no shape tells, by the widths of the published sizes."""
    rows, d = (*shapes.get("transformer.wte.weight", ()), 0, 0)[:2]
    d_ff = (*shapes.get("transformer.h.0.mlp.swiglu.w1.weight", ()), 0)[0]
    width = 80 if (d, d_ff) == (640, 1600) else 64 if d <= 1024 else 128
    if width != 80 and (d_ff != 4 * d or d not in SMDM_WIDTHS):
        raise TinyldError(f"{s.where.parent}: no published SMDM has width {d} and an MLP of {d_ff}")
    layers = {m[1] for m in (re.match(r"transformer\.h\.(\d+)\.", name) for name in shapes) if m}
    sizes = {"vocab_size": rows, "d_model": d, "d_ff": d_ff, "num_heads": d // width, "num_layers": len(layers)}
    return {**sizes, "head_rows": rows - 1}


SMDM_WIDTHS = (256, 384, 512, 576, 640, 768, 896, 1024, 1280, 1408, 1536, 1792, 2048, 2176)


def modernbert(s: Said, shapes: Shapes) -> dict[str, Any]:
    """Which blocks are local, in today's words or in those of its first files; and both rotary bases."""
    layers, kinds = s.get("num_hidden_layers", int), s.raw.get("layer_types")
    s.seen.add("layer_types")
    every = s.get("global_attn_every_n_layers?", int)
    if isinstance(kinds, list) and len(kinds) == layers:
        every = next((i for i in range(1, layers) if kinds[i] == "full_attention"), layers)
        if kinds != ["sliding_attention" if i % every else "full_attention" for i in range(layers)]:
            every = 0
    if every < 1 or not isinstance(kinds, list | None):
        s.refuse("layer_types", "full_attention for every n-th block, from the first on")
    return {
        "global_every": every, "rope_theta": theta(s, "full_attention", "global_rope_theta"),
        "local_theta": theta(s, "sliding_attention", "local_rope_theta"),
    }  # fmt: skip


BERT = {"vocab_size": "vocab_size", "d_model": "hidden_size", "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads", "d_ff": "intermediate_size"}  # fmt: skip
DISTILBERT = {"vocab_size": "vocab_size", "d_model": "dim", "num_layers": "n_layers", "num_heads": "n_heads",
              "d_ff": "hidden_dim"}  # fmt: skip
POST_NORM = {"norm_first": False, "rotary": False, "embedding_norm": True, "head_transform": True, "tied": True}
BERT_ONLY = {"hidden_act": "gelu", "activation": "gelu", "position_embedding_type": "absolute",
             "tie_word_embeddings": True}  # fmt: skip
FAMILIES: dict[str, Family] = {
    kind: Family(encoder(kind, *names), sizes, POST_NORM, BERT_ONLY, more=bert, prefix=f"{kind}.")
    for kind, sizes, *names in (
        ("bert", BERT, "cls.predictions.transform.dense cls.predictions.transform.LayerNorm cls.predictions.bias"),
        ("roberta", BERT, "lm_head.dense lm_head.layer_norm lm_head.bias"),
        ("distilbert", DISTILBERT, "vocab_transform vocab_layer_norm vocab_projector.bias", "transformer.layer",
         "attention.q_lin attention.k_lin attention.v_lin attention.out_lin sa_layer_norm ffn.lin1 ffn.lin2 "
         "output_layer_norm"),
        ("electra", BERT | {"d_embed": "embedding_size?"},
         "generator_predictions.dense generator_predictions.LayerNorm generator_lm_head.bias"),
    )
}  # fmt: skip
FAMILIES |= {
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
        "alibi_bias_max attention_layer_norm_with_affine flash_attention init_cutoff_factor init_device init_fn"
        " init_std mlp_ratio precision rope_full_precision", llada,
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

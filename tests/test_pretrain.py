"""Pretraining: what is held out, what is written, resumption, and text that is too little or changed."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHAPE, pressing_ctrl_c, refuses
from safetensors.torch import load

from tinyld.checkpoint import load_base
from tinyld.data import TextRows
from tinyld.options import PretrainOptions
from tinyld.pretrain import pretrain, unigram_nll
from tinyld.runs import MODEL, TOKENIZER, RunFolder

NOUNS = "film plot music food bridge garden river story".split()


def write_text(path: Path, n: int, seed: int = 0) -> Path:
    """Sentences in which the adjective follows from the noun: a context says more than counts do."""
    rng = random.Random(seed)
    path.write_text("".join(f"the {noun} was {noun[::-1]} .\n" for noun in rng.choices(NOUNS, k=n)))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 400)


def run(path: Path, text: Path, **given: Any) -> dict[str, Any]:
    """The results of a pretraining of a few steps; the text is its own held-out text."""
    defaults = {"steps": 6, "batch_size": 8, "lr": 5e-3, "dtype": "fp32", "device": "cpu", "eval_every": 3}
    defaults |= SHAPE | {"max_length": 16, "vocab_size": 120, "optimizer": "adamw", "valid": (text,)}
    found = pretrain(PretrainOptions(data=(text,), out=path, quiet=True, **(defaults | given)))
    return {k: v for k, v in found.items() if k != "run"}


def resumed(path: Path) -> RunFolder:
    pretrain(PretrainOptions(resume=path, quiet=True))
    return RunFolder(path)


def test_the_bound_falls_below_that_of_counts_alone(text: Path, tmp_path: Path) -> None:
    summary = run(tmp_path / "run", text, steps=150, lr=1e-2, eval_every=1000, optimizer="muon", batch_size=32)
    first = RunFolder(tmp_path / "run").metrics()[0]
    vocab_size = load_base(tmp_path / "run").tokenizer.vocab_size
    assert first["nll_bound"] == pytest.approx(math.log(vocab_size), rel=0.05)
    assert summary["nll_bound"] < 0.8 * summary["unigram_nll"] < first["nll_bound"]
    assert summary["nll_stderr"] < 0.2


def test_a_finished_run_has_its_files_which_are_those_of_its_seed_and_no_checkpoint(text: Path, tmp_path: Path) -> None:
    summaries = [run(tmp_path / name, text, seed=seed) for name, seed in (("a", 0), ("b", 0), ("other", 1))]
    folders = [RunFolder(tmp_path / name) for name in ("a", "b", "other")]
    tokenizers, weights = ([folder.digest(name) for folder in folders] for name in (TOKENIZER, MODEL))
    assert tokenizers[0] == tokenizers[1] == tokenizers[2]
    assert weights[0] == weights[1] != weights[2]
    names = {p.name for p in folders[0].path.iterdir()}
    assert names == {"manifest.json", "metrics.jsonl", "results.json", "config.json", MODEL, TOKENIZER}
    config = folders[0].config
    assert config["kind"] == "base" and config["train"]["steps"] == 6 and config["model"]["d_model"] == 32
    assert config["data"]["documents"] == 400 and config["data"]["files"] == [str(text)]
    assert folders[0].read_json("results.json") == {"pretrain": summaries[0]}
    assert summaries[0]["steps"] == 6 and summaries[0]["tokens"] == 6 * 8 * 16


def test_a_resumed_run_writes_the_weights_of_the_uninterrupted_run(text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimizer": "muon", "save_minutes": 1e-9}
    run(tmp_path / "whole", text, **options)
    with pressing_ctrl_c(TextRows, 4), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", text, **options)
    assert not (tmp_path / "cut" / MODEL).exists()
    assert RunFolder(tmp_path / "whole").digest(MODEL) == resumed(tmp_path / "cut").digest(MODEL)


def test_text_that_changed_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, held_out = write_text(tmp_path / "text.txt", 200), write_text(tmp_path / "valid.txt", 200)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "remove_checkpoints", lambda self: None)
        run(tmp_path / "run", text, valid=(held_out,))
    (tmp_path / "run" / "results.json").unlink()
    for changed, name in ((held_out, "held-out data"), (text, "data")):
        write_text(changed, 200, seed=1)
        refuses(f"began with other {name}: put it back", resumed, tmp_path / "run")


def test_weights_are_stored_in_the_type_asked_for(text: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", text, save_dtype="bf16", steps=1)
    assert {t.dtype for t in load((tmp_path / "run" / MODEL).read_bytes()).values()} == {torch.bfloat16}
    assert RunFolder(tmp_path / "run").config["save_dtype"] == "bf16"
    assert load_base(tmp_path / "run").model.embedding.weight.dtype == torch.float32


def test_of_a_few_documents_one_is_held_out(tmp_path: Path) -> None:
    lines = [" ".join(f"word{i % 7} sea" for i in range(n, n + 200)) for n in range(2)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    run(tmp_path / "run", tmp_path / "text.txt", steps=1, valid=())
    data = RunFolder(tmp_path / "run").config["data"]
    assert data["documents"] == 1 and data["held_out_tokens"] > 100


@pytest.mark.parametrize("n", [1, 2])
def test_too_little_text_is_refused(n: int, tmp_path: Path) -> None:
    refuses("too little text", run, tmp_path / "run", write_text(tmp_path / "text.txt", n))
    assert not (tmp_path / "run").exists()


def test_the_unigram_bound_is_the_add_one_cross_entropy() -> None:
    counts, held_out = np.array([3, 1, 0]), np.array([1, 1, 1])  # and one each: 4/7, 2/7, 1/7
    assert unigram_nll(counts, held_out) == pytest.approx(-(math.log(4 / 7) + math.log(2 / 7) + math.log(1 / 7)) / 3)

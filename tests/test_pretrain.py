"""Pretraining: what is held out, what is written, resumption, and text that is too little or changed."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from tinyld.checkpoint import load_base
from tinyld.data import TextRows
from tinyld.errors import TinyldError
from tinyld.options import PretrainOptions
from tinyld.pretrain import SAVED, pretrain, unigram_nll
from tinyld.runs import MODEL, TOKENIZER, RunFolder
from tinyld.tokenizer import Tokenizer

SHAPE = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64, "max_length": 16}
NOUNS = "film plot music food bridge garden river story".split()


class Interrupted(Exception):
    """Stands for a power cut."""


def write_text(path: Path, n: int, seed: int = 0) -> Path:
    """Sentences in which the adjective follows from the noun: a context says more than counts do."""
    rng = random.Random(seed)
    lines = []
    for _ in range(n):
        i = rng.randrange(len(NOUNS))
        lines.append(f"the {NOUNS[i]} was {'very ' * rng.randrange(2)}{NOUNS[i][::-1]} .")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 400)


def run(path: Path, text: Path, resume: bool = False, **given: Any) -> dict[str, Any]:
    """The results of a pretraining of a few steps; the text is its own held-out text."""
    if resume:
        return pretrain(PretrainOptions(resume=path, quiet=True))
    defaults = {"steps": 6, "batch_size": 8, "lr": 5e-3, "dtype": "fp32", "device": "cpu", "eval_every": 3}
    defaults |= {"valid": (text,)}
    defaults |= {} if "init" in given else SHAPE | {"vocab_size": 120, "optimizer": "adamw"}
    options = PretrainOptions(data=(text,), out=path, quiet=True, **(defaults | given))
    return {k: v for k, v in pretrain(options).items() if k != "run"}


def test_the_bound_falls_below_that_of_counts_alone(text: Path, tmp_path: Path) -> None:
    summary = run(tmp_path / "run", text, steps=150, lr=1e-2, eval_every=1000, optimizer="muon", batch_size=32)
    first = RunFolder(tmp_path / "run").metrics()[0]
    vocab_size = load_base(tmp_path / "run").tokenizer.vocab_size
    assert first["nll_bound"] == pytest.approx(math.log(vocab_size), rel=0.05)
    assert summary["nll_bound"] < 0.8 * summary["unigram_nll"] < first["nll_bound"]
    assert summary["nll_stderr"] < 0.2


def test_a_finished_run_has_its_files_and_no_checkpoint(text: Path, tmp_path: Path) -> None:
    summary = run(tmp_path / "run", text)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"manifest.json", "metrics.jsonl", "results.json", "config.json", MODEL, TOKENIZER}
    config = RunFolder(tmp_path / "run").config
    assert config["kind"] == "base" and config["train"]["steps"] == 6 and config["model"]["d_model"] == 32
    assert config["data"]["documents"] == 400 and config["data"]["files"] == [str(text)]
    assert RunFolder(tmp_path / "run").read_json("results.json") == {"pretrain": summary}
    assert summary["steps"] == 6 and summary["tokens"] == 6 * 8 * 16


def test_the_same_seed_writes_the_same_tokenizer_and_weights(text: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("other", 1)):
        run(tmp_path / name, text, seed=seed)
    digests = [RunFolder(tmp_path / name).digest(MODEL) for name in ("a", "b", "other")]
    tokenizers = [RunFolder(tmp_path / name).digest(TOKENIZER) for name in ("a", "b", "other")]
    assert tokenizers[0] == tokenizers[1] == tokenizers[2]
    assert digests[0] == digests[1] != digests[2]


def test_a_resumed_run_writes_the_weights_of_the_uninterrupted_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"optimizer": "muon", "save_minutes": 1e-9}
    run(tmp_path / "whole", text, **options)
    kept = Tokenizer.parse((tmp_path / "whole" / TOKENIZER).read_bytes(), tmp_path)
    monkeypatch.setattr(Tokenizer, "train", lambda lines, vocab_size: kept)  # this test is of the loop alone
    with monkeypatch.context() as patch:
        batch = TextRows.batch

        def breaks(self: TextRows, step: int, batch_size: int, seed: int) -> Any:
            if step == 4:
                raise Interrupted
            return batch(self, step, batch_size, seed)

        patch.setattr(TextRows, "batch", breaks)
        with pytest.raises(Interrupted):
            run(tmp_path / "cut", text, **options)
    assert not (tmp_path / "cut" / MODEL).exists()
    run(tmp_path / "cut", text, resume=True)
    assert RunFolder(tmp_path / "whole").digest(MODEL) == RunFolder(tmp_path / "cut").digest(MODEL)


def test_text_that_changed_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, held_out = write_text(tmp_path / "text.txt", 200), write_text(tmp_path / "valid.txt", 200)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "remove_checkpoints", lambda self: None)
        run(tmp_path / "run", text, valid=(held_out,))
    (tmp_path / "run" / "results.json").unlink()
    write_text(held_out, 200, seed=1)
    with pytest.raises(TinyldError, match="began with other held-out data: put it back"):
        run(tmp_path / "run", text, resume=True)
    write_text(text, 200, seed=1)
    with pytest.raises(TinyldError, match="began with other data: put it back"):
        run(tmp_path / "run", text, resume=True)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_are_stored_in_the_type_asked_for(name: str, dtype: torch.dtype, text: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", text, save_dtype=name, steps=1)
    folder = RunFolder(tmp_path / "run")
    assert {t.dtype for t in load((tmp_path / "run" / MODEL).read_bytes()).values()} == {dtype}
    assert SAVED[folder.config["save_dtype"]] == dtype
    assert load_base(tmp_path / "run").model.embedding.weight.dtype == torch.float32


@pytest.mark.parametrize("n", [1, 2])
def test_too_little_text_is_refused(n: int, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt", n)
    with pytest.raises(TinyldError, match="too little text"):
        run(tmp_path / "run", text)
    assert not (tmp_path / "run").exists()


def test_the_unigram_bound_is_the_add_one_cross_entropy() -> None:
    counts, held_out = np.array([3, 1, 0]), np.array([1, 1, 1])  # and one each: 4/7, 2/7, 1/7
    assert unigram_nll(counts, held_out) == pytest.approx(-(math.log(4 / 7) + math.log(2 / 7) + math.log(1 / 7)) / 3)

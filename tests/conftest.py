"""One tiny denoiser and tokenizer for the whole suite; no network, no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tinyld.config import ModelConfig
from tinyld.model import Denoiser
from tinyld.tokenizer import Tokenizer

WORDS = "the a film plot was is not great terrible good bad dull bright it and but very music food and of to in".split()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models gain nothing from threads, and their bits are then the same on every machine."""
    torch.set_num_threads(1)


@pytest.fixture()
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test in an empty folder, with no data of the user's and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TINYLD_MIRROR", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("TINYLD_DATA", raising=False)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    lines = [" ".join(WORDS[i % len(WORDS)] for i in range(start, start + 8)) + " ." for start in range(60)]
    return Tokenizer.train(lines, 160)


@pytest.fixture()
def config(tokenizer: Tokenizer) -> ModelConfig:
    return ModelConfig(tokenizer.vocab_size, d_model=32, num_layers=2, num_heads=2, d_ff=64, max_length=48)


@pytest.fixture()
def model(config: ModelConfig) -> Denoiser:
    return Denoiser(config, torch.Generator().manual_seed(0)).eval()

"""One tiny denoiser and tokenizer for the whole suite; no network, no GPU."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from typer.testing import CliRunner

import tinyld
from tinyld.cli import app
from tinyld.config import ModelConfig
from tinyld.data import TaskRows
from tinyld.errors import TinyldError
from tinyld.model import Denoiser
from tinyld.options import PretrainOptions
from tinyld.pretrain import pretrain
from tinyld.rows import Example
from tinyld.tasks import Task, load_task
from tinyld.tokenizer import Tokenizer

torch.set_num_threads(1)  # tiny models gain nothing from threads, and their bits are then the same on every machine
WORDS = "the a film plot was is not great terrible good bad dull bright it and but very music food and of to in".split()


class Ran(NamedTuple):
    """What a command said, and its exit code."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def cli(*args: object, text: str | bytes = "") -> Ran:
    """Runs tinyld in this process, with a text piped in; anything but an exit is a bug and is raised."""
    result = CliRunner().invoke(app, [str(a) for a in args], input=text)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


def good(*args: object, text: str | bytes = "") -> Ran:
    ran = cli(*args, text=text)
    assert ran.code == 0, ran.stderr
    return ran


def assert_refused(ran: Ran, code: int, part: str) -> None:
    """One line that says so, and nothing else."""
    assert part in ran.stderr
    assert ran.code == code
    assert ran.stderr.startswith("tinyld: ") and ran.stderr.splitlines() == [ran.stderr[:-1]], ran.stderr
    assert ran.stdout == ""


def refuses(
    match: str, call: Callable[..., Any], *args: Any, kind: type[TinyldError] = TinyldError, **more: Any
) -> None:
    """Of a call: it ends in an error of ours that says so, in one line."""
    try:
        call(*args, **more)
    except kind as error:
        assert re.search(match, str(error)) and "\n" not in str(error)
    else:
        pytest.fail(f"nothing is refused: {match}")


@contextmanager
def pressing_ctrl_c(rows: type, at: int) -> Iterator[None]:
    """Within it Ctrl-C is pressed when step `at` asks for its rows."""
    batch = rows.batch

    def breaks(self: Any, step: int, *more: int) -> Any:
        if step == at:
            raise KeyboardInterrupt
        return batch(self, step, *more)

    with mock.patch.object(rows, "batch", breaks):
        yield


@contextmanager
def handling(signum: int, handler: Any) -> Iterator[None]:
    """Within it the process handles a signal so."""
    before = signal.signal(signum, handler)
    try:
        yield
    finally:
        signal.signal(signum, before)


def python(*args: str) -> subprocess.CompletedProcess[str]:
    """A Python process of its own that finds the package these tests are of."""
    environment = os.environ | {"PYTHONPATH": str(Path(tinyld.__file__).parents[1])}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=environment, timeout=300)


def tree(path: Path) -> dict[str, Any]:
    """Every path below with its content, links by their target; without vast files."""
    paths = [p for p in sorted(path.rglob("*")) if p.is_symlink() or p.stat().st_size < 1 << 24]
    return {
        str(p.relative_to(path)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in paths
    }


def task_of(folder: Path, toml: str) -> Task:
    (folder / "mood.toml").write_text(toml)
    return load_task(str(folder / "mood.toml"))


def byte_level(texts: list[str], special: list[str]) -> HFTokenizer:
    """A BPE of bytes, trained to 290 tokens, and its special tokens behind them."""
    inner = HFTokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    inner.add_special_tokens(special)
    return inner


def label_task(folder: Path, **verbalizer: str) -> Task:
    """A task whose answer is one of these words, by its label."""
    lines = ['template = "{text} it was {answer} ."', "[verbalizer]", *(f'{k} = "{v}"' for k, v in verbalizer.items())]
    return task_of(folder, "\n".join(lines))


def task_rows(folder: Path, tokenizer: Tokenizer, n: int, positive: str = "good", words_each: int = 0) -> TaskRows:
    """n rows, if nothing else is said of random lengths."""
    rng, words = random.Random(0), ("film", "plot", "music", "food", "dull", "bright")
    texts = [" ".join(rng.choices(words, k=words_each or rng.randint(1, 9))) for _ in range(n)]
    examples = [Example(f"{text} it was", ".", ("bad", positive)[i % 2], i % 2) for i, text in enumerate(texts)]
    return TaskRows(examples, label_task(folder, neg="bad", pos=positive), tokenizer, 48)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def padded(vocab_size: int, *widths: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, answer mask, mask of real tokens), (B, L): a row per answer width, prompt and padding of random lengths."""
    rng = random.Random(seed)
    starts = [rng.randint(1, 6) for _ in widths]
    lengths = [s + w + rng.randint(1, 4) for s, w in zip(starts, widths, strict=True)]
    x = torch.randint(5, vocab_size, (len(widths), max(lengths)), generator=seeded(seed))
    place, (begin, width, end) = torch.arange(max(lengths)), torch.tensor([starts, widths, lengths])[..., None]
    is_real = place < end
    return x * is_real, (begin <= place) & (place < begin + width), is_real


def fresh_base(config: ModelConfig, seed: int = 0) -> Denoiser:
    """A base with weights large enough that every part of it shows in the logits."""
    generator = seeded(seed)
    model = Denoiser(config, generator).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


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
    return Denoiser(config, seeded(0)).eval()


@pytest.fixture()
def lively(config: ModelConfig) -> Denoiser:
    """Confident in different degrees."""
    return fresh_base(config)


WEATHER = "the a rain sun sea sky is was it very sad happy down well good bad and of . ,".split()
SHAPE = {"preset": "nano", "d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64, "max_length": 24}
ROWS = [("the rain , the rain", "sad"), ("sun and sea", "happy"), ("rain is bad", "sad"), ("a good sky", "happy")] * 10
QUICK = {"steps": 2, "batch_size": 4, "method": "bitfit", "quiet": True}
FAST = {"recipe": "fast", "ranks": "2,2,2", "steps": 9, "lr": 0.1, "quiet": True}


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, and what is made of it: a label task, one of two texts, one that writes, a composition."""
    place = tmp_path_factory.mktemp("predict")
    rng = random.Random(0)
    (place / "text.txt").write_text("\n".join(" ".join(rng.choices(WEATHER, k=9)) for _ in range(300)))
    text = place / "text.txt"
    pretrain(PretrainOptions(data=(text,), **SHAPE, vocab_size=200, steps=2, out=place / "base", quiet=True))
    labels = '[verbalizer]\nsad = "down"\nhappy = "very well"\n'
    tasks = {
        "mood": 'template = "{text} it was {answer} ."\n' + labels,
        "same": 'template = "{a} {b} is {answer} ."\n' + labels.replace("very well", "well"),
        "tell": 'template = "{word} : {answer}"\nanswer_column = "tale"\nanswer_tokens = 3\n',
    }
    for name, task in tasks.items():
        splits = "".join(f'{split} = "{name}.csv"\n' for split in ("train", "dev", "test"))
        (place / f"{name}.toml").write_text(f"{task}[data]\n{splits}")
    (place / "mood.csv").write_text("text,label\n" + "".join(f'"{t}",{label}\n' for t, label in ROWS))
    (place / "same.csv").write_text("a,b,label\n" + "rain,sun,sad\nsea,sky,happy\n" * 5)
    (place / "header.csv").write_text("text,label\n")
    (place / "tell.csv").write_text("word,tale\n" + "rain,it is bad ||| so bad\nsun,it is good\n" * 5)
    for name in ("mood", "same", "tell"):
        tinyld.finetune(place / f"{name}.toml", base=place / "base", out=place / name, **QUICK)
    return place


@pytest.fixture(scope="session")
def fast(place: Path) -> list[Path]:
    """Adapters that share a pass: tasks of one template whose fields have other names, and one that does not."""
    rows = "".join(f'"{text}",{label}\n' for text, label in ROWS)
    paths = []
    for name, field, words in (("a", "text", "was"), ("b", "said", "was"), ("c", "text", "was"), ("d", "text", "is")):
        task = f'template = "{{{field}}} it {words} {{answer}} ."\n[verbalizer]\nsad = "down"\nhappy = "well"\n'
        (place / f"{name}.toml").write_text(f'{task}[data]\ntrain = "{name}.csv"\ndev = "{name}.csv"\n')
        (place / f"{name}.csv").write_text(f"{field},label\n{rows}")
        paths.append(place / f"fast-{name}")
        tinyld.finetune(place / f"{name}.toml", base=place / "base", out=paths[-1], seed=len(paths) - 1, **FAST)
    return paths

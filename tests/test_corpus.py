"""Text of any size becomes one stream of ids on the disk; what is held out or sampled depends on the text alone."""

import gzip
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import refuses

from tinyld import corpus
from tinyld.corpus import held_out_part, sample, text_bytes, tokenize
from tinyld.tokenizer import Tokenizer

LINES = [f"the film number {i} was good" for i in range(2000)]


def test_documents_become_one_stream_with_an_eos_after_each(tokenizer: Tokenizer) -> None:
    found = tokenize(["the film", "a plot ."], tokenizer)
    eos = tokenizer.eos_id
    assert found.stream.tolist() == [*tokenizer.encode("the film"), eos, *tokenizer.encode("a plot ."), eos]
    assert found.stream.dtype == np.uint16 and found.documents == 2
    assert found.counts.tolist() == np.bincount(found.stream, minlength=tokenizer.vocab_size).tolist()
    empty = tokenize([], tokenizer)
    assert len(empty.stream) == empty.documents == empty.counts.sum() == 0


def test_a_stream_is_the_same_in_chunks(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    whole, done = tokenize(LINES, tokenizer), []
    assert isinstance(whole.stream, np.memmap) and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(corpus, "CHARACTERS", 100)
    parts = tokenize(LINES, tokenizer, done.append)
    assert np.array_equal(parts.stream, whole.stream) and parts.sha256 == whole.sha256
    assert len(done) > 100 and done[-1] == sum(len(line) + 1 for line in LINES)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    refuses("cannot be kept in .*gone.*set TMPDIR", tokenize, LINES, tokenizer)


def test_which_documents_are_held_out_depends_on_their_text_alone() -> None:
    kept, held = (list(held_out_part(LINES, part, 0.1)) for part in (False, True))
    assert sorted(kept + held) == sorted(LINES) and 130 < len(held) < 270  # 200 of 2,000, five standard deviations
    shuffled = random.Random(0).sample(LINES, 1000)
    assert sorted(held_out_part(shuffled, True, 0.1)) == sorted(set(held) & set(shuffled))
    assert list(held_out_part(LINES, False, 0.0)) == list(held_out_part(LINES, True, 1.0)) == LINES


def test_a_tokenizer_is_trained_on_a_share_of_a_large_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES))
    assert list(sample([path], LINES)) == LINES
    monkeypatch.setattr(corpus, "SAMPLE", path.stat().st_size // 4)
    some = list(sample([path], LINES))
    assert 400 < len(some) < 600 and set(some) < set(LINES)  # 500 of 2,000, five standard deviations
    assert list(sample([path], reversed(LINES))) == some[::-1]


def test_the_size_of_a_compressed_text_is_known(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.gz"
    plain.write_text("\n".join(LINES))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert text_bytes([plain, packed]) == 2 * plain.stat().st_size
    packed.write_bytes(packed.read_bytes() + gzip.compress(b""))  # as bgzip ends its files
    assert text_bytes([packed]) == packed.stat().st_size, "as much as there is, at least"
    refuses("gone.txt: cannot be read .No such file", text_bytes, [tmp_path / "gone.txt"])

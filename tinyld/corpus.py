"""Text files -> one stream of ids in a memory-mapped file: a text of any size takes the same memory. No torch."""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from tinyld.errors import TinyldError
from tinyld.progress import Advance, unheard
from tinyld.read import opened
from tinyld.tokenizer import Tokenizer

HELD_OUT = 0.01  # share of the documents
CHARACTERS = 4_000_000  # tokenised at once, on all cores
SAMPLE = 128_000_000  # characters that a tokenizer is trained on, at most (about), spread through the text


@dataclass(frozen=True)
class Corpus:
    """Documents as ids, an [EOS] after each."""

    stream: np.ndarray  # (tokens,) uint16 where the vocabulary fits, else uint32
    counts: np.ndarray  # (V,) int64: how often each id is in the stream
    documents: int
    sha256: str  # of the stream's bytes


def tokenize(lines: Iterable[str], tokenizer: Tokenizer, advance: Advance = unheard) -> Corpus:
    """Documents as ids, in a temporary file (in $TMPDIR) that vanishes with the process; `advance` gets characters."""
    dtype = np.uint16 if tokenizer.vocab_size <= 65_536 else np.uint32
    counts, digest = np.zeros(tokenizer.vocab_size, np.int64), hashlib.sha256()
    documents = characters = 0

    def chunk_of(line: str) -> int:
        nonlocal characters
        characters += len(line) + 1
        return characters // CHARACTERS  # so that a few long documents weigh like many short ones

    try:
        with tempfile.TemporaryFile(prefix="tinyld-tokens-") as file:
            for _, chunk in groupby(lines, chunk_of):
                encoded = tokenizer.encode_batch(list(chunk))
                ids = np.array([i for document in encoded for i in (*document, tokenizer.eos_id)], dtype=dtype)
                file.write(ids.tobytes())
                digest.update(ids)
                counts += np.bincount(ids, minlength=len(counts))
                documents += len(encoded)
                advance(characters)
            file.flush()
            stream = np.memmap(file, dtype, mode="r", shape=(counts.sum(),)) if documents else np.zeros(0, dtype)
    except OSError as error:
        problem = f"the tokens of the text cannot be kept in {tempfile.gettempdir()} ({error.strerror})"
        raise TinyldError(f"{problem}; set TMPDIR to a folder with room for them") from None
    return Corpus(stream, counts, documents, digest.hexdigest())


def draw(line: str) -> float:
    """A number in [0, 1) that depends on a document's text alone."""
    return int(hashlib.sha256(line.encode()).hexdigest()[:8], 16) / 2**32


def held_out_part(lines: Iterable[str], held_out: bool, share: float = HELD_OUT) -> Iterator[str]:
    """The `share` of the documents that is held out, or the rest; which ones depends on their text alone."""
    return (line for line in lines if (draw(line) < share) == held_out)


def sample(files: Sequence[Path], lines: Iterable[str]) -> Iterator[str]:
    """All documents of small files, and of large ones a share of about SAMPLE characters, chosen by the text alone."""
    share = SAMPLE / max(text_bytes(files), 1)
    return (line for line in lines if share >= 1 or draw(f"sample {line}") < share)


def text_bytes(files: Sequence[Path]) -> int:
    """About how many bytes of text the files hold (of a compressed one, what its last four bytes say)."""
    total = 0
    for path in files:
        with opened(path) as file:
            size = file.seek(0, 2)
            if path.suffix == ".gz" and size >= 4:
                file.seek(-4, 2)
                size = max(size, int.from_bytes(file.read(4), "little"))  # bgzip's last part is an empty one
        total += size
    return total

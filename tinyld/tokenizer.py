"""Text <-> ids. Normalisation happens here and nowhere else: it is part of the saved `tokenizer.json`. No torch."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from tinyld.errors import TinyldError, show
from tinyld.read import decode, opened, parse_json, read_bytes

SPECIAL = ("[PAD]", "[UNK]", "[BOS]", "[EOS]", "[MASK]")
# The same five roles in tokenizers of other families: BERT, DistilBERT, ELECTRA; RoBERTa.
SPECIAL_OF_FAMILIES = (
    SPECIAL,
    ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    ("<pad>", "<unk>", "<s>", "</s>", "<mask>"),
)
UNK = SPECIAL[1]
ROLES = ("pad", "unk", "bos", "eos", "mask")
AT_ONCE = 4096  # texts

# Penn-Treebank spellings (`does n't`, -lrb-, `` '') and curly quotes meet the plain ones. Blanks around punctuation
# need no rule: the pre-tokenizer splits at punctuation, so `it 's` and `it's` give the same pieces.
_REPLACEMENTS = (
    (r"[‘’ʼ`´]", "'"),
    (r"[“”]|''", '"'),
    (r"(?i)-lrb-|-lsb-|-lcb-", "("),
    (r"(?i)-rrb-|-rsb-|-rcb-", ")"),
    (r"\\/", "/"),
    (r"[–—]|--+", " - "),
    (r"…|\.( ?\.)+", " ... "),
    (r"<[^>\s]{1,12}\s*/?>", " "),
)
# the library's Replace knows no group references, so the blank of "does n't" goes by a look-around
_WORDS = "ca|wo|sha|is|are|was|were|do|does|did|has|have|had|could|would|should|must|need|ai|might"
_CONTRACTION = rf"(?i)(?<=\b(?:{_WORDS})) (?=n't\b)"

ALPHABET = 200  # characters that may stand in a piece; rarer ones become [UNK]
GROWTH = 10_000  # times that a foreign tokenizer may lengthen a text: ours may 1,536
PATTERN = 2_000  # characters of a regular expression in a foreign tokenizer, and its largest count
LINE = 64 << 20  # characters of a document; what a compressed file holds beyond them is a document of its own
TEXT_SUFFIXES = (".txt", ".txt.gz", ".jsonl")


def _rules(steps: Iterable[tuple[str, str]]) -> list[normalizers.Normalizer]:
    return [normalizers.Replace(Regex(pattern), text) for pattern, text in steps]


def _pipeline(vocab: dict[str, int] | None = None) -> HFTokenizer:
    """Our own tokenizer, of a vocabulary or to be trained."""
    inner = HFTokenizer(models.WordPiece(vocab, unk_token=UNK, max_input_chars_per_word=64))
    # NFKC goes after the quotes: it would split an acute accent from its blank
    steps = [*_rules(_REPLACEMENTS), normalizers.NFKC(), *_rules([(_CONTRACTION, "")])]
    steps += [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    inner.normalizer = normalizers.Sequence(steps)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return inner


class Tokenizer:
    """A tokenizer with the five special tokens that masked diffusion needs; our own are WordPiece.

    `roles` says their ids where no names of SPECIAL_OF_FAMILIES do; a tokenizer that writes any text has no `unk`. A
    row is `start` + a text's front + `turn` + its answer and rest + [EOS]: [BOS] and nothing, or a chat's turns, of
    which `roles` then says the ids.
    """

    def __init__(self, inner: HFTokenizer, where: str = "tokenizer.json", roles: Mapping[str, Any] | None = None):
        self.inner, self.roles, self.where = inner, roles, where
        inner.no_padding()
        inner.no_truncation()
        self.is_wordpiece = isinstance(inner.model, models.WordPiece)
        # What is put before a text that is encoded apart from the one before it: a blank, where it is read as a part of
        # the word behind it (byte-level BPE).
        first, *rest = ([0], [0]) if self.is_wordpiece else map(self._ids, ("a b", "b", " b"))
        self.blank = " " if rest and len(rest[-1]) == 1 and first[1:] != rest[0] else ""
        vocab = inner.get_vocab()
        self.vocab_size = max(vocab.values(), default=-1) + 1
        if roles is not None:
            self.pad_id, self.unk_id, self.bos_id, self.eos_id, self.mask_id = (roles.get(name) for name in ROLES)
            self.start, self.turn = roles.get("start", [self.bos_id]), roles.get("turn", [])
            lists = isinstance(self.start, list) and isinstance(self.turn, list)
            ids = [self.pad_id, self.unk_id or 0, self.bos_id, self.eos_id, self.mask_id]
            ids += [*self.start, *self.turn] if lists else [None]
            if not all(type(i) is int and 0 <= i < self.vocab_size for i in ids):
                raise TinyldError(f"{where}: roles must be ids of tokens, got {show(dict(roles))}")
            if self.mask_id == self.eos_id:
                raise TinyldError(f"{where}: the mask and the end of a text are one token")
            added = inner.get_added_tokens_decoder().items()
            named = (self.pad_id, self.bos_id, self.eos_id, self.mask_id)
            special = {i: token.content for i, token in added if token.special or i in named}
            self.special = tuple(special.values())
            self.never_written = sorted({*special, self.mask_id} - {self.eos_id})
            return
        names = next((family for family in SPECIAL_OF_FAMILIES if all(name in vocab for name in family)), None)
        if names is None:
            missing = ", ".join(name for name in SPECIAL if name not in vocab)
            raise TinyldError(f"{where}: the tokenizer has no {missing} token (nor those of BERT or RoBERTa)")
        if max(vocab.values()) >= inner.get_vocab_size():
            raise TinyldError(f"{where}: an id of {max(vocab.values())} among {inner.get_vocab_size()} tokens")
        self.special = names
        self.pad_id, self.unk_id, self.bos_id, self.eos_id, self.mask_id = (vocab[name] for name in names)
        self.start, self.turn = [self.bos_id], []
        # what decoding may not choose: all special tokens but [EOS], which ends an answer
        self.never_written = [self.pad_id, self.unk_id, self.bos_id, self.mask_id]

    @classmethod
    def train(cls, lines: Iterable[str], vocab_size: int) -> Tokenizer:
        """A lower-casing WordPiece vocabulary of `vocab_size` pieces, special tokens first."""
        lines = list(lines)
        inner = _pipeline()
        # The trainer numbers continuing characters in hash order, which would make ties, and so the vocabulary, differ
        # between runs. Numbering them up front, as if they were special, makes training a function of the text.
        counts: Counter[str] = Counter()
        for line in lines:
            counts.update(inner.normalizer.normalize_str(line))
        letters = sorted(c for c in sorted(counts, key=lambda c: (-counts[c], c))[:ALPHABET] if not c.isspace())
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=[*SPECIAL, *(f"##{c}" for c in letters)],
            initial_alphabet=letters,
            limit_alphabet=len(letters),
            show_progress=False,
        )
        inner.train_from_iterator(lines, trainer)
        final = _pipeline(inner.get_vocab())
        final.add_special_tokens(list(SPECIAL))
        return cls(final)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads a `tokenizer.json`; TinyldError when it is missing or damaged."""
        return cls.parse(read_bytes(path), path)

    @classmethod
    def parse(
        cls, content: bytes, path: Path, find_roles: Callable[[HFTokenizer], Mapping[str, Any]] | None = None
    ) -> Tokenizer:
        """The tokenizer that a `tokenizer.json` holds, tried out on a text; with the roles that are found for it, or
        else its own. TinyldError when it is damaged."""
        text = decode(content, path)
        raw = parse_json(text, path)
        check_patterns(raw, path)
        raw = raw if isinstance(raw, dict) else {}
        model, roles = raw.get("model"), raw.pop("roles", None)
        if isinstance(model, dict) and "merges" in model and model.get("continuing_subword_prefix"):
            raise TinyldError(f"{path}: byte pairs with a continuing_subword_prefix are not read")  # it may abort
        if growth([raw.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]) > GROWTH:
            raise TinyldError(f"{path}: its replacements may make a text {GROWTH:,} times as long")
        with library(path):
            inner = HFTokenizer.from_str(text if roles is None else json.dumps(raw))
            tokenizer = cls(inner, str(path), roles if find_roles is None else find_roles(inner))
            tokenizer.decode(tokenizer.encode("it's a \u6f22 n't -- try [MASK]"))
        return tokenizer

    @property
    def tokens(self) -> list[str]:
        """Every token's spelling, by its id."""
        return [self.inner.id_to_token(i) or "" for i in range(self.vocab_size)]

    def to_json(self) -> str:
        """What `tokenizer.json` holds; the same vocabulary gives the same text."""
        raw = json.loads(self.inner.to_str()) | ({} if self.roles is None else {"roles": dict(self.roles)})
        return json.dumps(raw, ensure_ascii=False, indent=0)

    def blank_before(self, template: str) -> str:
        """What parts an answer from the text before it: `blank`, but nothing at the beginning of a row or of a chat's
        turn."""
        return "" if self.turn or template.startswith("{answer}") else self.blank

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without [BOS] or [EOS]. A special token's name inside text is plain text to us."""
        return self._ids(self._defuse(text))

    def _ids(self, text: str) -> list[int]:
        with library(self.where):
            return self.inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of many texts at once, on all cores."""
        texts, found = [self._defuse(t) for t in texts], []
        for i in range(0, len(texts), AT_ONCE):  # an encoding has more than ids, and many of them are large
            with library(self.where):
                found += [e.ids for e in self.inner.encode_batch(texts[i : i + AT_ONCE], add_special_tokens=False)]
        return found

    def _defuse(self, text: str) -> str:
        """Text in which no special token's literal name stands, so that data cannot inject one, and that is UTF-8."""
        text = text.encode(errors="replace").decode()
        for name in self.special:
            if name in text:
                text = text.replace(name, f"{name[0]} {name[1:-1]} {name[-1]}")
        return text

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text up to the first [EOS]; special tokens are left out but for [MASK], shown as `_`."""
        kept = [int(i) for i in takewhile(lambda i: i != self.eos_id, ids) if i not in (self.pad_id, self.bos_id)]
        if self.is_wordpiece:
            return detokenize(["_" if i == self.mask_id else self.inner.id_to_token(i) or UNK for i in kept])
        runs: list[list[int]] = [[]]  # a character may be spelled by several tokens, so a run is decoded as one
        for i in kept:
            if i == self.mask_id:
                runs.append([])
            else:
                runs[-1].append(i)
        with library(self.where):
            return "_".join(self.inner.decode(run) for run in runs).strip()


@contextmanager
def library(where: object) -> Iterator[None]:
    """What the library raises within, bare Exceptions and PanicException, which is none, as one TinyldError."""
    try:
        yield
    except TinyldError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TinyldError(f"{where}: not a tokenizer file, or one that fails at a text ({str(error)[:120]})") from None


def growth(value: Any) -> float:
    """How many times as long a text may become by all replacements in a tokenizer's file."""
    nodes = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = math.prod(map(growth, nodes))
    if isinstance(value, dict) and isinstance(value.get("pattern"), dict):
        old, new = value["pattern"].get("String"), str(value.get("content", ""))
        found *= max(1.0, len(new) / len(old)) if isinstance(old, str) and old else len(new) + 1
    return found * (1 + len(str(value["prepend"])) if isinstance(value, dict) and "prepend" in value else 1)


def check_patterns(value: Any, path: Path) -> None:
    """TinyldError for a regular expression of a tokenizer that is there to take time: long, or with a huge count."""
    for node in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        check_patterns(node, path)
    pattern = value.get("Regex") if isinstance(value, dict) else None
    if isinstance(pattern, str):
        counts = [int(number) for number in re.findall(r"(?<=[{,])\d{1,9}(?=[,}])", pattern)]
        if len(pattern) > PATTERN or max(counts, default=0) > PATTERN:
            raise TinyldError(f"{path}: the pattern {show(pattern)} is too large to be tried")


def detokenize(pieces: list[str]) -> str:
    """Word pieces joined as people write: no blank before closing punctuation, or inside contractions, numbers (30.5),
    initials (u.s.) and what has a hyphen or a slash."""
    text = f" {' '.join(pieces)}".replace(" ##", "").strip()
    text = re.sub(r"(?<=[('$]) | (?=[.,!?;:)%'])", "", text)
    text = re.sub(r"(?<=\d[.:]) (?=\d)|(?<=\d,) (?=\d{3}\b)|(?<=\b[^\W\d_]\.) (?=[^\W\d_]\.)", "", text)
    text = re.sub(r"(?<=\w) ([-/]) (?=\w)", r"\1", text)
    return re.sub(r'" ?([^"]*?) ?("|$)', r'"\1\2', text)


def read_lines(paths: Iterable[Path]) -> Iterator[str]:
    """Documents, one a line, of `.txt`, `.txt.gz` and `.jsonl` (field `text`) files; blank lines are skipped."""
    for path in paths:
        try:
            with opened(path) as file:
                unpacked = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
                lines = io.TextIOWrapper(unpacked, encoding="utf-8-sig")
                for number, line in enumerate(iter(lambda lines=lines: lines.readline(LINE), ""), 1):
                    if path.suffix == ".jsonl" and line.strip():
                        text = parse_json(line, f"{path}, line {number}", {"text": str})["text"]
                        line = text.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair
                    if line := " ".join(line.split()):
                        yield line
        except (EOFError, zlib.error) as error:
            raise TinyldError(f"{path}: cannot be read ({error})") from None


def find_text_files(paths: Iterable[Path]) -> list[Path]:
    """The text files among `paths` and inside its folders, sorted; TinyldError when one is missing or none is there."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise TinyldError(f"no such file or folder: {path}")
        inside = sorted(p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())
        texts = [p for p in inside if p.name.endswith(TEXT_SUFFIXES)]
        if not texts:
            raise TinyldError(f"no text in {path}: expected files ending in {', '.join(TEXT_SUFFIXES)}")
        found += texts
    if twice := [path for path, count in Counter(found).items() if count > 1]:
        raise TinyldError(f"{twice[0]} is named twice, and would be read twice")
    return found

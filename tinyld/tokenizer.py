"""Text <-> ids. Normalisation happens here and nowhere else: it is part of the saved `tokenizer.json`. No torch."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from tinyld.config import check, check_type
from tinyld.errors import TinyldError, show
from tinyld.read import TEXT_BYTES, line_rows, parse_json

SPECIAL = ("[PAD]", "[UNK]", "[BOS]", "[EOS]", "[MASK]")
# The same five roles in tokenizers of other families: BERT, DistilBERT, ELECTRA; RoBERTa.
ROBERTAS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
SPECIAL_OF_FAMILIES = SPECIAL, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), ROBERTAS
UNK = SPECIAL[1]
ROLES = ("pad", "unk", "bos", "eos", "mask")
AT_ONCE = 4096  # texts

_WORDS = "ca|wo|sha|is|are|was|were|do|does|did|has|have|had|could|would|should|must|need|ai|might"
# Penn-Treebank spellings (`does n't`, -lrb-, `` '') and curly quotes meet the plain ones. Blanks around punctuation
# need no rule: the pre-tokenizer splits at punctuation, so `it 's` and `it's` give the same pieces.
REPLACEMENTS = (
    (r"[‘’ʼ`´]", "'"),
    (r"[“”]|''", '"'),
    (r"(?i)-lrb-|-lsb-|-lcb-", "("),
    (r"(?i)-rrb-|-rsb-|-rcb-", ")"),
    (r"\\/", "/"),
    (r"[–—]|--+", " - "),
    (r"…|\.( ?\.)+", " ... "),
    (r"<[^>\s]{1,12}\s*/?>", " "),
    (rf"(?i)(?<=\b(?:{_WORDS})) (?=n't\b)", ""),  # a look-around, as the library's Replace knows no group references
)

TAGS = "a|b|br|code|div|em|h[1-6]|hr|i|img|li|ol|p|pre|s|small|span|strong|su[bp]|table|t[dhr]|u|ul"
# What the rule on <> above, which the released bases hold, takes for a tag, and what of that is none.
TAG = r"(?i)<(?=[^>\s]{1,12}\s*/?>)"
NAME = rf"{TAG}(?!/?(?:{TAGS})\s*/?>)"

ALPHABET = 200  # characters that may stand in a piece; rarer ones become [UNK]
TEXT_SUFFIXES = (".txt", ".txt.gz", ".jsonl")


def _pipeline(vocab: dict[str, int] | None = None) -> HFTokenizer:
    """Our own tokenizer, of a vocabulary or to be trained."""
    inner = HFTokenizer(models.WordPiece(vocab, unk_token=UNK, max_input_chars_per_word=64))
    *plain, contraction = (normalizers.Replace(Regex(pattern), text) for pattern, text in REPLACEMENTS)
    # NFKC goes after the quotes: it would split an acute accent from its blank
    steps = [*plain, normalizers.NFKC(), contraction, normalizers.NFD(), normalizers.StripAccents()]
    inner.normalizer = normalizers.Sequence([*steps, normalizers.Lowercase()])
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return inner


class Tokenizer:
    """A tokenizer with the five special tokens that masked diffusion needs; our own are WordPiece. `roles` says their
    ids where no names of SPECIAL_OF_FAMILIES do; a tokenizer that writes any text has no `unk`. A row is `start` + a
    text's front + `turn` + its answer and rest + [EOS]: [BOS] and nothing, or a chat's turns, of which `roles` then
    says the ids."""

    def __init__(self, inner: HFTokenizer, where: object = "tokenizer.json", roles: Mapping[str, Any] | None = None):
        """TinyldError where the special tokens are not all there, or the tokenizer fails at a text."""
        self.inner, self.roles, self.where = inner, roles, where
        inner.no_padding()
        inner.no_truncation()
        self.is_wordpiece = isinstance(inner.model, models.WordPiece)
        vocab = inner.get_vocab()
        self.vocab_size = max(vocab.values(), default=-1) + 1
        special = {}
        if roles is None:
            names = next((family for family in SPECIAL_OF_FAMILIES if set(family) <= set(vocab)), None)
            if names is None:
                missing = ", ".join(name for name in SPECIAL if name not in vocab)
                raise TinyldError(f"{where}: the tokenizer has no {missing} token (nor those of BERT or RoBERTa)")
            special = {vocab[name]: name for name in names}
            roles = dict(zip(ROLES, special, strict=True))
        self.pad_id, self.unk_id, self.bos_id, self.eos_id, self.mask_id = (roles.get(name) for name in ROLES)
        self.start, self.turn = roles.get("start", [self.bos_id]), roles.get("turn", [])
        ids = [self.pad_id, self.unk_id or 0, self.bos_id, self.eos_id, self.mask_id]
        ids += [*self.start, *self.turn] if isinstance(self.start, list) and isinstance(self.turn, list) else [None]
        if not all(type(i) is int and 0 <= i < self.vocab_size for i in ids):
            raise TinyldError(f"{where}: roles must be ids of tokens, got {show(dict(roles))}")
        check(self.mask_id != self.eos_id, f"{where}: the mask and the end of a text are one token", TinyldError)
        for i, token in inner.get_added_tokens_decoder().items():
            if token.special or i in (self.pad_id, self.bos_id, self.eos_id, self.mask_id):
                special[i] = token.content
        self.special = tuple(special.values())
        # what decoding may not choose: all special tokens but [EOS], which ends an answer
        self.never_written = sorted({*special, self.mask_id} - {self.eos_id})
        # [PAD], where no text has it: what is written in the place of a token that is too many
        is_free = self.pad_id in self.never_written and self.pad_id not in (self.mask_id, self.unk_id, self.bos_id)
        self.delete_id = self.pad_id if is_free else None
        with library(where):
            self.drops_tags = not inner.encode("<name>", add_special_tokens=False).ids
            # What is put before a text that is encoded apart from the one before it: a blank, where it is read as a
            # part of the word behind it (byte-level BPE).
            first, alone, blank = self.encode_batch(["a b", "b", " b"])
            self.blank = " " if not self.is_wordpiece and len(blank) == 1 and first[1:] != alone else ""
            self.decode(self.encode("it's a \u6f22 n't -- try [MASK]"))
            plain = inner.normalizer and inner.normalizer.normalize_str("A Wörd")
            self.lowers = plain == "a word"  # so that nothing tells what had a capital or an accent

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
    def parse(cls, content: bytes, path: Path) -> Tokenizer:
        """The tokenizer that a `tokenizer.json` holds; TinyldError when it is damaged."""
        inner, roles = parse_tokenizer(content, path)
        return cls(inner, path, roles)

    @cached_property
    def pieces(self) -> list[str]:
        """Every token's spelling, by its id, as WordPiece spells them: `##` before what goes on with a word."""
        tokens = [self.inner.id_to_token(i) or "" for i in range(self.vocab_size)]
        if self.is_wordpiece:
            return tokens
        return [t[1:] if t[:1] in ("Ġ", "▁") else f"##{t}" if t[:1].isalnum() else t for t in tokens]

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
        return self.encode_batch([text])[0]

    def unread(self, rows: Iterable[list[int]]) -> int:
        """How many of the texts with these ids hold words, but no pieces for at least half of them."""
        return sum(2 * ids.count(self.unk_id) >= len(ids) > 0 for ids in rows)

    def encode_batch(self, texts: Iterable[str], tags: bool = False) -> list[list[int]]:
        """`encode` of many texts at once, on all cores; with `tags` those of HTML are read, too."""
        texts, found = [self._defuse(t, tags) for t in texts], []
        with library(self.where):
            for i in range(0, len(texts), AT_ONCE):  # an encoding has more than ids, and many of them are large
                found += [e.ids for e in self.inner.encode_batch(texts[i : i + AT_ONCE], add_special_tokens=False)]
        return found

    def _defuse(self, text: str, tags: bool) -> str:
        """Text in which no special token's literal name stands, so that data cannot inject one, and that is UTF-8; of
        what stands in <> tags of HTML alone are dropped, or with `tags` nothing."""
        text = text.encode(errors="replace").decode()
        if self.drops_tags:
            text = re.sub(TAG if tags else NAME, "< ", text)
        for name in self.special:
            if name in text:
                text = text.replace(name, f"{name[0]} {name[1:-1]} {name[-1]}")
        return text

    def rewritten(self, texts: Iterable[str]) -> list[str]:
        """What texts to write become as tokens, and these as a text."""
        return list(map(self.decode, self.encode_batch(texts, tags=True)))

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
        return "_".join(self.inner.decode(run) for run in runs).strip()


def parse_tokenizer(content: bytes, path: Path) -> tuple[HFTokenizer, Any]:
    """(what a `tokenizer.json` holds, the roles that one of ours says)."""
    raw = parse_json(content, path, dict)
    roles = raw.pop("roles", None)
    with library(path):
        return HFTokenizer.from_str(json.dumps(raw)), check_type(roles, dict | None, f"{path}: roles")


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


def detokenize(pieces: list[str]) -> str:
    """Word pieces joined as people write: no blank before closing punctuation, or inside contractions, numbers (30.5),
    initials (u.s.) and what has a hyphen or a slash."""
    text = f" {' '.join(pieces)}".replace(" ##", "").strip()
    text = re.sub(r"(?<=[($]) | (?=[.,!?;:)%])", "", text)
    text = re.sub(r" ' (?=(?:s|t|d|m|re|ve|ll)\b)|(?<=\b[odlc]) ' (?=\w)", "'", text)  # it's, o'neil
    text = join_quotes(re.split(r"(?<!\S)'(?![^\s.,!?;:)%])", text))
    text = re.sub(r"(?<=\d[.:]) (?=\d)|(?<=\d,) (?=\d{3}\b)|(?<=\b[^\W\d_]\.) (?=[^\W\d_]\.)", "", text)
    text = re.sub(r"(?<=\w) ([-/]) (?=\w)", r"\1", text)
    return re.sub(r'" ?([^"]*?) ?("|$)', r'"\1\2', text)


def join_quotes(parts: list[str]) -> str:
    """Text that was parted at single quotes with blanks around them, which come in pairs; one that is left over, or all
    of them if they are all behind an s, say whose something is (the players' union)."""
    behind_s = [part.rstrip().endswith("s") for part in parts[:-1]]
    owning = {i for i, s in enumerate(behind_s) if s} if all(behind_s) else set()
    if len(behind_s) % 2 and not owning:
        owning = {behind_s.index(True) if any(behind_s) else len(behind_s) - 1}
    text, is_open = parts[0], False
    for i, part in enumerate(parts[1:]):
        closes = i in owning or is_open
        text, is_open = (f"{text.rstrip()}'{part}", False) if closes else (f"{text}'{part.lstrip()}", True)
    return text


def read_lines(paths: Iterable[Path]) -> Iterator[str]:
    """Documents, one a line, of `.txt`, `.txt.gz` and `.jsonl` (field `text`) files; blank lines are skipped."""
    for _, row in chain.from_iterable(line_rows(path, TEXT_BYTES, hint={"text": str}) for path in paths):
        if line := " ".join(row["text"].encode(errors="replace").decode().split()):  # without halves of surrogate pairs
            yield line


def find_text_files(paths: Iterable[Path]) -> list[Path]:
    """The text files among `paths` and inside its folders, sorted; TinyldError when one is missing or none is there."""
    found: list[Path] = []
    for path in paths:
        check(path.exists(), f"no such file or folder: {path}", TinyldError)
        inside = sorted(path.rglob("*") if path.is_dir() else [path])
        if linked := next((p for p in inside if p.is_symlink() and p.is_dir()), None):
            raise TinyldError(f"{linked} is a link to a folder, which is not followed: give that folder itself, too")
        texts = [p for p in inside if p.name.lower().endswith(TEXT_SUFFIXES) and p.is_file()]
        check(len(texts) > 0, f"no text in {path}: expected files ending in {', '.join(TEXT_SUFFIXES)}", TinyldError)
        found += texts
    if twice := [path for path, count in Counter(map(os.path.realpath, found)).items() if count > 1]:
        raise TinyldError(f"{twice[0]} is named twice, and would be read twice")
    return found

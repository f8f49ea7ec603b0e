"""Capitals and accents of texts that a lower-casing base writes: as their prompts and the texts it learned have them.

Text only: no tokens, no torch.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinyld.writing import WORD, fold

if TYPE_CHECKING:
    from tinyld.rows import Example

START = re.compile(rf"(?:^|[.!?]['\")]*\s+)['\"(]*(?={WORD})")  # before the first word of a sentence
MOST = 1_000  # words whose spelling a run keeps
LEARNED = 2_000  # texts, at most, that it is learned from


@dataclass(frozen=True)
class Spelling:
    """How the texts of a task are spelled, where a prompt does not say.

    Several words in a row are spelled as they are in the prompt; else one word as in `words`, or else as in the prompt.
    """

    starts: bool  # a sentence begins with a capital
    names_first: bool  # the capital of a prompt's first word is the word's own, as of a name
    words: dict[str, str]  # word, folded -> as it is spelled inside a sentence

    def restore(self, text: str, before: str, after: str, inside: bool) -> str:
        """A text that was written between `before` and `after`; `inside` a text of theirs, or else by itself."""
        said = list(re.finditer(WORD, text))
        first = _first_words(text)
        if said and inside and before and before[-1] not in ".!?":
            first.discard(said[0].start())
        out, end = "", 0
        for word, (told, in_a_row) in zip(said, self.told([w[0] for w in said], before, after), strict=True):
            spelled = told if in_a_row else self.words.get(fold(word[0]), told)
            starts = self.starts and word.start() in first
            out += text[end : word.start()] + (spelled[0].upper() + spelled[1:] if starts else spelled)
            end = word.end()
        return out + text[end:]

    def told(self, words: Sequence[str], before: str, after: str) -> list[tuple[str, bool]]:
        """Each word as the prompt spells it, or as it is; and whether it stands there in a row with a neighbour."""
        spelled = self._words_of(before, after)
        keys, theirs, places = list(map(fold, words)), list(map(fold, spelled)), defaultdict[str, list[int]](list)
        for place, key in enumerate(theirs):
            places[key].append(place)
        found: list[tuple[str, bool]] = []
        while (i := len(found)) < len(keys):
            count, place = max(((_alike(keys[i:], theirs[p:]), -p) for p in places[keys[i]]), default=(0, 0))
            found += [(word, count > 1) for word in spelled[-place : count - place]] if count else [(words[i], False)]
        return found

    def _words_of(self, before: str, after: str) -> list[str]:
        """The prompt's words; of one in capitals alone, whose spelling says nothing, none."""
        source = f"{before} | {after}" if before else after
        first = set() if self.names_first else _first_words(source)
        words = [] if source.isupper() else re.finditer(WORD, source)
        return [w[0].lower() if w.start() in first and w[0].istitle() else w[0] for w in words]


def _alike(some: Sequence[str], others: Sequence[str]) -> int:
    """How many words two lists have in common before they differ."""
    return next((i for i, (a, b) in enumerate(zip(some, others, strict=False)) if a != b), min(len(some), len(others)))


def _first_words(text: str) -> set[int]:
    """Where the first word of each sentence begins."""
    return {found.end() for found in START.finditer(text)}


def learn_spelling(examples: Sequence[Example], inside: bool) -> Spelling:
    """How the answers of examples are spelled: what `restore` needs to know to spell most words of them right."""
    examples = examples[:: -(-len(examples) // LEARNED)]
    wholes = [f"{e.before if inside else ''} {e.answer}".lstrip(" '\"(") for e in examples]
    capital = sum(text[:1].isupper() for text in wholes) * 2 > sum(text[:1].isalpha() for text in wholes)
    agreed, wrong, spelled = Counter[bool](), Counter[str](), defaultdict[str, Counter[str]](Counter)
    by_prompt = Spelling(capital, True, {})
    for example in examples:
        prompt, first = re.findall(WORD, example.before)[:1], _first_words(example.answer)
        said = list(re.finditer(WORD, example.answer))
        told = by_prompt.told([fold(word[0]) for word in said], example.before, example.after)
        for word, (guess, in_a_row) in zip(said, told, strict=True):
            key = fold(word[0])
            if word.start() not in first and not in_a_row:
                spelled[key][word[0]] += 1
                wrong[key] += guess != word[0]
            if word.start() not in first and prompt and key == fold(prompt[0]) and prompt[0].istitle():
                agreed[word[0] == prompt[0]] += 1
    usual = {key: words.most_common(1)[0] for key, words in spelled.items()}
    mended = {key: wrong[key] - (spelled[key].total() - count) for key, (_, count) in usual.items()}
    kept = sorted((key for key in usual if mended[key] > 0), key=lambda key: (-mended[key], key))[:MOST]
    return Spelling(capital, agreed[True] >= agreed[False], {key: usual[key][0] for key in kept})

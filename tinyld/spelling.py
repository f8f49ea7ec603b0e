"""Capitals and accents of what a lower-casing base writes, as prompts and learned texts have them. No torch."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from tinyld.rows import Example
from tinyld.writing import MARKS, fold

WORD = r"(?<![^\W_])(?:(?<!\w')[^\W_]+|[^\W_]{3,})"  # the short end of a contraction is none: it's, we'll
# The end of a sentence; not of p.m. or vs., nor what is left open ...
END = r"(?<!\b[^\W\d_])(?<!\b(?i:vs|mr|ms|dr))(?<!\b(?i:mrs|etc))(?<!\.\.)[.!?]['\"’”)]*"
FIRST = re.compile(rf"(?:^|{END}\s+)['\"‘“(]*(?={WORD})")  # before the first word of a sentence
FIRST_ASKED = re.compile(rf"(?:^|{END}\s+|[:|]\s*)['\"(]*(?={WORD})")  # the same in a prompt, where fields begin too
PARTED = re.compile(r"(?<!\d),|,(?!\d)|(?<!\d):(?!//)|[;|]|(?<=[a-z]{2})\.(?=[A-Z])")  # as size:5,tea|cake is
MOST = 1_000  # words whose spelling a run keeps
LEARNED = 2_000  # texts, at most, that it is learned from
LONG = 4  # letters of a word that has a capital in a title, too: not of, in, the
TITLED, LEAST = 0.9, 20  # share of the long words inside sentences that have one where all texts are titles, of so many


@dataclass(frozen=True)
class Spelling:
    """How the texts of a task are spelled, where a prompt does not say.

    Several words in a row are spelled as they are in the prompt; else one word as in `words`, or else as in the prompt.
    What has marks and no blank there (an address, C++) is written so.
    """

    starts: bool  # a sentence begins with a capital
    names_first: bool  # the capital of a prompt's first words is the words' own, as of names
    words: dict[str, str]  # word, folded -> as it is spelled inside a sentence
    titles: bool = False  # words begin with a capital, but for those in `words`

    def restore(self, text: str, before: str, after: str, inside: bool) -> str:
        """A text that was written between `before` and `after`; `inside` a text of theirs, or else by itself."""
        first, all_told = _places(FIRST, text), iter(self.told(re.findall(WORD, text), _asked(before, after, inside)))
        if inside and before and not re.search(rf"{END}$", before) and (word := re.search(WORD, text)):
            first.discard(word.start())

        def spelled(word: re.Match[str]) -> str:
            told, in_a_row = next(all_told)
            told = told if in_a_row else self.words.get(fold(word[0]), told)
            return _begun(told) if self.starts and word.start() in first else told

        text = re.sub(WORD, spelled, text)
        for whole in _wholes(f"{before} {after}", text):  # a dash that begins it was written as one between words

            def put(found: re.Match[str], whole: str = whole) -> str:
                return " " * found.string[: found.start()][-1:].isalnum() + whole

            text = re.sub(_written(whole), put, text)
        return text

    def told(self, words: Sequence[str], prompt: str) -> list[tuple[str, bool]]:
        """Each word as the prompt spells it, or as it is; and whether it stands there in a row with a neighbour."""
        asked, first = list(re.finditer(WORD, prompt)), set() if self.names_first else _places(FIRST_ASKED, prompt)
        theirs, places = [fold(word[0]) for word in asked], defaultdict[str, list[int]](list)
        for place, key in enumerate(theirs):
            places[key].append(place)
        keys, found = list(map(fold, words)), list[tuple[str, bool]]()

        def in_a_row(place: int) -> int:
            """How many words from here on are those of the prompt from `place` on."""
            i, most = len(found), min(len(keys) - len(found), len(theirs) - place)
            return next((n for n in range(most) if keys[i + n] != theirs[place + n]), most)

        def spelled(place: int) -> str:
            word = asked[place][0]
            by_its_place = asked[place].start() in first and _capitalised(word)
            return self.words.get(theirs[place], word.lower()) if by_its_place else word

        while len(found) < len(keys):
            count, place = max(((in_a_row(p), -p) for p in places[keys[len(found)]]), default=(0, 0))
            row = [(spelled(i - place), count > 1) for i in range(count)]
            found += row or [(words[len(found)], False)]
        if self.titles:  # in which the row says nothing, as the prompt is no title
            return [(_begun(word), False) for word, _ in found]
        return found


def _asked(before: str, after: str, inside: bool) -> str:
    """A prompt's text; where most words are in capitals, which say nothing, without them."""
    source = _plain(f"{before} ~ {after}" if before or inside else after)
    long = [word for word in re.findall(WORD, source) if len(word) > 1]
    if 2 * sum(map(str.isupper, long)) <= len(long):
        return source
    return re.sub(WORD, lambda word: "~" if len(word[0]) > 1 and word[0].isupper() else word[0], source)


def _wholes(prompt: str, text: str) -> list[str]:
    """What has marks and no blank in a prompt, and is in the text: addresses, codes (villa21@mail.com, #78, C++)."""
    said = re.sub(r"\s", "", fold(text))
    parts = (re.sub(r"""^["'“‘(\[{]+|[.,!?;:'"”’)\]}]+$""", "", part) for part in prompt.split())
    marked = r"(?=.*[^\W_]).*(?:[^\w'’/–—-]|_)"  # beside those that stand in words, too
    found = (part for part in dict.fromkeys(parts) if part and fold(part) in said)
    return [part for part in found if re.match(marked, part) and not PARTED.search(part)]


def _written(whole: str) -> str:
    """A pattern of it as a base writes it, maybe with blanks around marks, without capitals and accents."""
    parts = re.findall(r"[^\W_]+|[\W_]", whole)  # words, and marks one by one
    letters = ("".join(f"(?:{re.escape(c)}|{re.escape(fold(c) or c)})" for c in part) for part in parts)
    begins, ends = r"(?<![^\W_])" * whole[0].isalnum(), r"(?![^\W_])" * whole[-1].isalnum()
    return f"{begins}(?i:{' ?'.join(letters)}){ends}"


def _plain(text: str) -> str:
    """A text with an accent in one character with its letter, and typewriter's marks."""
    return unicodedata.normalize("NFC", text).translate(MARKS)


def _begun(word: str) -> str:
    return word.capitalize() if word.islower() else word  # not iPhone


def _capitalised(word: str) -> bool:
    return word[0].isupper() and word[1:].islower()


def _places(pattern: re.Pattern[str], text: str) -> set[int]:
    """Where the words begin that stand first."""
    return {found.end() for found in pattern.finditer(text)}


def learn_spelling(examples: Sequence[Example], inside: bool) -> Spelling:
    """How the answers of examples are spelled: what `restore` needs to know to spell most words of them right."""
    examples = examples[:: -(-len(examples) // LEARNED)]
    prompts, answers = [_asked(e.before, e.after, inside) for e in examples], [_plain(e.answer) for e in examples]
    wholes = [f"{e.before if inside else ''} {text}".lstrip(" '\"(") for e, text in zip(examples, answers, strict=True)]
    starts = 2 * sum(text[:1].isupper() for text in wholes) > sum(text[:1].isalpha() for text in wholes)
    said = [list(re.finditer(WORD, text)) for text in answers]
    first = [_places(FIRST, text) for text in answers]
    agreed, long = Counter[bool](), list[bool]()
    for prompt, words, begin in zip(prompts, said, first, strict=True):
        at = _places(FIRST_ASKED, prompt)
        own = {fold(w[0]): w[0] for w in re.finditer(WORD, prompt) if w.start() in at and _capitalised(w[0])}
        inner = [word[0] for word in words if word.start() not in begin]
        agreed.update(word == own[fold(word)] for word in inner if fold(word) in own)
        long += [word[0].isupper() for word in inner if len(word) >= LONG]
    titles = len(long) >= LEAST and sum(long) >= TITLED * len(long)
    by_prompt = Spelling(starts, agreed[True] >= agreed[False], {}, titles)
    wrong, spelled = Counter[str](), defaultdict[str, Counter[str]](Counter)
    for prompt, words, begin in zip(prompts, said, first, strict=True):
        for word, (guess, in_a_row) in zip(words, by_prompt.told([fold(w[0]) for w in words], prompt), strict=True):
            if word.start() not in begin and not in_a_row:
                spelled[fold(word[0])][word[0]] += 1
                wrong[fold(word[0])] += guess != word[0]
    usual = {key: words.most_common(1)[0] for key, words in spelled.items()}
    mended = {key: wrong[key] - (spelled[key].total() - count) for key, (_, count) in usual.items()}
    kept = sorted((key for key in usual if mended[key] > 0), key=lambda key: (-mended[key], key))[:MOST]
    return Spelling(starts, by_prompt.names_first, {key: usual[key][0] for key in kept}, titles)

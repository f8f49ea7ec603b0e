"""Capitals, accents and blanks of what a lower-casing base writes, as prompts and learned texts have them. No torch."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from tinyld.rows import Example
from tinyld.writing import MARKS, fold

WORD = r"(?<![^\W_])(?:(?<!\w')[^\W_]+|[^\W_]{3,})"  # the short end of a contraction is none: it's, we'll
# The end of a sentence; not of p.m. or vs., nor what is left open ...
END = r"(?<!\b[^\W\d_])(?<!\b(?i:vs|mr|ms|dr))(?<!\b(?i:mrs|etc))(?<!\.\.)[.!?]['\"’”)]*"
FIRST = re.compile(rf"(?:^|{END}\s+)['\"‘“(]*(?={WORD})")  # before the first word of a sentence
FIRST_ASKED = re.compile(rf"(?:^|{END}\s+|[:|]\s*)['\"(]*(?={WORD})")  # the same in a prompt, where fields begin too
BETWEEN = r"(?<!\d),|,(?!\d)|(?<!\d):(?!//|\\)|[;|]"  # what is between fields
PARTED = re.compile(rf"{BETWEEN}|^(?!www|.*[@/]).*[a-z]{{2}}\.(?=[A-Z])")  # size:5,tea|cake.End
FIELDS = re.compile(rf"{BETWEEN}|[\[({{<]|[\])}}>][^,;|\[({{<]*")  # the same of key[value] and key(value), too
PORT = re.compile(r"(//[\w.-]+):(?=\d)")  # whose colon is between no fields
OPEN = re.compile(r"(?<![^\W_])([^\W_]+[.!?])(?=\s*[|,;:)\]}<>])")  # a word with its own mark in a prompt: Inc. |
UNIT = re.compile(
    r"[^\W_]+|\.(?: ?\.)+|--+|[^\w\s]|_"
)  # words, and marks one by one, but for points and hyphens in a row
ADDRESS = re.compile(r"[a0][.!?][ai]")  # `_kinds` of a mark which, with no blank behind it, is of an address
CONTRACTED = r"(?i:s|t|d|m|re|ve|ll)\b"
MOST = 1_000  # words whose spelling a run keeps
RARE = 3  # places where a row of words is spelled otherwise than in its prompt, at least, where that is learned
LEARNED = 5_000  # texts, at most, that it is learned from
LONG = 4  # letters of a word that has a capital in a title, too: not of, in, the
TITLED, LEAST = 0.9, 20  # share of the long words inside sentences that have one where all texts are titles, of so many
LONGEST = 40  # letters that are looked at of a word before the end of a sentence
OFTEN = 0.8  # share of a mark's places of one kind that have the same blanks, where these are learned


@dataclass(frozen=True)
class Spelling:
    """How the texts of a task are spelled, where a prompt does not say.

    Several words that stand in a row in the prompt are spelled as in `words`, or else as there; so is one word.
    What has marks and no blank there (an address, C++) is written so. A mark has the blanks that it has there between
    the same words or, beside one of the words or between words of the same kinds, in `marks`; else those of
    `tokenizer.detokenize`.
    """

    starts: bool  # a sentence begins with a capital
    names_first: bool  # the capital of a prompt's first words is the words' own, as of names
    # word, those of a row, or, behind a +, a word of one that is not learned, folded -> as spelled inside a sentence
    words: dict[str, str]
    titles: bool = False  # words begin with a capital, but for those in `words`
    case: str = ""  # "upper" or "lower", where all letters are
    codes: bool = False  # where most of a prompt's words are in capitals, these are the words' own
    open: tuple[str, ...] = ()  # folded words with a point that ends no sentence: approx.
    marks: dict[str, str] = field(default_factory=dict)  # one of `_kinds` -> the mark with its blanks
    marks_as_asked: bool = False  # a prompt's blanks around marks are kept

    def restore(self, text: str, before: str, after: str, inside: bool) -> str:
        """A text that was written between `before` and `after`; `inside` a text of theirs, or else by itself."""
        prompt, text = _asked(before, after, inside, self.codes), self.blanked(text, before, after)
        first = _starts(text, {*self.open, *_open(before, after)})
        all_told = (word for row in self.told(re.findall(WORD, text), prompt) for word in row)
        if inside and before and not re.search(rf"{END}$", before) and (word := re.search(WORD, text)):
            first.discard(word.start())

        def spelled(word: re.Match[str]) -> str:
            told = next(all_told)
            return _begun(told) if self.starts and word.start() in first else told

        text = re.sub(WORD, spelled, text)
        for whole in _wholes(f"{before} {after}", text):  # a dash that begins it was written as one between words

            def put(found: re.Match[str], whole: str = whole) -> str:
                return " " * found.string[: found.start()][-1:].isalnum() + whole

            text = re.sub(_written(whole), put, text)
        return {"lower": text.lower(), "upper": text.upper()}.get(self.case, text)

    def blanked(self, text: str, before: str, after: str) -> str:
        """The text with blanks around marks, and marks, as in the prompt or as learned."""
        units = _units(text)
        words, blanks = [unit for unit, _ in units], [*(blank for _, blank in units), False]
        asked = _asked_marks(f"{before} ~ {after}") if self.marks_as_asked else {}
        for i in _marks(words):
            beside = _beside(words, i)
            known = [asked.get(beside), *map(self.marks.get, _kinds(*beside))]
            if own := next(filter(None, known), None):
                words[i], blanks[i], blanks[i + 1] = own.strip(), own[0] == " ", own[-1] == " "
        return "".join(" " * blank + word for word, blank in zip(words, blanks, strict=False)).strip()

    def told(self, words: Sequence[str], prompt: str) -> list[list[str]]:
        """Each word as learned, as the prompt spells it, or as it is; those together that stand in a row there."""
        asked, first = list(re.finditer(WORD, prompt)), set() if self.names_first else _places(FIRST_ASKED, prompt)
        theirs, places = [fold(word[0]) for word in asked], defaultdict[str, list[int]](list)
        for place, key in enumerate(theirs):
            places[key].append(place)
        ends = [len(asked)] * len(asked)  # of the field that a word is in
        for place in range(len(asked) - 2, -1, -1):
            is_last = re.search(r"[|;\[\]{}<>=]", prompt[asked[place].end() : asked[place + 1].start()])
            ends[place] = place + 1 if is_last else ends[place + 1]
        keys, found, i = list(map(fold, words)), list[list[str]](), 0

        def in_a_row(place: int) -> int:
            """How many words from here on are those of the prompt from `place` on."""
            most = min(len(keys) - i, ends[place] - place)
            return next((n for n in range(most) if keys[i + n] != theirs[place + n]), most)

        def spelled(place: int) -> str:
            word = asked[place][0]
            if asked[place].start() not in first or not _capitalised(word):
                return word
            end = asked[place].end()
            is_names = prompt[end : end + 1] == " " and prompt[end + 1 : end + 2].isupper()  # as the next word's is
            return self.words.get(theirs[place], word if is_names else word.lower())

        while i < len(keys):
            count, place = max(((in_a_row(p), -p) for p in places[keys[i]]), default=(0, 0))
            row = [spelled(n - place) for n in range(count)] or [words[i]]
            if self.titles:  # in which the row says nothing, as the prompt is no title
                found += [[self.words.get(fold(word), _begun(word))] for word in row]
            else:
                learned = self.words.get(" ".join(keys[i : i + len(row)]), "").split()
                each = [self.words.get(f"+{fold(word)}", word) for word in row]
                found.append(learned if len(learned) == len(row) else each)
            i += len(row)
        return found


def _asked(before: str, after: str, inside: bool, codes: bool = False) -> str:
    """A prompt's text; where most words are in capitals, which say nothing unless they are `codes`, without them."""
    source = _plain(f"{before} ~ {after}" if before or inside else after)
    long = [word for word in re.findall(WORD, source) if len(word) > 1]
    if codes or 2 * sum(map(str.isupper, long)) <= len(long):
        return source
    return re.sub(WORD, lambda found: "~" if (word := found[0])[1:].isalpha() and word.isupper() else word, source)


def _wholes(prompt: str, text: str) -> list[str]:
    """What has marks and no blank in a prompt, and is in the text: addresses, codes, names (a1@b.com, #78, Xi'an)."""
    prompt, said = (PORT.sub("\\1\0", each) for each in (prompt, re.sub(r"\s", "", _folded(text))))
    parts = dict.fromkeys(piece for part in prompt.split() for piece in (part, *FIELDS.split(part)))
    values = (value for part in parts for value in (part, part.partition("=")[2]))
    parts = (value.lstrip("\"'“‘([{").rstrip(".,!?;:'\"”’)]}") for value in values)
    # beside those that stand in words, too
    marked = rf"-\d|--\w|(?=.*[^\W_]).*(?:[^\w'’/–—-]|_|\w['’](?!{CONTRACTED})\w)"
    found = (part for part in dict.fromkeys(parts) if part and _folded(part) in said)
    return [part.replace("\0", ":") for part in found if re.match(marked, part) and not PARTED.search(part)]


def _written(whole: str) -> str:
    """A pattern of it as a base writes it, maybe with blanks around marks, without capitals and accents."""
    parts = re.findall(r"[^\W_]+|-+|[\W_]", whole)  # words, and marks one by one
    letters = (
        "-+" if part[0] == "-" else "".join(f"(?:{re.escape(c)}|{re.escape(fold(c) or c)})" for c in part)
        for part in parts
    )
    begins = r"(?<![^\W_])" if whole[0].isalnum() else r"(?<!\d)" * whole[1:2].isdigit()
    ends = r"(?![^\W_])" * whole[-1].isalnum()
    return f"{begins}(?i:{' ?'.join(letters)}){ends}"


def _folded(text: str) -> str:
    """A text without case and accents, and with hyphens and points in a row as a base writes them."""
    return re.sub(r"\.( ?\.)+", "...", re.sub("--+", "-", fold(text)))


def _plain(text: str) -> str:
    """A text with an accent in one character with its letter, and typewriter's marks."""
    return unicodedata.normalize("NFC", text).translate(MARKS)


def _begun(word: str) -> str:
    return word.capitalize() if word.islower() else word  # not iPhone


def _capitalised(word: str) -> bool:
    return word[0].isupper() and word[1:].islower()


def _open(before: str, after: str) -> set[str]:
    """Folded words of a prompt with a mark behind them that ends no sentence."""
    return set(map(fold, OPEN.findall(_plain(f"{before.rstrip(' :|,;')} ~ {after}"))))


def _starts(text: str, unended: set[str]) -> set[int]:
    """Where the words begin that stand first in a sentence; `unended`: words with a mark, or a mark and a quotation's
    end, that end none."""

    def ends(found: re.Match[str]) -> bool:
        word = re.search(r"[^\W_]+$", text[max(0, found.start() - LONGEST) : found.start()])
        mark = fold(found[0]).partition(" ")[0]
        return mark not in unended and not (word and fold(word[0]) + mark[:1] in unended)

    return {found.end() for found in FIRST.finditer(text) if ends(found)}


def _units(text: str) -> list[tuple[str, bool]]:
    """(unit, whether a blank is before it): words, and marks one by one."""
    return [(found[0], text[found.start() - 1 : found.start()].isspace()) for found in UNIT.finditer(text)]


def _marks(words: Sequence[str]) -> Iterator[int]:
    """Which of the units are marks."""
    return (i for i, word in enumerate(words) if not word[0].isalnum())


def _beside(words: Sequence[str], i: int) -> tuple[str, str, str]:
    """A mark, folded, between the units beside it."""
    return fold(words[i - 1]) if i else "", fold(words[i]), fold("".join(words[i + 1 : i + 2]))


def _kinds(left: str, mark: str, right: str) -> tuple[str, str, str]:
    """What a mark is between: the word before it, the one behind it, and kinds of both alone: a for a word, i for one
    letter, 0 for a number."""

    def kind(unit: str, end: int) -> str:
        if not unit[:1].isalnum():
            return unit
        return "0" if unit[end].isdigit() else "i" if len(unit) == 1 else "a"

    before, behind = kind(left, -1), kind(right, 0)
    return f"={left}{mark}{behind}", f"{before}{mark}={right}", f"{before}{mark}{behind}"


def _with_blanks(units: Sequence[tuple[str, bool]], i: int) -> str:
    return " " * units[i][1] + units[i][0] + " " * (i + 1 < len(units) and units[i + 1][1])


def _asked_marks(prompt: str) -> dict[tuple[str, ...], str]:
    """A prompt's marks that are a part of something between words, and no fields', with their blanks: 9 - 5, C. D."""
    units = _units(unicodedata.normalize("NFC", prompt))
    words, found = [unit for unit, _ in units], dict[tuple[str, ...], str]()
    for i in _marks(words):
        left, mark, right = beside = _beside(words, i)
        are_digits = left[-1:].isdigit() and right[:1].isdigit()
        is_own = mark in "-/&'$€£%#" or are_digits or (mark == "." and len(left) == 1)
        if left[:1].isalnum() and right[:1].isalnum() and is_own:
            found.setdefault(beside, _with_blanks(units, i))
    return found


def _places(pattern: re.Pattern[str], text: str) -> set[int]:
    """Where the words begin that stand first."""
    return {found.end() for found in pattern.finditer(text)}


def learn_marks(examples: Sequence[Example], written: Sequence[str]) -> tuple[dict[str, str], bool]:
    """(`marks`, `marks_as_asked`) of a spelling, from the answers of examples and how a base writes their tokens."""
    found = list[tuple[tuple[str, str, str], str, str]]()  # of a mark its kinds, as in the answer, as written
    agreed = Counter[bool]()
    for example, text in zip(examples, written, strict=True):
        right, own = _units(unicodedata.normalize("NFC", example.answer)), _units(text)
        words = [unit for unit, _ in own]
        if list(map(_folded, words)) != [_folded(unit) for unit, _ in right]:  # a character that the base has not
            continue
        asked = _asked_marks(f"{example.before} ~ {example.after}")
        for i in _marks(words):
            form, mine, beside = _with_blanks(right, i), _with_blanks(own, i), _beside(words, i)
            kinds = _kinds(*beside)
            if (theirs := asked.get(beside)) and theirs != mine:
                agreed[theirs == form] += 1
            found.append((kinds, form, mine))
    by_kind = ((ks[2], form, mine) for ks, form, mine in found if form[-1] == " " or not ADDRESS.fullmatch(ks[2]))
    rules = _usual(by_kind, OFTEN)  # and beside these what is said of words
    rules |= _usual(((k, form, rules.get(ks[2], mine)) for ks, form, mine in found for k in ks[:2]), OFTEN)
    return rules, agreed[True] > agreed[False]


def _usual(found: Iterable[tuple[str, str, str]], share: float = 0.0) -> dict[str, str]:
    """key -> its form in most places, and in at least that share of them, where it mends one place, or RARE where the
    key is more than a word: of (key, form, what would be written there if nothing were learned)."""
    forms, right = defaultdict[str, Counter[str]](Counter), Counter[str]()
    for key, form, own in found:
        forms[key][form] += 1
        right[key] += form == own
    best = {key: counts.most_common(1)[0] for key, counts in forms.items()}
    mended = {key: n - right[key] for key, (_, n) in best.items() if n >= share * forms[key].total()}
    kept = [key for key, n in mended.items() if n >= (1 if key.isalnum() else RARE)]
    kept.sort(key=lambda key: (-mended[key], key))
    return {key: best[key][0] for key in kept[:MOST]}


def learn_spelling(
    examples: Sequence[Example], inside: bool, as_written: Callable[[list[str]], list[str]] | None = None
) -> Spelling:
    """How the answers of examples are spelled: what `restore` needs to know to spell most words of them right. What a
    base writes for texts, token by token, is learned from `as_written`."""
    examples = examples[:: -(-len(examples) // LEARNED)]
    answers = [_plain(e.answer) for e in examples]
    codes, low = Counter[bool](), Counter[bool]()
    for example, answer in zip(examples, answers, strict=True):
        said, source = set(re.findall(WORD, answer)), _plain(f"{example.before} ~ {example.after}")
        begin = _places(FIRST_ASKED, source)
        words = [found[0] for found in re.finditer(WORD, source) if found.start() not in begin and len(found[0]) > 1]
        codes.update(word in said for word in words if word.isupper() and {word, word.lower()} & said)
        low.update(word not in said for word in words if not word.islower() and {word, word.lower()} & said)
    letters = "".join(answers)
    capitals, small = sum(map(str.isupper, letters)), sum(map(str.islower, letters))
    case = "lower" if low[True] >= max(LEAST, TITLED * low.total()) and capitals < (1 - TITLED) * small else ""
    case = "upper" if small < (1 - TITLED) * capitals else case
    are_codes = codes[True] > codes[False]
    prompts = [_asked(e.before, e.after, inside, are_codes) for e in examples]
    wholes = [f"{e.before if inside else ''} {text}".lstrip(" '\"(") for e, text in zip(examples, answers, strict=True)]
    heads = [text[0] for text in wholes if text[:1].isalpha()]
    heads = heads or [text[found.end()] for text in wholes for found in FIRST.finditer(text)]  # behind 42 or ¿
    starts = 2 * sum(map(str.isupper, heads)) > sum(map(str.isalpha, heads))
    said = [list(re.finditer(WORD, text)) for text in answers]
    after_points = Counter[tuple[str, bool]]()
    for text in answers:
        found = re.findall(r"((?<![^\W_])[^\W_]{2,}\.|[.!?][\"']) ([^\W\d_])", text)
        after_points.update((fold(word), letter.islower()) for word, letter in found)
    opens = {word for (word, small), n in after_points.items() if small and n > max(2, after_points[word, False])}
    first = [_starts(text, {*opens, *_open(e.before, e.after)}) for e, text in zip(examples, answers, strict=True)]
    agreed, long = Counter[bool](), list[bool]()
    for prompt, words, begin in zip(prompts, said, first, strict=True):
        at = _places(FIRST_ASKED, prompt)
        own = {fold(w[0]): w[0] for w in re.finditer(WORD, prompt) if w.start() in at and _capitalised(w[0])}
        inner = [word[0] for word in words if word.start() not in begin]
        agreed.update(word == own[fold(word)] for word in inner if fold(word) in own)
        long += [word[0].isupper() for word in inner if len(word) >= LONG]
    titles = len(long) >= LEAST and sum(long) >= TITLED * len(long)
    marks = learn_marks(examples, as_written([e.answer for e in examples])) if as_written else ({}, False)
    names_first, points = agreed[True] >= agreed[False], tuple(sorted(opens)[:MOST])
    by_prompt = Spelling(starts, names_first, {}, titles, case, are_codes, points, *marks)
    return replace(by_prompt, words=learn_words(by_prompt, prompts, said, first))


def learn_words(
    by_prompt: Spelling, prompts: Sequence[str], said: Sequence[list[re.Match[str]]], first: Sequence[set[int]]
) -> dict[str, str]:
    """`words` of a spelling that has none so far: what answers spell otherwise. said: the words of each; first: where
    those are that begin a sentence, whose capital is its own."""
    rows = list[list[tuple[str, str, bool]]]()  # of words in a row: in the answer, as they would be written, begins one
    for prompt, words, begin in zip(prompts, said, first, strict=True):
        left = iter(words)
        for told in by_prompt.told([fold(word[0]) for word in words], prompt):
            rows.append([(word[0], own, word.start() in begin) for own, word in zip(told, left, strict=False)])
    inside = (list(zip(*row, strict=True)) for row in rows if len(row) > 1 and not any(begins for *_, begins in row))
    together = ((" ".join(words), " ".join(told)) for words, told, _ in inside)
    learned = _usual((fold(words), words, told) for words, told in together)
    single = list[tuple[str, str, str]]()
    for row in rows:
        is_known = " ".join(fold(word) for word, *_ in row) in learned
        for word, told, begins in () if is_known else row:
            if not begins or word not in (told.lower(), _begun(told.lower())):
                key, small = "+" * (len(row) > 1) + fold(word), begins and _capitalised(word)
                single.append((key, word.lower() if small else word, told))
    return learned | _usual(single)

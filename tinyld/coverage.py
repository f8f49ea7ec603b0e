"""Which words of a prompt a text has to say, as the texts that a run learned from nearly always do. No torch."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tinyld.rows import Example
from tinyld.writing import words

HELD = 0.8  # share of the texts learned that repeat a word of their prompt which has to be said
FEW = 5  # prompts that have a word, up to which it is as all rare words are
RARE = 10  # a word is rare where at most one prompt in so many has it: others are the template's, and a table's
MOST = 1_000  # words that a run keeps
LEARNED = 10_000  # texts, at most, that it is learned from
MANY = 20  # prompts at least that have a word, and that have it not, where it is known how else it is said
SAID = 0.95  # share of their texts that say it so
BY_CHANCE = 0.02  # share of all other texts, at most, that have one of these other words
OTHERS = 6  # other words, at most, for one


@dataclass(frozen=True)
class Coverage:
    """Of a task whose texts say what their prompts name, as descriptions of facts do."""

    unsaid: tuple[str, ...]  # words of prompts, folded, that a text need not say
    others: dict[str, tuple[str, ...]]  # word of prompts -> other words, of which one says it as well

    def missing(self, prompt: str, text: str) -> set[str]:
        """The words that the prompt wants said and the text does not say."""
        said = {*words(text)}
        wanted = {*words(prompt)}.difference(self.unsaid, said)
        return {word for word in wanted if said.isdisjoint(self.others.get(word, ()))}


def learn_coverage(examples: Sequence[Example]) -> Coverage | None:
    """Of the answers of examples; None where most rare words of their prompts are not repeated."""
    examples = examples[:: -(-len(examples) // LEARNED)]
    prompts = [{*words(f"{e.before} {e.after}")} for e in examples]
    texts = [{*words(e.answer)} for e in examples]
    asked, said = which_have(prompts), which_have(texts)
    held = {word: len(rows & said[word]) / len(rows) for word, rows in asked.items()}
    rare = [held[word] for word, rows in asked.items() if RARE * len(rows) <= len(examples)]
    if sum(rare) < HELD * len(rare) or not rare:
        return None
    often = sorted(asked, key=lambda word: (-len(asked[word]), word))
    unsaid, others = [w for w in often if len(asked[w]) >= FEW and held[w] < HELD][:MOST], dict[str, tuple[str, ...]]()
    for word in unsaid:
        left = asked[word] - said[word]
        own = {other for i in left for other in texts[i] - prompts[i]}
        if found := in_other_words(asked[word], left, {other: said[other] for other in sorted(own)}, len(examples)):
            others[word] = found
    return Coverage(tuple(sorted({*unsaid} - {*others})), others)


def which_have(examples: Sequence[Collection[str]]) -> defaultdict[str, set[int]]:
    """word -> which of the examples have it"""
    found = defaultdict[str, set[int]](set)
    for i, words_of in enumerate(examples):
        for word in words_of:
            found[word].add(i)
    return found


def in_other_words(rows: set[int], left: set[int], said: Mapping[str, set[int]], n: int) -> tuple[str, ...]:
    """By which words nearly every text says one word of its prompt: `children` or `friendly` for `familyFriendly`; none
    where that need not be said. rows: which of n examples have it in their prompts; left: those of them whose texts do
    not repeat it; said: other words -> which texts have them."""
    rest, few, others = n - len(rows), (1 - SAID) * len(rows), list[str]()
    if min(len(rows), rest) < MANY:
        return ()
    most = BY_CHANCE * rest  # which the counts alone tell of most words
    known = [(other, has) for other, has in said.items() if len(has) <= most + len(rows)]
    can = [other for other, has in known if len(has) <= most or len(has - rows) <= most]
    while can and len(left) > few and len(others) < OTHERS:
        greatest = max(can, key=lambda other: len(said[other] & left))
        after = left - said[greatest]
        if (len(left) - len(after)) * (OTHERS - len(others)) < len(left) - few:
            return ()  # as no later one is in more of them
        others.append(greatest)
        left = after
    return tuple(others) if len(left) <= few else ()

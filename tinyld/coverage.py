"""Which words of a prompt a text has to say, as the texts that a run learned from nearly always do. No torch."""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
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
    asked, said = Counter[str](), Counter[str]()
    for prompt, text in zip(prompts, texts, strict=True):
        asked.update(prompt)
        said.update(prompt & text)
    rare = [said[word] / n for word, n in asked.items() if RARE * n <= len(examples)]
    if sum(rare) < HELD * len(rare) or not rare:
        return None
    unsaid = [word for word, n in asked.most_common() if n >= FEW and said[word] < HELD * n][:MOST]
    others = in_other_words(unsaid, prompts, texts)
    return Coverage(tuple(sorted({*unsaid} - {*others})), others)


def in_other_words(
    unsaid: Sequence[str], prompts: Sequence[Collection[str]], texts: Sequence[Collection[str]]
) -> dict[str, tuple[str, ...]]:
    """Those of `unsaid` that nearly every text has to say all the same, and by which words that its prompt has not:
    `children` or `family` where that says `familyFriendly`."""
    asked, said = defaultdict[str, set[int]](set), defaultdict[str, set[int]](set)  # word -> which examples have it
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        for found, has in ((asked, prompt), (said, text)):
            for word in has:
                found[word].add(i)
    learned = dict[str, tuple[str, ...]]()
    for word in unsaid:
        rows, others = asked[word], list[str]()
        rest, few = len(prompts) - len(rows), (1 - SAID) * len(rows)
        if min(len(rows), rest) < MANY:
            continue
        left = rows - said[word]
        own = {other for i in left for other in texts[i] if other not in prompts[i]}
        can = sorted(other for other in own if len(said[other] - rows) <= BY_CHANCE * rest)
        while can and len(left) > few and len(others) < OTHERS:
            others.append(max(can, key=lambda other: len(said[other] & left)))
            left = left - said[others[-1]]
        if others and len(left) <= few:
            learned[word] = tuple(others)
    return learned

"""Which words of a prompt a text has to say: those that the texts a run learned from nearly always repeat. No torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tinyld.rows import Example
from tinyld.writing import words

HELD = 0.8  # share of the texts learned that repeat a word of their prompt which has to be said
FEW = 5  # prompts that have a word, up to which it is as all rare words are
RARE = 10  # a word is rare where at most one prompt in so many has it: others are the template's, and a table's
MOST = 1_000  # words that a run keeps
LEARNED = 10_000  # texts, at most, that it is learned from


@dataclass(frozen=True)
class Coverage:
    """Of a task whose texts say what their prompts name, as descriptions of facts do."""

    unsaid: tuple[str, ...]  # words of prompts, folded, that a text need not say

    def lacking(self, prompt: str, text: str) -> int:
        """How many words that the prompt wants said the text has not."""
        return len({*words(prompt)}.difference(self.unsaid, words(text)))


def learn_coverage(examples: Sequence[Example]) -> Coverage | None:
    """Of the answers of examples; None where most rare words of their prompts are not repeated."""
    examples = examples[:: -(-len(examples) // LEARNED)]
    asked, said = Counter[str](), Counter[str]()
    for example in examples:
        own = {*words(f"{example.before} {example.after}")}
        asked.update(own)
        said.update(own.intersection(words(example.answer)))
    rare = [said[word] / n for word, n in asked.items() if RARE * n <= len(examples)]
    if sum(rare) < HELD * len(rare) or not rare:
        return None
    unsaid = [word for word, n in asked.most_common() if n >= FEW and said[word] < HELD * n]
    return Coverage(tuple(sorted(unsaid[:MOST])))

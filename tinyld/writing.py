"""What written texts are worth, beside references and by themselves. Text only: no tokens, no torch.

Case, accents and the form of quotation marks and dashes count in `exact_spelling` alone, as a base may not be able to
write them, and blanks there and in BLEU.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

WORD = r"[^\W_]+"
RARE = 10  # a word of prompts without capitals is a name where at most one prompt in so many has it
NO_SACREBLEU = "BLEU and chrF are missing: pip install sacrebleu"


def text_scores(
    prompts: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float | str]:
    """Scores of answers, each beside one or several references, all without case and accents (`fold`). Shares are in
    [0, 1], BLEU and chrF in [0, 100].

    - bleu, chrf: of the whole set, as sacrebleu has them; where that is not installed, `note` says so.
    - exact_match: share of answers that are a reference, word for word and mark for mark.
    - exact_spelling: share of answers that are a reference letter for letter, with its capitals, accents and blanks.
    - rouge_l: F1 of the longest common subsequence of words (Lin 2004), with the nearest reference; the mean.
    - length_ratio: words written, by those of the references that are nearest in length.
    - repeated_4grams: share of all runs of four words that stand earlier in their text.
    - repeated_sentence: share of answers that say a sentence twice.
    - names_held: of the prompts' names and numbers that a reference repeats, the share that the answer holds. Missing
      where there are none.
    """
    said = [words(answer) for answer in answers]
    wanted = [[words(text) for text in texts] for texts in references]
    nearest = [min((len(w) for w in ws), key=lambda n: abs(n - len(s))) for s, ws in zip(said, wanted, strict=True)]
    runs = [list(zip(*(s[i:] for i in range(4)), strict=False)) for s in said]
    exact = [spelling(a) in map(spelling, texts) for a, texts in zip(answers, references, strict=True)]
    n, most = len(answers), max(map(len, references))
    scores: dict[str, float | str] = {
        "exact_match": sum(exact) / n,
        "exact_spelling": sum(answer in texts for answer, texts in zip(answers, references, strict=True)) / n,
        "rouge_l": sum(max(overlap(s, w) for w in ws) for s, ws in zip(said, wanted, strict=True)) / n,
        "length_ratio": sum(map(len, said)) / max(1, sum(nearest)),
        "repeated_4grams": sum(len(r) - len(set(r)) for r in runs) / max(1, sum(map(len, runs))),
        "repeated_sentence": sum(map(says_twice, answers)) / n,
    }
    try:
        from sacrebleu.metrics import BLEU, CHRF

        streams = [[fold(texts[i]) if i < len(texts) else None for texts in references] for i in range(most)]
        metrics = {"bleu": BLEU(force=True), "chrf": CHRF()}
        folded = list(map(fold, answers))
        scores = {name: metric.corpus_score(folded, streams).score for name, metric in metrics.items()} | scores
    except ImportError:
        scores["note"] = NO_SACREBLEU
    held = total = 0
    for named, answer, texts in zip(names(prompts), said, wanted, strict=True):
        named = named.intersection(*[set().union(*texts)])
        held, total = held + len(named.intersection(answer)), total + len(named)
    return scores | ({"names_held": held / total} if total else {})


MARKS = str.maketrans({"’": "'", "‘": "'", "`": "'", "´": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})


def fold(text: str) -> str:
    """The text without case and accents, and with typewriter's marks."""
    found = text.casefold().translate(MARKS)
    if found.isascii():  # nearly every text of large files
        return found
    found = unicodedata.normalize("NFD", found)
    return "".join(c for c in found if not unicodedata.combining(c))


def words(text: str) -> list[str]:
    return re.findall(WORD, fold(text))


def spelling(text: str) -> list[str]:
    """Words and marks: what two texts must share to be the same."""
    return re.findall(rf"{WORD}|\S", fold(text))


def overlap(said: Sequence[str], wanted: Sequence[str]) -> float:
    """F1 of the longest common subsequence of two lists of words."""
    if not said or not wanted:
        return float(said == wanted)
    where: dict[str, int] = {}  # a word -> its places among those said, as bits
    for i, word in enumerate(said):
        where[word] = where.get(word, 0) | 1 << i
    row = whole = (1 << len(said)) - 1  # a row of the table of lengths in one number (Hyyrö 2004)
    for word in wanted:
        match = row & where.get(word, 0)
        row = (row + match | row - match) & whole
    return 2 * (len(said) - row.bit_count()) / (len(said) + len(wanted))


def says_twice(text: str) -> bool:
    sentences = [tuple(words(part)) for part in re.split(r"[.!?]+(?:\s|$)", text)]
    return any(n > 1 for sentence, n in Counter(sentences).items() if len("".join(sentence)) > 1)  # not an initial


def names(prompts: Sequence[str]) -> list[set[str]]:
    """Each prompt's names and numbers, folded. That is its words with a digit, and those with a capital that no prompt
    has without; where no prompt has a capital, its rare words. What stands in all prompts is their template's."""
    parts = [re.findall(WORD, unicodedata.normalize("NFC", prompt)) for prompt in prompts]
    count = Counter(word for part in parts for word in {fold(word) for word in part})
    small = {fold(word) for part in parts for word in part if word[0].islower()}
    cased = any(word[0].isupper() for part in parts for word in part)
    most = len(prompts) - 1 if len(prompts) > 1 else 1

    def is_name(word: str) -> bool:
        own = fold(word)
        if re.search(r"\d", word):
            return count[own] <= most
        return count[own] <= most and own not in small if cased else count[own] <= max(1, len(prompts) // RARE)

    return [{fold(word) for word in part if is_name(word)} for part in parts]

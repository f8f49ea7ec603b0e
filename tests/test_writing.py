"""Scores of written texts: each against values worked out by hand, and what a user without sacrebleu is told."""

import random
import sys
from functools import cache

import pytest

from tinyld.writing import NO_SACREBLEU, names, overlap, text_scores

FACTS = ["Aarhus Airport | runwayLength | 2702.0", "Tarō Asō | leaderOf | Japan", "Aarhus | leaderName | Jacob"]


def scores_of(answers: list[str], references: list[list[str]], prompts: list[str] | None = None) -> dict:
    return text_scores(prompts or FACTS[: len(answers)], answers, references)


def test_answers_that_are_one_of_their_references_score_everything() -> None:
    references = [["Wrong.", "The runway of Aarhus Airport is 2702.0 long."], ["Tarō Asō leads Japan!"]]
    found = scores_of(["the runway of aarhus airport is 2702.0 long .", "taro aso leads japan!"], references)
    assert [found[name] for name in ("exact_match", "rouge_l", "length_ratio", "names_held")] == [1, 1, 1, 1]
    assert scores_of(["a b c"], [["a", "a b c d", "a b c d e f g"]])["length_ratio"] == 3 / 4, "of the nearest"


def test_bleu_and_chrf_are_of_the_whole_set_and_all_references() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    answers = ["the cat sat on a mat .", "dogs bark"]
    references = [["A cat sat on the mat."], ["Dogs bark", "The dogs bark"]]
    streams = [["a cat sat on the mat.", "dogs bark"], [None, "the dogs bark"]]
    found = scores_of(answers, references)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, streams).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, streams).score)
    assert scores_of(["dogs bark"], [["Dogs bark", "The dogs bark"]])["chrf"] == pytest.approx(100)
    assert "note" not in found


def test_without_sacrebleu_the_rest_is_there_and_a_line_that_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    found = scores_of(["aarhus airport"], [["Aarhus Airport"]])
    assert found["note"] == NO_SACREBLEU and found["rouge_l"] == 1 and "bleu" not in found


@cache
def longest(a: str, b: str) -> int:
    if not a or not b:
        return 0
    return 1 + longest(a[1:], b[1:]) if a[0] == b[0] else max(longest(a[1:], b), longest(a, b[1:]))


@pytest.mark.parametrize("seed", range(20))
def test_overlap_is_the_f1_of_the_longest_common_subsequence(seed: int) -> None:
    rng = random.Random(seed)
    a, b = ("".join(rng.choices("abcd", k=rng.randint(1, 90))) for _ in range(2))
    assert overlap(list(a), list(b)) == pytest.approx(2 * longest(a, b) / (len(a) + len(b)))
    assert overlap([], list(b)) == overlap(list(a), []) == 0 and overlap([], []) == 1


@pytest.mark.parametrize(("answer", "grams", "sentence"), [
    ("a b c d e f g h", 0, 0), ("a b c d a b c d", 1 / 5, 0), ("it is it is it is it is", 3 / 5, 0),
    ("It is good. It is bad.", 0, 0), ("It is good. It  is GOOD!", 0, 1), ("Good. Good.", 0, 1),
    ("J. R. R. Tolkien", 0, 0), ("at 30.5 and 30.5 m", 0, 0), ("", 0, 0),
])  # fmt: skip
def test_loops_are_seen(answer: str, grams: float, sentence: float) -> None:
    found = scores_of([answer], [["x"]])
    assert (found["repeated_4grams"], found["repeated_sentence"]) == (pytest.approx(grams), sentence)


def test_names_are_words_with_a_capital_or_a_digit_and_where_none_has_a_capital_the_rare_ones() -> None:
    assert names(FACTS) == [{"aarhus", "airport", "2702", "0"}, {"taro", "aso", "japan"}, {"aarhus", "jacob"}]
    assert names(["A review of Emma", "A play of 1999", "A review: a good one"]) == [{"emma"}, {"1999"}, set()]
    assert names(["Write of Emma"]) == [{"write", "emma"}]
    assert names(["in Zu\u0308rich", "of Emma"]) == [{"zurich"}, {"emma"}], "an accent as a mark of its own"
    prompts = [f"name: {who} | food: {what}" for who, what in zip("abcdefghijklmnopqrst", "xy" * 10, strict=True)]
    assert names(prompts)[2] == {"c"} and names(["who wrote emma"] + prompts)[0] == {"who", "wrote", "emma"}


def test_names_count_where_a_reference_repeats_them() -> None:
    references = [["Aarhus Airport is 2702 long", "its runway is 2702 m"], ["Japan"], ["It is led by him"]]
    found = scores_of(["aarhus is 2702 long", "tokyo", "jacob leads"], references)
    assert found["names_held"] == 2 / 4  # of aarhus, airport, 2702 and japan; the 0 and jacob are in no reference
    assert "names_held" not in scores_of(["blue"], [["blue"]], ["what is the sky like"])

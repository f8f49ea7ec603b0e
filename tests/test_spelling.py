"""Capitals and accents of what a lower-casing base writes."""

from __future__ import annotations

import time
import unicodedata
from pathlib import Path

import pytest
from conftest import QUICK, good

import tinyld
from tinyld.rows import Example
from tinyld.spelling import Spelling, learn_spelling
from tinyld.writing import fold


def examples(*pairs: tuple[str, str]) -> list[Example]:
    return [Example(prompt, "", answer, None) for prompt, answer in pairs]


FACTS = examples(
    ("name[The Eagle], food[French]", "The Eagle has French food. It opened in July near the river."),
    ("name[Café Brazil], near[The Mill]", "Café Brazil is near The Mill. In July the river is low."),
    ("name[Tarō Asō], food[none]", "In the month of July, Tarō Asō eats in the USA."),
)


@pytest.mark.parametrize("example", FACTS)
def test_a_text_is_spelled_as_its_prompt_and_the_learned_texts_are(example: Example) -> None:
    learned = learn_spelling(FACTS, inside=False)
    assert learned == Spelling(starts=True, names_first=True, words={"july": "July", "usa": "USA", "the": "the"})
    assert learned.restore(fold(example.answer), example.before, "", False) == example.answer
    wanted = 'Who is "O\'Neill"? "The Zizzi" (in July).'
    assert learned.restore(wanted.lower(), "name[Zizzi], by[O'Neill]", "", False) == wanted, "marks stay"
    assert learned.restore("", "name[Zizzi]", "", False) == ""


def test_texts_that_were_learned_without_capitals_are_left_as_they_are() -> None:
    learned = learn_spelling(examples(("Rain", "rain is bad. so bad"), ("Sun", "the sun is good")), inside=False)
    assert learned.restore("the sun. sun is good", "Sun", "", False) == "the sun. sun is good"
    assert learned.restore("snow. ann is out", "is Ann out", "", False) == "snow. Ann is out", "but for a name"


def test_the_capital_of_a_question_is_not_its_first_words_own() -> None:
    learned = learn_spelling(examples(("Is he home?", "yes he is"), ("Was Ann home?", "no Ann was out")), inside=False)
    assert not learned.names_first
    assert learned.restore("no he was at ann 's", "Was Ann there? He knows", "", False) == "no he was at Ann 's"
    assert learned.restore("i saw ann", "WAS ANN OUT?", "", False) == "i saw ann", "capitals alone say nothing"


def test_a_question_that_begins_as_it_must_teaches_no_capital_and_hides_none() -> None:
    learned = learn_spelling(
        examples(*[("The cat sat :", "I saw the cat there")] * 3, *[("London is big :", "Yes, in London it is")] * 2),
        inside=False,
    )
    assert not learned.names_first
    assert learned.restore("yes, in london it is", "London is big :", "", False) == "Yes, in London it is"
    asked = learn_spelling(examples(*[("Q : The dog is out. A :", "I see that the dog is out")] * 3), inside=False)
    assert asked.restore("i think the cat is out", "Q : The cat ? A :", "", False) == "I think the cat is out"
    lost = Spelling(True, False, {"i": "I"})
    assert lost.restore("sorry that i lost it", "I lost it. Help :", "", False) == "Sorry that I lost it"


@pytest.mark.parametrize(
    ("wanted", "prompt"),
    [
        ("It's the economy, and I'm told they don't see Ann's T", "size S, M or T of I, LL and Ann"),
        ("At 5 p.m. on mondays, e.g. today, well ... maybe. So", "when ?"),
        ("iPhone 12 costs 500. eBay sells it. Ebony", "iPhone 12, eBay"),
        ("I saw ann at home", "question : WAS ANN AT HOME? answer :"),
        ("A house is in London", "BBC | HQ | London :"),
        ("Málaga is near A4 and McDonald", unicodedata.normalize("NFD", "Málaga | A4 | McDonald")),
    ],
)
def test_contractions_initials_and_odd_names_are_spelled_right(wanted: str, prompt: str) -> None:
    assert Spelling(True, True, {"i": "I"}).restore(fold(wanted), prompt, "", False) == wanted


def test_a_long_prompt_takes_time_in_proportion_to_its_length() -> None:
    started = time.perf_counter()
    Spelling(True, True, {}).restore("the x the y " * 50, "the " * 5_000, "", False)
    assert time.perf_counter() - started < 5, "half a second; it was nine where rows of words were copied"


def test_what_fills_a_gap_begins_a_sentence_only_behind_the_end_of_one() -> None:
    learned = learn_spelling([Example("The band was", "in Rome.", "very good", None)], inside=True)
    assert learned.restore("the trip to rome", "It ended.", "In Rome it was hot.", True) == "The trip to Rome"
    assert learned.restore("was the", "It", "end.", True) == "was the"
    assert learned.restore("the band", "", "played.", True) == "The band"
    assert learned.restore("the trip", 'He said "no."', "went on", True) == "The trip"
    assert Spelling(True, False, {}).restore("then ann", "", "Ann went home", True) == "Then Ann"


@pytest.mark.usefixtures("elsewhere")
def test_a_run_keeps_how_its_texts_are_spelled_and_predict_and_eval_spell_so(place: Path) -> None:
    rows = [{"text": f"Sun {i}", "answer": f"The SUN and the Sky and RAIN {i}"} for i in range(20)]
    options = QUICK | {"base": place / "base", "method": "trajectory-lora"}
    made = tinyld.finetune(rows, answer_column="answer", out="mine", **options)
    tinyld.finetune(place / "tell.toml", out="tell", **options)
    assert made.tasks[0].spelling == Spelling(True, False, {"rain": "RAIN", "sky": "Sky", "sun": "SUN"})
    ours = tinyld.load("mine").predict(["Sun 1"])[0]["answer"]
    assert ours == made.tasks[0].spelling.restore(ours.lower(), "Sun 1 :", "", False) != ours.lower()
    good("eval", "mine", "--predictions", "said", "--quiet")
    assert all(line.split("\t")[2][:1].isupper() for line in Path("said").read_text().splitlines()[1:])
    Path("other.toml").write_text(
        'template = "{text} : {answer}"\nanswer_column = "answer"\nanswer_tokens = 9\n[data]\ndev = "mine-rows.jsonl"\n'
    )
    assert made.predict(["Sun 1"], task="other.toml")[0]["answer"] == ours, "another task that asks alike"
    assert "SUN" not in good("info", "mine").stdout
    good("compose", "mine", "tell", "--out", "both", "--quiet")
    assert tinyld.load("both", task="mine-rows").predict(["Sun 1"])[0]["answer"] == ours
    assert tinyld.load("tell").tasks[0].spelling == Spelling(False, True, {})

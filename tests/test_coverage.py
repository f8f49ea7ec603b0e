"""What a text has to say of its prompt."""

from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK

import tinyld
from tinyld import evaluate
from tinyld.coverage import Coverage, learn_coverage
from tinyld.rows import Example

FACTS = [(f"name[Bar {i}], food[Thai]", f"Bar {i} sells Thai food .") for i in range(40)]
ASKED = [(f"Who wrote Book {i}, in which year?", "Ann did, then .") for i in range(40)]


def learned(pairs: list[tuple[str, str]]) -> Coverage | None:
    return learn_coverage([Example(prompt, "", answer, None) for prompt, answer in pairs])


def test_texts_that_repeat_what_is_rare_in_their_prompts_have_to_and_answers_to_questions_do_not() -> None:
    """What a table calls its columns need not be said, however often it stands there."""
    found = learned(FACTS)
    assert found == Coverage(("name",), {})
    new = "name[Zwölf 99], food[Thai]"
    assert found.missing(new, "there is thai food at zwolf 99") == set(), "without case and accents"
    assert found.missing(new, "Zwölf sells food") == {"99", "thai"}
    assert learned(ASKED) is None and learned([("rain", "rain")] * 3) is None


@pytest.mark.usefixtures("elsewhere")
def test_a_run_keeps_it_and_its_texts_are_looked_through_for_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"Sun {i}", "answer": f"sky {i}"} for i in range(20)]
    options = QUICK | {"base": place / "base", "method": "trajectory-lora"}
    tinyld.finetune(rows, answer_column="answer", out="mine", **options)
    run, decode, heard = tinyld.load("mine"), evaluate.decode, list[Any]()
    assert run.tasks[0].coverage == Coverage(("sun",), {})

    def listening(*given: Any) -> Any:
        found = decode(*given)
        heard.extend(given[-1].lacking(found[0]))
        return found

    monkeypatch.setattr(evaluate, "decode", listening)
    prompts = ["Sun 3", "Sun rain"]
    said = [found["answer"] for found in run.predict(prompts)]
    assert heard == [
        len(run.tasks[0].coverage.missing(f"{prompt} :", text)) for prompt, text in zip(prompts, said, strict=True)
    ]


def test_what_nearly_every_text_says_in_other_words_has_to_be_said_in_one_of_them() -> None:
    """Not what half of the texts say, what texts of other prompts say as well, or what the prompt itself has."""
    said = "children", "families", "kids"
    pairs = [
        (f"name[Bar {i}], friendly[yes], food[Thai]" if i % 2 else f"name[Bar {i}], food[Thai], seats[few]",
         f"Bar {i} sells Thai food , {said[i // 2 % 3]} ." if i % 2 else f"Bar {i} sells Thai food .")
        for i in range(120)
    ]  # fmt: skip
    found = learned(pairs)
    assert found is not None and {*found.others} == {"friendly", "yes"} and found.unsaid == ("few", "name", "seats")
    prompt = "name[Pub], friendly[no]"
    assert found.missing(prompt, "Pub sells food .") == {"friendly", "no"}
    assert {"no"} == found.missing(prompt, "Pub : children .") == found.missing(prompt, "Kids like Pub .")

"""Capitals, accents and blanks of what a lower-casing base writes."""

import re
import time
import unicodedata
from pathlib import Path

import pytest
from conftest import QUICK, good

import tinyld
from tinyld import finetuning
from tinyld.rows import Example
from tinyld.spelling import Spelling, learn_spelling
from tinyld.tasks import Task
from tinyld.tokenizer import Tokenizer, detokenize
from tinyld.workspace import default_base
from tinyld.writing import fold


def learned(*pairs: tuple[str, str]) -> Spelling:
    return learn_spelling([Example(prompt, "", answer, None) for prompt, answer in pairs], inside=False)


FACTS = [
    ("name[The Eagle], food[French]", "The Eagle has French food. It opened in July near the river."),
    ("name[Café Brazil], near[The Mill]", "Café Brazil is near The Mill. In July the river is low."),
    ("name[Tarō Asō], food[none]", "In the month of July, Tarō Asō eats in the USA."),
]
OF_FACTS = learned(*FACTS)
SMALL = learned(("Rain", "rain is bad. so bad"), ("Sun", "the sun is good"))
ASKED = learned(("Is he home?", "yes he is"), ("Was Ann home?", "no Ann was out"))
BEGUN = learned(*[("The cat sat :", "I saw the cat there")] * 3, *[("London is big :", "Yes, in London it is")] * 2)
TURNS = learned(*[("Q : The dog is out. A :", "I see that the dog is out")] * 3)
STARTS = Spelling(True, True, {"i": "I"})
TITLES = learned(
    *[("a man met a dog", "Man and Dog Meet at Last"), ("rain fell on the town of Ely", "A Rain on the Town of Ely")]
    * 9
)


def test_what_is_learned_of_texts_is_whether_capitals_begin_them_are_names_own_and_of_which_words() -> None:
    assert OF_FACTS == Spelling(starts=True, names_first=True, words={"july": "July", "usa": "USA", "the": "the"})
    assert not ASKED.names_first, "the capital of a question is not its first word's own"
    assert not BEGUN.names_first, "a question that begins as it must teaches no capital"


@pytest.mark.parametrize(("spelling", "prompt", "wanted"), [
    *((OF_FACTS, prompt, answer) for prompt, answer in FACTS),
    (OF_FACTS, "name[Zizzi], by[O'Neill]", 'Who is "O\'Neill"? "The Zizzi" (in July).'),  # marks stay
    (OF_FACTS, "name[Zizzi]", ""),
    (SMALL, "Sun", "the sun. sun is good"),  # as it was learned, without capitals
    (SMALL, "is Ann out", "snow. Ann is out"),  # but for a name
    (ASKED, "Was Ann there? He knows", "no he was at Ann 's"),
    (ASKED, "WAS ANN OUT?", "i saw ann"),  # capitals alone say nothing
    (BEGUN, "London is big :", "Yes, in London it is"),
    (TURNS, "Q : The cat ? A :", "I think the cat is out"),
    (TITLES, "snow on the roof of the house", "The Snow on the Roof of the House Falls"),
    (TITLES, "a word from eBay", "eBay and Ann Agree: of Course"),
    (Spelling(True, False, {"i": "I"}), "I lost it. Help :", "Sorry that I lost it"),
    # contractions, initials, odd names
    (STARTS, "size S, M or T of I, LL and Ann", "It's the economy, and I'm told they don't see Ann's T"),
    (STARTS, "when ?", "At 5 p.m. on mondays, e.g. today, well ... maybe. So"),
    (STARTS, "iPhone 12, eBay", "iPhone 12 costs 500. eBay sells it. Ebony"),
    (STARTS, "question : WAS ANN AT HOME? answer :", "I saw ann at home"),
    (STARTS, "BBC | HQ | London :", "A house is in London"),
    (STARTS, "a dog", "Dogs vs. cats, etc. and a dog. So"),
    (STARTS, unicodedata.normalize("NFD", "Málaga | A4 | McDonald"), "Málaga is near A4 and McDonald"),
])  # fmt: skip
def test_a_text_is_spelled_as_its_prompt_and_learned_texts_are(spelling: Spelling, prompt: str, wanted: str) -> None:
    assert spelling.restore(fold(wanted), prompt, "", False) == wanted


@pytest.mark.parametrize(("prompt", "written", "wanted"), [
    ("Villa21@Mail.com | see https://www.ritz.com/rooms?a=1.", "go to https: / / www. ritz. com/rooms? a = 1 now.",
     "Go to https://www.ritz.com/rooms?a=1 now."),
    ("at http://Host.lan:8080/A1, see", "go to http: / / host. lan: 8080 / a1.", "Go to http://Host.lan:8080/A1."),
    ("at:http://Host.lan:8080,off:20/A+", "go to http: / / host. lan: 8080 for 20 / a +.",
     "Go to http://Host.lan:8080 for 20/A+."),
    ("Villa21@Mail.com of B&B, #77; C++", "villa21 @ mail. com has # 77 in c + +. it is b & b.",
     "Villa21@Mail.com has #77 in C++. It is B&B."),
    ("<Gina>, -39°C, US$5.00, Ph.D. of A_1", "set it to-39 ° c for < gina >, us $5.00 and the ph. d. of a _ 1",
     "Set it to -39°C for <Gina>, US$5.00 and the Ph.D. of A_1"),
    ("size:5,tea|cake.End", "size: 5, tea | cake. end", "Size: 5, tea | cake. End"),  # parts of a prompt
    ("a1@b", "ca1 @ bc", "Ca1 @ bc"),
    ("the best (film).It was (15)%more, report(final).pdf", "a film. it was 3% more in notes. pdf",
     "A film. It was 3% more in notes. Pdf"),  # behind a bracket
    ("from .05 to -5", "it is 0.05 of 3-5 at. 05 or-5", "It is 0.05 of 3-5 at .05 or -5"),  # a part of a number
    ("site='www.X.com/A', $[$5] t[-9°C] b[“B&B”] (Covid)-19", "see www. x. com / a, $ 5 or-9 ° c, b & b, covid-19",
     "See www.X.com/A, $5 or -9°C, B&B, Covid-19"),
    ("name=Zizzi,site=www.X.com/?a=B|n=C-1.D", "see www. x. com /? a = b or c-1. d", "See www.X.com/?a=B or C-1.D"),
    # beside a field's name
    *((f"name{begin}Zizzi{end} site{begin}www.St-Mary-s.co.uk/a?b=1{end} n{begin}A-1.B{end}",
       "zizzi is at www. st-mary-s. co. uk / a? b = 1 or a-1. b.", "Zizzi is at www.St-Mary-s.co.uk/a?b=1 or A-1.B.")
      for begin, end in ("[]", "()", "=,", ":;")),
])  # fmt: skip
def test_what_has_marks_and_no_blank_is_written_as_in_the_prompt(prompt: str, written: str, wanted: str) -> None:
    assert STARTS.restore(written, prompt, "", False) == wanted


def test_words_in_a_row_are_spelled_as_learned_texts_have_them_where_these_differ_from_their_prompts() -> None:
    spelling = learned(
        ("name[The Fast Inn], food[Fast food]", "The Fast Inn is a fast food pub"),
        *[("name[Cotto], food[Fast food]", "Fast food is at Cotto. Try Cotto for fast food")] * 2,
        ("kind[pub]| food[Fast food]", "It is a pub: fast food"),
        ("name[Aromi], near[The Mill]", "Aromi is near the Mill"),
        ("name[Zizzi], near[The Mill]", "Zizzi is by The Mill"),
    )
    assert spelling.words == {"fast food": "fast food"}
    for text in ("The Fast Lane by The Mill has fast food", "Fast food is at The Fast Lane"):
        assert spelling.restore(fold(text), "name[The Fast Lane], near[The Mill], food[Fast food]", "", False) == text
    assert spelling.restore("a pub fast food", "pub | Fast food", "", False) == "A pub fast food", "two fields"


def as_written(texts: list[str]) -> list[str]:
    """What the released base's tokens make of texts: no capitals, accents or blanks."""
    return [detokenize(re.findall(r"[^\W_]+|[^\w\s]|_", fold(text).replace("--", "-"))) for text in texts]


@pytest.mark.parametrize(("rows", "asked", "wanted"), [
    # blanks and marks: as the prompt has them between the same words, or as they were learned between words of a kind
    ([("open: {0}:00 - 1{0}:30", "It is open {0}:00 - 1{0}:30")], "open: 7:15 - 19:45", "It is open 7:15 - 19:45"),
    ([("open: {0}:00 - 1{0}:30", "It is open {0}:00-1{0}:30")], "open: 7:15 - 19:45", "It is open 7:15-19:45"),
    ([("low {0} high 1{0}", "From -{0} to 1{0} degrees")], "low 8 high 12", "From -8 to 12 degrees"),
    ([("price {0}", "It costs $ {0}, so 2{0} %")], "price 7", "It costs $ 7, so 27 %"),
    ([("day {0}", "Mon–Fri [{0}]")], "day 9", "Mon–Fri [9]"),
    ([("by C. D. Doe{0}", "C. D. Doe{0} did"), ("by J.R. Roe{0}", "J.R. Roe{0} did")], "by A. B. Poe | J.R. Doe",
     "A. B. Poe and J.R. Doe did"),
    ([("at {0} Elm Ave", "At {0} Elm Ave. is it. It is {0}")], "at 5 Oak Ave", "At 5 Oak Ave. is it. It is"),
    ([("bar {0}", "A family-friendly bar {0} - it is big")], "pub 7", "A family-friendly pub 7 - it is big"),
    ([("bar", "A family-friendly bar - it is big {0}")], "pub", "A family-friendly pub - it is big"),
    # of all letters
    ([("ask Ann Lee{0} of Rome", "ask ann lee{0} of rome")] * 3, "ask Tim Roe of Oslo", "ask tim roe of oslo"),
    ([("ask Ann Lee{0}", "ASK ANN LEE{0} NOW")], "ask Tim Roe", "ASK TIM ROE NOW"),
    ([("from: MX{0} | to: LAX", "Fly from MX{0} to LAX")], "from: FHR | to: SFO", "Fly from FHR to SFO"),
])  # fmt: skip
def test_blanks_and_letters_are_those_of_learned_texts(rows: list[tuple[str, str]], asked: str, wanted: str) -> None:
    examples = [Example(p.format(i), "", a.format(i), None) for p, a in rows for i in range(1, 9)]
    spelling = learn_spelling(examples, False, as_written)
    assert spelling.restore(*as_written([wanted]), asked, "", False) == wanted


@pytest.mark.parametrize(("prompt", "answer"), [
    ("call robert on monday at {0}", "It is at {0} on Monday: call Robert on Monday at {0}"),  # words in a row
    ("alarm {0}", "USB alarm {0} is set. Übrigens: eBay too"),  # words that begin sentences alone
    ("tea {0}", "{0} packs are sold. They were good. #{0}"),  # texts that begin with no letter
    ("tea {0}", "¿Cuesta {0}? Gracias. Adiós"),
    ("lamp {0}", "Lamp {0}: write to help@acme.com or see www.acme.com/a?b={0}. Node.js by a Ph.D. is new"),
    ("ann {0}", '"Is it {0}?" asked Ann. "No!" he said. He left'),
    ("api {0}", "feat(api): add {0} in `api` -- so it goes… and `on`"),
    ("rain {0}", "it rained . . . for {0} days , so we left ."),
    ("fast {0}", "Run it --fast {0} --dry-run"),
    ("name: Bar Inc. | year: {0}", "In {0} it was Bar Inc.. It is big"),
    ("ann {0}", "<p>Ann has <b>{0}</b></p>"),
    ("ORDER A{0}X OF TIM ROE IN BIN D{0}", "It is A{0}X of Tim Roe in bin D{0}"),
])  # fmt: skip
def test_what_all_learned_texts_spell_alike_is_spelled_so(prompt: str, answer: str) -> None:
    path = default_base() / "tokenizer.json"
    written = Tokenizer.parse(path.read_bytes(), path).rewritten
    examples = [Example(prompt.format(i), "", answer.format(i), None) for i in range(1, 9)]
    spelling, wanted = learn_spelling(examples, False, written), answer.format(99)
    assert spelling.restore(*written([wanted]), prompt.format(99), "", False) == wanted


@pytest.mark.parametrize(("prompt", "wanted"), [
    ("mail: Ann.Lee@Ely.com | www.Acme.com", "Write to Ann.Lee@Ely.com or see www.Acme.com"),
    ("Luqua'lubar in Xi'an", "Go to Luqua'lubar in Xi'an"),
    ("company: Pimi Inc. | show: Yahoo! | year: 9 :", "Pimi Inc. is old. Yahoo! is new. It ends"),
    ("<name> Yahoo! <year> 9 :", "In 9 Yahoo! was new"),
    ("set --dry-run and -5 :", "Set --dry-run and -5"),
    ("He came. :", "He came. So did she"),  # the prompt's end is a sentence's
    ("it is -5 or -5%", "It is -5 and in -5%"),
])  # fmt: skip
def test_a_name_has_its_own_marks(prompt: str, wanted: str) -> None:
    assert STARTS.restore(*as_written([wanted]), prompt, "", False) == wanted


def test_a_name_of_two_words_keeps_its_capital_at_the_beginning_of_a_prompt() -> None:
    assert BEGUN.restore("is it true that ann lee came", "Ann Lee came :", "", False) == "Is it true that Ann Lee came"


def test_what_addresses_have_is_no_rule_for_the_ends_of_sentences() -> None:
    examples = [Example(f"see a{i}.com?b={i}", "", f"See a{i}.com?b={i}. Who came? Ann", None) for i in range(9)]
    assert learn_spelling(examples, False, as_written).restore("who left? tim", "", "", False) == "Who left? Tim"


def test_a_long_prompt_takes_time_in_proportion_to_its_length() -> None:
    started = time.process_time()
    Spelling(True, True, {}).restore("the x the y " * 50, "the " * 5_000, "", False)
    long = [("a" * 200_000, "b. C" + "b" * 200_000), ("x. y" * 900, "x. y" * 900)]
    long += [(":" * 90_000, "a - b" * 9_000), ("x" + "." * 90_000 + "y", "x y")]
    spelling = learn_spelling([Example(prompt, "", answer, None) for prompt, answer in long], False, as_written)
    for prompt, answer in long:
        spelling.restore(*as_written([answer]), prompt, "", False)
    assert time.process_time() - started < 5, "half a second; it was nine where rows of words were copied"


def test_what_fills_a_gap_begins_a_sentence_only_behind_the_end_of_one() -> None:
    spelling = learn_spelling([Example("The band was", "in Rome.", "very good", None)], inside=True)
    for before, wanted, after in (
        ("It ended.", "The trip to Rome", "In Rome it was hot."),
        ("It", "was the", "end."),
        ("", "The band", "played."),
        ('He said "no."', "The trip", "went on"),
    ):
        assert spelling.restore(fold(wanted), before, after, True) == wanted
    assert Spelling(True, False, {}).restore("then ann", "", "Ann went home", True) == "Then Ann"


@pytest.mark.usefixtures("elsewhere")
def test_a_run_keeps_how_its_texts_are_spelled_and_predict_and_eval_spell_so(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(f"Sun {i}", f"The SUN and the Sky and RAIN {i}") for i in range(20)]
    options, tasks = QUICK | {"base": place / "base", "method": "trajectory-lora"}, list[Task]()
    measured = finetuning.evaluate
    monkeypatch.setattr(finetuning, "evaluate", lambda *a, **k: tasks.append(a[1].task) or measured(*a, **k))
    made = tinyld.finetune(rows, answer_column="answer", out="mine", **options)
    assert tasks[-1].learned_as(made.tasks[0]) == tasks[-1], "training measures what is written so, too"
    tinyld.finetune(place / "tell.toml", out="tell", **options)
    assert made.tasks[0].spelling == Spelling(True, False, {"rain": "RAIN", "sky": "Sky", "sun": "SUN"})
    assert made.tasks[0].deletes, "it learned that, too"
    ours = tinyld.load("mine").predict(["Sun 1"])[0]["answer"]
    assert ours == made.tasks[0].spelling.restore(ours.lower(), "Sun 1 :", "", False) != ours.lower()
    good("eval", "mine", "--predictions", "said", "--quiet")
    assert all(line.split("\t")[2][:1].isupper() for line in Path("said").read_text().splitlines()[1:])
    toml = 'template = "{text} : {answer}"\nanswer_column = "answer"\nanswer_tokens = 9\n'
    Path("other.toml").write_text(f'{toml}[data]\ndev = "mine-rows.jsonl"\n')
    assert made.predict(["Sun 1"], task="other.toml")[0]["answer"] == ours, "another task that asks alike"
    assert "SUN" not in good("info", "mine").stdout
    good("compose", "mine", "tell", "--out", "both", "--quiet")
    assert tinyld.load("both", task="mine-rows").predict(["Sun 1"])[0]["answer"] == ours
    assert tinyld.load("tell").tasks[0].spelling == Spelling(False, True, {})

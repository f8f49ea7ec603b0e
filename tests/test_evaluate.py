"""Evaluation: decoded accuracy, its interval, macro-F1, verbalizer scores and the bound, of known answers."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import label_task, seeded, task_of
from torch import Tensor

from tinyld.config import ModelConfig, SampleConfig
from tinyld.data import Batch, TaskRows, answer_ids
from tinyld.device import shrink
from tinyld.diffusion import noise_answers, token_nll
from tinyld.evaluate import all_masked, evaluate, label_logp, label_scores, logits_of, pushed_logits, wilson
from tinyld.methods import METHODS, make_config
from tinyld.model import Denoiser
from tinyld.rows import Example
from tinyld.tasks import Task
from tinyld.tokenizer import Tokenizer

ONE = {"bad": "terrible", "good": "great"}
SEVERAL = {"bad": "not good", "good": "very very great", "flat": "dull"}
TEXTS = ["the film was", "a very dull plot and", "it is", "food of the", "but music in"]


class Oracle(Denoiser):
    """It knows its answers: prompt ids -> ids of a slot, each with a logit of `sure`. Its states are its logits."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]], vocab_size: int, sure: float):
        super().__init__(ModelConfig(vocab_size, d_model=8, num_layers=1))
        self.answers, self.sure = answers, sure

    def one_pass(self, xt: Tensor, t: Any, mask: Any, prompt: Tensor, cached: Any = None, where: Any = None) -> Any:
        logits = torch.zeros(*xt.shape, self.config.vocab_size)
        for row in range(len(xt)):
            answer = self.answers[tuple(xt[row][prompt[row]].tolist())]
            real = torch.ones_like(prompt[row]) if mask is None else mask[row]
            slot = (real & ~prompt[row]).nonzero()[:, 0]
            logits[row, slot, torch.tensor(answer[: len(slot)])] = self.sure
        return logits[where], None

    def head(self, logits: Tensor, only: Tensor | None = None) -> Tensor:
        return logits if only is None else logits[:, only]

    def nll(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, reduction="none")


def rows_of(task: Task, tokenizer: Tokenizer, n: int) -> TaskRows:
    """n rows, each with a prompt of its own, whose labels take turns."""
    examples = []
    for i in range(n):
        words, gold = " ".join([TEXTS[i % 5]] * (1 + i // 25) + [TEXTS[i // 5 % 5]]), i % len(task.labels)
        examples.append(Example(f"{words} it was", ".", task.verbalizer[task.labels[gold]], gold))
    return TaskRows(examples, task, tokenizer, 48)


Says = Callable[[int, list[int]], list[int]]


def scored(rows: TaskRows, tokenizer: Tokenizer, says: Says, sure: float = 30.0, **options: Any) -> Any:
    """How a denoiser scores that answers row i with says(i, its gold slot)."""
    answers = {}
    for i, ids in enumerate(rows.ids):
        start, stop = rows.starts[i], rows.starts[i] + rows.slot
        prompt = tuple(np.concatenate([ids[:start], ids[stop:]]).tolist())
        assert prompt not in answers
        answers[prompt] = says(i, ids[start:stop].tolist())
    return evaluate(Oracle(answers, tokenizer.vocab_size, sure), rows, tokenizer, **options)


@pytest.fixture()
def score(tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., tuple[TaskRows, Any]]:
    """(n rows of a task with a verbalizer, how it scores that a denoiser says so of them, by default what is right)."""

    def score(verbalizer: dict[str, str], n: int, says: Says = lambda i, gold: gold, **more: Any) -> Any:
        rows = rows_of(label_task(tmp_path, **verbalizer), tokenizer, n)
        return rows, scored(rows, tokenizer, says, **more)

    return score


@pytest.mark.parametrize(("correct", "n", "low", "high"), [
    (10, 10, 0.7225, 1.0),
    (0, 1, 0.0, 0.7935),
    (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
    (15, 148, 0.0624, 0.1605),  # the same
])  # fmt: skip
def test_the_wilson_interval_has_its_known_values(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


def test_each_label_has_its_scores_and_its_row_of_the_confusion() -> None:
    gold, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, -1, 1, 1, 1])
    found = label_scores(gold, predicted, gold, ["a", "b", "c"])
    classes, confusion = found["classes"], found["confusion"]
    assert confusion["a"] == {"a": 1, "b": 1, "c": 0, "unreadable": 1} and confusion["c"]["b"] == 1
    other = label_scores(gold, predicted, gold, ["a", "b", "unreadable"])["confusion"]
    assert other["a"] == {"a": 1, "b": 1, "unreadable": 0, "(unreadable)": 1}, "no label is taken for it"
    assert classes["a"] == {"n": 3, "precision": 1.0, "recall": pytest.approx(1 / 3), "f1": pytest.approx(1 / 2)}
    assert classes["b"] == {"n": 2, "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3)}
    assert classes["c"] == {"n": 1, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert found["macro_f1"] == pytest.approx((1 / 2 + 2 / 3) / 3)
    summary = [found[name] for name in ("accuracy", "majority", "unreadable", "scored_accuracy")]
    assert summary == [1 / 2, 1 / 2, 1 / 6, 1] and (found["low"], found["high"]) == wilson(3, 6)
    there = np.array([0, 1, 1])
    found = label_scores(there, there, there, ["a", "b", "c"])
    assert found["macro_f1"] == 1.0, "c is asked nowhere"
    assert found["classes"]["c"] == {"n": 0, "precision": None, "recall": None, "f1": None}


@pytest.mark.parametrize(("verbalizer", "slot"), [(ONE, 1), (SEVERAL, 4)])
def test_a_denoiser_that_is_right_scores_all_in_row_order(verbalizer: dict[str, str], slot: int, score: Any) -> None:
    """Over several batches: of one token two."""
    done, n, labels = list[float](), 84, list(verbalizer)
    rows, found = score(verbalizer, n, advance=done.append)
    scores = found.scores
    assert rows.slot == slot and found.passes_per_row == 1, "what is sure is written at once"
    assert [scores[name] for name in ("accuracy", "scored_accuracy", "macro_f1", "unreadable")] == [1, 1, 1, 0]
    assert (scores["low"], scores["high"]) == wilson(n, n) and scores["majority"] == 1 / len(labels)
    assert found.nll_bound == pytest.approx(0.0, abs=1e-5) and (found.n, found.truncated) == (n, 0)
    assert scores["confusion"]["good"]["good"] == n / len(labels)
    for row, label, prediction in zip(rows.examples, rows.labels, found.predictions, strict=True):
        assert prediction == (f"{row.before} ____ .", labels[label], labels[label])
    assert done == sorted(done) and done[-1] == pytest.approx(n)
    assert slot > 1 or (len(done) == 2 and n / 2 < done[0]), "the longer half comes first, and counts for more"


def test_an_answer_that_is_no_label_is_wrong(score: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    film, head = torch.tensor(tokenizer.encode("film")), Oracle.head
    monkeypatch.setattr(Oracle, "head", lambda self, logits, *only: head(self, logits.index_fill(1, film, 40.0), *only))
    _, found = score(ONE, 10)
    scores = found.scores
    assert (scores["accuracy"], scores["unreadable"], scores["macro_f1"]) == (0.0, 1.0, 0.0)
    assert scores["scored_accuracy"] == 1.0 and {text for *_, text in found.predictions} == {"film"}


@pytest.mark.parametrize("verbalizer", [ONE, SEVERAL], ids=["one token", "several tokens"])
def test_knowing_nothing_has_the_bound_log_v(verbalizer: dict[str, str], score: Any, tokenizer: Tokenizer) -> None:
    rows, found = score(verbalizer, 30, sure=0.0)
    v, tokens = tokenizer.vocab_size, int((rows.ends + (rows.ends < rows.slot)).sum())
    goes_on = -math.log(1 - 1 / v) * int(rows.ends.sum()) / tokens if len(verbalizer) > 2 else 0.0  # at each token
    assert found.nll_bound == pytest.approx(math.log(v) + goes_on, rel=1e-5)
    assert found.nll_stderr == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("words", ["not film", "not", "very great", "dull dull", "film"])
def test_a_verbalizer_is_read_only_when_it_is_the_whole_answer(words: str, score: Any, tokenizer: Tokenizer) -> None:
    said = [*tokenizer.encode(words), *[tokenizer.eos_id] * 3]
    scores = score(SEVERAL, 3, lambda i, gold: said[:4])[1].scores
    assert (scores["accuracy"], scores["unreadable"]) == (0.0, 1.0)


def test_labels_are_as_likely_as_often_whatever_length(model: Denoiser, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """One prompt, half of whose answers are the longest: within 0.1, as steps that are this large leave a part of what
    each batch draws.

    Were the longest one's slot without an [EOS], it would get 0.7."""
    task, likely = label_task(tmp_path, **{"bad": "dull", "good": "very great"}), list[float]()
    examples = [Example("the film", ".", *(("very great", 1) if i % 2 else ("dull", 0))) for i in range(64)]
    rows, generator = TaskRows(examples, task, tokenizer, 48), seeded()
    batch, optimizer = rows.take(np.arange(64)), torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(200):
        optimizer.zero_grad()
        parts = noise_answers(batch, tokenizer.mask_id, generator)
        torch.cat([token_nll(model, part)[0] for part in parts]).mean().backward()
        optimizer.step()
        if step >= 100:
            with torch.no_grad():
                scores = label_logp(model, rows.take(np.array([0])), answer_ids(task, tokenizer), tokenizer)
            likely.append(float(scores.softmax(1)[0, 1]))
    assert np.mean(likely) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("sampler", ["low_confidence", "threshold", "ancestral"])
def test_the_same_numbers_come_out_twice(sampler: str, model: Denoiser, tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows, found = rows_of(label_task(tmp_path, **SEVERAL), tokenizer, 70), []
    for seed in range(2):
        torch.manual_seed(seed)  # the global generator must not matter
        once = evaluate(model, rows, tokenizer, SampleConfig(sampler, temperature=1.0))
        found.append((once.record() | {"rows_per_second": 0.0}, once.predictions))
    assert found[0] == found[1]


def test_a_real_denoiser_is_scored_the_same_in_any_batch(
    model: Denoiser, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(label_task(tmp_path, **ONE), tokenizer, 30)
    whole = evaluate(model, rows, tokenizer)
    monkeypatch.setattr("tinyld.evaluate.EVAL_BATCH", 7)
    parts = evaluate(model, rows, tokenizer)
    assert whole.nll_bound == pytest.approx(parts.nll_bound, rel=1e-5)
    assert (whole.scores, whole.predictions) == (parts.scores, parts.predictions)


@pytest.mark.parametrize("shifted", [False, True])
def test_adapters_that_share_a_pass_score_labels_as_each_does_alone(config: ModelConfig, shifted: bool) -> None:
    generator = seeded()
    model = Denoiser(replace(config, shifted=shifted), generator).eval()
    x0, slot = torch.randint(5, 60, (2, 8), generator=generator), torch.zeros(2, 8, dtype=torch.bool)
    slot[0, 6] = slot[1, 3] = True
    batch, ids = Batch(x0, slot, torch.ones_like(slot), torch.arange(2)), torch.tensor([7, 9, 30])
    pushes, alone = [], []
    for blocks in range(config.num_layers + 1):
        settings = make_config("trajectory-lora", {"recipe": "fast", "budget": 0.1, "blocks": blocks}, config)
        method = METHODS["trajectory-lora"](settings, model, generator)
        for parameter in method.own.values():
            parameter.data.normal_(0.0, 0.3, generator=generator)
        pushes.append(model.push)
        with torch.no_grad():
            alone.append(logits_of(model, model.states(*all_masked(batch, 4), where=slot), ids)[:, ids])
    with torch.no_grad():
        shared = list(pushed_logits(model, batch, 4, pushes, [ids] * len(pushes)))
    torch.testing.assert_close(shared, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kept_in", ["fp32", "int8"])
def test_near_labels_are_told_apart_in_bf16(model: Denoiser, kept_in: str) -> None:
    """bf16 has steps of 0.06 at logits of 8 to 16: a fifth of these pairs would be level there."""
    shrink(model, kept_in)
    model.output_bias.data[[7, 9]] += torch.tensor([12.0, 12.001])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = logits_of(model, torch.randn(50, model.config.d_model), torch.tensor([7, 9]))
        assert logits.shape == (50, model.config.vocab_size) and logits.dtype == torch.float32
        assert (logits[:, 7] != logits[:, 9]).all()
        assert set(logits.argmax(1).tolist()) == {7, 9}
        assert len((logits[:, 7] - logits[:, 9]).unique()) > 45


@pytest.fixture()
def tale(tmp_path: Path) -> Task:
    """A task that writes."""
    return task_of(tmp_path, 'template = "{title} : {answer}"\nanswer_column = "story"\nanswer_tokens = 8\n')


def test_a_generation_task_has_a_bound_and_no_accuracy(model: Denoiser, tokenizer: Tokenizer, tale: Task) -> None:
    rows = TaskRows([Example("the film :", "", "it was very dull", None)] * 4, tale, tokenizer, 48)
    record = evaluate(model, rows, tokenizer).record()
    assert not {"accuracy", "low", "high", "unreadable", "macro_f1", "scored_accuracy"} & set(record)
    assert record["nll_bound"] == pytest.approx(math.log(tokenizer.vocab_size), rel=0.1)  # an untrained denoiser
    assert record["n"] == 4 and 0 <= record["rouge_l"] < 1 and "exact_match" in record
    bound = evaluate(model, rows, tokenizer, answer=False)
    assert bound.passes_per_row == 0 and bound.record()["nll_bound"] == record["nll_bound"], "nothing is written"


@pytest.mark.parametrize("deletes", [False, True])
def test_a_text_becomes_shorter_if_its_run_has_learned_to(
    deletes: bool, model: Denoiser, tokenizer: Tokenizer, tale: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    def eager(xt: Tensor, *told: Any, where: Tensor) -> Tensor:
        """Writes a text of six tokens; a delete, where it may be."""
        places = torch.zeros(*xt.shape, tokenizer.vocab_size)
        places[..., tokenizer.delete_id], places[..., 9] = 9.0, 1.0
        if where[0].sum() == 8:  # where does it end?
            places[:, int(where[0].int().argmax()) + 6, tokenizer.eos_id] = 20.0
        return places[where]

    monkeypatch.setattr(model, "look", lambda *given, **told: (eager(*given, **told), None))
    rows = TaskRows([Example("the film :", "", "it was", None)] * 3, replace(tale, deletes=deletes), tokenizer, 48)
    found = evaluate(model, rows, tokenizer)
    assert {text for _, _, text in found.predictions} == {"" if deletes else tokenizer.decode([9] * 6)}


def test_written_texts_are_scored_beside_all_their_references(tokenizer: Tokenizer, tale: Task) -> None:
    right = ("a bad plot", "The film was bad.")
    examples = [Example("Film :", "", right[0], None, right), Example("The music :", "", "it was dull", None)]
    second = [*tokenizer.encode("the film was bad."), tokenizer.eos_id]
    rows = TaskRows(examples, tale, tokenizer, 48)
    found = scored(rows, tokenizer, lambda i, gold: [*second, *gold][:8] if i == 0 else gold)
    assert found.scores["exact_match"] == 1 and found.scores["names_held"] == 1  # of Film
    assert found.predictions[0][1:] == ("a bad plot ||| The film was bad.", "the film was bad.")
    assert found.record()["rouge_l"] == 1 and 1 <= found.passes_per_row <= 6

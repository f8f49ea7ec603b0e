"""Task accuracy of answers that were really decoded, verbalizer scores, and the NLL bound. Nothing is trained here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyld.config import SampleConfig
from tinyld.data import Batch, TaskRows, TextRows, answer_ids, spread_over, torch_seeded
from tinyld.diffusion import Estimate, all_finite, nll_bound, ratio_estimate, row_nll
from tinyld.formats import PAIR
from tinyld.model import Denoiser, take
from tinyld.sampler import decode, log_survival
from tinyld.tasks import Task
from tinyld.tokenizer import Tokenizer
from tinyld.writing import text_scores

EVAL_BATCH = 64
UNREADABLE = -1


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, but for the numbers of its rows."""
    return Batch(batch.x0.to(device), batch.answer_mask.to(device), batch.attention_mask.to(device), batch.rows)


@dataclass
class Evaluation:
    """What one evaluation of one split found; rates are in [0, 1], NLL in nats per answer token."""

    task: str
    n: int
    nll_bound: float
    nll_stderr: float
    truncated: int  # rows that were too long and were cut
    rows_per_second: float = 0.0
    passes_per_row: float = 0.0
    # (prompt, gold, decoded), the last two as labels where they can be read as such
    predictions: list[tuple[str, str, str]] = field(default_factory=list, repr=False)
    accuracy: float | None = None  # of decoded answers; an unreadable one is wrong
    low: float | None = None  # 95% Wilson interval
    high: float | None = None
    scored_accuracy: float | None = None  # of the most likely verbalizer, no decoding
    macro_f1: float | None = None
    unreadable: float | None = None
    majority: float | None = None  # accuracy of always giving the most frequent label
    classes: dict[str, dict[str, float]] | None = None  # label -> n, precision, recall, f1 of decoded answers
    confusion: dict[str, dict[str, int]] | None = None  # gold label -> decoded label or "unreadable" -> rows
    texts: dict[str, float | str] = field(default_factory=dict)  # of a generation task: `writing.text_scores`

    def record(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k not in ("predictions", "texts") and v is not None}
        return own | self.texts


class Verbalizers:
    """Label <-> answer tokens of one task."""

    def __init__(self, task: Task, tokenizer: Tokenizer):
        self.answers = answer_ids(task, tokenizer)
        self.label = {tokenizer.decode(i): label for label, i in enumerate(self.answers)}
        self.eos_id = tokenizer.eos_id

    def read(self, text: str) -> int:
        """The label whose answer is exactly `text`, else UNREADABLE."""
        return self.label.get(text, UNREADABLE)


def fill_slots(
    model: Denoiser,
    batch: Batch,
    rows: TaskRows,
    tokenizer: Tokenizer,
    sampling: SampleConfig,
    generator: torch.Generator,
) -> tuple[list[str], Tensor]:
    """(what the reverse process writes into the slot of each row of a batch, forward passes of each row)."""
    out, passes = decode(
        model, batch.x0, batch.answer_mask, batch.attention_mask, tokenizer.mask_id, tokenizer.never_written, sampling,
        generator, tokenizer.eos_id if rows.open_ended else None,
    )  # fmt: skip
    return [tokenizer.decode(row[slot].tolist()) for row, slot in zip(out, batch.answer_mask, strict=True)], passes


def likeliest(logits: Tensor, tokenizer: Tokenizer) -> list[str]:
    """What decoding writes as each row's answer of one token; logits: (B, V), of which some are set to -inf."""
    logits[:, tokenizer.never_written] = -torch.inf
    return [tokenizer.decode([token]) for token in logits.argmax(1).tolist()]


@torch.no_grad()
def evaluate(
    model: Denoiser,
    rows: TaskRows,
    tokenizer: Tokenizer,
    sampling: SampleConfig | None = None,
    draws: int = 4,
    limit: int | None = None,
    answer: bool = True,
    advance: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Decodes every row's answer and, separately, scores it.

    `draws` noise levels are drawn a row for the NLL bound (one is exact for one-token answers). `limit` reads the
    first rows only. With `answer` off, for a generation task, nothing is decoded.
    """
    assert answer or rows.task.is_generation
    sampling = sampling or SampleConfig()
    n = len(rows) if limit is None else min(limit, len(rows))
    device = model.device
    verbalizers = None if rows.task.is_generation else Verbalizers(rows.task, tokenizer)
    one_pass = verbalizers is not None and rows.slot == 1 and sampling.temperature == 0
    words = torch.tensor(verbalizers.answers, device=device)[:, 0] if one_pass else None
    predicted, scored = np.full(n, UNREADABLE), np.full(n, UNREADABLE)
    texts: list[tuple[str, str, str]] = [("", "", "")] * n
    nll_sum, tokens = torch.zeros(n), torch.zeros(n)
    passes = done = 0
    seconds = 0.0
    generator = torch.Generator(device).manual_seed(sampling.seed)
    at_once = model.rows_at_once(int(rows.lengths[:n].max()), EVAL_BATCH, rows.slot)
    for chunk in np.array_split(np.argsort(rows.lengths[:n], kind="stable"), math.ceil(n / at_once)):
        batch = rows.take(chunk)
        asked, started = on_device(batch, device), time.perf_counter()
        decoded: list[str] = []
        if one_pass:  # which decodes an answer of one token, scores it and scores all labels
            (logits,) = slot_logits(model, asked, tokenizer.mask_id, [words])
            target = asked.x0[asked.answer_mask]
            nll_sum[chunk], tokens[chunk] = F.cross_entropy(logits, target, reduction="none").cpu(), 1.0
            scored[chunk] = logits[:, words].argmax(1).cpu().numpy()
            decoded, passes = likeliest(logits, tokenizer), passes + len(chunk)
        elif answer:
            decoded, used = fill_slots(model, asked, rows, tokenizer, sampling, generator)
            passes += int(used.sum())
        seconds += time.perf_counter() - started
        for row, text in zip(chunk, decoded, strict=answer):
            predicted[row] = UNREADABLE if verbalizers is None else verbalizers.read(text)
            start, end = rows.starts[row], rows.starts[row] + rows.slot
            parts = (rows.ids[row][some].tolist() for some in (slice(1, start), slice(start, end), slice(end, None)))
            before, right, after = map(tokenizer.decode, parts)
            right = PAIR.join(rows.examples[row].references) or right
            if verbalizers is not None:  # their words may stand for labels that are none
                right = rows.task.labels[rows.labels[row]]
                text = text if predicted[row] == UNREADABLE else rows.task.labels[predicted[row]]
            texts[row] = (f"{before} ____ {after}" if after else before, right, text)
        if not one_pass:
            nll_sum[chunk], tokens[chunk] = answer_nll(model, batch, rows, tokenizer, draws)
            if verbalizers is not None:
                scored[chunk] = label_logp(model, asked, verbalizers, tokenizer.mask_id).argmax(1).cpu().numpy()
        done += len(chunk)
        advance(done)
    bound: Estimate = ratio_estimate(nll_sum, tokens)
    result = Evaluation(
        rows.task.name, n, bound.mean, bound.stderr, int(rows.cut[:n].sum()), n / seconds if answer else 0.0,
        passes / n, texts,
    )  # fmt: skip
    if verbalizers is None and answer:
        prompts = [f"{example.before} {example.after}" for example in rows.examples[:n]]
        right = [example.right for example in rows.examples[:n]]
        result.texts = text_scores(prompts, [text for _, _, text in texts], right)
    if verbalizers is not None:
        gold, correct = rows.labels[:n], int((predicted == rows.labels[:n]).sum())
        result.accuracy, (result.low, result.high) = correct / n, wilson(correct, n)
        result.unreadable = float((predicted == UNREADABLE).mean())
        result.majority = float(np.bincount(gold).max() / n)
        result.classes, result.confusion = by_class(gold, predicted, rows.task.labels)
        result.macro_f1 = macro_f1(result.classes, result.confusion)
        result.scored_accuracy = float((scored == gold).mean())
    return result


def by_class(
    gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]:
    """(label -> n, precision, recall and F1; gold label -> decoded label -> rows). gold, predicted: (n,) labels."""
    counts = np.zeros((len(labels), len(labels) + 1), dtype=int)
    np.add.at(counts, (gold, np.where(predicted == UNREADABLE, len(labels), predicted)), 1)
    hits, given, there = counts.diagonal(), counts.sum(0)[:-1], counts.sum(1)
    columns = (there, *(a / np.maximum(b, 1) for a, b in ((hits, given), (hits, there), (2 * hits, given + there))))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    names = ("n", "precision", "recall", "f1")
    classes = {label: dict(zip(names, row, strict=True)) for label, row in zip(labels, rows, strict=True)}
    said = [*labels, "unreadable"]
    return classes, {k: dict(zip(said, row, strict=True)) for k, row in zip(labels, counts.tolist(), strict=True)}


def macro_f1(classes: Mapping[str, Mapping[str, float]], confusion: Mapping[str, Mapping[str, int]]) -> float:
    """The mean F1 of the labels that a row has or was given."""
    given = {label for row in confusion.values() for label, rows in row.items() if rows}
    return float(np.mean([of["f1"] for label, of in classes.items() if of["n"] or label in given]))


def text_nll(
    model: Denoiser,
    rows: TextRows,
    mask_id: int,
    draws: int = 2,
    limit: int | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Estimate:
    """NLL bound of running text in nats per token, over `limit` rows spread through it (all when None)."""
    chosen = spread_over(len(rows), limit)

    def batches() -> Iterator[Batch]:
        done = 0
        at_once = model.rows_at_once(rows.width, 16, rows.width // 4)
        for chunk in np.array_split(chosen, math.ceil(len(chosen) / at_once)):
            yield rows.take(chunk)
            done += len(chunk)
            advance(done)

    return nll_bound(model, batches(), mask_id, draws=draws)


def length_logp(model: Denoiser, batch: Batch, mask_id: int, eos_id: int) -> Tensor:
    """log p of every length that a text in the slot can have, (B, slot + 1), before anything is written."""
    real = None if bool(batch.attention_mask.all()) else batch.attention_mask
    xt = torch.where(batch.answer_mask, mask_id, batch.x0)
    t = torch.ones(len(xt), device=xt.device)
    logits = model(xt, t, real, batch.attention_mask & ~batch.answer_mask, where=batch.answer_mask)
    ends = all_finite(logits).log_softmax(-1)[:, eos_id].view(len(xt), -1)  # given that the text comes so far
    none = torch.zeros_like(ends[:, :1])
    return torch.cat([none, log_survival(ends.exp())], dim=1) + torch.cat([ends, none], dim=1)


def cut_to(batch: Batch, lengths: Tensor) -> Batch:
    """A batch whose slots are seen to end after so many tokens, (B,): `answer_mask` covers those before the [EOS]."""
    number = batch.answer_mask.cumsum(1) - 1  # of a position in its slot
    inside = batch.answer_mask & (number < lengths[:, None])
    seen = batch.attention_mask & (~batch.answer_mask | (number <= lengths[:, None]))
    return Batch(batch.x0, inside, seen, batch.rows)


def label_logp(model: Denoiser, batch: Batch, verbalizers: Verbalizers, mask_id: int) -> Tensor:
    """log p of every label's answer, (B, labels).

    That of its length, where lengths differ, and then the chain rule from the left: the answer's i-th token, given
    those before it, with the rest masked. A row's score depends on no other row and no draw, and answers of one token
    take one forward pass for all labels.
    """
    answers, size, device = verbalizers.answers, len(batch.x0), batch.x0.device
    total = torch.zeros(size, len(answers), device=device)
    prompt_mask, lengths = batch.attention_mask & ~batch.answer_mask, sorted(set(map(len, answers)))
    if len(lengths) > 1:
        total += length_logp(model, batch, mask_id, verbalizers.eos_id)[:, [len(answer) for answer in answers]]
    for length in lengths:
        ended = cut_to(batch, torch.full((size,), length, device=device))
        real = None if bool(ended.attention_mask.all()) else ended.attention_mask
        x0 = torch.where(batch.answer_mask, verbalizers.eos_id, batch.x0)
        x0 = torch.where(ended.answer_mask, mask_id, x0)
        positions = ended.answer_mask.nonzero()[:, 1].view(size, length)
        for i in range(length):
            t = torch.full((size,), (length - i) / length, device=device)
            here = torch.zeros_like(batch.answer_mask).scatter_(1, positions[:, i : i + 1], True)
            for prefix in dict.fromkeys(answer[:i] for answer in answers if len(answer) == length):
                xt = x0.scatter(
                    1, positions[:, :i], torch.tensor(prefix, device=device, dtype=x0.dtype).expand(size, i)
                )
                asked = [k for k, answer in enumerate(answers) if len(answer) == length and answer[:i] == prefix]
                ids = torch.tensor([answers[k][i] for k in asked], device=device)
                h = model.states(xt, t, real, prompt_mask, where=here)
                total[:, asked] += logits_of(model, h, ids).log_softmax(-1)[:, ids]
    return total


def logits_of(model: Denoiser, h: Tensor, ids: Tensor) -> Tensor:
    """Logits (N, V) of states (N, D), of which those of the tokens `ids` can be told apart however near they are."""
    logits = all_finite(model.head(h))
    logits[:, ids] = all_finite(model.head(h, ids))
    return logits


def slot_logits(
    model: Denoiser, batch: Batch, mask_id: int, ids: Sequence[Tensor], pushes: Sequence[Any] = ()
) -> Iterator[Tensor]:
    """Logits of answers of one token: by the denoiser as it is, (B, V), where those of its one entry of `ids` are told
    apart; or, on one pass of the base, by each of `pushes`, which push its final state alone, those of the tokens in
    its `ids`, (B, len(ids))."""
    xt = torch.where(batch.answer_mask, mask_id, batch.x0)
    t = torch.ones(len(xt), device=xt.device)
    real = None if bool(batch.attention_mask.all()) else batch.attention_mask
    prompt_mask = batch.attention_mask & ~batch.answer_mask
    if not pushes:
        yield logits_of(model, model.states(xt, t, real, prompt_mask, where=batch.answer_mask), ids[0])
        return
    history: Any = []
    last = model.config.num_layers
    position = (batch.answer_mask.nonzero()[:, 1:] - int(model.config.shifted)).clamp(min=0)  # (B, 1)
    h = model.run_blocks(model.embed(xt), real, 0, last, history=history)
    depths = torch.stack([F.layer_norm(state, state.shape[-1:]) for state in [*history, h]])
    here = take(h, position)
    for push, only in zip(pushes, ids, strict=True):
        push_at = push.start(t, prompt_mask, depths if push.reads_depths else history)
        yield all_finite(model.head((here + push_at(last, h, position))[:, 0], only))


def answer_nll(
    model: Denoiser, batch: Batch, rows: TaskRows, tokenizer: Tokenizer, draws: int
) -> tuple[Tensor, Tensor]:
    """(nats, tokens) of each row's answer, (B,) each: of its length, where they differ, and of its tokens."""
    generator = torch_seeded(0, 3, int(batch.rows[0]))
    prompt_mask = batch.attention_mask & ~batch.answer_mask
    nll, counted = torch.zeros(len(batch.x0)), batch.answer_mask.sum(1).float()
    if rows.open_ended:
        lengths = torch.from_numpy(rows.ends[batch.rows.numpy()])
        of_lengths = length_logp(model, on_device(batch, model.device), tokenizer.mask_id, tokenizer.eos_id).cpu()
        nll, batch = -of_lengths.gather(1, lengths[:, None])[:, 0], cut_to(batch, lengths)
        counted = (lengths + 1).clamp(max=rows.slot).float()  # the [EOS] counts as a token
    draws = 1 if rows.slot == 1 else draws
    return nll + row_nll(model, batch, tokenizer.mask_id, draws, generator, prompt_mask), counted


def wilson(correct: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% Wilson score interval of a proportion (Wilson 1927)."""
    p, square = correct / n, z * z
    centre = (p + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * math.sqrt(p * (1 - p) / n + square / (4 * n * n))
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))  # rounding must not leave p outside

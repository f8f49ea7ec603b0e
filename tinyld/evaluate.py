"""Task accuracy of answers that were really decoded, verbalizer scores, and the NLL bound. Nothing is trained here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyld.config import DiffusionConfig, SampleConfig
from tinyld.data import Batch, TaskRows, TextRows, torch_seeded
from tinyld.diffusion import Estimate, Noised, nll_bound, noise_batch, ratio_estimate
from tinyld.errors import TinyldError
from tinyld.model import Denoiser
from tinyld.sampler import decode
from tinyld.statistics import macro_f1, wilson
from tinyld.tokenizer import Tokenizer

EVAL_BATCH = 64
NOISE_LEVELS = 8  # equal parts of (0, 1], the masked share of an answer
UNREADABLE = -1


@dataclass
class Evaluation:
    """What one evaluation of one split found; rates are in [0, 1], NLL in nats per answer token."""

    task: str
    n: int
    accuracy: float | None = None  # of decoded answers; an unreadable one is wrong
    low: float | None = None  # 95% Wilson interval
    high: float | None = None
    scored_accuracy: float | None = None  # of the most likely verbalizer, no decoding
    macro_f1: float | None = None
    unreadable: float | None = None
    majority: float | None = None  # accuracy of always giving the most frequent label
    classes: dict[str, dict[str, float]] | None = None  # label -> n, precision, recall, f1 of decoded answers
    confusion: dict[str, dict[str, int]] | None = None  # gold label -> decoded label or "unreadable" -> rows
    truncated: int = 0  # rows that were too long and were cut
    masked_acc: float = 0.0  # token accuracy at masked positions: never a task accuracy
    masked_acc_by_noise: list[tuple[float, float]] | None = None  # (masked share up to, masked_acc), of longer answers
    nll_bound: float = 0.0
    nll_stderr: float = 0.0
    rows_per_second: float = 0.0
    forward_passes: int = 0
    predictions: list[tuple[str, str, str]] = field(default_factory=list, repr=False)  # (prompt, gold, decoded)

    def correct(self) -> np.ndarray:
        """(n,) of 0 or 1: whether the decoded answer is the gold one, in the order of the rows."""
        return np.array([int(gold == decoded) for _, gold, decoded in self.predictions])

    def record(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "predictions" and v is not None}


class Verbalizers:
    """Label <-> answer tokens of one task, every answer filled to the slot's width with [EOS]."""

    def __init__(self, rows: TaskRows, tokenizer: Tokenizer):
        ids = [tokenizer.encode(words) for words in rows.task.verbalizer.values()]
        self.ids = torch.tensor([i + [tokenizer.eos_id] * (rows.slot - len(i)) for i in ids])  # (labels, slot)
        self.label = {tokenizer.decode(i): label for label, i in enumerate(ids)}
        self.eos_id = tokenizer.eos_id

    def read(self, text: str) -> int:
        """The label whose answer is exactly `text`, else UNREADABLE."""
        return self.label.get(text, UNREADABLE)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, but for the numbers of its rows."""
    return Batch(batch.x0.to(device), batch.answer_mask.to(device), batch.attention_mask.to(device), batch.rows)


def all_finite(logits: Tensor) -> Tensor:
    """The logits as they are; TinyldError where one is not a number, or infinite."""
    if not bool(torch.isfinite(logits).all()):
        raise TinyldError("the denoiser's logits are not finite: its weights are too large for this arithmetic")
    return logits


@torch.no_grad()
def evaluate(
    model: Denoiser,
    rows: TaskRows,
    tokenizer: Tokenizer,
    sampling: SampleConfig | None = None,
    draws: int = 4,
    seed: int = 0,
    limit: int | None = None,
    score: bool = True,
    answer: bool = True,
    advance: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Decodes every row's answer and, separately, scores it.

    `draws` noise levels are drawn a row for the NLL bound (one is exact for one-token answers). `limit` reads the
    first rows only. With `score` off only decoding runs; with `answer` off, for a generation task, only scoring.
    """
    assert answer or rows.task.is_generation
    sampling = sampling or SampleConfig()
    n = len(rows) if limit is None else min(limit, len(rows))
    device = model.embedding.weight.device
    order = np.argsort(rows.lengths[:n], kind="stable")
    labelled = not rows.task.is_generation
    verbalizers = Verbalizers(rows, tokenizer) if labelled else None
    predicted, scored = np.full(n, UNREADABLE), np.full(n, UNREADABLE)
    texts: list[tuple[str, str, str]] = [("", "", "")] * n
    nll_sum, tokens = torch.zeros(n), torch.zeros(n)
    hits, masked = np.zeros((2, NOISE_LEVELS))  # of masked tokens, by noise level
    passes = 0
    seconds, done = 0.0, 0
    generator = torch.Generator(device).manual_seed(sampling.seed)
    for chunk in np.array_split(order, math.ceil(n / EVAL_BATCH)):
        batch = rows.take(chunk)
        if answer:
            started = time.perf_counter()
            asked = on_device(batch, device)
            out, used = decode(
                model, asked.x0, asked.answer_mask, asked.attention_mask, tokenizer.mask_id, tokenizer.never_written,
                sampling, generator, tokenizer.eos_id,
            )  # fmt: skip
            passes += used
            answers = out[asked.answer_mask].view(len(chunk), rows.slot).tolist()
            decoded = [tokenizer.decode(a) for a in answers]
            seconds += time.perf_counter() - started
            for row, text in zip(chunk, decoded, strict=True):
                if verbalizers is not None:
                    predicted[row] = verbalizers.read(text)
                start = rows.starts[row]
                gold = rows.ids[row][start : start + rows.slot].tolist()
                texts[row] = (tokenizer.decode(rows.ids[row][1:start].tolist()), tokenizer.decode(gold), text)
        if score:
            nll, count, hit, seen, labels = _score(model, batch, rows, tokenizer, verbalizers, draws, seed)
            nll_sum[chunk], tokens[chunk] = nll, count
            hits += hit
            masked += seen
            if labels is not None:
                scored[chunk] = labels
        done += len(chunk)
        advance(done)
    result = Evaluation(
        rows.task.name, n, truncated=int(rows.cut[:n].sum()), rows_per_second=n / seconds if answer else 0.0,
        forward_passes=passes, predictions=texts,
    )  # fmt: skip
    if score:
        bound: Estimate = ratio_estimate(nll_sum, tokens)
        result.nll_bound, result.nll_stderr = bound.mean, bound.stderr
        result.masked_acc = float(hits.sum() / max(masked.sum(), 1))
        if rows.slot > 1:
            shares = np.arange(1, NOISE_LEVELS + 1) / NOISE_LEVELS
            met = masked > 0
            accuracies = hits[met] / masked[met]
            result.masked_acc_by_noise = list(zip(shares[met].tolist(), accuracies.tolist(), strict=True))
    if labelled:
        gold = rows.labels[:n]
        correct = int((predicted == gold).sum())
        result.accuracy = correct / n
        result.low, result.high = wilson(correct, n)
        result.unreadable = float((predicted == UNREADABLE).mean())
        result.macro_f1 = macro_f1(gold, predicted, len(rows.task.labels))
        result.majority = float(np.bincount(gold).max() / n)
        result.classes, result.confusion = by_class(gold, predicted, rows.task.labels)
        if score:
            result.scored_accuracy = float((scored == gold).mean())
    return result


def by_class(
    gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]:
    """(label -> n, precision, recall and F1; gold label -> decoded label -> rows). gold, predicted: (n,) labels."""
    counts = np.zeros((len(labels), len(labels) + 1), dtype=int)
    np.add.at(counts, (gold, np.where(predicted == UNREADABLE, len(labels), predicted)), 1)
    classes = {}
    for i, label in enumerate(labels):
        hits, given, there = int(counts[i, i]), int(counts[:, i].sum()), int(counts[i].sum())
        classes[label] = {
            "n": there,
            "precision": hits / given if given else 0.0,
            "recall": hits / there if there else 0.0,
            "f1": 2 * hits / (given + there) if given + there else 0.0,
        }
    said = [*labels, "unreadable"]
    return classes, {label: dict(zip(said, counts[i].tolist(), strict=True)) for i, label in enumerate(labels)}


def text_nll(
    model: Denoiser,
    rows: TextRows,
    mask_id: int,
    draws: int = 2,
    limit: int | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Estimate:
    """NLL bound of running text in nats per token, over `limit` rows spread through it (all when None)."""
    n = len(rows) if limit is None else min(limit, len(rows))
    chosen = np.unique(np.linspace(0, len(rows) - 1, num=n).astype(int))

    def triples() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        done = 0
        for chunk in np.array_split(chosen, math.ceil(n / 16)):
            batch = rows.take(chunk)
            yield batch.x0, batch.answer_mask, batch.attention_mask
            done += len(chunk)
            advance(done)

    return nll_bound(model, triples(), mask_id, draws=draws, counted=True)


def _masked_logp(model: Denoiser, noised: Noised, xt: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(log p of the targets (N,), log p of the vocabulary (N, V)) at the masked positions of xt; both (B, L) ids."""
    where = noised.is_masked
    logits = all_finite(model(xt, noised.t, noised.attention_mask, noised.prompt_mask, where=where).float())
    logp = logits.log_softmax(-1)
    return logp.gather(1, target[where][:, None])[:, 0], logp


def _score(
    model: Denoiser,
    batch: Batch,
    rows: TaskRows,
    tokenizer: Tokenizer,
    verbalizers: Verbalizers | None,
    draws: int,
    seed: int,
) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray, np.ndarray | None]:
    """(nll sum, answer tokens) by row, (hits, masked tokens) by noise level, and each row's most likely label."""
    device = model.embedding.weight.device
    size = len(batch.x0)
    draws = 1 if rows.slot == 1 else draws
    elbo = DiffusionConfig(loss="elbo")
    generator = torch_seeded(seed, 3, int(batch.rows[0]))
    total = torch.zeros(size)
    label_nll = torch.zeros(size, 0 if verbalizers is None else len(verbalizers.ids))
    hits, masked = np.zeros((2, NOISE_LEVELS))
    for _ in range(draws):
        noised, _ = noise_batch(
            batch.x0, batch.answer_mask, batch.attention_mask, tokenizer.mask_id, elbo, generator, counted=True
        )
        noised = noised.to(device)
        where = noised.is_masked
        row = where.nonzero()[:, 0]

        gold, logp = _masked_logp(model, noised, noised.xt, noised.x0)
        total += torch.zeros(size).index_add_(0, row.cpu(), (-gold * noised.weight[row]).cpu())
        level = (torch.ceil(noised.t[row] * NOISE_LEVELS - 1e-6).long() - 1).cpu().numpy()
        masked += np.bincount(level, minlength=NOISE_LEVELS)
        hits += np.bincount(level, (logp.argmax(-1) == noised.x0[where]).cpu().numpy(), NOISE_LEVELS)
        if verbalizers is None:
            continue
        for label, ids in enumerate(verbalizers.ids.to(device)):
            if rows.slot == 1:  # one forward pass scores every label, exactly
                found = logp[:, ids[0]]
            else:
                candidate = noised.x0.masked_scatter(batch.answer_mask.to(device), ids.repeat(size))
                xt = torch.where(where, tokenizer.mask_id, candidate)
                found, _ = _masked_logp(model, noised, xt, candidate)
            label_nll[:, label] += torch.zeros(size).index_add_(0, row.cpu(), (-found * noised.weight[row]).cpu())
    labels = None if verbalizers is None else label_nll.argmin(1).numpy()
    return total / draws, batch.answer_mask.sum(1).float(), hits, masked, labels

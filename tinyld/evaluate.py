"""Task accuracy of answers that were really decoded, verbalizer scores, and the NLL bound. Nothing is trained here."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyld.composition import members
from tinyld.config import SampleConfig
from tinyld.data import Batch, TaskRows, TextRows, answer_ids, spread_over, torch_seeded
from tinyld.diffusion import Estimate, all_finite, ratio_estimate, row_nll
from tinyld.mending import Mender
from tinyld.model import Denoiser
from tinyld.progress import Advance, further, unheard
from tinyld.read import PAIR
from tinyld.sampler import decode, log_survival, logp_of
from tinyld.tokenizer import Tokenizer
from tinyld.writing import text_scores

EVAL_BATCH = 64
UNREADABLE = -1


@dataclass
class Evaluation:
    """What one evaluation of one split found; NLL in nats per answer token."""

    task: str
    n: int
    nll_bound: float
    nll_stderr: float | None  # unknown of one row
    truncated: int  # rows that were too long and were cut
    rows_per_second: float
    passes_per_row: float
    scores: dict[str, Any] = field(repr=False)  # `label_scores`, or of a task that writes `writing.text_scores`
    # (prompt, gold, decoded), the last two as labels where they can be read as such
    predictions: list[tuple[str, str, str]] = field(repr=False)

    def record(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("predictions", "scores")} | self.scores


class Answered(NamedTuple):
    """What the B rows of a batch were answered."""

    chosen: np.ndarray  # (B,) which rows
    batch: Batch  # of them, on the device
    logits: Tensor | None  # (B, V) where one pass told all, of answers of one token
    written: list[str]  # by the reverse process; "" where it was not asked to
    scores: Tensor | None  # (B, labels) log-probabilities of the labels' answers, or logits
    passes: int  # of all rows together
    seconds: float  # for the writing


def in_batches(model: Denoiser, rows: TaskRows) -> Iterator[tuple[np.ndarray, Batch]]:
    """(which rows, the rows on the model's device): every row once, in batches of like length and of one push."""
    for chosen in rows.in_length_order(model.rows_at_once(int(rows.lengths.max()), EVAL_BATCH, rows.slot)):
        batch = rows.take(chosen)
        parts = (part.to(model.device) for part in (batch.x0, batch.answer_mask, batch.attention_mask))
        for which, own in members(model, Batch(*parts, batch.rows)):
            yield chosen[which.numpy()], own


def answered(
    model: Denoiser, rows: TaskRows, tokenizer: Tokenizer, sampling: SampleConfig, write: bool = True,
    advance: Advance = unheard,
) -> Iterator[Answered]:  # fmt: skip
    """Decodes the answers of all rows, batch by batch, and scores every label's; `advance` gets how many rows are done,
    of those that are written so much as has no mask any more. A row counts by what it costs: answers to long prompts
    are longer themselves (on WebNLG a text's time grows with its prompt's length to the power of 1.5)."""
    work = (1 + rows.lengths - rows.slot) ** (1.5 if rows.open_ended else 1.0)  # a public model may have no [BOS]
    done, work = 0.0, work / work.mean()
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    answers = answer_ids(rows.task, tokenizer)
    words = torch.tensor([answer[0] for answer in answers], device=model.device)
    for chosen, batch in in_batches(model, rows):
        logits, scores, passes, started = None, None, 0, time.perf_counter()
        written, each = [""] * len(chosen), float(work[chosen].mean())
        told = further(advance, done, each)
        if answers and rows.slot == 1 and sampling.temperature == 0:  # one pass scores the labels and writes
            asked = all_masked(batch, tokenizer.mask_id)
            logits = logits_of(model, model.states(*asked, where=batch.answer_mask), words)
            allowed = logits.clone()
            allowed[:, tokenizer.never_written] = -torch.inf
            written, passes = [tokenizer.decode([token]) for token in allowed.argmax(1).tolist()], len(chosen)
        elif write:
            written, passes = by_decoding(model, batch, rows, chosen, tokenizer, sampling, generator, told)
        seconds = time.perf_counter() - started
        if answers:
            scores = label_logp(model, batch, answers, tokenizer) if logits is None else logits[:, words]
        done += each * len(chosen)
        advance(done)
        yield Answered(chosen, batch, logits, written, scores, passes, seconds)


def by_decoding(
    model: Denoiser, batch: Batch, rows: TaskRows, chosen: np.ndarray, tokenizer: Tokenizer, sampling: SampleConfig,
    generator: torch.Generator, advance: Advance,
) -> tuple[list[str], int]:  # fmt: skip
    """What the reverse process writes of a batch, which has the `chosen` rows, in how many passes of all rows."""
    task, examples, slots = rows.task, [rows.examples[i] for i in chosen], batch.answer_mask
    coverage, spelling = task.coverage, task.spelling

    def texts(x: Tensor) -> list[str]:
        return [tokenizer.decode(row[slot].tolist()) for row, slot in zip(x, slots, strict=True)]

    def missing(i: int, text: str) -> set[str]:
        return coverage.missing(f"{examples[i].before} {examples[i].after}", text)

    delete = tokenizer.delete_id if task.deletes else None
    told = tokenizer, delete, sampling, generator, missing
    mender = Mender(model, slots, batch.attention_mask, *told) if coverage else None
    out, passes = decode(
        model, batch.x0, slots, batch.attention_mask, tokenizer.mask_id, tokenizer.never_written, sampling, generator,
        tokenizer.eos_id if rows.open_ended else None, lambda x, share: advance(len(x) * share),
        not task.is_generation, delete, mender,
    )  # fmt: skip
    written = texts(out)
    if spelling is not None:
        pairs = zip(written, examples, strict=True)
        written = [spelling.restore(text, e.before, e.after, task.is_infill) for text, e in pairs]
    return written, int(passes.sum())


@torch.no_grad()
def evaluate(
    model: Denoiser, rows: TaskRows, tokenizer: Tokenizer, sampling: SampleConfig | None = None, draws: int = 4,
    answer: bool = True, advance: Advance = unheard,
) -> Evaluation:  # fmt: skip
    """Decodes every row's answer and, separately, scores it. `draws` noise levels are drawn a row for the NLL bound
    (one is exact for one-token answers). With `answer` off, for a generation task, nothing is decoded."""
    task, n = rows.task, len(rows)
    written, scored = np.full(n, "", dtype=object), np.full(n, UNREADABLE)
    nll, tokens = torch.zeros(2, n)
    passes, seconds = 0, 0.0
    for found in answered(model, rows, tokenizer, sampling or SampleConfig(), answer, advance):
        written[found.chosen] = found.written
        if found.scores is not None:
            scored[found.chosen] = found.scores.argmax(1).cpu().numpy()
        nll[found.chosen], tokens[found.chosen] = answer_nll(model, found, rows, tokenizer, draws)
        passes, seconds = passes + found.passes, seconds + found.seconds
    texts, right, scores = list(written), [example.right for example in rows.examples], {}
    if task.labels:  # an answer must be the whole of a label's words
        label_of = {tokenizer.decode(ids): label for label, ids in enumerate(answer_ids(task, tokenizer))}
        predicted = np.array([label_of.get(text, UNREADABLE) for text in texts])
        scores = label_scores(rows.labels, predicted, scored, task.labels)
        texts = [text if i == UNREADABLE else task.labels[i] for text, i in zip(texts, predicted, strict=True)]
        right = [(task.labels[label],) for label in rows.labels]
    elif answer:
        scores = text_scores([f"{example.before} {example.after}" for example in rows.examples], texts, right)
    prompts = [f"{example.before} ____ {example.after}".strip() for example in rows.examples]
    predictions = list(zip(prompts, map(PAIR.join, right), texts, strict=True))
    bound, speed = ratio_estimate(nll, tokens), n / seconds if answer else 0.0
    return Evaluation(task.name, n, bound.mean, bound.stderr, rows.truncated, speed, passes / n, scores, predictions)


def label_scores(gold: np.ndarray, predicted: np.ndarray, scored: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Scores of rows by their labels, (n,) each: the right one, the decoded one or UNREADABLE, which is wrong, and the
    one that scores best without decoding. Shares are in [0, 1].

    - accuracy, low, high: of decoded answers, with its 95% interval; scored_accuracy: of the best scored ones.
    - macro_f1: the mean F1 of the labels that a row has or was given.
    - unreadable: share of the rows; majority: the accuracy of always giving the most frequent label.
    - classes: label -> n, precision, recall, f1; None where no row tells. confusion: gold label -> decoded
      label or "unreadable" -> rows.
    """
    n, counts = len(gold), np.zeros((len(labels), len(labels) + 1), dtype=int)
    said = [*labels, "unreadable" if "unreadable" not in labels else "(unreadable)"]
    np.add.at(counts, (gold, predicted), 1)  # UNREADABLE is the last column
    hits, given, there = counts.diagonal(), counts.sum(0)[:-1], counts.sum(1)
    precision, recall, f1 = (a / np.maximum(b, 1) for a, b in ((hits, given), (hits, there), (2 * hits, given + there)))
    classes = [
        {"n": n, "precision": p if n + g else None, "recall": r if n else None, "f1": f if n + g else None}
        for n, g, p, r, f in zip(*(of.tolist() for of in (there, given, precision, recall, f1)), strict=True)
    ]
    confusion = [dict(zip(said, row, strict=True)) for row in counts.tolist()]
    low, high = wilson(int(hits.sum()), n)
    scores = {"accuracy": int(hits.sum()) / n, "low": low, "high": high}
    scores |= {"scored_accuracy": float((scored == gold).mean()), "macro_f1": float(f1[given + there > 0].mean())}
    scores |= {"unreadable": float((predicted == UNREADABLE).mean()), "majority": int(there.max()) / n}
    tables = {"classes": classes, "confusion": confusion}
    return scores | {name: dict(zip(labels, table, strict=True)) for name, table in tables.items()}


def wilson(correct: float, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a proportion (Wilson 1927)."""
    z = 1.959964
    p, square = correct / n, z * z
    centre = (p + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * math.sqrt(p * (1 - p) / n + square / (4 * n * n))
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))  # rounding must not leave p outside


def text_nll(
    model: Denoiser, rows: TextRows, mask_id: int, draws: int = 2, limit: int | None = None, advance: Advance = unheard
) -> Estimate:
    """Upper bound on the NLL of running text in nats per token (the negative ELBO), with its standard error over rows:
    `limit` rows spread through it (all when None), `draws` times of each."""
    chosen, at_once = spread_over(len(rows), limit), model.rows_at_once(rows.width, 16, rows.width // 4)
    nats, tokens, generator = list[Tensor](), list[Tensor](), torch.Generator().manual_seed(0)
    for chunk in np.array_split(chosen, math.ceil(len(chosen) / at_once)):
        batch = rows.take(chunk)
        nats.append(row_nll(model, batch, mask_id, draws, generator))
        tokens.append(batch.answer_mask.sum(1).float())
        advance(sum(map(len, nats)))
    return ratio_estimate(torch.cat(nats), torch.cat(tokens))


def all_masked(batch: Batch, mask_id: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(xt, t, attention mask, prompt mask), as a denoiser is first asked: with the whole slots masked."""
    xt = torch.where(batch.answer_mask, mask_id, batch.x0)
    real = None if bool(batch.attention_mask.all()) else batch.attention_mask
    return xt, torch.ones(len(xt), device=xt.device), real, batch.attention_mask & ~batch.answer_mask


def length_logp(model: Denoiser, batch: Batch, tokenizer: Tokenizer) -> Tensor:
    """log p of every length that a text in the slot can have, (B, slot + 1), before anything is written."""
    logits = model(*all_masked(batch, tokenizer.mask_id), where=batch.answer_mask)
    ends = logp_of(tokenizer.eos_id, logits).view(len(batch.x0), -1)  # given that the text comes so far
    none = torch.zeros_like(ends[:, :1])
    return torch.cat([none, log_survival(ends.exp())], dim=1) + torch.cat([ends, none], dim=1)


def cut_to(batch: Batch, lengths: Tensor) -> Batch:
    """A batch whose slots are seen to end after so many tokens, (B,): `answer_mask` covers those before the [EOS]."""
    number = batch.answer_mask.cumsum(1) - 1  # of a position in its slot
    inside = batch.answer_mask & (number < lengths[:, None])
    seen = batch.attention_mask & (~batch.answer_mask | (number <= lengths[:, None]))
    return Batch(batch.x0, inside, seen, batch.rows)


def label_logp(model: Denoiser, batch: Batch, answers: Sequence[tuple[int, ...]], tokenizer: Tokenizer) -> Tensor:
    """log p of every label's answer, (B, labels), whose tokens are in `answers`. That of its length, where lengths
    differ, and then the chain rule from the left: the answer's i-th token, given those before it, with the rest masked.
    A row's score depends on no other row and no draw, and answers of one token take one forward pass for all labels."""
    size, device = len(batch.x0), batch.x0.device
    total = torch.zeros(size, len(answers), device=device)
    prompt_mask, lengths = batch.attention_mask & ~batch.answer_mask, sorted(set(map(len, answers)))
    if len(lengths) > 1:
        total += length_logp(model, batch, tokenizer)[:, [len(answer) for answer in answers]]
    for length in lengths:
        ended = cut_to(batch, torch.full((size,), length, device=device))
        real = None if bool(ended.attention_mask.all()) else ended.attention_mask
        x0 = torch.where(batch.answer_mask, tokenizer.eos_id, batch.x0)
        x0 = torch.where(ended.answer_mask, tokenizer.mask_id, x0)
        positions = ended.answer_mask.nonzero()[:, 1].view(size, length)
        same = {k: answer for k, answer in enumerate(answers) if len(answer) == length}
        for prefix in dict.fromkeys(answer[:i] for answer in same.values() for i in range(length)):
            i, goes_on = len(prefix), [k for k, answer in same.items() if answer[: len(prefix)] == prefix]
            ids = torch.tensor([answers[k][i] for k in goes_on], device=device)
            known = torch.tensor(prefix, device=device, dtype=x0.dtype).expand(size, i)
            xt, t = x0.scatter(1, positions[:, :i], known), torch.full((size,), (length - i) / length, device=device)
            here = torch.zeros_like(batch.answer_mask).scatter_(1, positions[:, i : i + 1], True)
            h = model.states(xt, t, real, prompt_mask, where=here)
            total[:, goes_on] += logits_of(model, h, ids).log_softmax(-1)[:, ids]
    return total


def logits_of(model: Denoiser, h: Tensor, ids: Tensor) -> Tensor:
    """Logits (N, V) of states (N, D), of which those of the tokens `ids` can be told apart however near they are."""
    logits = all_finite(model.head(h))
    logits[:, ids] = all_finite(model.head(h, ids))
    return logits


def pushed_logits(
    model: Denoiser, batch: Batch, mask_id: int, pushes: Sequence[Any], ids: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Of answers of one token, on one pass of the base: by each push, which pushes the answer alone, the logits of the
    tokens in its `ids`, (B, len(ids))."""
    xt, t, real, prompt_mask = all_masked(batch, mask_id)
    depths = [push.first_depth for push in pushes]
    frozen = model.frozen(xt, real, min(depths), max(*depths, model.config.num_layers - 1))
    position = (batch.answer_mask.nonzero()[:, 1:] - int(model.config.shifted)).clamp(min=0)  # (B, 1)
    for h, only in zip(model.along(pushes, *frozen, position, t, real, prompt_mask), ids, strict=True):
        yield all_finite(model.head(h[:, 0], only))


def answer_nll(
    model: Denoiser, found: Answered, rows: TaskRows, tokenizer: Tokenizer, draws: int
) -> tuple[Tensor, Tensor]:
    """(nats, tokens), (B,) on the processor, of each row's answer: of its length, where they differ, and its tokens."""
    if found.logits is not None:
        target = found.batch.x0[found.batch.answer_mask]
        return F.cross_entropy(found.logits, target, reduction="none").cpu(), torch.ones(len(target))
    batch, generator = rows.take(found.chosen), torch_seeded(0, 3, int(found.chosen[0]))
    prompt_mask = batch.attention_mask & ~batch.answer_mask
    nll, counted = torch.zeros(len(batch.x0)), batch.answer_mask.sum(1).float()
    if rows.open_ended:
        lengths = torch.from_numpy(rows.ends[found.chosen])
        nll = -length_logp(model, found.batch, tokenizer).cpu().gather(1, lengths[:, None])[:, 0]
        batch, counted = cut_to(batch, lengths), (lengths + 1).clamp(max=rows.slot).float()  # the [EOS] is a token
    draws = 1 if rows.slot == 1 else draws
    return nll + row_nll(model, batch, tokenizer.mask_id, draws, generator, prompt_mask), counted

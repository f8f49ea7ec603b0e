"""Two tasks in one run: say what a text is, then write one that is the opposite. Judged by another model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tinyld.checkpoint import Base
from tinyld.config import SampleConfig, check
from tinyld.data import TaskRows
from tinyld.diffusion import nll_bound
from tinyld.evaluate import EVAL_BATCH, Verbalizers, evaluate
from tinyld.sampler import decode
from tinyld.statistics import wilson
from tinyld.tasks import Task, example_of_text, prompt_for_label


@dataclass(frozen=True)
class Written:
    """One row of a chain."""

    prompt: str
    gold: int
    read: int  # the label decoded first; UNREADABLE when it is none
    asked: int  # the label then written for
    text: str


@torch.no_grad()
def write_opposites(
    base: Base, rows: TaskRows, writer: Task, sampling: SampleConfig, advance: Callable[[int], None] = lambda done: None
) -> list[Written]:
    """Each row's label as `base` decodes it, greedily, and the text that `base` then writes for the other label.

    `sampling` is how the text is written. An unreadable first answer is taken for label 0, and counts as read wrongly.
    """
    check(len(rows.task.labels) == 2, f"task {rows.task.name} has {len(rows.task.labels)} labels; opposites need two")
    first = evaluate(base.model, rows, base.tokenizer, score=False)
    labels = Verbalizers(rows, base.tokenizer)
    read = [labels.read(answer) for _, _, answer in first.predictions]
    asked = [1 - max(label, 0) for label in read]
    prompts = [prompt_for_label(writer, rows.task.labels[label]) for label in asked]
    slots = TaskRows(prompts, writer, base.tokenizer, base.model.config.max_length)
    device = base.model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    texts: list[str] = []
    for chunk in np.array_split(np.arange(len(slots)), math.ceil(len(slots) / EVAL_BATCH)):
        batch = slots.take(chunk)
        x, answer, real = (part.to(device) for part in (batch.x0, batch.answer_mask, batch.attention_mask))
        tokenizer = base.tokenizer
        out, _ = decode(
            base.model,
            x,
            answer,
            real,
            tokenizer.mask_id,
            tokenizer.never_written,
            sampling,
            generator,
            tokenizer.eos_id,
        )
        texts += [tokenizer.decode(ids) for ids in out[answer].view(len(chunk), slots.slot).tolist()]
        advance(len(texts))
    return [
        Written(prompt, int(gold), r, a, text)
        for (prompt, _, _), gold, r, a, text in zip(first.predictions, rows.labels, read, asked, texts, strict=True)
    ]


@torch.no_grad()
def text_rows_nll(base: Base, texts: list[str]) -> float | None:
    """Nats per token of short texts under a denoiser, each a row of its own (the bound, 4 draws); None of no token."""
    tokenizer, limit = base.tokenizer, base.model.config.max_length - 2
    ids = [i[:limit] for i in tokenizer.encode_batch(texts) if i]
    if not ids:
        return None
    width = max(map(len, ids)) + 2
    x0 = torch.full((len(ids), width), tokenizer.pad_id)
    answer, real = torch.zeros(2, len(ids), width, dtype=torch.bool)
    for row, tokens in enumerate(ids):
        x0[row, : len(tokens) + 2] = torch.tensor([tokenizer.bos_id, *tokens, tokenizer.eos_id])
        answer[row, 1 : len(tokens) + 1] = True
        real[row, : len(tokens) + 2] = True
    batches = zip(x0.split(EVAL_BATCH), answer.split(EVAL_BATCH), real.split(EVAL_BATCH), strict=True)
    return nll_bound(base.model, batches, tokenizer.mask_id, draws=4, counted=True).mean


def judge_chain(
    written: list[Written], rows: TaskRows, judge: Base, plain: Base, real_texts: list[str]
) -> dict[str, Any]:
    """How often the first label was right, how often `judge` sees what was asked for, and `plain`'s NLL of the texts
    beside its NLL of real ones."""
    task, n = rows.task, len(written)
    examples = [example_of_text(task, w.text, w.asked) for w in written]
    seen = evaluate(
        judge.model, TaskRows(examples, task, judge.tokenizer, judge.model.config.max_length), judge.tokenizer
    )
    low, high = wilson(round((seen.accuracy or 0.0) * n), n)
    return {
        "n": n,
        "first_accuracy": float(np.mean([w.read == w.gold for w in written])),
        "written_as_asked": seen.accuracy,
        "low": low,
        "high": high,
        "distinct": len({w.text for w in written}) / n,
        "empty": float(np.mean([not w.text for w in written])),
        "nll_written": text_rows_nll(plain, [w.text for w in written]),
        "nll_real": text_rows_nll(plain, real_texts),
    }

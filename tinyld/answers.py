"""Rows in, answers out: what loaded runs find of rows for their tasks, with the rows' other columns."""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyld.config import SampleConfig
from tinyld.data import answer_ids
from tinyld.device import autocast
from tinyld.errors import UsageError
from tinyld.evaluate import answered, in_batches, pushed_logits
from tinyld.options import several
from tinyld.progress import Advance, unheard
from tinyld.read import Row
from tinyld.rows import GAP_MARK, Example, prompt_of
from tinyld.tasks import Task

OURS = "text label probability probabilities decoded answer filled truncated adapter foreign tasks".split()
EMPTY = "."  # what is asked for an empty text, so that every line in has a line out
LEAST = 0.01  # of what the model gives a label, where less than all labels' share of smoothing is none: keeps the order
Record = dict[str, Any]


@torch.no_grad()
def answers(
    run: Any, task: Task, examples: Sequence[Example], sampling: SampleConfig, advance: Advance = unheard
) -> list[Record]:
    """What a `predict.Run` finds of each example for a task; `advance` gets how many are done."""
    found: list[Record] = [{}] * len(examples)
    rows = run.rows(examples, task)
    with autocast(run.model.device, run.dtype):
        for part in answered(run.model, rows, run.base.tokenizer, sampling, advance=advance):
            columns = {} if part.scores is None else by_label(part.scores, task)
            columns |= {"decoded" if columns else "answer": part.written, "truncated": rows.cut[part.chosen].tolist()}
            put(found, part.chosen, columns)
    return found


@torch.no_grad()
def answers_in_one_pass(runs: Sequence[Any], examples: Sequence[Example]) -> list[list[Record]]:
    """What each `predict.Run` finds of each example, by pushes that share every pass. Those have one base, and tasks
    whose prompts are the same tokens around one masked place. They run the vocabulary's head for their labels' words
    alone, and so do not say what each would write."""
    tasks, pushes = [run.tasks[0] for run in runs], [run.push for run in runs]
    model, tokenizer, rows = runs[0].model, runs[0].base.tokenizer, runs[0].rows(examples, tasks[0])
    words = [torch.tensor(answer_ids(task, tokenizer), device=model.device)[:, 0] for task in tasks]
    found: list[list[Record]] = [[{}] * len(examples) for _ in runs]
    with autocast(model.device, runs[0].dtype):
        for chosen, batch in in_batches(model, rows):
            each = pushed_logits(model, batch, tokenizer.mask_id, pushes, words)
            for own, task, logits in zip(found, tasks, each, strict=True):
                put(own, chosen, by_label(logits, task) | {"truncated": rows.cut[chosen].tolist()})
    return found


def put(found: list[Record], chosen: np.ndarray, columns: Mapping[str, Sequence[Any]]) -> None:
    """Puts what was found of some rows, column by column, where those rows are."""
    for row, *values in zip(chosen, *columns.values(), strict=True):
        found[row] = dict(zip(columns, values, strict=True))


def by_label(scores: Tensor, task: Task) -> dict[str, Sequence[Any]]:
    """Of each row the likeliest label and every label's probability among them, less what was learned to be of all
    labels alike. scores: (B, labels), log-probabilities or logits."""
    labels, best = task.labels, scores.argmax(1).tolist()
    found = scores.softmax(1)
    found = torch.maximum(found - task.smoothed / len(labels), found * LEAST)
    shares = [[round(p, 4) for p in row] for row in (found / found.sum(1, keepdim=True)).tolist()]
    return {
        "label": [labels[i] for i in best],
        "probability": [row[i] for row, i in zip(shares, best, strict=True)],
        "probabilities": [dict(zip(labels, row, strict=True)) for row in shares],
    }


def as_rows(texts: Iterable[Any], task: Task) -> list[Row]:
    """Python's texts as rows: (where it stands, column -> value)."""
    columns, rows = task.inputs, []
    for i, text in enumerate(several(texts, "texts"), 1):
        if not isinstance(text, Mapping):
            values = list(text) if isinstance(text, list | tuple) else [text]
            if len(values) != len(columns):  # what else a text may be, a number of many digits, has no repr
                raise UsageError(f"task {task.name} reads {', '.join(columns)}, a text each; got {text!r}")
            text = dict(zip(columns, values, strict=True))
        rows.append((f"text {i}", {str(k): v.item() if isinstance(v, np.generic) else v for k, v in text.items()}))
    return rows


def examples_of(rows: Sequence[Row], task: Task) -> list[Example]:
    return [prompt_of(task, row, where, GAP_MARK if task.is_infill else EMPTY) for where, row in rows]


def kept_columns(rows: Sequence[Row], task: Task) -> list[Record]:
    """Each row's columns, in their order; that of the one text that the task reads is called `text`."""
    names = {task.inputs[0]: "text"} if len(task.inputs) == 1 else {"text": "text"}  # then nothing of ours is
    return [under(names, row, OURS) for _, row in rows]


def under(names: Mapping[str, str], row: Record, taken: Container[str]) -> Record:
    """The row with columns called otherwise; another one with a name that is `taken` becomes given_NAME."""
    return {names.get(k) or (own_name(k, row) if k in taken else str(k)): v for k, v in row.items()}


def own_name(column: str, row: Record) -> str:
    """What a row's own column is called beside ours of that name: given_NAME, or as often given_ as is free."""
    name = f"given_{column}"
    while name in row:
        name = f"given_{name}"
    return name

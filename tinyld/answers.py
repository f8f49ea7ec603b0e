"""Rows in, answers out: what loaded runs find of rows for their tasks, with the rows' other columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyld.config import SampleConfig, check
from tinyld.data import TaskRows
from tinyld.device import autocast, resolve_dtype
from tinyld.evaluate import EVAL_BATCH, Verbalizers, fill_slots, label_logp, likeliest, on_device, slot_logits
from tinyld.parse import several
from tinyld.read import PAIR, clean
from tinyld.rows import GAP_MARK, Example, prompt_of
from tinyld.tasks import Task

OURS = ("text", "label", "probability", "probabilities", "decoded", "answer", "filled", "truncated", "adapter", "tasks")
EMPTY = "."  # what is asked for an empty text, so that every line in has a line out
Record = dict[str, Any]


@torch.no_grad()
def answers(
    runs: Sequence[Any], tasks: Sequence[Task], rows: Sequence[tuple[str, Record]], sampling: SampleConfig
) -> list[list[Record]]:
    """What each `predict.Run` finds of each row for its task: of one, or of several with pushes that share every pass.

    Those have one base, and tasks whose prompts are the same tokens around one masked place. They run the vocabulary's
    head for their labels' words alone, and so do not say what each would write.
    """
    model, tokenizer, task = runs[0].model, runs[0].base.tokenizer, tasks[0]
    device = model.device
    data = TaskRows(examples_of(rows, task), task, tokenizer, model.config.max_length)
    labels = [None if t.is_generation else Verbalizers(t, tokenizer) for t in tasks]
    generator = torch.Generator(device).manual_seed(sampling.seed)
    at_once = data.slot == 1 and sampling.temperature == 0 and not task.is_generation
    shared, ids = len(runs) > 1, [of and torch.tensor([i[0] for i in of.answers], device=device) for of in labels]
    pushes = [run.push for run in runs] if shared else []
    found: list[list[Record]] = [[{}] * len(data) for _ in runs]
    with autocast(device, resolve_dtype(runs[0].dtype, device)):
        for chosen in data.in_length_order(model.rows_at_once(int(data.lengths.max(initial=1)), EVAL_BATCH, data.slot)):
            batch = on_device(data.take(chosen), device)
            passes: Iterable[Any] = [None]
            if at_once:  # one pass scores the labels and writes what decode would
                passes = slot_logits(model, batch, tokenizer.mask_id, ids, pushes)
            for i, logits in enumerate(passes):
                columns: dict[str, Sequence[Any]] = {}
                if logits is not None:
                    columns = by_label(logits if shared else logits[:, ids[i]], tasks[i].labels)
                    if not shared:
                        columns["decoded"] = likeliest(logits, tokenizer)
                else:
                    if labels[i] is not None:
                        columns = by_label(label_logp(model, batch, labels[i], tokenizer.mask_id), tasks[i].labels)
                    written, _ = fill_slots(model, batch, data, tokenizer, sampling, generator)
                    columns["decoded" if columns else "answer"] = written
                columns["truncated"] = data.cut[chosen].tolist()
                if (by := runs[i].owners(batch)) is not None:
                    columns["adapter"] = by
                for row, values in zip(chosen, zip(*columns.values(), strict=True), strict=True):
                    found[i][row] = dict(zip(columns, values, strict=True))
    return found


def examples_of(rows: Sequence[tuple[str, Record]], task: Task) -> list[Example]:
    fields = Counter(task.columns.values())
    nothing = {k: GAP_MARK if task.is_infill else PAIR.join([EMPTY] * n) for k, n in fields.items()}
    empty = [{k: v for k, v in nothing.items() if isinstance(row.get(k), str) and not clean(row[k])} for _, row in rows]
    return [prompt_of(task, row | asked, where) for (where, row), asked in zip(rows, empty, strict=True)]


def kept_columns(rows: Sequence[tuple[str, Record]], task: Task) -> list[Record]:
    """Each row's columns, in their order; that of the one text that the task reads is called `text`."""
    one = columns[0] if len(columns := input_columns(task)) == 1 else None

    def name(column: Any, row: Record) -> str:
        return "text" if column == one else own_name(column, row) if column in OURS else str(column)

    return [{name(k, row): v for k, v in row.items()} for _, row in rows]


def own_name(column: str, row: Record) -> str:
    """What a row's own column is called beside ours of that name: given_NAME, or as often given_ as is free."""
    name = f"given_{column}"
    return name if name not in row else own_name(name, row)


def under(names: Mapping[str, str], row: Record) -> Record:
    """The row with columns called otherwise; another one that has such a name becomes given_NAME."""
    taken = names.values()
    return {names.get(k) or (own_name(k, row) if k in taken else k): v for k, v in row.items()}


def as_rows(texts: Iterable[Any], task: Task) -> list[tuple[str, Record]]:
    """Python's texts as rows: (where it stands, column -> value)."""
    columns, rows = input_columns(task), []
    for i, text in enumerate(several(texts, "texts")):
        if not isinstance(text, Mapping):
            values = list(text) if isinstance(text, list | tuple) else [text]
            check(len(values) == len(columns), f"task {task.name} reads {', '.join(columns)}; got {text!r}")
            text = dict(zip(columns, values, strict=True))
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in text.items()}
        rows.append((f"text {i + 1}", plain))
    return rows


def input_columns(task: Task) -> list[str]:
    """The columns that asking takes: all that the task reads but the answer."""
    return list(dict.fromkeys(task.columns.values()))


def columns_for(task: Task, first: Task) -> dict[str, str]:
    """Of each column that a task reads, the one in rows of the `first` task: of the same name where both read the same
    columns, else the one that stands in its place."""
    own, theirs = input_columns(task), input_columns(first)
    check(len(own) == len(theirs), f"task {task.name} reads {', '.join(own)}, {first.name} {', '.join(theirs)}")
    return dict(zip(own, own if {*own} == {*theirs} else theirs, strict=True))


def by_label(scores: Tensor, labels: Sequence[str]) -> dict[str, Sequence[Any]]:
    """Of each row the likeliest label and every label's probability among them. scores: (B, labels), log-probabilities
    or logits."""
    shares = [[round(p, 4) for p in row] for row in scores.softmax(1).tolist()]
    best = scores.argmax(1).tolist()
    return {
        "label": [labels[i] for i in best],
        "probability": [row[i] for row, i in zip(shares, best, strict=True)],
        "probabilities": [dict(zip(labels, row, strict=True)) for row in shares],
    }

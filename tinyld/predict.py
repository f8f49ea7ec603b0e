"""Rows in, answers out: a loaded run, and the one loop that serves the filter, files and Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyld.checkpoint import Base, base_dtype, find_base, load_adapter, load_base
from tinyld.composition import attach_static, load_composition
from tinyld.config import SampleConfig, check
from tinyld.data import Batch, TaskRows
from tinyld.device import autocast, resolve_device, resolve_dtype
from tinyld.errors import TinyldError, UsageError
from tinyld.evaluate import EVAL_BATCH, Verbalizers, label_logp, on_device
from tinyld.methods import WeightLora
from tinyld.options import PredictOptions, Sampling
from tinyld.peft import is_peft, load_peft
from tinyld.rows import Example, prompt_of
from tinyld.runs import CONFIG, RunFolder
from tinyld.sampler import decode
from tinyld.tasks import Task, from_record, load_task, to_record
from tinyld.texts import chunks, printer
from tinyld.workspace import default_base, keep_freed_memory, say_to_stderr, say_truncated

OURS = ("text", "label", "probability", "probabilities", "decoded", "answer", "truncated", "adapter")
EMPTY = "."  # what is asked for an empty text, so that every line in has a line out


@dataclass
class Run:
    """A run that was loaded: an adapter, composition, full fine-tuning or base, ready to answer."""

    path: Path
    base: Base  # with the adapters on it
    tasks: list[Task]  # that it was made for; none for a base
    config: dict[str, Any]  # the run's config.json; empty for a LoRA in PEFT's layout
    dtype: str = "auto"

    def predict(self, texts: Iterable[Any], task: str | None = None) -> list[dict[str, Any]]:
        """A dict for each text, in their order: `text`, `label`, `probability`, `probabilities`, `decoded`,
        `truncated`; `answer` where the task writes. A text is a string, or a dict by column where a task reads two."""
        chosen = self.task_named(task)
        columns = input_columns(chosen)
        rows = []
        for i, text in enumerate([texts] if isinstance(texts, str) else texts):
            if not isinstance(text, Mapping):
                values = [text] if isinstance(text, str) else list(text)
                check(len(values) == len(columns), f"task {chosen.name} reads {', '.join(columns)}; got {text!r}")
                text = dict(zip(columns, values, strict=True))
            rows.append((f"text {i + 1}", dict(text)))
        return self.answer(rows, chosen, SampleConfig())

    def write(
        self, prompts: str | Iterable[str], length: int = 24, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """A text for each prompt: by the run's generation task, else what fills `length` tokens at `{answer}`."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        sampling = SampleConfig(temperature=temperature, seed=seed)
        writer = next((t for t in self.tasks if t.is_generation), None)
        if writer is None:
            return [self.fill(prompt, length, 1, sampling)[0][0] for prompt in prompts]
        columns = input_columns(writer)
        rows = [(f"prompt {i + 1}", dict.fromkeys(columns, prompt)) for i, prompt in enumerate(prompts)]
        return [found["answer"] for found in self.answer(rows, writer, sampling)]

    def task_named(self, name: str | None) -> Task:
        """The run's task of that name, or its only one; for a run without tasks, any task."""
        if not self.tasks:
            if name is None:
                raise UsageError(f"{self.path} was made for no task: say which with --task")
            return load_task(name)
        known = {task.name: task for task in self.tasks}
        if name is None:
            check(len(known) == 1, f"{self.path} has tasks {', '.join(known)}; say which with --task")
            return self.tasks[0]
        if name in known:
            return known[name]
        asked = load_task(name)
        own = known.get(asked.name)
        if own is None:  # such as another set of reviews, which it may know how to read
            return asked
        refuse_another(asked, own, self.path)
        return own

    def answer(self, rows: Sequence[tuple[str, dict[str, Any]]], task: Task, sampling: SampleConfig) -> list[dict]:
        """What is found of each row, (where it stands, column -> value), with the row's other columns."""
        columns = input_columns(task)
        examples = []
        for where, row in rows:
            asked = {k: EMPTY for k in columns if isinstance(row.get(k), str) and not row[k].strip()}
            examples.append(prompt_of(task, row | asked, where))
        records = []
        for (_, row), found in zip(rows, self._answers(examples, task, sampling), strict=True):
            one = columns[0] if len(columns) == 1 else None
            kept = {f"given_{k}" if k in OURS else str(k): v for k, v in row.items() if k != one}
            records.append(kept | ({} if one is None else {"text": row[one]}) | found)
        return records

    @torch.no_grad()
    def _answers(self, examples: Sequence[Example], task: Task, sampling: SampleConfig) -> list[dict[str, Any]]:
        base, device = self.base, self.base.model.embedding.weight.device
        rows = TaskRows(examples, task, base.tokenizer, base.model.config.max_length)
        verbalizers = None if task.is_generation else Verbalizers(rows, base.tokenizer)
        generator = torch.Generator(device).manual_seed(sampling.seed)
        found: list[dict[str, Any]] = [{}] * len(rows)
        with autocast(device, resolve_dtype(self.dtype, device)):
            for chosen in rows.in_length_order(EVAL_BATCH):
                batch = on_device(rows.take(chosen), device)
                scores, decoded = None, None
                if verbalizers is not None:
                    scores, first = label_logp(base.model, batch, verbalizers, base.tokenizer.mask_id)
                    if rows.slot == 1 and sampling.temperature == 0:  # what decode would take, from the same pass
                        first[:, base.tokenizer.never_written] = -torch.inf
                        decoded = [base.tokenizer.decode([i]) for i in first.argmax(1).tolist()]
                if decoded is None:
                    out, _ = decode(
                        base.model, batch.x0, batch.answer_mask, batch.attention_mask, base.tokenizer.mask_id,
                        base.tokenizer.never_written, sampling, generator, base.tokenizer.eos_id,
                    )  # fmt: skip
                    ids = out[batch.answer_mask].view(len(chosen), rows.slot).tolist()
                    decoded = [base.tokenizer.decode(i) for i in ids]
                answered_by = self._answered_by(batch)
                for i, row in enumerate(chosen):
                    record: dict[str, Any] = {"answer": decoded[i]}
                    if scores is not None:
                        record = by_label(scores[i], task.labels) | {"decoded": decoded[i]}
                    record["truncated"] = bool(rows.cut[row])
                    found[row] = record | ({} if answered_by is None else {"adapter": answered_by[i]})
        return found

    def _answered_by(self, batch: Batch) -> list[str | None] | None:
        """Of a composition, the member whose share of each row is the largest, None if no member has one; all of them
        where it does not route."""
        if self.config.get("kind") != "composition":
            return None
        members = [Path(m["run"]).name for m in self.config["members"]]
        push = self.base.model.push
        if self.config["router"] is None:
            return [" + ".join(members)] * len(batch.x0)
        shares = push.shares(self.base.model.embed(batch.x0), batch.attention_mask & ~batch.answer_mask)
        return [
            members[i] if share > 0 else None for share, i in zip(*(x.tolist() for x in shares.max(1)), strict=True)
        ]

    def fill(self, prompt: str, length: int, num: int, sampling: SampleConfig) -> tuple[list[str], int]:
        """(num texts of `length` tokens at {answer} or after the prompt, forward passes)."""
        tokenizer, model = self.base.tokenizer, self.base.model
        before, mark, after = prompt.partition("{answer}")
        head, tail = tokenizer.encode(before), tokenizer.encode(after)
        total, most = len(head) + length + len(tail) + 2, model.config.max_length
        check(total <= most, f"prompt and answer have {total} tokens, the base takes {most}")
        row = [tokenizer.bos_id, *head, *[tokenizer.mask_id] * length, *tail, *([tokenizer.eos_id] if mark else [])]
        x = torch.tensor([row] * num, device=model.embedding.weight.device)
        answer_mask = torch.zeros_like(x, dtype=torch.bool)
        answer_mask[:, 1 + len(head) : 1 + len(head) + length] = True
        out, passes = decode(
            model, x, answer_mask, torch.ones_like(answer_mask), tokenizer.mask_id, tokenizer.never_written, sampling,
            eos_id=tokenizer.eos_id,
        )  # fmt: skip
        return [tokenizer.decode(r[answer_mask[0]].tolist()) for r in out], passes


def load(
    path: str | Path,
    base: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    kept_in: str | None = None,
    task: str | None = None,
) -> Run:
    """A run from its folder, on its base: where the run says, or in `base`, or the released one.

    `dtype` is the arithmetic's; the base's frozen matrices are kept in `kept_in`, or else as when it was trained. Of a
    composition that routes its rows, all go to the adapter of `task` where that is named.
    """
    path, base_path, on = Path(path), None if base is None else Path(base), resolve_device(device)
    resolve_dtype(dtype, on)
    if is_peft(path):
        loaded = load_base(base_path or default_base(), on, kept_in or "fp32")
        attach_static(loaded, (WeightLora.name, *load_peft(path, loaded.model.config, loaded.fingerprint)), path)
        return Run(path, loaded, [], {}, dtype)
    folder = RunFolder.open(path)
    config, where = folder.config, str(path / CONFIG)
    if config["kind"] == "base":
        check(base_path is None, f"{path} is a base itself: --base has no effect on it")
        return Run(path, load_base(path, on, kept_in or "fp32"), [], config, dtype)
    if config["kind"] == "adapter":
        task = from_record(config["task"], where)
        adapted = load_adapter(folder, base_path, on, kept_in)
        return Run(path, adapted.base, [task], config, dtype)
    kept_in = kept_in or base_dtype(config, str(path))
    loaded = load_base(find_base(config, path, base_path), on, kept_in)
    load_composition(folder, loaded, task)
    tasks = {m["task"]["name"]: from_record(m["task"], where) for m in config["members"]}
    return Run(path, loaded, list(tasks.values()), config, dtype)


def refuse_another(asked: Task, own: Task, run: Path) -> None:
    """TinyldError with the difference where a task goes by the name of a run's own and is not the same."""
    then, now = to_record(own), to_record(asked)
    differs = [f"{k} was {then[k]!r}, is {now[k]!r}" for k in then if k != "path" and then[k] != now[k]]
    if differs:
        raise TinyldError(f"{run} was made for another task {own.name}: {'; '.join(differs)}")


def input_columns(task: Task) -> list[str]:
    """The columns that asking takes: all that the task reads but the answer."""
    label = [task.label_column] if task.is_generation and task.label_column else []
    return list(dict.fromkeys([*task.columns.values(), *label]))


def by_label(scores: Tensor, labels: Sequence[str]) -> dict[str, Any]:
    """The likeliest label and every label's probability among them. scores: (labels,) log-probabilities."""
    probabilities = [round(p, 4) for p in scores.softmax(0).tolist()]
    best = int(scores.argmax())
    return {
        "label": labels[best],
        "probability": probabilities[best],
        "probabilities": dict(zip(labels, probabilities, strict=True)),
    }


def sampling_of(options: Sampling) -> SampleConfig:
    """How answers are written; UsageError for a threshold that the sampler does not read."""
    check(options.threshold is None or options.sampler == "threshold", "threshold goes with --sampler threshold")
    config = SampleConfig(options.sampler, options.steps, options.temperature, seed=options.seed)
    return config if options.threshold is None else replace(config, threshold=options.threshold)


def predict(options: PredictOptions) -> None:
    """Answers every text of the input, in its order; prints as soon as a chunk is done, or writes `out` whole."""
    keep_freed_memory()
    sampling = sampling_of(options)
    run = load(options.run, options.base, options.device, options.dtype, task=options.task)
    task = run.task_named(options.task)
    truncated = total = 0
    with printer(options) as write:
        for rows in chunks(options, input_columns(task)):
            records = run.answer(rows, task, sampling)
            write(records)
            total += len(records)
            truncated += sum(r["truncated"] for r in records)
    say_truncated(say_to_stderr(options.quiet), truncated, total, run.base.model.config.max_length)

"""Rows -> ids -> batches, for pretraining text and for tasks. What a step reads is a function of (seed, step)."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyld.config import check
from tinyld.errors import TinyldError
from tinyld.rows import Example
from tinyld.tasks import Task
from tinyld.tokenizer import Tokenizer

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray | None]


@dataclass(frozen=True)
class Batch:
    """Clean rows of one width L."""

    x0: Tensor  # (B, L) int64
    answer_mask: Tensor  # (B, L) bool: may be noised and is scored (every real token while pretraining)
    attention_mask: Tensor  # (B, L) bool: real token, not padding
    rows: Tensor  # (B,) int64: which rows of the source these are
    tail_mask: Tensor | None = None  # (B, L) bool: a slot from its answer's [EOS] on; None where all answers fill it


def seeded(*key: int) -> np.random.Generator:
    """A numpy generator that is a function of `key` alone."""
    return np.random.default_rng(np.random.SeedSequence(key))


def seed_of(*key: int) -> int:
    """A seed that is a function of `key` alone."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def torch_seeded(*key: int) -> torch.Generator:
    """A torch (CPU) generator that is a function of `key` alone."""
    return torch.Generator().manual_seed(seed_of(*key))


def spread_over(n: int, most: int | None) -> np.ndarray:
    """`most` of n rows of running text, or all: spread over them."""
    return np.arange(n) if most is None or n <= most else np.linspace(0, n - 1, most).astype(int)


def some_of(n: int, most: int) -> np.ndarray:
    """`most` of a task's n rows, or all, in their order: drawn, as labels may stand in any order, by turns as well."""
    return np.sort(seeded(n, most).permutation(n)[:most])


class Source:
    """Rows that training reads; which ones a step takes is a function of (seed, step)."""

    _epoch: tuple[Any, list[Any]] = (None, [])  # the last epoch asked for, and its batches

    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        epoch, i = divmod(step, self.steps_per_epoch(batch_size))
        key = epoch, batch_size, seed
        if self._epoch[0] != key:
            self._epoch = key, self._batches(*key)
        return self.take(*self._epoch[1][i])


class TextRows(Source):
    """A token stream cut into rows of [BOS] + (length - 1) tokens; the cut moves with every epoch. `change` changes
    some rows (length - 1,) in place, by what it draws, and may tell which tokens are given and never masked."""

    def __init__(self, stream: np.ndarray, length: int, bos_id: int, change: Change | None = None):
        self.stream, self.width, self.bos_id, self.change = stream, length - 1, bos_id, change
        self.num_rows = len(stream) // self.width - 1  # of an epoch: one row is left for the moving cut
        needed = f"rows of {length} tokens need at least {2 * self.width}"
        check(self.num_rows > 0, f"too little text: {len(stream)} tokens; {needed}", TinyldError)

    def __len__(self) -> int:
        return self.num_rows + 1

    def steps_per_epoch(self, batch_size: int) -> int:
        return max(1, self.num_rows // batch_size)

    def _batches(self, epoch: int, batch_size: int, seed: int) -> list[tuple[np.ndarray, int]]:
        """(rows, where the cut is) of each batch."""
        rng = seeded(seed, 1, epoch)
        offset = int(rng.integers(self.width)) if epoch else 0
        order = rng.permutation(self.num_rows)
        return [(order[i * batch_size :][:batch_size], offset) for i in range(self.steps_per_epoch(batch_size))]

    def take(self, rows: np.ndarray, offset: int = 0) -> Batch:
        starts = offset + rows.astype(np.int64) * self.width
        ids = self.stream[starts[:, None] + np.arange(self.width)[None, :]].astype(np.int64)
        ids = np.pad(ids, ((0, 0), (1, 0)), constant_values=self.bos_id)
        given = np.zeros_like(ids, dtype=bool)
        given[:, 0] = True  # elsewhere a [BOS] is the [EOS] of a model that has but one of them
        for i, number in enumerate(rows.tolist() if self.change else ()):
            if (told := self.change(ids[i, 1:], seeded(offset, number, 3))) is not None:
                given[i, 1:] |= told
        return Batch(*map(torch.from_numpy, (ids, ~given, np.ones_like(given), rows.astype(np.int64))))


class TaskRows(Source):
    """A task's rows as ids: [BOS] before, answer slot, after [EOS]; every slot of a task has the same width.

    An answer shorter than the slot ends in one [EOS]; what is behind it is no part of the text. What is written at the
    end of a row has no other [EOS]. Of a row longer than `max_length` each side of the answer has half of the room, or
    what the other side leaves: behind it what comes first; before it the beginning and the end, as long texts say in
    both what they are about, but around a gap the end alone. `cut` says which rows are.
    """

    def __init__(self, examples: Sequence[Example], task: Task, tokenizer: Tokenizer, max_length: int):
        self.task, self.examples, self.pad_id = task, examples, tokenizer.pad_id
        self.slot = slot_width(task, tokenizer)
        # whether answers differ in length, so that one is chosen before anything is written
        self.open_ended = task.is_generation or len(set(map(len, answer_ids(task, tokenizer)))) > 1
        self.labels = np.array([-1 if e.label is None else e.label for e in examples], dtype=np.int64)
        blanks = {"before": "", "answer": tokenizer.blank_before(task.template), "after": tokenizer.blank}
        texts = [[getattr(e, part) and blank + getattr(e, part) for e in examples] for part, blank in blanks.items()]
        parts = (tokenizer.encode_batch(part, tags=task.is_generation) for part in texts)
        first, turn, end = tokenizer.start, tokenizer.turn, tokenizer.eos_id
        room = max_length - self.slot - len(first) - len(turn) - 1
        lacks = f"task {task.name}: an answer of {self.slot} tokens leaves no room in {max_length} tokens"
        check(room > 0, lacks, TinyldError)
        self.ids: list[np.ndarray] = []
        self.starts, self.ends = np.zeros((2, len(examples)), dtype=np.int64)  # of answers; of their [EOS] in the slot
        self.cut = np.zeros(len(examples), dtype=bool)  # whether the prompt had no room
        self.cut_answers, self.longest = 0, 0  # how many had no room in the slot; tokens of the longest
        self.unwritable = 0  # answers to write that hold what the base has no piece for, which is left out
        for i, (head, answer, tail) in enumerate(zip(*parts, strict=True)):
            if task.is_generation and tokenizer.unk_id in answer:
                self.unwritable += 1
                answer = [token for token in answer if token != tokenizer.unk_id]
            self.cut_answers += len(answer) > self.slot
            self.longest = max(self.longest, len(answer))
            self.cut[i] = len(head) + len(tail) > room
            if self.cut[i]:
                tail = tail[: max(room - len(head), room // 2)]
                kept = min(room - len(tail), len(head))
                begin = 0 if task.is_infill else kept // 2
                head = [*head[:begin], *head[len(head) - (kept - begin) :]]
            head = [*first, *head, *turn]
            self.starts[i], self.ends[i] = len(head), min(len(answer), self.slot)
            row = [*head, *[*answer, *[end] * self.slot][: self.slot], *tail]
            row += [end] if tail or not task.is_generation else []
            self.ids.append(np.array(row, dtype=np.int32))
        self.lengths = np.array([len(row) for row in self.ids], dtype=np.int64)
        self.truncated = int(self.cut.sum())  # rows

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self) -> str:
        """SHA-256 of all rows as the denoiser sees them, and of all that is right where that is more than one text."""
        parts = [self.lengths, self.starts, np.array(self.slot), *self.ids]
        right = [e.references for e in self.examples] if any(len(e.references) > 1 for e in self.examples) else ""
        right = str(right).encode(errors="surrogatepass")
        return hashlib.sha256(b"".join(p.tobytes() for p in parts) + right).hexdigest()

    def steps_per_epoch(self, batch_size: int) -> int:
        return -(-len(self.ids) // batch_size)

    def _batches(self, epoch: int, batch_size: int, seed: int) -> list[tuple[np.ndarray]]:
        """Rows of like length together, drawn from pools of 64 batches so that batches differ between epochs."""
        rng = seeded(seed, 1, epoch)
        order = rng.permutation(len(self.ids))
        batches: list[np.ndarray] = []
        for start in range(0, len(order), 64 * batch_size):
            pool = order[start : start + 64 * batch_size]
            seen = self.lengths[pool] - self.slot + self.ends[pool]
            pool = pool[np.argsort(seen, kind="stable")]
            batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        return [(batches[i],) for i in rng.permutation(len(batches))]

    def in_length_order(self, at_once: int) -> list[np.ndarray]:
        """Every row once, in batches of like length and even size, the longest first: what comes takes no longer."""
        order = np.argsort(self.lengths, kind="stable")
        return np.array_split(order, math.ceil(len(order) / at_once))[::-1]

    def take(self, rows: np.ndarray) -> Batch:
        starts, ends, lengths = (of[rows][:, None] for of in (self.starts, self.ends, self.lengths))
        place = np.arange(lengths.max())
        real, answer = place < lengths, (place >= starts) & (place < starts + self.slot)
        x0 = np.full(real.shape, self.pad_id, dtype=np.int64)
        x0[real] = np.concatenate([self.ids[row] for row in rows])
        tail = torch.from_numpy(answer & (place >= starts + ends)) if self.open_ended else None
        return Batch(*map(torch.from_numpy, (x0, answer, real, rows.astype(np.int64))), tail)


def answer_ids(task: Task, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The tokens of each label's answer."""
    blank = tokenizer.blank_before(task.template)
    return [tuple(tokenizer.encode(blank + words)) for words in task.verbalizer.values()]


def slot_width(task: Task, tokenizer: Tokenizer) -> int:
    """Tokens in the task's answer slot: its longest verbalizer's, or `answer_tokens` for a generation task.

    Where verbalizers differ in length there is one more, for the longest one's [EOS]: without it a row whose length is
    told would look to `noise_answers` like one that is asked for it, and the longest would become too likely.
    TinyldError for answers that the base cannot write, or cannot tell from each other.
    """
    if task.is_generation:
        return task.answer_tokens
    owner: dict[tuple[int, ...], str] = {}
    for (label, words), ids in zip(task.verbalizer.items(), answer_ids(task, tokenizer), strict=True):
        lacks = f"task {task.name}: the base's vocabulary cannot write {words!r}, the answer for {label!r}"
        check(ids and tokenizer.unk_id not in ids, lacks, TinyldError)
        other = owner.setdefault(ids, label)
        both = f"{task.verbalizer[other]!r} and {words!r}, the answers for {other!r} and {label!r}"
        same = f"task {task.name}: {both}, are the same tokens to this base; give each its own"
        check(other == label, same, TinyldError)
    lengths = set(map(len, owner))
    return max(lengths) + (len(lengths) > 1)

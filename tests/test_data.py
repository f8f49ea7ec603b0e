"""Rows and batches: where each token of an example stands, and which rows a step reads."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import byte_level, refuses, seeded, task_of, task_rows

from tinyld.data import TaskRows, TextRows, slot_width, some_of
from tinyld.diffusion import noise_text
from tinyld.errors import TinyldError
from tinyld.rows import Example
from tinyld.tokenizer import Tokenizer

WORDS = ("film", "plot", "music", "food", "dull", "bright", "very", "good")
LABELS = 'template = "{text} it was {answer} . and"\n[verbalizer]\nneg = "bad"\npos = "very great"\n'
WRITE = 'template = "{text} : {answer}"\nanswer_column = "answer"\nanswer_tokens = 5\n'


def test_a_digest_is_of_every_answer_that_is_right(tmp_path: Path, tokenizer: Tokenizer) -> None:
    task, given = task_of(tmp_path, WRITE), [("bad",), ("bad", "sad"), ("bad", "good")]
    rows = [TaskRows([Example("it was", "", "bad", None, references)], task, tokenizer, 24) for references in given]
    assert len({of.digest() for of in rows}) == 3


def test_a_row_is_bos_prompt_slot_prompt_eos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = task_of(tmp_path, LABELS)
    texts = ("the film it was", ". and", "bad", 0), ("a very bright plot it was", ". and", "very great", 1)
    rows = TaskRows([Example(*text) for text in texts], task, tokenizer, 48)
    encode, bos, eos, pad = tokenizer.encode, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    short = [bos, *encode("the film it was"), *encode("bad"), eos, eos, *encode(". and"), eos]
    long = [bos, *encode("a very bright plot it was"), *encode("very great"), eos, *encode(". and"), eos]
    batch, width = rows.take(np.array([1, 0])), torch.arange(len(long))
    assert batch.x0.tolist() == [long, short + [pad] * (len(long) - len(short))]
    assert batch.answer_mask.tolist() == [[start <= i < start + 3 for i in width] for start in (7, 5)]
    assert batch.attention_mask.tolist() == [[True] * len(long), (width < len(short)).tolist()]
    assert batch.rows.tolist() == [1, 0] and rows.labels.tolist() == [0, 1]
    assert batch.x0.dtype == torch.int64 and batch.answer_mask.dtype == batch.attention_mask.dtype == torch.bool


@pytest.mark.parametrize(
    ("head", "tail", "kept"),
    [(2, 20, (0, 2, 4)), (20, 2, (2, 2, 2)), (20, 20, (1, 2, 3)), (3, 3, (0, 3, 3)), (20, 0, (3, 3, 0))],
)
def test_long_texts_keep_their_beginning_and_what_is_near_the_answer(
    tokenizer: Tokenizer, tmp_path: Path, head: int, tail: int, kept: Any
) -> None:
    texts = [" ".join(WORDS[i % 8] for i in range(count)) for count in (head, tail)]
    rows = TaskRows([Example(*texts, "bad", 0)], task_of(tmp_path, LABELS), tokenizer, 11)
    ids, after = tokenizer.encode(texts[0]), tokenizer.encode(texts[1])[: kept[2]]
    before = ids[: kept[0]] + ids[-kept[1] :]
    answer = [*tokenizer.encode("bad"), tokenizer.eos_id, tokenizer.eos_id]
    assert rows.ids[0].tolist() == [tokenizer.bos_id, *before, *answer, *after, tokenizer.eos_id]
    assert rows.starts[0] == 1 + len(before) and rows.cut.tolist() == [head + tail > 6] == [bool(rows.truncated)]
    of_gap = task_of(tmp_path, 'template = "{text}"\nanswer_tokens = 2')
    gap = TaskRows([Example(*texts, "bad", 0)], of_gap, tokenizer, 11)
    near = gap.ids[0][1 : gap.starts[0]].tolist()
    assert near == ids[-len(near) :], "of a gap what is next to it"


def test_the_slot_is_as_wide_as_the_longest_answer_and_its_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert slot_width(task_of(tmp_path, LABELS), tokenizer) == 3
    assert slot_width(task_of(tmp_path, LABELS.replace("very great", "very very great")), tokenizer) == 4
    assert slot_width(task_of(tmp_path, LABELS.replace("very great", "great")), tokenizer) == 1, "all are as long"
    assert slot_width(task_of(tmp_path, WRITE), tokenizer) == 5
    with pytest.raises(TinyldError, match="an answer of 3 tokens leaves no room in 4 tokens"):
        TaskRows([Example("it was", ".", "bad", 0)], task_of(tmp_path, LABELS), tokenizer, 4)
    with pytest.raises(TinyldError, match="the base's vocabulary cannot write '漢', the answer for 'pos'"):
        slot_width(task_of(tmp_path, LABELS.replace("very great", "漢")), tokenizer)


@pytest.mark.parametrize(("one", "other"), [("good.", "good ."), ("b\u00e1d", "bad"), ("don't", "do n't")])
def test_answers_of_the_same_tokens_are_refused(one: str, other: str, tmp_path: Path) -> None:
    english = Tokenizer.train(["good bad don't . film"] * 9, 120)
    task = task_of(tmp_path, LABELS.replace('"very great"', f'"{one}"').replace('"bad"', f'"{other}"'))
    refuses("the answers for 'neg' and 'pos', are the same tokens to this base", slot_width, task, english)


@pytest.mark.parametrize(("toml", "slot"), [(WRITE, 5), (LABELS, 3)])
@pytest.mark.parametrize("answer", ["", "good", "a very good plot but dull food"])
def test_answers_are_cut_or_filled(tokenizer: Tokenizer, tmp_path: Path, toml: str, slot: int, answer: str) -> None:
    rows = TaskRows([Example("the film", ".", answer, None)], task_of(tmp_path, toml), tokenizer, 48)
    batch, expected = rows.take(np.array([0])), tokenizer.encode(answer)[:slot]
    assert batch.x0[batch.answer_mask].tolist() == expected + [tokenizer.eos_id] * (slot - len(expected))
    assert batch.tail_mask[batch.answer_mask].tolist() == [i >= len(expected) for i in range(slot)]
    assert rows.labels.tolist() == [-1] and rows.truncated == 0
    assert (rows.cut_answers, rows.longest) == (len(answer) > 9, len(tokenizer.encode(answer)))


@pytest.mark.parametrize(("n", "size"), [(1, 4), (23, 5), (300, 2)])
def test_the_batches_of_an_epoch_hold_every_row_once(tokenizer: Tokenizer, tmp_path: Path, n: int, size: int) -> None:
    rows = task_rows(tmp_path, tokenizer, n)
    steps = rows.steps_per_epoch(size)
    assert steps == -(-n // size)
    for epoch in range(2):
        batches = [rows.batch(epoch * steps + i, size, seed=3) for i in range(steps)]
        assert sorted(r for b in batches for r in b.rows.tolist()) == list(range(n))
        assert sorted(len(b.rows) for b in batches)[1:] == [size] * (steps - 1)
    batches = rows.in_length_order(size)
    assert sorted(np.concatenate(batches)) == list(range(n)) and len(batches) == steps
    longest = [int(rows.lengths[batch].max()) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_a_batch_is_a_function_of_seed_and_step_and_not_of_earlier_calls(tokenizer: Tokenizer, tmp_path: Path) -> None:
    one, two = task_rows(tmp_path, tokenizer, 40), task_rows(tmp_path, tokenizer, 40)
    steps = list(range(25))  # three epochs and a bit
    in_order = [one.batch(s, 5, seed=1).rows.tolist() for s in steps]
    random.Random(0).shuffle(steps)
    for step in steps:
        two.batch(step, 8, seed=9)
        assert two.batch(step, 5, seed=1).rows.tolist() == in_order[step]
    assert in_order[:8] != in_order[8:16], "epochs differ"
    assert in_order[:8] != [one.batch(s, 5, seed=2).rows.tolist() for s in range(8)], "seeds differ"


@pytest.mark.parametrize("length", [2, 5, 9])
def test_text_rows_are_bos_and_the_stream_in_order(length: int) -> None:
    stream = np.arange(100, 200, dtype=np.uint16)
    rows = TextRows(stream, length, bos_id=120)  # the [EOS] of a model that has but one of them: it is learned
    batch = rows.take(np.arange(len(rows)))
    assert (batch.x0[:, 0] == 120).all() and not batch.answer_mask[:, 0].any()
    assert batch.answer_mask[:, 1:].all() and batch.attention_mask.all()
    read = batch.x0[:, 1:].flatten().tolist()
    assert read == list(range(100, 100 + len(read)))
    assert 100 - len(read) < length - 1, "but for a rest that makes no row"
    last = rows.take(np.array([rows.num_rows - 1]), offset=length - 2)
    assert int(last.x0[0, -1]) < 200, "the furthest cut stays inside the stream"
    least = 2 * (length - 1)
    assert len(TextRows(stream[:least], length, bos_id=2)) == 2
    with pytest.raises(TinyldError, match=f"{least - 1} tokens; rows of {length} tokens need at least {least}"):
        TextRows(stream[: least - 1], length, bos_id=2)


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_an_epoch_of_text_reads_rows_without_repeats_at_one_shift(batch_size: int) -> None:
    rows = TextRows(np.arange(300, dtype=np.uint16), 8, bos_id=1000)
    steps = rows.steps_per_epoch(batch_size)
    shifts, in_order = [], [rows.batch(step, batch_size, seed=4).x0[:, 1:] for step in range(6 * steps)]
    for epoch in range(6):
        read = torch.cat(in_order[epoch * steps :][:steps])
        assert len(torch.unique(read)) == read.numel(), "no token twice"
        assert (read.diff(dim=1) == 1).all()
        assert len(torch.unique(read[:, 0] % 7)) == 1, "one cut for the whole epoch"
        shifts.append(int(read[0, 0]) % 7)
    assert shifts[0] == 0 and len(set(shifts)) > 2
    assert not torch.equal(rows.batch(0, batch_size, seed=1).x0[:, 1:], in_order[0])


def test_some_of_a_tasks_rows_are_of_all_labels_in_whatever_order_those_stand() -> None:
    for turns in (2, 3, 4, 10):
        counts = np.bincount(some_of(2000, 1000) % turns)
        assert len(counts) == turns and counts.min() > 0.7 * counts.mean()  # 4 deviations or more of a fair draw
    assert some_of(3, 1000).tolist() == [0, 1, 2]


def test_rows_are_changed_by_what_their_place_in_the_text_draws_and_what_is_given_is_never_masked() -> None:
    def change(row: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
        given = None if row[0] % 2 else np.arange(len(row)) < 3
        row[:] = rng.integers(1_000, 60_000, len(row))
        return given

    stream = np.arange(100, 800, dtype=np.uint16)
    first, again = (TextRows(stream, 8, bos_id=2, change=change) for _ in range(2))
    batch = first.take(np.arange(20))
    assert torch.equal(again.take(np.arange(10, 20)).x0, batch.x0[10:]) and len(batch.x0[:, 1].unique()) > 15
    assert not torch.equal(first.take(np.arange(20), offset=1).x0, batch.x0)
    assert stream.tolist() == list(range(100, 800)) and (batch.x0[:, 0] == 2).all()
    given = (torch.arange(20)[:, None] % 2 == 0) & (torch.arange(8) < 4) | (torch.arange(8) < 1)
    assert torch.equal(batch.answer_mask, ~given) and batch.attention_mask.all()
    for part in noise_text(batch, 1, seeded()):
        assert not (part.is_masked & given.repeat(2, 1)).any() and part.prompt_mask[given.repeat(2, 1)].all()


def test_words_of_a_byte_level_vocabulary_keep_their_blanks(tmp_path: Path) -> None:
    inner = byte_level(["a b it was good .", "a b it was bad ."] * 9, ["<end>", "<mask>"])
    end, mask = map(inner.token_to_id, ("<end>", "<mask>"))
    roles = {"pad": end, "bos": end, "eos": end, "mask": mask}
    tokenizer, task = Tokenizer(inner, roles=roles), task_of(tmp_path, LABELS.replace("very great", "good"))
    rows = TaskRows([Example("a b it was", ".", "good", 1)], task, tokenizer, 32)
    assert rows.slot == 1 and inner.decode(rows.ids[0].tolist()[1:-1]) == "a b it was good ."
    assert len(tokenizer.encode("good")) > 1 and tokenizer.blank == " "
    pieces = [tokenizer.pieces[inner.token_to_id(t)] for t in ("Ġit", "it", ".", "<end>")]
    assert pieces == ["it", "##it", ".", "<end>"], "as word pieces"
    assert tokenizer.decode(rows.ids[0][rows.starts[0] :][:1]) == "good"
    chat = Tokenizer(inner, roles=roles | {"start": [end], "turn": tokenizer.encode("b")})
    assert TaskRows([Example("a", "", "good", 1)], task, chat, 32).slot > 1, "a chat's turn ends without a blank"

"""Texts that lack words of their prompt are given places for these, and nothing else of them changes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tinyld.config import SampleConfig
from tinyld.coverage import Coverage
from tinyld.mending import CLAUSES, Mender
from tinyld.tokenizer import Tokenizer
from tinyld.workspace import default_base

SLOT, WANTED = 24, Coverage(("name", "area"), {"near": ("by",)})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    path = default_base() / "tokenizer.json"
    return Tokenizer.parse(path.read_bytes(), path)


class Copying:
    """A denoiser that goes on as `copied` does behind the token on the left, or else deletes; it is `sure`."""

    def __init__(self, tokenizer: Tokenizer, copied: str, sure: float):
        ids = tokenizer.encode(copied)
        self.next, self.delete = dict(zip(ids, ids[1:], strict=False)), tokenizer.delete_id
        self.size, self.mask_id, self.sure, self.asked = tokenizer.vocab_size, tokenizer.mask_id, sure, 0

    def rows_at_once(self, length: int, most: int, asked: int) -> int:
        return max(1, most)

    def __call__(self, x: Tensor, t: Tensor, attention: Any, prompt: Tensor, where: Tensor) -> Tensor:
        self.asked += len(x)
        share = torch.full((int(where.sum()), self.size), (1 - self.sure) / self.size)
        rows, places = where.nonzero().T
        for i, left in enumerate(x[rows, places - 1].tolist()):
            if left != self.mask_id:  # else it knows nothing
                share[i, self.next.get(left, self.delete)] = self.sure
        return share.log()


def mended(
    tokenizer: Tokenizer, prompt: str, text: str, copied: str = "", clauses: bool = True, sure: float = 0.99
) -> tuple[str, int, int]:
    """(the text, mended; its forward passes; rows that the denoiser saw), in a batch whose other row lacks nothing."""
    asked, said = tokenizer.encode(prompt), tokenizer.encode(text)
    row = torch.tensor([tokenizer.bos_id, *asked, *said, *[tokenizer.eos_id] * (SLOT + 1 - len(said))])
    place = torch.arange(len(row))
    slots = ((place > len(asked)) & (place <= len(asked) + SLOT)).expand(2, -1)
    seen = torch.ones_like(slots)
    denoiser = Copying(tokenizer, copied or prompt, sure)
    mender = Mender(
        denoiser, slots, seen, tokenizer, tokenizer.delete_id, SampleConfig(), torch.Generator(),
        lambda i, text: WANTED.missing(prompt, text) if i == 0 else set(),
    )  # fmt: skip
    x, passes = mender.mend(torch.stack([row, row]), clauses)
    assert torch.equal(x[1], row) and passes[1] == 0, "what lacks nothing is left alone"
    assert torch.equal(x[0][~slots[0]], row[~slots[0]])
    assert mender.lacking(x)[0] <= mender.lacking(row[None])[0]
    return tokenizer.decode(x[0][slots[0]].tolist()), int(passes[0]), denoiser.asked


@pytest.mark.parametrize(("text", "expected"), [
    ("it is the fitz . it is by the river .", "it is the fitz fyne. it is by the river."),  # behind its neighbour
    ("it is the fitz f . it is good .", "it is the fitz fyne. it is good."),  # in place of a part of it
    ("there is fyne . it is good .", "there is the fitz fyne. it is good."),  # before its neighbour
])  # fmt: skip
def test_a_name_that_was_cut_is_completed_beside_what_stands_beside_it_in_the_prompt(
    tokenizer: Tokenizer, text: str, expected: str
) -> None:
    assert mended(tokenizer, "name[The Fitz Fyne]", text, "is the fitz fyne", clauses=False)[0] == expected


def test_what_has_no_neighbour_in_the_text_gets_a_clause_of_as_many_tokens_as_it_needs(tokenizer: Tokenizer) -> None:
    prompt, text, copied = "name[Fyne], area[riverside], near", "fyne is good .", "good by the riverside"
    assert mended(tokenizer, prompt, text, copied, clauses=False) == ("fyne is good.", 0, 0)
    found, passes, asked = mended(tokenizer, prompt, text, copied)
    assert found == "fyne is good by the riverside." and 0 < passes == asked


def test_few_places_are_tried_and_those_of_few_texts_together(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled, rows = Mender.filled, list[int]()
    monkeypatch.setattr(Mender, "filled", lambda self, x, owner: rows.append(len(x)) or filled(self, x, owner))
    mended(tokenizer, "area[riverside]", " ".join(["good ."] * (CLAUSES + 2)), "no")
    assert rows == [CLAUSES] and CLAUSES > 2, "before the last marks alone, and of a batch of two"


@pytest.mark.parametrize(("text", "sure"), [
    ("it is the fitz . it is good .", 0.3),  # what it would be is not sure
    (" ".join(["good"] * (SLOT - 2)) + " fitz", 0.99),  # no room
    ("", 0.99),  # no text
])  # fmt: skip
def test_a_text_stays_as_it_is_where_it_cannot_be_mended(tokenizer: Tokenizer, text: str, sure: float) -> None:
    ids = tokenizer.encode(text)
    found = mended(tokenizer, "name[The Fitz Fyne]", text, "the fitz fyne", clauses=False, sure=sure)
    assert found[0] == tokenizer.decode(ids)


def test_digits_and_marks_that_join_are_one_run(tokenizer: Tokenizer) -> None:
    found, _, _ = mended(tokenizer, "area[1907-07/11]", "it was on 1907 .", "1907-07/11", clauses=False)
    assert found == "it was on 1907-07/11."

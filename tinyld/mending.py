"""A text that lacks words of its prompt gets masks for them, and they are written.

The place of a word is beside a word that stands beside it in the prompt, too. One that has no such place, or that may
be said in other words, gets a clause: masks before a mark, of which those that are too many become deletes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinyld.config import SampleConfig
from tinyld.sampler import fill_in
from tinyld.tokenizer import Tokenizer
from tinyld.writing import fold, words

ROUNDS = 3  # of mending, each of which may find the place of one word
PLACES = 3  # that are tried beside one word
CLAUSES = 4  # the last ones of a text, before whose marks a word is tried
CLAUSE = 4  # tokens of a clause beside the words that it is for
UNSURE = -1.0  # nats of a token: what is less likely on the average is not taken
ENDING, JOINING = set(".!?,;"), set("-./':&")


class Word(NamedTuple):
    begin: int
    end: int
    text: str  # folded


class Mender:
    """Of the texts of a batch. `missing` says of row i and its text what that lacks of its prompt, word by word."""

    def __init__(
        self, denoiser: Any, slots: Tensor, attention_mask: Tensor, tokenizer: Tokenizer, delete: int | None,
        config: SampleConfig, generator: torch.Generator, missing: Callable[[int, str], set[str]],
    ):  # fmt: skip
        """slots, attention_mask: (B, L), as `sampler.decode` has them; `delete` as there."""
        self.denoiser, self.slots, self.attention_mask, self.tokenizer = denoiser, slots, attention_mask, tokenizer
        self.delete, self.config, self.generator, self.missing = delete, config, generator, missing

    def lacks(self, i: int, row: Tensor) -> set[str]:
        """What row (L,), the batch's i-th, lacks."""
        return self.missing(i, self.tokenizer.decode(row[self.slots[i]].tolist()))

    def lacking(self, x: Tensor) -> list[int]:
        """How many words the text of each row of x (B, L) lacks."""
        return [len(self.lacks(i, row)) for i, row in enumerate(x)]

    def mend(self, x: Tensor, clauses: bool) -> tuple[Tensor, Tensor]:
        """(x (B, L), mended; forward passes of each row). Without `clauses` words get places beside words alone."""
        x, passes, owners = x.clone(), torch.zeros(len(x), dtype=torch.long), list(range(len(x)))
        for _ in range(ROUNDS):
            lacks = {i: words for i in owners if (words := self.lacks(i, x[i]))}
            tries = [(i, row) for i, words in lacks.items() for row in self.tries(i, x[i], words, clauses)]
            least, owners = {i: (len(words), 0.0) for i, words in lacks.items()}, []
            at_once = self.denoiser.rows_at_once(x.shape[1], len(tries), int(self.slots.sum(1).max()))
            for start in range(0, len(tries), at_once):
                which, rows = zip(*tries[start : start + at_once], strict=True)
                out, used, sure = self.filled(torch.stack(rows), torch.tensor(which))
                for i, row, n, nats in zip(which, out, used.tolist(), sure.tolist(), strict=True):
                    passes[i] += n
                    found = len(self.lacks(i, row)), -nats
                    if nats >= UNSURE and found < least[i]:
                        least[i], x[i] = found, row
                        owners += [] if i in owners else [i]
        return x, passes

    def tries(self, i: int, row: Tensor, lacks: set[str], clauses: bool) -> list[Tensor]:
        """Row i with masks for what its text lacks, in each of the ways that fit its slot."""
        slot, eos = self.slots[i], self.tokenizer.eos_id
        text, prompt = row[slot].tolist(), row[self.attention_mask[i] & ~slot].tolist()
        size, text, found = len(text), text[: text.index(eos)] if eos in text else text, list[Tensor]()
        for begin, end, masks in self.places(prompt, text, lacks, clauses):
            new = [*text[:begin], *[self.tokenizer.mask_id] * masks, *text[end:]]
            if len(new) <= size:
                new += [eos] * (size - len(new))
                found.append(row.masked_scatter(slot, row.new_tensor(new)))
        return found

    def places(
        self, prompt: Sequence[int], text: Sequence[int], lacks: set[str], clauses: bool
    ) -> Iterator[tuple[int, int, int]]:
        """(begin, end, masks): what of the text makes room for so many masks."""
        pieces, asked, said = self.tokenizer.pieces, self.words_of(prompt), self.words_of(text)
        known, first = {word.text for word in asked}, 0

        def is_lacking(nth: int) -> bool:
            return nth < len(asked) and not lacks.isdisjoint(words(asked[nth].text))

        def beside(nth: int) -> bool:
            """Whether nothing, or one mark that joins, is between a word of the prompt and the one before it."""
            if not 0 < nth < len(asked):
                return False
            between = prompt[asked[nth - 1].end : asked[nth].begin]
            return len(between) == 0 or (len(between) == 1 and pieces[between[0]] in JOINING)

        def written(nth: int) -> list[int]:
            """Where a word of the prompt is among those of the text."""
            return [k for k, word in enumerate(said) if word.text == asked[nth].text][:PLACES]

        def part(nth: int, whole: int, edge: int) -> Word | None:
            """A word of the text, if it is none of the prompt's and begins (edge 0) or ends (-1) as that one of it."""
            found = said[nth] if 0 <= nth < len(said) and said[nth].text not in known else None
            return found if found and found.text[edge] == asked[whole].text[edge] else None

        while first < len(asked):
            last = first
            if is_lacking(first):
                while is_lacking(last + 1) and beside(last + 1):
                    last += 1
                begin, end = asked[first].begin, asked[last].end
                if beside(first):
                    for nth in written(first - 1):
                        cut = part(nth + 1, first, 0) or said[nth]
                        yield said[nth].end, cut.end, end - asked[first - 1].end
                if beside(last + 1):
                    for nth in written(last + 1):
                        cut = part(nth - 1, last, -1) or said[nth]
                        yield cut.begin, said[nth].begin, asked[last + 1].begin - begin
                if clauses:
                    marks = [k for k, token in enumerate(text) if k and pieces[token] in ENDING] or [len(text)]
                    yield from ((at, at, end - begin + CLAUSE) for at in marks[-CLAUSES:])
            first = last + 1

    def words_of(self, ids: Sequence[int]) -> list[Word]:
        """The words that these tokens spell, and which of the tokens they are."""
        found = list[Word]()
        for i, token in enumerate(ids):
            piece = self.tokenizer.pieces[token]
            if piece.startswith("##") and found and found[-1].end == i:
                found[-1] = Word(found[-1].begin, i + 1, found[-1].text + fold(piece[2:]))
            elif any(map(str.isalnum, piece)) and piece not in self.tokenizer.special:
                found.append(Word(i, i + 1, fold(piece.removeprefix("##"))))
        return found

    def filled(self, x: Tensor, owner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x (N, L) with its masks written, forward passes of each row, log-likelihood of a token that was written), of
        tries for rows `owner` (N,)."""
        slots, attended = self.slots[owner], self.attention_mask[owner]
        ends, masks = (slots & (x == self.tokenizer.eos_id)).cumsum(1), (x == self.tokenizer.mask_id).sum(1)
        inside = slots & (ends == 0)
        shrinking = None if self.delete is None else (slots, self.delete, self.tokenizer.eos_id)
        out, passes, score = fill_in(
            self.denoiser, x, inside, attended & (~slots | (ends <= 1)), attended & ~slots, self.tokenizer.mask_id,
            [*self.tokenizer.never_written, self.tokenizer.eos_id], self.config, self.generator, shrinking=shrinking,
        )  # fmt: skip
        return out, passes, score * inside.sum(1) / masks

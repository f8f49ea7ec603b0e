"""Pretraining rows that ask for copying, which text by itself asks for too seldom for a small model to learn it.

Some rows say part of themselves twice. Some begin with names and numbers that their sentences hold, as a prompt of
facts does; half of these lists are never masked, as a prompt is not. In some every name and number that comes again is
another one, so that what it is can only be read where it stood before. What becomes of a row is a function of its
number and its place in the text.
"""

from collections.abc import Sequence

import numpy as np

TWICE, LISTED, RENAMED = 0.1, 0.4, 0.2  # shares of the rows
GIVEN = 0.5  # share of the lists that are never masked
LEFT_OUT = 0.15  # share of the names that a list leaves out
SELDOM = 1e-4  # a token below this share of the text is a name,
NOT_OFTEN = 5e-4  # and below this one it stands in lists
STOP, COLON, MARKS = ".", ":", (",", ";", "|")


class Copying:
    """Changes rows of one text; a vocabulary without the marks that lists need has rows of the other kinds alone."""

    def __init__(self, tokens: Sequence[str], counts: np.ndarray, eos_id: int):
        """tokens: every token's spelling, by its id, with `##` before what goes on with a word. counts: (V,) how often
        it is in the text."""
        self.eos_id, share = eos_id, counts / max(1, counts.sum())
        self.inner = np.array([token.startswith("##") for token in tokens])
        number = np.array([token.isdecimal() for token in tokens]) & (counts > 0)
        word = np.array([token.removeprefix("##").isalpha() for token in tokens]) & (counts > 0)
        seldom = word & (share < SELDOM)
        begins = word & ~self.inner
        self.listed = number | (begins & seldom), number | (begins & (share < NOT_OFTEN))
        self.kind = np.select([number, seldom & self.inner, seldom], [3, 2, 1], 0)  # may stand for others of its kind
        self.of_kind = [np.flatnonzero(self.kind == kind) for kind in range(4)]
        self.ids = {mark: tokens.index(mark) for mark in (STOP, COLON, *MARKS) if mark in tokens}

    def __call__(self, row: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
        """Changes a row (L,) of ids in place, or leaves it; which of them are given and never masked, (L,), if any."""
        draw = rng.random()
        if draw < TWICE:
            self.say_twice(row, rng)
        elif draw < TWICE + LISTED and len(self.ids) == 2 + len(MARKS):
            return self.list_names(row, rng)
        elif draw < TWICE + LISTED + RENAMED:
            self.rename(row, rng)
        return None

    def say_twice(self, row: np.ndarray, rng: np.random.Generator) -> None:
        """Puts an [EOS] into the row, and behind it a stretch of what stands before, at any distance."""
        first = int(rng.integers(len(row) * 3 // 8, len(row) * 3 // 4))
        rest = len(row) - first - 1
        start = int(rng.integers(max(first - rest, 0) + 1))
        again = row[start : min(start + rest, first)].copy()
        row[first] = self.eos_id
        row[first + 1 : first + 1 + len(again)] = again

    def list_names(self, row: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
        """Puts before every one to three sentences most of their names and numbers, and in half of the rows their
        seldom words, with one mark between, and an [EOS] behind. Which tokens are lists, (L,), where these are given.
        """
        mark, colon = self.ids[str(rng.choice(MARKS))], self.ids[COLON]
        in_order, given, listed_ids = rng.random() < 0.5, rng.random() < GIVEN, self.listed[rng.integers(2)]
        out, is_list = list[int](), list[bool]()
        ends, begin = [*(np.flatnonzero(row == self.ids[STOP]) + 1).tolist(), len(row)], 0
        while ends and len(out) < len(row):
            count = int(rng.integers(1, 4))
            end = ends[:count][-1]
            ends, text, begin = ends[count:], row[begin:end], end
            word = np.cumsum(~self.inner[text])  # of each token, counted
            listed = np.isin(word, word[listed_ids[text]])
            edges = np.flatnonzero(np.diff(listed, prepend=False, append=False))
            names = list(dict.fromkeys(tuple(text[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2], strict=True)))
            kept = np.flatnonzero(rng.random(len(names)) >= LEFT_OUT)
            for i in kept if in_order else rng.permutation(kept):
                out += [*names[i], mark]
            if len(kept):
                out[-1] = colon
            is_list += [True] * (len(out) - len(is_list))
            out += [*text.tolist(), self.eos_id]
            is_list += [False] * (len(out) - len(is_list))
        row[:] = out[: len(row)]
        return np.array(is_list[: len(row)]) if given else None

    def rename(self, row: np.ndarray, rng: np.random.Generator) -> None:
        """Exchanges each name and number that the row has more than once for another, everywhere in it."""
        found, places, times = np.unique(row, return_inverse=True, return_counts=True)
        for i in np.flatnonzero((times > 1) & (self.kind[found] > 0)):
            found[i] = rng.choice(self.of_kind[self.kind[found[i]]])
        row[:] = found[places]

"""Pretraining rows that ask for copying: what becomes of them, and of how many."""

import numpy as np
import pytest

from tinyld.copying import GIVEN, LEFT_OUT, LISTED, MARKS, RENAMED, TWICE, Copying

NAMES = [f"name{chr(97 + i)}" for i in range(20)]
TOKENS = ["[EOS]", ".", ":", *MARKS, "the", "was", "7", "42", *NAMES, "##el", "##ix"]
COUNTS = np.array([50_000] * 8 + [40_000] * 2 + [5] * 22)
rng = np.random.default_rng
EOS, STOP, COLON, THE, SEVEN, NAME, PIECE = 0, 1, 2, 6, 8, 10, 30


@pytest.fixture
def copying() -> Copying:
    return Copying(TOKENS, COUNTS, EOS)


def test_words_are_told_from_names_pieces_and_numbers(copying: Copying) -> None:
    assert copying.kind.tolist() == [0] * 8 + [3] * 2 + [1] * 20 + [2] * 2
    for listed in copying.listed:
        assert listed.tolist() == [False] * 8 + [True] * 22 + [False] * 2, "pieces come with their word"


def test_so_many_rows_are_changed_in_each_way(copying: Copying, monkeypatch: pytest.MonkeyPatch) -> None:
    done = {"say_twice": 0, "list_names": 0, "rename": 0}
    for name in done:
        monkeypatch.setattr(copying, name, lambda *_, name=name: done.update({name: done[name] + 1}))
    n = 4_000
    for seed in range(n):
        copying(np.zeros(9, dtype=np.int64), rng(seed))
    shares = TWICE, LISTED, RENAMED
    for count, share in zip(done.values(), shares, strict=True):
        assert count / n == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5)
    copying.ids.pop("|")
    monkeypatch.setattr(copying, "list_names", None)
    for seed in range(100):
        copying(np.zeros(9, dtype=np.int64), rng(seed))  # without the marks no row is a list


@pytest.mark.parametrize("seed", range(20))
def test_a_stretch_is_said_again_behind_an_end(copying: Copying, seed: int) -> None:
    row = np.arange(100, 163)
    copying.say_twice(row, rng(seed))
    end = row.tolist().index(EOS)
    where = int(row[end + 1]) - 100
    again = row[end + 1 : end + 1 + min(end - where, len(row) - end - 1)]
    assert row[:end].tolist() == list(range(100, 100 + end)) and again.tolist() == row[where:][: len(again)].tolist()
    assert len(again) >= 8


def test_names_stand_before_their_sentences_and_an_end_behind(copying: Copying) -> None:
    a, b, c = NAME, NAME + 1, NAME + 2
    sentences = [[a, PIECE, 7, THE, b, a, PIECE, STOP], [THE, 7, THE, STOP], [c, 7, SEVEN, STOP]]
    names = [f"{a} {PIECE}", f"{b} {a} {PIECE}", f"{c}", f"{SEVEN}"]
    row, orders, given, told, wanted = np.array([*sum(sentences, []), *[THE] * 40]), set(), 0, 0, 0
    for seed in range(200):
        changed, said, is_list = row.copy(), list[str](), list[bool]()
        marked = copying.list_names(changed, rng(seed))
        for part in " ".join(map(str, changed)).split(f" {EOS} ")[:-1]:
            head, _, text = part.rpartition(f" {COLON} ")
            said += text.split()
            listed = len(part.split()) - len(text.split())
            is_list += [True] * listed + [False] * (len(text.split()) + 1)
            marks = {str(i) for i in range(3, THE)} & set(head.split())
            assert len(marks) <= 1, "one mark between"
            found = head.split(f" {min(marks, default=EOS)} ") if head else []
            of_text = [name for name in names if f" {name} " in f" {text} "]
            assert set(found) <= set(of_text) and len(set(found)) == len(found), "of the text alone, each once"
            orders.add(tuple(found))
            told, wanted = told + len(found), wanted + len(of_text)
        assert said == [str(i) for i in row[: len(said)]], "the text itself stays"
        if marked is not None:
            given += 1
            assert marked[: len(is_list)].tolist() == is_list
    assert {(), tuple(names[:2]), tuple(names)} <= orders, "of one sentence alone, or of several"
    assert tuple(names[1::-1]) in orders, "in another order than the text's"
    assert given / 200 == pytest.approx(GIVEN, abs=0.14), "four standard errors"
    assert 1 - told / wanted == pytest.approx(LEFT_OUT, abs=0.06), "four, of some 600 names"


def test_what_comes_again_becomes_another_of_its_kind_everywhere(copying: Copying) -> None:
    changed = 0
    for seed in range(200):
        before = rng(seed).integers(6, len(TOKENS), 20)
        row = before.copy()
        copying.rename(row, rng(seed + 1_000))
        again = np.array([(before == token).sum() > 1 for token in before])
        assert (copying.kind[row] == copying.kind[before]).all()
        assert (row == before)[~again | (copying.kind[before] == 0)].all(), "what comes once stays, and common words"
        same = before[:, None] == before[None, :]
        assert (row[:, None] == row[None, :])[same].all()
        changed += bool((row != before).any())
    assert changed > 190

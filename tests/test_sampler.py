"""Decoding: what every sampler keeps, how many tokens each pass writes, and a plain loop that must agree."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import padded, seeded
from torch import Tensor

from tinyld import sampler
from tinyld.config import SAMPLERS, THRESHOLDS, SampleConfig
from tinyld.errors import TinyldError
from tinyld.model import Denoiser
from tinyld.pointer import Copies
from tinyld.sampler import decode, repeating

MASK = 4
EOS = 3
FORBIDDEN = [0, 1, 2, 4]
DELETE = FORBIDDEN[0]
START = 3  # of a slot
Rows = tuple[Tensor, ...]  # (x, answer_mask, attention_mask)
rows = partial(padded, 50)


class Recording:
    """A denoiser that writes down how many positions are masked, by row, the t it is told, and how long rows are."""

    def __init__(self, inner: Any):
        self.inner, self.masked, self.t, self.lengths = inner, [], [], []

    def __call__(self, x: Tensor, t: Tensor, attention: Tensor | None, prompt: Tensor, where: Tensor) -> Tensor:
        self.masked.append(where.sum(1).tolist())
        self.t.append(t.tolist())
        self.lengths.append(x.shape[1] if attention is None else int(attention.sum(1).max()))
        assert (x[where] == MASK).all(), "positions asked for are masked ones"
        return self.inner(x, t, attention, prompt, where=where)

    @property
    def passes(self) -> list[int]:
        """Masked positions of the one row in each pass."""
        return [count for counts in self.masked for count in counts]


def giving(logits: Callable[[Tensor], Tensor]) -> Recording:
    """A denoiser whose logits (B, L, 8) are a function of the ids (B, L)."""
    return Recording(lambda x, *_, where: logits(x)[where])


def slot(width: int, count: int = 1) -> Rows:
    """Rows with a slot of that width from START on."""
    x = torch.full((count, START + width + 2), 5)
    place = torch.arange(x.shape[1])
    return x, ((place >= START) & (place < START + width)).expand_as(x), torch.ones_like(x, dtype=torch.bool)


def decoded(denoiser: Any, batch: Rows, eos_id: int | None = None, **given: Any) -> tuple[Tensor, Tensor]:
    """`given` are fields of SampleConfig and further arguments of decode."""
    told = {name: given.pop(name) for name in ("watch", "is_label", "delete", "mender") if name in given}
    return decode(denoiser, *batch, MASK, FORBIDDEN, SampleConfig(**given), eos_id=eos_id, **told)


def wanting(x: Tensor, *tokens: tuple[int, float], vocabulary: int = 13) -> Tensor:
    """Logits (B, L, V) of this token at each place from START on, and of how sure, and of all else 0."""
    found = torch.zeros(*x.shape, vocabulary)
    for i, (token, high) in enumerate(tokens):
        found[:, START + i, token] = high
    return found


class Pointing(Recording):
    """It is sure of nothing; a pointer that looks again, of the position behind what is written."""

    def look(self, x: Tensor, *told: Any, where: Tensor) -> tuple[Tensor, Any]:
        def copies(x: Tensor) -> Copies:
            """Of a token that may not be written, and of one that may."""
            here = torch.cat([x[:, :1] == MASK, x[:, :-1] != MASK], 1)[where] * self.inner / (1 - self.inner)
            return Copies(here[:, None] * torch.tensor([[2.0, 1.0]]), torch.tensor([[MASK, 7]]).expand(len(here), 2))

        return self(x, *told, where=where), copies

    def __call__(self, x: Tensor, *told: Any, where: Tensor) -> Tensor:
        self.masked.append(where.sum(1).tolist())
        return torch.eye(8)[7].expand(int(where.sum()), 8) - 0.1 * where.nonzero()[:, 1:]


@pytest.mark.parametrize(
    ("sure", "given", "passes"),
    [
        (0.99, {}, 1), (0.92, {}, 1), (0.85, {}, 6), (0.85, {"threshold": 0.8}, 1), (0.99, {"block": 3}, 6),
        (0.99, {"sampler": "low_confidence"}, 6), (0.92, {"temperature": 0.001}, 1),
    ],
)  # fmt: skip
def test_a_pointer_looks_again_after_a_pass_and_what_it_is_sure_of_is_written(
    sure: float, given: Any, passes: int
) -> None:
    denoiser = Pointing(sure)
    out, used = decoded(denoiser, batch := slot(6, 2), **given)
    assert (out[batch[1]] == 7).all() and used.tolist() == [passes] * 2 and len(denoiser.masked) == passes


CONFIGS: list[dict[str, Any]] = [
    *({"sampler": "low_confidence"} | given for given in ({}, {"steps": 3}, {"steps": 4, "temperature": 1.5})),
    *({"threshold": 1.0} | given for given in ({}, {"steps": 2}, {"threshold": 0.3}, {"temperature": 1.0})),
    {"sampler": "klass", "threshold": 0.05, "kl": 1.0},
    {"sampler": "entropy", "threshold": 4.0},
    *({"sampler": "ancestral"} | given for given in ({}, {"steps": 3, "temperature": 1.0}, {"steps": 40})),
    *({"sampler": "revise"} | given for given in ({}, {"steps": 3, "temperature": 1.0}, {"steps": 40})),
]


@pytest.mark.parametrize("given", CONFIGS[:9], ids=str)
def test_blocks_are_written_one_after_another(lively: Denoiser, given: dict[str, Any]) -> None:
    batch, masks = rows(2, 9, 12, 1), []
    answer_mask = batch[1]
    decoded(lively, batch, **given, block=3, watch=lambda x, share: masks.append((x == MASK) & answer_mask))
    nth = ((answer_mask.cumsum(1) - 1) // 3).masked_fill(~answer_mask, -1)
    for before, after in zip(masks, masks[1:], strict=False):
        written = before & ~after
        for row in range(4):
            begun, left = nth[row][written[row]], nth[row][after[row]]
            assert not len(begun) or not len(left) or begun.max() <= left.min() or given.get("steps"), given
    assert len(masks) > 4 or given.get("steps")


@pytest.mark.parametrize("given", CONFIGS, ids=str)
def test_every_slot_is_filled_unseen_and_nothing_else_is_touched(lively: Denoiser, given: dict[str, Any]) -> None:
    x, answer_mask, attention_mask = batch = rows(5, 1, 8, 3)
    with torch.no_grad():
        lively.output_bias[FORBIDDEN] = 50.0  # what the denoiser wants most is what it may not write
    before = x.clone()
    out, passes = decoded(lively, batch, **given)
    assert torch.equal(x, before), "the input is not changed in place"
    assert torch.equal(out[~answer_mask], x[~answer_mask])
    assert not torch.isin(out[answer_mask], torch.tensor(FORBIDDEN)).any()
    most = given.get("steps", 32 if given.get("sampler") == "revise" else 8)
    assert (1 <= passes).all() and (passes <= most).all()
    other = torch.where(answer_mask, 5, x), answer_mask, attention_mask
    assert torch.equal(decoded(lively, other, **given)[0], out), "what stood in the slots is never seen"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_seed_decides_what_is_drawn(lively: Denoiser, sampler: str) -> None:
    batch = rows(8, 8, 8)
    outs = [decoded(lively, batch, sampler=sampler, temperature=2.0, seed=seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_revise_writes_in_a_quarter_of_its_passes_and_then_an_eighth_anew_in_each() -> None:
    """Of a denoiser that wants one token in its first two passes, and another one since."""
    batch = rows(16, 13)
    wants = giving(lambda x: 9.0 * torch.eye(40)[5 + max(0, len(wants.masked) - 2)].expand(*x.shape, 40))
    out, passes = decoded(wants, batch, sampler="revise", steps=8)
    assert passes.tolist() == [8, 8] and wants.masked[0] == [16, 13]
    assert wants.masked[2:] == [[2, 1], *[[2, 2]] * 5], "every eighth token, which is the eighth one first"
    assert wants.t[2] == pytest.approx([2 / 16, 1 / 13]) and torch.equal(out[~batch[1]], batch[0][~batch[1]])
    assert [(row[slots] > 5).sum().item() for row, slots in zip(out, batch[1], strict=True)] == [12, 11]


def test_repeating_names_each_token_that_would_make_a_run_which_its_text_has() -> None:
    generator = seeded()
    x, inside, masked = torch.randint(5, 7, (6, 24), generator=generator), rows(20, 20, 3, 12, 9, 20)[1], None
    x, inside = x[:, : inside.shape[1]], inside[:, : x.shape[1]]
    masked = inside & (torch.rand(inside.shape, generator=generator) < 0.2)
    expected = set()
    for n, (row, at) in enumerate(masked.nonzero().tolist()):
        known = [int(i) if ok else None for i, ok in zip(x[row], inside[row] & ~masked[row], strict=True)]
        runs = [known[i : i + 4] for i in range(len(known) - 3)]
        for token in (5, 6):
            told = [*known[:at], token, *known[at + 1 :]]
            own = [told[i : i + 4] for i in range(max(0, at - 3), min(at, len(told) - 4) + 1)]
            if any(run in runs for run in own if None not in run):
                expected.add((n, token))
    found = set(zip(*(part.tolist() for part in repeating(x, inside, masked)), strict=True))
    assert found == expected and 3 < len(expected) < 2 * int(masked.sum())


def test_revising_forbids_what_would_repeat_unless_nothing_is_left() -> None:
    eager = giving(lambda x: torch.tensor([0.0, 0, 0, 0, 0, 9, 8, 6]).expand(*x.shape, 8))
    batch = rows(12)
    once, anew = (decoded(eager, batch, sampler=how)[0][batch[1]] for how in ("ancestral", "revise"))
    assert once.unique().tolist() == [5] and len(anew.unique()) > 1 and MASK not in anew
    alone = giving(lambda x: torch.full((8,), -torch.inf).index_fill(0, torch.tensor(5), 9.0).expand(*x.shape, 8))
    assert torch.equal(decoded(alone, batch, sampler="revise")[0][batch[1]], once), "it cannot write anything else"


def one_by_one(model: Callable[[Tensor], Tensor], x: Tensor, places: list[int], steps: int, mask_id: int) -> Tensor:
    """Low-confidence decoding of one row without padding, written as a loop over tokens, as many a step as LLaDA's
    get_num_transfer_tokens: M // steps, and one more in the first M % steps."""
    x = x.clone()
    x[places] = mask_id
    masked, size = list(places), len(places)
    for step in range(min(steps, size)):
        logits = model(x[None])[0]
        best = {p: logits[p].softmax(-1).max(-1) for p in masked}
        keep = size // steps + (step < size % steps)
        for p in sorted(masked, key=lambda p: -float(best[p].values))[:keep]:
            x[p] = best[p].indices
            masked.remove(p)
    return x


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [1, 2, 3, 9])
@torch.no_grad()
def test_low_confidence_equals_a_plain_loop_over_tokens(lively: Denoiser, steps: int, seed: int) -> None:
    x, answer_mask, _ = batch = rows(7, seed=seed)
    recording = Recording(lively)
    found, passes = decoded(recording, batch, sampler="low_confidence", steps=steps)

    def allowed(x: Tensor) -> Tensor:
        return lively(x).index_fill(-1, torch.tensor(FORBIDDEN), -torch.inf)

    assert torch.equal(found[0], one_by_one(allowed, x[0], answer_mask[0].nonzero()[:, 0].tolist(), steps, MASK))
    assert passes == len(recording.passes) == min(steps, 7)
    assert [t[0] for t in recording.t] == pytest.approx([n / 7 for n in recording.passes])


SURE, OPEN = (0.8, 0.55, 0.9, 0.6), (0.5,) * 6  # 0.69 nats are open at each position of the second


@pytest.mark.parametrize(("likely", "given", "masked"), [
    (SURE, {"threshold": 0.95}, [4, 3, 2, 1]), (SURE, {"threshold": 0.7}, [4, 2, 1]),
    (SURE, {"threshold": 0.57}, [4, 1]), (SURE, {"threshold": 0.2}, [4]),
    (SURE, {"threshold": 1.0, "least": 3}, [4, 1]),
    *((SURE, {"threshold": 1.0, "steps": steps}, [4, 3, 2][:steps]) for steps in (1, 3)),
    (SURE, {"sampler": "ancestral", "steps": 1}, [4]),
    *((likely, {"sampler": "low_confidence", "steps": 4}, masked) for likely, masked in (
        (SURE, [4, 3, 2, 1]), (OPEN, [6, 4, 2, 1]), ((0.9,) * 9, [9, 6, 4, 2]),
    )),
    (OPEN, {"sampler": "entropy", "threshold": 0.5}, [6, 5, 4, 3, 2, 1]),
    (OPEN, {"sampler": "entropy", "threshold": 1.0}, [6, 4, 2]),  # one of those that are written does not count
    (OPEN, {"sampler": "entropy", "threshold": 1.5}, [6, 3]),
    (OPEN, {"sampler": "entropy", "threshold": 9.0}, [6]),
], ids=str)  # fmt: skip
def test_a_pass_writes_what_is_sure_enough_and_the_least_asked_for(likely: Any, given: Any, masked: list[int]) -> None:
    """Of two words one has these chances at the positions of the slot."""

    def logits(x: Tensor) -> Tensor:
        found = torch.full((*x.shape, 8), -30.0)
        found[:, START : START + len(likely), 6:] = torch.tensor([(1 - p, p) for p in likely]).log()
        return found

    recording = giving(logits)
    out, passes = decoded(recording, slot(len(likely)), **given)
    assert recording.passes == masked and passes == len(masked) and not (out == MASK).any()
    assert [t[0] for t in recording.t] == pytest.approx([n / len(likely) for n in masked]), "the share that is masked"


@pytest.mark.parametrize("name", ["low_confidence", *THRESHOLDS])
def test_what_no_other_token_rivals_is_written_before_what_is_likelier(name: str) -> None:
    """At the first position a token has 0.5 and another one nearly as much, so that less is open there than at the
    second, where one has 0.4 and each other 0.2."""
    first, seen = [0.5, 0.45, 0.03, 0.02], list[list[bool]]()

    def logits(x: Tensor) -> Tensor:
        seen.append((x[0, START : START + 2] == MASK).tolist())
        found = torch.full((*x.shape, 9), -30.0)
        found[:, START : START + 2, 5:] = torch.tensor([first, [0.4, 0.2, 0.2, 0.2]]).log()
        return found

    decoded(giving(logits), slot(2), sampler=name, threshold=1e-3 if name == "entropy" else 1.0)
    assert seen[1] == ([True, False] if name in ("threshold", "klass") else [False, True])


def test_klass_waits_until_a_distribution_has_settled() -> None:
    """The last position is sure, each time of another word; the first pass has none before it to compare with."""
    batch = rows(5)
    last = int(batch[1][0].nonzero()[-1])

    def logits(x: Tensor) -> Tensor:
        found = torch.zeros(*x.shape, 8)
        found[..., 6] = 9.0
        found[:, last, 5:] = torch.tensor([0.0, 7.0, 0.0] if len(recording.masked) % 2 else [0.0, 0.0, 7.0])
        return found

    settled = {"sampler": "klass", "kl": 99.0}  # however far they moved
    for given, masked in (({"sampler": "klass"}, [5, 4, 1]), ({}, [5]), (settled, [5, 4])):
        recording = giving(logits)
        decoded(recording, batch, threshold=0.5, **given)
        assert recording.passes == masked


def test_ancestral_leaves_as_much_masked_as_t_says() -> None:
    recording = giving(lambda x: torch.zeros(*x.shape, 8))
    steps, width, n = 4, 36, 400
    out, _ = decoded(recording, rows(*[width] * n), sampler="ancestral", steps=steps)
    assert len(recording.masked) == steps and not (out == MASK).any()
    for step, counts in enumerate(recording.masked):
        assert sum(counts) / (n * width) == pytest.approx(1 - step / steps, abs=4 * (0.25 / (n * width)) ** 0.5)


def test_rows_that_are_done_leave_the_batch(lively: Denoiser) -> None:
    recording, batch = Recording(lively), rows(1, 3, 2)
    _, passes = decoded(recording, batch, sampler="low_confidence")
    assert recording.masked == [[1, 3, 2], [2, 1], [1]] and passes.tolist() == [1, 3, 2]
    x, answer_mask, attention_mask = batch
    out, passes = decoded(lively, (x, torch.zeros_like(answer_mask), attention_mask))
    assert torch.equal(out, x) and not passes.any(), "rows without a slot come back as they are"


def hazards(table: dict[int, float]) -> Callable[[Tensor], Tensor]:
    """Logits that end a text at slot position j with chance table[j], given that it comes so far, and else write
    token 6."""

    def logits(x: Tensor) -> Tensor:
        found = torch.full((*x.shape, 8), -30.0)
        found[..., 6] = 0.0
        for j, chance in table.items():
            if START + j < x.shape[1]:
                found[:, START + j, EOS] = torch.tensor(chance / (1 - chance)).log()
        return found

    return logits


WANTED = [5, 6, 7, 8, 9, 10, 11, 12]


def fitting(likely: int) -> Callable[[Tensor], Tensor]:
    """Logits of a text WANTED, likely of another length, whose gaps are filled from the left, with deletes where they
    are too long. These are surest."""

    def logits(x: Tensor) -> Tensor:
        found = torch.full((*x.shape, 13), -30.0)
        for row, ids in enumerate(x.tolist()):
            text = ids[START : ids.index(EOS)] if EOS in ids else ids[START:-2]
            if EOS not in ids:
                found[row, START + likely, EOS] = 4.0  # likely, not sure
            last, need = 4, list[int]()
            for i, token in enumerate(text):
                if token != MASK:
                    last = token
                    continue
                if i == 0 or text[i - 1] != MASK:
                    need = list(range(last + 1, next((t for t in text[i:] if t != MASK), 13)))
                token = need.pop(0) if need else DELETE
                found[row, START + i, token] = 3.0 + 0.1 * (token % 3) if token != DELETE else 9.0
        return found

    return logits


@pytest.mark.parametrize("sampler", ["low_confidence", "threshold", "klass", "entropy"])
@pytest.mark.parametrize("length", [8, 9, 11, 12])
def test_a_text_becomes_as_short_as_it_has_to_be(sampler: str, length: int) -> None:
    x, answer_mask, attention_mask = batch = slot(12, 2)
    seen = list[Tensor]()

    def written(x: Tensor, t: Tensor, attention: Tensor, prompt: Tensor, where: Tensor) -> Tensor:
        attended = answer_mask[:1] if attention is None else attention & answer_mask[:1]
        text = (attended & (x != EOS)).sum(1)
        assert not seen or (attended.sum(1) == (text + 1).clamp(max=12)).all(), "its [EOS] is seen"
        return fitting(length)(x)[where]

    given = {"sampler": sampler, "watch": lambda x, share: seen.append(x.clone())}
    out, passes = decoded(Recording(written), batch, EOS, **given, delete=DELETE)
    assert out[answer_mask].view(2, 12).tolist() == [[*WANTED, *[EOS] * 4]] * 2
    assert torch.equal(out[~answer_mask], x[~answer_mask]) and (passes <= 14).all()
    assert not any((x == DELETE).any() for x in seen), "they are carried out at once"
    out, _ = decoded(giving(fitting(length)), batch, EOS, **given)
    assert int((out[0] == EOS).sum()) == 12 - length, "who was not taught it keeps to its length"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("given", [
    {"sampler": "low_confidence"}, {"sampler": "low_confidence", "steps": 3}, {"steps": 2}, {"threshold": 0.3},
    {"sampler": "klass", "threshold": 0.05, "kl": 0.5}, {"sampler": "entropy", "threshold": 4.0},
], ids=str)  # fmt: skip
def test_rows_decoded_together_equal_rows_decoded_alone(lively: Denoiser, given: Any, ends: bool, seed: int) -> None:
    """Rows that finish early leave the batch, or become shorter; padding and neighbours change nothing."""
    batch, given = rows(2, 7, 1, 9, seed=seed), given | ({"eos_id": EOS, "delete": DELETE} if ends else {})
    with torch.no_grad():
        lively.output_bias[[DELETE, EOS]] += torch.tensor([5.0, 2.0])
    together, passes = decoded(lively, batch, **given)
    for row in range(4):
        part = slice(row, row + 1), slice(0, int(batch[2][row].sum()))
        alone, own = decoded(lively, tuple(of[part] for of in batch), **given)
        assert torch.equal(together[part], alone) and passes[row] == own[0]


@pytest.mark.parametrize("given", [*({"sampler": name} for name in SAMPLERS), *({"steps": n} for n in (1, 2, 5))])
def test_deletes_anywhere_leave_a_text_and_its_ends(lively: Denoiser, given: dict[str, Any]) -> None:
    def often(x: Tensor, *told: Any, where: Tensor) -> Tensor:
        found = lively(x, *told, where=where)
        found[torch.rand(len(found), generator=drawn) < 0.3, DELETE] += 30.0
        return found

    drawn, batch = seeded(), rows(9, 14, 5, 2, 11)
    out, passes = decoded(often, batch, EOS, **given, delete=DELETE)
    assert torch.equal(out[~batch[1]], batch[0][~batch[1]]) and (passes <= given.get("steps", 32)).all()
    assert not torch.isin(out[batch[1]], torch.tensor(FORBIDDEN)).any()
    ended = (out == EOS) & batch[1]
    assert (ended.cumsum(1)[batch[1]] == 0).logical_or(ended[batch[1]]).all()


@pytest.mark.parametrize(("logit", "written"), [(3.0, [5, 7, EOS, EOS]), (6.0, [5, 7, 7, EOS])])
def test_a_token_beside_its_like_is_one_too_many_unless_it_is_sure(logit: float, written: list[int]) -> None:
    """5 stands before the text. Who was not taught it keeps to its length."""
    denoiser, batch = giving(lambda x: wanting(x, (5, 3.0), (7, 9.0), (7, logit), (EOS, 9.0))), slot(4)
    for delete, expected in ((DELETE, written), (None, [5, 7, 7, EOS])):
        out, _ = decoded(denoiser, batch, EOS, threshold=1.0, delete=delete)
        assert out[batch[1]].tolist() == expected


@pytest.mark.parametrize("sampler", ["low_confidence", "threshold", "klass", "entropy"])
def test_a_token_beside_its_like_waits_until_all_others_are_written(sampler: str) -> None:
    """It is likelier than the one behind it, and another token once that is there."""

    def logits(x: Tensor) -> Tensor:
        return wanting(x, (6, 9.0), (7 if x[0, START + 2] == 8 else 6, 4.0), (8, 3.0), (EOS, 9.0))

    out, _ = decoded(giving(logits), batch := slot(4), EOS, sampler=sampler, delete=DELETE)
    assert out[batch[1]].tolist() == [6, 7, 8, EOS]


def test_klass_compares_a_token_with_itself_when_the_text_has_become_shorter() -> None:
    """Behind a delete nothing moves but the places: once they are up, all that is left has settled."""

    def logits(x: Tensor) -> Tensor:
        text = [(DELETE, 9.0), (6, 5.0), (7, 5.0), (8, 5.0), (9, 5.0)][max(0, int((x[0] == EOS).sum()) - 1) :]
        return wanting(x, *text, *[(0, 0.0)] * (5 - len(text)), (EOS, 9.0))

    out, passes = decoded(giving(logits), batch := slot(6), EOS, sampler="klass", threshold=0.5, delete=DELETE)
    assert out[batch[1]].tolist() == [6, 7, 8, 9, EOS, EOS] and passes.tolist() == [3]


LENGTHS = [  # hazards, the median length, the likeliest
    ({1: 0.92, 3: 0.99}, 1, 1),  # [EOS] is likelier at 3 than at 1, but a text seldom comes to 3
    ({0: 0.3, 1: 0.2, 2: 0.2, 3: 0.9}, 2, 3),  # the likeliest length is 3, at 0.40; the median, passed at 0.55, is 2
    ({j: 0.1 for j in range(6)}, 6, 6),  # most texts fill the slot
    ({0: 0.6}, 0, 0),
]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("table", "length", "likeliest"), LENGTHS)
def test_the_first_pass_takes_the_median_length_and_of_a_label_the_likeliest(
    sampler: str, table: Any, length: int, likeliest: int
) -> None:
    """The chance of a length is the hazard there times that of coming so far."""
    batch = slot(6)
    recording = giving(hazards(table))
    out, _ = decoded(recording, batch, EOS, sampler=sampler)
    text = out[batch[1]]
    assert (text == EOS).tolist() == [False] * length + [True] * (6 - length)
    assert sampler == "revise" or (text[:length] == 6).all()
    assert all(count <= length for count in recording.passes[1:])
    out, _ = decoded(giving(hazards(table)), batch, EOS, sampler=sampler, is_label=True)
    assert int((out[batch[1]] != EOS).sum()) == likeliest


def sure_of(lengths: dict[int, float]) -> Callable[[Tensor], Tensor]:
    """Logits of texts that have 2 to 4 tokens, each as likely, and are as sure of a token as their length says."""

    def logits(x: Tensor) -> Tensor:
        found = hazards({2: 1 / 3, 3: 0.5, 4: 1 - 1e-6})(x)
        for row in range(len(x)):
            length = int((x[row] == EOS).float().argmax()) - START
            if length in lengths:
                found[row, :, 7] = torch.tensor((1 - lengths[length]) / lengths[length]).log()
        return found

    return logits


def test_of_several_lengths_the_likeliest_text_is_taken() -> None:
    batch = slot(6)

    def length(lengths: int, sure: dict[int, float]) -> int:
        out, _ = decoded(giving(sure_of(sure)), batch, EOS, lengths=lengths, threshold=1.0)
        return int((out[batch[1]] == 6).sum())

    assert length(1, {2: 0.9, 3: 0.6, 4: 0.7}) == 3, "the median"
    assert length(2, {2: 0.7, 3: 0.6, 4: 0.9}) == 2 and length(3, {2: 0.7, 3: 0.6, 4: 0.9}) == 4
    assert length(3, {2: 0.6, 3: 0.7, 4: 0.6}) == 3
    _, passes = decoded(giving(sure_of({2: 0.9, 3: 0.6, 4: 0.7})), batch, EOS, lengths=3, threshold=1.0)
    assert passes == 1 + 3 + 2 + 4, "the first pass is one for all lengths"


@pytest.mark.parametrize(("wanted", "lengths", "written"), [
    (1, 1, 1),  # the median lacks nothing
    (9, 1, 2),  # what lacks less is taken, too
    (2, 3, 2),  # of several lengths, one that lacks nothing before all others
])  # fmt: skip
def test_a_text_that_lacks_something_is_mended_and_written_longer(wanted: int, lengths: int, written: int) -> None:
    """More than 0.5 of the texts are longer than 0 tokens, 0.3 than 1; a text lacks words that are as many as tokens
    `wanted` of it."""
    batch, recording = slot(6, 2), giving(hazards({1: 0.6, 2: 0.3, 3: 0.6, 5: 0.9}))

    class Mender:
        mended = list[bool]()

        def lacking(self, x: Tensor) -> list[int]:
            return [max(0, wanted - int((row == 6).sum())) if i == 0 else 0 for i, row in enumerate(x)]

        def mend(self, x: Tensor, clauses: bool) -> tuple[Tensor, Tensor]:
            self.mended.append(clauses)
            return x, torch.tensor([7, 0])

    out, passes = decoded(recording, batch, EOS, threshold=1.0, lengths=lengths, mender=Mender())
    assert int((out[0] == 6).sum()) == written
    assert (passes[0] > passes[1] + 14) == (lengths == 1 < written), "only what lacks something is written again"
    assert passes[0] >= passes[1] + 14 and Mender.mended == [False, True], "it is mended before and behind that"
    _, once = decoded(recording, batch, EOS, temperature=0.7, mender=Mender())
    _, as_often = decoded(recording, batch, EOS, temperature=0.7)
    assert once.tolist() == as_often.tolist(), "what is drawn is drawn once"


@pytest.mark.parametrize("sampler", ["threshold", "low_confidence", "klass", "entropy"])
def test_a_token_is_written_in_the_knowledge_of_where_its_text_ends(sampler: str) -> None:
    """Two texts of one token, 6 and 7, are together likelier than [5, 6], which is likelier than either."""

    def logits(x: Tensor) -> Tensor:
        share = torch.full((*x.shape, 8), 1e-6)
        is_one = x[:, START + 1] == EOS
        one, more = torch.tensor([0.0, 0.55, 0.45]), torch.tensor([0.4, 0.3, 0.3])
        share[:, START, 5:] = torch.where(is_one[:, None], one, more)
        share[:, START + 1, [EOS, 6]] = torch.tensor([0.6, 0.4])
        share[:, START + 2, EOS] = 1.0
        return share.log()

    out, passes = decoded(giving(logits), slot(3), EOS, sampler=sampler)
    assert out[0, START : START + 2].tolist() == [6, EOS] and passes == 2


SEVERAL = {"lengths": 3, "threshold": 1.0}


@pytest.mark.parametrize(("table", "given", "written", "passes"), [
    ({3: 0.97}, {}, 3, 1),  # what is sure is written with the length if that is sure
    ({3: 0.7}, {}, 3, 2),
    ({0: 0.6, 3: 0.99}, SEVERAL, 0, 1),  # an empty text is taken where most are
    ({0: 0.4, 3: 0.99}, SEVERAL, 3, 2),  # and else never; of a length twice one is written
])  # fmt: skip
def test_a_sure_length_and_an_empty_text_take_one_pass(table: Any, given: Any, written: int, passes: int) -> None:
    batch = slot(6)
    out, found = decoded(giving(hazards(table)), batch, EOS, **given)
    assert (int((out[batch[1]] == 6).sum()), int(found)) == (written, passes)


def test_a_text_never_ends_before_its_end_and_the_place_behind_that_leaves_the_row() -> None:
    """A denoiser that wants to stop after every word, once a word is written."""
    batch = slot(8)

    def logits(x: Tensor) -> Tensor:
        found = hazards({4: 0.9})(x)
        found[..., 7] = -2.0  # so that a pass is sure of one word alone, the one it has to write
        found[(x == 6).any(1)] = torch.tensor([0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 1.0, 0.0])
        return found

    recording = giving(logits)
    out, _ = decoded(recording, batch, EOS, threshold=1.0)
    assert out[batch[1]].tolist() == [6, 6, 6, 6, *[EOS] * 4]
    assert recording.lengths[0] - recording.lengths[1] == 3


@pytest.mark.parametrize("table", [{0: 0.3, 2: 0.5}, {1: 0.2, 3: 0.9}])
def test_lengths_are_drawn_as_often_as_the_hazards_say(table: dict[int, float]) -> None:
    n, width = 2_000, 5
    batch = slot(width, n)
    out, _ = decoded(giving(hazards(table)), batch, EOS, sampler="ancestral", steps=6, temperature=1.0)
    found = (out[batch[1]].view(n, width) != EOS).sum(1)
    left, expected = 1.0, []
    for j in range(width):
        expected.append(left * table.get(j, 0.0))
        left *= 1 - table.get(j, 0.0)
    for j, chance in enumerate([*expected, left]):
        share = float((found == j).float().mean())
        assert share == pytest.approx(chance, abs=4.5 * (0.25 / n) ** 0.5), (j, share, chance)


@pytest.mark.parametrize("given", [{}, {"sampler": "entropy"}, {"temperature": 0.7}, {"sampler": "klass"}])
def test_what_is_written_is_the_same_in_parts_as_at_once(
    lively: Denoiser, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = rows(9, 14, 5)
    whole = decoded(lively, batch, EOS, **given)
    monkeypatch.setattr(sampler, "CACHED", 7 * lively.config.vocab_size)
    assert all(map(torch.equal, decoded(lively, batch, EOS, **given), whole))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_an_error(name: str, temperature: float, value: float) -> None:
    """In a later pass, too: here once a token is written."""

    def logits(x: Tensor) -> Tensor:
        found = torch.zeros(*x.shape, 8)
        found[(x == MASK).sum(1) < 4] = value
        return found

    with pytest.raises(TinyldError, match="not finite"):
        decoded(giving(logits), slot(4), sampler=name, temperature=temperature, steps=4, threshold=1.0)

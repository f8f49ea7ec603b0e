"""Noising and the NLL bound, each against a value that is known without them."""

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import padded, seeded
from torch import Tensor

from tinyld import diffusion
from tinyld.data import Batch
from tinyld.diffusion import mask_counted, noise_answers, noise_counted, noise_text, row_nll, sample_t, token_nll

MASK = 4
EOS = 3


def random_batch(rows: int, seed: int, most: int = 5) -> Batch:
    """Prompts with answers of at most so many tokens."""
    widths = random.Random(seed).choices(range(1, most + 1), k=rows)
    return Batch(*padded(50, *widths, seed=seed), torch.arange(rows))


def whole(x0: Tensor) -> Batch:
    """Rows of which all may be masked."""
    ones = torch.ones_like(x0, dtype=torch.bool)
    return Batch(x0, ones, ones, torch.arange(len(x0)))


class Fake:
    """A denoiser whose NLL at each position is a function of the mask pattern: -log p needs no network to be known."""

    device = torch.device("cpu")

    def one_pass(self, xt: Tensor, *told: Any) -> tuple[Tensor, None]:
        return self.cost(xt == MASK)[told[-1]][..., None], None  # where it is asked

    def nll(self, h: Tensor, target: Tensor) -> Tensor:
        return h[:, 0]

    def cost(self, masked: Tensor) -> Tensor:
        """(B, L) bool -> (B, L) nats: dearer further right, and the more is masked."""
        position = torch.arange(masked.shape[1])[None, :]
        return 1.0 + 0.1 * position + 0.2 * masked.sum(1, keepdim=True).float() ** 1.5


@pytest.mark.parametrize("seed", range(10))
def test_prompt_and_padding_are_never_masked(seed: int) -> None:
    batch = random_batch(12, seed)
    prompt_mask = batch.attention_mask & ~batch.answer_mask
    counted, (text,) = noise_counted(batch, MASK, seeded(seed)), noise_text(batch, MASK, seeded(seed))
    assert torch.equal(counted.prompt_mask, prompt_mask)
    assert (text.prompt_mask >= prompt_mask.repeat(2, 1)).all(), "the clean prefix of a view counts as a prompt"
    for noised, views in ((counted, 1), (text, 2)):
        x0, answer_mask = batch.x0.repeat(views, 1), batch.answer_mask.repeat(views, 1)
        assert not (noised.is_masked & ~answer_mask).any() and noised.is_masked.any()
        assert torch.equal(noised.xt, torch.where(noised.is_masked, MASK, x0))


def test_pretraining_masks_every_token_behind_a_rows_prefix_in_one_of_its_two_views() -> None:
    """Rows with a prefix at uniform times, the others at bell-shaped ones."""
    n, length = 4_000, 200
    x0 = torch.randint(6, 90, (n, length), generator=seeded(1))
    (noised,) = noise_text(whole(x0), MASK, seeded(0))
    first, second = noised.is_masked.chunk(2)
    assert torch.equal(noised.x0, x0.repeat(2, 1)) and not (first & second).any()
    covered = first | second
    begins = length - covered.sum(1)
    assert torch.equal(covered, torch.arange(length)[None, :] >= begins[:, None]), "what is clean is a prefix"
    prefixed = begins > 0
    share = diffusion.PREFIXED * (1 - 1 / (diffusion.LONGEST_PREFIX * length))
    assert float(prefixed.float().mean()) == pytest.approx(share, abs=4 * (0.25 / n) ** 0.5)
    assert int(begins.max()) <= diffusion.LONGEST_PREFIX * length and float(begins[prefixed].float().mean()) > 75
    t = noised.t[:n]
    assert float(t[~prefixed].var()) == pytest.approx(1 / 20, rel=0.06), "and the spread of 200 draws"
    assert float(t[prefixed].var()) == pytest.approx(1 / 12, rel=0.06)


def slots(lengths: list[int], width: int) -> Batch:
    """Two tokens of prompt, then texts in slots, each with its [EOS]."""
    x0 = torch.full((len(lengths), 2 + width), EOS)
    answer_mask, tail_mask = torch.zeros(2, *x0.shape, dtype=torch.bool)
    answer_mask[:, 2:] = True
    x0[:, :2] = 7
    for row, length in enumerate(lengths):
        x0[row, 2 : 2 + length] = torch.arange(20, 20 + length)
        tail_mask[row, 2 + length :] = True
    return Batch(x0, answer_mask, torch.ones_like(answer_mask), torch.arange(len(x0)), tail_mask)


@pytest.mark.parametrize("seed", range(10))
def test_some_rows_of_a_task_are_asked_for_their_length_and_the_others_are_told(seed: int) -> None:
    asked, told = noise_answers(slots([0, 1, 3, 5, 6, 3, 2, 4], width=6), MASK, seeded(seed))
    assert len(asked.t) == diffusion.OPEN * 8 and len(told.t) == 6
    alone = [noise_answers(slots([5], 6), MASK, seeded(100 * seed + i))[0] for i in range(100)]
    assert sum(bool(part.is_masked[0, 7]) for part in alone) == pytest.approx(25, abs=17.5), "four standard deviations"
    assert (asked.xt[:, 2:] == MASK).all() and asked.attention_mask is None and (asked.t == 1).all()
    for row, scored in zip(asked.x0, asked.is_masked, strict=True):
        length = int((row >= 20).sum())
        assert scored.tolist() == [2 <= i <= 2 + length for i in range(8)], "the tokens and the [EOS]"
    assert told.x0.shape[1] == 2 + min(6, 1 + max(int((row >= 20).sum()) for row in told.x0))


DELETE = 0


@pytest.mark.parametrize("at_once", [1, 400])
@pytest.mark.parametrize(("share", "least", "most"), [(None, -1, 0), (diffusion.MISFIT, 0.02, 0.12), (1.0, 0.6, 1.0)])
def test_a_gap_that_is_too_long_says_so(
    at_once: int, share: float | None, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without what is to be deleted, what is shown is the text again and its [EOS], whether or not (None) there is an
    id that says so. Some texts have no short gap, or no room."""
    lengths, width, places = random.Random(0).choices(range(25), k=400), 24, list[list[int]]()
    monkeypatch.setattr(diffusion, "MISFIT", share)
    delete = None if share is None else DELETE
    for first in range(0, 400, at_once):
        batch = slots(lengths[first : first + at_once], width)
        if at_once > 1:  # a prompt behind the slot
            batch.x0[:, -1], batch.answer_mask[:, -1], batch.tail_mask[:, -1] = 9, False, False
        room = int(batch.answer_mask[0].sum())
        for part in noise_answers(batch, MASK, seeded(first), delete):
            if (part.is_masked & (part.x0 == EOS)).any():  # is asked for its length
                assert not (part.x0 == DELETE).any()
                continue
            attended = torch.ones_like(part.is_masked) if part.attention_mask is None else part.attention_mask
            for row, t in enumerate(part.t.tolist()):
                x0, masked = part.x0[row].tolist(), part.is_masked[row].tolist()
                assert x0[:2] == [7, 7] and part.prompt_mask[row].tolist() == [token in (7, 9) for token in x0]
                assert not any(masked[:2])
                assert torch.equal(part.xt[row] == MASK, part.is_masked[row])
                assert len(x0) <= 2 + room or (x0[-1] == 9 and attended[row, -1] and not masked[-1])
                shown = [i for i in range(2, min(len(x0), 2 + room)) if attended[row, i]]
                text = [x0[i] for i in shown if x0[i] != EOS]
                assert shown == list(range(2, 2 + len(shown))) and len(shown) - len(text) == (len(text) < room)
                assert t == pytest.approx(sum(masked) / max(1, len(text))) or (delete is None and not text)
                kept = [token for token in text if token != DELETE]
                assert kept == list(range(20, 20 + len(kept)))
                places.append([i - len(text) for i, token in enumerate(text) if token == DELETE and masked[2 + i]])
                assert len(places[-1]) == text.count(DELETE) <= 3
    some = [own for own in places if own]
    assert least < len(some) / len(places) <= most, "four standard deviations"
    assert all(own[-1] - own[0] == len(own) - 1 for own in some), "side by side"
    assert delete is None or {own[-1] == -1 for own in some} == {True, False}, "at the end, and not"


def test_answers_that_all_fill_their_slots_are_asked_for_no_length_and_one_token_is_always_masked() -> None:
    batch = random_batch(50, 0, most=1)
    (noised,) = noise_answers(batch, MASK, seeded(0))
    assert torch.equal(noised.is_masked, batch.answer_mask) and (noised.t == 1).all()


@pytest.mark.parametrize("seed", range(3))
def test_counted_noise_masks_exactly_the_ceiling_of_t_n(seed: int) -> None:
    """Drawn times, and every share k / n: 7 / 13 * 13 is above 7 in fp32."""
    rng = random.Random(seed)
    exact = [(k / n, n, k) for n in range(1, 25) for k in range(1, n + 1)]
    drawn = [(t, n, math.ceil(t * n)) for t, n in ((rng.uniform(1e-3, 1), rng.randint(1, 24)) for _ in range(200))]
    cases = [*exact, *drawn, (1e-9, 24, 1)]
    order = torch.rand(len(cases), 30, generator=seeded(seed)).argsort(1)
    maskable = order < torch.tensor([n for _, n, _ in cases])[:, None]
    times = torch.tensor([t for t, _, _ in cases])
    is_masked, ratio = mask_counted(times, maskable, seeded(seed))
    assert is_masked.sum(1).tolist() == [count for _, _, count in cases]
    assert ratio.tolist() == pytest.approx([count / n for _, n, count in cases])
    assert not (is_masked & ~maskable).any()


def test_counted_noise_chooses_every_set_of_positions_equally_often() -> None:
    is_masked, _ = mask_counted(torch.full((6000,), 0.5), torch.ones(6000, 4, dtype=torch.bool), seeded(0))
    counts = (is_masked.long() * torch.tensor([1, 2, 4, 8])).sum(1).bincount(minlength=16)
    pairs = [sum(1 << i for i in pair) for pair in itertools.combinations(range(4), 2)]
    assert int(counts[pairs].sum()) == 6000
    assert (counts[pairs] - 1000).abs().max() < 4 * math.sqrt(6000 * 5 / 36)


@pytest.mark.parametrize("bell", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_times_are_in_range_and_one_from_each_nth_of_the_distribution(bell: bool, n: int) -> None:
    for seed in range(20):
        t = sample_t(n, seeded(seed), bell)
        assert t.shape == (n,) and 0 <= float(t.min()) <= float(t.max()) <= 1.0
        u = t.double()
        if bell:
            u = 3 * u**2 - 2 * u**3  # the distribution function of Beta(2, 2)
        gaps = torch.sort(u).values.diff()
        torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / n), atol=1e-5, rtol=0)


def test_nothing_masked_is_no_division_by_zero() -> None:
    batch = random_batch(3, 0)
    noised = noise_counted(replace(batch, answer_mask=torch.zeros_like(batch.answer_mask)), MASK, seeded(0))
    nll, row = token_nll(Fake(), noised)
    assert len(nll) == len(row) == 0 and (noised.t == 1).all()


def exact_bound(denoiser: Fake, batches: list[Batch]) -> float:
    """The bound without sampling: E over k of n / k * NLL over every set of k of the n answer tokens."""
    nats = tokens = 0.0
    for answer in itertools.chain(*(batch.answer_mask for batch in batches)):
        positions = answer.nonzero()[:, 0].tolist()
        n = len(positions)
        tokens += n
        for k in range(1, n + 1):
            for chosen in itertools.combinations(positions, k):
                masked = torch.zeros(1, len(answer), dtype=torch.bool)
                masked[0, list(chosen)] = True
                nats += float(denoiser.cost(masked)[masked].sum()) / k / math.comb(n, k)
    return nats / tokens


def test_the_bound_is_the_one_computed_over_every_mask() -> None:
    some = [random_batch(120, 4), random_batch(60, 5)]
    tokens, exact = torch.cat([batch.answer_mask.sum(1) for batch in some]).float(), exact_bound(Fake(), some)

    def bound(draws: int, seed: int) -> diffusion.Estimate:
        nats = [row_nll(Fake(), batch, MASK, draws, seeded(seed)) for batch in some]
        return diffusion.ratio_estimate(torch.cat(nats), tokens)

    found = bound(100, 1)
    assert found.n == 180 and found.mean == pytest.approx(exact, rel=0.02)
    many = torch.tensor([bound(1, s).mean for s in range(40)])
    assert float(many.mean()) == pytest.approx(exact, abs=4 * float(many.std()) / math.sqrt(40))
    assert diffusion.ratio_estimate(torch.ones(1), torch.ones(1)).stderr is None, "nobody knows, of one row"


@pytest.mark.parametrize("seed", range(3))
def test_the_standard_error_is_the_spread_of_the_ratio_over_samples(seed: int) -> None:
    generator = seeded(seed)
    ratios, errors = [], []
    for _ in range(400):
        size = torch.randint(1, 6, (50,), generator=generator).float()
        sums = size * (2.0 + torch.randn(50, generator=generator))
        found = diffusion.ratio_estimate(sums, size)
        assert found.mean == pytest.approx(float(sums.sum() / size.sum()), rel=1e-5)
        ratios.append(found.mean)
        errors.append(found.stderr)
    assert float(torch.tensor(ratios).std()) == pytest.approx(sum(errors) / len(errors), rel=0.15)

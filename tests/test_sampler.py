"""Decoding: what every sampler keeps, how many tokens each pass writes, and a plain loop that must agree."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from tinyld.config import SAMPLERS, SampleConfig
from tinyld.model import Denoiser
from tinyld.sampler import decode
from tinyld.tokenizer import Tokenizer

MASK = 4
EOS = 3
FORBIDDEN = [0, 1, 2, 4]


class Recording:
    """A denoiser that writes down how many positions are masked, by row, and the t it is told."""

    def __init__(self, inner: Any):
        self.inner, self.masked, self.t = inner, [], []

    def __call__(self, x: Tensor, t: Tensor, attention: Tensor | None, prompt: Tensor, where: Tensor) -> Tensor:
        self.masked.append(where.sum(1).tolist())
        self.t.append(t.tolist())
        assert (x[where] == MASK).all(), "positions asked for are masked ones"
        return self.inner(x, t, attention, prompt, where=where)


@pytest.fixture()
def lively(model: Denoiser) -> Denoiser:
    """The tiny model with weights large enough to be confident in different degrees."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def rows(tokenizer: Tokenizer, widths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(x, answer_mask, attention_mask): a row per answer width, prompts and padding of random lengths."""
    rng = random.Random(seed)
    starts = [rng.randint(1, 6) for _ in widths]
    lengths = [s + w + rng.randint(1, 4) for s, w in zip(starts, widths, strict=True)]
    size = (len(widths), max(lengths))
    x = torch.randint(5, tokenizer.vocab_size, size, generator=torch.Generator().manual_seed(seed))
    answer_mask, attention_mask = torch.zeros(2, *size, dtype=torch.bool)
    for row, (start, width, length) in enumerate(zip(starts, widths, lengths, strict=True)):
        answer_mask[row, start : start + width] = True
        attention_mask[row, :length] = True
        x[row, length:] = 0
    return x, answer_mask, attention_mask


CONFIGS = [
    SampleConfig("low_confidence"),
    SampleConfig("low_confidence", steps=3),
    SampleConfig("low_confidence", steps=50),
    SampleConfig("low_confidence", steps=4, temperature=1.5),
    SampleConfig(sampler="threshold"),
    SampleConfig(sampler="threshold", threshold=0.05, temperature=1.0),
    SampleConfig(sampler="threshold", threshold=1.0, steps=2),
    SampleConfig(sampler="klass", threshold=0.05, kl=1.0),
    SampleConfig(sampler="entropy", threshold=4.0),
    SampleConfig(sampler="ancestral"),
    SampleConfig(sampler="ancestral", steps=3, temperature=1.0),
    SampleConfig(sampler="ancestral", steps=40, temperature=1.0),
]


def name_of(config: SampleConfig) -> str:
    return f"{config.sampler}-{config.steps}-{config.temperature}-{config.threshold}"


@pytest.mark.parametrize("sampling", CONFIGS, ids=name_of)
def test_every_slot_is_filled_and_nothing_else_is_touched(
    lively: Denoiser, tokenizer: Tokenizer, sampling: SampleConfig
) -> None:
    x, answer_mask, attention_mask = rows(tokenizer, [5, 1, 8, 3])
    with torch.no_grad():
        lively.output_bias[FORBIDDEN] = 50.0  # what the denoiser wants most is what it may not write
    before = x.clone()
    out, passes = decode(lively, x, answer_mask, attention_mask, MASK, FORBIDDEN, sampling)
    assert torch.equal(x, before), "the input is not changed in place"
    assert torch.equal(out[~answer_mask], x[~answer_mask])
    assert not torch.isin(out[answer_mask], torch.tensor(FORBIDDEN)).any()
    assert (1 <= passes).all() and (passes <= (sampling.steps or 8)).all()


@pytest.mark.parametrize("sampling", CONFIGS, ids=name_of)
def test_what_stood_in_the_slots_is_never_seen(lively: Denoiser, tokenizer: Tokenizer, sampling: SampleConfig) -> None:
    x, answer_mask, attention_mask = rows(tokenizer, [4, 6])
    other = torch.where(answer_mask, 5, x)
    first, second = (decode(lively, v, answer_mask, attention_mask, MASK, FORBIDDEN, sampling)[0] for v in (x, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_seed_decides_what_is_drawn(lively: Denoiser, tokenizer: Tokenizer, sampler: str) -> None:
    batch = rows(tokenizer, [8, 8, 8])
    outs = [
        decode(lively, *batch, MASK, FORBIDDEN, SampleConfig(sampler=sampler, temperature=2.0, seed=seed))[0]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 25])
@pytest.mark.parametrize("size", [1, 6, 10])
def test_low_confidence_writes_as_many_tokens_a_step_as_llada(
    lively: Denoiser, tokenizer: Tokenizer, size: int, steps: int
) -> None:
    """LLaDA's get_num_transfer_tokens: M // steps each step, one more in the first M % steps."""
    recording = Recording(lively)
    _, passes = decode(
        recording, *rows(tokenizer, [size]), MASK, FORBIDDEN, SampleConfig("low_confidence", steps=steps)
    )
    plan = [size // steps + (step < size % steps) for step in range(steps)]
    plan = [k for k in plan if k]
    left = [counts[0] for counts in recording.masked]
    assert [a - b for a, b in zip(left, [*left[1:], 0], strict=True)] == plan
    assert passes == len(plan)
    assert [t[0] for t in recording.t] == pytest.approx([n / size for n in left])


def reference(model: Denoiser, x: Tensor, places: list[int], steps: int) -> Tensor:
    """Low-confidence decoding of one row without padding, written as a loop over tokens."""
    x = x.clone()
    x[places] = MASK
    masked, size = list(places), len(places)
    for step in range(steps):
        if not masked:
            break
        logits = model(x[None])[0]
        logits[:, FORBIDDEN] = -torch.inf
        best = {p: logits[p].softmax(-1).max(-1) for p in masked}
        keep = size // steps + (step < size % steps)
        for p in sorted(masked, key=lambda p: -float(best[p].values))[:keep]:
            x[p] = best[p].indices
            masked.remove(p)
    return x


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [2, 3, 9])
@torch.no_grad()
def test_low_confidence_equals_a_plain_loop_over_tokens(
    lively: Denoiser, tokenizer: Tokenizer, steps: int, seed: int
) -> None:
    x, answer_mask, attention_mask = rows(tokenizer, [7], seed)
    found, _ = decode(
        lively, x, answer_mask, attention_mask, MASK, FORBIDDEN, SampleConfig("low_confidence", steps=steps)
    )
    expected = reference(lively, x[0], answer_mask[0].nonzero()[:, 0].tolist(), steps)
    assert torch.equal(found[0], expected)
    one_pass, _ = decode(
        lively, x, answer_mask, attention_mask, MASK, FORBIDDEN, SampleConfig("low_confidence", steps=1)
    )
    assert seed or not torch.equal(found, one_pass), "later passes read what earlier ones wrote"


PASSES = [
    (SampleConfig(sampler="threshold", threshold=1.0), [9, 8, 7, 6, 5, 4, 3, 2, 1]),
    (SampleConfig(sampler="threshold", threshold=1e-6), [9]),
    (SampleConfig(sampler="threshold", threshold=1.0, least=4), [9, 5, 1]),
    (SampleConfig(sampler="threshold", threshold=1.0, steps=3), [9, 8, 7]),
    (SampleConfig("low_confidence", steps=1), [9]),
    (SampleConfig(sampler="threshold", threshold=1.0, steps=1), [9]),
    (SampleConfig(sampler="ancestral", steps=1), [9]),
]


@pytest.mark.parametrize(
    ("sampling", "masked"), PASSES, ids=lambda v: name_of(v) if isinstance(v, SampleConfig) else ""
)
def test_a_sampler_makes_the_passes_that_its_settings_ask_for(
    lively: Denoiser, tokenizer: Tokenizer, sampling: SampleConfig, masked: list[int]
) -> None:
    recording = Recording(lively)
    out, passes = decode(recording, *rows(tokenizer, [9]), MASK, FORBIDDEN, sampling)
    assert not (out == MASK).any()
    assert [counts[0] for counts in recording.masked] == masked
    assert passes == len(masked)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_threshold_keeps_every_token_at_least_that_likely_and_one_at_least(
    lively: Denoiser, tokenizer: Tokenizer, threshold: float
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def denoiser(x: Tensor, *rest: Any, where: Tensor) -> Tensor:
        logits = 3.0 * lively(x, *rest, where=where)
        allowed = logits.clone()
        allowed[:, FORBIDDEN] = -torch.inf
        seen.append((where.nonzero()[:, 1], allowed.softmax(-1).max(-1).values))
        return logits

    decode(denoiser, *rows(tokenizer, [9]), MASK, FORBIDDEN, SampleConfig(sampler="threshold", threshold=threshold))
    kinds = set()
    for (places, confidence), (after, _) in zip(seen, [*seen[1:], (torch.zeros(0), torch.zeros(0))], strict=True):
        written = ~torch.isin(places, after)
        sure = confidence >= threshold
        expected = sure if sure.any() else confidence == confidence.max()
        assert torch.equal(written, expected)
        kinds.add(int(expected.sum()))
    assert len(seen) > 1 or len(kinds) == 1


def test_klass_waits_until_a_distribution_has_settled(tokenizer: Tokenizer) -> None:
    """The last position is sure, each time of another word; the first pass has none before it to compare with."""
    batch = rows(tokenizer, [5])
    last = int(batch[1][0].nonzero()[-1])

    def denoiser(x: Tensor, *rest: Any, where: Tensor) -> Tensor:
        logits = torch.zeros(*x.shape, 8)
        logits[..., 6] = 9.0
        logits[:, last, 5:] = torch.tensor([0.0, 7.0, 0.0] if len(recording.masked) % 2 else [0.0, 0.0, 7.0])
        return logits[where]

    for sampler, masked in (("klass", [5, 4, 1]), ("threshold", [5])):
        recording = Recording(denoiser)
        decode(recording, *batch, MASK, FORBIDDEN, SampleConfig(sampler, threshold=0.5))
        assert [counts[0] for counts in recording.masked] == masked
    recording = Recording(denoiser)
    decode(recording, *batch, MASK, FORBIDDEN, SampleConfig("klass", threshold=0.5, kl=99.0))
    assert [counts[0] for counts in recording.masked] == [5, 4], "however far they moved"


@pytest.mark.parametrize(("nats", "masked"), [(0.5, [6, 5, 4, 3, 2, 1]), (1.0, [6, 4, 2]), (1.5, [6, 3]), (9.0, [6])])
def test_entropy_leaves_as_many_nats_open_together_as_it_may(
    tokenizer: Tokenizer, nats: float, masked: list[int]
) -> None:
    """Two words to choose from at each position: 0.69 nats; one of those that are written does not count."""

    def denoiser(x: Tensor, *rest: Any, where: Tensor) -> Tensor:
        logits = torch.full((*x.shape, 8), -30.0)
        logits[..., 6:] = 0.0
        return logits[where]

    recording = Recording(denoiser)
    decode(recording, *rows(tokenizer, [6]), MASK, FORBIDDEN, SampleConfig("entropy", threshold=nats))
    assert [counts[0] for counts in recording.masked] == masked


def test_ancestral_leaves_as_much_masked_as_t_says(tokenizer: Tokenizer) -> None:
    recording = Recording(lambda x, t, attention, prompt, where: torch.zeros(int(where.sum()), 8))
    steps, width, n = 4, 36, 400
    config = SampleConfig(sampler="ancestral", steps=steps)
    out, _ = decode(recording, *rows(tokenizer, [width] * n), MASK, FORBIDDEN, config)
    assert len(recording.masked) == steps and not (out == MASK).any()
    for step, counts in enumerate(recording.masked):
        assert sum(counts) / (n * width) == pytest.approx(1 - step / steps, abs=4 * (0.25 / (n * width)) ** 0.5)


BATCHED = [
    SampleConfig("low_confidence"),
    SampleConfig("low_confidence", steps=3),
    SampleConfig(sampler="threshold", threshold=0.3),
    SampleConfig(sampler="threshold", threshold=1.0),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sampling", BATCHED, ids=name_of)
def test_rows_decoded_together_equal_rows_decoded_alone(
    lively: Denoiser, tokenizer: Tokenizer, sampling: SampleConfig, seed: int
) -> None:
    """Rows that finish early leave the batch; padding and neighbours change nothing."""
    x, answer_mask, attention_mask = rows(tokenizer, [2, 7, 1, 4], seed)
    together, _ = decode(lively, x, answer_mask, attention_mask, MASK, FORBIDDEN, sampling)
    for row in range(4):
        length = int(attention_mask[row].sum())
        part = slice(row, row + 1), slice(0, length)
        alone, _ = decode(lively, x[part], answer_mask[part], attention_mask[part], MASK, FORBIDDEN, sampling)
        assert torch.equal(together[part], alone)


def test_rows_that_are_done_leave_the_batch(lively: Denoiser, tokenizer: Tokenizer) -> None:
    recording = Recording(lively)
    _, passes = decode(recording, *rows(tokenizer, [1, 3, 2]), MASK, FORBIDDEN, SampleConfig("low_confidence"))
    assert recording.masked == [[1, 3, 2], [2, 1], [1]] and passes.tolist() == [1, 3, 2]


def test_rows_without_a_slot_come_back_as_they_are(lively: Denoiser, tokenizer: Tokenizer) -> None:
    x, answer_mask, attention_mask = rows(tokenizer, [2, 3])
    out, passes = decode(
        lively, x, torch.zeros_like(answer_mask), attention_mask, MASK, FORBIDDEN, SampleConfig("low_confidence")
    )
    assert torch.equal(out, x) and not passes.any()


def hazards(table: dict[int, float], start: int) -> Any:
    """A denoiser that ends a text at slot position j with chance table[j], given that it comes so far, and else writes
    token 6."""

    def denoiser(x: Tensor, *rest: Any, where: Tensor) -> Tensor:
        logits = torch.full((*x.shape, 8), -30.0)
        logits[..., 6] = 0.0
        for j, chance in table.items():
            if start + j < x.shape[1]:
                logits[:, start + j, EOS] = torch.tensor(chance / (1 - chance)).log()
        return logits[where]

    return denoiser


LENGTHS = [
    ({1: 0.92, 3: 0.99}, 1),  # [EOS] is likelier at 3 than at 1, but a text seldom comes to 3
    ({0: 0.3, 1: 0.2, 2: 0.2, 3: 0.9}, 2),  # the likeliest length is 3, at 0.40; the median, passed at 0.55, is 2
    ({j: 0.1 for j in range(6)}, 6),  # most texts fill the slot
    ({0: 0.6}, 0),
]


@pytest.mark.parametrize("sampler", ["low_confidence", "threshold", "entropy", "klass", "ancestral"])
@pytest.mark.parametrize(("table", "length"), LENGTHS)
def test_the_first_pass_takes_the_median_length(
    tokenizer: Tokenizer, sampler: str, table: dict[int, float], length: int
) -> None:
    """The chance of a length is the hazard there times that of coming so far."""
    batch = rows(tokenizer, [6])
    recording = Recording(hazards(table, int(batch[1][0].nonzero()[0])))
    out, _ = decode(recording, *batch, MASK, FORBIDDEN, SampleConfig(sampler), eos_id=EOS)
    assert out[batch[1]].tolist() == [6] * length + [EOS] * (6 - length)
    assert all(counts[0] <= length for counts in recording.masked[1:])


def test_what_is_sure_is_written_with_the_length_if_that_is_sure(tokenizer: Tokenizer) -> None:
    batch = rows(tokenizer, [6])
    for chance, passes in ((0.97, 1), (0.7, 2)):
        recording = Recording(hazards({3: chance}, int(batch[1][0].nonzero()[0])))
        _, found = decode(recording, *batch, MASK, FORBIDDEN, SampleConfig("threshold"), eos_id=EOS)
        assert found == passes


def test_a_text_never_ends_before_its_end(tokenizer: Tokenizer) -> None:
    """A denoiser that wants to stop after every word, once a word is written."""
    batch = rows(tokenizer, [5])
    start = int(batch[1][0].nonzero()[0])

    def denoiser(x: Tensor, *rest: Any, where: Tensor) -> Tensor:
        logits = hazards({4: 0.9}, start)(x, where=torch.ones_like(where)).view(*x.shape, 8)
        logits[(x == 6).any(1)] = torch.tensor([0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 1.0, 0.0])
        return logits[where]

    out, _ = decode(denoiser, *batch, MASK, FORBIDDEN, SampleConfig(threshold=1.0), eos_id=EOS)
    assert out[batch[1]].tolist() == [6, 6, 6, 6, EOS]


def test_the_place_behind_an_end_leaves_the_row(tokenizer: Tokenizer) -> None:
    x, answer_mask, attention_mask = rows(tokenizer, [8])
    denoiser = hazards({2: 0.95}, int(answer_mask[0].nonzero()[0]))
    lengths: list[int] = []

    def watching(x: Tensor, t: Tensor, attention: Tensor | None, prompt: Tensor, where: Tensor) -> Tensor:
        lengths.append(x.shape[1] if attention is None else int(attention.sum()))
        logits = denoiser(x, where=where)
        logits[:, 6] = logits[:, 7] = 0.0  # two tokens to choose from: neither is sure
        return logits

    decode(watching, x, answer_mask, attention_mask, MASK, FORBIDDEN, SampleConfig("threshold"), eos_id=EOS)
    assert lengths[0] - lengths[1] == 5


@pytest.mark.parametrize("table", [{0: 0.3, 2: 0.5}, {1: 0.2, 3: 0.9}])
def test_lengths_are_drawn_as_often_as_the_hazards_say(tokenizer: Tokenizer, table: dict[int, float]) -> None:
    n, width = 2_000, 5
    x = torch.full((n, width + 1), 5)
    answer_mask = torch.ones_like(x, dtype=torch.bool)
    answer_mask[:, 0] = False
    config = SampleConfig("ancestral", steps=6, temperature=1.0)
    real = torch.ones_like(answer_mask)
    out, _ = decode(hazards(table, 1), x, answer_mask, real, MASK, FORBIDDEN, config, eos_id=EOS)
    found = (out[:, 1:] != EOS).sum(1)
    left, expected = 1.0, []
    for j in range(width):
        expected.append(left * table.get(j, 0.0))
        left *= 1 - table.get(j, 0.0)
    for j, chance in enumerate([*expected, left]):
        share = float((found == j).float().mean())
        assert share == pytest.approx(chance, abs=4.5 * (0.25 / n) ** 0.5), (j, share, chance)

"""Compositions: invariants for every method, routers, the search for coefficients, interference."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_methods import attach, fresh_base, logits, noised_batch, train
from torch import Tensor

from tinyld.bench import InTurn
from tinyld.checkpoint import Base
from tinyld.compose import Composed, Member, load_composition, prototype_router, save_composition
from tinyld.config import ModelConfig
from tinyld.errors import TinyldError, UsageError
from tinyld.interference import effective_rank, principal_cosines
from tinyld.methods import METHODS
from tinyld.methods.bands import NUM_BANDS, band_of
from tinyld.methods.trajectory_lora import PushModule
from tinyld.methods.weight_lora import truncate
from tinyld.model import Denoiser
from tinyld.router import (
    NEAR,
    PrototypeRouter,
    TrainedRouter,
    answer_slot,
    prompt_features,
    train_router,
)
from tinyld.runs import RunFolder
from tinyld.search import BOUND, search_weights
from tinyld.spectrum import band_off, effective_ranks
from tinyld.statistics import paired_difference

COMBINED = ("full", "bitfit", "weight-lora", "weight-lora-rslora", "adapters", "best-1", "fast", "separate", "core")
each = pytest.mark.parametrize("case", COMBINED)


def base_of(model: Denoiser) -> Base:
    return Base(Path("base"), model, None, "fingerprint")  # type: ignore[arg-type]


def trained_member(config: ModelConfig, case: str, seed: int = 0) -> tuple[Member, Tensor]:
    """A member of its own training, and the logits that its adapter gives by itself."""
    model = fresh_base(config)
    method = attach(model, case, seed)
    train(model, method, updates=2 + seed)
    tensors = {n: p.detach().clone() for n, p in method.own.items()}
    return Member(f"run{seed}", "task", 1.0, method.name, method.config, tensors), logits(model, noised_batch(config))


def composed_logits(config: ModelConfig, *members: tuple[Member, float], how: str = "weights", **more: Any) -> Tensor:
    base = base_of(fresh_base(config))
    Composed([replace(m, weight=w) for m, w in members], how, **more).attach(base)
    return logits(base.model, noised_batch(config))


# ---------------------------------------------------------------------------------------------- invariants


@each
def test_one_member_at_weight_1_is_the_adapter(config: ModelConfig, case: str) -> None:
    member, alone = trained_member(config, case)
    torch.testing.assert_close(composed_logits(config, (member, 1.0)), alone, atol=1e-5, rtol=1e-5)


@each
def test_an_adapter_minus_itself_is_the_base(config: ModelConfig, case: str) -> None:
    member, alone = trained_member(config, case)
    base = logits(fresh_base(config), noised_batch(config))
    assert not torch.allclose(alone, base, atol=1e-3)
    found = composed_logits(config, (member, 1.0), (member, -1.0))
    torch.testing.assert_close(found, base, atol=1e-4, rtol=1e-4)


@each
def test_equal_adapters_average_to_themselves_and_order_does_not_matter(config: ModelConfig, case: str) -> None:
    (one, alone), (two, _) = (trained_member(config, case, seed) for seed in (0, 1))
    torch.testing.assert_close(composed_logits(config, (one, 0.5), (one, 0.5)), alone, atol=1e-4, rtol=1e-4)
    found = composed_logits(config, (one, 0.8), (two, -0.3))
    torch.testing.assert_close(composed_logits(config, (two, -0.3), (one, 0.8)), found, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, alone, atol=1e-3)


def test_adapters_that_push_at_unlike_places_add_up(config: ModelConfig) -> None:
    """Where only one has a place, only that one pushes: with the other's up-projections at zero it is alone."""
    (within, alone), (plain, other) = trained_member(config, "tied-within"), trained_member(config, "best-2", 1)
    silent = [
        replace(m, tensors={n: p * 0 if n.endswith("up") else p for n, p in m.tensors.items()}) for m in (within, plain)
    ]
    found = composed_logits(config, (within, 1.0), (silent[1], 1.0))
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    found = composed_logits(config, (plain, 1.0), (silent[0], 1.0))
    torch.testing.assert_close(found, other, atol=1e-5, rtol=1e-5)


@each
def test_a_saved_composition_gives_the_same_logits(config: ModelConfig, tmp_path: Path, case: str) -> None:
    members = [replace(trained_member(config, case, seed)[0], weight=0.5 + seed) for seed in (0, 1)]
    composed = Composed(members, "weights")
    expected = composed_logits(config, *((m, m.weight) for m in members))
    folder = RunFolder.create(tmp_path / "both")
    save_composition(folder, base_of(fresh_base(config)), composed, {})
    base = base_of(fresh_base(config))
    load_composition(RunFolder.open(tmp_path / "both"), base)
    assert torch.equal(logits(base.model, noised_batch(config)), expected)
    other = replace(base_of(fresh_base(config)), fingerprint="another")
    with pytest.raises(TinyldError, match="was made for base fingerprint, not another"):
        load_composition(folder, other)


@pytest.mark.parametrize("part", ["static", "members"])
def test_a_composition_that_asks_for_more_than_its_file_holds_is_refused(
    config: ModelConfig, tmp_path: Path, part: str
) -> None:
    folder = RunFolder.create(tmp_path / "both")
    member, _ = trained_member(config, "weight-lora" if part == "static" else "best-1")
    save_composition(folder, base_of(fresh_base(config)), Composed([member], "sum"), {})
    written = folder.config
    if part == "static":
        written["static"]["rank"] = 10**12
    else:
        written["members"][0]["method"]["ranks"] = [10**12] * 3
    folder.write_json("config.json", written)
    with pytest.raises(TinyldError, match=r"holds [\d,]+ values, but config.json asks for"):
        load_composition(folder, base_of(fresh_base(config)))


@pytest.mark.parametrize("under", ["weight-lora", "adapters", "full"])
def test_a_trajectory_adapter_may_stand_on_another_method(config: ModelConfig, tmp_path: Path, under: str) -> None:
    (below, _), (push, _) = trained_member(config, under), trained_member(config, "best-1", 1)
    model = fresh_base(config)
    method = METHODS[below.method](below.config, config)
    method.attach(model)
    with torch.no_grad():
        for name, parameter in method.own.items():
            parameter.copy_(below.tensors[name])
    model.push = push.push(base_of(model))
    found = composed_logits(config, (below, 1.0), (push, 1.0))
    torch.testing.assert_close(found, logits(model, noised_batch(config)), atol=1e-5, rtol=1e-5)
    folder = RunFolder.create(tmp_path / "both")
    save_composition(folder, base_of(fresh_base(config)), Composed([below, push], "sum"), {})
    base = base_of(fresh_base(config))
    load_composition(folder, base)
    assert torch.equal(logits(base.model, noised_batch(config)), found)


REFUSED = [
    ((), {}, "at least one adapter"),
    (("weight-lora", "adapters"), {}, "adapters and weight-lora cannot be combined"),
    (("adapters", "adapters"), {"rank": 2}, "--rank cuts combined weight-lora adapters only"),
    (("weight-lora", "weight-lora"), {"how": "router"}, "a router weighs trajectory-lora adapters; for weight-lora"),
    (("weight-lora", "weight-lora-targets"), {}, "of different targets cannot be combined"),
    (("weight-lora-bands", "weight-lora-bands"), {}, "with bands cannot be combined"),
    (("weight-lora", "weight-lora"), {"rank": 7}, "rank must be from 1 to 6, got 7"),
]


@pytest.mark.parametrize(("cases", "options", "message"), REFUSED)
def test_what_cannot_be_combined_is_refused_by_name(
    config: ModelConfig, cases: tuple[str, ...], options: dict[str, Any], message: str
) -> None:
    members = [trained_member(config, case)[0] for case in cases]
    with pytest.raises(UsageError, match=message):
        Composed(members, **({"how": "sum"} | options)).attach(base_of(fresh_base(config)))


# ---------------------------------------------------------------------------------------------- weight LoRA


def test_cutting_to_the_full_rank_loses_nothing_and_lower_ranks_lose_what_eckart_and_young_say(
    config: ModelConfig,
) -> None:
    (one, _), (two, _) = (trained_member(config, "weight-lora", seed) for seed in (0, 1))
    model = fresh_base(config)
    settings, tensors = METHODS["weight-lora"].combine(
        [(one.config, one.tensors, 0.5), (two.config, two.tensors, 2.0)], dict(model.named_parameters())
    )
    for rank in (6, 3, 1):
        cut, kept, lost = truncate(settings, tensors, rank)
        squared, missing = 0.0, 0.0
        for name in (n for n in tensors if n.endswith("lora_A.weight")):
            other = name.replace("lora_A", "lora_B")
            whole = sum(w * m.config.scale * m.tensors[other] @ m.tensors[name] for m, w in ((one, 0.5), (two, 2.0)))
            s = torch.linalg.svdvals(whole)
            squared, missing = squared + float(s.square().sum()), missing + float(s[rank:].square().sum())
            error = torch.linalg.matrix_norm(cut.scale * kept[other] @ kept[name] - whole)
            assert float(error) == pytest.approx(float(s[rank:].square().sum().sqrt()), abs=1e-4)
        assert lost == pytest.approx(missing / squared, abs=1e-5)


# ---------------------------------------------------------------------------------------------- routers


def prompts(config: ModelConfig, rows: int = 6) -> tuple[Tensor, Tensor]:
    """(x, prompt_mask): rows of 12 tokens, the answer at 6, row 1 padded behind 9."""
    x = torch.randint(5, config.vocab_size, (rows, 12), generator=torch.Generator().manual_seed(3))
    prompt_mask = torch.ones_like(x, dtype=torch.bool)
    prompt_mask[:, 6] = False
    prompt_mask[1, 9:] = False
    return x, prompt_mask


def test_features_are_the_prompts_own_whatever_the_padding(config: ModelConfig) -> None:
    model, (x, prompt_mask) = fresh_base(config), prompts(config)
    slot = answer_slot(prompt_mask)
    assert slot.nonzero().tolist() == [[row, 6] for row in range(6)], "padding is no answer"
    features = prompt_features(model.embed(x), prompt_mask)
    short = prompt_features(model.embed(x[1:2, :9]), prompt_mask[1:2, :9])
    torch.testing.assert_close(features[1:2], short)
    changed = x.clone()
    changed[0, 6] = 4  # the answer is not read
    changed[1, 10] = 5  # nor padding
    torch.testing.assert_close(prompt_features(model.embed(changed), prompt_mask), features)
    far = x.clone()
    d = config.d_model
    for place, part in ((6 + NEAR[0] - 1, None), (4, 1), (5, 2), (7, 3), (8, 4)):
        far[0] = torch.where(torch.arange(12) == place, x[0] % 90 + 10, x[0])
        moved = (prompt_features(model.embed(far), prompt_mask) - features)[0].abs().view(5, d).amax(1)
        assert (moved > 1e-3).nonzero().flatten().tolist() == ([0] if part is None else [0, part])
    alone = prompt_features(model.embed(x[:, 6:]), prompt_mask[:, 6:])
    assert (alone[:, d : 3 * d] == 0).all() and (alone[:, 3 * d :] == features[:, 3 * d :]).all(), "nothing before"


def test_the_nearest_prototype_is_in_units_of_the_mean_variance() -> None:
    mean = torch.tensor([[0.0, 0.0], [4.0, 1.0]])
    router = PrototypeRouter(torch.stack([mean, torch.tensor([[90.0, 0.04], [70.0, 0.06]])], dim=1))
    found = router(torch.tensor([[3.9, 0.1], [0.1, 0.9]]))  # near in the wide first feature, far in the narrow second
    assert found.tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("kind", ["prototypes", "trained"])
def test_a_router_gives_every_row_the_push_of_its_own_adapter(config: ModelConfig, tmp_path: Path, kind: str) -> None:
    """A batch that mixes two tasks' rows equals each row under the one adapter whose prompts it is like."""
    model, (x, prompt_mask) = fresh_base(config), prompts(config)
    for row in range(2, 6):  # rows 2, 3 are nearly row 0; rows 4, 5 nearly row 1
        x[row, 1:], prompt_mask[row] = x[(row - 2) // 2, 1:], prompt_mask[(row - 2) // 2]
    owner, t = [0, 1, 0, 0, 1, 1], torch.ones(6)
    features = prompt_features(model.embed(x), prompt_mask).detach()
    members = []
    for place, case in ((0, "best-0"), (1, "fast")):
        own = features[[i for i, o in enumerate(owner) if o == place]]
        prototype = torch.stack([own.mean(0), own.var(0, correction=0)])
        members.append(replace(trained_member(config, case, place)[0], prototype=prototype, run=case))
    router: Any = prototype_router(members)
    if kind == "trained":
        router = train_router([features[[0, 2, 3]], features[[1, 4, 5]]], epochs=200)
    composed = Composed(members, "router", router)
    base = base_of(fresh_base(config))
    composed.attach(base)
    assert base.model.push.route(base.model.embed(x), prompt_mask).argmax(1).tolist() == owner
    with torch.no_grad():
        found = base.model(x, t, None if bool(prompt_mask.all()) else answer_or_prompt(prompt_mask), prompt_mask)
    for row, place in enumerate(owner):
        one = base_of(fresh_base(config))
        Composed([members[place]], "sum").attach(one)
        length = 9 if owner[row] == 1 else 12
        with torch.no_grad():
            alone = one.model(x[row : row + 1, :length], t[:1], None, prompt_mask[row : row + 1, :length])
        tolerance = 1e-4 if kind == "prototypes" else 0.1  # softmax leaves a little to the other
        torch.testing.assert_close(found[row, :length], alone[0], atol=tolerance, rtol=tolerance)
    folder = RunFolder.create(tmp_path / "both")
    save_composition(folder, base_of(fresh_base(config)), composed, {})
    again = base_of(fresh_base(config))
    load_composition(folder, again)
    with torch.no_grad():
        repeated = again.model(x, t, answer_or_prompt(prompt_mask), prompt_mask)
    assert torch.equal(repeated, found)


@pytest.mark.parametrize("case", ["best-1", "fast"])
def test_every_adapter_runs_on_its_own_rows_only(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    rows: list[int] = []
    forward = PushModule.forward

    def counted(push: PushModule, h: Tensor, *args: Any) -> Tensor:
        rows.append(len(h))
        return forward(push, h, *args)

    monkeypatch.setattr(PushModule, "forward", counted)
    members = [trained_member(config, case, seed)[0] for seed in (0, 1)]
    composed = Composed(members, "router", InTurn(2))
    base, noised = base_of(fresh_base(config)), noised_batch(config)
    composed.attach(base)
    rows.clear()
    together = logits(base.model, noised)
    assert set(rows) == {3}, "three of the six rows are each one's"
    for row, part in enumerate(noised.split(6)):
        length = int(noised.attention_mask[row].sum())
        alone = base_of(fresh_base(config))
        Composed([members[row % 2]], "sum").attach(alone)
        torch.testing.assert_close(together[row, :length], logits(alone.model, part)[0, :length], atol=1e-4, rtol=1e-4)


def answer_or_prompt(prompt_mask: Tensor) -> Tensor:
    """The attention mask: prompt and answer, no padding."""
    return prompt_mask | answer_slot(prompt_mask)


def test_a_router_without_prototypes_is_refused_by_run(config: ModelConfig) -> None:
    members = [trained_member(config, "best-0", seed)[0] for seed in (0, 1)]
    with pytest.raises(UsageError, match="run0, run1 has no prototype to route by"):
        prototype_router(members)


def test_a_fresh_trained_router_weighs_all_alike() -> None:
    weights = TrainedRouter(6, 4)(torch.randn(3, 6))
    torch.testing.assert_close(weights, torch.full((3, 4), 0.25))


# ---------------------------------------------------------------------------------------------- search, interference


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_a_known_minimum_and_is_seeded(seed: int) -> None:
    goal = np.array([0.9, -0.4, 0.2])

    def loss(weights: list[float]) -> float:
        return 5.0 * float(((np.array(weights) - goal) ** 2).sum())

    found, score = search_weights(loss, 3, 200, seed)
    assert np.abs(np.array(found) - goal).max() < 0.15 and score < 0.2
    assert search_weights(loss, 3, 200, seed) == (found, score)
    assert max(map(abs, search_weights(lambda w: -sum(w), 3, 200, seed)[0])) <= BOUND


def test_the_search_never_ends_worse_than_the_best_single_adapter() -> None:
    rng = random.Random(0)
    table: dict[tuple[float, ...], float] = {}

    def noise(weights: list[float]) -> float:
        return table.setdefault(tuple(weights), rng.random() + 1.0 - 0.9 * (weights == [0.0, 1.0]))

    weights, score = search_weights(noise, 2, 30)
    assert weights == [0.0, 1.0] and score == pytest.approx(table[0.0, 1.0] + 0.05 * 0.5)


@pytest.mark.parametrize("case", ["best-2", "separate", "fast"])
def test_with_a_band_off_its_rows_are_the_bases_and_the_others_are_as_they_were(config: ModelConfig, case: str) -> None:
    member, on = trained_member(config, case)
    base, noised = base_of(fresh_base(config)), noised_batch(config)
    plain = logits(base.model, noised)
    push = base.model.push = member.push(base)
    for band in range(NUM_BANDS):
        rows = band_of(noised.t) == band
        with band_off(push, band):
            off = logits(base.model, noised)
        torch.testing.assert_close(off[rows], plain[rows], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(off[~rows], on[~rows], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(base.model, noised), on, atol=1e-5, rtol=1e-5)
    ranks = effective_ranks(push)
    assert len(ranks) == member.config.blocks + 1
    for row in ranks:
        assert all(0 <= r <= most + 1e-3 for r, most in zip(row, member.config.ranks, strict=True)), row


@pytest.mark.parametrize("n", [1, 4, 9])
def test_the_effective_rank_of_n_equal_directions_is_n(n: int) -> None:
    assert effective_rank(torch.cat([torch.ones(n), torch.zeros(5)])) == pytest.approx(n, rel=1e-5)
    assert effective_rank(torch.zeros(3)) == 0.0


def test_principal_cosines_are_those_of_planes_at_a_known_angle() -> None:
    plane = torch.eye(5)[:, :2]
    turned = torch.stack([plane[:, 0], 0.6 * torch.eye(5)[:, 1] + 0.8 * torch.eye(5)[:, 3]], dim=1)
    mix = torch.tensor([[2.0, 1.0], [-1.0, 3.0]])  # the same space by another basis
    torch.testing.assert_close(principal_cosines(plane @ mix, turned), torch.tensor([1.0, 0.6]))
    padded = torch.cat([turned, torch.zeros(5, 2), turned[:, :1]], dim=1)  # columns that add no direction
    torch.testing.assert_close(principal_cosines(plane, padded), torch.tensor([1.0, 0.6]))
    assert len(principal_cosines(plane, torch.zeros(5, 2))) == 0


def test_a_paired_difference_is_narrower_than_an_unpaired_one() -> None:
    rng = np.random.default_rng(0)
    ours = (rng.random(1_000) < 0.8).astype(int)
    theirs = ours.copy()
    theirs[:10] = 1 - theirs[:10]
    mean, low, high = paired_difference(ours, theirs)
    assert mean == pytest.approx((ours - theirs).mean()) and low < mean < high and high - low < 0.015


def test_rows_that_all_agree_leave_room_for_one_that_would_not() -> None:
    """Of 498 rows none differs; a share of 1% would have shown, with a chance of 99%."""
    same = np.ones(498, dtype=int)
    mean, low, high = paired_difference(same, same)
    assert mean == 0 and high == -low and 0.004 < high < 0.01
    mean, low, high = paired_difference(same, 1 - same)
    assert mean == 1.0 == high and 0.98 < low < 1.0


def test_an_interval_of_pairs_holds_the_truth_nearly_as_often_as_it_says() -> None:
    """400 draws of 60 rows, of which few differ: 95% less three standard errors of that count."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        draw = rng.random(60)
        ours, theirs = (draw < 0.06).astype(int), ((draw >= 0.06) & (draw < 0.08)).astype(int)
        _, low, high = paired_difference(ours, theirs)
        inside += low <= 0.04 <= high
    assert inside / 400 > 0.95 - 3 * (0.95 * 0.05 / 400) ** 0.5

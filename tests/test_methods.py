"""What every method must satisfy (one table of cases × one list of behaviours), and what bands, recipes, pruning and
the state cache add for trajectory-lora.
"""

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fresh_base, padded, refuses, seeded, task_rows
from torch import Tensor, nn

from tinyld.checkpoint import load_exactly
from tinyld.config import ModelConfig, TrainConfig, from_dict, to_dict
from tinyld.data import Batch, torch_seeded
from tinyld.diffusion import SMOOTHED, Noised, noise_answers, noise_counted, token_nll
from tinyld.errors import UsageError
from tinyld.methods import METHODS, make_config, paper
from tinyld.methods.contract import Method
from tinyld.methods.paper import BAND_EDGES, NUM_BANDS, band_of, nuclear_norm, time_embedding
from tinyld.methods.trajectory import TrajectoryLora, TrajectoryLoraConfig
from tinyld.model import Denoiser
from tinyld.optim import Optimizer
from tinyld.tokenizer import Tokenizer
from tinyld.train import GROUP, pack, unpack, why_not_cached, with_states

MASK = 4
MIDDLES = tuple((hi + lo) / 2 for hi, lo in itertools.pairwise(BAND_EDGES))  # a t inside each band, high noise first

BANDED = {"ranks": (4, 2, 1), "sigma": (1.0, 0.5, 0.25)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "bitfit": ("bitfit", {}),
    "weight-lora": ("weight-lora", {"rank": 3}),
    "weight-lora-targets": ("weight-lora", {"rank": 2, "targets": ("query", "down")}),
    "weight-lora-rslora": ("weight-lora", {"rank": 4, "targets": ("value", "up"), "rslora": True}),
    "adapters": ("adapters", {"rank": 3}),
    "best-0": ("trajectory-lora", {"blocks": 0, **BANDED}),
    "best-1": ("trajectory-lora", {"blocks": 1, **BANDED}),
    "best-2": ("trajectory-lora", {"blocks": 2, **BANDED}),
    "by-site": ("trajectory-lora", {"blocks": 1, "ranks": (4, 2, 1, 3, 3, 2), "sigma": (1.0, 0.5, 0.25)}),
    "prune": ("trajectory-lora", {"blocks": 2, "prune": 0.5, **BANDED}),
    "fast": ("trajectory-lora", {"recipe": "fast", "budget": 0.3}),
    "fast-banded": ("trajectory-lora", {"recipe": "fast", "blocks": 1, **BANDED}),
    "pointer": ("trajectory-lora", {"blocks": 1, "pointer": 3, **BANDED}),
    **{f"{name}-pointer": (name, {"pointer": 3}) for name in ("weight-lora", "full")},
    "fast-pointer": ("trajectory-lora", {"recipe": "fast", "blocks": 1, "pointer": 3, **BANDED}),
    "paper": ("trajectory-lora", {"recipe": "paper", "ranks": (4, 2, 1)}),
}
every_case = pytest.mark.parametrize("case", CASES)


def attach(model: Denoiser, case: str, seed: int = 0, **options: Any) -> Method:
    name, of_case = CASES[case]
    settings = make_config(name, of_case | options, model.config)
    return METHODS[name](settings, model, seeded(seed))


def noised_batch(config: ModelConfig, seed: int = 0) -> Noised:
    """Padded rows with answers of six tokens; their t fall in all three bands."""
    batch = Batch(*padded(config.vocab_size, *[6] * 6, seed=seed), torch.arange(6))
    noised = noise_counted(batch, MASK, seeded(seed))
    assert len(band_of(noised.t).unique()) == NUM_BANDS
    return noised


@torch.no_grad()
def logits(model: Denoiser, noised: Noised) -> Tensor:
    """(N, V), of the masked positions."""
    return model(noised.xt, noised.t, noised.attention_mask, noised.prompt_mask, where=noised.is_masked)


def train(model: Denoiser, method: Method, updates: int = 3) -> None:
    optimizer = Optimizer(method.own, TrainConfig(steps=updates, lr=0.03))
    for step in range(updates):
        model.zero_grad()
        loss, penalty = token_nll(model, noised_batch(model.config, step))[0].mean(), method.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()


assert {name for name, _ in CASES.values()} == set(METHODS)


@every_case
def test_updates_change_the_methods_own_parameters_and_nothing_else(config: ModelConfig, case: str) -> None:
    model, noised = fresh_base(config), noised_batch(config)
    plain, method = logits(model, noised), attach(model, case)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, method)
    mine = {id(p) for p in method.own.values()}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in mine) == parameter.requires_grad != torch.equal(parameter, before[name]), name
    assert not torch.allclose(logits(model, noised), plain, atol=1e-3)
    model.zero_grad()
    token_nll(model, noised_batch(config, 1))[0].mean().backward()
    for name, parameter in method.own.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"weight decay alone moves {name}"
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_the_usual_rate_is_lower_where_states_are_small_and_higher_for_a_single_push(config: ModelConfig) -> None:
    encoder = replace(config, norm_first=False)
    for method in METHODS.values():
        (before, optimizer), (after, same) = method.usual(config), method.usual(encoder)
        assert optimizer == same == ("muon" if method is TrajectoryLora else "adamw")
        assert after < before if method.name in ("full", "trajectory-lora") else after == before
    for base, optimizer in itertools.product((config, encoder), ("adamw", "muon")):
        assert TrajectoryLora.usual(base, optimizer, "fast")[0] >= 2 * TrajectoryLora.usual(base, optimizer)[0]
    assert METHODS["adapters"].usual(config, "muon") == (2e-3, "muon"), "it has no rate of its own for Muon"


@every_case
def test_a_fresh_method_changes_no_logit_until_it_gets_trained_parameters(config: ModelConfig, case: str) -> None:
    model, other, noised = fresh_base(config), fresh_base(config), noised_batch(config)
    before = logits(model, noised)
    method = attach(model, case)
    train(model, method)
    again = attach(other, case, seed=7)
    # `fast` computes the answer's states apart from the others, by products of other shapes
    same = partial(torch.allclose, atol=1e-5) if case.startswith("fast") else torch.equal
    assert again.config == method.config and other.training is False
    assert same(logits(other, noised), before) or case.endswith("pointer")  # of which 5% is copied
    assert sum(p.numel() for p in again.own.values()) == method.expected_parameters(method.config, config) > 0
    load_exactly(again.own, method.own, Path("adapter"))
    assert torch.equal(logits(other, noised), logits(model, noised))
    restored = from_dict(type(method.config), to_dict(method.config), "config.json")
    assert restored == method.config == again.config


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4.0), (True, 8.0)])  # of 16, over 4 or its root
def test_weight_lora_adds_its_scaled_product_to_the_matrix(config: ModelConfig, rslora: bool, scale: float) -> None:
    model = fresh_base(config)
    matrix = model.blocks[1].down.weight.detach().clone()
    method = attach(model, "weight-lora", rank=4, rslora=rslora)
    a, b = (method.own[f"blocks.1.down.lora_{x}.weight"] for x in "AB")
    nn.init.normal_(b, generator=seeded())
    method.merge(model)
    torch.testing.assert_close(model.blocks[1].down.weight.detach(), matrix + scale * (b @ a).detach())


def test_a_smoothed_loss_is_the_cross_entropy_with_a_share_of_all_labels_words(config: ModelConfig) -> None:
    model, noised, words = fresh_base(config), noised_batch(config), torch.tensor([8, 5, 11])
    noised.x0[noised.is_masked] = words[torch.arange(int(noised.is_masked.sum())) % 3]
    wanted = F.one_hot(noised.x0[noised.is_masked], config.vocab_size) * (1 - SMOOTHED)
    wanted[:, words] += SMOOTHED / 3
    exact = F.cross_entropy(logits(model, noised), wanted, reduction="none")
    torch.testing.assert_close(token_nll(model, noised, words)[0], exact)


@pytest.mark.parametrize(("name", "options"), [
    *(("weight-lora", given) for given in ({"budget": 0.2}, {"budget": 0.05, "targets": ("key",)})),
    ("weight-lora", {"pointer": "auto", "budget": 0.007, "targets": ("key",)}),
    ("adapters", {"budget": 0.013}),
    *(("trajectory-lora", given) for given in ({}, {"budget": 0.001}, {"blocks": 0, "budget": 0.3}, {"ranks": "auto"})),
    *(("trajectory-lora", {"pointer": "auto", **given}) for given in ({}, {"budget": 0.002}, {"ranks": "auto"})),
    ("trajectory-lora", {"recipe": "paper", "ranks": (8, 8, 8), "budget": 0.1}),
    *(("trajectory-lora", {"recipe": "fast", **given}) for given in ({}, {"ranks": "auto"})),
])  # fmt: skip
def test_a_budget_gives_the_largest_rank_that_fits_once_units_are_pruned(name: str, options: dict[str, Any]) -> None:
    base, method = ModelConfig(8192), METHODS[name]
    settings, limit = make_config(name, options, base), options.get("budget", 0.007) * base.num_parameters()
    rank = settings.rank if hasattr(settings, "rank") else max(settings.ranks)
    rank = rank // 2 if options.get("ranks") == "auto" else rank
    more = method.with_rank(settings, rank + 1)
    stored = [method.expected_parameters(c, base) for c in (method.with_rank(settings, rank), more)]
    assert stored[0] <= limit < stored[1]


def test_bands_are_alike_but_in_the_paper_or_where_ranks_are_given() -> None:
    literal, best, given = (
        make_config("trajectory-lora", options, ModelConfig(8192))
        for options in ({"recipe": "paper"}, {}, {"ranks": (5, 4, 3)})
    )
    assert literal.ranks == (64, 32, 8) and literal.sigma == (1.0, 0.5, 0.25) and given.ranks == (5, 4, 3)
    assert len(set(best.ranks)) == 1 and best.sigma == (1.0, 1.0, 1.0), "which writes better"


OURS = "trajectory-lora"


@pytest.mark.parametrize(("name", "options", "message"), [
    ("weight-lora", {"targets": ()}, "targets must name at least one"),
    ("weight-lora", {"targets": ("query", "query")}, "targets names one twice: query, query"),
    ("weight-lora", {"budget": 70.0}, "budget is a share of the base, at most 1, got 70"),
    ("weight-lora", {"rank": 4, "budget": 0.1}, "--budget sets the rank; leave --rank or --budget out"),
    ("weight-lora", {"blocks": 2}, "--set blocks is not an option of weight-lora.* --set pointer, --set rank"),
    (OURS, {"rank": 4}, "--set rank is not an option of trajectory-lora, which has --set blocks, --set dropout"),
    (OURS, {"blocks": 1, "ranks": (4, 2, 1, 4, 2, 1, 4, 2, 1)}, "ranks needs 3 values"),
    (OURS, {"sigma": (1.0,)}, "sigma needs 3 values"),
    (OURS, {"blocks": -1}, "blocks must be at least 0, got -1"),
    (OURS, {"recipe": "paper", "blocks": 1}, "recipe paper pushes the final state only"),
    (OURS, {"prune": 1.0}, "prune must be below 1, got 1.0"),
    (OURS, {"recipe": "paper", "ranks": "auto"}, "neither ranks auto nor dropout"),
])  # fmt: skip
def test_a_wrong_option_is_named_and_the_allowed(config: ModelConfig, name: str, options: Any, message: str) -> None:
    refuses(message, make_config, name, options, config, kind=UsageError)


def lively(config: ModelConfig, case: str) -> tuple[Denoiser, TrajectoryLora]:
    """A trajectory adapter, every tensor of it away from zero, and its base."""
    model, generator = fresh_base(config), seeded(1)
    method = attach(model, case)
    with torch.no_grad():
        for parameter in method.own.values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model, method


def test_every_t_falls_in_exactly_one_band() -> None:
    assert BAND_EDGES[0] == 1.0 and BAND_EDGES[-1] == 0.0
    t = torch.cat([torch.rand(500).clamp(min=1e-6), torch.arange(1, 13) / 12, torch.tensor(BAND_EDGES[:-1])])
    t = torch.cat([t, t.nextafter(torch.zeros(())), t.nextafter(torch.ones(()))]).clamp(max=1.0)
    inside = torch.stack([(lo < t) & (t <= hi) for hi, lo in itertools.pairwise(torch.tensor(BAND_EDGES))])
    assert (inside.sum(0) == 1).all() and torch.equal(inside.int().argmax(0), band_of(t))


def used_units(config: TrajectoryLoraConfig, site: int, band: int) -> list[int]:
    """Rank units that a band uses: the first ones or, in the paper's design, a block of its own in every module."""
    ranks = config.site_ranks(site)
    if config.recipe != "paper":
        return list(range(ranks[band]))
    first = sum(ranks[:band])
    return [module * sum(ranks) + first + unit for module in range(paper.MODULES) for unit in range(ranks[band])]


@pytest.mark.parametrize("case", [case for case, (name, _) in CASES.items() if name == "trajectory-lora"])
def test_a_push_is_its_formula_token_by_token(config: ModelConfig, case: str) -> None:
    """sigma(t) A ReLU(B [x; Emb(t)]) with x = norm(h), a loop over rows, tokens and units; tied sites share A and B and
    have a gain of their own, and the paper's units have a gate that reads the prompt, 1 + w c."""
    _, method = lively(config, case)
    settings, d, generator = method.config, config.d_model, seeded(1)
    h = torch.randn(3, 5, d, generator=generator)
    prompt = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    t = torch.tensor([MIDDLES[2], MIDDLES[0], MIDDLES[1]])
    for site, depth in enumerate(range(method.push.first_depth, config.num_layers + 1)):
        own = {n: method.own[f"sites.0.{n}"].detach() for n in ("up", "down")}  # all have them, if they are tied
        own |= {n.split(".")[2]: p.detach() for n, p in method.own.items() if n.startswith(f"sites.{site}.")}
        with torch.no_grad():
            found = method.push.start(t, prompt)(depth, h)
        for row, token in itertools.product(range(3), range(5)):
            band, x, expected = (2, 0, 1)[row], F.layer_norm(h, (d,))[row], torch.zeros(d)
            read = torch.cat([x[token], time_embedding(t[row : row + 1])[0]])
            for unit in used_units(settings, site, band):
                gate = 1.0 + own["gate"][unit] @ x[prompt[row]].mean(0) if "gate" in own else 1.0
                gate = own["gain"][unit] if "gain" in own else gate
                expected = expected + gate * F.relu(own["down"][unit] @ read) * own["up"][:, unit]
            torch.testing.assert_close(found[row, token], settings.sigma[band] * expected, atol=1e-4, rtol=1e-4)


def pruned(config: ModelConfig, *progresses: float) -> tuple[Denoiser, TrajectoryLora]:
    """A push of 3 sites x 8 units whose strengths are known, after updates at the given shares of a run."""
    model = fresh_base(config)
    method = attach(model, "prune", ranks=(8, 4, 1))
    with torch.no_grad():
        for i, site in enumerate(method.push.sites):  # unit u of site i has strength 10 i + u + 1
            site.up.copy_(torch.eye(32)[:, :8] * (10.0 * i + torch.arange(1, 9)))
            site.down.copy_(F.normalize(site.down, dim=1))
    for progress in progresses:
        for parameter in method.own.values():  # momentum revives what was dropped
            parameter.data += 0.01
        method.after_update(progress)
    return model, method


@pytest.mark.parametrize(("progresses", "left"), [
    ((0.1,), [8, 8, 8]), ((0.4,), [2, 8, 8]), ((0.6,), [1, 3, 8]), ((0.3, 0.4, 0.5, 0.9, 1.0), [1, 3, 8]),
])  # fmt: skip
def test_ranks_shrink_from_the_weakest_unit_but_to_one(config: ModelConfig, progresses: Any, left: list[int]) -> None:
    sites = pruned(config, *progresses)[1].push.sites
    assert [int((site.up.norm(dim=0) > 0).sum()) for site in sites] == left
    kept = sites[1].up.norm(dim=0).nonzero()[:, 0].tolist()
    assert kept == ([0, 6, 7] if left[1] == 3 else list(range(8))), "the unit that every band uses stays"


def test_a_finished_pruning_stores_the_living_units_and_changes_no_logit(config: ModelConfig) -> None:
    model, method = pruned(config, 1.0)
    noised = noised_batch(config)
    noised = replace(noised, t=torch.full_like(noised.t, MIDDLES[0]))  # every unit is used
    before = logits(model, noised)
    method.finish()
    torch.testing.assert_close(logits(model, noised), before, atol=1e-5, rtol=1e-5)
    assert method.config.prune == 0 and method.config.ranks == (1, 1, 1, 3, 1, 1, 8, 4, 1)
    other = fresh_base(config)
    again = TrajectoryLora(method.config, other)
    load_exactly(again.own, method.own, Path("adapter"))
    assert torch.equal(logits(other, noised), logits(model, noised))


@pytest.mark.parametrize("case", ["fast", "best-1", "weight-lora"])
def test_dropout_is_for_training_alone(config: ModelConfig, case: str) -> None:
    model, noised = fresh_base(config), noised_batch(config)
    train(model, attach(model, case, dropout=0.5))
    assert torch.equal(logits(model, noised), logits(model, noised))
    model.train()
    torch.manual_seed(0)
    one, other = logits(model, noised), logits(model, noised)
    torch.manual_seed(0)
    assert torch.equal(logits(model, noised), one) and not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize(("d", "r", "e"), [(12, 3, 20), (5, 5, 7), (8, 1, 8), (6, 9, 10), (6, 30, 11)])
def test_the_nuclear_norm_and_its_gradient_are_those_of_the_singular_values(d: int, r: int, e: int) -> None:
    """Of ranks above the width, too."""
    generator = seeded(d)
    leaves = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((d, r), (r, e))]
    ours, reference = ([x.clone().requires_grad_(True) for x in leaves] for _ in range(2))
    found, expected = nuclear_norm(*ours), torch.linalg.svdvals(reference[0] @ reference[1])[: min(d, r, e)].sum()
    torch.testing.assert_close(found, expected)
    (3.0 * found).backward()
    (3.0 * expected).backward()
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-8, rtol=1e-6)


def test_the_penalty_is_the_sum_over_the_papers_modules(config: ModelConfig) -> None:
    _, method = lively(config, "paper")
    up, down = (method.own[f"sites.0.{n}"].detach() for n in ("up", "down"))
    first, second = up.chunk(2, dim=1)
    nuclear = sum(float(torch.linalg.svdvals(a @ b).sum()) for a, b in zip((first, second), down.chunk(2), strict=True))
    expected = paper.LAMBDA_RANK * nuclear + paper.LAMBDA_ORTH * 2 * float((first.T @ second).square().sum())
    assert method.penalty().item() == pytest.approx(expected, rel=1e-4)
    fresh = attach(fresh_base(config), "paper")
    (zero := fresh.penalty()).backward()
    assert zero.item() == 0.0 and all(p.grad is None or (p.grad == 0).all() for p in fresh.own.values()), "and no NaN"


@pytest.mark.parametrize("words_each", [0, 3])  # of several lengths, and of one
@pytest.mark.parametrize("case", ["best-0", "best-1", "by-site", "paper", "fast", "fast-banded"])
def test_kept_states_train_as_fresh_ones(
    config: ModelConfig, tokenizer: Tokenizer, tmp_path: Path, case: str, words_each: int
) -> None:
    rows = task_rows(tmp_path, tokenizer, 24, words_each=words_each)
    noise, kept = partial(noise_answers, mask_id=tokenizer.mask_id), []
    model, method = lively(config, case)
    with_kept = with_states(noise, model, rows, kept.append)
    depth = method.push.first_depth
    assert kept[-1] == len(rows)
    plain = fresh_base(config).requires_grad_(False)
    for step, chunk in ((0, np.arange(9)), (4, np.array([23, 4, 11])), (7, np.array([7]))):
        batch = rows.take(chunk)
        (noised,), (cached,) = (of(batch, generator=torch_seeded(0, 2, step)) for of in (noise, with_kept))
        assert torch.equal(noised.xt, cached.xt) and torch.equal(noised.t, cached.t)
        real = batch.attention_mask
        (lower,), _ = plain.frozen(noised.xt, noised.attention_mask, depth, depth)
        assert cached.cached is not None and not (words_each and cached.attention_mask is not None)
        assert cached.cached.shape[2] == (config.num_layers - depth if method.push.answer_only else 1)
        # each in its place, rounded to 1/127 of the largest number of its group
        largest = float(lower[real].abs().max())
        torch.testing.assert_close(cached.cached[:, :, 0][real], lower[real], rtol=0, atol=0.51 * largest / 127)
        (nll, _), (nll_kept, _) = (token_nll(model, each) for each in (noised, cached))
        torch.testing.assert_close(nll_kept, nll, atol=0.03, rtol=0.03)
        grad, grad_kept = (torch.autograd.grad(of.mean(), method.own["sites.0.up"])[0] for of in (nll, nll_kept))
        torch.testing.assert_close(grad_kept, grad, atol=0.05 * float(grad.abs().max()), rtol=0.05)
    assert (len({int(n) for n in rows.lengths[:9]}) == 1) == bool(words_each), "padding was there, or none"


def test_a_large_number_of_a_kept_state_costs_its_own_group_alone() -> None:
    states = torch.randn(5, 2 * GROUP, generator=seeded())
    states[:, 0] = 1000.0
    error = (unpack(*pack(states)) - states).abs()
    assert error[:, :GROUP].max() <= 1000 / 254 and error[:, GROUP:].max() < 0.02
    assert torch.equal(unpack(*pack(torch.zeros(2, 30))), torch.zeros(2, 30)), "whatever the width"


@pytest.mark.parametrize(("case", "answer", "limit", "reason"), [
    ("full", "good", 4.0, "the method changes the first block"),
    ("best-2", "good", 4.0, "the method changes the first block"),
    ("best-1", "very good", 4.0, "the answer has 3 tokens, whose masks vary"),
    ("best-1", "good", 0.0, "--cache-gb allows 0"),
])  # fmt: skip
def test_states_are_not_kept_where_a_reason_is_named(
    config: ModelConfig, tokenizer: Tokenizer, tmp_path: Path, case: str, answer: str, limit: float, reason: str
) -> None:
    model = fresh_base(config)
    attach(model, case)
    assert reason in (why_not_cached(model, task_rows(tmp_path, tokenizer, 24, answer), limit) or "")

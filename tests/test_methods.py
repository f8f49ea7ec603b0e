"""What every method must satisfy (one table of cases × one list of behaviours), and what bands, compositions and the
state cache add for trajectory-lora.
"""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld import cache as cache_module
from tinyld.cache import FixedMasks, StateCache, why_not_cached
from tinyld.checkpoint import load_exactly
from tinyld.compose import Composition
from tinyld.config import DiffusionConfig, ModelConfig, TrainConfig, from_dict, to_dict
from tinyld.data import TaskRows
from tinyld.diffusion import Noised, noise_batch, token_nll
from tinyld.errors import TinyldError, UsageError
from tinyld.methods import METHODS, make_config, read_config
from tinyld.methods.bands import (
    BAND_EDGES,
    BAND_NAMES,
    NUM_BANDS,
    TIME_WIDTH,
    band_of,
    band_weights,
    time_embedding,
)
from tinyld.methods.contract import Method
from tinyld.methods.trajectory_lora import (
    RECIPES,
    TrajectoryLora,
    TrajectoryLoraConfig,
    nuclear_norm,
)
from tinyld.model import Denoiser
from tinyld.optim import Optimizer
from tinyld.tasks import load_split, load_task
from tinyld.tokenizer import Tokenizer
from tinyld.train import Objective

MASK = 4
MIDDLES = tuple((hi + lo) / 2 for hi, lo in itertools.pairwise(BAND_EDGES))  # a t inside each band, high noise first


def trajectory(**options: Any) -> tuple[str, dict[str, Any]]:
    plain = {"ranks": (4, 2, 1), "recipe": "best", "tied": False, "activation": "relu"}
    return "trajectory-lora", plain | options


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "bitfit": ("bitfit", {}),
    "weight-lora": ("weight-lora", {"rank": 3}),
    "weight-lora-targets": ("weight-lora", {"rank": 2, "targets": ("query", "down"), "alpha": 3.0}),
    "weight-lora-rslora": ("weight-lora", {"rank": 4, "targets": ("value", "up"), "rslora": True}),
    "weight-lora-budget": ("weight-lora", {"budget": 0.2}),
    "weight-lora-bands": ("weight-lora", {"rank": 3, "ranks": (3, 2, 1)}),
    "weight-lora-core": ("weight-lora", {"rank": 3, "core": True}),
    "adapters": ("adapters", {"rank": 3}),
    "best-0": trajectory(blocks=0),
    "best-1": trajectory(blocks=1),
    "best-2": trajectory(blocks=2),
    "best-budget": ("trajectory-lora", {"blocks": 1, "budget": 0.1}),
    "paper": ("trajectory-lora", {"recipe": "paper", "ranks": (4, 2, 1)}),
    "paper-blocks": ("trajectory-lora", {"recipe": "paper", "ranks": (3, 3, 3), "blocks": 2}),
    "separate": trajectory(sharing="separate", blocks=1),
    "nested-gate-modules": trajectory(conditioning="gate", modules=2, blocks=2, lambda_rank=0.01, lambda_orth=0.01),
    "within": trajectory(blocks=2, within=True),
    "tied-within": trajectory(blocks=1, tied=True, within=True, activation="none"),
    "tied": trajectory(blocks=2, tied=True),
    "tied-gate-modules": trajectory(blocks=1, tied=True, conditioning="gate", modules=2, lambda_orth=0.01),
    "tied-separate-linear": trajectory(blocks=1, tied=True, sharing="separate", activation="none"),
    "linear": trajectory(blocks=1, activation="none"),
    "fast": ("trajectory-lora", {"recipe": "fast", "budget": 0.3}),
    "attend-wide": trajectory(blocks=0, read="mix", attend=16, head_width=8),
    "attend-pairs": trajectory(blocks=1, attend=8, head_width=2, read_attended=True),
    "mix-1": trajectory(blocks=1, read="mix"),
    "attend-2": trajectory(blocks=2, attend=16),
    "core": trajectory(blocks=1, sharing="core", modules=2),
    "tied-core-attend": trajectory(blocks=1, tied=True, sharing="core", read="mix", attend=8),
    "by-place": trajectory(blocks=1, ranks=(4, 2, 1, 3, 3, 2)),
    "prune": trajectory(blocks=2, prune=0.5),
    "smooth-core": trajectory(blocks=0, sharing="smooth-core", read="mix", attend=8),
}
BANDED = ("weight-lora-bands", "weight-lora-core")
every_case = pytest.mark.parametrize("case", CASES)
TRAJECTORY = [k for k, (name, _) in CASES.items() if name == "trajectory-lora"]
of_trajectory = pytest.mark.parametrize("case", TRAJECTORY)
BEYOND = (
    "fast",
    "attend-wide",
    "attend-pairs",
    "mix-1",
    "attend-2",
    "core",
    "smooth-core",
    "by-place",
    "tied-core-attend",
)  # what the paper's formula does not have
of_units = pytest.mark.parametrize("case", [k for k in TRAJECTORY if k not in BEYOND])


def fresh_base(config: ModelConfig, seed: int = 0) -> Denoiser:
    """A base with weights large enough that every part of it shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    model = Denoiser(config, generator).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def attach(model: Denoiser, case: str, seed: int = 0) -> Method:
    name, options = CASES[case]
    method = METHODS[name](make_config(name, options, model.config), model.config)
    method.attach(model, torch.Generator().manual_seed(seed))
    return method


def noised_batch(config: ModelConfig, seed: int = 0, rows: int = 6) -> Noised:
    """Padded rows with answers of six tokens; their t fall in all three bands."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    x0 = torch.randint(5, config.vocab_size, (rows, 14), generator=generator)
    answer_mask, attention_mask = torch.zeros(2, rows, 14, dtype=torch.bool)
    for row in range(rows):
        length = rng.randint(9, 14) if row else 14
        start = rng.randint(1, length - 7)
        answer_mask[row, start : start + 6] = True
        attention_mask[row, :length] = True
    x0[~attention_mask] = 0
    uniform = DiffusionConfig(time_sampling="uniform")
    noised, _ = noise_batch(x0, answer_mask, attention_mask, MASK, uniform, generator, counted=True)
    assert len(band_of(noised.t).unique()) == NUM_BANDS
    return noised


@torch.no_grad()
def logits(model: Denoiser, noised: Noised) -> Tensor:
    return model(noised.xt, noised.t, noised.attention_mask, noised.prompt_mask)


def step_loss(model: Denoiser, method: Method, noised: Noised) -> Tensor:
    penalty = method.penalty()
    loss = token_nll(model, noised)[0].mean()
    return loss if penalty is None else loss + penalty


def train(model: Denoiser, method: Method, updates: int = 3) -> None:
    optimizer = Optimizer(method.own, TrainConfig(steps=updates, lr=0.03))
    for step in range(updates):
        optimizer.zero_grad()
        step_loss(model, method, noised_batch(model.config, step)).backward()
        optimizer.step()


# ---------------------------------------------------------------------------------------------- every method


def test_the_cases_cover_every_method() -> None:
    assert {name for name, _ in CASES.values()} == set(METHODS)


@every_case
def test_a_fresh_method_changes_no_logit(config: ModelConfig, case: str) -> None:
    model, noised = fresh_base(config), noised_batch(config)
    before = logits(model, noised)
    method = attach(model, case)
    assert torch.equal(logits(model, noised), before)
    assert model.training is False and method.own


@every_case
def test_updates_change_the_methods_own_parameters_and_nothing_else(config: ModelConfig, case: str) -> None:
    model, noised = fresh_base(config), noised_batch(config)
    base = dict(model.named_parameters())
    before = {n: p.detach().clone() for n, p in base.items()}
    plain = logits(model, noised)
    method = attach(model, case)
    start = {n: p.detach().clone() for n, p in method.own.items()}
    train(model, method)
    mine = {id(p) for p in method.own.values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == mine
    for name, parameter in base.items():
        assert id(parameter) in mine or torch.equal(parameter, before[name]), f"{name} of the base moved"
    for name, parameter in method.own.items():
        assert not torch.equal(parameter, start[name]), f"{name} did not move"
    assert not torch.allclose(logits(model, noised), plain, atol=1e-3)


@every_case
def test_gradient_reaches_every_own_parameter_after_one_update(config: ModelConfig, case: str) -> None:
    """At the zero start only the up-projections have any; weight decay must not be what moves the rest."""
    model = fresh_base(config)
    method = attach(model, case)
    train(model, method, updates=1)
    for parameter in method.own.values():
        parameter.grad = None
    token_nll(model, noised_batch(config, 1))[0].mean().backward()
    for name, parameter in method.own.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_the_usual_rate_is_lower_where_states_are_small(config: ModelConfig) -> None:
    encoder = replace(config, norm_first=False)
    for method in METHODS.values():
        (before, _), (after, optimizer) = method.usual(config), method.usual(encoder)
        assert (before, "muon" if method.name == "trajectory-lora" else "adamw") == method.usual(config)
        assert method.usual(config)[1] == optimizer
        assert after < before if method.name in ("full", "trajectory-lora") else after == before
        assert method.usual(config, "muon")[1] == "muon"
        if method.name != "trajectory-lora":
            assert method.usual(config, recipe="fast") == method.usual(config)
    for base in (config, encoder):  # a single push has less of a hold
        for optimizer in ("adamw", "muon"):
            ours = METHODS["trajectory-lora"]
            assert ours.usual(base, optimizer, "fast")[0] >= 2 * ours.usual(base, optimizer)[0]
    full, adapters = METHODS["full"], METHODS["adapters"]
    for base in (config, encoder):
        assert full.usual(base, "muon")[0] == 2 * full.usual(base, "adamw")[0]
        assert adapters.usual(base, "muon")[0] == adapters.usual(base, "adamw")[0], "it has none of its own for Muon"


@every_case
def test_three_updates_lower_the_loss_they_follow(config: ModelConfig, case: str) -> None:
    model, noised = fresh_base(config), noised_batch(config, 0)
    method = attach(model, case)
    lr, name = method.usual(config)
    optimizer = Optimizer(method.own, TrainConfig(steps=3, lr=lr, optimizer=name))
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = step_loss(model, method, noised)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


@every_case
def test_disabling_gives_back_the_base_and_enabling_the_adapter(config: ModelConfig, case: str) -> None:
    model, noised = fresh_base(config), noised_batch(config)
    base = logits(model, noised)
    method = attach(model, case)
    train(model, method)
    adapted = logits(model, noised)
    if not method.can_disable:
        with pytest.raises(ValueError, match="changes the base's own weights; reload the base"):
            method.set_enabled(False)
        return
    method.set_enabled(False)
    assert torch.equal(logits(model, noised), base)
    method.set_enabled(True)
    assert torch.equal(logits(model, noised), adapted)


@every_case
@torch.no_grad()
def test_logits_at_few_places_are_those_of_the_whole_pass(config: ModelConfig, case: str) -> None:
    model, noised = fresh_base(config), noised_batch(config)
    method = attach(model, case)
    with torch.enable_grad():
        train(model, method)
    first = noised.is_masked & (noised.is_masked.cumsum(1) == 1)
    told = (noised.xt, noised.t, noised.attention_mask, noised.prompt_mask)
    torch.testing.assert_close(model(*told, where=first), model(*told)[first], atol=1e-4, rtol=1e-4)


@every_case
def test_own_parameters_loaded_into_a_fresh_model_give_the_same_logits(config: ModelConfig, case: str) -> None:
    model, noised = fresh_base(config), noised_batch(config)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    method = attach(model, case)
    train(model, method)
    saved = {n: p.detach().clone() for n, p in method.own.items()}
    other = fresh_base(config, seed=5)
    load_exactly(dict(other.named_parameters()), base, Path("base"))
    again = attach(other, case, seed=7)
    assert not torch.allclose(logits(other, noised), logits(model, noised), atol=1e-3)
    load_exactly(again.own, saved, Path("adapter"))
    assert torch.equal(logits(other, noised), logits(model, noised))
    restored = from_dict(type(method.config), to_dict(method.config), "config.json")
    assert restored == method.config == again.config


def linear_sizes(config: ModelConfig, targets: tuple[str, ...]) -> int:
    """Inputs plus outputs of the named matrices of one block."""
    d, f = config.d_model, config.d_ff
    return sum({"up": d + f, "down": d + f}.get(t, 2 * d) for t in targets)


# Counted from the papers' shapes at D = 32, d_ff = 64, 2 layers.
COUNTS: dict[str, Callable[[ModelConfig, Any], int]] = {
    "full": lambda m, c: m.num_parameters(),
    "bitfit": lambda m, c: m.num_layers * (4 * 32 + 64 + 32 + 2 * 32) + 32 + m.vocab_size,
    "weight-lora": lambda m, c: 2 * 3 * (4 * 64 + 2 * 96),
    "weight-lora-targets": lambda m, c: 2 * 2 * (64 + 96),
    "weight-lora-rslora": lambda m, c: 2 * 4 * (64 + 96),
    "weight-lora-budget": lambda m, c: 2 * c.rank * (4 * 64 + 2 * 96),
    "weight-lora-bands": lambda m, c: 2 * 3 * (4 * 64 + 2 * 96),
    "weight-lora-core": lambda m, c: 2 * 3 * (4 * 64 + 2 * 96) + 3 * 3 * 3,
    "adapters": lambda m, c: 2 * 2 * (2 * 32 * 3 + 3 + 32),
    "best-0": lambda m, c: 1 * 4 * (32 + 32 + TIME_WIDTH),
    "best-1": lambda m, c: 2 * 4 * (32 + 32 + TIME_WIDTH),
    "best-2": lambda m, c: 3 * 4 * (32 + 32 + TIME_WIDTH),
    "best-budget": lambda m, c: max(c.ranks) * (32 + 32 + TIME_WIDTH + 2),  # two tied places
    "paper": lambda m, c: 2 * (4 + 2 + 1) * (32 + 32 + TIME_WIDTH + 32),
    "paper-blocks": lambda m, c: 3 * 2 * (3 + 3 + 3) * (32 + 32 + TIME_WIDTH + 32),
    "separate": lambda m, c: 2 * (4 + 2 + 1) * (32 + 32 + TIME_WIDTH),
    "nested-gate-modules": lambda m, c: 3 * 2 * 4 * (32 + 32 + TIME_WIDTH + 32),
    "fast": lambda m, c: max(c.ranks) * (32 + 32 + TIME_WIDTH + c.attend) + 3 + 4 * 32 * c.attend,
    "attend-wide": lambda m, c: 4 * (32 + 32 + TIME_WIDTH) + 3 + 4 * 32 * 16,
    "attend-pairs": lambda m, c: 2 * (4 * (32 + 32 + TIME_WIDTH + 8) + 4 * 32 * 8),
    "mix-1": lambda m, c: 2 * (4 * (32 + 32 + TIME_WIDTH) + 2),
    "attend-2": lambda m, c: 3 * (4 * (32 + 32 + TIME_WIDTH) + 4 * 32 * 16),
    "within": lambda m, c: 5 * 4 * (32 + 32 + TIME_WIDTH),  # before and within two blocks, and the final state
    "tied-within": lambda m, c: 4 * (32 + 32 + TIME_WIDTH) + 3 * 4,
    "tied": lambda m, c: 4 * (32 + 32 + TIME_WIDTH) + 3 * 4,
    "tied-gate-modules": lambda m, c: 2 * 4 * (32 + 32 + TIME_WIDTH) + 2 * 2 * 4 * (32 + 1),
    "tied-separate-linear": lambda m, c: (4 + 2 + 1) * (32 + 32 + TIME_WIDTH + 2),
    "linear": lambda m, c: 2 * 4 * (32 + 32 + TIME_WIDTH),
    "tied-core-attend": lambda m, c: 4 * (32 + 32 + TIME_WIDTH) + 2 * (4 + 3 * 4 * 4 + 2 + 4 * 32 * 8),
    "by-place": lambda m, c: (4 + 3) * (32 + 32 + TIME_WIDTH),
    "prune": lambda m, c: 3 * 4 * (32 + 32 + TIME_WIDTH),
    "core": lambda m, c: 2 * 2 * (4 * (32 + 32 + TIME_WIDTH) + 3 * 4 * 4),
    "smooth-core": lambda m, c: 4 * (32 + 32 + TIME_WIDTH) + 3 * 4 * 4 + 3 + 4 * 32 * 8,
}


@every_case
def test_what_trains_is_what_the_closed_form_counts(config: ModelConfig, case: str) -> None:
    model = fresh_base(config)
    method = attach(model, case)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == sum(p.numel() for p in method.own.values())
    assert trainable == method.expected_parameters(method.config, config)
    assert trainable == COUNTS[case](config, method.config)


@pytest.mark.parametrize("case", [k for k in CASES if k.startswith("weight-lora") and k not in BANDED])
def test_a_merged_weight_lora_equals_the_unmerged_one(config: ModelConfig, case: str) -> None:
    model, noised = fresh_base(config), noised_batch(config)
    names = [n for n, _ in model.named_parameters()]
    base = logits(model, noised)
    method = attach(model, case)
    train(model, method)
    adapted = logits(model, noised)
    method.merge(model)
    assert [n for n, _ in model.named_parameters()] == names, "a plain denoiser again"
    torch.testing.assert_close(logits(model, noised), adapted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(adapted, base, atol=1e-2)


@pytest.mark.parametrize("case", ["full", "bitfit", "adapters", "best-1", *BANDED])
def test_a_method_that_cannot_be_merged_says_so(config: ModelConfig, case: str) -> None:
    model = fresh_base(config)
    with pytest.raises(ValueError, match="cannot be merged"):
        attach(model, case).merge(model)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rslora", [False, True])
def test_weight_lora_adds_its_scaled_product_to_the_matrix(config: ModelConfig, rslora: bool, seed: int) -> None:
    model = fresh_base(config)
    settings = make_config("weight-lora", {"rank": 4, "alpha": 6.0, "rslora": rslora}, config)
    method = METHODS["weight-lora"](settings, config)
    matrix = model.blocks[1].down.weight.detach().clone()
    method.attach(model, torch.Generator().manual_seed(seed))
    a, b = (method.own[f"blocks.1.down.lora_{x}.weight"] for x in "AB")
    nn.init.normal_(b, generator=torch.Generator().manual_seed(seed))
    method.merge(model)
    expected = matrix + 6.0 / (2.0 if rslora else 4.0) * (b @ a).detach()
    torch.testing.assert_close(model.blocks[1].down.weight.detach(), expected)


BUDGETED = [("weight-lora", {}), ("weight-lora", {"targets": ("key",)}), ("adapters", {})]
BUDGETED += [("trajectory-lora", {"blocks": b, "sharing": s}) for b in (0, 2) for s in ("nested", "separate")]
BUDGETED += [("trajectory-lora", {"recipe": "paper", "ranks": (8, 2, 1)}), ("trajectory-lora", {"recipe": "fast"})]
BUDGETED += [("trajectory-lora", {"blocks": 2, "tied": True, "conditioning": c}) for c in ("none", "gate")]
BUDGETED += [("trajectory-lora", {"blocks": 1, "sharing": "core"}), ("weight-lora", {"core": True})]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("name", "options"), BUDGETED)
def test_a_budget_gives_the_largest_rank_that_fits(
    config: ModelConfig, name: str, options: dict[str, Any], seed: int
) -> None:
    budget = random.Random(seed).uniform(0.08, 0.6)
    settings = make_config(name, {**options, "budget": budget}, config)
    method, limit = METHODS[name], budget * config.num_parameters()
    ranks = {"ranks": RECIPES[options.get("recipe", "best")][0].ranks} if name == TrajectoryLora.name else {}
    unfitted = make_config(name, ranks | options, config)
    rank = settings.rank if hasattr(settings, "rank") else max(settings.ranks)
    assert settings == method.with_rank(unfitted, rank)
    assert method.expected_parameters(settings, config) <= limit
    assert method.expected_parameters(method.with_rank(unfitted, rank + 1), config) > limit


@pytest.mark.parametrize("rank", range(1, 70, 7))
def test_another_rank_keeps_the_proportion_between_bands(rank: int) -> None:
    ranks = TrajectoryLora.with_rank(TrajectoryLoraConfig(ranks=(64, 32, 8)), rank).ranks
    assert ranks[0] == rank and min(ranks) >= 1
    assert all(abs(r - max(1, rank * share)) <= 0.5 for r, share in zip(ranks, (1, 1 / 2, 1 / 8), strict=True))


def test_the_best_recipe_stores_its_share_of_a_real_base() -> None:
    base = ModelConfig(8192)
    for options, most in (({}, 0.007), ({"budget": 0.001}, 0.001)):
        settings = make_config("trajectory-lora", options, base)
        stored = TrajectoryLora.expected_parameters(settings, base) / base.num_parameters()
        one_more = (settings.blocks + 1) * (2 * base.d_model + TIME_WIDTH) / base.num_parameters()
        assert stored <= most < stored + one_more
    for recipe in ("best", "fast"):
        flat = make_config("trajectory-lora", {"recipe": recipe}, base)
        assert len(set(flat.ranks)) == 1 and flat.sigma == (1.0, 1.0, 1.0), "which writes better"
    paper = make_config("trajectory-lora", {"recipe": "paper"}, base)
    assert paper.ranks == (64, 32, 8) and paper.sigma == (1.0, 0.5, 0.25)
    assert make_config("trajectory-lora", {"ranks": (5, 4, 3)}, base).ranks == (5, 4, 3)


WRONG = [
    ("lora", {}, "method must be one of full, weight-lora, adapters, bitfit, trajectory-lora, got 'lora'"),
    ("weight-lora", {"rank": 0}, "rank must be at least 1, got 0"),
    ("weight-lora", {"alpha": 0.0}, "alpha must be above 0"),
    ("weight-lora", {"targets": ()}, "targets must name at least one"),
    ("weight-lora", {"targets": ("query", "query")}, "targets names one twice: query, query"),
    ("weight-lora", {"targets": ("query", "head")}, "targets must be among .*, got 'head'"),
    ("weight-lora", {"budget": 1e-5}, "budget 0.00% is too small for weight-lora: rank 1 stores"),
    (
        "weight-lora",
        {"modules": 2},
        "--modules is not an option of weight-lora, which has --alpha, --core, --dropout, --rank",
    ),
    ("weight-lora", {"ranks": (9, 1, 1)}, "ranks must be at most rank 8, got 9"),
    ("weight-lora", {"ranks": (1, 1)}, "ranks needs 3 values, high noise first"),
    ("weight-lora", {"ranks": (1, 0, 1)}, "every rank must be at least 1, got 1,0,1"),
    ("weight-lora", {"recipe": "paper"}, "--recipe is an option of trajectory-lora, not of weight-lora"),
    ("adapters", {"rank": 0}, "rank must be at least 1, got 0"),
    ("adapters", {"lambda_rank": 0.1}, "--lambda-rank is not an option of adapters, which has --rank"),
    ("full", {"rank": 4}, "--rank is not an option of full, which has no option"),
    ("full", {"budget": 0.5}, "full has no rank to fit a budget with; leave --budget out"),
    ("bitfit", {"budget": 0.5}, "bitfit has no rank to fit a budget with"),
    ("trajectory-lora", {"rank": 4}, "--rank is not an option of trajectory-lora"),
    ("trajectory-lora", {"recipe": "worst"}, "recipe must be one of best, fast, paper, got 'worst'"),
    ("trajectory-lora", {"ranks": (4, 2)}, r"ranks needs 3 values, high noise first, or as many a place, got \(4, 2\)"),
    ("trajectory-lora", {"ranks": (4, 0, 1)}, "every rank must be at least 1, got 4,0,1"),
    ("trajectory-lora", {"sigma": (1.0,)}, "sigma needs 3 values"),
    ("trajectory-lora", {"modules": 0}, "modules must be at least 1, got 0"),
    ("trajectory-lora", {"blocks": -1}, "blocks must be at least 0, got -1"),
    (
        "trajectory-lora",
        {"sharing": "shared"},
        "sharing must be one of nested, separate, core, smooth-core, got 'shared'",
    ),
    ("trajectory-lora", {"blocks": 1, "ranks": (4, 2, 1, 4, 2, 1, 4, 2, 1)}, "ranks needs 3 values"),
    ("trajectory-lora", {"prune": 1.0}, "prune is a share of the rank units"),
    ("trajectory-lora", {"ranks": "auto", "sharing": "separate"}, "need nested bands, one module, no tied places"),
    ("trajectory-lora", {"ranks": "auto", "tied": True}, "need nested bands, one module, no tied places"),
    ("trajectory-lora", {"activation": "tanh"}, "activation must be one of relu, none, got 'tanh'"),
    ("weight-lora", {"ranks": "auto"}, "--ranks auto is an option of trajectory-lora, not of weight-lora"),
    ("weight-lora", {"rank": 4, "budget": 0.1}, "--budget sets the rank; leave --rank or --budget out"),
    ("trajectory-lora", {"read": "all"}, "read must be one of state, mix, got 'all'"),
    (
        "trajectory-lora",
        {"attend": 12, "head_width": 8},
        "attend must be 0 or a multiple of the head width 8, got 12",
    ),
    ("trajectory-lora", {"head_width": 0}, "head_width must be at least 1, got 0"),
    ("trajectory-lora", {"read_attended": True}, "read_attended needs units that attend, got attend 0"),
    ("trajectory-lora", {"dropout": 1.0}, r"dropout is a share in \[0, 1\), got 1.0"),
    ("weight-lora", {"dropout": -0.1}, r"dropout is a share in \[0, 1\), got -0.1"),
    ("trajectory-lora", {"conditioning": "shift"}, "conditioning must be one of none, gate, got 'shift'"),
    ("trajectory-lora", {"lambda_orth": -1.0}, "must be at least 0"),
    ("trajectory-lora", {"budget": 0.0}, "too small for trajectory-lora: rank 1 stores"),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_a_wrong_option_is_named_with_what_is_allowed(
    config: ModelConfig, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_config(name, options, config)


def test_more_pushed_blocks_than_the_base_has_are_refused(config: ModelConfig) -> None:
    settings = make_config(*trajectory(blocks=3), config)
    with pytest.raises(UsageError, match="blocks must be at most the base's 2, got 3"):
        TrajectoryLora(settings, config)


# ---------------------------------------------------------------------------------------------- bands


def lively_push(config: ModelConfig, case: str = "best-1", seed: int = 0, **changes: Any) -> TrajectoryLora:
    """A trajectory adapter on a base of its own, every tensor of it away from zero."""
    name, options = CASES[case]
    settings = replace(make_config(name, options, config), **changes)
    method = TrajectoryLora(settings, config)
    generator = torch.Generator().manual_seed(seed)
    method.attach(fresh_base(config), generator)
    with torch.no_grad():
        for parameter in method.own.values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return method


def on_base(config: ModelConfig, push: Any) -> Denoiser:
    model = fresh_base(config)
    model.requires_grad_(False)
    model.push = push
    return model


@pytest.mark.parametrize("seed", range(5))
def test_every_t_falls_in_exactly_one_band(seed: int) -> None:
    assert BAND_EDGES[0] == 1.0 and BAND_EDGES[-1] == 0.0 and len(BAND_NAMES) == NUM_BANDS == len(BAND_EDGES) - 1
    shares = [k / n for n in range(1, 13) for k in range(1, n + 1)]  # what counted noise tells the denoiser
    drawn = torch.rand(500, generator=torch.Generator().manual_seed(seed)).clamp(min=1e-6)
    t = torch.cat([drawn, torch.tensor(shares), torch.tensor(BAND_EDGES[:-1])])
    t = torch.cat([t, t.nextafter(torch.zeros(())), t.nextafter(torch.ones(()))]).clamp(max=1.0)
    edges = torch.tensor(BAND_EDGES)
    inside = torch.stack([(lo < t) & (t <= hi) for hi, lo in itertools.pairwise(edges)])  # (bands, N)
    assert (inside.sum(0) == 1).all()
    assert torch.equal(inside.int().argmax(0), band_of(t))


def test_a_band_keeps_its_upper_edge_and_gives_up_its_lower_one() -> None:
    assert band_of(torch.tensor(BAND_EDGES)).tolist() == [0, 1, 2, 2]
    third = torch.arange(1, 4) / torch.tensor(3)  # k of 3 tokens masked, as decoding computes it
    assert band_of(third).tolist() == [2, 1, 0]


def used_units(config: TrajectoryLoraConfig, band: int) -> list[int]:
    """Rank units that a band uses, in the order of the tensors: module by module, high noise first."""
    found = []
    for module in range(config.modules):
        first = module * config.stored_rank
        if config.sharing == "separate":
            first += sum(config.ranks[:band])
        found += range(first, first + config.ranks[band])
    return found


@of_units
@pytest.mark.parametrize("bands", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
def test_only_the_units_of_the_bands_in_the_batch_get_gradient(
    config: ModelConfig, case: str, bands: tuple[int, ...]
) -> None:
    """nested: a band reaches the first r units only; separate: its own block of units only."""
    method = lively_push(config, case)
    generator = torch.Generator().manual_seed(3)
    h, prompt_mask = torch.randn(6, 30, 32, generator=generator), torch.ones(6, 30, dtype=torch.bool)
    times = torch.tensor([MIDDLES[bands[i % len(bands)]] for i in range(6)])
    push_at = method.push.start(times, prompt_mask)
    for depth in method.push.depths:
        push_at(depth, h).square().sum().backward()
    units = method.config.modules * method.config.stored_rank
    expected = sorted({u for band in bands for u in used_units(method.config, band)})
    for name, parameter in method.own.items():
        gradient = (parameter.grad.T if name.endswith("up") else parameter.grad).reshape(units, -1)
        assert gradient.abs().amax(1).nonzero()[:, 0].tolist() == expected, name


@of_trajectory
def test_a_batch_that_mixes_bands_equals_its_rows_run_alone(config: ModelConfig, case: str) -> None:
    model, noised = on_base(config, lively_push(config, case).push), noised_batch(config)
    together = logits(model, noised)
    for row, part in enumerate(noised.split(len(noised.t))):
        length = int(noised.attention_mask[row].sum())
        torch.testing.assert_close(together[row, :length], logits(model, part)[0, :length], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(logits(model, replace(part, t=1.34 - part.t)), logits(model, part), atol=1e-3)


@of_units
def test_a_push_is_the_papers_formula_row_by_row(config: ModelConfig, case: str) -> None:
    """sigma(t) sum_i A_i diag(1 + W c) ReLU(B_i [h; Emb(t)]), a loop over rows, modules and tokens; tied places share
    A and B and have a gain of their own, and a linear push has no ReLU."""
    method = lively_push(config, case)
    settings, d = method.config, config.d_model
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(3, 5, d, generator=generator)
    prompt = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [1, 0, 0, 0, 0]]).bool()
    t = torch.tensor([MIDDLES[2], MIDDLES[0], MIDDLES[1]])
    start = method.push.start(t, prompt)
    for place, depth in enumerate(method.push.depths):
        names = {n: 0 if settings.tied and n in ("up", "down") else place for n in ("up", "down", "gate", "gain")}
        own = {n: method.own[f"places.{at}.{n}"].detach() for n, at in names.items() if _has(method, at, n)}
        with torch.no_grad():
            found = start(depth, h)
        for row, band in enumerate((2, 0, 1)):
            normal = (h[row] - h[row].mean(-1, keepdim=True)) / (
                h[row].var(-1, keepdim=True, correction=0) + 1e-5
            ).sqrt()
            c = normal[prompt[row]].mean(0)
            total = torch.zeros(5, d)
            for unit in used_units(settings, band):
                into = own["down"][unit]
                hidden = normal @ into[:d] + time_embedding(t[row : row + 1])[0] @ into[d:]  # (L,)
                hidden = F.relu(hidden) if settings.activation == "relu" else hidden
                gate = 1.0 + own["gate"][unit] @ c if "gate" in own else 1.0
                gate = gate * own["gain"][unit] if settings.tied else gate
                total += settings.sigma[band] * gate * hidden[:, None] * own["up"][:, unit]
            torch.testing.assert_close(found[row], total, atol=1e-4, rtol=1e-4)


def _has(method: TrajectoryLora, place: int, name: str) -> bool:
    return f"places.{place}.{name}" in method.own


def test_the_gate_reads_the_states_below_every_push(config: ModelConfig) -> None:
    """Pooled once, at the first depth: what a push adds further down must not come back as its condition."""
    method = lively_push(config, "nested-gate-modules")
    h, noised = torch.randn(6, 14, 32, generator=torch.Generator().manual_seed(0)), noised_batch(config)
    start = method.push.start(noised.t, noised.prompt_mask)
    other = method.push.start(noised.t, noised.prompt_mask)
    with torch.no_grad():
        start(0, h)
        other(0, h.flip(0))
        assert not torch.allclose(start(1, h), other(1, h), atol=1e-4)


def test_time_features_tell_nearby_times_apart() -> None:
    t = torch.linspace(0, 1, 101)
    features = time_embedding(t)
    assert features.shape == (101, TIME_WIDTH) and features.abs().max() <= 1
    distance = torch.cdist(features, features) + 10 * torch.eye(101)
    assert distance.min() > 0.05


@of_trajectory
@pytest.mark.parametrize("factor", [0.0, 0.5, 3.0])
def test_sigma_scales_the_push_linearly(config: ModelConfig, case: str, factor: float) -> None:
    plain = lively_push(config, case)
    scaled = lively_push(config, case, sigma=tuple(factor * s for s in plain.config.sigma))
    h, noised = torch.randn(6, 14, 32, generator=torch.Generator().manual_seed(0)), noised_batch(config)
    depth = plain.first_depth
    history = [h.roll(i, 0) for i in range(depth)] + [h]
    with torch.no_grad():
        one, other = (m.push.start(noised.t, noised.prompt_mask, history)(depth, h) for m in (plain, scaled))
    torch.testing.assert_close(other, factor * one)
    assert one.abs().max() > 0.1


# ---------------------------------------------------------------------------------------------- pruning


def test_ranks_are_found_beside_a_band_that_pushes_nothing(config: ModelConfig) -> None:
    method = TrajectoryLora(TrajectoryLoraConfig(ranks=(8, 4, 1), sigma=(1.0, 1.0, 0.0), blocks=2, prune=0.5), config)
    method.attach(fresh_base(config), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for place in method.push.places:
            place.up.normal_(generator=torch.Generator().manual_seed(1))
    method.after_update(1.0)
    method.finish()
    assert len(method.config.ranks) == 9 and min(method.config.ranks) == 1
    assert sum(p.numel() for p in method.own.values()) == method.expected_parameters(method.config, config)
    assert all(not place.units[2].any() for place in method.push.places)


def pruned(config: ModelConfig, progresses: list[float], prune: float = 0.5) -> tuple[Denoiser, TrajectoryLora]:
    """A push of 3 places x 8 units whose strengths are known, after updates at the given shares of a run."""
    settings = TrajectoryLoraConfig(ranks=(8, 4, 1), blocks=2, prune=prune)
    method = TrajectoryLora(settings, config)
    model = fresh_base(config)
    method.attach(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, place in enumerate(method.push.places):  # unit u of place i has strength 10 i + u + 1
            place.up.copy_(torch.eye(32)[:, :8] * (10.0 * i + torch.arange(1, 9)))
            place.down.copy_(F.normalize(place.down, dim=1))
    for progress in progresses:
        method.after_update(progress)
    return model, method


def living(method: TrajectoryLora) -> list[int]:
    return [int((place.up.norm(dim=0) > 0).sum()) for place in method.push.places]


def test_ranks_shrink_from_the_weakest_unit_and_every_place_keeps_one(config: ModelConfig) -> None:
    assert living(pruned(config, [0.1])[1]) == [8, 8, 8]
    assert living(pruned(config, [0.4])[1]) == [2, 8, 8]  # a quarter of 24
    assert living(pruned(config, [0.6])[1]) == [1, 3, 8]  # half; the strongest of the first place stays
    assert living(pruned(config, [0.3, 0.4, 0.5, 0.9, 1.0])[1]) == [1, 3, 8]
    kept = pruned(config, [1.0])[1].push.places[1].up.norm(dim=0).nonzero()[:, 0].tolist()
    assert kept == [0, 6, 7], "the unit that every band uses stays"


def test_dropped_units_stay_dropped_whatever_the_optimizer_does(config: ModelConfig) -> None:
    model, method = pruned(config, [1.0])
    for place in method.push.places:
        place.up.data += 0.01
    method.after_update(1.0)
    assert living(method) == [1, 3, 8]


def test_a_finished_pruning_stores_the_living_units_and_changes_no_logit(config: ModelConfig) -> None:
    model, method = pruned(config, [1.0])
    noised = noised_batch(config)
    noised = replace(noised, t=torch.full_like(noised.t, MIDDLES[0]))  # every unit is used
    before = logits(model, noised)
    method.finish()
    torch.testing.assert_close(logits(model, noised), before, atol=1e-5, rtol=1e-5)
    assert method.config.prune == 0 and method.config.ranks == (1, 1, 1, 3, 1, 1, 8, 4, 1)
    assert sum(p.numel() for p in method.own.values()) == 12 * (32 + 32 + TIME_WIDTH)
    assert TrajectoryLora.expected_parameters(method.config, config) == 12 * (32 + 32 + TIME_WIDTH)
    again = TrajectoryLora(from_dict(TrajectoryLoraConfig, to_dict(method.config), "config.json"), config)
    other = fresh_base(config)
    again.attach(other)
    load_exactly(again.own, method.own, Path("adapter"))
    assert torch.equal(logits(other, noised), logits(model, noised))


def test_a_resumed_run_drops_the_units_that_the_first_one_did(config: ModelConfig) -> None:
    """What is dropped is read off the zeros; momentum that revives a unit does not choose again."""
    _, first = pruned(config, [0.4])
    _, again = pruned(config, [])
    load_exactly(again.own, first.own, Path("checkpoint"))
    for method in (first, again):
        for progress in (0.41, 0.6):
            if method.dropped is not None:  # the optimizer moves what was dropped
                for place in method.push.places:
                    place.up.data += 100.0 * torch.eye(32)[:, :8] * (place.up.norm(dim=0) == 0)
            method.after_update(progress)
    assert first.dropped.tolist() == again.dropped.tolist() and living(first) == living(again) == [1, 3, 8]


def test_automatic_ranks_end_within_the_budget() -> None:
    base = ModelConfig(8192)
    settings = make_config("trajectory-lora", {"ranks": "auto"}, base)
    start = TrajectoryLora.expected_parameters(settings, base) / base.num_parameters()
    assert 0.012 < start <= 0.014
    fast = make_config("trajectory-lora", {"recipe": "fast", "ranks": "auto"}, base)
    halved = replace(fast, ranks=tuple(r // 2 for r in fast.ranks))
    assert TrajectoryLora.expected_parameters(halved, base) <= 0.007 * base.num_parameters()


def test_a_run_from_before_heads_had_a_width_reads_as_it_was(config: ModelConfig) -> None:
    record = {"name": "trajectory-lora", "blocks": 0, "attend": 16, "ranks": [4, 2, 1]}
    assert read_config(record, "config.json")[1].head_width == 8
    assert read_config(record | {"head_width": 4}, "config.json")[1].head_width == 4


@pytest.mark.parametrize("case", ["fast", "tied", "weight-lora"])
def test_dropout_is_for_training_alone(config: ModelConfig, case: str) -> None:
    model, noised = fresh_base(config), noised_batch(config)
    name, options = CASES[case]
    method = METHODS[name](make_config(name, options | {"dropout": 0.5}, config), config)
    method.attach(model, torch.Generator().manual_seed(0))
    train(model, method)
    assert torch.equal(logits(model, noised), logits(model, noised))
    model.train()
    torch.manual_seed(0)
    one, other = logits(model, noised), logits(model, noised)
    assert not torch.allclose(one, other, atol=1e-3)
    torch.manual_seed(0)
    assert torch.equal(logits(model, noised), one)


def test_a_given_number_of_attending_units_is_kept_by_the_budget() -> None:
    base = ModelConfig(8192)
    settings = make_config("trajectory-lora", {"recipe": "fast", "attend": 8}, base)
    more = replace(settings, ranks=tuple(r + 1 for r in settings.ranks))
    assert settings.attend == 8 and max(settings.ranks) > 60
    count = [TrajectoryLora.expected_parameters(c, base) for c in (settings, more)]
    assert count[0] <= 0.007 * base.num_parameters() < count[1]


# ---------------------------------------------------------------------------------------------- reading, cores


def test_band_weights_are_one_bands_or_go_from_middle_to_middle() -> None:
    t = torch.tensor([1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.01])
    assert band_weights(t, smooth=False).argmax(1).tolist() == band_of(t).tolist()
    expected = [[1, 0, 0], [1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1], [0, 0, 1]]
    torch.testing.assert_close(band_weights(t, smooth=True), torch.tensor(expected))


@pytest.mark.parametrize("case", ["fast", "attend-wide", "attend-pairs", "mix-1", "attend-2", "smooth-core"])
def test_attending_units_and_the_mix_are_their_formulas_token_by_token(config: ModelConfig, case: str) -> None:
    """x = sum_k softmax(m)_k norm(h_k); a = concat_heads(softmax(q K^T / sqrt w) ReLU(V)),
    push = sigma(t) (A ReLU(B [x; Emb(t)] + B' a) + C a)."""
    method = lively_push(config, case)
    settings, d = method.config, config.d_model
    generator = torch.Generator().manual_seed(1)
    history = [torch.randn(2, 5, d, generator=generator) for _ in range(method.first_depth + 1)]
    h = history[-1]
    prompt = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0]]).bool()
    t = torch.tensor([MIDDLES[0], MIDDLES[2]])
    own = {n.removeprefix("places.0."): p.detach() for n, p in method.own.items() if n.startswith("places.0.")}
    if settings.has_core:
        own["up"].zero_()  # cores have a test of their own
    with torch.no_grad():
        found = method.push.start(t, prompt, history)(method.first_depth, h)
    shares = own["mix"].softmax(0) if settings.read == "mix" else torch.ones(1)
    states = history if settings.read == "mix" else [h]
    x = sum(share * F.layer_norm(state, (d,)) for share, state in zip(shares, states, strict=True))
    for row, band in enumerate((0, 2)):
        sigma = settings.sigma[band]
        for token in range(5):
            expected, attended = torch.zeros(d), torch.zeros(settings.attend)
            wide = settings.head_width
            for start in range(0, settings.attend, wide):
                q, k, v = own["attention"][:, start : start + wide]
                prompts = x[row, prompt[row]]
                weights = ((prompts @ k.T) @ (q @ x[row, token]) / wide**0.5).softmax(0)
                attended[start : start + wide] = weights @ F.relu(prompts @ v.T)
            for unit in range(settings.ranks[band]):
                into = own["down"][unit]
                hidden = into[:d] @ x[row, token] + time_embedding(t[row : row + 1])[0] @ into[d:]
                if settings.read_attended:
                    hidden = hidden + own["down_attended"][unit] @ attended
                expected += sigma * F.relu(hidden) * own["up"][:, unit]
            if settings.attend:
                expected += sigma * own["attended"] @ attended
            torch.testing.assert_close(found[row, token], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sharing", ["core", "smooth-core"])
def test_a_core_stands_between_the_two_matrices(config: ModelConfig, sharing: str) -> None:
    method = lively_push(config, "core", sharing=sharing, modules=1)
    h = torch.randn(3, 4, config.d_model, generator=torch.Generator().manual_seed(1))
    t, prompt = torch.tensor([0.9, 0.6, 0.2]), torch.ones(3, 4, dtype=torch.bool)
    up, down, core = (method.own[f"places.0.{n}"].detach() for n in ("up", "down", "core"))
    with torch.no_grad():
        found = method.push.start(t, prompt)(method.first_depth, h)
    weights = band_weights(t, smooth=sharing == "smooth-core")
    for row, band in enumerate(band_of(t).tolist()):
        time = time_embedding(t[row : row + 1])[0]
        hidden = F.relu(F.layer_norm(h[row], (32,)) @ down[:, :32].T + down[:, 32:] @ time)
        mixed = hidden @ sum(weights[row, b] * core[b, 0] for b in range(NUM_BANDS))
        rank = method.config.ranks[band]
        expected = method.config.sigma[band] * mixed[:, :rank] @ up[:, :rank].T
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", BANDED)
def test_a_weight_lora_with_bands_changes_the_matrix_by_noise_level(config: ModelConfig, case: str) -> None:
    """Every row's logits are those of a plain denoiser whose matrices were changed for its t alone."""
    model, noised = fresh_base(config), noised_batch(config)
    method = attach(model, case)
    with torch.no_grad():
        for i, parameter in enumerate(method.own.values()):
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    found = logits(model, noised)
    settings = method.config
    for row, part in enumerate(noised.split(len(noised.t))):
        used = torch.arange(3) < (settings.ranks or (3, 3, 3))[int(band_of(part.t))]
        between = torch.diag(used.float())
        if settings.core:
            weights = band_weights(part.t, smooth=True)[0]
            between = sum(weights[b] * method.own["core"][b].detach() for b in range(NUM_BANDS)) @ between
        plain = fresh_base(config)
        with torch.no_grad():
            for i, block in enumerate(plain.blocks):
                for name in settings.targets:
                    a, b = (method.own[f"blocks.{i}.{name}.lora_{x}.weight"] for x in "AB")
                    getattr(block, name).weight += settings.scale * (a.T @ between @ b.T).T
        length = int(noised.attention_mask[row].sum())
        torch.testing.assert_close(found[row, :length], logits(plain, part)[0, :length], atol=1e-3, rtol=1e-3)
    shifted = logits(model, replace(noised, t=1.34 - noised.t))
    assert not torch.allclose(shifted, found, atol=1e-3)


# ---------------------------------------------------------------------------------------------- penalty


SHAPES = [(12, 3, 20), (5, 5, 7), (8, 1, 8), (6, 9, 10), (6, 30, 11)]  # (D, r, E); ranks above the width too


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("d", "r", "e"), SHAPES)
def test_the_nuclear_norm_and_its_gradient_are_those_of_the_singular_values(d: int, r: int, e: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((d, r), (r, e))]
    ours, reference = ([x.clone().requires_grad_(True) for x in leaves] for _ in range(2))
    found = nuclear_norm(*ours)
    expected = torch.linalg.svdvals(reference[0] @ reference[1])[: min(d, r, e)].sum()
    torch.testing.assert_close(found, expected)
    (3.0 * found).backward()
    (3.0 * expected).backward()
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("case", ["paper", "nested-gate-modules"])
def test_the_penalty_is_the_sum_over_places_and_modules(config: ModelConfig, case: str) -> None:
    method = lively_push(config, case, lambda_rank=0.3, lambda_orth=0.7)
    r, expected = method.config.stored_rank, 0.0
    for place in range(method.config.blocks + 1):
        up, down = (method.own[f"places.{place}.{n}"].detach() for n in ("up", "down"))
        first, second = up[:, :r], up[:, r:]
        for a, b in ((first, down[:r]), (second, down[r:])):
            expected += 0.3 * float(torch.linalg.svdvals(a @ b).sum())
        expected += 0.7 * 2 * float((first.T @ second).square().sum())
    assert method.penalty().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("case", ["paper", "paper-blocks", "nested-gate-modules"])
def test_the_penalty_of_a_fresh_adapter_is_0_and_so_is_its_gradient(config: ModelConfig, case: str) -> None:
    method = attach(fresh_base(config), case)
    penalty = method.penalty()
    penalty.backward()
    assert penalty.item() == 0.0
    for name, parameter in method.own.items():
        assert parameter.grad is None or (parameter.grad == 0).all(), name  # a NaN is not 0 either


def test_the_paper_recipe_trains_on_a_base_narrower_than_its_ranks(config: ModelConfig) -> None:
    """64 + 32 + 8 rank units on states of width 32."""
    method = lively_push(config, "paper", ranks=(64, 32, 8))
    method.penalty().backward()
    assert all(p.grad.isfinite().all() for n, p in method.own.items() if not n.endswith("gate"))


@pytest.mark.parametrize("case", [k for k in CASES if not k.endswith("gate-modules") and "paper" not in k])
def test_a_method_without_regulariser_has_no_penalty(config: ModelConfig, case: str) -> None:
    assert attach(fresh_base(config), case).penalty() is None


# ---------------------------------------------------------------------------------------------- composition


def compose(config: ModelConfig, *parts: tuple[TrajectoryLora, float]) -> Denoiser:
    return on_base(config, Composition([m.push for m, _ in parts], [weight for _, weight in parts]))


@of_trajectory
def test_one_member_at_weight_1_is_the_adapter(config: ModelConfig, case: str) -> None:
    method, noised = lively_push(config, case), noised_batch(config)
    alone = logits(on_base(config, method.push), noised)
    assert torch.equal(logits(compose(config, (method, 1.0)), noised), alone)


@of_trajectory
def test_an_adapter_minus_itself_is_the_base(config: ModelConfig, case: str) -> None:
    method, noised = lively_push(config, case), noised_batch(config)
    base = logits(fresh_base(config), noised)
    assert not torch.allclose(logits(on_base(config, method.push), noised), base, atol=1e-2)
    torch.testing.assert_close(logits(compose(config, (method, 1.0), (method, -1.0)), noised), base)
    torch.testing.assert_close(logits(compose(config, (method, 0.0)), noised), base)


@of_trajectory
def test_two_equal_adapters_averaged_are_one(config: ModelConfig, case: str) -> None:
    method, twin, noised = lively_push(config, case), lively_push(config, case), noised_batch(config)
    alone = logits(on_base(config, method.push), noised)
    mean = logits(compose(config, (method, 0.5), (twin, 0.5)), noised)
    torch.testing.assert_close(mean, alone, atol=1e-5, rtol=1e-5)


MIXED = [("best-0", 0.7), ("best-2", -0.4), ("nested-gate-modules", 1.3), ("separate", 0.5)]


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_members_does_not_matter(config: ModelConfig, seed: int) -> None:
    parts = [(lively_push(config, case, seed=i), weight) for i, (case, weight) in enumerate(MIXED)]
    noised = noised_batch(config)
    expected = logits(compose(config, *parts), noised)
    random.Random(seed).shuffle(parts)
    composed = compose(config, *parts)
    assert composed.push.first_depth == 0
    torch.testing.assert_close(logits(composed, noised), expected, atol=1e-4, rtol=1e-4)


def test_a_compositions_logits_at_few_places_are_those_of_the_whole_pass(config: ModelConfig) -> None:
    noised = noised_batch(config)
    first = noised.is_masked & (noised.is_masked.cumsum(1) == 1)
    told = (noised.xt, noised.t, noised.attention_mask, noised.prompt_mask)
    for parts in (MIXED, MIXED[:1], [("paper", 1.0), ("tied", 0.5)], [("within", 1.0), ("best-1", 1.0)]):
        pushes = [(lively_push(config, case, seed=i), weight) for i, (case, weight) in enumerate(parts)]
        model = compose(config, *pushes)
        with torch.no_grad():
            torch.testing.assert_close(model(*told, where=first), model(*told)[first], atol=1e-4, rtol=1e-4)


def test_pushes_on_the_final_state_add_up(config: ModelConfig) -> None:
    """Members that push the final state only see one state, so their sum can be taken outside the denoiser."""
    one, two = lively_push(config, "best-0", seed=1), lively_push(config, "paper", seed=2)
    noised = noised_batch(config)

    def states(push: Any) -> Tensor:
        with torch.no_grad():
            return on_base(config, push).states(
                noised.xt, noised.t, noised.attention_mask, noised.prompt_mask
            )  # (B, L, D)

    base = states(None)
    expected = base + 2.0 * (states(one.push) - base) - 0.5 * (states(two.push) - base)
    torch.testing.assert_close(states(compose(config, (one, 2.0), (two, -0.5)).push), expected, atol=1e-4, rtol=1e-4)


def test_a_composition_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one adapter"):
        Composition([], [])


# ---------------------------------------------------------------------------------------------- state cache


def task_rows(folder: Path, tokenizer: Tokenizer, answers: tuple[str, str] = ("bad", "good"), n: int = 24) -> TaskRows:
    rng = random.Random(0)
    words = ("film", "plot", "music", "food", "dull", "bright", "very")
    lines = [" ".join(rng.choice(words) for _ in range(rng.randint(1, 9))) + f"\t{i % 2}" for i in range(n)]
    (folder / "train.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    (folder / "mood.toml").write_text(
        'template = "{text} it was {answer} ."\n'
        f'[verbalizer]\nneg = "{answers[0]}"\npos = "{answers[1]}"\n[data]\ntrain = "train.tsv"\n'
    )
    task = load_task(str(folder / "mood.toml"))
    return TaskRows(load_split(task, "train"), task, tokenizer, 48)


def no_autocast() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


def fixed_masks(rows: TaskRows, tokenizer: Tokenizer, draws: int, seed: int = 0) -> FixedMasks:
    return FixedMasks(rows, DiffusionConfig(time_sampling="uniform"), tokenizer.mask_id, seed, 8, draws)


@pytest.mark.parametrize(("draws", "answers"), [(1, ("bad", "good")), (3, ("very very bad", "good"))])
@pytest.mark.parametrize("case", ["best-0", "best-1", "paper", "separate", "fast", "mix-1", "smooth-core"])
def test_training_from_kept_states_is_training_from_the_start(
    config: ModelConfig, tokenizer: Tokenizer, tmp_path: Path, case: str, draws: int, answers: tuple[str, str]
) -> None:
    rows = task_rows(tmp_path, tokenizer, answers)
    method = lively_push(config, case)
    model = on_base(config, method.push)
    kept: list[int] = []
    masks = fixed_masks(rows, tokenizer, draws)
    cache = StateCache(model, masks, method.first_depth, no_autocast, kept.append, method.reads_depths)
    assert kept[-1] == draws * len(rows)
    for step, chunk in ((0, np.arange(9)), (4, np.array([23, 4, 11])), (7, np.array([7]))):
        batch = rows.take(chunk)
        (noised, _), (cached, _) = masks.noise(batch, step), cache.noise(batch, step)
        assert torch.equal(noised.xt, cached.xt) and torch.equal(noised.t, cached.t)
        real = batch.attention_mask
        lower = on_base(config, None).run_blocks(model.embed(noised.xt), noised.attention_mask, 0, method.first_depth)
        assert cached.cached is not None
        assert cached.cached.shape[2] == (method.first_depth + 1 if method.reads_depths else 1)
        # each in its place; one unit of bf16 apart at most, as a product's last bit may depend on the batch's shape
        torch.testing.assert_close(cached.cached[:, :, -1][real], lower[real], rtol=2**-7, atol=1e-5)
        embedded = model.embed(noised.xt)[real].bfloat16().float()
        assert not method.reads_depths or torch.equal(cached.cached[:, :, 0][real], embedded)
        results = []
        for case_noised in (noised, cached):
            for parameter in method.own.values():
                parameter.grad = None
            nll, _ = token_nll(model, case_noised)
            nll.mean().backward()
            results.append((nll.detach(), method.own["places.0.up"].grad.clone()))
        torch.testing.assert_close(results[1][0], results[0][0], atol=0.03, rtol=0.03)
        scale = float(results[0][1].abs().max())
        torch.testing.assert_close(results[1][1], results[0][1], atol=0.05 * scale, rtol=0.05)
    assert len({int(n) for n in rows.lengths[:9]}) > 1, "padding was there"


def test_one_token_answers_are_noised_alike_by_fixed_masks_and_anew(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = task_rows(tmp_path, tokenizer)
    batch = rows.take(np.arange(7))
    uniform = DiffusionConfig(time_sampling="uniform")
    anew, weight = Objective(uniform, tokenizer.mask_id, counted=True, seed=0).noise(batch, 3)
    fixed, same_weight = fixed_masks(rows, tokenizer, 1).noise(batch, 3)
    assert torch.equal(anew.xt, fixed.xt) and torch.equal(anew.is_masked, fixed.is_masked) and weight == same_weight
    assert torch.equal(anew.t, fixed.t) and torch.equal(anew.weight, fixed.weight)


def test_fixed_masks_go_round_by_the_epoch_and_spread_over_t(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = task_rows(tmp_path, tokenizer, ("very very very very bad", "good"))  # 5 tokens
    masks = fixed_masks(rows, tokenizer, 5)
    batch = rows.take(np.arange(len(rows)))
    epochs = [masks.noise(batch, 3 * epoch)[0] for epoch in range(6)]  # 24 rows, 8 a step
    ratio = torch.stack([n.is_masked.sum(1) / 5 for n in epochs])
    for n in epochs:
        torch.testing.assert_close(n.t, n.is_masked.sum(1) / 5)
        assert not (n.is_masked & ~batch.answer_mask).any()
        assert torch.equal(n.xt, torch.where(n.is_masked, tokenizer.mask_id, batch.x0))
    assert torch.equal(epochs[5].xt, epochs[0].xt) and not torch.equal(epochs[1].xt, epochs[0].xt)
    # of five strata of t each has one draw: on average every row sees each count of masks once
    assert (ratio[:5].sort(0).values - torch.arange(1, 6)[:, None] / 5).abs().max() <= 0.2 + 1e-6
    assert len(set(ratio[0].tolist())) == 5, "a step sees all noise levels"
    assert not torch.equal(fixed_masks(rows, tokenizer, 5, seed=1).noise(batch, 0)[0].xt, epochs[0].xt)


def test_many_states_are_kept_in_a_file_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "IN_MEMORY_GB", 1e-7)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    room = cache_module.room_for(3, 40, 2)
    room[1] = torch.randn(40, 2).bfloat16()
    assert room.shape == (3, 40, 2) and room.dtype == torch.bfloat16 and (room[0] == 0).all() and room[1].any()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(TinyldError, match="frozen states cannot be kept in .*gone.*set TMPDIR"):
        cache_module.room_for(3, 40, 2)


CACHE_REASONS = [
    (0, ("bad", "good"), 4.0, "the method changes the first block"),
    (1, ("bad", "very good"), 4.0, "masks vary: the answer has 2 tokens; --mask-draws"),
    (1, ("bad", "good"), 1e-6, "GB of states, --cache-gb allows 1e-06"),
    (1, ("bad", "good"), 0.0, "--cache-gb allows 0"),
    (1, ("bad", "good"), 4.0, None),
]


@pytest.mark.parametrize(("first_depth", "answers", "limit", "reason"), CACHE_REASONS)
def test_states_are_kept_unless_a_reason_is_named(
    tokenizer: Tokenizer, tmp_path: Path, first_depth: int, answers: tuple[str, str], limit: float, reason: str | None
) -> None:
    found = why_not_cached(task_rows(tmp_path, tokenizer, answers), first_depth, 32, limit)
    assert found is None if reason is None else reason in (found or "")


def test_the_size_of_kept_states_is_two_bytes_a_feature(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = task_rows(tmp_path, tokenizer)
    gigabytes = 2 * int(rows.lengths.sum()) * 32 / 2**30
    assert why_not_cached(rows, 1, 32, gigabytes * 1.001) is None
    assert why_not_cached(rows, 1, 32, gigabytes * 0.999) is not None
    assert why_not_cached(rows, 1, 32, gigabytes * 2.999, depths=3) is not None
    assert why_not_cached(rows, 1, 32, gigabytes * 3.001, depths=3) is None
    assert why_not_cached(rows, 1, 32, gigabytes * 5.999, depths=3, mask_draws=2) is not None


@every_case
def test_states_below_first_depth_are_the_frozen_bases_own(config: ModelConfig, case: str) -> None:
    """The promise that the cache rests on."""
    model, base, noised = fresh_base(config), fresh_base(config), noised_batch(config)
    method = attach(model, case)
    train(model, method)
    depth = method.first_depth
    assert depth == (config.num_layers - method.config.blocks if isinstance(method, TrajectoryLora) else 0)
    if depth:
        found, expected = (m.run_blocks(m.embed(noised.xt), noised.attention_mask, 0, depth) for m in (model, base))
        assert torch.equal(found, expected)


# ---------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("places.0.up"), "missing places.0.up"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda t: t.update({"places.0.up": torch.zeros(2, 2)}), r"'places.0.up' has the wrong shape: \(2, 2\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_change_nothing(
    config: ModelConfig, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    method = attach(fresh_base(config), "best-1")
    tensors = {n: torch.ones_like(p) for n, p in method.own.items()}
    change(tensors)
    with pytest.raises(TinyldError, match=message):
        load_exactly(method.own, tensors, Path("adapter.safetensors"))
    assert (method.own["places.1.up"] == 0).all()

"""Frozen weights in bf16 and int8: near the same logits, fewer bytes, and a trajectory adapter that trains on top."""

from __future__ import annotations

import copy

import pytest
import torch
from test_methods import CASES, attach, fresh_base, logits, noised_batch, train
from torch import nn

from tinyld.config import ModelConfig
from tinyld.errors import UsageError
from tinyld.shrink import Int8, shrink, stored_bytes


@pytest.mark.parametrize("seed", range(3))
def test_int8_is_within_half_a_step_of_every_weight_row_by_row(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, 30, generator=generator) * torch.logspace(-4, 3, 7)[:, None]
    weight[3] = 0.0
    values, scale = Int8().right_inverse(weight)
    assert values.dtype == torch.int8 and scale.shape == (7, 1)
    assert ((Int8()(values, scale) - weight).abs() <= weight.abs().amax(1, keepdim=True) / 254 * 1.001).all()


@pytest.mark.parametrize(("dtype", "most", "tolerance"), [("bf16", 0.6, 0.05), ("int8", 0.4, 0.1)])
def test_a_shrunk_base_is_smaller_and_answers_nearly_alike(
    config: ModelConfig, dtype: str, most: float, tolerance: float
) -> None:
    model, noised = fresh_base(config), noised_batch(config)
    size, expected = stored_bytes(model), logits(model, noised)
    shrink(model, dtype)
    assert stored_bytes(model) < most * size
    found = logits(model, noised)
    assert not torch.equal(found, expected)
    assert float((found - expected).abs().mean() / expected.abs().mean()) < tolerance
    assert torch.equal(logits(copy.deepcopy(model), noised), found)
    assert all(not m.weight.requires_grad for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding))


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize("case", [c for c in CASES if c != "full"])
def test_a_method_trains_on_a_shrunk_base_and_leaves_its_bits(config: ModelConfig, case: str, dtype: str) -> None:
    model = fresh_base(config)
    shrink(model, dtype)
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    base, noised = logits(model, noised_batch(config)), noised_batch(config)
    method = attach(model, case)
    assert torch.equal(logits(model, noised), base), "a fresh method changes nothing"
    train(model, method)
    assert not torch.allclose(logits(model, noised), base, atol=1e-3)
    own = {id(p) for p in method.own.values()}
    for name, parameter in model.named_parameters():
        if name in kept and id(parameter) not in own:
            assert torch.equal(parameter, kept[name]), name


def test_an_unknown_type_is_refused(config: ModelConfig) -> None:
    with pytest.raises(UsageError, match="base dtype must be one of fp32, bf16, int8, got 'int4'"):
        shrink(fresh_base(config), "int4")

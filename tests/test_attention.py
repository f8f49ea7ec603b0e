"""Attention by plain products equals torch's fused one, and so do its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyld import attention as module
from tinyld.attention import ShortAttention, attention


def random_heads(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(True)


def some_keys(rows: int, length: int) -> Tensor:
    """Row i cannot read its last i keys."""
    return torch.arange(length)[None, :] < (length - torch.arange(rows))[:, None]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "at_a_time"), [(7, 2**21), (7, 1), (3, 60), (1, 2**21)])
def test_values_and_gradients_are_those_of_torchs_own_in_float64(
    queries: int, at_a_time: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_A_TIME", at_a_time)
    q, k, v = random_heads(3, 2, queries, 4), random_heads(3, 2, 7, 4, seed=1), random_heads(3, 2, 7, 4, seed=2)
    keys = some_keys(3, 7) if masked else None
    bias = torch.where(keys, 0.0, module.HIDDEN).double().repeat_interleave(2, 0)[:, None] if masked else None
    scaled = (q / 2.0).flatten(0, 1)
    found = ShortAttention.apply(scaled, k.flatten(0, 1), v.flatten(0, 1), bias).unflatten(0, (3, 2))
    expected = F.scaled_dot_product_attention(q, k, v, None if keys is None else keys[:, None, None, :])
    torch.testing.assert_close(found, expected)
    upstream = random_heads(3, 2, queries, 4, seed=3).detach()
    for one, other in zip(
        torch.autograd.grad(found, (q, k, v), upstream), torch.autograd.grad(expected, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_gradients_are_the_slopes_of_the_values() -> None:
    q, k, v = (random_heads(2, 3, 2, seed=seed) for seed in range(3))
    assert torch.autograd.gradcheck(lambda *heads: ShortAttention.apply(*heads, None), (q, k, v))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("under_autocast", [False, True])
def test_in_bf16_it_is_as_near_to_exact_attention_as_bf16_allows(masked: bool, under_autocast: bool) -> None:
    """Scores, weights and values are rounded to 8 bits: 2**-7 of values of size 1, twice over."""
    exact = [random_heads(4, 2, 9, 8, seed=seed) for seed in range(3)]
    keys = some_keys(4, 9) if masked else None
    rounded = [x.detach().bfloat16().requires_grad_(True) for x in exact]
    with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
        found = attention(*rounded, keys)
    assert found.dtype == torch.bfloat16 and "ShortAttention" in str(found.grad_fn.next_functions)
    expected = F.scaled_dot_product_attention(*exact, None if keys is None else keys[:, None, None, :])
    torch.testing.assert_close(found.double(), expected, atol=0.03, rtol=0.03)
    found.float().square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(rounded, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(("length", "dtype"), [(module.LONGEST + 1, torch.bfloat16), (9, torch.float32)])
def test_long_rows_and_other_types_are_left_to_torch(length: int, dtype: torch.dtype) -> None:
    q, k, v = (random_heads(1, 1, length, 2, seed=seed, dtype=dtype) for seed in range(3))
    keys = some_keys(1, length)
    assert torch.equal(attention(q, k, v, keys), F.scaled_dot_product_attention(q, k, v, keys[:, None, None, :]))

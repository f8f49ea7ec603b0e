"""Attention by plain products equals torch's fused one, and so do its gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import seeded
from torch import Tensor, nn

from tinyld import attention as module
from tinyld.attention import absorbed, attention


def random_heads(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype).requires_grad_(True)


def some_keys(rows: int, length: int) -> Tensor:
    """Row i cannot read its last i keys."""
    return torch.arange(length)[None, :] < (length - torch.arange(rows))[:, None]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("under_autocast", [False, True])
@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (3.0, 1.0), (0.0, 3.0), (3.0, 3.0)])
def test_bf16_is_about_as_exact_as_torchs_own(offset: float, scale: float, under_autocast: bool, masked: bool) -> None:
    """Keys and values may have a mean, scores be large. Rounding the scores and weights to 8 bits costs at most five
    times torch's error, which keeps them in fp32; seen are 3.1 times."""
    heads = [random_heads(4, 2, 32, 16, seed=seed).detach() for seed in range(3)]
    heads[0] *= scale
    for x, seed in zip(heads[1:], (4, 5), strict=True):
        x += offset * random_heads(1, 2, 1, 16, seed=seed).detach()
    keys = some_keys(4, 32) if masked else None
    mask, upstream = None if keys is None else keys[:, None, None, :], random_heads(4, 2, 32, 16, seed=3).detach()

    def value_and_slopes(function: Any, told: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
        rounded = [x.bfloat16().to(dtype).requires_grad_(True) for x in heads]
        with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast and dtype == torch.bfloat16):
            found = function(*rounded, told)
        assert found.dtype == dtype
        return [found.detach(), *torch.autograd.grad(found, rounded, upstream.bfloat16().to(dtype))]

    exact = value_and_slopes(F.scaled_dot_product_attention, mask, torch.float64)
    ours = value_and_slopes(attention, keys, torch.bfloat16)
    torchs = value_and_slopes(F.scaled_dot_product_attention, mask, torch.bfloat16)
    errors = [
        [float((a.double() - b).norm() / b.norm()) for a, b in zip(of, exact, strict=True)] for of in (ours, torchs)
    ]
    assert all(0 < mine <= 5 * theirs for mine, theirs in zip(*errors, strict=True))
    assert errors[0] != errors[1], "not torch's own"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("queries", [1, 3])
def test_few_queries_read_states_as_they_would_their_keys_and_values(queries: int, bias: bool, masked: bool) -> None:
    torch.manual_seed(0)
    key, value = (nn.Linear(8, 8, bias=bias).double() for _ in range(2))
    q, states, keys = random_heads(3, 2, queries, 4), random_heads(3, 7, 8, seed=1), some_keys(3, 7) if masked else None
    heads = [linear(states).unflatten(-1, (2, 4)).transpose(1, 2) for linear in (key, value)]
    found, expected = absorbed(q, states, key, value, keys), attention(q, *heads, keys)
    torch.testing.assert_close(found, expected)
    upstream = random_heads(3, 2, queries, 4, seed=3).detach()
    torch.testing.assert_close(*(torch.autograd.grad(values, (q, states), upstream) for values in (found, expected)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_scores_and_other_types_are_left_to_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 2 * 9 * 9 - (dtype == torch.bfloat16))
    q, k, v = (random_heads(1, 2, 9, 2, seed=seed, dtype=dtype) for seed in range(3))
    keys = some_keys(1, 9)
    assert torch.equal(attention(q, k, v, keys), F.scaled_dot_product_attention(q, k, v, keys[:, None, None, :]))

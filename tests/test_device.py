"""Where a run computes, in which type, and frozen weights in bf16 and int8."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import fresh_base, refuses, seeded
from test_methods import logits, noised_batch
from torch import nn

from tinyld.block import Linear
from tinyld.config import ModelConfig
from tinyld.device import DTYPES, autocast, fast_dtype, resolve_device, resolve_dtype, shrink, stored_bytes
from tinyld.errors import UsageError

CPU = torch.device("cpu")


@pytest.mark.parametrize(("processor", "fast"), [
    ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, "bf16"),
    ({"cpu_name": "AMD EPYC", "avx512_bf16": False, "amx_bf16": False}, "fp32"),
    ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, "bf16"),
    ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, "fp32"),
    ({}, "fp32"),
])  # fmt: skip
def test_bf16_is_chosen_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch, processor: Any, fast: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    assert fast_dtype(CPU) == fast and resolve_dtype("auto", CPU) == DTYPES[fast]
    for asked in ("bf16", "fp32"):
        with autocast(CPU, resolve_dtype(asked, CPU)):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == DTYPES[asked], "what is asked for is what is taken"


def test_a_gpu_that_torch_cannot_start_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as the driver says, which may be too old
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuses("torch sees 0 CUDA devices", resolve_device, "cuda", kind=UsageError)


@pytest.mark.parametrize(("dtype", "most", "tolerance"), [("bf16", 0.6, 0.05), ("int8", 0.4, 0.1)])
def test_a_shrunk_base_answers_nearly_alike(config: ModelConfig, dtype: str, most: float, tolerance: float) -> None:
    model, noised = fresh_base(config), noised_batch(config)
    size, expected = stored_bytes(model), logits(model, noised)
    shrink(model, dtype)
    assert stored_bytes(model) < most * size
    found = logits(model, noised)
    assert not torch.equal(found, expected)
    assert float((found - expected).abs().mean() / expected.abs().mean()) < tolerance
    assert torch.equal(logits(copy.deepcopy(model), noised), found)
    assert all(not m.weight.requires_grad for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding))


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_product_is_that_of_widened_weights_of_which_the_backward_pass_keeps_no_copy(dtype: str, low: bool) -> None:
    layer, kept = Linear(24, 5000), []
    nn.Linear.reset_parameters(layer)
    shrink(layer, dtype)
    layer = copy.deepcopy(layer)  # whose products are of its own weights
    x = torch.randn(2, 3, 24, requires_grad=True)
    wide, y, bias = layer.weight.detach(), x.detach().requires_grad_(), layer.bias.detach().requires_grad_()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            ours = layer(x)
        theirs = F.linear(y, wide, bias)
        assert torch.equal(ours, theirs) and layer.weight.dtype == (torch.bfloat16 if low else torch.float32)
    own = {p.data_ptr() for p in layer.parameters()}
    assert kept and all(t.data_ptr() in own for t in kept if t.numel() >= wide.numel())
    ours.float().square().sum().backward()
    theirs.float().square().sum().backward()
    rounding = 2**-7 if low else 1e-6  # some rows at a time, so that they add up in another order
    assert float((x.grad - y.grad).abs().max()) <= rounding * float(y.grad.abs().max())
    torch.testing.assert_close(layer.bias.grad, bias.grad)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_matrix_that_changes_is_read_as_it_is_now(frozen: bool) -> None:
    layer, x = Linear(8, 8), torch.randn(3, 8, generator=seeded())
    with torch.no_grad(), autocast(CPU, torch.bfloat16):
        layer.weight.copy_(torch.eye(8)), layer.bias.zero_()
        layer.requires_grad_(not frozen)
        once = layer(x)
        layer.weight.mul_(2.0)
        assert torch.equal(layer(x), 2 * once)
        for number in range(5):
            layer.weight.data = torch.empty(0)  # and then the next may have its address
            layer.weight.data = number * torch.eye(8)
            assert torch.equal(layer(x), number * once)

"""Where a run computes, and in which type."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tinyld.device import autocast, fast_dtype, resolve_device, resolve_dtype
from tinyld.errors import UsageError

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu9", "cuda:x", "meta", "", "cuda:99"])
def test_a_device_that_is_not_there_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="device"):
        resolve_device(name)


def test_half_precision_on_a_processor_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="fp16 needs a GPU"):
        resolve_dtype("fp16", CPU)


@pytest.mark.parametrize(
    ("processor", "fast"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False, "amx_bf16": False}, "fp32"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, "bf16"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_a_processor_computes_in_bf16_only_where_that_is_fast(
    monkeypatch: pytest.MonkeyPatch, processor: dict[str, Any], fast: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    assert fast_dtype(CPU) == fast
    assert resolve_dtype("auto", CPU) == {"bf16": torch.bfloat16, "fp32": torch.float32}[fast]
    assert resolve_dtype("bf16", CPU) == torch.bfloat16, "what is asked for is what is taken"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_are_multiplied_in_the_type_that_was_chosen(dtype: torch.dtype) -> None:
    with autocast(CPU, dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype

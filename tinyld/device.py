"""Where a run computes, in which type, and in how many bits frozen weights are kept."""

import itertools
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tinyld.config import BASE_DTYPES, check, check_choice

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AT_ONCE = 4096  # rows of a matrix that are widened together: those of a vocabulary take more than all else


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a torch device; UsageError when there is none such."""
    known = isinstance(name, str) and re.fullmatch(r"auto|(cpu|cuda)(:[0-9]{1,2})?", name)
    check(bool(known), f"device must be auto, cpu, cuda or cuda:N, as text, got {name!r}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0  # a driver may be too old for torch
        missing = f"device {name!r} asked for, but torch sees {there} CUDA devices; use --device cpu"
        check((device.index or 0) < there, missing)
        if device.index is not None:
            torch.cuda.set_device(device)  # whose name and memory are then asked for
    return device


def fast_dtype(device: torch.device) -> str:
    """bf16 where the hardware is fast at it, else fp16 on a GPU, fp32 on a processor. A processor is with AMX, or with
    AMD's AVX-512 bf16 (training measured 1.7x faster than fp32); Intel's AVX-512 bf16 was measured to be half as fast
    as fp32, and without either a product in bf16 takes seventy times as long."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    amd = str(capabilities.get("cpu_name", "")).startswith("AMD")
    return "bf16" if capabilities.get("amx_bf16") or (amd and capabilities.get("avx512_bf16")) else "fp32"


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The autocast dtype: `auto` is the device's fast one; UsageError where it has none such, or where torch makes
    numbers of another type than float32, or elsewhere than on the processor, by default."""
    check(name != "fp16" or device.type != "cpu", "dtype fp16 needs a GPU; use bf16 or fp32 on a processor")
    check_choice("dtype", name, ("auto", *DTYPES))
    usual = torch.get_default_dtype()
    check(usual == torch.float32, f"torch's default dtype is {usual}; call torch.set_default_dtype(torch.float32)")
    on = torch.get_default_device()
    check(on.type == "cpu", f"torch's default device is {on}; call torch.set_default_device('cpu'), and name one here")
    return DTYPES[fast_dtype(device) if name == "auto" else name]


def autocast(device: torch.device, dtype: torch.dtype | str) -> torch.autocast:
    """Within it products are of that type, torch's or one by name, as `resolve_dtype` reads it."""
    dtype = resolve_dtype(dtype, device) if isinstance(dtype, str) else dtype
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def product_dtype(device: torch.device) -> torch.dtype:
    """What matrices are multiplied in there now: autocast's type where it is on, else float32."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values, scales): x of (..., D) is nearly values * scales, |values| <= 127, with one scale (..., 1) a row."""
    x = x.float()
    scales = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scales).round().to(torch.int8), scales


def from_int8(values: Tensor, scales: Tensor) -> Tensor:
    return values.float().mul_(scales)  # twenty times as fast as values * scales on a processor


class Fewer(nn.Module):
    """A matrix kept in bf16, or in int8 with a scale a row (symmetric, weights only); given in `product_dtype`."""

    def __init__(self, dtype: str):
        super().__init__()
        self.dtype = dtype

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        if self.dtype == "bf16":
            return (weight.to(torch.bfloat16),)  # a tuple: torch lets its parts have types of their own
        return tuple(map(torch.cat, zip(*map(to_int8, weight.split(AT_ONCE)), strict=True)))

    def forward(self, values: Tensor, scales: Tensor | None = None) -> Tensor:
        wide = values if scales is None else from_int8(values, scales)
        return wide.to(product_dtype(values.device))


class Product(torch.autograd.Function):
    """x W^T + bias, of which the backward pass keeps what W is made of, and makes it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, make: nn.Module, *parts: Tensor) -> Tensor:
        ctx.make, ctx.dtype = make, x.dtype
        ctx.save_for_backward(*parts)
        biases = itertools.repeat(None) if bias is None else bias.split(AT_ONCE)
        rows = zip(biases, *(part.split(AT_ONCE) for part in parts), strict=False)
        found = [F.linear(x, make(*some), own) for own, *some in rows]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_bias, *others = ctx.needs_input_grad
        grad_x = None
        if need_x:
            rows = zip(grad.split(AT_ONCE, -1), *(part.split(AT_ONCE) for part in ctx.saved_tensors), strict=True)
            grad_x = sum((g @ ctx.make(*some).to(g.dtype)).float() for g, *some in rows).to(ctx.dtype)
        return grad_x, grad.flatten(0, -2).sum(0).float() if need_bias else None, *(None for _ in others)


def narrow(module: nn.Linear | nn.Embedding, dtype: torch.dtype) -> Tensor:
    """A module's weight as products read it; made once while it is frozen."""
    weight = module.weight
    if weight.dtype == dtype or weight.requires_grad or torch.is_inference_mode_enabled() or weight.is_inference():
        return weight.to(dtype)
    made_of = weight.data_ptr(), weight._version, dtype
    if getattr(module, "_narrow", (None,))[0] != made_of:
        module._narrow = made_of, weight.to(dtype), weight.detach()  # which keeps its address from being used again
    return module._narrow[1]


def product(self: nn.Linear | nn.Embedding, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, or else the module's own; where its weight is kept in fewer bits (shrink), by parts."""
    bias = getattr(self, "bias", None) if bias is None else bias
    if not parametrize.is_parametrized(self):
        return F.linear(x, narrow(self, product_dtype(x.device)), bias)
    kept = self.parametrizations.weight
    return Product.apply(x, bias, kept[0], *(part for _, part in kept.named_parameters(recurse=False)))


def look_up(table: nn.Module, ids: Tensor | slice) -> Tensor:
    """Rows of a module's weight; where that is kept in fewer bits (shrink), only they are widened."""
    if not parametrize.is_parametrized(table):
        return table.weight[ids] if isinstance(ids, slice) else F.embedding(ids, table.weight)
    kept = table.parametrizations.weight
    parts = [part[ids] for _, part in kept.named_parameters(recurse=False)]
    with torch.autocast(parts[0].device.type, enabled=False):
        return kept[0](*parts)


def shrink(model: nn.Module, dtype: str) -> None:
    """Freezes the model's matrices and embeddings and keeps them in `dtype`, widened whenever they are used."""
    check_choice("base dtype", dtype, BASE_DTYPES)
    if dtype == "fp32":
        return
    for module in list(model.modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.requires_grad_(False)
            parametrize.register_parametrization(module, "weight", Fewer(dtype), unsafe=True)


def stored_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())

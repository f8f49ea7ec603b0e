"""Attention, softmax(q k^T / sqrt(head width)) v, its windows, and rotary positions.

Short sequences in bf16 on a processor, where torch's fused one takes two to four times as long, its backward pass above
all, are plain batched products, a few heads at a time so that their scores stay in the cache. torch does all else.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld.config import ModelConfig
from tinyld.device import narrow

MOST = 2**25  # scores of a batch: its backward pass reads as many weights, 64 MB
AT_A_TIME = 2**21  # scores
HIDDEN = -1e4  # added to the score of a key that must not be read: its weight is then 0


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, window: int = 0, positions: Tensor | None = None
) -> Tensor:
    """Each query's mean of the values. q: (B, H, M, W), k and v: (B, H, L, W), key_mask: (B, L) bool -> (B, H, M, W). A
    row needs at least one key that it may read. With a `window` a query reads keys at most half of it away; positions:
    (B, M) of the M queries, where they are not all L."""
    if window and k.shape[2] - 1 > window // 2:
        places = torch.arange(k.shape[2], device=k.device)
        asking = places[None] if positions is None else positions
        distance = (asking[:, :, None] - places).abs()  # (B or 1, M, L)
        near = distance <= window // 2
        if key_mask is not None:  # padding reads itself alone, so that every query reads something
            near = near & key_mask[:, None, :] | (distance == 0)
        return F.scaled_dot_product_attention(q, k, v, near[:, None])
    batch, heads, queries, width = q.shape
    is_short = batch * heads * queries * k.shape[2] <= MOST and not torch.compiler.is_compiling()
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or not is_short:
        return F.scaled_dot_product_attention(q, k, v, None if key_mask is None else key_mask[:, None, None, :])
    bias = None
    if key_mask is not None:
        bias = torch.zeros(key_mask.shape, dtype=q.dtype).masked_fill(~key_mask, HIDDEN)
        bias = bias.repeat_interleave(heads, dim=0)[:, None, :]  # (B H, 1, L)
    q, k, v = (q * width**-0.5).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    # One vector taken from all keys shifts a query's scores alike, one taken from all values is given back: without
    # their means both are small, and lose less to bf16.
    k, offset = k - k.detach().mean(1, keepdim=True), v.detach().mean(1, keepdim=True)
    return (ShortAttention.apply(q, k, v - offset, bias) + offset).unflatten(0, (batch, heads))


def absorbed(q: Tensor, states: Tensor, key: nn.Linear, value: nn.Linear, key_mask: Tensor | None) -> Tensor:
    """`attention` to the keys and values that two Linears make of states (B, L, D). Few queries cost less so: they are
    taken through the keys' matrix, and what they read of the states through the values', so that neither is made at
    every position. The keys' bias, and a state taken from all, shift a query's scores alike."""
    heads, width = q.shape[1], q.shape[-1]
    of_keys, of_values = (narrow(linear, q.dtype).unflatten(0, (heads, width)) for linear in (key, value))  # (H, W, D)
    offset = states.mean(1, keepdim=True)
    states = states - offset
    scores = torch.einsum("bhmd,bld->bhml", torch.einsum("bhmw,hwd->bhmd", q * width**-0.5, of_keys), states)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], HIDDEN)
    read = torch.einsum("bhml,bld->bhmd", scores.softmax(-1).to(q.dtype), states) + offset[:, None]
    mixed = torch.einsum("bhmd,hwd->bhmw", read, of_values)
    return mixed if value.bias is None else mixed + value.bias.to(q.dtype).unflatten(0, (heads, width))[:, None]


class ShortAttention(torch.autograd.Function):
    """softmax(q k^T + bias) v for N heads. q: (N, M, W), k and v: (N, L, W), bias: (N, 1, L) -> (N, M, W)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        mixed = torch.empty_like(q, memory_format=torch.contiguous_format)
        weights = q.new_empty(q.shape[0], q.shape[1], k.shape[1])
        for some in parts(q, k):
            torch.bmm(q[some], k[some].mT, out=weights[some])
            if bias is not None:
                weights[some] += bias[some]
            torch.softmax(weights[some], -1, out=weights[some])
            torch.bmm(weights[some], v[some], out=mixed[some])
        ctx.save_for_backward(q, k, v, mixed, weights)
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mixed, weights = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        frozen = not any(ctx.needs_input_grad[1:3])
        along = (grad * mixed).sum(-1, keepdim=True)  # sum over keys of weight * its gradient: (N, M, 1)
        for some in parts(q, k):
            grad_scores = torch.bmm(grad[some], v[some].mT).sub_(along[some]).mul_(weights[some])
            torch.bmm(grad_scores, k[some], out=grad_q[some])
            if not frozen:
                torch.bmm(weights[some].mT, grad[some], out=grad_v[some])
                torch.bmm(grad_scores.mT, q[some], out=grad_k[some])
        return (grad_q, None, None, None) if frozen else (grad_q, grad_k, grad_v, None)


def parts(q: Tensor, k: Tensor) -> Iterator[slice]:
    """The heads, as many at a time as the cache holds the scores of."""
    step = max(1, AT_A_TIME // max(1, q.shape[1] * k.shape[1]))
    return (slice(start, start + step) for start in range(0, len(q), step))


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the rotary position angles, each (max_length, kinds, head width) (RoFormer, arXiv 2104.09864). Kind
    0 is of blocks that read the whole row, kind 1 of local ones, where there are any."""
    angles, width = [], config.width_of_head
    for theta in (config.rope_theta, config.local_theta) if config.local_window else (config.rope_theta,):
        frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        angle = torch.arange(config.max_length, dtype=torch.float32)[:, None] * frequency[None, :]
        angles.append(torch.cat([angle, angle], dim=-1))
    angle = torch.stack(angles, 1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions applied to x: (B, H, L, head width)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin

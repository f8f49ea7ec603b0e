"""Attention of short sequences in bf16 on a processor, where torch's fused one takes two to four times as long, its
backward pass above all: plain batched products, a few heads at a time so that their scores stay in the cache.

softmax(q k^T / sqrt(head width)) v, as in `F.scaled_dot_product_attention`, which does all else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST = 512  # beyond it the weights, which the backward pass reads, take more memory than they are worth
AT_A_TIME = 2**21  # scores
HIDDEN = -1e4  # added to the score of a key that must not be read: its weight is then 0


def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Each query's mean of the values. q: (B, H, M, W), k and v: (B, H, L, W), key_mask: (B, L) bool -> (B, H, M, W).

    A row needs at least one key that it may read.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or k.shape[2] > LONGEST:
        return F.scaled_dot_product_attention(q, k, v, None if key_mask is None else key_mask[:, None, None, :])
    bias = None
    if key_mask is not None:
        bias = torch.zeros(key_mask.shape, dtype=q.dtype).masked_fill_(~key_mask, HIDDEN)
        bias = bias.repeat_interleave(q.shape[1], dim=0)[:, None, :]  # (B H, 1, L)
    q = q * q.shape[-1] ** -0.5
    mixed = ShortAttention.apply(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias)
    return mixed.unflatten(0, (-1, v.shape[1]))


class ShortAttention(torch.autograd.Function):
    """softmax(q k^T + bias) v for N heads. q: (N, M, W), k and v: (N, L, W), bias: (N, 1, L) or None -> (N, M, W)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        weights = q.new_empty(len(q), q.shape[1], k.shape[1])
        mixed = torch.empty_like(q)
        for some in heads_at_a_time(weights):
            scores = weights[some]
            torch.bmm(q[some], k[some].mT, out=scores)
            if bias is not None:
                scores += bias[some]
            torch.softmax(scores, -1, out=scores)
            torch.bmm(scores, v[some], out=mixed[some])
        ctx.save_for_backward(q, k, v, weights, mixed)
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, mixed = ctx.saved_tensors
        along = (grad * mixed).sum(-1, keepdim=True)  # sum_j of weight_j * d loss / d weight_j, (N, M, 1)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for some in heads_at_a_time(weights):
            torch.bmm(weights[some].mT, grad[some], out=grad_v[some])
            grad_scores = torch.bmm(grad[some], v[some].mT).sub_(along[some]).mul_(weights[some])
            torch.bmm(grad_scores, k[some], out=grad_q[some])
            torch.bmm(grad_scores.mT, q[some], out=grad_k[some])
        return grad_q, grad_k, grad_v, None


def heads_at_a_time(weights: Tensor) -> list[slice]:
    step = max(1, AT_A_TIME // max(1, weights[0].numel()))
    return [slice(start, start + step) for start in range(0, len(weights), step)]

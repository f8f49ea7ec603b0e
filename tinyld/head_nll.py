"""The loss over a large vocabulary, with a backward pass of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class HeadNLL(torch.autograd.Function):
    """-log softmax(h @ weight.T + bias)[target] for each of N rows, with one pass over the (N, V) logits.

    On two cores the vocabulary's softmax is the largest single cost of pretraining. What is kept is softmax - onehot,
    and the incoming gradient scales the small (N, D) factors: no second softmax and no other (N, V) product.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        logits = F.linear(h, weight, bias)  # (N, V)
        probs = torch.softmax(logits, dim=1)
        rows = torch.arange(len(target), device=target.device)
        exact = torch.promote_types(probs.dtype, torch.float32)
        p = probs[rows, target].to(exact)
        probs[rows, target], rest = 0.0, 1.0 - p  # what all others have
        if bool((sure := p > 0.5).any()):  # 1 - p is added up, as bf16 has few numbers below 1
            rest[sure] = probs[sure].sum(1, dtype=exact)
        if logits.dtype == torch.float16:  # whose smallest probability, 6e-8, is 17 nats
            nll = F.cross_entropy(logits.float(), target, reduction="none")
        else:
            nll = torch.where(sure, -torch.log1p(-rest), -torch.log(p.clamp(min=1e-30)))
        probs[rows, target] = -rest.to(probs.dtype)
        ctx.save_for_backward(h, weight, probs)
        return nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, probs = ctx.saved_tensors
        grad = grad.to(probs.dtype)
        need_h, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_h = (probs @ weight) * grad[:, None] if need_h else None
        grad_weight = probs.T @ (h * grad[:, None]) if need_weight else None
        grad_bias = (grad[None, :] @ probs).squeeze(0) if need_bias else None
        return grad_h, grad_weight, grad_bias, None

"""Attention, softmax(q k^T / sqrt(head width)) v, its windows, and rotary positions.

Short sequences in bf16 on a processor, where torch's fused one takes two to five times as long, its backward pass above
all, are plain products. torch does all else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld.config import ModelConfig
from tinyld.device import narrow

MOST = 2**25  # scores of a batch: its backward pass reads as many weights, 64 MB
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
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or batch * heads * queries * k.shape[2] > MOST:
        return F.scaled_dot_product_attention(q, k, v, None if key_mask is None else key_mask[:, None, None, :])
    # One vector taken from all keys shifts a query's scores alike, one taken from all values is given back: without
    # their means both are small, and lose less to bf16.
    k, offset = k - k.detach().mean(2, keepdim=True), v.detach().mean(2, keepdim=True)
    scores = (q * width**-0.5) @ k.mT
    if key_mask is not None:
        scores.masked_fill_(~key_mask[:, None, None, :], HIDDEN)
    return scores.softmax(-1) @ (v - offset) + offset


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
        scores.masked_fill_(~key_mask[:, None, None, :], HIDDEN)
    read = torch.einsum("bhml,bld->bhmd", scores.softmax(-1).to(q.dtype), states) + offset[:, None]
    mixed = torch.einsum("bhmd,hwd->bhmw", read, of_values)
    return mixed if value.bias is None else mixed + value.bias.to(q.dtype).unflatten(0, (heads, width))[:, None]


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

"""What families of denoisers have in different ways: norms, activations, rotary positions, windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tinyld.attention import attention
from tinyld.config import ModelConfig


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.norm_bias)


def look_up(embedding: nn.Module, ids: Tensor | slice) -> Tensor:
    """Embeddings of ids; where the table is kept in fewer bits (device.shrink), only their rows are widened."""
    if not parametrize.is_parametrized(embedding):
        return embedding.weight[ids] if isinstance(ids, slice) else embedding(ids)
    kept = embedding.parametrizations.weight
    parts = [part[ids] for _, part in kept.named_parameters(recurse=False)]
    with torch.autocast(parts[0].device.type, enabled=False):
        return kept[0](*parts)


def activate(x: Tensor, name: str, gated: bool) -> Tensor:
    """The MLP's activation: (..., F), or with a gate (..., 2 F) -> (..., F), activation(first half) * second half."""
    x, gate = x.chunk(2, dim=-1) if gated else (x, None)
    x = F.silu(x) if name == "silu" else F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
    return x if gate is None else x * gate


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the rotary position angles, each (max_length, kinds, head width) (RoFormer, arXiv 2104.09864).

    Kind 0 is of blocks that read the whole row, kind 1 of local ones, where there are any.
    """
    tables = []
    for theta in (config.rope_theta, config.local_theta) if config.local_window else (config.rope_theta,):
        width = config.width_of_head
        frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        angle = torch.arange(config.max_length, dtype=torch.float32)[:, None] * frequency[None, :]
        angle = torch.cat([angle, angle], dim=-1)
        tables.append((angle.cos(), angle.sin()))
    return torch.stack([cos for cos, _ in tables], 1), torch.stack([sin for _, sin in tables], 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions applied to x: (B, H, L, head width)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def near_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, window: int, positions: Tensor | None = None
) -> Tensor:
    """`attention`, in which with a `window` a query reads keys at most half of it away. positions: (B, M) of the M
    queries, where they are not all L."""
    length = k.shape[2]
    if not window or length - 1 <= window // 2:
        return attention(q, k, v, key_mask)
    places = torch.arange(length, device=k.device)
    asking = places[None] if positions is None else positions
    distance = (asking[:, :, None] - places).abs()  # (B or 1, M, L)
    near = distance <= window // 2
    if key_mask is not None:  # padding reads itself alone, so that every query reads something
        near = near & key_mask[:, None, :] | (distance == 0)
    return F.scaled_dot_product_attention(q, k, v, near[:, None])

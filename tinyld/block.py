"""A transformer block, the same for all families of models: what it is like, its config says.

Methods meet it at two seams: `Block.after_attention` and `Block.after_mlp`, identities that may be replaced by modules;
and every Linear, which is *called* (so it can be wrapped), and every bias.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld.attention import absorbed, attention, rotate
from tinyld.config import ModelConfig
from tinyld.device import product, product_dtype

LINEARS = ("query", "key", "value", "out", "up", "down")  # the matrices of a block
Angles = tuple[Tensor, Tensor]  # (cos, sin) of rotary positions, both (L, kinds of block, head width)
Pair = tuple[Tensor, Tensor]  # keys and values


def take(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, L, D) at positions (B, M) -> (B, M, D)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.norm_bias)


class Linear(nn.Linear):
    """Has no numbers of its own to begin with, which take longer than to read those of a base: see Denoiser."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return product(self, x)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        pass


class Block(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)); or norm(h + attention(h)), then norm(h + mlp(h)). h: (B, L, D)."""

    def __init__(self, config: ModelConfig, index: int = 0):
        super().__init__()
        self.config, self.norm_first = config, config.norm_first
        self.is_local = config.local_window > 0 and index % config.global_every != 0  # it reads near tokens only
        bare = index == 0 and not config.first_norm
        bias = {"up": config.mlp_bias, "down": config.mlp_bias, "out": config.out_bias}
        linear = {n: Linear(*size, bias=bias.get(n, config.qkv_bias)) for n, size in config.matrices().items()}
        self.attention_norm = nn.Identity() if bare else make_norm(config, config.d_model)
        self.query, self.key, self.value = linear["query"], linear["key"], linear["value"]
        norm = functools.partial(nn.RMSNorm, config.width_of_head, eps=config.norm_eps)
        self.query_norm, self.key_norm = (norm(), norm()) if config.head_norms else (None, None)
        self.out = linear["out"]
        self.mlp_norm = make_norm(config, config.d_model)
        self.up, self.down = linear["up"], linear["down"]
        self.after_attention: nn.Module = nn.Identity()
        self.after_mlp: nn.Module = nn.Identity()

    def heads(self, x: Tensor) -> Tensor:
        """(B, L, H * head width) -> (B, H, L, head width)"""
        return x.unflatten(-1, (-1, self.config.width_of_head)).transpose(1, 2)

    def placed(
        self, x: Tensor, norm: nn.Module | None, angles: Angles | None, positions: Tensor | None = None
    ) -> Tensor:
        """Heads of queries or keys, normed and rotated as their positions are: all, or `positions` (B, M) alone."""
        x = self.heads(x)
        x = x if norm is None else norm(x.float()).to(x.dtype)
        if angles is None:
            return x
        own = [angle[:, int(self.is_local)] for angle in angles]
        return rotate(x, *(own if positions is None else [angle[positions][:, None] for angle in own]))

    def keys_values(self, h: Tensor, angles: Angles | None) -> Pair:
        """Both (B, H, L, head width), of normed states h (B, L, D)."""
        k, v = self.placed(self.key(h), self.key_norm, angles), self.heads(self.value(h))
        groups = self.config.num_heads // k.shape[1]
        return (k, v) if groups == 1 else (k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))

    @torch.no_grad()
    def readable(self, h: Tensor, asked: int, angles: Angles | None) -> Tensor | Pair:
        """What `asked` queries a row read of frozen states h (B, L, D): their keys and values or, where these are but
        products of them and `absorbed` multiplies less, the normed states."""
        h = (self.attention_norm(h) if self.norm_first else h).to(product_dtype(h.device))
        (length, width), config = h.shape[1:], self.config
        is_plain = not (config.rotary or config.head_norms or self.is_local)
        is_plain = is_plain and config.kv_heads in (0, config.num_heads)
        if is_plain and asked * (width + config.num_heads * length) < length * width:
            return h
        return self.keys_values(h, angles)

    def attend(
        self, h: Tensor, angles: Angles | None, key_mask: Tensor | None, positions: Tensor | None,
        frozen: Tensor | Pair | None,
    ) -> Tensor:  # fmt: skip
        h = h.to(product_dtype(h.device))  # once, not in each of the products
        asking = h if positions is None or frozen is not None else take(h, positions)
        q = self.placed(self.query(asking), self.query_norm, angles, positions)
        if isinstance(frozen, Tensor):
            mixed = absorbed(q, frozen, self.key, self.value, key_mask)
        else:
            k, v = self.keys_values(h, angles) if frozen is None else frozen
            mixed = attention(q, k, v, key_mask, self.config.local_window if self.is_local else 0, positions)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def mlp(self, h: Tensor) -> Tensor:
        x, gate = self.up(h).chunk(2, dim=-1) if self.config.gated else (self.up(h), None)
        name = self.config.activation
        x = F.silu(x) if name == "silu" else F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
        return self.down(x if gate is None else x * gate)

    def forward(
        self, h: Tensor, angles: Angles | None, key_mask: Tensor | None, positions: Tensor | None = None,
        frozen: Tensor | Pair | None = None,
    ) -> Tensor:  # fmt: skip
        """With `positions` (B, M) only their states are computed, (B, M, D): the others give keys and values. Where
        what is `readable` of all positions is given, `frozen`, h is (B, M, D) too."""
        here = h if positions is None or frozen is not None else take(h, positions)
        h = self.attention_norm(h) if self.norm_first else h
        h = here + self.after_attention(self.attend(h, angles, key_mask, positions, frozen))
        if self.norm_first:
            return h + self.after_mlp(self.mlp(self.mlp_norm(h)))
        h = self.attention_norm(h)
        return self.mlp_norm(h + self.after_mlp(self.mlp(h)))

"""The denoiser: a bidirectional transformer from noised ids to token logits; pre-norm and rotary by default.

It knows nothing of schedules, tasks or methods. Methods meet it at three seams:
  - `Block.after_attention` and `Block.after_mlp`, identities that may be replaced by modules;
  - every Linear of a block, which is *called* (so it can be wrapped), and every bias;
  - `Denoiser.push`, which may change the residual stream before any block and after the last one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from tinyld.attention import attention, rotary_tables, rotate
from tinyld.config import ModelConfig
from tinyld.device import look_up, product, product_dtype

LINEARS = ("query", "key", "value", "out", "up", "down")  # the matrices of a block
Angles = tuple[Tensor, Tensor]  # (cos, sin) of rotary positions, both (L, kinds of block, head width)
# push_at(depth, h, positions=None): what is added to the states h before block `depth` (num_layers: the final ones).
# h is (B, L, D), or (B, M, D) where the pass has computed M positions of a row alone; so is the result. With
# `positions` (B, M) h has all L, and only what is added at those is returned, (B, M, D).
PushAt = Callable[..., Tensor]


class Push(Protocol):
    """What may be hung on `Denoiser.push`: it adds to the states at its sites, one a depth.

    The states before block `first_depth` are the frozen base's own, so they may be kept and given back as `cached`.
    """

    first_depth: int  # of the lowest site
    reads_depths: bool  # it also reads the states below, as `history` has them
    reads_others: bool  # on the final state it reads other positions than the one it pushes, so all are computed

    def start(self, t: Tensor, prompt_mask: Tensor, history: Sequence[Tensor]) -> PushAt:
        """The function that one pass calls at every depth from `first_depth` to num_layers, in order.

        With `reads_depths`, `history` grows as the pass goes: at a call with depth d it has at least the states of
        those `depths_read` that are below d, unpushed at their own depth.
        """
        ...


def depths_read(num_layers: int) -> list[int]:
    """The depths (0: before the first block, num_layers: the final state) that a push which reads several is given:
    all, or where there are many 8 of them, as each is a state a token to compute and keep."""
    return sorted({round(i * num_layers / 7) for i in range(8)})


def take(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, L, D) at positions (B, M) -> (B, M, D)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def few_positions(where: Tensor) -> tuple[Tensor, Tensor] | None:
    """(positions, is_asked), both (B, M): those that `where` (B, L) bool asks for, from left to right; a row that asks
    for fewer than M has others as well. None where M is 0, or more than half of L: all are as cheap."""
    most = int(where.sum(1).max()) if len(where) else 0
    if not 0 < 2 * most <= where.shape[1]:
        return None
    positions = where.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return positions, where.gather(1, positions)


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.norm_bias)


class Linear(nn.Linear):
    """Has no numbers of its own to begin with, which take longer than to read those of a base: see Denoiser."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        pass


class Block(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)); or norm(h + attention(h)), then norm(h + mlp(h)). h: (B, L, D)."""

    def __init__(self, config: ModelConfig, index: int = 0):
        super().__init__()
        self.config, self.norm_first, self.is_local = config, config.norm_first, config.is_local(index)
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

    def attend(
        self, h: Tensor, angles: Angles | None, key_mask: Tensor | None, positions: Tensor | None = None
    ) -> Tensor:
        """(B, L, D), or (B, M, D) for the queries of `positions` (B, M) alone."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.config.width_of_head)).transpose(1, 2)  # (B, H, L, head width)

        h = h.to(product_dtype(h.device))  # once, not in each of the products
        asking = h if positions is None else take(h, positions)
        q, k, v = heads(self.query(asking)), heads(self.key(h)), heads(self.value(h))
        if self.query_norm is not None:
            q, k = self.query_norm(q.float()).to(v.dtype), self.key_norm(k.float()).to(v.dtype)
        if angles is not None:
            angles = [angle[:, int(self.is_local)] for angle in angles]
            q = rotate(q, *(angles if positions is None else (angle[positions][:, None] for angle in angles)))
            k = rotate(k, *angles)
        if k.shape[1] < q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        mixed = attention(q, k, v, key_mask, self.config.local_window if self.is_local else 0, positions)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def mlp(self, h: Tensor) -> Tensor:
        x, gate = self.up(h).chunk(2, dim=-1) if self.config.gated else (self.up(h), None)
        name = self.config.activation
        x = F.silu(x) if name == "silu" else F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
        return self.down(x if gate is None else x * gate)

    def forward(
        self, h: Tensor, angles: Angles | None, key_mask: Tensor | None, positions: Tensor | None = None
    ) -> Tensor:
        """With `positions` (B, M) only their states are computed, (B, M, D): the others give keys and values."""
        here = h if positions is None else take(h, positions)
        if self.norm_first:
            h = here + self.after_attention(self.attend(self.attention_norm(h), angles, key_mask, positions))
            return h + self.after_mlp(self.mlp(self.mlp_norm(h)))
        h = self.attention_norm(here + self.after_attention(self.attend(h, angles, key_mask, positions)))
        return self.mlp_norm(h + self.after_mlp(self.mlp(h)))


class Denoiser(nn.Module):
    """p(x0 | xt): logits over the vocabulary for every position asked for."""

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        d, e = config.d_model, config.embedding_width
        self.embedding = Embedding(config.vocab_size, e)
        self.positions = None if config.rotary else Embedding(config.max_length, e)
        self.embedding_norm = make_norm(config, e) if config.embedding_norm else nn.Identity()
        self.embedding_projection = Linear(e, d) if config.projected else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.final_norm = make_norm(config, d) if config.norm_first else nn.Identity()
        self.head_transform: nn.Module = nn.Identity()
        if config.head_transform:
            dense = Linear(d, e, bias=config.mlp_bias)
            self.head_transform = nn.Sequential(dense, nn.GELU(), make_norm(config, e))
        rows = config.head_rows or config.vocab_size
        self.output = None if config.tied else Linear(e, rows, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(rows)) if config.head_bias else None
        if config.rotary:
            cos, sin = rotary_tables(config)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.push: Push | None = None
        self._narrow: tuple[Any, Tensor] | None = None  # see `narrow`
        self.recompute = False  # blocks keep no activations for the backward pass, and run again in it
        if generator is not None:  # else they are to be loaded
            self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Normal(0, 0.02) matrices, residual outputs scaled by 1/sqrt(2 num_layers) (GPT-2); biases 0, norms 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                std = 0.02 / (2 * self.config.num_layers) ** 0.5 if residual else 0.02
                parameter.normal_(0.0, std, generator=generator)
            elif name.endswith("weight"):  # of a norm
                parameter.fill_(1.0)
            else:
                parameter.zero_()

    def embed(self, xt: Tensor) -> Tensor:
        """Token embeddings. xt: (B, L) int64 -> (B, L, D)."""
        h = look_up(self.embedding, xt)
        if self.config.embedding_scale != 1.0:
            h = h * self.config.embedding_scale
        if self.positions is not None:
            h = h + look_up(self.positions, slice(xt.shape[1]))
        return self.embedding_projection(self.embedding_norm(h)).float()  # of autocast's type, where it is a product

    def run_blocks(
        self, h: Tensor, attention_mask: Tensor | None, start: int, stop: int, push_at: PushAt | None = None,
        history: list[Tensor] | None = None, positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """States before block `stop`, from states `h` (B, L, D) before block `start`.

        attention_mask: (B, L) bool, or None when no position is padding. The states before those blocks that run and
        are `depths_read` are appended to `history`. With `positions` (B, M) the model's last block computes those
        alone, (B, M, D).
        """
        length, dtype, reads = h.shape[1], product_dtype(h.device), depths_read(self.config.num_layers)
        angles = (self.cos[:length].to(dtype), self.sin[:length].to(dtype)) if self.config.rotary else None
        for depth in range(start, stop):
            if history is not None and depth in reads:
                history.append(h)
            if push_at is not None:
                h = h + push_at(depth, h)
            block, asked = self.blocks[depth], positions if depth == self.config.num_layers - 1 else None
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(block, h, angles, attention_mask, asked, use_reentrant=False)
            else:
                h = block(h, angles, attention_mask, asked)
        return h

    def states(
        self, xt: Tensor, t: Tensor | None = None, attention_mask: Tensor | None = None,
        prompt_mask: Tensor | None = None, cached: Tensor | None = None, where: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Final states (B, L, D), before the final norm and the head's transform; with `where` (B, L) bool those of
        its N positions, (N, D), row by row: where they are few, the last block computes no others. In a shifted model
        position i has the state at i - 1, and position 0 its own.

        `cached` (B, L, K, D) are states computed earlier on the same xt, so that nothing below block
        `push.first_depth` runs again: those before it (K = 1) or, for a push that reads depths, of those up to it.
        t: (B,) and prompt_mask: (B, L) bool are what the push is told; the base ignores both.
        """
        push, last, shifted = self.push, self.config.num_layers, self.config.shifted
        if push is not None and (t is None or prompt_mask is None):
            raise ValueError("a denoiser with a push needs t and prompt_mask")
        first = last if push is None else push.first_depth
        few = None if where is None else few_positions(where)
        positions = None if few is None else (few[0] - int(shifted)).clamp(min=0)
        whole = push is not None and (push.reads_others or first == last)  # the last block is then computed whole
        narrow, history = None if whole else positions, []
        kept = history if push is not None and push.reads_depths else None
        if cached is None:
            h = self.run_blocks(self.embed(xt), attention_mask, 0, first, history=kept, positions=narrow)
        else:
            *below, h = cached.unbind(2)
            history += below
        if push is not None:
            push_at = push.start(t, prompt_mask, history)
            h = self.run_blocks(h, attention_mask, first, last, push_at, kept, narrow)
            if whole and positions is not None:
                h = take(h, positions) + push_at(last, h, positions)
            else:
                h = h + push_at(last, h)
        if positions is not None:
            return h[few[1]]
        h = torch.cat([h[:, :1], h[:, :-1]], 1) if shifted else h
        return h if where is None else h[where]

    @property
    def device(self) -> torch.device:
        """Of its first parameter: a `weight` that is kept in fewer bits is widened by asking for it."""
        return next(self.parameters()).device

    def rows_at_once(self, length: int, most: int, asked: int = 0) -> int:
        """How many rows of `length` tokens, `most` of them, a pass without gradient takes: their states of all depths,
        which a push may read, and three copies of the logits of `asked` tokens have half a gigabyte."""
        row = 4 * length * self.config.d_model * (self.config.num_layers + 1)  # bytes
        row += 12 * asked * self.config.vocab_size
        return max(1, min(most, (1 << 29) // row))

    @property
    def vocabulary(self) -> nn.Module:
        """What has the matrix that gives the logits: (V, E), or fewer rows where the last ids have none."""
        return self.embedding if self.output is None else self.output

    def head(self, h: Tensor, only: Tensor | None = None) -> Tensor:
        """Vocabulary logits (..., V) of final states (..., D); or those of the tokens `only` (n,) alone, (..., n), in
        fp32 whatever autocast says: in bf16 one in ten of near labels is level with another."""
        if only is not None:
            with torch.autocast(h.device.type, enabled=False):
                z, bias = self.head_transform(self.final_norm(h.float())), self.output_bias
                return F.linear(z, look_up(self.vocabulary, only), None if bias is None else bias[only])
        logits = product(self.vocabulary, self.head_transform(self.final_norm(h)), self.output_bias)
        missing = self.config.vocab_size - logits.shape[-1]
        return F.pad(logits, (0, missing), value=-torch.inf) if missing else logits

    def nll(self, h: Tensor, target: Tensor) -> Tensor:
        """-log p(target), in nats, for final states h (N, D) and target ids (N,) -> (N,) fp32."""
        if parametrize.is_parametrized(self.vocabulary):
            return F.cross_entropy(self.head(h).float(), target, reduction="none")
        dtype, bias = product_dtype(h.device), self.output_bias
        h = self.head_transform(self.final_norm(h)).to(dtype)
        with torch.autocast(h.device.type, enabled=False):
            weight = self.narrow(self.vocabulary.weight, dtype)
            return head_nll(h, weight, None if bias is None else bias.to(dtype), target)

    def narrow(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The vocabulary's matrix as products read it; made once while it is frozen."""
        if weight.requires_grad or weight.dtype == dtype:
            return weight.to(dtype)
        made_of = weight.data_ptr(), weight._version, dtype
        if self._narrow is None or self._narrow[0] != made_of:
            self._narrow = made_of, weight.to(dtype)
        return self._narrow[1]

    def forward(self, *given: Any, **told: Any) -> Tensor:
        """Logits (B, L, V), or (N, V) for the N positions of `where`, of what `states` is given."""
        return self.head(self.states(*given, **told))


def head_nll(h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """-log softmax(h @ weight.T + bias)[target] for each of N rows, with one pass over the (N, V) logits.

    On two cores the vocabulary's softmax is the largest single cost of pretraining. What is kept of it is softmax -
    onehot, by which the result is linear in h, weight and bias: no second softmax and no other (N, V) product.
    """
    rows = torch.arange(len(target), device=target.device)
    with torch.no_grad():
        logits = F.linear(h, weight, bias)
        probs = logits.softmax(1)
        exact = torch.promote_types(probs.dtype, torch.float32)
        p = probs[rows, target].to(exact)
        probs[rows, target], rest = 0.0, 1.0 - p  # what all others have
        if bool((sure := p > 0.5).any()):  # 1 - p is added up, as bf16 has few numbers below 1
            rest[sure] = probs[sure].sum(1, dtype=exact)
        nll = torch.where(sure, -torch.log1p(-rest), -torch.log(p.clamp(min=1e-30)))
        if logits.dtype == torch.float16:  # whose smallest probability, 6e-8, is 17 nats
            nll = F.cross_entropy(logits.float(), target, reduction="none")
        probs[rows, target] = -rest.to(probs.dtype)
    if not torch.is_grad_enabled():
        return nll
    slope = (h * (probs @ weight)).sum(1, dtype=exact) + (0.0 if bias is None else probs @ bias)
    return nll + (slope - slope.detach())

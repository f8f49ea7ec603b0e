"""The denoiser: a bidirectional transformer from noised ids to token logits; pre-norm and rotary by default.

It knows nothing of schedules, tasks or methods. Methods meet it at four seams:
  - `Block.after_attention` and `Block.after_mlp`, identities that may be replaced by modules;
  - every Linear of a block, which is *called* (so it can be wrapped), and every bias;
  - `Denoiser.clock`, which is told t before every forward pass;
  - `Denoiser.push`, which may change the residual stream before any block, within it (between attention and MLP) and
    after the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyld.config import ModelConfig
from tinyld.layers import activate, look_up, make_norm, near_attention, rotary_tables, rotate, shifted_by_one

LINEARS = ("query", "key", "value", "out", "up", "down")  # the matrices of a block
Angles = tuple[Tensor, Tensor]  # (cos, sin) of rotary positions, both (L, kinds of block, head width)


class PushAt(Protocol):
    """(depth, h) -> what is added to h, both (B, L, D), or (B, M, D) in and after a last block that computes M places
    of a row alone; depth d is before block d, d + 1/2 within it. `places` (B, M): those of h (B, L, D) that it is
    wanted for, (B, M, D)."""

    def __call__(self, depth: float, h: Tensor, places: Tensor | None = None) -> Tensor: ...


class Push(Protocol):
    """What may be hung on `Denoiser.push`."""

    @property
    def first_depth(self) -> int:
        """States before this block are the frozen base's own."""
        ...

    @property
    def pushes_within(self) -> bool:
        """Whether it is called within blocks as well, after the attention."""
        ...

    @property
    def reads_depths(self) -> bool:
        """Whether it reads the states below as well, so that the pass must keep them."""
        ...

    @property
    def reads_others(self) -> bool:
        """Whether, in or after the last block, it reads other positions than the one that it pushes; then, or where it
        reads depths, h always has all of them."""
        ...

    def start(self, t: Tensor, prompt_mask: Tensor, history: Sequence[Tensor]) -> PushAt:
        """The function that the forward pass calls with (depth, h) at every depth from `first_depth` to num_layers.

        With `pushes_within`, the depths go up by halves: d + 1/2 lies between attention and MLP of block d.
        With `reads_depths`, `history` grows as the pass goes: at a call with depth d it has the states before blocks
        0 to d, for a whole d the last of them h.
        """
        ...


def take(x: Tensor, places: Tensor) -> Tensor:
    """x (B, L, D) at places (B, M) -> (B, M, D)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def places_first(where: Tensor) -> tuple[Tensor, Tensor] | None:
    """(places, asked), both (B, M): the positions that `where` (B, L) bool asks for, from left to right, and which of
    them are so; a row with fewer has others as well. None where M is 0, or more than half of L: all are as cheap."""
    most = int(where.sum(1).max()) if len(where) else 0
    if not 0 < 2 * most <= where.shape[1]:
        return None
    places = where.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return places, where.gather(1, places)


def compute_dtype(h: Tensor) -> torch.dtype:
    """What matrices are multiplied in here: autocast's type where it is on, else that of h."""
    return torch.get_autocast_dtype(h.device.type) if torch.is_autocast_enabled(h.device.type) else h.dtype


class HeadNLL(torch.autograd.Function):
    """-log softmax(h @ weight.T + bias)[target] for each of N rows, with one pass over the (N, V) logits.

    On two cores the vocabulary's softmax is the largest single cost of pretraining. The forward pass keeps
    (softmax - onehot), and the incoming gradient scales the small (N, D) factors, so that neither a second softmax
    nor another (N, V) product is needed.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        logits = F.linear(h, weight, bias)  # (N, V)
        probs = torch.softmax(logits, dim=1)
        rows = torch.arange(len(target), device=target.device)
        if logits.dtype == torch.float16:  # whose smallest probability, 6e-8, is 17 nats
            nll = F.cross_entropy(logits.float(), target, reduction="none")
        else:
            nll = -torch.log(probs[rows, target].float().clamp(min=1e-30))
        probs[rows, target] -= 1.0
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


class Block(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)); or norm(h + attention(h)), then norm(h + mlp(h)). h: (B, L, D)."""

    def __init__(self, config: ModelConfig, index: int = 0):
        super().__init__()
        self.config, self.norm_first, self.is_local = config, config.norm_first, config.is_local(index)
        bare = index == 0 and not config.first_norm
        bias = {"up": config.mlp_bias, "down": config.mlp_bias, "out": config.out_bias}
        linear = {n: nn.Linear(*size, bias=bias.get(n, config.qkv_bias)) for n, size in config.matrices().items()}
        self.attention_norm = nn.Identity() if bare else make_norm(config, config.d_model)
        self.query, self.key, self.value = linear["query"], linear["key"], linear["value"]
        width, eps = config.width_of_head, config.norm_eps
        self.query_norm = nn.RMSNorm(width, eps=eps) if config.head_norms else None
        self.key_norm = nn.RMSNorm(width, eps=eps) if config.head_norms else None
        self.out = linear["out"]
        self.mlp_norm = make_norm(config, config.d_model)
        self.up, self.down = linear["up"], linear["down"]
        self.after_attention: nn.Module = nn.Identity()
        self.after_mlp: nn.Module = nn.Identity()

    def attend(self, h: Tensor, angles: Angles | None, key_mask: Tensor | None, places: Tensor | None = None) -> Tensor:
        """(B, L, D), or (B, M, D) for the queries of `places` (B, M) alone."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.config.width_of_head)).transpose(1, 2)  # (B, H, L, head width)

        h = h.to(compute_dtype(h))  # once, not in each of the products
        asking = h if places is None else take(h, places)
        q, k, v = heads(self.query(asking)), heads(self.key(h)), heads(self.value(h))
        if self.query_norm is not None:
            q, k = self.query_norm(q).to(v.dtype), self.key_norm(k).to(v.dtype)
        if angles is not None:
            angles = (angles[0][:, int(self.is_local)], angles[1][:, int(self.is_local)])
            cos, sin = angles if places is None else (angle[places][:, None] for angle in angles)
            q, k = rotate(q, cos, sin), rotate(k, *angles)
        if k.shape[1] < q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        mixed = near_attention(q, k, v, key_mask, self.config.local_window if self.is_local else 0, places)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def mlp(self, h: Tensor) -> Tensor:
        return self.down(activate(self.up(h), self.config.activation, self.config.gated))

    def forward(
        self,
        h: Tensor,
        angles: Angles | None,
        key_mask: Tensor | None,
        push: Callable[[Tensor], Tensor] | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """`push` (B, L, D) -> (B, L, D) is added to the states between attention and MLP.

        With `places` (B, M) only their states are computed and pushed, (B, M, D): the others give keys and values.
        """
        here = h if places is None else take(h, places)
        if self.norm_first:
            h = here + self.after_attention(self.attend(self.attention_norm(h), angles, key_mask, places))
            h = h if push is None else h + push(h)
            return h + self.after_mlp(self.mlp(self.mlp_norm(h)))
        h = self.attention_norm(here + self.after_attention(self.attend(h, angles, key_mask, places)))
        h = h if push is None else h + push(h)
        return self.mlp_norm(h + self.after_mlp(self.mlp(h)))


class Denoiser(nn.Module):
    """p(x0 | xt): logits over the vocabulary for every position asked for."""

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        d, e = config.d_model, config.embedding_width
        self.embedding = nn.Embedding(config.vocab_size, e)
        self.positions = None if config.rotary else nn.Embedding(config.max_length, e)
        self.embedding_norm = make_norm(config, e) if config.embedding_norm else nn.Identity()
        self.embedding_projection = nn.Linear(e, d) if config.projected else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.final_norm = make_norm(config, d) if config.norm_first else nn.Identity()
        self.head_transform = (
            nn.Sequential(nn.Linear(d, e, bias=config.mlp_bias), nn.GELU(), make_norm(config, e))
            if config.head_transform
            else nn.Identity()
        )
        rows = config.head_rows or config.vocab_size
        self.output = None if config.tied else nn.Linear(e, rows, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(rows)) if config.head_bias else None
        if config.rotary:
            cos, sin = rotary_tables(config)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.push: Push | None = None
        self.clock: Callable[[Tensor], None] | None = None
        self.recompute = False  # blocks keep no activations for the backward pass, and run again in it
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
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
            h = h + self.positions.weight[: xt.shape[1]]
        return self.embedding_projection(self.embedding_norm(h))

    def run_blocks(
        self,
        h: Tensor,
        attention_mask: Tensor | None,
        start: int,
        stop: int,
        push_at: PushAt | None = None,
        history: list[Tensor] | None = None,
        within: bool = False,
        places: Tensor | None = None,
    ) -> Tensor:
        """States before block `stop`, from states `h` (B, L, D) before block `start`.

        attention_mask: (B, L) bool, or None when no position is padding. The states before each block that runs are
        appended to `history`. `within`: push_at is called within the blocks as well. `places` (B, M): those that are
        wanted of the last block that runs, (B, M, D).
        """
        length, dtype = h.shape[1], compute_dtype(h)
        angles = (self.cos[:length].to(dtype), self.sin[:length].to(dtype)) if self.config.rotary else None
        for depth in range(start, stop):
            if history is not None:
                history.append(h)
            if push_at is not None:
                h = h + push_at(depth, h)
            push = partial(push_at, depth + 0.5) if push_at is not None and within else None
            block, asked = self.blocks[depth], places if depth == stop - 1 else None
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(block, h, angles, attention_mask, push, asked, use_reentrant=False)
            else:
                h = block(h, angles, attention_mask, push, asked)
        return h

    @shifted_by_one
    def states(
        self,
        xt: Tensor,
        t: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        cached: Tensor | None = None,
        where: Tensor | None = None,
    ) -> Tensor:
        """Final states (B, L, D), before the final norm and the head's transform; with `where` (B, L) bool those of
        its N positions, (N, D), row by row: where they are few, the last block computes no others.

        `cached` (B, L, K, D) are states computed earlier on the same xt, so that nothing below block
        `push.first_depth` runs again: those before it (K = 1) or, for a push that reads depths, before all blocks up
        to it. t: (B,) and prompt_mask: (B, L) bool are what the push is told; the base ignores both.
        """
        if self.clock is not None:
            if t is None:
                raise ValueError("a denoiser with a clock needs t")
            self.clock(t)
        push, last = self.push, self.config.num_layers
        final_only = push is not None and push.first_depth == last  # the base runs as if there were none
        reads_all = push is not None and not final_only and (push.reads_depths or push.reads_others)
        found = None if where is None or reads_all else places_first(where)
        places, asked = found or (None, where)

        def chosen(h: Tensor) -> Tensor:
            return h if asked is None else h[asked]

        if push is None:
            return chosen(self.run_blocks(self.embed(xt), attention_mask, 0, last, places=places))
        if t is None or prompt_mask is None:
            raise ValueError("a denoiser with a push needs t and prompt_mask")
        first = push.first_depth
        history: list[Tensor] | None = [] if push.reads_depths else None
        if cached is None:
            h = self.run_blocks(self.embed(xt), attention_mask, 0, first, history=history)
        else:
            *below, h = cached.unbind(2)
            if history is not None:
                history += below
        push_at = push.start(t, prompt_mask, history if history is not None else ())
        h = self.run_blocks(h, attention_mask, first, last, push_at, history, push.pushes_within, places)
        if history is not None:
            history.append(h)
        if final_only and places is not None:
            return chosen(take(h, places) + push_at(last, h, places))
        return chosen(h + push_at(last, h))

    @property
    def vocabulary(self) -> Tensor:
        """The matrix that gives the logits: (V, E), or (V', E) where the last ids have none."""
        return self.embedding.weight if self.output is None else self.output.weight

    def head(self, h: Tensor) -> Tensor:
        """Vocabulary logits (..., V) of final states (..., D)."""
        logits = F.linear(self.head_transform(self.final_norm(h)), self.vocabulary, self.output_bias)
        missing = self.config.vocab_size - logits.shape[-1]
        return F.pad(logits, (0, missing), value=-torch.inf) if missing else logits

    def nll(self, h: Tensor, target: Tensor) -> Tensor:
        """-log p(target), in nats, for final states h (N, D) and target ids (N,) -> (N,) fp32."""
        dtype = compute_dtype(h)
        h = self.head_transform(self.final_norm(h)).to(dtype)
        weight, bias = self.vocabulary.to(dtype), self.output_bias
        with torch.autocast(h.device.type, enabled=False):
            return HeadNLL.apply(h, weight, None if bias is None else bias.to(dtype), target)

    def forward(
        self,
        xt: Tensor,
        t: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        where: Tensor | None = None,
        cached: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, L, V), or (N, V) for the N positions of `where` ((B, L) bool), where alone the head then runs."""
        return self.head(self.states(xt, t, attention_mask, prompt_mask, cached, where))

"""The denoiser: a bidirectional transformer from noised ids to token logits; pre-norm and rotary by default.

It knows nothing of schedules, tasks or methods. Methods meet it at the seams of its blocks, at `Denoiser.push`,
which may change the residual stream before any block and after the last one, and at `pointer`, which copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from tinyld.attention import rotary_tables
from tinyld.block import Angles, Block, Embedding, Linear, Pair, make_norm, take
from tinyld.config import ModelConfig
from tinyld.device import look_up, narrow, product, product_dtype
from tinyld.pointer import Copies, Pointer

# push_at(depth, h, positions=None): what is added to the states h before block `depth` (num_layers: the final ones).
# h is (B, L, D), or (B, M, D) where the pass has computed M positions of a row alone; so is the result. With
# `positions` (B, M) h has all L, and only what is added at those is returned, (B, M, D).
PushAt = Callable[..., Tensor]
# rows xt (B, L) -> what may be copied to the positions of a pass if that, of it, is what is written
Copying = Callable[[Tensor], Copies]


class Push(Protocol):
    """What may be hung on `Denoiser.push`: it adds to the states at its sites, one a depth. The states before block
    `first_depth` are the frozen base's own, so they may be kept and given back as `cached`."""

    first_depth: int  # of the lowest site
    answer_only: bool  # it pushes the states that tell the answer; all others stay the frozen base's own
    reads_others: bool  # on the final state it reads other positions than the one it pushes, so all are computed
    pointer: Pointer | None  # what may be copied from the prompt

    # (t, prompt_mask) -> what one pass calls at every depth from `first_depth` to num_layers, in order
    start: Callable[[Tensor, Tensor], PushAt]


def positions_of(where: Tensor) -> tuple[Tensor, Tensor]:
    """(positions, is_asked), both (B, M): those that `where` (B, L) bool asks for, from left to right; a row that asks
    for fewer than M has others as well."""
    most = int(where.sum(1).max()) if len(where) else 0
    positions = where.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return positions, where.gather(1, positions)


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
        self.pointer: Pointer | None = None  # what may be copied from the prompt, where no push has its own
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

    def angles(self, length: int) -> Angles | None:
        if not self.config.rotary:
            return None
        dtype = product_dtype(self.cos.device)
        return self.cos[:length].to(dtype), self.sin[:length].to(dtype)

    def through(self, depth: int, *given: Any) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.blocks[depth], *given, use_reentrant=False)
        return self.blocks[depth](*given)

    def states(self, *given: Any, **told: Any) -> Tensor:
        """The final states of `one_pass`."""
        return self.one_pass(*given, **told)[0]

    def one_pass(
        self, xt: Tensor, t: Tensor | None = None, attention_mask: Tensor | None = None,
        prompt_mask: Tensor | None = None, cached: Tensor | None = None, where: Tensor | None = None,
    ) -> tuple[Tensor, Copying | None]:  # fmt: skip
        """Final states (B, L, D), before the final norm and the head's transform; with `where` (B, L) bool those of
        its N positions, (N, D), row by row: where they are few, the last block computes no others. A push on the answer
        alone needs `where`, within that. In a shifted model position i has the state at i - 1, and position 0 its own.
        And what may be copied there, if there is a pointer. attention_mask: (B, L) bool, None if nothing is padding.

        `cached` (B, L, K, D) are states computed earlier on the same xt, so that nothing of the frozen base runs again
        that the push leaves as it is: those at `Push.first_depth` or, where it pushes the answer only, from there on.
        t: (B,) and prompt_mask: (B, L) bool are what `push` is told; the base ignores both.
        """
        push = self.push
        if push is not None and push.answer_only:
            return self.answer_states(push, xt, t, attention_mask, prompt_mask, cached, where)
        last, shifted = self.config.num_layers, self.config.shifted
        first, push_at = (last, None) if push is None else (push.first_depth, push.start(t, prompt_mask))
        positions = None
        if where is not None and 0 < 2 * (few := positions_of(where))[0].shape[1] <= xt.shape[1]:  # else as cheap
            positions = (few[0] - int(shifted)).clamp(min=0)
        whole = push is not None and (push.reads_others or first == last)  # the last block is then computed whole
        h, start = (self.embed(xt), 0) if cached is None else (cached[:, :, 0], first)
        read, angles = h, self.angles(xt.shape[1])
        for depth in range(start, last):
            read = h
            if push_at is not None and depth >= first:
                h = h + push_at(depth, h)
            h = self.through(depth, h, angles, attention_mask, None if whole or depth < last - 1 else positions)
        if push_at is not None:
            at = positions if whole else None
            h = (h if at is None else take(h, at)) + push_at(last, h, at)
        if positions is None and shifted:
            h = torch.cat([h[:, :1], h[:, :-1]], 1)
        told, asked = (None, where) if positions is None else few
        pointer = self.pointer if push is None else push.pointer
        copies = None if pointer is None else pointer(h, read, prompt_mask, told, asked)
        return h if asked is None else h[asked], copies

    def answer_states(
        self, push: Push, xt: Tensor, t: Tensor, attention_mask: Tensor | None, prompt_mask: Tensor,
        cached: Tensor | None, where: Tensor,
    ) -> tuple[Tensor, Copying | None]:  # fmt: skip
        """`one_pass` with a push on the answer only."""
        told, asked = positions_of(where)
        positions = (told - int(self.config.shifted)).clamp(min=0)
        first, last = push.first_depth, self.config.num_layers
        stop = max(first, last - 1)
        frozen = (cached.unbind(2), ()) if cached is not None else self.frozen(xt, attention_mask, first, stop)
        (h,) = self.along([push], *frozen, positions, t, attention_mask, prompt_mask)
        pointer = push.pointer
        copies = None if pointer is None else pointer(h, frozen[0][last - 1 - first], prompt_mask, told, asked)
        return h[asked], copies

    @torch.no_grad()
    def frozen(
        self, xt: Tensor, attention_mask: Tensor | None, first: int, stop: int
    ) -> tuple[Sequence[Tensor], Sequence[Pair]]:
        """What the base makes of rows: states (B, L, D) at every depth from `first` to `stop`, and the keys and values
        that its blocks on that way made of them."""
        h, angles, states, pairs = self.embed(xt), self.angles(xt.shape[1]), list[Tensor](), list[Pair]()
        for depth, block in enumerate(self.blocks[:stop]):
            pair = block.readable(h, xt.shape[1], angles)
            if depth >= first:
                states.append(h)
                pairs.append(pair)
            h = block(h, angles, attention_mask, None, pair)
        return [*states, h], pairs

    def along(
        self, pushes: Sequence[Push], states: Sequence[Tensor], pairs: Sequence[Pair], positions: Tensor, t: Tensor,
        attention_mask: Tensor | None, prompt_mask: Tensor,
    ) -> list[Tensor]:  # fmt: skip
        """By each push the final states (B, M, D) at positions (B, M), which are pushed at every depth on their way and
        read all, themselves too, as the base has them: what is `frozen`, from the lowest push's first depth on. The
        blocks compute those of all pushes side by side."""
        first, last = min(push.first_depth for push in pushes), self.config.num_layers
        angles = self.angles(states[0].shape[1])
        each = [take(states[push.first_depth - first], positions) for push in pushes]
        started = [push.start(t, prompt_mask) for push in pushes]
        for depth in range(first, last):
            block, on = self.blocks[depth], [i for i, push in enumerate(pushes) if push.first_depth <= depth]
            asked = positions.repeat(1, len(on))
            made, kept = pairs[depth - first : depth - first + 1], states[depth - first]
            frozen = made[0] if made else block.readable(kept, asked.shape[1], angles)  # outside of what runs again
            h = torch.cat([each[i] + started[i](depth, each[i]) for i in on], 1)
            h = self.through(depth, h, angles, attention_mask, asked, frozen)
            for i, own in zip(on, h.chunk(len(on), 1), strict=True):
                each[i] = own
        return [h + push_at(last, h) for h, push_at in zip(each, started, strict=True)]

    @property
    def device(self) -> torch.device:
        """Of its first parameter: a `weight` that is kept in fewer bits is widened by asking for it."""
        return next(self.parameters()).device

    def rows_at_once(self, length: int, most: int, asked: int = 0) -> int:
        """How many rows of `length` tokens, `most` of them, a pass without gradient takes: their states of all depths,
        which a push may read, and four copies of the logits of `asked` tokens have half a gigabyte."""
        row = 4 * length * self.config.d_model * (self.config.num_layers + 1)  # bytes
        row += 16 * asked * self.config.vocab_size
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
            weight = narrow(self.vocabulary, dtype)
            return head_nll(h, weight, None if bias is None else bias.to(dtype), target)

    def forward(self, *given: Any, **told: Any) -> Tensor:
        """Logits (B, L, V), or (N, V) for the N positions of `where`, of what `one_pass` is given."""
        return self.look(*given, **told)[0]

    def look(self, xt: Tensor, *given: Any, **told: Any) -> tuple[Tensor, Copying | None]:
        """`forward`'s logits and, with a pointer, what looks again at what is written, without a pass."""
        h, copies = self.one_pass(xt, *given, **told)
        logits = self.head(h)
        return (logits, None) if copies is None else (copies(xt).logits(logits), copies)


def head_nll(h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """-log softmax(h @ weight.T + bias)[target] for each of N rows, with one pass over the (N, V) logits. On two cores
    the vocabulary's softmax is the largest single cost of pretraining. What is kept of it is softmax - onehot, by which
    the result is linear in h, weight and bias: no second softmax and no other (N, V) product."""
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
        least = 2.0 if logits.dtype == torch.float16 else 1e-30  # fp16's smallest probability, 6e-8, is 17 nats
        if bool((far := p < least).any()):
            nll[far] = F.cross_entropy(logits[far].to(exact), target[far], reduction="none")
        probs[rows, target] = -rest.to(probs.dtype)
    if not torch.is_grad_enabled():
        return nll
    slope = (h * (probs @ weight)).sum(1, dtype=exact) + (0.0 if bias is None else probs @ bias)
    return nll + (slope - slope.detach())

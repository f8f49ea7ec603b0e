"""The reverse process: from masked answer slots to tokens, and to a length. Takes any denoiser that gives logits.

A slot is as wide as the longest answer allowed, and a text ends in it at one [EOS]. What comes after that is no part of
the text: training never scores it, so the chance of [EOS] at a position is a hazard, that the text ends there *given
that it comes so far*. The chance that it comes so far is S_j, the product of (1 - hazard) over the masked positions to
its left. A token at j can be right only if the text comes so far, so its confidence is S_j p_j(token), and that of an
end at j is S_j p_j([EOS]): a distribution over lengths that adds up to at most 1. Once an end is chosen, the rest of
the slot leaves the row. So neither padding nor a long slot can win a text's places, and no length need be told.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinyld.config import SampleConfig
from tinyld.diffusion import all_finite

SURE = 0.9  # an end ahead of what is written so far is chosen when it is at least this likely


@torch.no_grad()
def decode(
    denoiser: Any,
    x: Tensor,
    answer_mask: Tensor,
    attention_mask: Tensor,
    mask_id: int,
    forbidden: list[int],
    config: SampleConfig,
    generator: torch.Generator | None = None,
    eos_id: int | None = None,
    watch: Any = None,
) -> tuple[Tensor, Tensor]:
    """(ids, forward passes of each row): x with its answer slots decoded from all [MASK], and [EOS] from a text's end.

    x, answer_mask, attention_mask: (B, L). `forbidden` ids are never written. Without `eos_id` every text fills its
    slot. The denoiser is told as t the share of a row's slot that is masked. Rows that are done leave the batch.
    `watch` is called with x after every pass.
    """
    generator = generator or torch.Generator(x.device).manual_seed(config.seed)
    x = torch.where(answer_mask, mask_id, x)
    inside = answer_mask.clone()  # the slot, up to the end once that is known
    attended = attention_mask.clone()
    prompt_mask = attention_mask & ~answer_mask
    width = int(answer_mask.sum(1).max()) if len(x) else 0
    steps = config.steps or width
    passes, step = torch.zeros(len(x), dtype=torch.long), 0
    last: tuple[Tensor, Tensor] | None = None  # where was masked in the last pass, and what was predicted there
    while True:
        masked = (x == mask_id) & inside
        rows = masked.any(1).nonzero()[:, 0]
        if len(rows) == 0:
            return x, passes
        whole, masked, real = masked, masked[rows], attended[rows]
        length = int(real.any(0).nonzero()[-1]) + 1  # the ends of the longest texts may have left
        masked, real = masked[:, :length], real[:, :length]
        given = denoiser(
            x[rows, :length],
            masked.sum(1) / inside[rows].sum(1),
            None if bool(real.all()) else real,
            prompt_mask[rows, :length],
            where=masked,
        )  # (N, V)
        logits = all_finite(given)
        logits[:, forbidden] = -torch.inf
        open_ended = torch.zeros(len(rows), dtype=torch.bool, device=x.device)
        if eos_id is not None:
            open_ended = (inside[rows] == answer_mask[rows]).all(1)  # its end is not known yet
        choice = Candidates(logits, masked, open_ended, eos_id, config.temperature, generator)
        if config.sampler == "klass":
            if last is not None:
                choice.moved = choice.spread(divergence(choice.logp, last[1][whole[last[0]]]), torch.inf)
            last = whole, choice.logp
        tokens, ends = accept(choice, config, steps, step, generator)
        x[rows, :length] = torch.where(tokens, choice.token, x[rows, :length])
        for row, end in ends.nonzero().tolist():
            i = int(rows[row])
            rest = answer_mask[i] & (torch.arange(x.shape[1], device=x.device) >= end)
            x[i][rest] = eos_id
            inside[i] &= ~rest
            rest[end] = False
            attended[i] &= ~rest
        passes[rows.cpu()] += 1
        step += 1
        if watch is not None:
            watch(x)


class Candidates:
    """What could be written now: at each masked position a token, and for each open-ended row an end; all (B, L)."""

    def __init__(
        self,
        logits: Tensor,
        masked: Tensor,
        open_ended: Tensor,
        eos_id: int | None,
        temperature: float,
        generator: torch.Generator,
    ):
        """logits: (N, V) at the N positions of masked (B, L), row by row; open_ended: (B,)."""
        self.masked = masked
        self.logp = logp = logits.log_softmax(-1)
        end = torch.zeros_like(logp[:, 0])
        if eos_id is not None:
            end = logp[:, eos_id].exp().clamp(max=1 - 1e-6)
            logp[:, eos_id] = -torch.inf
        if temperature == 0:
            best, token = logp.max(-1)
        else:
            token = torch.multinomial((logp / temperature).softmax(-1), 1, generator=generator)[:, 0]
            best = logp.gather(1, token[:, None])[:, 0]
        hazard = self.spread(end) * open_ended[:, None]
        stays = torch.log1p(-hazard).cumsum(1)
        self.comes_so_far = (stays - torch.log1p(-hazard)).exp()  # S_j, before j's own chance to end
        self.token = self.spread(token)
        self.survives = stays.exp() * masked  # that there is a token at j and not an end before or at it
        self.confidence = self.spread(best.exp() / (1 - end)) * self.survives
        self.end_confidence = self.comes_so_far * hazard
        self.moved: Tensor | None = None  # klass: how far each distribution is from that of the last pass

    def spread(self, values: Tensor, elsewhere: float = 0) -> Tensor:
        """(N,) values at the masked positions -> (B, L)."""
        return (
            torch.full(self.masked.shape, elsewhere, dtype=values.dtype).to(values).masked_scatter(self.masked, values)
        )

    def entropy(self) -> Tensor:
        """Nats that each position leaves open."""
        p = self.logp.softmax(-1)
        return self.spread(-(p * p.clamp(min=1e-30).log()).sum(-1), torch.inf)


def divergence(logp: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) of each pair of rows, (N,), from log-probabilities."""
    return (logp.exp() * (logp.clamp(min=-1e4) - other.clamp(min=-1e4))).sum(-1)


def accept(
    choice: Candidates, config: SampleConfig, steps: int, step: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(tokens, ends), both (B, L) bool: what is written in this pass, at least one of the two in every row.

    Those that look for what is sure write the `least` most confident tokens in any case.
    A text ends where all before is written and it is likelier to end than to go on, or where an end is sure.

    - low_confidence (LLaDA, arXiv 2502.09992): the most confident, an equal number in each of `steps` passes.
    - threshold (Fast-dLLM, arXiv 2505.22618): all whose confidence is at least `threshold`.
    - klass (arXiv 2511.05664): of those whose confidence is at least `threshold` all that moved by less than `kl` nats
      since the last pass.
    - entropy (EB-sampler, arXiv 2505.24857): from the least entropy up, while what the others leave open together is
      at most `entropy` nats.
    - ancestral (MDLM, arXiv 2406.07524): first a length, then each position with the same chance, in no order.
    """
    masked, confidence = choice.masked, choice.confidence
    end, at = choice.end_confidence.max(1)  # (B,) the likeliest end, and where
    if config.sampler == "ancestral":
        now, then = (torch.tensor(1.0 - min(step + i, steps) / steps, device=masked.device) for i in (0, 1))
        chance = (now - then) / now.clamp(min=1e-6)  # of those that are masked at t = now
        draw, length = torch.rand((2, *masked.shape), generator=generator, device=masked.device)
        tokens = masked & ((draw < chance) | (step + 1 >= steps))
        reached = choice.end_confidence.cumsum(1) > length[:, :1]  # the length is drawn first, in the first pass
        ends_now, at = reached.any(1) & (step == 0), reached.int().argmax(1)
    elif config.steps is not None and step + 1 >= steps:
        tokens, ends_now = masked, end > 1.0 - choice.end_confidence.sum(1)
    else:
        least: Any = config.least
        if config.sampler == "entropy":
            entropy = choice.entropy()
            order = entropy.argsort(1)
            rising = entropy.gather(1, order)
            open_before = rising.cumsum(1) - rising  # what the others leave open, the last one left out
            sure = torch.zeros_like(masked).scatter(1, order, open_before <= config.enough) & (choice.survives > 0.5)
        elif config.sampler == "low_confidence":
            sure, least = torch.zeros_like(masked), torch.ceil(masked.sum(1, keepdim=True) / (steps - step))
        else:
            sure = confidence >= config.enough
            if config.sampler == "klass":
                sure &= False if choice.moved is None else choice.moved <= config.kl
        rank = confidence.masked_fill(~masked, -1.0).argsort(stable=True, dim=1, descending=True).argsort(1)
        tokens = masked & (sure | (rank < least))
        first = masked & (masked.cumsum(1) == 1)
        over = (first & (choice.end_confidence > 0.5)).any(1)  # all before is written, and it ends rather than goes on
        at = torch.where(over, first.int().argmax(1), at)
        ends_now = over | ((end >= SURE) & (end > 0))
    ends = torch.zeros_like(masked).scatter(1, at[:, None], ends_now[:, None]) & masked
    return tokens & ~(ends.cumsum(1) > 0), ends  # from the end on nothing is written

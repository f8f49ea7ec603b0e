"""Masked diffusion: forward masking, losses and the NLL bound. Takes any callable denoiser.

t is in [0, 1], the chance that a token is masked: 0 is clean, 1 fully masked (the linear schedule: the papers' alpha_t
is 1 - t). Formulas: MDLM (arXiv 2406.07524).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyld.data import Batch
from tinyld.errors import TinyldError


def sample_t(n: int, generator: torch.Generator, bell: bool = False) -> Tensor:
    """(n,) times in [0, 1), stratified: one draw from each n-th of the distribution, in random order. Uniform or, with
    `bell`, Beta(2, 2) (its closed-form quantile function), which spends less on the two easy ends."""
    u = (torch.rand((), generator=generator) + torch.arange(n) / n) % 1.0
    u = u[torch.randperm(n, generator=generator)]
    if bell:
        u = 0.5 - torch.sin(torch.asin(1.0 - 2.0 * u) / 3.0)
    return u


def mask_counted(t: Tensor, maskable: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(is_masked, share): exactly ceil(t * n) of a row's n maskable tokens, (B, L) bool; share (B,) is that of n. Given
    its count, a set of masked positions is as likely here as under any schedule."""
    n = maskable.sum(1)  # (B,)
    count = torch.clamp(torch.ceil(t * n - 1e-6), min=1).to(torch.int64)
    order = torch.rand(maskable.shape, generator=generator).masked_fill(~maskable, 2.0).argsort(1).argsort(1)
    return (order < count[:, None]) & maskable, count / n.clamp(min=1)


@dataclass(frozen=True)
class Noised:
    """A batch at time t: what the denoiser sees and what it is scored on."""

    xt: Tensor  # (B, L) int64
    x0: Tensor  # (B, L) int64
    is_masked: Tensor  # (B, L) bool
    t: Tensor  # (B,)
    attention_mask: Tensor | None  # (B, L) bool; None when nothing is padding
    prompt_mask: Tensor  # (B, L) bool
    cached: Tensor | None = None  # (B, L, K, D) states of the frozen lower blocks, where they were kept

    def map(self, change: Callable[[Tensor], Tensor]) -> Noised:
        return Noised(**{name: None if tensor is None else change(tensor) for name, tensor in vars(self).items()})

    def to(self, device: torch.device) -> Noised:
        if device.type == "cpu":
            return self
        return self.map(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))


def noised_at(
    x0: Tensor, is_masked: Tensor, t: Tensor, attention_mask: Tensor, prompt_mask: Tensor, mask_id: int
) -> Noised:
    padded = None if bool(attention_mask.all()) else attention_mask
    return Noised(torch.where(is_masked, mask_id, x0), x0, is_masked, t.float(), padded, prompt_mask)


PREFIXED = 0.5  # share of pretraining rows that keep a prefix clean, as a prompt is
LONGEST_PREFIX = 0.8  # of a row


def noise_text(batch: Batch, mask_id: int, generator: torch.Generator) -> list[Noised]:
    """Pretraining's noise, for plain cross-entropy: B rows under two masks that are each other's complement, 2 B rows.
    Every token is predicted once a row read, which halves the noise of the gradient or better (arXiv 2511.18159). Half
    of the rows keep a prefix of up to 80% clean, which is what tasks and writing look like, and are masked at uniform
    times; the others at times of Beta(2, 2)."""
    n, length = batch.x0.shape
    begins = torch.rand(n, generator=generator) * LONGEST_PREFIX * length
    prefixed = torch.rand(n, generator=generator) < PREFIXED
    maskable = batch.answer_mask & ~(prefixed[:, None] & (torch.arange(length) < begins[:, None]))
    t = torch.where(prefixed, sample_t(n, generator), sample_t(n, generator, bell=True))
    first = (torch.rand(maskable.shape, generator=generator) < t[:, None]) & maskable
    is_masked = torch.cat([first, maskable & ~first])
    x0, attention_mask, maskable = (tensor.repeat(2, 1) for tensor in (batch.x0, batch.attention_mask, maskable))
    t = is_masked.sum(1) / maskable.sum(1).clamp(min=1)
    return [noised_at(x0, is_masked, t, attention_mask, attention_mask & ~maskable, mask_id)]


def noise_counted(batch: Batch, mask_id: int, generator: torch.Generator, prompt_mask: Tensor | None = None) -> Noised:
    """Exactly ceil(t n) of the n tokens of a row's answer masked, at uniform times; the t that is told is that share.
    E[CE summed / t] is the ELBO (MDLM, eq. 10), with less variance than under independent masks (LLaDA's likelihood,
    arXiv 2502.09992). A one-token answer is always masked, and its loss is exact."""
    is_masked, share = mask_counted(sample_t(len(batch.x0), generator), batch.answer_mask, generator)
    prompt_mask = batch.attention_mask & ~batch.answer_mask if prompt_mask is None else prompt_mask
    return noised_at(batch.x0, is_masked, share, batch.attention_mask, prompt_mask, mask_id)


OPEN = 0.25  # share of the rows of a task that are asked for their length


def noise_answers(batch: Batch, mask_id: int, generator: torch.Generator, delete: int | None = None) -> list[Noised]:
    """A task's rows, as decoding meets them: first a length, then the tokens. Where answers do not all fill their
    slots, a quarter of the rows are asked for their length: their whole slots are masked, and scored up to the [EOS].
    So the chance of [EOS] at a position is that the text ends there given that it comes so far. In the others the [EOS]
    is seen, what is behind it leaves the row, and so many of the tokens before it are masked as `noise_counted`
    says; with the id `delete` some of them teach that the length does not suit (`misfit`)."""
    if batch.tail_mask is None:
        return [noise_counted(batch, mask_id, generator)]
    x0, answer_mask, attention_mask, tail_mask = batch.x0, batch.answer_mask, batch.attention_mask, batch.tail_mask
    end, text = tail_mask & ~tail_mask.roll(1, 1), answer_mask & ~tail_mask
    count = int(OPEN * len(x0) + float(torch.rand((), generator=generator)))  # a quarter, whatever the number of rows
    asked, told = torch.randperm(len(x0), generator=generator).tensor_split([count])
    prompt_mask, parts = attention_mask & ~answer_mask, []
    if len(asked):
        masks = (text | end)[asked], torch.ones(len(asked)), attention_mask[asked], prompt_mask[asked]
        xt = torch.where(answer_mask, mask_id, x0)[asked]
        parts.append(replace(noised_at(x0[asked], *masks, mask_id), xt=xt))
    if len(told):
        seen = (attention_mask & ~tail_mask | end)[told]
        part = Batch(x0[told], text[told], seen, batch.rows[told])
        noised = noise_counted(part, mask_id, generator, prompt_mask[told])
        if delete is not None:
            noised = misfit(noised, text[told], answer_mask[told], delete, mask_id, generator)
            seen = torch.ones_like(seen) if noised.attention_mask is None else noised.attention_mask
        width = int(seen.any(0).nonzero()[-1]) + 1  # behind it no row attends to anything
        parts.append(noised.map(lambda tensor: tensor[:, :width] if tensor.dim() > 1 else tensor))
    return parts


MISFIT = 0.1  # share of the rows with a length in which a gap, if there is one, is too long
LONGEST_GAP = 6  # tokens, of one that is


def misfit(noised: Noised, text: Tensor, slot: Tensor, delete: int, mask_id: int, generator: torch.Generator) -> Noised:
    """A tenth of the rows get, in one short gap if they have one (a run of masks, or nothing between two visible
    tokens), more masks than tokens are missing: those behind its tokens are to be `delete`, which stands for none
    (after DreamOn, arXiv 2602.01326). text, slot: (B, L), the answer's tokens before its [EOS], and all of its slot."""
    n, place = text.shape[0], torch.arange(text.shape[1]).expand_as(text)
    masked, (chosen, far) = noised.is_masked, torch.rand((2, n, 1), generator=generator)
    length, begin = text.sum(1, keepdim=True), slot.int().argmax(1, keepdim=True)
    by = 1 + (far > 0.6).long() + (far > 0.85)
    run = place - torch.where(masked, -1, place).cummax(1).values  # of masks that ends here, its length
    fits = slot & (place <= begin + length) & ~masked & (F.pad(run, (1, -1)) <= LONGEST_GAP - by)
    fits &= (length + by <= slot.sum(1, keepdim=True)) & (chosen < MISFIT)
    at = torch.where(fits, torch.rand(text.shape, generator=generator), -1.0).argmax(1, keepdim=True)
    by = torch.where(fits.any(1, keepdim=True), by, 0)
    is_new, source = (place >= at) & (place < at + by), torch.where(slot & (place >= at + by), place - by, place)
    x0, is_masked = noised.x0.gather(1, source).masked_fill(is_new, delete), masked.gather(1, source) | is_new
    seen = torch.ones_like(text) if noised.attention_mask is None else noised.attention_mask
    seen = torch.where(slot, place <= begin + length + by, seen)
    t = is_masked.sum(1) / (length + by)[:, 0].clamp(min=1)
    return noised_at(x0, is_masked, t, seen, noised.prompt_mask, mask_id)


SMOOTHED = 0.2  # share of a label's probability that all labels' words should have alike


def token_nll(denoiser: Any, noised: Noised, words: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(nll, row): -log p(x0) in nats of each masked token, and the row it stands in; both (N,). With the ids of `words`
    (K,), the labels' of a task, a loss to be trained on: the cross-entropy with 1 - SMOOTHED of the right word and
    SMOOTHED of all words alike (label smoothing, arXiv 1512.00567), so that labels are not learned with a certainty
    that held-out rows do not bear out."""
    where = noised.is_masked
    told = noised.t, noised.attention_mask, noised.prompt_mask, noised.cached
    h, copies = denoiser.one_pass(noised.xt, *told, where)
    nll, x0 = denoiser.nll(h, noised.x0[where]), noised.x0[where]
    if copies is not None:
        nll = copies(noised.xt).nll(nll, x0)
    if words is not None:  # whose normaliser is the same for all words, and so cancels
        logits = denoiser.head(h, words)
        right = logits.gather(1, (x0[:, None] == words).int().argmax(1, keepdim=True))[:, 0]
        nll = nll + SMOOTHED * (right - logits.mean(1))
    return nll, where.nonzero()[:, 0]


def all_finite(found: Tensor) -> Tensor:
    """What a denoiser gave, as floats; TinyldError where it is not a number, or too large. -inf is what cannot be
    written."""
    if not bool((found < torch.inf).all()):
        raise TinyldError("the denoiser's logits are not finite: its weights are too large for this arithmetic")
    return found.float()


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error, over n rows: what each added up, and over how much."""

    mean: float
    stderr: float | None  # of one row it is not known
    n: int
    numerator: Tensor = field(repr=False, compare=False)  # (n,)
    denominator: Tensor = field(repr=False, compare=False)  # (n,)

    def minus(self, other: Estimate) -> Estimate:
        """The difference of two means over the same rows, paired, so that what they share does not count as chance."""
        return ratio_estimate(self.numerator - other.numerator, self.denominator)


def ratio_estimate(numerator: Tensor, denominator: Tensor) -> Estimate:
    """sum(numerator) / sum(denominator) over rows, with the ratio estimator's standard error."""
    n = len(numerator)
    mean = numerator.sum() / denominator.sum()
    residual = numerator - mean * denominator
    stderr = (residual.square().sum() / max(n - 1, 1) * n).sqrt() / denominator.sum()
    mean, stderr = all_finite(torch.stack([mean, stderr])).tolist()
    return Estimate(mean, stderr if n > 1 else None, n, numerator, denominator)


@torch.no_grad()
def row_nll(
    denoiser: Any, batch: Batch, mask_id: int, draws: int, generator: torch.Generator, prompt_mask: Tensor | None = None
) -> Tensor:
    """(B,) on the processor: the bound in nats of each row's answer, the mean over `draws` times."""
    total = torch.zeros(len(batch.x0))
    for _ in range(draws):
        noised = noise_counted(batch, mask_id, generator, prompt_mask).to(denoiser.device)
        nll, row = token_nll(denoiser, noised)
        total += torch.zeros(len(total)).index_add_(0, row.cpu(), (nll / noised.t[row]).float().cpu())
    return total / draws

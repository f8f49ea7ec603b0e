"""Masked diffusion: forward masking, losses and the NLL bound. Takes any callable denoiser.

t is in [0, 1], the chance that a token is masked: 0 is clean, 1 fully masked (the linear schedule: the papers' alpha_t
is 1 - t). Formulas: MDLM (arXiv 2406.07524).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from tinyld.errors import TinyldError

T_MIN = 1e-3  # smallest t drawn: the ELBO's weight 1/t is finite there


def sample_t(n: int, generator: torch.Generator, bell: bool = False) -> Tensor:
    """(n,) times in [T_MIN, 1], stratified: one draw from each n-th of the distribution, in random order.

    Uniform or, with `bell`, Beta(2, 2) (its closed-form quantile function), which spends less on the two easy ends.
    """
    u = (torch.rand((), generator=generator) + torch.arange(n) / n) % 1.0
    u = u[torch.randperm(n, generator=generator)]
    if bell:
        u = 0.5 - torch.sin(torch.asin(1.0 - 2.0 * u) / 3.0)
    return T_MIN + (1.0 - T_MIN) * u


def mask_some(t: Tensor, maskable: Tensor, generator: torch.Generator) -> Tensor:
    """(B, L) bool: each maskable token is masked with chance t, independently."""
    return (torch.rand(maskable.shape, generator=generator) < t[:, None]) & maskable


def add_noise_counted(
    x0: Tensor, t: Tensor, maskable: Tensor, mask_id: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(xt, is_masked, ratio): exactly ceil(t * n) of a row's n maskable tokens are masked; ratio (B,) is that share.

    Given its count, a set of masked positions is as likely here as under any schedule, so
    E[CE summed / ratio] over a uniform t is the same ELBO with less variance (LLaDA's likelihood, arXiv 2502.09992).
    A one-token answer is always masked, and its loss is exact.
    """
    n = maskable.sum(1)  # (B,)
    count = torch.clamp(torch.ceil(t * n - 1e-6), min=1).to(torch.int64)
    order = torch.rand(x0.shape, generator=generator).masked_fill(~maskable, 2.0).argsort(1).argsort(1)
    is_masked = (order < count[:, None]) & maskable
    return torch.where(is_masked, mask_id, x0), is_masked, count / n.clamp(min=1)


@dataclass(frozen=True)
class Noised:
    """A batch at time t: what the denoiser sees and what it is scored on."""

    xt: Tensor  # (B, L) int64
    x0: Tensor  # (B, L) int64
    is_masked: Tensor  # (B, L) bool
    t: Tensor  # (B,)
    weight: Tensor  # (B,): loss weight of each masked token of a row
    attention_mask: Tensor | None  # (B, L) bool; None when nothing is padding
    prompt_mask: Tensor  # (B, L) bool
    cached: Tensor | None = None  # (B, L, K, D) states of the frozen lower blocks, where they were kept

    def split(self, parts: int) -> list[Noised]:
        """At most `parts` micro-batches of about equal numbers of rows, on the same noise."""
        return [self] if parts == 1 else [self.rows(some) for some in torch.arange(len(self.t)).chunk(parts)]

    def rows(self, some: Tensor) -> Noised:
        return self._map(lambda tensor: tensor[some])

    def to(self, device: torch.device) -> Noised:
        if device.type == "cpu":
            return self
        return self._map(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Noised:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Noised(**{name: None if tensor is None else change(tensor) for name, tensor in values.items()})


def noise_batch(
    x0: Tensor,
    answer_mask: Tensor,
    attention_mask: Tensor,
    mask_id: int,
    loss: str,
    generator: torch.Generator,
    counted: bool,
    tail_mask: Tensor | None = None,
) -> tuple[Noised, float]:
    """(noised batch, normaliser): the loss of the batch is sum(weight * CE over masked tokens) / normaliser.
    Under the loss `uniform` the weight is 1, under `elbo` 1 / t (MDLM, eq. 10: -alpha_t' / (1 - alpha_t)).

    `counted` masks an exact number of tokens, at uniform times (tasks: answers are short). Otherwise tokens are masked
    independently: under the ELBO, whose weights are a bound under no others, at uniform times; for plain cross-entropy
    as `two_views` says (pretraining).

    `tail_mask` (B, L): what a slot holds behind an answer's [EOS]. It is no part of the text and is never scored. It
    is masked together with the [EOS], as nothing then tells where the text ends, and hidden once that is seen. So the
    denoiser learns the chance that a text ends at a position given that it comes so far, and the product over
    positions is a likelihood of texts of every length. The denoiser is told as t the share of the visible slot that is
    masked, which decoding knows too.
    """
    if counted:
        tail_mask = torch.zeros_like(answer_mask) if tail_mask is None else tail_mask
        scored = answer_mask & ~tail_mask
        xt, is_masked, ratio = add_noise_counted(x0, sample_t(len(x0), generator), scored, mask_id, generator)
        weight, t = 1.0 / ratio, ratio
        if bool(tail_mask.any()):
            has_end = scored & tail_mask.roll(-1, 1)  # an [EOS] with something behind it in its slot
            open_tail = tail_mask & (is_masked & has_end).any(1, keepdim=True)
            xt = torch.where(open_tail, mask_id, xt)
            attention_mask = attention_mask & (open_tail | ~tail_mask)
            t = (is_masked | open_tail).sum(1) / (scored | open_tail).sum(1).clamp(min=1)
        answer_mask, prompt_mask = scored, attention_mask & ~scored & ~tail_mask
    elif loss == "uniform":
        is_masked, maskable = two_views(answer_mask, generator)
        x0, attention_mask = x0.repeat(2, 1), attention_mask.repeat(2, 1)
        t = is_masked.sum(1) / maskable.sum(1).clamp(min=1)
        xt, prompt_mask = torch.where(is_masked, mask_id, x0), attention_mask & ~maskable
    else:
        t = sample_t(len(x0), generator)
        is_masked, weight, prompt_mask = mask_some(t, answer_mask, generator), 1.0 / t, attention_mask & ~answer_mask
        xt = torch.where(is_masked, mask_id, x0)
    if loss == "uniform":
        weight, normaliser = torch.ones_like(t), float(is_masked.sum())
    else:
        normaliser = float(answer_mask.sum())
    padded = None if bool(attention_mask.all()) else attention_mask
    return Noised(xt, x0, is_masked, t.float(), weight.float(), padded, prompt_mask), max(normaliser, 1.0)


PREFIXED = 0.5  # share of pretraining rows that keep a prefix clean, as a prompt is
LONGEST_PREFIX = 0.8  # of a row


def two_views(maskable: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(is_masked, maskable), both (2 B, L): pretraining's rows under two masks that are each other's complement.

    Every token is predicted once a row read, which halves the noise of the gradient or better (arXiv 2511.18159). Half
    of the rows keep a prefix of up to 80% clean, which is what tasks and writing look like, and are masked at uniform
    times; the others at times of Beta(2, 2).
    """
    n, length = maskable.shape
    begins = torch.rand(n, generator=generator) * LONGEST_PREFIX * length
    prefixed = torch.rand(n, generator=generator) < PREFIXED
    maskable = maskable & ~(prefixed[:, None] & (torch.arange(length)[None, :] < begins[:, None]))
    t = torch.where(prefixed, sample_t(n, generator), sample_t(n, generator, bell=True))
    first = mask_some(t, maskable, generator)
    return torch.cat([first, maskable & ~first]), maskable.repeat(2, 1)


def token_nll(denoiser: Any, noised: Noised) -> tuple[Tensor, Tensor]:
    """(nll, row): -log p(x0) in nats of each masked token, and the row it stands in; both (N,)."""
    where = noised.is_masked
    h = denoiser.states(noised.xt, noised.t, noised.attention_mask, noised.prompt_mask, noised.cached, where)
    return denoiser.nll(h, noised.x0[where]), where.nonzero()[:, 0]


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
    stderr: float
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
    return Estimate(mean, stderr, n, numerator, denominator)


@torch.no_grad()
def nll_bound(
    denoiser: Any,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    mask_id: int,
    draws: int = 1,
    seed: int = 0,
    counted: bool = False,
) -> Estimate:
    """Upper bound on the NLL in nats per answer token (the negative ELBO), with its standard error over rows.

    batches: (x0, answer_mask, attention_mask) triples. `draws` times are drawn for every row; `counted` has the lower
    variance.
    """
    generator = torch.Generator().manual_seed(seed)
    sums, counts = [], []
    for x0, answer_mask, attention_mask in batches:
        total = torch.zeros(len(x0))
        for _ in range(draws):
            noised, _ = noise_batch(x0, answer_mask, attention_mask, mask_id, "elbo", generator, counted)
            noised = noised.to(next(denoiser.parameters()).device)
            nll, row = token_nll(denoiser, noised)
            total += torch.zeros(len(x0)).index_add_(0, row.cpu(), (nll * noised.weight[row]).float().cpu())
        sums.append(total / draws)
        counts.append(answer_mask.sum(1).float())
    return ratio_estimate(torch.cat(sums), torch.cat(counts))

"""Masked diffusion: forward masking, losses and the NLL bound. Takes any callable denoiser.

t is in [0, 1], the chance that a token is masked: 0 is clean, 1 fully masked (the linear schedule: the papers' alpha_t
is 1 - t). Formulas: MDLM (arXiv 2406.07524).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from tinyld.errors import TinyldError

T_MIN = 1e-3  # smallest t drawn


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


def mask_counted(t: Tensor, maskable: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(is_masked, share): exactly ceil(t * n) of a row's n maskable tokens, (B, L) bool; share (B,) is that of n.

    Given its count, a set of masked positions is as likely here as under any schedule.
    """
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

    def split(self, parts: int) -> list[Noised]:
        """At most `parts` micro-batches of about equal numbers of rows, on the same noise."""
        return [self] if parts == 1 else [self.rows(some) for some in torch.arange(len(self.t)).chunk(parts)]

    def rows(self, some: Tensor) -> Noised:
        return self._map(lambda tensor: tensor[some])

    def trimmed(self) -> Noised:
        """Without the columns at the end that no row attends to."""
        if self.attention_mask is None:
            return self
        width = int(self.attention_mask.any(0).nonzero()[-1]) + 1
        return self._map(lambda tensor: tensor[:, :width] if tensor.dim() > 1 else tensor)

    def to(self, device: torch.device) -> Noised:
        if device.type == "cpu":
            return self
        return self._map(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Noised:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Noised(**{name: None if tensor is None else change(tensor) for name, tensor in values.items()})


def noise_text(
    x0: Tensor, maskable: Tensor, attention_mask: Tensor, mask_id: int, generator: torch.Generator
) -> Noised:
    """Pretraining's noise: the rows under `two_views`, for plain cross-entropy."""
    is_masked, maskable = two_views(maskable, generator)
    x0, attention_mask = x0.repeat(2, 1), attention_mask.repeat(2, 1)
    t = is_masked.sum(1) / maskable.sum(1).clamp(min=1)
    return noised_at(x0, is_masked, t, attention_mask, attention_mask & ~maskable, mask_id)


def noise_counted(
    x0: Tensor,
    maskable: Tensor,
    attention_mask: Tensor,
    mask_id: int,
    generator: torch.Generator,
    prompt_mask: Tensor | None = None,
) -> Noised:
    """Exactly ceil(t n) of a row's n maskable tokens masked, at uniform times; the t that is told is that share.

    E[CE summed / t] is the ELBO (MDLM, eq. 10), with less variance than under independent masks (LLaDA's likelihood,
    arXiv 2502.09992). A one-token answer is always masked, and its loss is exact.
    """
    is_masked, share = mask_counted(sample_t(len(x0), generator), maskable, generator)
    prompt_mask = attention_mask & ~maskable if prompt_mask is None else prompt_mask
    return noised_at(x0, is_masked, share, attention_mask, prompt_mask, mask_id)


OPEN = 0.25  # share of the rows of a task that are asked for their length


def noise_answers(
    x0: Tensor,
    answer_mask: Tensor,
    attention_mask: Tensor,
    tail_mask: Tensor | None,
    mask_id: int,
    generator: torch.Generator,
) -> list[Noised]:
    """A task's rows, as decoding meets them: first a length, then the tokens.

    `tail_mask` (B, L): what a slot holds from its answer's [EOS] on; None where all answers fill their slots. A quarter
    of the rows are asked for their length: their whole slots are masked, and scored up to the [EOS]. So the chance of
    [EOS] at a position is that the text ends there given that it comes so far. In the others the [EOS] is seen, what is
    behind it leaves the row, and so many of the tokens before it are masked as `noise_counted` says.
    """
    if tail_mask is None:
        return [noise_counted(x0, answer_mask, attention_mask, mask_id, generator)]
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
        parts.append(noise_counted(x0[told], text[told], seen, mask_id, generator, prompt_mask[told]).trimmed())
    return parts


def noised_at(
    x0: Tensor, is_masked: Tensor, t: Tensor, attention_mask: Tensor, prompt_mask: Tensor, mask_id: int
) -> Noised:
    padded = None if bool(attention_mask.all()) else attention_mask
    return Noised(torch.where(is_masked, mask_id, x0), x0, is_masked, t.float(), padded, prompt_mask)


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
    denoiser: Any, batches: Iterable[tuple[Tensor, Tensor, Tensor]], mask_id: int, draws: int = 1, seed: int = 0
) -> Estimate:
    """Upper bound on the NLL in nats per answer token (the negative ELBO), with its standard error over rows.

    batches: (x0, answer_mask, attention_mask) triples. `draws` times are drawn for every row.
    """
    generator = torch.Generator().manual_seed(seed)
    sums, counts = [], []
    for x0, answer_mask, attention_mask in batches:
        sums.append(row_nll(denoiser, x0, answer_mask, attention_mask, mask_id, draws, generator))
        counts.append(answer_mask.sum(1).float())
    return ratio_estimate(torch.cat(sums), torch.cat(counts))


@torch.no_grad()
def row_nll(
    denoiser: Any,
    x0: Tensor,
    answer_mask: Tensor,
    attention_mask: Tensor,
    mask_id: int,
    draws: int,
    generator: torch.Generator,
    prompt_mask: Tensor | None = None,
) -> Tensor:
    """(B,) on the processor: the bound in nats of each row's answer, the mean over `draws` times."""
    total = torch.zeros(len(x0))
    for _ in range(draws):
        noised = noise_counted(x0, answer_mask, attention_mask, mask_id, generator, prompt_mask)
        nll, row = token_nll(denoiser, noised.to(denoiser.device))
        total += torch.zeros(len(x0)).index_add_(0, row.cpu(), (nll / noised.t[row]).float().cpu())
    return total / draws

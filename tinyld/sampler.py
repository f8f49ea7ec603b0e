"""The reverse process: from masked answer slots to tokens, and to a length. Takes any denoiser that gives logits.

A slot is as wide as the longest answer allowed, and a text ends in it at one [EOS]. Training never scores what is
behind it, so the chance of [EOS] at a position is a hazard, that the text ends there *given that it comes so far*, and
the product of the hazards is a distribution over lengths. The first pass takes its median, or draws from it where there
is a temperature; labels get the likeliest, as a length between two that are likely may be no label's. Asked again while
it writes, a denoiser ends too soon: any finished sentence looks like an end, whatever is left to say. But a text that
is given too long a length limps, so training teaches one id more, which no text has: `delete`, where a gap between
words has more masks than are missing (after DreamOn, arXiv 2602.01326). A token that would stand beside its like and
is not sure ("the the") waits for all others, and is a delete if it is still so. Besides, a text may be written in
several lengths, and the likeliest is taken (length parallel decoding: Mask-Predict, arXiv 1904.09324). One that has to
say what its prompt names (`coverage`), and lacks some of that, is mended (`mending`), or else written longer.

A pointer looks at what is written, too, and may look again without a pass: once the first word of a name is written it
knows the second. So after a pass what it is sure of by now is written, until there is nothing more.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyld.config import DRAWN, THRESHOLDS, SampleConfig
from tinyld.diffusion import all_finite

REVISED = 0.7  # of the temperature, where a token is written anew
SURE = 0.9  # probability at which a copy is written without a pass, and a token beside its like is meant
RUN = 4  # tokens that a text has once
REVISING = 32  # passes at least where nothing is said, as short texts take little time
CACHED = 2**18  # logits
LENGTHS = (0.5, 0.7, 0.3, 0.85, 0.15)  # shares of the texts expected that are longer than each length that is tried
LONGER = 0.3  # the same, of a text that lacks something
LIKELIEST = -1.0  # in place of such a share


@torch.no_grad()
def decode(
    denoiser: Any, x: Tensor, answer_mask: Tensor, attention_mask: Tensor, mask_id: int, forbidden: list[int],
    config: SampleConfig, generator: torch.Generator | None = None, eos_id: int | None = None, watch: Any = None,
    is_label: bool = False, delete: int | None = None, mender: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(ids, forward passes of each row): x with its answer slots decoded from all [MASK], and [EOS] from a text's end.
    x, answer_mask, attention_mask: (B, L). `forbidden` ids are never written. Without `eos_id` every text fills its
    slot. A label's length is the likeliest one; other texts become shorter where the id `delete` is predicted.
    `mender` (`mending.Mender`) says what texts lack, and mends them. Passes count in all lengths that a text is written
    in. `watch` is called after every pass with x, and `share`, how much of all that is to be written was, but for what
    is written again because it lacks something."""

    def shown(nth: int = 0, lengths: int = 1) -> Any:
        return watch and (lambda x: watch(x, share=(nth + float((x != mask_id)[answer_mask].float().mean())) / lengths))

    generator = generator or torch.Generator(x.device).manual_seed(config.seed)
    x, prompt_mask = torch.where(answer_mask, mask_id, x), attention_mask & ~answer_mask
    if eos_id is None:
        masks = answer_mask, attention_mask, prompt_mask
        return fill_and_revise(denoiser, x, *masks, mask_id, forbidden, config, generator, shown())[:2]
    keeps_length = is_label or delete is None or config.sampler == "revise"
    shrinking = None if keeps_length else (answer_mask, delete, eos_id)
    real = None if bool(attention_mask.all()) else attention_mask
    first = denoiser(x, torch.ones(len(x), device=x.device), real, prompt_mask, where=answer_mask)
    first[:, forbidden] = -torch.inf
    hazard, never = spread(logp_of(eos_id, first).exp(), answer_mask), [*forbidden, eos_id]
    best, passes, tried = x, torch.ones(len(x), dtype=torch.long), list[Tensor]()
    likeliest = torch.full((len(x),), -torch.inf, device=x.device)  # a token, of the best
    lacks = torch.full_like(likeliest, torch.inf)  # words, the best
    chances = (LIKELIEST,) if is_label else LENGTHS[: config.lengths]
    chances = chances if config.temperature == 0 else (None,)
    mender = mender if config.temperature == 0 else None
    for nth, chance in enumerate((*chances, *((LONGER,) if mender else ()))):
        if nth == len(chances):
            best, used = mender.mend(best, clauses=False)
            passes, lacks = passes + used, lacks.new_tensor(mender.lacking(best))
        ends, share = choose_ends(hazard, chance, generator)
        behind = answer_mask & (ends.cumsum(1) > 0)
        lengths, again = (answer_mask & ~behind).sum(1), nth >= len(chances)
        is_new = torch.stack([lacks > 0 if again else likeliest < torch.inf, *(lengths != n for n in tried)]).all(0)
        tried.append(lengths)
        if not bool(is_new.any()):
            continue
        inside = answer_mask & ~behind & is_new[:, None]
        out, used, score = fill_and_revise(
            denoiser, torch.where(behind, eos_id, x), inside, attention_mask & (~behind | ends), prompt_mask, mask_id,
            never, config, generator, None if again else shown(nth, len(chances)), first[inside[answer_mask]], share,
            shrinking,
        )  # fmt: skip
        empty = torch.full_like(score, torch.inf if nth == 0 else -torch.inf)  # taken if that is the median
        sure, passes = torch.where(lengths == 0, empty, score), passes + used
        found = lacks.new_tensor(mender.lacking(out)) if mender else torch.zeros_like(lacks)
        is_best = found < lacks if again else (found < lacks) | ((found == lacks) & (sure > likeliest))
        is_best &= is_new
        best, lacks = torch.where(is_best[:, None], out, best), torch.where(is_best, found, lacks)
        likeliest = torch.where(is_best, sure, likeliest)
    if mender:
        best, used = mender.mend(best, clauses=True)
        passes = passes + used
    return best, passes


def fill_and_revise(
    denoiser: Any, x: Tensor, inside: Tensor, attended: Tensor, prompt_mask: Tensor, mask_id: int,
    forbidden: list[int], config: SampleConfig, generator: torch.Generator, watch: Any = None, *first: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `fill_in`. The sampler `revise` (Gibbs sampling, arXiv 1902.04094) fills in by the first quarter of its
    passes; each of the others masks every eighth token of the text again, and writes these anew with all others in
    sight, but none that makes a RUN of tokens which the text has already."""
    masks = inside, attended, prompt_mask, mask_id, forbidden
    if config.sampler != "revise":
        return fill_in(denoiser, x, *masks, config, generator, watch, *first)
    steps = config.steps or max(REVISING, int(inside.sum(1).max()))
    begun, cooler = math.ceil(steps / 4), config.temperature and max(1e-3, REVISED * config.temperature)
    drawn = replace(config, sampler="ancestral", steps=begun)
    x, passes, score = fill_in(denoiser, x, *masks, drawn, generator, watch, *first)
    again, eighth = replace(config, steps=1, temperature=cooler), inside.cumsum(1) % 8
    for i in range(steps - begun):
        part = inside & (eighth == i % 8)
        x, used, _ = fill_in(denoiser, torch.where(part, mask_id, x), *masks, again, generator, watch)
        passes += used
    return x, passes, score


def fill_in(
    denoiser: Any, x: Tensor, inside: Tensor, attended: Tensor, prompt_mask: Tensor, mask_id: int,
    forbidden: list[int], config: SampleConfig, generator: torch.Generator, watch: Any = None,
    first: Tensor | None = None, share: Any = 1.0, shrinking: tuple[Tensor, int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(x with the masks `inside` filled in, passes of each row, log-likelihood of a token of it as it was written). The
    denoiser is told as t the share of a row's slot that is masked. Rows that are done leave the batch. `first` are the
    logits at the masks where a pass was made already, which did not know the rows' lengths, and `share` how likely
    these are: what is not sure is not written from them, unless that is the last pass. With `shrinking` (slot (B, L),
    delete, [EOS]) a text becomes shorter by each delete. Where there are blocks (LLaDA, arXiv 2502.09992), what is in a
    later one than a row's first mask waits for all in that."""
    x, step, passes, score = x.clone(), 0, torch.zeros(len(x), dtype=torch.long), torch.zeros(len(x), device=x.device)
    looks_again = config.sampler == "threshold" and config.block is None
    made = int(first is not None)  # passes, before those made here
    lengths = inside.sum(1, keepdim=True) + made  # as many passes as tokens, where nothing is said
    later = [token for token in forbidden if not shrinking or token != shrinking[1]]  # forbidden after `first`
    total = inside.sum(1).clamp(min=1)
    before: tuple[Tensor, Tensor] | None = None  # (which of what the last pass predicted was of each place, or -1; it)
    while len(rows := (whole := (x == mask_id) & inside).any(1).nonzero()[:, 0]):
        length = int(attended[rows].any(0).nonzero()[-1]) + 1  # the ends of the longest texts may have left
        masked, real, logits, copies = whole[rows, :length], attended[rows, :length], first, None
        if logits is None:
            told = masked.sum(1) / inside[rows].sum(1), None if bool(real.all()) else real, prompt_mask[rows, :length]
            logits, copies = look(denoiser, x[rows, :length], *told, where=masked)  # (N, V)
            passes[rows.cpu()] += 1
        logits[:, later if first is None else forbidden] = -torch.inf
        if config.sampler == "revise":
            fresh = logits.clone()
            fresh[repeating(x[rows, :length], inside[rows, :length], masked)] = -torch.inf
            logits = torch.where(fresh.isfinite().any(1, keepdim=True), fresh, logits)
        parts: Iterable[Tensor] = in_parts(logits)
        if config.sampler == "klass":  # the next pass compares
            (logp,) = parts = [torch.cat(list(parts))]
        token, likely, lead, doubt = choose(parts, config, generator)
        waits = torch.zeros_like(masked)
        if shrinking and first is None:
            text = torch.where(inside[rows, :length], x[rows, :length], mask_id)
            beside = F.pad(text, (1, 1), value=mask_id)
            is_double = (token == beside[:, :-2][masked]) | (token == beside[:, 2:][masked])
            waits[masked] = is_double & (likely.exp() < SURE)
            token[waits[masked]] = shrinking[1]
        if config.sampler == "klass":
            if before is not None:
                same = whole & (before[0] >= 0)
                doubt[same[whole]] = divergence(logp[same[whole]], before[1][before[0][same]])
            before = spread(torch.arange(len(logp), device=x.device), whole, -1), logp
        confidence = spread(likely.exp(), masked) * (1.0 if first is None else share[rows])
        leads, doubts = spread(lead, masked), spread(doubt, masked, torch.inf)
        if config.block is not None:
            nth = (inside[rows, :length].cumsum(1) - 1) // config.block
            waits |= masked & (nth > nth.masked_fill(~masked, length).amin(1, keepdim=True))
        confidence, leads = (of.masked_fill(waits, -1e4) for of in (confidence, leads))
        doubts = doubts.masked_fill(waits, torch.inf)
        steps = config.steps or lengths[rows]
        tokens = accept(confidence, leads, doubts, masked, config, steps, step, generator, forced=first is None)
        while True:
            x[rows, :length] = torch.where(tokens, spread(token, masked), x[rows, :length])
            score[rows] += torch.where(tokens, spread(likely, masked), 0.0).sum(1)
            left = masked & (x[rows, :length] == mask_id)
            if copies is None or not looks_again or not bool(tokens.any()) or not bool(left.any()):
                break
            token, chance = copies(x[rows, :length]).likeliest(later)
            likely, tokens = chance.log(), left & (spread(chance, masked) >= min(SURE, config.enough))
        if shrinking and bool(((x == shrinking[1]) & inside).any()):
            x, inside, attended, source = without(x, inside, attended, *shrinking)
            before = before and (before[0].gather(1, source), before[1])
        step, first = step + 1, None
        if watch is not None:
            watch(x)
    return x, passes, score / total


def look(denoiser: Any, *given: Any, **told: Any) -> tuple[Tensor, Any]:
    """Its logits and, where it has a pointer, what looks again: `Denoiser.look`."""
    return denoiser.look(*given, **told) if hasattr(denoiser, "look") else (denoiser(*given, **told), None)


def without(x: Tensor, inside: Tensor, attended: Tensor, slot: Tensor, delete: int, eos_id: int) -> tuple[Tensor, ...]:
    """(x, what of it is the text, what is attended to, where each token stood), all (B, L), once each `delete` in a
    text is gone and what follows in its slot has moved up."""
    kept, place = ~(inside & (x == delete)), torch.arange(x.shape[1], device=x.device)
    source = torch.searchsorted(kept.cumsum(1), place.expand_as(x).contiguous(), right=True).clamp(max=x.shape[1] - 1)
    length, nth = (inside & kept).sum(1, keepdim=True), slot.cumsum(1) - 1
    inside = slot & (nth < length)
    x = torch.where(inside, x.gather(1, source), torch.where(slot, eos_id, x))
    return x, inside, torch.where(slot, nth <= length, attended), source


def repeating(x: Tensor, inside: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """(which of the N masks, which token there): those that would make a run of tokens that its text, what of x (B, L)
    is `inside`, has already."""
    row, at = masked.nonzero().T
    known, text = (F.pad(of, (RUN - 1, RUN - 1)) for of in (inside & ~masked, x))
    runs = torch.where(known, text, -1 - torch.arange(text.shape[1], device=x.device)).unfold(1, RUN, 1)
    found = []
    for i in range(RUN):  # which of the run it would be
        alike = (runs[row, at + RUN - 1 - i][:, None] == runs[row]).sum(2) == RUN - 1  # nothing unknown is like another
        mask, other = alike.nonzero().T
        found.append(torch.stack([mask, runs[row[mask], other, i]]))
    mask, token = torch.cat(found, 1)
    return mask[token >= 0], token[token >= 0]


def choose(parts: Iterable[Tensor], config: SampleConfig, generator: torch.Generator) -> tuple[Tensor, ...]:
    """(the token chosen at each of N places, its log-probability, what places are put in order by, the entropy there in
    nats if the sampler asks for it, else infinite), from log-probabilities (N, V) in parts. The order: entropy the
    least of that first, threshold and klass the widest margin to any other token (arXiv 2502.06768; it writes better
    than by confidence), all others the likeliest."""
    found = []
    for logp in parts:
        likely, token = logp.max(-1)
        all_finite(likely)  # a GPU does not survive a draw from what is no number
        if config.temperature > 0:
            token = torch.multinomial((logp / config.temperature).softmax(-1), 1, generator=generator)[:, 0]
            likely = logp.gather(1, token[:, None])[:, 0]
        lead, entropy = likely.exp(), torch.full_like(likely, torch.inf)
        if config.sampler == "entropy":
            lead = divergence(logp, torch.zeros_like(logp))
            entropy = -lead
        elif config.sampler in THRESHOLDS:
            lead = lead - logp.scatter(1, token[:, None], -torch.inf).amax(1).exp()
        found.append((token, likely, lead, entropy))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def logp_of(token: int, logits: Tensor) -> Tensor:
    """Its log-probability at each of N places, from logits (N, V)."""
    return all_finite(torch.cat([logp[:, token] for logp in in_parts(logits)]))


def in_parts(logits: Tensor) -> Iterator[Tensor]:
    """Log-probabilities of logits (N, V), on a processor of so many places at a time as its cache holds."""
    size = max(1, len(logits) if logits.is_cuda else CACHED // logits.shape[1])
    return (some.log_softmax(-1, dtype=torch.float32) for some in logits.split(size))


def choose_ends(hazard: Tensor, chance: float | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(where each text ends, (B, L) bool, nowhere if it fills its slot; how likely that length is, (B, 1)). hazard: (B,
    L), the chance of an end at each masked position given that the text comes so far, 0 elsewhere. chance: that a text
    is longer than the length that is chosen; LIKELIEST: it is the likeliest one; None: it is drawn."""
    comes_so_far = log_survival(hazard).exp()
    reaches = F.pad(comes_so_far, (1, 0), value=1.0)
    likely = torch.cat([reaches[:, :-1] - reaches[:, 1:], reaches[:, -1:]], 1)  # the last fills the slot
    if chance == LIKELIEST:
        end = likely.argmax(1, keepdim=True)
    else:
        drawn = torch.rand((len(hazard), 1), generator=generator, device=hazard.device) if chance is None else chance
        end = (comes_so_far > drawn).sum(1, keepdim=True)
    ends = torch.zeros_like(likely, dtype=torch.bool).scatter(1, end, True)
    return ends[:, :-1], likely.gather(1, end)


def log_survival(hazard: Tensor) -> Tensor:
    """log of the chance that a text goes on behind each position; hazard: (B, L), its chance to end there if it comes
    so far."""
    return torch.log1p(-hazard.clamp(max=1 - 1e-6)).cumsum(1)


def spread(values: Tensor, masked: Tensor, elsewhere: float = 0) -> Tensor:
    """(N,) values at the N positions of masked (B, L) -> (B, L)."""
    return torch.full(masked.shape, elsewhere, dtype=values.dtype).to(values).masked_scatter(masked, values)


def divergence(logp: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) in nats of each pair of rows, (N,), from log-probabilities (N, V); from zeros it is -entropy."""
    return (logp.exp() * (logp.clamp(min=-1e4) - other.clamp(min=-1e4))).sum(-1)


def accept(
    confidence: Tensor, lead: Tensor, doubt: Tensor, masked: Tensor, config: SampleConfig, steps: Any, step: int,
    generator: torch.Generator, forced: bool,
) -> Tensor:  # fmt: skip
    """Which of the masked are written in this pass, by all but ancestral at least one in every row if `forced`; all
    (B, L).

    confidence: the probability of the token chosen there. lead: what comes first, as `choose` says. doubt: the entropy
    there in nats, or for klass how many nats the distribution moved since the last pass. steps: of all rows, or (B, 1).
    Those that look for what is sure write in any case the `least` tokens that come first.

    - low_confidence (LLaDA, arXiv 2502.09992): the most confident, an equal number in each of `steps` passes.
    - threshold (Fast-dLLM, arXiv 2505.22618): all whose confidence is at least `threshold`.
    - klass (arXiv 2511.05664): of those whose confidence is at least `threshold` all that moved by less than `kl` nats
      since the last pass.
    - entropy (EB-sampler, arXiv 2505.24857): from the least entropy up, while what the others leave open together is
      at most `entropy` nats.
    - ancestral (MDLM, arXiv 2406.07524): each position with the same chance, in no order.
    - revise: begins so; see `fill_and_revise`. What a task asks for it writes worse than the others.
    """
    if config.sampler in DRAWN:
        last = torch.as_tensor(steps, device=masked.device)
        now, then = (1.0 - last.clamp(max=step + i) / last for i in (0, 1))
        chance = (now - then) / now.clamp(min=1e-6)  # of those that are masked at t = now
        draw = torch.rand(masked.shape, generator=generator, device=masked.device)
        return masked & ((draw < chance) | (step + 1 >= steps))
    if config.steps is not None and step + 1 >= steps:
        return masked
    least: Any = config.least
    if config.sampler == "low_confidence":
        sure, least = torch.zeros_like(masked), torch.ceil(masked.sum(1, keepdim=True) / (steps - step))
    elif config.sampler == "entropy":
        rising, order = doubt.masked_fill(~masked, torch.inf).sort(1)
        sure = torch.zeros_like(masked).scatter(1, order, rising.cumsum(1) - rising * forced <= config.enough)
    else:
        sure = confidence >= config.enough
        if config.sampler == "klass":
            sure &= doubt <= config.kl
    rank = lead.masked_fill(~masked, -torch.inf).argsort(stable=True, dim=1, descending=True).argsort(1)
    return masked & (sure | ((rank < least) & forced))

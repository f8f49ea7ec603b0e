"""A pointer: at a masked position, each token of the prompt may be the one that is missing (pointer-generator networks,
arXiv 1704.04368).

    p(v) = (p_base(v) + sum_j odds_j [x_j = v]) / (1 + sum_j odds_j),  odds_j = e^(u + f_j) softmax_j(q . k_j / sqrt(r))
    f_j = sum_ab w_ab [x_(i+a) = x_(j+b), and a = b or not = x_(j+a)] + c [x_j is in the answer],  -2 <= a, b <= 2

at position i, with q = Q norm(h), of its final state; k_j = K norm(h_j), of the prompt's states before the last block;
and u = w . norm(h) + b, the log odds of copying. f looks at what is written: whether a copy beside i goes on with x_j,
and whether x_j was copied before (coverage, same paper). What the prompt has twice (the digits of 599) tells nothing
where it is matched in line (a = b) already. All start at zero, but for Q and K at random and b so that 5%
is copied, without preference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld.block import take

NEAR = 2  # positions on either side of a mask, and of what it may copy, that are compared
STEP = 10.0  # as many times as far as other parameters do w_ab and c go in an update, as they are large in the end
TINY = 1e-30  # the least odds that count
FRESH, MOST = -3.0, 30.0  # log odds of copying: at the start, and at most


class Copies(NamedTuple):
    """What may be copied to each of some positions, beside what the vocabulary's logits say there."""

    odds: Tensor  # (..., L), of each position of the row; those of a token are at the first place that it has there
    ids: Tensor  # (..., L) int64, the row's tokens

    def nll(self, nll: Tensor, target: Tensor) -> Tensor:
        """-log p(target) in nats, (...), where by the logits alone it is `nll`."""
        right = (self.odds * (self.ids == target[..., None])).sum(-1)
        more = F.softplus(nll + right.clamp(min=TINY).log()).where(right > TINY, 0.0)
        return nll - more + self.odds.sum(-1).log1p()

    def logits(self, logits: Tensor) -> Tensor:
        """Logits (..., V) in fp32 with what may be copied in them; where that is nothing, log-probabilities."""
        logp = logits.log_softmax(-1, dtype=torch.float32)
        own = logp.gather(-1, self.ids)
        more = torch.logaddexp(own, self.odds.clamp(min=TINY).log()) - own
        return logp.scatter_add(-1, self.ids, more.where((self.odds > 0) & own.isfinite(), 0.0))

    def likeliest(self, forbidden: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(token, probability that it is copied), both (...), of the likeliest that is not forbidden."""
        never = torch.isin(self.ids, self.ids.new_tensor(forbidden))
        odds = self.odds.masked_fill(never, 0.0)
        most, place = odds.max(-1)
        return self.ids.gather(-1, place[..., None])[..., 0], most / (1.0 + odds.sum(-1))


class Pointer(nn.Module):
    def __init__(self, rank: int, width: int, generator: torch.Generator | None):
        super().__init__()
        self.query, self.key = (
            nn.Parameter(torch.randn(rank, width, generator=generator) / math.sqrt(width)) for _ in range(2)
        )
        self.gate, self.bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.full((1,), FRESH))
        self.written = nn.Parameter(torch.zeros((2 * NEAR + 1) ** 2 + 1))  # w_ab, row by row, and c; in STEPs

    @staticmethod
    def num_parameters(rank: int, width: int) -> int:
        return (2 * rank + 1) * width + (2 * NEAR + 1) ** 2 + 2 if rank else 0

    def forward(
        self, h: Tensor, read: Tensor, prompt_mask: Tensor, positions: Tensor | None, asked: Tensor | None = None
    ) -> Callable[[Tensor], Copies]:
        """What gives, for the tokens ids (B, L) of rows, what may be copied to `positions` (B, M), None for all L, of
        which N are `asked` for, (B, M) bool, None for all: from final states h (B, M, D), of a prompt whose states
        before the last block are among `read` (B, L, D)."""
        with torch.autocast(h.device.type, enabled=False):
            h, read = (F.layer_norm(of.float(), of.shape[-1:]) for of in (h, read))
            scores = (h @ self.query.T) @ (read @ self.key.T).transpose(1, 2) / math.sqrt(len(self.query))
            share = scores.masked_fill(~prompt_mask[:, None], torch.finfo(scores.dtype).min).softmax(-1)
            share, gate = share * prompt_mask.any(1)[:, None, None], (h @ self.gate + self.bias)[..., None]

        def copies(ids: Tensor) -> Copies:
            with torch.autocast(h.device.type, enabled=False):
                found = share * (gate + self.by_written(ids, prompt_mask, positions)).clamp(max=MOST).exp()
            first = (ids[:, :, None] == ids[:, None]).byte().argmax(1)  # place of each token: of equal ones the first
            odds = torch.zeros_like(found).scatter_add(2, first[:, None].expand_as(found), found)
            if asked is None:
                return Copies(odds, ids[:, None].expand_as(odds))
            return Copies(odds[asked], ids[asked.nonzero()[:, 0]])

        return copies

    def by_written(self, ids: Tensor, prompt_mask: Tensor, positions: Tensor | None) -> Tensor:
        """f (B, M, L), of what `forward` is given."""
        alike, side = ids[:, :, None] == ids[:, None], 2 * NEAR + 1
        near, again = (STEP * self.written).split([side * side, 1])
        weights = near.view(side, side)
        near = F.conv2d(alike.float()[:, None], weights[None, None], padding=NEAR)[:, 0]
        near = near if positions is None else take(near, positions)
        beside = F.pad(ids, (NEAR, NEAR), value=-1).unfold(1, side, 1)  # (B, L, side): x_(j+b)
        same = (beside[..., None] == beside[..., None, :]) & ~torch.eye(side, dtype=torch.bool, device=ids.device)
        again_there, mine = (same * weights).sum(-1), beside if positions is None else take(beside, positions)
        for a in range(side):
            near = near - (mine[:, :, None, a] == beside[:, None, :, a]) * again_there[:, None, :, a]
        return near + again * (alike & ~prompt_mask[:, :, None]).any(1)[:, None]

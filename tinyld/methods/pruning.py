"""--ranks auto: the weakest rank units of all sites are dropped while training, and each site keeps what it uses.

A unit's strength is ||a_u|| ||b_u||. What is dropped is zero and stays so, which is how a resumed run knows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FROM, TO = 0.2, 0.6  # of the run: while units are dropped


class Pruning:
    """The rank units of `sites`, of which `share` is dropped."""

    def __init__(self, sites: Sequence[Any], share: float):
        self.sites, self.share = sites, share
        self.dropped: Tensor | None = None  # (units of all sites,) bool

    def strengths(self) -> list[Tensor]:
        return [(site.up.norm(dim=0) * site.down.norm(dim=1)).cpu() for site in self.sites]

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """Drops the weakest until at `progress` of the run the share is reached that is due."""
        if progress < FROM:
            return
        strengths = self.strengths()
        sizes, strength = [len(s) for s in strengths], torch.cat(strengths)
        if self.dropped is None:
            self.dropped = strength == 0
        due = math.ceil(self.share * min(1.0, (progress - FROM) / (TO - FROM)) * len(strength) - 1e-9)
        if due > int(self.dropped.sum()):
            lasting = torch.cat([strongest(site, own) for site, own in zip(self.sites, strengths, strict=True)])
            order = strength.masked_fill(self.dropped, -1.0).masked_fill(lasting, math.inf).argsort(stable=True)
            self.dropped = torch.zeros_like(lasting)
            self.dropped[order[: min(due, int((~lasting).sum()))]] = True
        for site, dropped in zip(self.sites, self.dropped.split(sizes), strict=True):
            site.drop(dropped)

    @torch.no_grad()
    def finish(self) -> tuple[int, ...]:
        """Forgets the dropped units; the ranks that are left, site by site."""
        for site, strength in zip(self.sites, self.strengths(), strict=True):
            is_kept = (strength > 0) | strongest(site, strength)
            site.keep(is_kept, [int(is_kept[:rank].sum()) for rank in site.ranks])
        return tuple(rank for site in self.sites for rank in site.ranks)


def strongest(site: Any, strength: Tensor) -> Tensor:
    """(units,) bool: the strongest of the units that all bands use, which every site keeps."""
    found = torch.zeros(len(strength), dtype=torch.bool)
    found[strength[: min(site.ranks)].argmax()] = True
    return found

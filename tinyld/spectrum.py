"""What a trajectory adapter's bands hold and are worth: effective ranks, and what is lost when a band is off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tinyld.checkpoint import Base
from tinyld.data import TaskRows
from tinyld.evaluate import Evaluation, evaluate
from tinyld.interference import effective_rank
from tinyld.methods.bands import BAND_NAMES
from tinyld.methods.trajectory_lora import TrajectoryPush


@torch.no_grad()
def effective_ranks(push: TrajectoryPush) -> list[list[float]]:
    """By place (lowest first), by band (high noise first): the effective rank of sigma A B over the band's units."""
    found = []
    for place in push.places:
        row = []
        for band, units in enumerate(place.units):
            down = place.down
            if place.core is not None:
                down = torch.block_diag(*place.core[band]).T @ down
            row.append(effective_rank(torch.linalg.svdvals((place.gained_up * units.abs()) @ down)))
        found.append(row)
    return found


@contextmanager
def band_off(push: TrajectoryPush, band: int) -> Iterator[None]:
    """Within it, rows in that band get no push."""
    kept = [(place.units.clone(), place.sigma.clone()) for place in push.places]
    for place in push.places:
        place.units[band], place.sigma[band] = 0.0, 0.0
    try:
        yield
    finally:
        for place, (units, sigma) in zip(push.places, kept, strict=True):
            place.units.copy_(units)
            place.sigma.copy_(sigma)


def spectrum(base: Base, push: TrajectoryPush, rows: TaskRows, limit: int | None = None) -> dict[str, Any]:
    """Effective ranks, and by band the accuracy, NLL and share of the NLL reduction that is lost when it is off."""

    def measured() -> Evaluation:
        return evaluate(base.model, rows, base.tokenizer, limit=limit)

    whole = measured()
    kept, push.weight = push.weight, 0.0
    plain = measured()
    push.weight = kept
    record: dict[str, Any] = {"effective_rank": effective_ranks(push), "n": whole.n, "bands": []}
    for label, found in (("adapter on", whole), ("adapter off", plain)):
        record["bands"].append({"which": label, "accuracy": found.accuracy, "nll_bound": found.nll_bound})
    for band, name in enumerate(BAND_NAMES):
        with band_off(push, band):
            found = measured()
        reduction = plain.nll_bound - whole.nll_bound
        share = (found.nll_bound - whole.nll_bound) / reduction if reduction else None
        record["bands"].append(
            {"which": f"{name} off", "accuracy": found.accuracy, "nll_bound": found.nll_bound, "share_lost": share}
        )
    return record

"""How much the adapters of a composition get in each other's way: directions and spaces of their pushes."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyld.checkpoint import Base
from tinyld.data import TaskRows
from tinyld.methods.bands import BAND_EDGES, BAND_NAMES
from tinyld.methods.trajectory_lora import TrajectoryPush

ROWS = 64  # of each task


@torch.no_grad()
def answer_states(base: Base, rows: TaskRows, push: Any, t: float, mask_id: int) -> Tensor:
    """(N, D) final states at the masked answers of a task's first rows, the push told noise level t."""
    batch = rows.take(np.arange(min(ROWS, len(rows))))
    device = base.model.embedding.weight.device
    x0, answer, real = (part.to(device) for part in (batch.x0, batch.answer_mask, batch.attention_mask))
    xt = torch.where(answer, mask_id, x0)
    kept, base.model.push = base.model.push, push
    try:
        h = base.model.states(xt, torch.full((len(xt),), t, device=device), real, real & ~answer)
    finally:
        base.model.push = kept
    return h[answer]


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007); 0 for a zero matrix."""
    total = singular_values.sum()
    if total <= 0:
        return 0.0
    p = singular_values / total
    return float(torch.exp(-(p * p.clamp(min=1e-30).log()).sum()))


def push_rank(push: TrajectoryPush) -> float:
    """Mean over places of the effective rank of A B."""
    ranks = [effective_rank(torch.linalg.svdvals(place.gained_up @ place.down)) for place in push.places]
    return float(np.mean(ranks))


def principal_cosines(one: Tensor, other: Tensor) -> Tensor:
    """Cosines of the principal angles between two column spaces, largest first (Bjorck and Golub 1973). (D, r) each.

    Columns that are zero or hang on others span nothing; a space of nothing has no angles.
    """
    q_one, q_other = (column_space(m) for m in (one, other))
    return torch.linalg.svdvals(q_one.T @ q_other).clamp(max=1.0)


def column_space(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the columns: (D, r) -> (D, rank)."""
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, s > 1e-5 * s.max().clamp(min=1e-12)]


@torch.no_grad()
def interference(base: Base, pushes: dict[str, TrajectoryPush], rows: dict[str, TaskRows], mask_id: int) -> dict:
    """Of every pair: the mean cosine between the two's changes of the answer's final state, by band, on both tasks'
    rows, and the mean cosine of the principal angles between their up-projections where both push."""
    pairs = []
    for one, other in combinations(pushes, 2):
        record: dict[str, Any] = {"pair": [one, other]}
        for (high, low), band in zip(zip(BAND_EDGES, BAND_EDGES[1:], strict=False), BAND_NAMES, strict=True):
            t, cosines = (high + low) / 2, []
            for task in (one, other):
                plain = answer_states(base, rows[task], None, t, mask_id)
                deltas = [answer_states(base, rows[task], pushes[p], t, mask_id) - plain for p in (one, other)]
                cosines.append(F.cosine_similarity(*deltas, dim=-1))
            record[f"cosine_{band}"] = float(torch.cat(cosines).mean())
        angles = []
        for depth in sorted(set(pushes[one].depths) & set(pushes[other].depths)):
            ups = [pushes[p].place_at(depth).up for p in (one, other)]
            found = principal_cosines(*ups)
            angles += [float(found.mean())] if len(found) else []
        record["principal_cosine"] = float(np.mean(angles)) if angles else None
        pairs.append(record)
    return {"pairs": pairs, "effective_rank": {name: push_rank(push) for name, push in pushes.items()}}

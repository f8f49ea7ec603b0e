"""Which adapter a prompt belongs to: the nearest prototype of the prompts that each was trained on.

Prompts are read by the base's token embeddings alone, normalised: averaged over the whole prompt, and one by one for
the few tokens next to the answer, where a task's template stands. Nothing is trained.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld.checkpoint import Base
from tinyld.data import TaskRows

NEAR = (-2, -1, 1, 2)  # positions before the answer's first token and after its last
PROTOTYPE_ROWS = 1_000
FLOOR = 0.01  # under variances: a template's tokens have none


def answer_slot(prompt_mask: Tensor) -> Tensor:
    """(B, L) bool: positions that are no prompt and have some prompt after them; what comes last is padding."""
    follows = prompt_mask.flip(1).cumsum(1).flip(1) > 0
    return ~prompt_mask & follows


def prompt_features(embedded: Tensor, prompt_mask: Tensor) -> Tensor:
    """(B, 5 D) of token embeddings (B, L, D): their mean over the prompt, and those of the tokens next to the answer.

    What stands next to the answer is the task's template, the same in every row; apart from the rest, it tells tasks
    apart whose texts are alike, or longer than those that a prototype was made from. A token that is missing is zero.
    """
    normal = F.layer_norm(embedded, embedded.shape[-1:])

    def mean(chosen: Tensor) -> Tensor:
        share = chosen.to(normal.dtype) / chosen.sum(1, keepdim=True).clamp(min=1)
        return (normal * share[..., None]).sum(1)

    slot, length = answer_slot(prompt_mask).int(), prompt_mask.shape[1]
    first = slot.argmax(1)
    last = first + slot.sum(1) - 1
    parts = [mean(prompt_mask)]
    for offset in NEAR:
        position = (first if offset < 0 else last) + offset
        parts.append(mean(prompt_mask & (torch.arange(length, device=position.device) == position[:, None])))
    return torch.cat(parts, dim=1).float()


@torch.no_grad()
def task_features(base: Base, rows: TaskRows, limit: int | None = None) -> Tensor:
    """(rows, 5 D) prompt features of a task's first `limit` rows."""
    device = base.model.embedding.weight.device
    n = len(rows) if limit is None else min(limit, len(rows))
    found = []
    for chunk in np.array_split(np.arange(n), -(-n // 100)):
        batch = rows.take(chunk)
        prompt_mask = (batch.attention_mask & ~batch.answer_mask).to(device)
        found.append(prompt_features(base.model.embed(batch.x0.to(device)), prompt_mask))
    return torch.cat(found)


def prompt_prototype(base: Base, rows: TaskRows) -> Tensor:
    """(2, 5 D), what a router knows of a task's prompts: mean and variance of their features."""
    features = task_features(base, rows, PROTOTYPE_ROWS).cpu()
    return torch.stack([features.mean(0), features.var(0, correction=0)])


def prototype_shape(width: int) -> tuple[int, int]:
    """Of `prompt_prototype`, for a base of that width."""
    return 2, (1 + len(NEAR)) * width


class Router(nn.Module):
    """Names the member whose mean is nearest, in units of the members' mean variance (linear discriminant analysis
    with a diagonal covariance)."""

    def __init__(self, prototype: Tensor):
        """prototype: (k, 2, 5 D)"""
        super().__init__()
        self.register_buffer("prototype", prototype)
        self.only: int | None = None  # the member that answers all rows, whatever their prompts

    def nearest(self, features: Tensor) -> Tensor:
        """(B,) the member to answer each row. features: (B, 5 D)."""
        if self.only is not None:
            return torch.full((len(features),), self.only, device=features.device)
        mean, variance = self.prototype[:, 0], self.prototype[:, 1].mean(0)
        scale = (variance + FLOOR).rsqrt()
        return torch.cdist(features * scale, mean * scale).argmin(1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, k) one-hot weights of the members that answer."""
        return F.one_hot(self.nearest(features), len(self.prototype)).to(features.dtype)


def measure_routing(base: Base, router: Router, owners: dict[str, TaskRows], limit: int | None) -> list[dict[str, Any]]:
    """Of each member's rows the share that goes to each member, and "right": to those of the same task. owners: the
    members' names, with the rows of their task."""
    found = []
    for name, rows in owners.items():
        nearest = router.nearest(task_features(base, rows, limit))
        goes = {other: float((nearest == i).float().mean()) for i, other in enumerate(owners)}
        right = sum(share for share, of in zip(goes.values(), owners.values(), strict=True) if of is rows)
        found.append({"task": name, "n": len(nearest), "right": right, "goes_to": goes})
    return found

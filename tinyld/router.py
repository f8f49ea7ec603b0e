"""Which adapter a prompt belongs to: nearest prototype, which needs no training, or a small trained network.

Both read the same features of the instruction alone: the base's token embeddings, normalised, averaged over the whole
prompt and one by one for the few tokens next to the answer, where a task's template stands.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld.checkpoint import Base
from tinyld.config import check
from tinyld.data import TaskRows, torch_seeded
from tinyld.methods.trajectory_lora import pool

NEAR = (-2, -1, 1, 2)  # places before the answer's first token and after its last
WIDTHS = 1 + len(NEAR)  # of the base's width, in a prompt's features
PROTOTYPE_ROWS = 1_000
HIDDEN = 512  # of the trained router, as in LoRA-Diffusion


def answer_slot(prompt_mask: Tensor) -> Tensor:
    """(B, L) bool: positions that are no prompt and have some prompt after them; what comes last is padding."""
    follows = prompt_mask.flip(1).cumsum(1).flip(1) > 0
    return ~prompt_mask & follows


def prompt_features(embedded: Tensor, prompt_mask: Tensor) -> Tensor:
    """(B, 5 D) of token embeddings (B, L, D): their mean over the prompt, and those of the tokens next to the answer.

    What stands next to the answer is the task's template, the same in every row; apart from the rest, it tells tasks
    apart whose texts are alike, or longer than those that a prototype was made from. A token that is missing is zero.
    """
    slot, length = answer_slot(prompt_mask).int(), prompt_mask.shape[1]
    first = slot.argmax(1)
    last = first + slot.sum(1) - 1
    parts = [pool(embedded, prompt_mask)]
    for offset in NEAR:
        place = (first if offset < 0 else last) + offset
        parts.append(pool(embedded, prompt_mask & (torch.arange(length, device=place.device) == place[:, None])))
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
    """(2, 5 D): mean and variance of a task's prompt features. Each adapter keeps its own."""
    features = task_features(base, rows, PROTOTYPE_ROWS).cpu()
    return torch.stack([features.mean(0), features.var(0, correction=0)])


class PrototypeRouter(nn.Module):
    """All weight on the member whose mean is nearest, in units of the members' mean variance (shared-covariance
    linear discriminant with a diagonal covariance)."""

    def __init__(self, prototypes: Tensor):
        """prototypes: (k, 2, 5 D)"""
        super().__init__()
        self.register_buffer("prototypes", prototypes)

    def forward(self, features: Tensor) -> Tensor:
        """(B, k) weights, one-hot. features: (B, 5 D)."""
        mean, variance = self.prototypes[:, 0], self.prototypes[:, 1].mean(0)
        scale = (variance + 0.01).rsqrt()
        nearest = torch.cdist(features * scale, mean * scale).argmin(1)
        return F.one_hot(nearest, len(mean)).to(features.dtype)


class TrainedRouter(nn.Module):
    """softmax(W_2 ReLU(W_1 f)): the paper's router, two layers on the pooled prompt."""

    def __init__(self, width: int, members: int, generator: torch.Generator | None = None):
        super().__init__()
        self.hidden = nn.Parameter(torch.empty(HIDDEN, width).normal_(0.0, width**-0.5, generator=generator))
        self.hidden_bias = nn.Parameter(torch.zeros(HIDDEN))
        self.out = nn.Parameter(torch.zeros(members, HIDDEN))
        self.out_bias = nn.Parameter(torch.zeros(members))

    def logits(self, features: Tensor) -> Tensor:
        hidden = F.relu(F.linear(features, self.hidden, self.hidden_bias))
        return F.linear(hidden, self.out, self.out_bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, k) weights that add up to 1. features: (B, 5 D)."""
        return self.logits(features).softmax(1)


def train_router(features: Sequence[Tensor], seed: int = 0, epochs: int = 20) -> TrainedRouter:
    """A router that tells the tasks apart by their prompt features, (rows, 5 D) a task; AdamW, batches of 64."""
    check(len(features) >= 2, f"a router needs at least two tasks, got {len(features)}")
    x = torch.cat(list(features)).cpu()
    y = torch.cat([torch.full((len(f),), i) for i, f in enumerate(features)])
    generator = torch_seeded(seed, 4)
    router = TrainedRouter(x.shape[1], len(features), generator)
    optimizer = torch.optim.AdamW(router.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(router.logits(x[rows]), y[rows]).backward()
            optimizer.step()
    return router.requires_grad_(False)

"""Which adapter a prompt belongs to, or none: the nearest prototype of the prompts that each was trained on.

Prompts are read by the base's token embeddings alone, normalised: averaged over the whole prompt, and one by one for
the few tokens next to the answer, where a task's template stands. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld.checkpoint import Base
from tinyld.data import TaskRows, spread_over
from tinyld.rows import bundled_data_dir, prompt_of
from tinyld.tasks import Task
from tinyld.tokenizer import read_lines

NEAR = (-2, -1, 1, 2)  # positions before the answer's first token and after its last
WIDTHS = 1 + len(NEAR)  # of the base's width, in a prompt's features
PROTOTYPE_ROWS = 1_000
DIRECTIONS = 64  # in which a task's prompts are known to vary
STRANGERS = 500  # texts that belong to no task, to count wrong acceptances on
KNOWN = 0.99  # share of a task's own prompts that its limit takes in
FLOOR = 0.01  # under variances: a template's tokens have none
NONE = -1


def answer_slot(prompt_mask: Tensor) -> Tensor:
    """(B, L) bool: positions that are no prompt and have some prompt after them; what comes last is padding, or an
    answer that ends its row."""
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
    ends_row = slot.sum(1) == 0  # an answer with nothing behind it
    first = torch.where(ends_row, prompt_mask.sum(1), slot.argmax(1))
    last = torch.where(ends_row, length, first + slot.sum(1) - 1)
    parts = [mean(prompt_mask)]
    for offset in NEAR:
        position = (first if offset < 0 else last) + offset
        parts.append(mean(prompt_mask & (torch.arange(length, device=position.device) == position[:, None])))
    return torch.cat(parts, dim=1).float()


@torch.no_grad()
def task_features(base: Base, rows: TaskRows, chosen: np.ndarray | None = None) -> Tensor:
    """(rows, 5 D) prompt features of a task's rows, or of some of them."""
    device, found = base.model.device, []
    chosen = np.arange(len(rows)) if chosen is None else chosen
    at_once = base.model.rows_at_once(int(rows.lengths[chosen].max()), 100)
    for chunk in np.array_split(chosen, -(-len(chosen) // at_once)):
        batch = rows.take(chunk)
        prompt_mask = (batch.attention_mask & ~batch.answer_mask).to(device)
        found.append(prompt_features(base.model.embed(batch.x0.to(device)), prompt_mask))
    return torch.cat(found)


def prompt_prototype(base: Base, rows: TaskRows) -> dict[str, Tensor]:
    """What a router knows of a task's prompts; each adapter keeps its own.

    "prototype" (2, 5 D): mean and variance of their features; "directions" (m, D): those in which their mean embedding
    varies most, each of a length below 1 by how much more than the rest (probabilistic PCA, Tipping and Bishop 1999).
    """
    features = task_features(base, rows, spread_over(len(rows), PROTOTYPE_ROWS)).cpu()
    width = base.model.config.d_model
    kept = prototype_shapes(width)["directions"][0]
    of_means = torch.cov(features[:, :width].T, correction=0).double()  # in fp32 LAPACK finds no vectors of mere noise
    values, vectors = (found.float() for found in torch.linalg.eigh(of_means))  # smallest first
    rest = values[:-kept].mean().clamp(min=1e-8)
    share = 1 - rest / values[-kept:].clamp(min=rest)
    prototype = torch.stack([features.mean(0), features.var(0, correction=0)])
    return {"prototype": prototype, "directions": (vectors[:, -kept:] * share.sqrt()).T.contiguous()}


def prototype_shapes(width: int) -> dict[str, tuple[int, int]]:
    """Of the tensors of `prompt_prototype`, for a base of that width."""
    return {"prototype": (2, WIDTHS * width), "directions": (min(DIRECTIONS, width // 2), width)}


class Router(nn.Module):
    """Names the member whose mean is nearest, in units of the members' mean variance (linear discriminant analysis
    with a diagonal covariance), and says whether a prompt is nearer to that member than its limit."""

    def __init__(self, prototype: Tensor, directions: Tensor):
        """prototype: (k, 2, 5 D), directions: (k, m, D). No prompt is refused before `set_limits`."""
        super().__init__()
        self.register_buffer("prototype", prototype)
        self.register_buffer("directions", directions)
        self.register_buffer("limits", torch.full((len(prototype),), torch.finfo(torch.float32).max))
        self.only: int | None = None  # the member that answers all rows, whatever their prompts

    def nearest(self, features: Tensor) -> Tensor:
        """(B,) the member to answer each row, whether or not it is near. features: (B, 5 D)."""
        if self.only is not None:
            return torch.full((len(features),), self.only, device=features.device)
        mean, variance = self.prototype[:, 0], self.prototype[:, 1].mean(0)
        scale = (variance + FLOOR).rsqrt()
        return torch.cdist(features * scale, mean * scale).argmin(1)

    def distance(self, features: Tensor, member: int) -> Tensor:
        """(B,) squared distance of the mean embedding from a member's, less what its own prompts vary by."""
        directions = self.directions[member]  # (m, D)
        off = features[:, : directions.shape[1]] - self.prototype[member, 0, : directions.shape[1]]
        with torch.autocast(off.device.type, enabled=False):  # a difference of two sums
            return off.square().sum(1) - (off @ directions.T).square().sum(1)

    def choose(self, features: Tensor) -> Tensor:
        """(B,) the member that each row belongs to, or NONE where the row is unlike all of that member's own."""
        chosen = self.nearest(features)
        for member, limit in enumerate(self.limits):
            chosen[(chosen == member) & (self.distance(features, member) > limit)] = NONE
        return chosen

    def set_limits(self, features: Sequence[Tensor]) -> None:
        """Each member's limit: its distance from the KNOWN share of the prompts (rows, 5 D) of its own task."""
        for member, own in enumerate(features):
            self.limits[member] = torch.quantile(self.distance(own, member), KNOWN)


def measure_routing(base: Base, router: Router, rows: dict[str, TaskRows], limit: int | None) -> list[dict[str, Any]]:
    """Counts, of each member's task, the share of rows that goes to each member ("right": to the task's own); sets the
    router's limits by every other row, and counts on the rest what is refused, and of texts of no task what is taken
    for the task's. rows: by the tasks' names, in the members' order."""
    features = {name: task_features(base, of, np.arange(len(of))[:limit]) for name, of in rows.items()}
    router.set_limits([own[::2] for own in features.values()])
    found = []
    for name, of in rows.items():
        rest = features[name][1::2] if len(features[name]) > 1 else features[name]
        nearest, strangers = router.nearest(features[name]), stranger_rows(base, of.task)
        goes = {other: share(nearest == i) for i, other in enumerate(rows)}
        accepted = None if strangers is None else share(router.choose(task_features(base, strangers)) != NONE)
        found.append({
            "task": name, "n": len(nearest), "right": goes[name], "goes_to": goes,
            "wrongly_refused": share(router.choose(rest) == NONE), "wrongly_accepted": accepted,
        })  # fmt: skip
    return found


def share(hits: Tensor) -> float:
    return float(hits.float().mean())


def stranger_rows(base: Base, task: Task) -> TaskRows | None:
    """Bundled text, a sentence a row, in the task's template; None where that takes more than one text.

    Two fifths of it are of the kind that the bundled tasks `reviews` and `topics` are made of.
    """
    if len(task.columns) != 1 or task.is_generation:
        return None
    (column,) = task.columns.values()
    lines = islice(read_lines([bundled_data_dir() / "corpus.txt.gz"]), STRANGERS)
    examples = [prompt_of(task, {column: line.partition(". ")[0]}, "corpus.txt.gz") for line in lines]
    return TaskRows(examples, task, base.tokenizer, base.model.config.max_length)

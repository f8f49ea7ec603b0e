"""A composition: several trajectory adapters on one base; a row gets the push of the one whose prompts it is like.

Prompts are read by the base's token embeddings alone, normalised and averaged. Nothing is trained.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyld.checkpoint import Base, load_exactly, load_method
from tinyld.data import Batch, TaskRows, some_of
from tinyld.errors import TinyldError
from tinyld.methods import TrajectoryLora
from tinyld.methods.paper import prompt_features
from tinyld.methods.trajectory import TrajectoryPush
from tinyld.model import Denoiser
from tinyld.runs import ADAPTER, CONFIG, RunFolder, environment

PROTOTYPE_ROWS = 1_000
DIRECTIONS = 64  # in which a task's prompts are known to vary
REST = 0.3  # of the mean variance in a direction: so much at least is taken for that of what was not seen
KNOWN = 0.99  # share of a task's own prompts that its limit takes in
NONE = -1


def batch_features(model: Denoiser, batch: Batch) -> Tensor:
    """(B, D): of a batch, the prompt features of its token embeddings."""
    prompt_mask = batch.attention_mask & ~batch.answer_mask
    return prompt_features(model.embed(batch.x0.to(model.device)), prompt_mask.to(model.device))


@torch.no_grad()
def task_features(base: Base, rows: TaskRows, chosen: np.ndarray | None = None) -> Tensor:
    """(rows, D) prompt features of a task's rows, or of some of them."""
    chosen = np.arange(len(rows)) if chosen is None else chosen
    at_once = base.model.rows_at_once(int(rows.lengths[chosen].max()), 100)
    chunks = np.array_split(chosen, -(-len(chosen) // at_once))
    return torch.cat([batch_features(base.model, rows.take(chunk)) for chunk in chunks])


def prototype_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Of the tensors of `prompt_prototype`, for a base of that width."""
    return {"prototype": (width,), "directions": (min(DIRECTIONS, width // 2), width)}


def prompt_prototype(base: Base, rows: TaskRows) -> dict[str, Tensor]:
    """What a router knows of a task's prompts; each adapter keeps its own. "prototype" (D,): the mean of their
    features; "directions" (m, D): those in which they vary most, each of a length below 1 by how much more than the
    rest (probabilistic PCA, Tipping and Bishop 1999)."""
    features = task_features(base, rows, some_of(len(rows), PROTOTYPE_ROWS)).cpu()
    kept, width = prototype_shapes(base.model.config.d_model)["directions"]
    of_means = torch.cov(features.T, correction=0).double()  # in fp32 LAPACK finds no vectors of mere noise
    values, vectors = (found.float() for found in torch.linalg.eigh(of_means))  # smallest first
    rest = values[:-kept].mean().clamp(min=REST * values.mean()).clamp(min=1e-8)
    share = 1 - rest / values[-kept:].clamp(min=rest)
    return {"prototype": features.mean(0), "directions": (vectors[:, -kept:] * share.sqrt()).T.contiguous()}


class Router(nn.Module):
    """Names the member whose own prompts a row is most like, and says whether it is nearer to them than a limit."""

    def __init__(self, members: int, width: int):
        """Prototypes are to be filled in: (k, D), (k, m, D). No prompt is refused before `set_limits`."""
        super().__init__()
        for name, shape in prototype_shapes(width).items():
            self.register_buffer(name, torch.zeros(members, *shape))
        self.register_buffer("limits", torch.full((members,), torch.finfo(torch.float32).max))

    def distances(self, features: Tensor) -> Tensor:
        """(B, k) squared, of features (B, D) from each member's mean, less what its own prompts vary by."""
        with torch.autocast(features.device.type, enabled=False):  # a difference of two sums
            members = [(features - mean, own) for mean, own in zip(self.prototype, self.directions, strict=True)]
            return torch.stack([off.square().sum(1) - (off @ own.T).square().sum(1) for off, own in members], 1)

    def nearest(self, features: Tensor) -> Tensor:
        """(B,) the member to answer each row, whether or not it is near. features: (B, D)."""
        return self.distances(features).argmin(1)

    def choose(self, features: Tensor) -> Tensor:
        """(B,) the member that each row belongs to, or NONE where the row is unlike all of that member's own."""
        distance, chosen = self.distances(features).min(1)
        return torch.where(distance > self.limits[chosen], NONE, chosen)

    def set_limits(self, features: Sequence[Tensor]) -> None:
        """Each member's limit: its distance from the KNOWN share of the prompts (rows, D) of its own task, if any."""
        for member, own in enumerate(features):
            if len(own):
                self.limits[member] = torch.quantile(self.distances(own)[:, member], KNOWN)


class RoutedPush(nn.Module):
    """Several pushes, of which each row gets the one that the router names for its prompt: `members` hangs it there."""

    def __init__(self, pushes: Sequence[TrajectoryPush], router: Router):
        super().__init__()
        self.pushes, self.router = nn.ModuleList(pushes), router
        self.eval().requires_grad_(False)


def members(model: Denoiser, batch: Batch) -> Iterator[tuple[Tensor, Batch]]:
    """(which rows, they) of a batch on the model's device, by the push that they get, which hangs on the model
    meanwhile: all rows, or those of one member of a composition after the other."""
    hung, every = model.push, torch.arange(len(batch.x0))
    if not isinstance(hung, RoutedPush):
        yield every, batch
        return
    owners = hung.router.nearest(batch_features(model, batch)).cpu()
    try:
        for member, model.push in enumerate(hung.pushes):
            if len(rows := every[owners == member]):
                parts = (part[rows.to(part.device)] for part in (batch.x0, batch.answer_mask, batch.attention_mask))
                yield rows, Batch(*parts, batch.rows[rows])
    finally:
        model.push = hung


def save_composition(
    folder: RunFolder, base: Base, members: Sequence[dict[str, Any]], routed: RoutedPush, by_name: bool
) -> None:
    """Writes one self-contained run: what is hung on the base, and what rows are routed by, unless tasks are to be
    named. members: of each its run, task, data and method."""
    config = {"kind": "composition", "members": members, "by_name": by_name, "base": base.record()}
    config["environment"] = environment(str(base.model.device))
    tensors = {f"{i}.{n}": p for i, push in enumerate(routed.pushes) for n, p in push.named_parameters()}
    tensors |= {f"router.{n}": p for n, p in routed.router.state_dict().items()}
    folder.write_tensors(ADAPTER, tensors)
    folder.write_json(CONFIG, config)  # last: without it there is no run


def load_composition(folder: RunFolder, base: Base) -> None:
    """Hangs a composition that `save_composition` wrote on its base."""
    members, tensors = folder.config["members"], folder.read_tensors(ADAPTER)

    def under(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}

    if not members:
        raise TinyldError(f"{folder.path / CONFIG}: a composition needs at least one adapter")
    pushes = []
    for i, method in enumerate(member["method"] for member in members):
        if (name := method.get("name")) != TrajectoryLora.name:
            raise TinyldError(f"{folder.path} holds {name}; only trajectory-lora adapters are composed")
        pushes.append(load_method(method, under(f"{i}."), base, folder).push)  # type: ignore[attr-defined]
    router = Router(len(pushes), base.model.config.d_model).to(base.model.device)
    load_exactly(router.state_dict(), under("router."), folder.path / ADAPTER)
    base.model.push = RoutedPush(pushes, router)

"""Several trajectory adapters on one base, which runs once: their pushes add up, sum_j w_j * push_j, with w fixed or,
by a router, from the row's prompt.

The router names the adapter with the nearest prototype of the prompts that it was trained on. Prompts are read by the
base's token embeddings alone, normalised: averaged over the whole prompt, and one by one for the few tokens next to the
answer, where a task's template stands. Nothing of it is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyld.checkpoint import Base, base_dtype, check_base, load_exactly, method_record, read_method
from tinyld.config import check
from tinyld.data import TaskRows
from tinyld.errors import TinyldError
from tinyld.methods import TrajectoryLora
from tinyld.methods.trajectory import TrajectoryPush
from tinyld.model import PushAt, take
from tinyld.read import finite
from tinyld.runs import ADAPTER, CONFIG, PROTOTYPE, RunFolder

ROUTER = "prototypes"  # the one kind there is
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


# ------------------------------------------------------------------------------------------------ pushes


@dataclass(frozen=True)
class Member:
    """One adapter of a composition."""

    run: str
    task: dict[str, Any]  # `tasks.to_record`
    method: TrajectoryLora
    tensors: dict[str, Tensor]
    prototype: Tensor | None = None  # see router.prompt_prototype

    def push(self, base: Base) -> TrajectoryPush:
        """The member's push, for its base's shape."""
        push = TrajectoryPush(self.method.config, base.model.config, None)
        load_exactly(dict(push.named_parameters()), self.tensors, self.run)
        return push.requires_grad_(False).eval().to(base.model.embedding.weight.device)


class SharedPush(nn.Module):
    """Hangs on `Denoiser.push`: sum_j w_j * push_j, each computed on the same states.

    With a router, a row's w is the router's for its prompt. Each push runs on the rows that have a share of it only.
    """

    def __init__(self, pushes: Sequence[TrajectoryPush], weights: Sequence[float], router: Router | None = None):
        super().__init__()
        device = next(pushes[0].parameters()).device
        self.pushes, self.router = nn.ModuleList(pushes), router and router.to(device)
        self.register_buffer("weights", torch.tensor(weights, device=device), persistent=False)
        self.first_depth = 0 if router is not None else min(p.first_depth for p in pushes)
        self.reads_depths = any(p.reads_depths for p in pushes)
        self.reads_others = any(p.reads_others for p in pushes)

    def shares(self, embedded: Tensor, prompt_mask: Tensor) -> Tensor:
        """(B, k) weights of the members. embedded: (B, L, D) token embeddings."""
        if self.router is None:
            return self.weights.expand(len(embedded), -1)
        return self.router(prompt_features(embedded, prompt_mask))

    def start(self, t: Tensor, prompt_mask: Tensor, history: Sequence[Tensor] = ()) -> PushAt:
        started: list[tuple[Sequence[float], Tensor, Tensor, PushAt]] = []  # depths, rows, their shares, the push

        def begin(embedded: Tensor) -> None:
            for push, share in zip(self.pushes, self.shares(embedded, prompt_mask).T, strict=True):
                rows = share.nonzero()[:, 0]
                if len(rows):
                    push_at = push.start(t[rows], prompt_mask[rows], SomeRows(history, rows))
                    started.append((push.depths, rows, share[rows, None, None], push_at))

        def push_at(depth: float, h: Tensor, positions: Tensor | None = None) -> Tensor:
            if not started:
                begin(h)
            total = torch.zeros_like(h if positions is None else take(h, positions))
            for depths, rows, share, push in started:
                if depth in depths:
                    at = None if positions is None else positions[rows]
                    total = total.index_add(0, rows, (share * push(depth, h[rows], at)).to(h.dtype))
            return total

        return push_at


class SomeRows(Sequence[Tensor]):
    """Some rows of every state in a history, which may still grow."""

    def __init__(self, history: Sequence[Tensor], rows: Tensor):
        self.history, self.rows = history, rows

    def __len__(self) -> int:
        return len(self.history)

    def __getitem__(self, index: Any) -> Any:
        found = self.history[index]
        return [state[self.rows] for state in found] if isinstance(index, slice) else found[self.rows]


def hang(base: Base, members: Sequence[Member], weights: Sequence[float], router: Router | None = None) -> None:
    """Puts members on their base's denoiser, instead of what pushes it now."""
    base.model.push = SharedPush([m.push(base) for m in members], weights, router)
    base.model.requires_grad_(False)


def prototype_router(members: Sequence[Member]) -> Router:
    """UsageError when a member has no prototype."""
    without = ", ".join(m.run for m in members if m.prototype is None)
    check(not without, f"{without} has no prototype to route by; use --how average")
    return Router(torch.stack([m.prototype for m in members if m.prototype is not None]))


# ------------------------------------------------------------------------------------------------ files


def read_trajectory(
    record: dict[str, Any], tensors: dict[str, Tensor], base: Base, folder: RunFolder
) -> TrajectoryLora:
    """The method that a run recorded; TinyldError where it is not one whose pushes add up."""
    if record.get("name") != TrajectoryLora.name:
        raise TinyldError(f"{folder.path} holds {record.get('name')}; only trajectory-lora adapters are composed")
    _, settings = read_method(record, tensors, base, folder)
    return TrajectoryLora(settings, base.model.config)


def read_member(folder: RunFolder, base: Base) -> Member:
    """A trajectory-lora run as a member; refuses any other, and another base."""
    config, path = folder.config, folder.path / CONFIG
    if config["kind"] != "adapter":
        raise TinyldError(f"{folder.path} holds a {config['kind']}; compose takes adapters")
    check_base(config, base, folder.path)
    dtype = base_dtype(config, str(path))
    if dtype != base.dtype:
        raise TinyldError(f"{folder.path} was trained on the base in {dtype}, the others on it in {base.dtype}")
    prototype = None
    if PROTOTYPE in folder.files():
        where = folder.path / PROTOTYPE
        prototype = finite(folder.read_tensors(PROTOTYPE), where).get("prototype")
        if prototype is None or tuple(prototype.shape) != prototype_shape(base.model.config.d_model):
            raise TinyldError(f"{where}: no prototype for this base; train the adapter again")
    tensors = folder.read_tensors(ADAPTER)
    method = read_trajectory(config["method"], tensors, base, folder)
    return Member(str(folder.path), config["task"], method, tensors, prototype)


def save_composition(
    folder: RunFolder,
    base: Base,
    members: Sequence[Member],
    how: str,
    weights: Sequence[float],
    router: Router | None,
    environment: dict[str, Any],
) -> None:
    """Writes one self-contained run: what is hung on the base, and how each part is weighted."""
    tensors = {f"{i}.{n}": p for i, m in enumerate(members) for n, p in m.tensors.items()}
    if router is not None:
        tensors["router.prototype"] = router.prototype
    weighted = list(zip(members, weights, strict=True))
    config = {
        "kind": "composition",
        "how": how,
        "members": [{"run": m.run, "task": m.task, "weight": weight} for m, weight in weighted],
        "parts": [{"weight": weight, "method": method_record(m.method)} for m, weight in weighted],
        "router": None if router is None else ROUTER,
        "base": {"path": str(base.path.resolve()), "fingerprint": base.fingerprint, "dtype": base.dtype},
    }
    folder.write_json(CONFIG, config | {"environment": environment})
    folder.write_tensors(ADAPTER, tensors)


def load_composition(folder: RunFolder, base: Base, task: str | None = None) -> None:
    """Hangs a composition that `save_composition` wrote on its base.

    With the name of a `task`, a routed composition gives every row to that task's adapter, whatever its prompt.
    """
    config, where = folder.config, str(folder.path / CONFIG)
    check_base(config, base, folder.path)
    if config["router"] not in (None, ROUTER):
        raise TinyldError(f"{where}: unknown kind of router: {config['router']!r}")
    tensors, members, weights, router = folder.read_tensors(ADAPTER), [], [], None
    for i, record in enumerate(config["parts"]):
        own = {n.removeprefix(f"{i}."): v for n, v in tensors.items() if n.startswith(f"{i}.")}
        method = read_trajectory(record["method"], own, base, folder)
        members.append(Member(str(folder.path / ADAPTER), {}, method, own))
        weights.append(record["weight"])
    if not members:
        raise TinyldError(f"{where}: a composition needs at least one adapter")
    if config["router"] is not None:
        router = Router(torch.zeros(len(members), *prototype_shape(base.model.config.d_model)))
        kept = {name: tensor for name, tensor in tensors.items() if name == "router.prototype"}
        load_exactly({"router.prototype": router.prototype}, kept, folder.path / ADAPTER)
        names = [member["task"]["name"] for member in config["members"]]
        router.only = names.index(task) if task in names else None
    hang(base, members, weights, router)

"""Several trajectory adapters on one base, which runs once: their pushes add up, sum_j w_j * push_j, with w fixed or,
by a router, from the row's prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyld.checkpoint import Base, base_dtype, check_base, load_exactly, method_record, read_method
from tinyld.config import check
from tinyld.errors import TinyldError
from tinyld.methods import TrajectoryLora
from tinyld.methods.trajectory import TrajectoryPush
from tinyld.model import PushAt, take
from tinyld.options import HOWS
from tinyld.read import finite
from tinyld.router import Router, prompt_features, prototype_shapes
from tinyld.runs import ADAPTER, CONFIG, PROTOTYPE, RunFolder

ROUTER = "prototypes"  # the one kind there is


@dataclass(frozen=True)
class Member:
    """One adapter of a composition."""

    run: str
    task: dict[str, Any]  # `tasks.to_record`
    method: TrajectoryLora
    tensors: dict[str, Tensor]
    prototype: dict[str, Tensor] | None = None  # see router.prompt_prototype

    def push(self, base: Base) -> TrajectoryPush:
        """The member's push, for its base's shape."""
        push = TrajectoryPush(self.method.config, base.model.config, None)
        load_exactly(dict(push.named_parameters()), self.tensors, self.run)
        return push.requires_grad_(False).eval().to(base.model.device)


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

    def answered_by(self, embedded: Tensor, prompt_mask: Tensor) -> Tensor:
        """(B,) the member that a routed row belongs to, or NONE where it belongs to no task."""
        assert self.router is not None
        return self.router.choose(prompt_features(embedded, prompt_mask))

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
    found = [m.prototype for m in members if m.prototype is not None]
    return Router(**{name: torch.stack([prototype[name] for prototype in found]) for name in found[0]})


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
        prototype = finite(folder.read_tensors(PROTOTYPE), where)
        if {name: tuple(t.shape) for name, t in prototype.items()} != prototype_shapes(base.model.config.d_model):
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
        tensors |= {f"router.{n}": p for n, p in router.state_dict().items()}
    weighted = list(zip(members, weights, strict=True))
    config = {
        "kind": "composition",
        "how": how,
        "members": [{"run": m.run, "task": m.task, "weight": weight} for m, weight in weighted],
        "parts": [{"weight": weight, "method": method_record(m.method)} for m, weight in weighted],
        "router": None if router is None else ROUTER,
        "base": base.record(),
    }
    folder.write_json(CONFIG, config | {"environment": environment})
    folder.write_tensors(ADAPTER, tensors)


def load_composition(folder: RunFolder, base: Base, task: str | None = None) -> None:
    """Hangs a composition that `save_composition` wrote on its base.

    With the name of a `task` that one adapter is for, a routed composition gives every row to it, whatever its prompt.
    """
    config, where = folder.config, str(folder.path / CONFIG)
    check_base(config, base, folder.path)
    if config["how"] not in (*HOWS, "weights") or config["router"] != (ROUTER if config["how"] == "router" else None):
        raise TinyldError(f"{where}: unknown kind of composition: how {config['how']!r}, router {config['router']!r}")
    tensors, members, weights, router = folder.read_tensors(ADAPTER), [], [], None

    def under(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}

    for i, record in enumerate(config["parts"]):
        own = under(f"{i}.")
        method = read_trajectory(record["method"], own, base, folder)
        members.append(Member(str(folder.path / ADAPTER), {}, method, own))
        weights.append(record["weight"])
    if not members:
        raise TinyldError(f"{where}: a composition needs at least one adapter")
    if config["router"] is not None:
        shapes = prototype_shapes(base.model.config.d_model)
        router = Router(**{name: torch.zeros(len(members), *shape) for name, shape in shapes.items()})
        load_exactly(router.state_dict(), under("router."), folder.path / ADAPTER)
        names = [member["task"]["name"] for member in config["members"]]
        if len(names) != len(members):
            raise TinyldError(f"{where}: {len(names)} members, but {len(members)} parts")
        router.only = names.index(task) if names.count(task or "") == 1 else None
    hang(base, members, weights, router)

"""Several adapters on one base, which runs once.

Trajectory adapters add up in the forward pass: sum_j w_j * push_j, with w fixed or, by a router, from the row's prompt.
Adapters of another method are combined into one of that method (ranks side by side, or task arithmetic), with fixed
weights; trajectory adapters may stand on top of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyld.checkpoint import Base, base_dtype, check_bands, check_base, check_frozen, load_exactly, read_method
from tinyld.config import check, from_dict, to_dict
from tinyld.errors import TinyldError
from tinyld.methods import METHODS, Method, TrajectoryLora
from tinyld.methods.bands import BAND_EDGES
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
    weight: float
    method: str
    config: Any
    tensors: dict[str, Tensor]
    prototype: dict[str, Tensor] | None = None  # see router.prompt_prototype

    @property
    def is_push(self) -> bool:
        return self.method == TrajectoryLora.name

    def push(self, base: Base) -> TrajectoryPush:
        """The member's push, for its base's shape."""
        push = TrajectoryPush(self.config, base.model.config, None)
        load_exactly(dict(push.named_parameters()), self.tensors, self.run)
        return push.requires_grad_(False).eval().to(base.model.device)


@dataclass(frozen=True)
class Composition:
    """Members and how much each counts."""

    members: tuple[Member, ...]
    how: str
    router: Router | None = None

    def __post_init__(self) -> None:
        check(len(self.members) > 0, "a composition needs at least one adapter")
        check(self.how in HOWS, f"--how must be one of {', '.join(HOWS)}, got {self.how!r}")
        check(all(math.isfinite(m.weight) for m in self.members), "weights must be finite numbers")
        static = sorted({m.method for m in self.members if not m.is_push})
        names = " and ".join(static)
        check(len(static) < 2, f"{names} cannot be combined; give one method, or trajectory-lora over it")
        if self.how == "router":
            check(not static, f"a router weighs trajectory-lora adapters; for {names} use --how average")

    def parts(self, base: Base) -> list[Member]:
        """What is attached and saved: the pushes, after the members that are none as one of their method."""
        pushes = [m for m in self.members if m.is_push]
        static = [m for m in self.members if not m.is_push]
        if len(static) > 1 or any(m.weight != 1 for m in static):
            own = {n: p.detach().cpu() for n, p in base.model.named_parameters()}
            method = METHODS[static[0].method]
            found = method.combine([(m.config, m.tensors, m.weight) for m in static], own)
            static = [Member("combined adapters", {}, 1.0, method.name, *found)]
        return [*static, *pushes]

    def attach(self, base: Base) -> Method | None:
        """Puts the composition on a plain base's denoiser; returns what of it is no push."""
        method, pushes = None, []
        for part in self.parts(base):
            if part.is_push:
                pushes.append(part)
            else:
                method = attach_static(base, (part.method, part.config, part.tensors), part.run)
        if pushes:
            base.model.push = SharedPush([m.push(base) for m in pushes], [m.weight for m in pushes], self.router)
        base.model.requires_grad_(False)
        return method


def attach_static(base: Base, adapter: tuple[str, Any, dict[str, Tensor]], path: Path | str) -> Method:
    """Puts an adapter, (method, config, tensors), on a base; `path` is for the error."""
    name, config, tensors = adapter
    method = METHODS[name](config, base.model.config)
    method.attach(base.model)
    load_exactly(method.own, tensors, path)
    base.model.requires_grad_(False)
    return method


class SharedPush(nn.Module):
    """Hangs on `Denoiser.push`: sum_j w_j * push_j, each computed on the same states.

    With a router, a row's w is the router's for its prompt, times the member's own weight. Each push runs on the rows
    that have a share of it only.
    """

    def __init__(self, pushes: Sequence[TrajectoryPush], weights: Sequence[float], router: nn.Module | None = None):
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
        return self.router(prompt_features(embedded, prompt_mask)) * self.weights

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


# ------------------------------------------------------------------------------------------------ files


def read_member(folder: RunFolder, base: Base) -> Member:
    """An adapter run as a member of weight 1; refuses what is no adapter, and another base."""
    config, path = folder.config, folder.path / CONFIG
    if config["kind"] != "adapter":
        raise TinyldError(f"{folder.path} holds a {config['kind']}; compose takes adapters")
    check_base(config, base, folder.path)
    check_bands(config, str(path))
    dtype = base_dtype(config, str(path))
    if dtype != base.dtype:
        raise TinyldError(f"{folder.path} was trained on the base in {dtype}, the others on it in {base.dtype}")
    where = folder.path / PROTOTYPE
    prototype = finite(folder.read_tensors(PROTOTYPE), where) if PROTOTYPE in folder.files() else None
    shapes = prototype_shapes(base.model.config.d_model)
    if prototype is not None and {name: tuple(t.shape) for name, t in prototype.items()} != shapes:
        raise TinyldError(f"{where}: no prototype for this base; train the adapter again")
    tensors = folder.read_tensors(ADAPTER)
    method, settings = read_method(config["method"], tensors, base, folder)
    return Member(str(folder.path), config["task"], 1.0, method.name, settings, tensors, prototype)


def prototype_router(members: Sequence[Member]) -> Router:
    """UsageError when a member has no prototype."""
    found = [m.prototype for m in members if m.prototype is not None]
    without = ", ".join(m.run for m in members if m.prototype is None)
    check(not without, f"{without} has no prototype to route by; use --how average")
    return Router(**{name: torch.stack([prototype[name] for prototype in found]) for name in found[0]})


@dataclass(frozen=True)
class Saved:
    """What a composition's config says of each of its parts."""

    weight: float
    method: dict[str, Any]


def save_composition(folder: RunFolder, base: Base, composed: Composition, environment: dict[str, Any]) -> None:
    """Writes one self-contained run: what is attached, and how each part is weighted."""
    parts, router = composed.parts(base), composed.router
    tensors = {f"{i}.{n}": p for i, m in enumerate(parts) for n, p in m.tensors.items()}
    if router is not None:
        tensors |= {f"router.{n}": p for n, p in router.state_dict().items()}
    config = {
        "kind": "composition",
        "how": composed.how,
        "members": [{"run": m.run, "task": m.task, "weight": m.weight} for m in composed.members],
        "parts": [to_dict(Saved(m.weight, {"name": m.method, **to_dict(m.config)})) for m in parts],
        "router": None if router is None else ROUTER,
        "band_edges": list(BAND_EDGES),
        "base": base.record(),
    }
    folder.write_json(CONFIG, config | {"environment": environment})
    folder.write_tensors(ADAPTER, tensors)


def load_composition(folder: RunFolder, base: Base, task: str | None = None) -> Method | None:
    """Attaches a composition that `save_composition` wrote to its base; returns what of it is no push.

    With the name of a `task` that one adapter is for, a routed composition gives every row to it, whatever its prompt.
    """
    config, where = folder.config, str(folder.path / CONFIG)
    check_base(config, base, folder.path)
    check_bands(config, where)
    if config["how"] not in HOWS or config["router"] not in (None, ROUTER):
        raise TinyldError(f"{where}: unknown kind of composition: how {config['how']!r}, router {config['router']!r}")
    tensors, parts, router = folder.read_tensors(ADAPTER), [], None

    def under(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}

    for i, record in enumerate(config["parts"]):
        saved, own = from_dict(Saved, record, where), under(f"{i}.")
        method, settings = read_method(saved.method, own, base, folder)
        check_frozen(method.name, base.dtype)
        parts.append(Member(str(folder.path / ADAPTER), {}, saved.weight, method.name, settings, own))
    if config["router"] is not None:
        shapes = prototype_shapes(base.model.config.d_model)
        router = Router(**{name: torch.zeros(len(parts), *shape) for name, shape in shapes.items()})
        load_exactly(router.state_dict(), under("router."), folder.path / ADAPTER)
        names = [member["task"]["name"] for member in config["members"]]
        router.only = names.index(task) if names.count(task or "") == 1 else None
    return Composition(tuple(parts), config["how"], router).attach(base)

"""Several adapters on one base, which runs once.

Trajectory adapters add up in the forward pass: sum_j w_j * push_j, with w fixed or, by a router, from the row's prompt.
Adapters of another method are combined into one of that method (ranks side by side, or task arithmetic), with fixed
weights; trajectory adapters may stand on top of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyld.checkpoint import Base, base_dtype, check_bands, load_exactly, read_method
from tinyld.config import check, to_dict
from tinyld.errors import TinyldError, UsageError
from tinyld.methods import METHODS, Method, TrajectoryLora, WeightLora, read_config
from tinyld.methods.bands import BAND_EDGES
from tinyld.methods.trajectory_lora import TrajectoryPush
from tinyld.methods.weight_lora import truncate
from tinyld.model import PushAt, take
from tinyld.router import WIDTHS, PrototypeRouter, TrainedRouter, prompt_features
from tinyld.runs import ADAPTER, CONFIG, PROTOTYPE, RunFolder

HOWS = ("sum", "average", "weights", "router", "search")


@dataclass
class Member:
    """One adapter of a composition."""

    run: str
    task: str
    weight: float
    method: str
    config: Any
    tensors: dict[str, Tensor]
    prototype: Tensor | None = None  # (2, 5 D), see router.prompt_prototype

    @property
    def is_push(self) -> bool:
        return self.method == TrajectoryLora.name

    def push(self, base: Base) -> TrajectoryPush:
        """The member's push, for its base's shape."""
        push = TrajectoryPush(self.config, base.model.config, None)
        load_exactly(dict(push.named_parameters()), self.tensors, self.run)
        return push.requires_grad_(False).eval().to(base.model.embedding.weight.device)


class Composition(nn.Module):
    """Hangs on `Denoiser.push`: sum_j w_j * push_j, each computed on the same states.

    With a router, a row's w is the router's for its prompt, times the member's own weight.
    """

    def __init__(self, pushes: Sequence[TrajectoryPush], weights: Sequence[float], router: nn.Module | None = None):
        super().__init__()
        check(len(pushes) > 0, "a composition needs at least one adapter")
        self.pushes, self.weights, self.router = nn.ModuleList(pushes), list(weights), router

    @property
    def first_depth(self) -> int:
        return 0 if self.router is not None else min(p.first_depth for p in self.pushes)

    @property
    def pushes_within(self) -> bool:
        return any(p.pushes_within for p in self.pushes)

    @property
    def reads_depths(self) -> bool:
        return any(p.reads_depths for p in self.pushes)

    @property
    def reads_others(self) -> bool:
        return any(p.reads_others for p in self.pushes)

    def route(self, embedded: Tensor, prompt_mask: Tensor) -> Tensor:
        """(B, k) weights of the members. embedded: (B, L, D) token embeddings."""
        fixed = torch.tensor(self.weights, device=embedded.device)
        if self.router is None:
            return fixed.expand(len(embedded), -1)
        return self.router(prompt_features(embedded, prompt_mask)) * fixed

    def start(self, t: Tensor, prompt_mask: Tensor, history: Sequence[Tensor] = ()) -> PushAt:
        parts: list[Part] | None = None

        def push_at(depth: float, h: Tensor, places: Tensor | None = None) -> Tensor:
            nonlocal parts
            if parts is None:
                parts = self.parts(self.route(h, prompt_mask), t, prompt_mask, history)
            total = torch.zeros_like(h if places is None else take(h, places))
            for part in parts:
                if depth in part.depths:
                    some = len(part.rows) < len(h)
                    at = places if places is None or not some else places[part.rows]
                    push = part.push_at(depth, h[part.rows] if some else h, at).to(h.dtype)
                    push = part.share.to(h.dtype) * push
                    total = total.index_add(0, part.rows, push) if some else total + push
            return total

        return push_at

    def parts(self, shares: Tensor, t: Tensor, prompt_mask: Tensor, history: Sequence[Tensor]) -> list[Part]:
        """Every member's push on the rows that have a share of it. shares: (B, k)."""
        found = []
        for push, share in zip(self.pushes, shares.T, strict=True):
            rows = share.nonzero()[:, 0]
            if len(rows):
                push_at = push.start(t[rows], prompt_mask[rows], RowsOf(history, rows))
                found.append(Part(push.depths, rows, share[rows, None, None], push_at))
        return found


@dataclass(frozen=True)
class Part:
    """One member's push in one forward pass, on the rows that have a share of it."""

    depths: list[float]
    rows: Tensor  # (b,)
    share: Tensor  # (b, 1, 1)
    push_at: PushAt


class RowsOf(Sequence[Tensor]):
    """Some rows of every state in a history, which may still grow."""

    def __init__(self, history: Sequence[Tensor], rows: Tensor):
        self.history, self.rows = history, rows

    def __len__(self) -> int:
        return len(self.history)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [state[self.rows] for state in self.history[index]]
        return self.history[index][self.rows]


@dataclass
class Composed:
    """Members with their coefficients, ready to be attached to a base or saved."""

    members: list[Member]
    how: str
    router: nn.Module | None = None
    rank: int | None = None  # a combined weight LoRA is cut to it

    def __post_init__(self) -> None:
        check(len(self.members) > 0, "a composition needs at least one adapter")
        check(all(math.isfinite(m.weight) for m in self.members), "weights must be finite numbers")
        static = sorted({m.method for m in self.members if not m.is_push})
        check(
            len(static) < 2, f"{' and '.join(static)} cannot be combined; give one method, or trajectory-lora over it"
        )
        check(self.rank is None or static == [WeightLora.name], "--rank cuts combined weight-lora adapters only")
        if self.how == "router":
            check(not static, f"a router weighs trajectory-lora adapters; for {', '.join(static)} use --how average")
        self.lost: float | None = None  # share of the squared norm that cutting to `rank` lost

    @property
    def weights(self) -> list[float]:
        return [m.weight for m in self.members]

    def with_weights(self, weights: Sequence[float]) -> Composed:
        members = [replace(m, weight=w) for m, w in zip(self.members, weights, strict=True)]
        return Composed(members, self.how, self.router, self.rank)

    def combined(self, base: Base) -> tuple[str, Any, dict[str, Tensor]] | None:
        """(method, config, tensors) of the members that are not pushes, as one; None where there are none."""
        static = [m for m in self.members if not m.is_push]
        if not static:
            return None
        method = METHODS[static[0].method]
        own = {n: p.detach().cpu() for n, p in base.model.named_parameters()}
        parts = [(m.config, m.tensors, m.weight) for m in static]
        config, tensors = method.combine(parts, own)
        if self.rank is not None:
            config, tensors, self.lost = truncate(config, tensors, self.rank)
        return method.name, config, tensors

    def attach(self, base: Base) -> None:
        """Puts the composition on a plain base's denoiser."""
        attach_static(base, self.combined(base))
        pushes = [m.push(base) for m in self.members if m.is_push]
        if pushes:
            weights = [m.weight for m in self.members if m.is_push]
            base.model.push = Composition(pushes, weights, self.router).to(base.model.embedding.weight.device)
            base.model.requires_grad_(False)


def attach_static(
    base: Base, combined: tuple[str, Any, dict[str, Tensor]] | None, path: Path | str = "combined adapters"
) -> Method | None:
    """Puts one adapter of any method on a base; `path` is for the error."""
    if combined is None:
        return None
    name, config, tensors = combined
    method = METHODS[name](config, base.model.config)
    method.attach(base.model)
    load_exactly(method.own, tensors, path)
    base.model.requires_grad_(False)
    return method


def read_member(folder: RunFolder, base: Base, weight: float) -> Member:
    """An adapter run as a member; refuses what is no adapter, and another base."""
    config = folder.config
    if config["kind"] != "adapter":
        raise TinyldError(f"{folder.path} holds a {config['kind']}; compose takes adapters")
    if config["base"]["fingerprint"] != base.fingerprint:
        raise TinyldError(
            f"{folder.path} was trained on base {config['base']['fingerprint']}, the others on {base.fingerprint}"
        )
    check_bands(config, str(folder.path / CONFIG))
    dtype = base_dtype(config, str(folder.path / CONFIG))
    if dtype != base.dtype:
        raise TinyldError(f"{folder.path} was trained on the base in {dtype}, the others on it in {base.dtype}")
    prototype = folder.read_tensors(PROTOTYPE).get("prototype") if PROTOTYPE in folder.files() else None
    if prototype is not None and prototype.shape != (2, WIDTHS * base.model.config.d_model):
        prototype = None  # of an older tinyld
    tensors = folder.read_tensors(ADAPTER)
    method, settings = read_method(config["method"], tensors, base, folder)
    return Member(str(folder.path), config["task"], weight, method.name, settings, tensors, prototype)


def prototype_router(members: Sequence[Member]) -> PrototypeRouter:
    """UsageError when a member has no prototype."""
    without = [m.run for m in members if m.prototype is None]
    if without:
        raise UsageError(f"{', '.join(without)} has no prototype to route by; use --how average")
    return PrototypeRouter(torch.stack([m.prototype for m in members if m.prototype is not None]))


def save_composition(folder: RunFolder, base: Base, composed: Composed, environment: dict[str, Any]) -> None:
    """Writes one self-contained run: what is attached, and how each part is weighted."""
    tensors = {}
    members = []
    for i, m in enumerate(composed.members):
        record = {"run": m.run, "task": m.task, "weight": m.weight, "method": {"name": m.method, **to_dict(m.config)}}
        members.append(record)
        if m.is_push:
            tensors |= {f"{i}.{n}": p for n, p in m.tensors.items()}
    combined = composed.combined(base)
    static = None
    if combined is not None:
        name, config, own = combined
        static = {"name": name, **to_dict(config)}
        tensors |= {f"static.{n}": p for n, p in own.items()}
    router = composed.router
    if router is not None:
        tensors |= {f"router.{n}": p for n, p in router.state_dict().items()}
    folder.write_json(
        CONFIG,
        {
            "kind": "composition",
            "how": composed.how,
            "members": members,
            "static": static,
            "router": None if router is None else type(router).__name__,
            "band_edges": list(BAND_EDGES),
            "base": {"path": str(base.path.resolve()), "fingerprint": base.fingerprint, "dtype": base.dtype},
            "environment": environment,
        },
    )
    folder.write_tensors(ADAPTER, tensors)


def load_composition(folder: RunFolder, base: Base) -> Method | None:
    """Attaches a composition that `save_composition` wrote to its base; returns the combined part, if there is one."""
    config, where = folder.config, folder.path / CONFIG
    if config["base"]["fingerprint"] != base.fingerprint:
        raise TinyldError(f"{folder.path} was made for base {config['base']['fingerprint']}, not {base.fingerprint}")
    check_bands(config, str(where))
    tensors = folder.read_tensors(ADAPTER)

    def part(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}

    static: Method | None = None
    if "static" not in config:
        raise TinyldError(f"{where}: of an older tinyld; compose its members again")
    if config["static"] is not None:
        own = part("static.")
        method, settings = read_method(config["static"], own, base, folder)
        static = attach_static(base, (method.name, settings, own), folder.path / ADAPTER)
    members = []
    for i, record in enumerate(config["members"]):
        if read_config(record["method"], str(where))[0] is TrajectoryLora:
            weight, own = float(record["weight"]), part(f"{i}.")
            method, settings = read_method(record["method"], own, base, folder)
            members.append(Member(str(folder.path), record["task"], weight, method.name, settings, own))
    if not members:
        return static
    router: nn.Module | None = None
    d = base.model.config.d_model
    if config["router"] == PrototypeRouter.__name__:
        router = PrototypeRouter(torch.zeros(len(members), 2, WIDTHS * d))
    elif config["router"] == TrainedRouter.__name__:
        router = TrainedRouter(WIDTHS * d, len(members))
    if router is not None:
        load_exactly(router.state_dict(), part("router."), folder.path / ADAPTER)
    pushes = [m.push(base) for m in members]
    composition = Composition(pushes, [m.weight for m in members], router)
    base.model.push = composition.requires_grad_(False).to(base.model.embedding.weight.device)
    return static

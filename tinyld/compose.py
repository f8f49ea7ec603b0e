"""Several trajectory adapters on one base, which runs once: their pushes add up by fixed weights, or by a router.

The router needs no training: every adapter keeps a prototype, its task's prompts as the mean of their pooled token
embeddings, and a row goes to the adapter whose prototype is nearest to the row's own prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyld.adapter import method_record
from tinyld.base import Base, load_exactly
from tinyld.config import check, from_dict
from tinyld.errors import TinyldError
from tinyld.methods.bands import BAND_EDGES
from tinyld.methods.trajectory_lora import TrajectoryLora, TrajectoryLoraConfig, TrajectoryPush, pool
from tinyld.model import PushAt
from tinyld.runs import ADAPTER, CONFIG, PROTOTYPE, RunFolder


@dataclass
class Member:
    """One adapter of a composition."""

    run: str
    task: str
    weight: float
    push: TrajectoryPush
    config: TrajectoryLoraConfig
    prototype: Tensor | None = None  # (D,)


class Composition(nn.Module):
    """Hangs on `Denoiser.push`: sum_j w_j * push_j, each member's push computed on the same states.

    With `routed`, a row's w is 1 for the member with the nearest prototype and 0 for the others.
    """

    def __init__(self, members: Sequence[Member], routed: bool = False):
        super().__init__()
        check(len(members) > 0, "a composition needs at least one adapter")
        check(all(math.isfinite(m.weight) for m in members), "weights must be finite numbers")
        self.members = list(members)
        self.pushes = nn.ModuleList(m.push for m in members)
        self.routed = routed
        if routed:
            without = [m.run for m in members if m.prototype is None]
            check(not without, f"{', '.join(without)} has no prototype to route by; use --how sum")
            self.register_buffer("prototypes", torch.stack([m.prototype for m in members if m.prototype is not None]))

    @property
    def first_depth(self) -> int:
        return 0 if self.routed else min(m.push.first_depth for m in self.members)

    def route(self, embedded: Tensor, prompt_mask: Tensor) -> Tensor:
        """(B,) index of the member that each row goes to. embedded: (B, L, D) token embeddings."""
        return torch.cdist(pool(embedded, prompt_mask).float(), self.prototypes).argmin(1)

    @property
    def reads_depths(self) -> bool:
        return any(m.push.reads_depths for m in self.members)

    def start(self, t: Tensor, prompt_mask: Tensor, history: Sequence[Tensor] = ()) -> PushAt:
        parts = [(m.push.first_depth, m.weight, m.push.start(t, prompt_mask, history)) for m in self.members]
        chosen: Tensor | None = None

        def push_at(depth: int, h: Tensor) -> Tensor:
            nonlocal chosen
            if self.routed and chosen is None:
                chosen = self.route(h, prompt_mask)
            total = torch.zeros_like(h)
            for j, (first, weight, delta) in enumerate(parts):
                if depth < first or (chosen is not None and not bool((chosen == j).any())):
                    continue
                share: Any = weight if chosen is None else (chosen == j).to(h.dtype)[:, None, None]
                total = total + share * delta(depth, h)
            return total

        return push_at


def member_from(folder: RunFolder, base: Base, weight: float) -> Member:
    """An adapter run as a member; refuses any method but trajectory-lora, and another base."""
    config = folder.config
    if config["kind"] != "adapter" or config["method"]["name"] != TrajectoryLora.name:
        what = config["method"]["name"] if config["kind"] == "adapter" else config["kind"]
        raise TinyldError(f"{folder.path} holds {what}; compose takes trajectory-lora adapters")
    if config["base"]["fingerprint"] != base.fingerprint:
        raise TinyldError(
            f"{folder.path} was trained on base {config['base']['fingerprint']}, the others on {base.fingerprint}"
        )
    push, method = _rebuild(config["method"], folder.read_tensors(ADAPTER), folder, base)
    prototype = folder.read_tensors(PROTOTYPE).get("prototype") if PROTOTYPE in folder.files() else None
    return Member(str(folder.path), config["task"], weight, push, method, prototype)


def save_composition(folder: RunFolder, base: Base, composed: Composition, environment: dict[str, Any]) -> None:
    """Writes one self-contained run: every member's weights, and the coefficients or prototypes."""
    members = composed.members
    records = [
        {
            "run": m.run,
            "task": m.task,
            "weight": m.weight,
            "method": method_record(TrajectoryLora(m.config, base.model.config)),
        }
        for m in members
    ]
    tensors = {f"{i}.{n}": p for i, m in enumerate(members) for n, p in m.push.named_parameters()}
    folder.write_json(
        CONFIG,
        {
            "kind": "composition",
            "how": "router" if composed.routed else "sum",
            "members": records,
            "band_edges": list(BAND_EDGES),
            "base": {"path": str(base.path.resolve()), "fingerprint": base.fingerprint},
            "environment": environment,
        },
    )
    if composed.routed:
        tensors |= {f"{i}.prototype": m.prototype for i, m in enumerate(members) if m.prototype is not None}
    folder.write_tensors(ADAPTER, tensors)


def _rebuild(
    record: dict[str, Any], tensors: dict[str, Tensor], folder: RunFolder, base: Base
) -> tuple[TrajectoryPush, TrajectoryLoraConfig]:
    """A push and its config from what a run recorded of it."""
    settings = {k: v for k, v in record.items() if k != "name"}
    config = from_dict(TrajectoryLoraConfig, settings, str(folder.path / CONFIG))
    push = TrajectoryPush(config, base.model.config, None)
    load_exactly(dict(push.named_parameters()), tensors, folder.path / ADAPTER)
    return push, config


def load_composition(folder: RunFolder, base: Base) -> Composition:
    """A composition that `save_composition` wrote, on its base."""
    config = folder.config
    if config["base"]["fingerprint"] != base.fingerprint:
        raise TinyldError(f"{folder.path} was made for base {config['base']['fingerprint']}, not {base.fingerprint}")
    tensors = folder.read_tensors(ADAPTER)
    members = []
    for i, record in enumerate(config["members"]):
        own = {n.removeprefix(f"{i}."): v for n, v in tensors.items() if n.startswith(f"{i}.")}
        prototype = own.pop("prototype", None)
        push, method = _rebuild(record["method"], own, folder, base)
        members.append(Member(record["run"], record["task"], float(record["weight"]), push, method, prototype))
    return Composition(members, routed=config["how"] == "router")

"""Several trajectory adapters on one base: their pushes add up, and the base runs once."""

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
from tinyld.methods.trajectory_lora import BAND_EDGES, TrajectoryLora, TrajectoryLoraConfig, TrajectoryPush
from tinyld.model import PushAt
from tinyld.runs import ADAPTER, CONFIG, RunFolder


@dataclass
class Member:
    """One adapter of a composition."""

    run: str
    task: str
    weight: float
    push: TrajectoryPush
    config: TrajectoryLoraConfig


class Composition(nn.Module):
    """Hangs on `Denoiser.push`: sum_j w_j * push_j, each member's push computed on the same states."""

    def __init__(self, members: Sequence[Member]):
        super().__init__()
        check(len(members) > 0, "a composition needs at least one adapter")
        check(all(math.isfinite(m.weight) for m in members), "weights must be finite numbers")
        self.members = list(members)
        self.pushes = nn.ModuleList(m.push for m in members)

    @property
    def first_depth(self) -> int:
        return min(m.push.first_depth for m in self.members)

    def start(self, t: Tensor, prompt_mask: Tensor) -> PushAt:
        parts = [(m.push.first_depth, m.weight, m.push.start(t, prompt_mask)) for m in self.members]

        def push_at(depth: int, h: Tensor) -> Tensor:
            deltas = [weight * delta(depth, h) for first, weight, delta in parts if depth >= first]
            return torch.stack(deltas).sum(0) if len(deltas) > 1 else deltas[0]

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
    settings = {k: v for k, v in config["method"].items() if k != "name"}
    method = from_dict(TrajectoryLoraConfig, settings, str(folder.path / CONFIG))
    push = TrajectoryPush(method, base.model.config, None)
    load_exactly(dict(push.named_parameters()), folder.read_tensors(ADAPTER), folder.path / ADAPTER)
    return Member(str(folder.path), config["task"], weight, push, method)


def save_composition(folder: RunFolder, base: Base, members: Sequence[Member], environment: dict[str, Any]) -> None:
    """Writes one self-contained run: every member's weights and the coefficients."""
    records = [
        {"run": m.run, "task": m.task, "weight": m.weight, "method": method_record(_as_method(m, base))}
        for m in members
    ]
    tensors = {f"{i}.{n}": p for i, m in enumerate(members) for n, p in m.push.named_parameters()}
    folder.write_json(
        CONFIG,
        {
            "kind": "composition",
            "members": records,
            "band_edges": list(BAND_EDGES),
            "base": {"path": str(base.path.resolve()), "fingerprint": base.fingerprint},
            "environment": environment,
        },
    )
    folder.write_tensors(ADAPTER, tensors)


def _as_method(member: Member, base: Base) -> TrajectoryLora:
    return TrajectoryLora(member.config, base.model.config)


def load_composition(folder: RunFolder, base: Base) -> Composition:
    """A composition that `save_composition` wrote, on its base."""
    config = folder.config
    if config["base"]["fingerprint"] != base.fingerprint:
        raise TinyldError(f"{folder.path} was made for base {config['base']['fingerprint']}, not {base.fingerprint}")
    tensors = folder.read_tensors(ADAPTER)
    members = []
    for i, record in enumerate(config["members"]):
        settings = {k: v for k, v in record["method"].items() if k != "name"}
        method = from_dict(TrajectoryLoraConfig, settings, str(folder.path / CONFIG))
        push = TrajectoryPush(method, base.model.config, None)
        own = {n.removeprefix(f"{i}."): v for n, v in tensors.items() if n.startswith(f"{i}.")}
        load_exactly(dict(push.named_parameters()), own, folder.path / ADAPTER)
        members.append(Member(record["run"], record["task"], float(record["weight"]), push, method))
    return Composition(members)

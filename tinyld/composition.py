"""Several trajectory adapters on one base, which runs once: a row gets the push of the one whose prompts it is like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tinyld.checkpoint import Base, check_base, load_exactly, load_method, method_record
from tinyld.errors import TinyldError
from tinyld.methods import TrajectoryLora
from tinyld.methods.trajectory import TrajectoryPush
from tinyld.model import PushAt, take
from tinyld.read import finite
from tinyld.router import Router, prompt_features, prototype_shapes
from tinyld.runs import ADAPTER, CONFIG, PROTOTYPE, RunFolder


class Member(NamedTuple):
    """One adapter of a composition."""

    run: str
    task: dict[str, Any]  # `tasks.to_record`
    method: TrajectoryLora
    data: dict[str, Any] = {}  # where its rows are, as its config says it


class RoutedPush(nn.Module):
    """Hangs on `Denoiser.push`: a row gets the push that the router names for its prompt; each runs on its own rows."""

    first_depth = 0  # there the router sees the embeddings

    def __init__(self, pushes: Sequence[TrajectoryPush], router: Router):
        super().__init__()
        self.pushes, self.router = nn.ModuleList(pushes), router
        self.reads_depths = any(p.reads_depths for p in pushes)
        self.reads_others = any(p.reads_others for p in pushes)

    def owners(self, embedded: Tensor, prompt_mask: Tensor) -> Tensor:
        """(B,) the member that a row belongs to, or NONE where it belongs to no task. embedded: (B, L, D)."""
        return self.router.choose(prompt_features(embedded, prompt_mask))

    def start(self, t: Tensor, prompt_mask: Tensor, history: Sequence[Tensor] = ()) -> PushAt:
        started: list[tuple[Sequence[int], Tensor, list[Tensor], PushAt]] = []  # depths, rows, their history, the push

        def push_at(depth: int, h: Tensor, positions: Tensor | None = None) -> Tensor:
            if not started:
                owners = self.router.nearest(prompt_features(h, prompt_mask))
                for member, push in enumerate(self.pushes):
                    if len(rows := (owners == member).nonzero()[:, 0]):
                        own: list[Tensor] = []
                        started.append((push.depths, rows, own, push.start(t[rows], prompt_mask[rows], own)))
            total = torch.zeros_like(h if positions is None else take(h, positions))
            for depths, rows, own, push in started:
                own += [state[rows] for state in history[len(own) :]]
                if depth in depths:
                    at = None if positions is None else positions[rows]
                    total[rows] = push(depth, h[rows], at).to(h.dtype)
            return total

        return push_at


def hang(base: Base, members: Sequence[Member], router: Router) -> None:
    """Puts members on their base's denoiser, instead of what pushes it now."""
    base.model.push = RoutedPush([m.method.push for m in members], router.to(base.model.device)).eval()
    base.model.requires_grad_(False)


def make_router(folders: Sequence[RunFolder], base: Base) -> Router:
    """A router by the prototypes that adapters keep of their tasks; TinyldError where one of them does not fit."""
    found, shapes = [], prototype_shapes(base.model.config.d_model)
    for folder in folders:
        found.append(finite(folder.read_tensors(PROTOTYPE), where := folder.path / PROTOTYPE))
        if {name: tuple(t.shape) for name, t in found[-1].items()} != shapes:
            raise TinyldError(f"{where}: no prototype for this base; train the adapter again")
    router = Router(**{name: torch.stack([prototype[name] for prototype in found]) for name in shapes})
    return router.to(base.model.device)


# ------------------------------------------------------------------------------------------------ files


def load_trajectory(
    record: dict[str, Any], tensors: dict[str, Tensor], base: Base, folder: RunFolder
) -> TrajectoryLora:
    """The method that a run recorded, on its base; TinyldError where it is not one that pushes."""
    if record.get("name") != TrajectoryLora.name:
        raise TinyldError(f"{folder.path} holds {record.get('name')}; only trajectory-lora adapters are composed")
    return load_method(record, tensors, base, folder)  # type: ignore[return-value]


def read_member(folder: RunFolder, base: Base) -> Member:
    """A trajectory-lora run as a member; refuses any other, and another base."""
    config = folder.config
    if config["kind"] != "adapter":
        raise TinyldError(f"{folder.path} holds a {config['kind']}; compose takes adapters")
    check_base(config, base, folder.path)
    method = load_trajectory(config["method"], folder.read_tensors(ADAPTER), base, folder)
    rows = {name: config["data"].get(name) for name in ("folder", "held_out", "limit", "sha256")}
    return Member(str(folder.path), config["task"], method, rows)


def save_composition(
    folder: RunFolder, base: Base, members: Sequence[Member], router: Router, by_name: bool, environment: dict[str, Any]
) -> None:
    """Writes one self-contained run: what is hung on the base, and what rows are routed by, unless tasks are to be
    named."""
    tensors = {f"{i}.{n}": p for i, m in enumerate(members) for n, p in m.method.own.items()}
    tensors |= {f"router.{n}": p for n, p in router.state_dict().items()}
    records = [{"run": m.run, "task": m.task, "data": m.data, "method": method_record(m.method)} for m in members]
    config = {"kind": "composition", "members": records, "by_name": by_name, "base": base.record()}
    folder.write_json(CONFIG, config | {"environment": environment})
    folder.write_tensors(ADAPTER, tensors)


def load_composition(folder: RunFolder, base: Base) -> None:
    """Hangs a composition that `save_composition` wrote on its base."""
    config, tensors = folder.config, folder.read_tensors(ADAPTER)

    def under(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}

    members = []
    for i, record in enumerate(config["members"]):
        method = load_trajectory(record["method"], under(f"{i}."), base, folder)
        members.append(Member(record["run"], record["task"], method))
    if not members:
        raise TinyldError(f"{folder.path / CONFIG}: a composition needs at least one adapter")
    shapes = prototype_shapes(base.model.config.d_model)
    router = Router(**{name: torch.zeros(len(members), *shape) for name, shape in shapes.items()})
    load_exactly(router.state_dict(), under("router."), folder.path / ADAPTER)
    hang(base, members, router)

"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tinyld.config import TrainConfig
from tinyld.device import fast_dtype
from tinyld.errors import TinyldError


class Muon(torch.optim.Muon):
    """torch.optim.Muon with Nesterov momentum and RMS matching, its matrix products in a type that the hardware has.

    torch takes bf16 for them whatever the hardware. A processor that has none computes it seventy times as slowly:
    full fine-tuning of 7M parameters then takes more than ten seconds an update.
    """

    def __init__(self, params: Any, lr: float, dtype: torch.dtype, weight_decay: float = 0.1):
        super().__init__(params, lr, weight_decay)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                nesterov = parameter.grad.lerp(momentum, group["momentum"])
                update = orthogonal(nesterov.to(self.dtype), group["ns_coefficients"])
                size = 0.2 * max(parameter.shape) ** 0.5  # an entry's RMS as AdamW's (arXiv 2502.16982, eq. 4)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * size)


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """About U V^T of matrix = U S V^T, by five quintic Newton-Schulz steps; singular values end between 0.7 and 1.2.

    (Jordan et al., Muon, 2024: https://kellerjordan.github.io/posts/muon/)
    """
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Optimizer:
    """AdamW on everything or, with `muon`, Muon on the matrices inside blocks and of pushes, and AdamW on the rest.

    Muon (with Kimi's RMS matching, arXiv 2502.16982) takes AdamW's learning rates. Biases, norms and
    one-dimensional parameters get no weight decay. `body` names the tensors of a warm-started encoder.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig, body: frozenset[str] = frozenset()):
        self.names = {id(p): n for n, p in parameters.items()}
        self.lr, self.body_lr, self.body_start = config.lr, config.body_lr, config.body_start
        groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in parameters.items():
            is_inside = parameter.dim() == 2 and name.startswith(("blocks.", "sites."))  # neither embedding nor head
            groups[is_inside and config.optimizer == "muon", parameter.dim() >= 2, name in body].append(parameter)
        muon, adamw = (
            [
                {"params": some, "weight_decay": config.weight_decay * is_matrix, "body": is_body}
                for (by_muon, is_matrix, is_body), some in groups.items()
                if by_muon == wanted
            ]
            for wanted in (True, False)
        )
        self.parts: list[torch.optim.Optimizer] = []
        if adamw:
            self.parts.append(torch.optim.AdamW(adamw, lr=config.lr, betas=(0.9, 0.98), eps=1e-8, fused=True))
        if muon:
            has_bf16 = fast_dtype(muon[0]["params"][0].device) != "fp32"
            self.parts.append(Muon(muon, config.lr, torch.bfloat16 if has_bf16 else torch.float32))

    def set_lr(self, factor: float, progress: float = 1.0) -> None:
        """Sets every group's rate; `body` tensors wait until `body_start` and then train at `body_lr` of it."""
        body = self.body_lr if progress >= self.body_start else 0.0
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * factor * (body if group["body"] else 1.0)

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state(self) -> dict[str, Tensor]:
        """Every state tensor as `optim.<parameter>.<key>`."""
        flat = {}
        for part in self.parts:
            for parameter, values in part.state.items():
                for key, value in values.items():
                    flat[f"optim.{self.names[id(parameter)]}.{key}"] = torch.as_tensor(value).detach().clone()
        return flat

    def load_state(self, flat: Mapping[str, Tensor]) -> None:
        for part in self.parts:
            keys = {"momentum_buffer"} if isinstance(part, Muon) else {"step", "exp_avg", "exp_avg_sq"}
            for parameter in (p for group in part.param_groups for p in group["params"]):
                prefix = f"optim.{self.names[id(parameter)]}."
                values = {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}
                if values and set(values) != keys:  # none at all where it never had a gradient
                    raise TinyldError(f"the checkpoint's {prefix[:-1]} holds {', '.join(sorted(values))}")
                if any(v.shape not in ((), parameter.shape) for v in values.values()):
                    raise TinyldError(f"the checkpoint's {prefix[:-1]} has the wrong shape")
                part.state[parameter] = {k: v.to(parameter.device, copy=True) for k, v in values.items()}


def lr_factor(progress: float, warmup: float, flat: float = 0.0) -> float:
    """Share of the peak learning rate at `progress` in [0, 1]: it rises for `warmup`, stays for `flat`, falls to 0."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    return min((1.0 - progress) / (1.0 - warmup - flat), 1.0)

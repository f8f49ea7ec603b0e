"""The optimizer and the learning-rate schedule."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from tinyld.config import TrainConfig
from tinyld.device import fast_dtype
from tinyld.errors import TinyldError

BETAS, MOMENTS = (0.9, 0.98), ("exp_avg", "exp_avg_sq")  # of AdamW
POINTER_LR = 2e-3  # peak of a pointer's, which begins as nothing in any method
MOMENTUM, COEFFICIENTS = 0.95, (3.4445, -4.7750, 2.0315)  # of Muon, as in torch.optim.Muon


class Optimizer:
    """AdamW on everything or, with `muon`, Muon on the matrices inside blocks and of pushes, and AdamW on the rest.
    Muon (with Nesterov momentum and Kimi's RMS matching, arXiv 2502.16982) takes AdamW's learning rates. torch's own
    multiplies in bf16, which takes seventy times as long on a processor that has none. Biases, norms and
    one-dimensional parameters get no weight decay. `body` names the tensors of a warm-started encoder; they and a
    pointer have rates of their own. AdamW is torch's function, as the first of its optimizers that is made imports its
    compiler, for a second or two."""

    _step_supports_amp_scaling = False  # an update that is not finite in fp16 is left out as a whole

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig, body: frozenset[str] = frozenset()):
        self.names = {id(p): n for n, p in parameters.items()}
        self.config = config
        groups: dict[tuple[bool, float, str], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in parameters.items():
            is_inside = parameter.dim() == 2 and name.startswith(("blocks.", "sites."))  # neither embedding nor head
            decay = config.weight_decay * (parameter.dim() >= 2)
            part = "body" if name in body else "pointer" if name.startswith("pointer.") else "rest"
            groups[is_inside and config.optimizer == "muon", decay, part].append(parameter)
        self.param_groups: list[dict[str, Any]] = [
            {"muon": muon, "weight_decay": decay, "part": part, "params": some, "lr": config.lr}
            for (muon, decay, part), some in groups.items()
        ]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)
        has_bf16 = fast_dtype(next(iter(parameters.values())).device) == "bf16"
        self.dtype = torch.bfloat16 if has_bf16 else torch.float32  # of Muon's products

    def set_lr(self, factor: float, progress: float) -> None:
        """Sets every group's rate; `body` tensors wait until `body_start` and then train at `body_lr` of it."""
        body = self.config.body_lr if progress >= self.config.body_start else 0.0
        peaks = {"rest": self.config.lr, "body": self.config.lr * body, "pointer": POINTER_LR}
        for group in self.param_groups:
            group["lr"] = factor * peaks[group["part"]]

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            found = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["muon"]:
                for parameter in found:
                    self.muon_step(parameter, group["lr"], group["weight_decay"])
            elif found:
                self.adamw_step(found, group["lr"], group["weight_decay"])

    def adamw_step(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                zero = torch.zeros((), device=parameter.device)
                self.state[parameter] |= {"step": zero} | {key: torch.zeros_like(parameter) for key in MOMENTS}
        states, (beta1, beta2) = [self.state[parameter] for parameter in parameters], BETAS
        moments = ([state[key] for state in states] for key in MOMENTS)
        adamw(
            parameters, [parameter.grad for parameter in parameters], *moments, [], [state["step"] for state in states],
            lr=lr, weight_decay=weight_decay, beta1=beta1, beta2=beta2, eps=1e-8, amsgrad=False, maximize=False,
            fused=True,
        )  # fmt: skip

    def muon_step(self, parameter: nn.Parameter, lr: float, weight_decay: float) -> None:
        state, grad = self.state[parameter], parameter.grad
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        nesterov = grad.lerp(state["momentum_buffer"].lerp_(grad, 1 - MOMENTUM), MOMENTUM)
        size = 0.2 * max(parameter.shape) ** 0.5  # an entry's RMS as AdamW's (arXiv 2502.16982, eq. 4)
        parameter.mul_(1 - lr * weight_decay)
        parameter.add_(orthogonal(nesterov.to(self.dtype)), alpha=-lr * size)

    def flat_state(self) -> dict[str, Tensor]:
        each = ((self.names[id(p)], key, value) for p, values in self.state.items() for key, value in values.items())
        return {f"optim.{name}.{key}": torch.as_tensor(value).detach().clone() for name, key, value in each}

    def load_flat_state(self, flat: Mapping[str, Tensor]) -> None:
        for group in self.param_groups:
            keys = {"momentum_buffer"} if group["muon"] else {"step", *MOMENTS}
            for parameter in group["params"]:
                prefix = f"optim.{self.names[id(parameter)]}."
                values = {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}
                fits = all(v.shape in ((), parameter.shape) for v in values.values())
                if not fits or set(values) not in (set(), keys):  # none at all where it never had a gradient
                    raise TinyldError(f"the checkpoint's {prefix[:-1]} does not fit this run's optimizer")
                self.state[parameter] = {k: v.to(parameter.device, copy=True) for k, v in values.items()}


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of matrix = U S V^T, by five quintic Newton-Schulz steps: singular values that are not tiny end
    between 0.68 and 1.2. (Jordan et al., Muon, 2024: https://kellerjordan.github.io/posts/muon/)"""
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def lr_factor(progress: float, warmup: float, flat: float = 0.0) -> float:
    """Share of the peak learning rate at `progress` in [0, 1]: it rises for `warmup`, stays for `flat`, falls to 0."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    return min((1.0 - progress) / (1.0 - warmup - flat), 1.0)

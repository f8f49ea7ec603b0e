"""The optimizer's parts and their state, and the learning-rate curve."""

import pytest
import torch
from conftest import python, refuses, seeded
from torch import nn

from tinyld.config import OPTIMIZERS, TrainConfig
from tinyld.optim import BETAS, POINTER_LR, Optimizer, lr_factor


def parameters(seed: int) -> dict[str, nn.Parameter]:
    generator = seeded(seed)
    shapes = {"embedding.weight": (7, 4), "blocks.0.up.weight": (6, 4), "blocks.0.up.bias": (6,), "bias": (3,)}
    shapes |= {"sites.0.down": (5, 4), "sites.0.attention": (3, 2, 4)}
    return {n: nn.Parameter(torch.randn(*s, generator=generator)) for n, s in shapes.items()}


def update(optimizer: Optimizer | torch.optim.Optimizer, params: dict[str, nn.Parameter], seed: int) -> None:
    generator = seeded(seed)
    for parameter in params.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_the_rate_rises_stays_and_falls_as_computed_by_hand() -> None:
    """(progress, warmup, flat, share of the peak)"""
    for *told, expected in (
        (0.0, 0.1, 0.0, 1e-3), (0.0, 0.0, 0.0, 1.0), (0.05, 0.1, 0.0, 0.5), (0.55, 0.1, 0.0, 0.5), (0.1, 0.1, 0.4, 1.0),
        (0.5, 0.1, 0.4, 1.0), (0.75, 0.1, 0.4, 0.5), (1.0, 0.1, 0.4, 0.0), (1.5, 0.1, 0.0, 0.0),
    ):  # fmt: skip
        assert lr_factor(*told) == pytest.approx(expected), told


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_that_lacks_a_part_of_a_parameters_is_refused(name: str) -> None:
    params = parameters(0)
    optimizer = Optimizer(params, TrainConfig(steps=1, optimizer=name))
    update(optimizer, params, 0)
    state = optimizer.flat_state()
    for key in (k for k in state if k.endswith(("exp_avg", "momentum_buffer"))):
        damaged = {f"{k}_" if k == key else k: v for k, v in state.items()}
        refuses(f"the checkpoint's {key.rpartition('.')[0]} does not fit", optimizer.load_flat_state, damaged)


def test_muon_takes_the_matrices_inside_blocks_and_of_pushes_and_no_others() -> None:
    params = parameters(0)
    optimizer = Optimizer(params, TrainConfig(steps=1, optimizer="muon"))
    update(optimizer, params, 0)
    taken = {name.split(".", 1)[1] for name in optimizer.flat_state() if name.endswith("momentum_buffer")}
    assert taken == {f"{name}.momentum_buffer" for name in ("blocks.0.up.weight", "sites.0.down")}


def test_adamw_is_torchs_without_the_import_of_its_compiler() -> None:
    ours, theirs = parameters(0), parameters(0)
    mine = Optimizer(ours, TrainConfig(steps=1, lr=0.1, weight_decay=0.5, optimizer="adamw"))
    decays = ([p for p in theirs.values() if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": some, "weight_decay": decay} for some, decay in zip(decays, (0.5, 0.0), strict=True)]
    torchs = torch.optim.AdamW(groups, 0.1, BETAS, fused=True)
    for seed in range(3):
        update(mine, ours, seed)
        update(torchs, theirs, seed)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    lines = """import sys, torch
from tinyld.config import TrainConfig
from tinyld.optim import Optimizer
weight = torch.nn.Parameter(torch.ones(2))
optimizer = Optimizer({"weight": weight}, TrainConfig(steps=1))
weight.sum().backward()
optimizer.step()
print("torch._dynamo" in sys.modules, weight.tolist())"""
    ran = python("-c", lines)
    assert ran.stdout.startswith("False [0.9"), ran.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_muon_moves_as_torchs_does_in_bf16(shape: tuple[int, int], dtype: torch.dtype) -> None:
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    mine = Optimizer({"blocks.0": ours}, TrainConfig(steps=1, lr=0.1, weight_decay=0.1, optimizer="muon"))
    pair = mine, torch.optim.Muon([theirs], 0.1, 0.1, adjust_lr_fn="match_rms_adamw")
    mine.dtype = dtype
    generator = seeded()
    for _ in range(3):
        before = ours.detach().clone()
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
        apart, moved = (ours - theirs).detach().norm(), (ours.detach() - before).norm()
        assert apart < 0.05 * moved, "bf16 has 8 bits, and three updates differ by 1 to 3%"
        assert torch.equal(ours, theirs) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_encoders_own_tensors_and_a_pointers_have_rates_of_their_own(name: str) -> None:
    params = parameters(0) | {"pointer.key": nn.Parameter(torch.ones(2, 4))}
    body = frozenset(list(params)[:2])
    config = TrainConfig(steps=1, lr=0.1, optimizer=name, body_lr=0.5, body_start=0.2)
    optimizer = Optimizer(params, config, body)
    optimizer.set_lr(1.0, 0.1)
    before = {n: p.detach().clone() for n, p in params.items()}
    update(optimizer, params, 0)
    assert {n for n, p in params.items() if torch.equal(p, before[n])} == body
    optimizer.set_lr(1.0, 0.2)
    rates = {g["lr"] for g in optimizer.param_groups}
    assert rates == {0.1, 0.05, POINTER_LR}
    update(optimizer, params, 1)
    assert not any(torch.equal(p, before[n]) for n, p in params.items())

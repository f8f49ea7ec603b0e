"""The training loop: the same bits from a seed, resumption, accumulation, budgets, signals; every method learns."""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinyld.config import ModelConfig, TrainConfig
from tinyld.data import Batch, TaskRows, torch_seeded
from tinyld.diffusion import noise_answers, token_nll
from tinyld.distributed import Processes
from tinyld.errors import TinyldError, UsageError
from tinyld.evaluate import evaluate
from tinyld.interrupt import Interrupted as Stopped
from tinyld.interrupt import StopSignals
from tinyld.methods import METHODS, make_config
from tinyld.methods.contract import Method
from tinyld.model import Denoiser
from tinyld.optim import lr_factor
from tinyld.runs import RunFolder
from tinyld.tasks import Example, load_task
from tinyld.tokenizer import Tokenizer
from tinyld.train import TrainingRun

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "weight-lora": {"rank": 4},
    "adapters": {"rank": 4},
    "bitfit": {},
    "trajectory-lora": {"ranks": (8, 4, 2), "blocks": 2},
}
MASK = 4
FILLER = ["the film was", "a very dull plot and", "it is", "food of the", "but music in"]
MOOD = """
template = "{text} it was {answer} ."
[verbalizer]
bad = "terrible"
good = "great"
"""


class Interrupted(Exception):
    """Stands for a power cut."""


def hooked(rows: TaskRows, hook: Callable[[int], None]) -> TaskRows:
    """The rows, with a call before those of each step are asked for."""

    def batch(step: int, batch_size: int, seed: int) -> Batch:
        hook(step)
        return rows.batch(step, batch_size, seed)

    found = copy.copy(rows)
    found.batch = batch  # type: ignore[method-assign]
    return found


@pytest.fixture(scope="module")
def rows(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TaskRows:
    """20 rows of several lengths; the word good or bad decides the answer."""
    path = tmp_path_factory.mktemp("task") / "mood.toml"
    path.write_text(MOOD)
    task = load_task(str(path))
    examples = []
    for i in range(20):
        label = i % 2
        text = f"{FILLER[i % 5]} {('bad', 'good')[label]} {FILLER[(i * 3 + 1) % 5] if i % 3 else ''} it was".strip()
        examples.append(Example(text, ".", ("terrible", "great")[label], label))
    return TaskRows(examples, task, tokenizer, 48)


@pytest.fixture()
def base(config: ModelConfig) -> Denoiser:
    """A denoiser whose random matrices are wide enough for frozen features to say something."""
    model = Denoiser(config, torch_seeded(7)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10.0)
    return model


def attached(model: Denoiser, name: str) -> Method:
    return METHODS[name](make_config(name, CASES[name], model.config), model, torch_seeded(0, 0))


def settings(**given: Any) -> TrainConfig:
    budget = {} if {"tokens", "minutes", "epochs"} & set(given) else {"steps": 8}
    return TrainConfig(**(budget | {"batch_size": 6, "dtype": "fp32", "device": "cpu", "eval_every": 4} | given))


def run(
    model: Denoiser,
    method: str | Method,
    source: TaskRows,
    config: TrainConfig,
    path: Path,
    evaluation: Callable[[], dict[str, float]] = dict,
    resume: bool = False,
    **kwargs: Any,
) -> TrainingRun:
    """A method that is given by its name trains on a copy of the model."""
    if isinstance(method, str):
        model = copy.deepcopy(model)
        method = attached(model, method)
    path.mkdir(exist_ok=True)
    noise = partial(noise_answers, mask_id=MASK)
    given = (model, method.own, source, noise, config, RunFolder(path), evaluation, "test")
    return TrainingRun(*given, **{"quiet": True} | kwargs).train(resume)


def snapshot(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in parameters.items()}


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def log_of(path: Path) -> list[dict[str, Any]]:
    """The metrics log without its clock."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in RunFolder(path).metrics()]


# ------------------------------------------------------------------------------------------------ seeds, resumption


def test_a_run_cut_in_or_after_an_evaluation_resumes_without_doubling_a_log_line(
    base: Denoiser, rows: TaskRows, tmp_path: Path
) -> None:
    calls = 0

    def breaks_the_second_time() -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Interrupted
        return {"dev": 1.0}

    config = settings(save_minutes=1e-9)
    with pytest.raises(Interrupted):
        run(base, "adapters", rows, config, tmp_path / "cut", breaks_the_second_time)
    run(base, "adapters", rows, config, tmp_path / "cut", lambda: {"dev": 1.0}, resume=True)
    assert [r["step"] for r in log_of(tmp_path / "cut")] == [0, 4, 8]
    assert all(r["dev"] == 1.0 for r in log_of(tmp_path / "cut"))
    again = run(base, "adapters", rows, config, tmp_path / "cut", lambda: {"dev": 0.5}, resume=True)
    assert again.metrics == {"dev": 0.5}, "cut after its last step, it still reports its held-out numbers"


# ------------------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize("parts", [4, 9])
@pytest.mark.parametrize("name", ["full", "trajectory-lora"])
def test_accumulating_micro_batches_is_one_big_batch(
    name: str, parts: int, base: Denoiser, rows: TaskRows, tmp_path: Path
) -> None:
    seen = []
    for accumulate in (1, parts):
        config = settings(steps=1, accumulate=accumulate, clip=0.0)
        own = run(base, name, rows, config, tmp_path / str(accumulate)).parameters
        record = RunFolder(tmp_path / str(accumulate)).metrics()[-1]
        gradients = {n: p.grad for n, p in own.items() if p.grad is not None}
        seen.append((record["loss"], record["grad_norm"], gradients))
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-5)
    assert seen[0][1] == pytest.approx(seen[1][1], rel=1e-4)
    assert seen[0][2].keys() == seen[1][2].keys() and seen[0][2]
    for key, gradient in seen[0][2].items():
        torch.testing.assert_close(gradient, seen[1][2][key], rtol=1e-3, atol=1e-5)


def test_clipping_bounds_the_gradient_and_zero_turns_it_off(base: Denoiser, rows: TaskRows, tmp_path: Path) -> None:
    norms = {}
    for clip in (0.0, 0.01):
        own = run(base, "full", rows, settings(steps=1, clip=clip), tmp_path / str(clip)).parameters
        logged = RunFolder(tmp_path / str(clip)).metrics()[-1]["grad_norm"]
        left = torch.stack([p.grad.norm() for p in own.values() if p.grad is not None]).norm()
        norms[clip] = (logged, float(left))
    assert norms[0.0][0] == pytest.approx(norms[0.0][1], rel=1e-5) and norms[0.0][0] > 0.01
    assert norms[0.01] == (pytest.approx(norms[0.0][0], rel=1e-5), pytest.approx(0.01, rel=1e-3))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_bf16_loss_is_near_the_fp32_loss(device: str, base: Denoiser, rows: TaskRows, tmp_path: Path) -> None:
    if device == "cuda" and not (torch.cuda.is_available() and torch.cuda.is_bf16_supported()):
        pytest.skip("no GPU with bf16")
    losses = {}
    for dtype in ("fp32", "bf16"):
        config = settings(dtype=dtype, device=device, steps=20, eval_every=20)
        own = run(base.to(device), "full", rows, config, tmp_path / dtype).parameters
        losses[dtype] = RunFolder(tmp_path / dtype).metrics()[-1]["loss"]
        assert all(p.dtype == torch.float32 for p in own.values())
    assert losses["fp32"] != losses["bf16"]  # else bf16 was not used
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)


def test_a_gradient_that_is_not_finite_stops_the_run_with_the_weights_of_the_step_before(
    base: Denoiser, rows: TaskRows, tmp_path: Path
) -> None:
    method = attached(base, "adapters")
    calls = 0
    before: dict[str, Tensor] = {}

    def penalty() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            before.update(snapshot(method.own))
        return sum(p.sum() for p in method.own.values()) * (math.nan if calls == 4 else 0.0)

    with pytest.raises(TinyldError, match="at step 3 is not finite; .* is .*checkpoints/00000002"):
        run(base, method, rows, settings(save_minutes=1e-9), tmp_path / "run", penalty=penalty)
    assert same_bits(before, snapshot(method.own))
    _, state = RunFolder(tmp_path / "run").load_checkpoint()
    assert state["step"] == 2, "with the weights of step 3 the same batch fails again"


@pytest.mark.parametrize("what", ["a weight", "what the denoiser gives"])
def test_a_last_update_that_diverges_ends_the_run_with_one_line_and_a_finite_checkpoint(
    what: str, base: Denoiser, rows: TaskRows, tmp_path: Path
) -> None:
    method, folder = attached(base, "adapters"), RunFolder(tmp_path / "run")

    def spoil(progress: float) -> None:
        if progress == 1.0 and what == "a weight":
            next(iter(method.own.values())).data.fill_(math.inf)

    def held_out() -> dict[str, float]:
        if folder.checkpoints() and what == "what the denoiser gives":
            raise TinyldError("its logits are not finite")
        return {"dev_nll_bound": 1.0}

    config = settings(save_minutes=1e-9, eval_every=100)
    last = "at step 8 is not finite; the last good checkpoint is .*00000007; lower --lr"
    with pytest.raises(TinyldError, match=last):
        run(base, method, rows, config, folder.path, held_out, after_update=spoil)
    tensors, state = folder.load_checkpoint()
    assert state["step"] == 7 and all(t.isfinite().all() for t in tensors.values())
    assert [r["step"] for r in log_of(folder.path)] == [0]


# ------------------------------------------------------------------------------------------------ log


def test_the_log_has_steps_losses_rates_and_held_out_numbers(base: Denoiser, rows: TaskRows, tmp_path: Path) -> None:
    config = settings(steps=110, eval_every=40, lr=2e-3, warmup=0.5)
    calls = iter(range(100))
    result = run(base, "full", rows, config, tmp_path / "run", lambda: {"dev_accuracy": next(calls) / 100})
    log = RunFolder(tmp_path / "run").metrics()
    assert [r["step"] for r in log] == [0, 40, 50, 80, 100, 110]
    assert [r.get("dev_accuracy") for r in log] == [0.0, 0.01, None, 0.02, None, 0.03]
    for record in log[1:]:
        assert record["lr"] == pytest.approx(2e-3 * lr_factor((record["step"] - 1) / 110, 0.5))
        assert record["tokens"] > 0 and record["seconds"] > 0 and record["grad_norm"] > 0
    assert log[-1]["loss"] < log[1]["loss"]
    assert 0 < log[-1]["lr"] < log[-2]["lr"] and log[-1]["tokens"] == result.tokens
    assert result.metrics == {"dev_accuracy": 0.03}


# ------------------------------------------------------------------------------------------------ budgets


def test_a_budget_that_is_none_is_a_usage_error() -> None:
    for given, part in (({"minutes": math.nan}, "minutes must be above 0"), ({"flat": 0.95, "steps": 1}, "warm-up")):
        with pytest.raises(UsageError, match=part):
            TrainConfig(**given)


def test_a_budget_ends_at_the_first_step_that_reaches_it(base: Denoiser, rows: TaskRows, tmp_path: Path) -> None:
    read = [int(rows.batch(step, 6, 0).attention_mask.sum()) for step in range(8)]
    five = sum(read[:5])
    budgets = [("steps", 7, 7), ("epochs", 2.0, 8), ("epochs", 0.3, 2), ("epochs", 1e-9, 1)]  # 4 steps an epoch
    for name, budget, steps in (*budgets, ("tokens", five, 5), ("tokens", five + 1, 6)):
        result = run(base, "bitfit", rows, settings(**{name: budget}), tmp_path / f"{name}{budget}")
        assert (result.step, result.tokens) == (steps, sum(read[:steps])), (name, budget)


def test_evaluation_does_not_count_towards_minutes(
    base: Denoiser, rows: TaskRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def evaluation() -> dict[str, float]:
        clock[0] += 1000.0
        return {}

    def slow(step: int) -> None:
        clock[0] += 6.0

    config = settings(minutes=1.0, eval_every=2)
    assert run(base, "bitfit", hooked(rows, slow), config, tmp_path / "run", evaluation).step == 10


# ------------------------------------------------------------------------------------------------ every method


LEARNING = {
    "full": {"lr": 3e-3, "steps": 60},
    "weight-lora": {"lr": 1e-2, "steps": 80},
    "adapters": {"lr": 1e-2, "steps": 80},
    "bitfit": {"lr": 3e-2, "steps": 150},
    "trajectory-lora": {"lr": 1e-2, "steps": 80},
}


@pytest.mark.parametrize("name", LEARNING)
def test_every_method_overfits_a_tiny_set_and_leaves_the_rest_of_the_base_bit_identical(
    name: str, base: Denoiser, rows: TaskRows, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    method = attached(base, name)
    mine = {id(p) for p in method.own.values()}
    frozen = {n: p for n, p in base.named_parameters() if id(p) not in mine}
    assert (len(frozen) == 0) == (name == "full")
    before = snapshot(frozen)
    config = settings(batch_size=10, eval_every=1000, **LEARNING[name])

    def held_out() -> dict[str, float]:
        return {"accuracy": float(evaluate(base, rows, tokenizer).scores["accuracy"])}

    result = run(base, method, rows, config, tmp_path / "run", held_out)
    assert RunFolder(tmp_path / "run").metrics()[0]["accuracy"] < 0.9  # untrained, it does not know
    assert result.metrics["accuracy"] > 0.95 and same_bits(before, snapshot(frozen))


# ------------------------------------------------------------------------------------------------ signals, processes


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_is_answered_at_once_ends_the_step_saves_it_and_a_second_one_at_once_is_the_same(
    name: str, base: Denoiser, rows: TaskRows, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    signum, answers = signal.Signals[name], []

    def signals(step: int) -> None:
        if step == 3:
            signal.raise_signal(signum)
            signal.raise_signal(signum)
            answers.append(capfd.readouterr().err)

    ignored = signal.getsignal(signum) == signal.SIG_IGN  # as under nohup, where a hangup is not to stop it
    if ignored:
        signal.signal(signum, signal.SIG_DFL)
    before = signal.getsignal(signum)
    with pytest.raises(Stopped, match=f"stopped by {name}: step 4 is saved; go on with --resume") as raised:
        run(base, "adapters", hooked(rows, signals), settings(), tmp_path / "run")
    assert raised.value.exit_code == 128 + signum and signal.getsignal(signum) == before
    assert answers == ["stopping after this step\n"]
    assert [p.name for p in RunFolder(tmp_path / "run").checkpoints()] == ["00000004"]
    if ignored:
        signal.signal(signum, signal.SIG_IGN)


def test_a_signal_in_the_last_evaluation_ends_the_run_too(base: Denoiser, rows: TaskRows, tmp_path: Path) -> None:
    def held_out() -> dict[str, float]:
        if len(RunFolder(tmp_path / "run").metrics()) == 1:  # at step 0 alone
            signal.raise_signal(signal.SIGTERM)
        return {"dev_nll_bound": 1.0}

    with pytest.raises(Stopped, match="stopped by SIGTERM: step 8 is saved"):
        run(base, "adapters", rows, settings(eval_every=100), tmp_path / "run", held_out)


def test_a_hangup_that_nohup_ignores_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.received == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_gradients_of_all_processes_add_up_to_those_of_one(base: Denoiser, rows: TaskRows) -> None:
    batch = rows.batch(0, 5, 0)
    noised = noise_answers(batch, MASK, torch_seeded(0))

    def gradient(parts: list[Any]) -> Tensor:
        base.zero_grad()
        for part in parts:
            token_nll(base, part)[0].sum().backward()
        return base.embedding.weight.grad.clone()

    base.requires_grad_(True)
    alone = gradient(noised)
    for size in (2, 3, 7):  # of seven, two have no row
        shares = [Processes(rank, size).share(part, accumulate=2) for rank in range(size) for part in noised]
        assert sum(len(p.t) for share in shares for p in share) == 5
        torch.testing.assert_close(gradient([p for share in shares for p in share]), alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["full", "weight-lora", "trajectory-lora"])
def test_recomputed_activations_train_the_same_weights(
    config: ModelConfig, rows: TaskRows, tmp_path: Path, method: str
) -> None:
    found, calls = {}, {}
    for recompute in (False, True):
        model = Denoiser(config, torch.Generator().manual_seed(0))
        ours = attached(model, method)
        count: list[int] = []
        model.blocks[1].register_forward_pre_hook(lambda *_: count.append(1))  # noqa: B023
        run(model, ours, rows, settings(recompute=recompute), tmp_path / f"run-{recompute}")
        found[recompute], calls[recompute] = snapshot(ours.own), len(count)
    assert all(torch.equal(found[True][name], tensor) for name, tensor in found[False].items())
    assert calls[False] == 8 and calls[True] == 16

"""The training loop: the same bits from a seed, resumption, accumulation, budgets, signals; every method learns."""

import copy
import itertools
import math
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import handling, label_task, refuses
from test_evaluate import TEXTS
from test_methods import attach
from torch import Tensor

from tinyld.config import ModelConfig, TrainConfig
from tinyld.data import TaskRows, torch_seeded
from tinyld.diffusion import noise_answers, token_nll
from tinyld.distributed import Processes
from tinyld.errors import TinyldError, UsageError
from tinyld.evaluate import evaluate
from tinyld.interrupt import Interrupted, StopSignals
from tinyld.methods.contract import Method
from tinyld.model import Denoiser
from tinyld.optim import lr_factor
from tinyld.rows import Example
from tinyld.runs import RunFolder
from tinyld.tokenizer import Tokenizer
from tinyld.train import TrainingRun

LEARN = {"full": (3e-3, 60), "bitfit": (3e-2, 150)} | dict.fromkeys(("weight-lora", "adapters", "best-2"), (1e-2, 80))
MASK = 4


@dataclass
class Trial:
    """A base whose random matrices are wide enough for frozen features to say something, 20 rows of several lengths
    in which the word good or bad decides the answer, and a folder for runs."""

    base: Denoiser
    rows: TaskRows
    path: Path

    def run(
        self, method: str | Method, out: str = "run", held_out: Any = dict, resume: bool = False, **given: Any
    ) -> TrainingRun:
        """Trains a method that is attached to the base, or a case of test_methods on a copy of the base. `given` are
        fields of TrainConfig and hooks of TrainingRun."""
        hooks = {name: given.pop(name) for name in ("penalty", "after_update") if name in given}
        model = copy.deepcopy(self.base) if isinstance(method, str) else self.base
        method = attach(model, method) if isinstance(method, str) else method
        budget = {} if {"tokens", "minutes", "epochs"} & set(given) else {"steps": 8}
        config = TrainConfig(**budget | {"batch_size": 6, "dtype": "fp32", "device": "cpu", "eval_every": 4} | given)
        (self.path / out).mkdir(exist_ok=True)
        noise = partial(noise_answers, mask_id=MASK)
        told = (model, method.own, self.rows, noise, config, self.folder(out), held_out, "test")
        return TrainingRun(*told, quiet=True, **hooks).train(resume)

    def folder(self, out: str = "run") -> RunFolder:
        return RunFolder(self.path / out)


@pytest.fixture()
def trial(config: ModelConfig, tokenizer: Tokenizer, tmp_path: Path) -> Trial:
    examples = []
    for i in range(20):
        label = i % 2
        text = f"{TEXTS[i % 5]} {('bad', 'good')[label]} {TEXTS[(i * 3 + 1) % 5] if i % 3 else ''} it was".strip()
        examples.append(Example(text, ".", ("terrible", "great")[label], label))
    model = Denoiser(config, torch_seeded(7)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10.0)
    task = label_task(tmp_path, bad="terrible", good="great")
    return Trial(model, TaskRows(examples, task, tokenizer, 48), tmp_path)


def test_a_run_cut_in_or_after_an_evaluation_resumes_without_doubling_a_log_line(trial: Trial) -> None:
    def breaks() -> dict[str, float]:
        if trial.folder().metrics():  # the second time
            raise KeyboardInterrupt
        return {"dev": 1.0}

    with pytest.raises(KeyboardInterrupt):
        trial.run("adapters", held_out=breaks, save_minutes=1e-9)
    trial.run("adapters", held_out=lambda: {"dev": 1.0}, resume=True, save_minutes=1e-9)
    assert [(r["step"], r["dev"]) for r in trial.folder().metrics()] == [(0, 1.0), (4, 1.0), (8, 1.0)]
    again = trial.run("adapters", held_out=lambda: {"dev": 0.5}, resume=True, save_minutes=1e-9)
    assert again.metrics == {"dev": 0.5}, "cut after its last step, it still reports its held-out numbers"


@pytest.mark.parametrize("parts", [4, 9])
@pytest.mark.parametrize("name", ["full", "best-2"])
def test_accumulating_micro_batches_is_one_big_batch(name: str, parts: int, trial: Trial) -> None:
    seen = []
    for accumulate in (1, parts):
        own = trial.run(name, str(accumulate), steps=1, accumulate=accumulate, clip=0.0).parameters
        record = trial.folder(str(accumulate)).metrics()[-1]
        gradients = {n: p.grad for n, p in own.items() if p.grad is not None}
        seen.append((record["loss"], record["grad_norm"], gradients))
    (loss, norm, whole), (*logged, summed) = seen
    assert logged == [pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4)] and whole
    torch.testing.assert_close(whole, summed, rtol=1e-3, atol=1e-5)


def test_clipping_bounds_the_gradient_and_zero_turns_it_off(trial: Trial) -> None:
    norms = {}
    for clip in (0.0, 0.01):
        own = trial.run("full", str(clip), steps=1, clip=clip).parameters
        left = torch.stack([p.grad.norm() for p in own.values() if p.grad is not None]).norm()
        norms[clip] = (trial.folder(str(clip)).metrics()[-1]["grad_norm"], float(left))
    assert norms[0.0][0] == pytest.approx(norms[0.0][1], rel=1e-5) and norms[0.0][0] > 0.01
    assert norms[0.01] == (pytest.approx(norms[0.0][0], rel=1e-5), pytest.approx(0.01, rel=1e-3))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_bf16_loss_is_near_the_fp32_loss(device: str, trial: Trial) -> None:
    if device == "cuda" and not (torch.cuda.is_available() and torch.cuda.is_bf16_supported()):
        pytest.skip("no GPU with bf16")
    trial.base.to(device)
    losses = {}
    for dtype in ("fp32", "bf16"):
        own = trial.run("full", dtype, dtype=dtype, device=device, steps=20, eval_every=20).parameters
        losses[dtype] = trial.folder(dtype).metrics()[-1]["loss"]
        assert all(p.dtype == torch.float32 for p in own.values())
    assert losses["fp32"] != losses["bf16"]  # else bf16 was not used
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)


@pytest.mark.parametrize(("what", "step"), [("a gradient", 3), ("a weight", 8), ("what the denoiser gives", 8)])
def test_a_run_that_diverges_keeps_the_finite_weights_of_the_step_before(what: str, step: int, trial: Trial) -> None:
    method, folder, updates = attach(trial.base, "adapters"), trial.folder(), itertools.count(1)
    before: dict[str, Tensor] = {}

    def penalty() -> Tensor:
        if is_fourth := next(updates) == 4:
            before.update({name: p.detach().clone() for name, p in method.own.items()})
        return sum(p.sum() for p in method.own.values()) * (math.nan if is_fourth and what == "a gradient" else 0.0)

    def spoil(progress: float) -> None:
        if progress == 1.0 and what == "a weight":
            next(iter(method.own.values())).data.fill_(math.inf)

    def held_out() -> dict[str, float]:
        if folder.checkpoints() and what == "what the denoiser gives":
            raise TinyldError("its logits are not finite")
        return {"dev_nll_bound": 1.0}

    last = f"at step {step} is not finite; the last good checkpoint is .*{step - 1:08d}; lower --lr"
    with pytest.raises(TinyldError, match=last):
        hooks = {"penalty": penalty, "after_update": spoil}
        trial.run(method, held_out=held_out, save_minutes=1e-9, eval_every=100, **hooks)
    tensors, state = folder.load_checkpoint()
    assert state["step"] == step - 1, "with the weights of the same step the same batch fails again"
    assert all(t.isfinite().all() for t in tensors.values()) and [r["step"] for r in folder.metrics()] == [0]
    if what == "a gradient":
        assert all(torch.equal(before[name], p) for name, p in method.own.items()), "no update by what is not finite"


def test_the_log_has_steps_losses_rates_and_held_out_numbers(trial: Trial) -> None:
    calls, config = itertools.count(), {"steps": 110, "eval_every": 40, "lr": 2e-3, "warmup": 0.5}
    result = trial.run("full", held_out=lambda: {"dev_accuracy": next(calls) / 100}, **config)
    log = trial.folder().metrics()
    assert [r["step"] for r in log] == [0, 40, 50, 80, 100, 110]
    assert [r.get("dev_accuracy") for r in log] == [0.0, 0.01, None, 0.02, None, 0.03]
    for record in log[1:]:
        assert record["lr"] == pytest.approx(2e-3 * lr_factor((record["step"] - 1) / 110, 0.5))
        assert record["tokens"] > 0 and record["seconds"] > 0 and record["grad_norm"] > 0
    assert log[-1]["loss"] < log[1]["loss"]
    assert log[-1]["tokens"] == result.tokens and result.metrics == {"dev_accuracy": 0.03}


def test_a_budget_that_is_none_is_a_usage_error() -> None:
    for given, part in (({"minutes": math.nan}, "minutes must be above 0"), ({"flat": 0.95, "steps": 1}, "warm-up")):
        refuses(part, TrainConfig, kind=UsageError, **given)


def test_a_budget_ends_at_the_first_step_that_reaches_it(trial: Trial) -> None:
    read = [int(trial.rows.batch(step, 6, 0).attention_mask.sum()) for step in range(8)]
    five = sum(read[:5])
    budgets = [("steps", 7, 7), ("epochs", 2.0, 8), ("epochs", 0.3, 2), ("epochs", 1e-9, 1)]  # 4 steps an epoch
    for name, budget, steps in (*budgets, ("tokens", five, 5), ("tokens", five + 1, 6)):
        result = trial.run("bitfit", f"{name}{budget}", **{name: budget})
        assert (result.step, result.tokens) == (steps, sum(read[:steps])), (name, budget)


def test_evaluation_does_not_count_towards_minutes(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def takes(seconds: float, result: Any) -> Any:
        clock[0] += seconds
        return result

    update, held_out = partial(takes, 6.0, None), partial(takes, 1000.0, {})
    assert trial.run("bitfit", held_out=held_out, penalty=update, minutes=1.0, eval_every=2).step == 10


@pytest.mark.parametrize("name", LEARN)
def test_every_method_overfits_a_tiny_set(name: str, trial: Trial, tokenizer: Tokenizer) -> None:
    method = attach(trial.base, name)

    def held_out() -> dict[str, float]:
        return {"accuracy": float(evaluate(trial.base, trial.rows, tokenizer).scores["accuracy"])}

    lr, steps = LEARN[name]
    result = trial.run(method, held_out=held_out, batch_size=10, eval_every=1000, lr=lr, steps=steps)
    assert trial.folder().metrics()[0]["accuracy"] < 0.9, "untrained, it does not know"
    assert result.metrics["accuracy"] > 0.95


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_or_two_ends_the_step_and_saves_it(name: str, trial: Trial, capfd: pytest.CaptureFixture[str]) -> None:
    signum, answers, updates = signal.Signals[name], [], itertools.count(1)

    def signals() -> None:
        if next(updates) == 4:
            signal.raise_signal(signum)
            signal.raise_signal(signum)
            answers.append(capfd.readouterr().err)

    ours, told = signal.default_int_handler, f"stopped by {name}: step 4 is saved; go on with --resume"
    with handling(signum, ours):  # not to be ignored, as a hangup is under nohup
        with pytest.raises(Interrupted, match=told) as raised:
            trial.run("adapters", penalty=signals)
        assert raised.value.exit_code == 128 + signum and signal.getsignal(signum) == ours
    assert answers == ["stopping after this step\n"]
    assert [p.name for p in trial.folder().checkpoints()] == ["00000004"]


def test_a_signal_in_the_last_evaluation_ends_the_run_too(trial: Trial) -> None:
    def held_out() -> dict[str, float]:
        if trial.folder().metrics():  # after step 0
            signal.raise_signal(signal.SIGTERM)
        return {"dev_nll_bound": 1.0}

    with pytest.raises(Interrupted, match="stopped by SIGTERM: step 8 is saved"):
        trial.run("adapters", held_out=held_out, eval_every=100)


def test_a_hangup_that_nohup_ignores_stops_nothing() -> None:
    with handling(signal.SIGHUP, signal.SIG_IGN), StopSignals() as stop:
        signal.raise_signal(signal.SIGHUP)
    assert stop.received == 0


def test_the_gradients_of_all_processes_add_up_to_those_of_one(trial: Trial) -> None:
    base, noised = trial.base, noise_answers(trial.rows.batch(0, 5, 0), MASK, torch_seeded())

    def gradient(parts: list[Any]) -> Tensor:
        base.zero_grad()
        for part in parts:
            token_nll(base, part)[0].sum().backward()
        return base.embedding.weight.grad.clone()

    alone = gradient(noised)
    for size in (2, 3, 7):  # of seven, two have no row
        shares = [Processes(rank, size).share(part, accumulate=2) for rank in range(size) for part in noised]
        assert sum(len(p.t) for share in shares for p in share) == 5
        torch.testing.assert_close(gradient([p for share in shares for p in share]), alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["full", "weight-lora", "best-2"])
def test_recomputed_activations_train_the_same_weights(trial: Trial, method: str) -> None:
    found, passes = [], []
    trial.base.blocks[1].register_forward_pre_hook(lambda *_: passes.append(1))
    for recompute in (False, True):
        found.append(trial.run(method, str(recompute), recompute=recompute).parameters)
    assert all(torch.equal(found[1][name], parameter) for name, parameter in found[0].items())
    assert len(passes) == 8 + 16

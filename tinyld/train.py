"""The training loop, one for pretraining and every method: batch -> noise -> loss -> backward -> clip -> update -> log.

It knows no method by name and no task: it is handed the parameters that train, a source of rows and an evaluation.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tinyld.config import DiffusionConfig, TrainConfig
from tinyld.data import Batch, Source, seed_of, torch_seeded
from tinyld.device import autocast, resolve_dtype
from tinyld.diffusion import Noised, noise_batch, token_nll
from tinyld.distributed import Processes
from tinyld.errors import TinyldError
from tinyld.interrupt import Interrupted, StopSignals
from tinyld.model import Denoiser
from tinyld.optim import Optimizer, lr_factor
from tinyld.progress import Progress
from tinyld.runs import RunFolder


class Noising(Protocol):
    """How a batch becomes one that is scored: a function of (seed, step) alone, so that a resumed run sees the same."""

    def noise(self, batch: Batch, step: int) -> tuple[Noised, float]:
        """(noised batch, normaliser of its summed loss)."""
        ...


@dataclass(frozen=True)
class Objective:
    """Noise drawn anew at every step."""

    diffusion: DiffusionConfig
    mask_id: int
    counted: bool  # exact mask counts, for tasks
    seed: int

    def noise(self, batch: Batch, step: int) -> tuple[Noised, float]:
        generator = torch_seeded(self.seed, 2, step)
        return noise_batch(
            batch.x0, batch.answer_mask, batch.attention_mask, self.mask_id, self.diffusion, generator, self.counted
        )


@dataclass(frozen=True)
class TrainResult:
    """What a finished run reports."""

    steps: int
    tokens: int
    seconds: float  # of training, held-out evaluation and saving left out
    peak_memory_mb: float
    metrics: dict[str, Any]


def compile_blocks(model: Denoiser, autocast: torch.autocast, backend: str = "inductor") -> str | None:
    """Compiles every block in place, for any batch and length; else leaves them as they are and returns the reason."""
    if model.push is not None and model.push.pushes_within:
        return "there are pushes within the blocks"
    try:
        for block in model.blocks:
            block.compile(backend=backend, dynamic=True)
        d, device = model.config.d_model, model.embedding.weight.device
        with autocast, torch.enable_grad():
            model.run_blocks(torch.zeros(2, 8, d, device=device, requires_grad=True), None, 0, 1).sum().backward()
    except Exception as error:  # whatever a compiler that is missing or fails raises
        for block in model.blocks:
            block._compiled_call_impl = None
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    finally:
        model.zero_grad(set_to_none=True)
    return None


def total_steps(config: TrainConfig, source: Source) -> int | None:
    """Steps of the run when the budget says so before it starts, else None."""
    if config.steps is not None:
        return config.steps
    if config.epochs is not None:
        return max(1, math.ceil(config.epochs * source.steps_per_epoch(config.batch_size)))
    return None


def train(
    model: Denoiser,
    parameters: Mapping[str, nn.Parameter],
    source: Source,
    objective: Noising,
    config: TrainConfig,
    folder: RunFolder,
    evaluate: Callable[[], dict[str, float]],
    label: str,
    penalty: Callable[[], Tensor] | None = None,
    after_update: Callable[[float], None] = lambda progress: None,
    body: frozenset[str] = frozenset(),
    resume: bool = False,
    from_step: int | None = None,
    processes: Processes | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Trains `parameters` in place and leaves them at their last (or EMA) values.

    With `resume` it goes on from the newest checkpoint, or that of `from_step`; a run that was stopped before it had
    one begins again. SIGTERM and SIGINT end the step, save and raise Interrupted.

    `penalty` is added to each update's loss (a method's regulariser), and `after_update` follows it. `evaluate` returns
    held-out numbers for the log. Budgets by minutes follow the clock and so are not bit-exact.
    """
    device = model.embedding.weight.device
    dtype = resolve_dtype(config.dtype, device)
    processes = processes or Processes()
    optimizer = Optimizer(parameters, config, body)
    model.recompute = config.recompute
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    if config.compile and (reason := compile_blocks(model, autocast(device, dtype))) and not quiet:
        print(f"the blocks are not compiled: {reason}", file=sys.stderr)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    ema = {n: p.detach().clone() for n, p in parameters.items()} if config.ema else {}
    step, tokens, seconds, resumed = 0, 0, 0.0, False
    log_sum, log_count = 0.0, 0  # of the loss, since the last log line
    found = folder.load_checkpoint(from_step) if resume else None
    saved_step = found[1]["step"] if found else -1  # what the newest checkpoint holds
    if resume:
        processes.meet()  # before process 0 removes what another may still read
        folder.remove_leftovers()
        folder.remove_checkpoints(after=max(saved_step, 0))
        folder.rewind_metrics(saved_step)
    if found is not None:
        tensors, state = found
        step, tokens, seconds, resumed = state["step"], state["tokens"], state["seconds"], True
        log_sum, log_count = state["log_sum"], state["log_count"]
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
            for name, average in ema.items():
                average.copy_(tensors[f"ema.{name}"])
        optimizer.load_state(tensors)
        if "scaler" in state and state["scaler"]:
            scaler.load_state_dict(state["scaler"])

    steps = total_steps(config, source)

    def progress() -> float:
        if steps is not None:
            return step / steps
        if config.tokens is not None:
            return tokens / config.tokens
        return seconds / (60 * config.minutes)  # type: ignore[operator]

    def checkpoint() -> None:
        nonlocal saved_step
        if step == saved_step:
            return
        tensors = {f"model.{n}": p for n, p in parameters.items()} | {f"ema.{n}": a for n, a in ema.items()}
        state = {"tokens": tokens, "seconds": seconds, "scaler": scaler.state_dict()}
        state |= {"log_sum": log_sum, "log_count": log_count}
        folder.save_checkpoint(step, tensors | optimizer.state(), state, config.keep)
        saved_step = step

    def held_out() -> dict[str, float]:
        model.eval()
        with _swapped(parameters, ema), autocast(device, dtype):
            result = evaluate()
        model.train()
        return result

    metrics: dict[str, Any] = {}
    saved = time.monotonic()
    with StopSignals() as stop, Progress(label, 1.0, quiet=quiet) as bar:

        def stop_if(told: int, is_saved: bool = False) -> None:
            if told:
                if not is_saved:
                    checkpoint()
                raise Interrupted(told, f"step {step} is saved; go on with --resume {folder.path}")

        if not resumed:
            metrics = held_out()
            folder.log({"step": 0, "tokens": 0, "seconds": 0.0, **metrics})
        model.train()
        told = stop.received if processes.size == 1 else 0  # by a signal; several processes obey process 0's
        while progress() < 1.0:
            stop_if(told)
            started = time.perf_counter()
            optimizer.set_lr(lr_factor(progress(), config.warmup, config.decay), progress())
            batch = source.batch(step, config.batch_size, config.seed)
            noised, normaliser = objective.noise(batch, step)
            torch.manual_seed(seed_of(config.seed, 7, step, processes.rank))  # of dropout
            optimizer.zero_grad()
            loss = torch.zeros((), device=device)
            for micro in processes.share(noised, config.accumulate):
                with autocast(device, dtype):
                    nll, row = token_nll(model, micro.to(device))
                    part = (nll * micro.weight.to(device)[row]).sum() / normaliser
                scaler.scale(part).backward()
                loss += part.detach()
            processes.sum_gradients(parameters.values())
            if penalty is not None:
                scaler.scale(penalty()).backward()
            for part_optimizer in optimizer.parts:
                scaler.unscale_(part_optimizer)
            norm = nn.utils.clip_grad_norm_(parameters.values(), config.clip or math.inf)
            if not math.isfinite(float(loss)) or not (math.isfinite(float(norm)) or scaler.is_enabled()):
                raise TinyldError(
                    f"the loss ({float(loss):.4g}) or gradient at step {step} is not finite; "
                    f"{folder.last_good()}; lower --lr"
                )
            for part_optimizer in optimizer.parts:
                scaler.step(part_optimizer)
            scaler.update()
            step += 1
            tokens += int(batch.attention_mask.sum())
            seconds += time.perf_counter() - started
            if processes.size > 1:  # the clock is process 0's, too
                mine = [seconds, float(stop.received)] if processes.rank == 0 else [0.0, 0.0]
                total, seconds, signum = processes.sum([float(loss), *mine])
                loss, told = torch.tensor(total), int(signum)
            after_update(progress())
            if ema:
                decay = min(config.ema, (1 + step) / (10 + step))
                with torch.no_grad():
                    torch._foreach_lerp_(list(ema.values()), [p.detach() for p in parameters.values()], 1 - decay)
            log_sum, log_count = log_sum + float(loss), log_count + 1
            done = progress() >= 1.0
            if step % 10 == 0 or done:
                bar.advance_to(progress(), f"{tokens / max(seconds, 1e-9):,.0f} tokens/s", f"loss {float(loss):.3f}")
            evaluates = done or step % config.eval_every == 0
            if evaluates or step % 50 == 0:
                record = {
                    "step": step,
                    "tokens": tokens,
                    "seconds": seconds,
                    "lr": config.lr * lr_factor(progress(), config.warmup, config.decay),
                    "loss": log_sum / log_count,
                    "grad_norm": float(norm),
                }
                log_sum, log_count = 0.0, 0
                if evaluates:
                    metrics = held_out()
                folder.log(record | (metrics if evaluates else {}))
            if not done and time.monotonic() - saved > 60 * config.save_minutes:
                checkpoint()
                saved = time.monotonic()
            told = stop.received if processes.size == 1 else told
        checkpoint()
        stop_if(stop.received if processes.size == 1 else told, is_saved=True)
    metrics = metrics or held_out()  # empty when a run is resumed after its last step
    with torch.no_grad():
        for name, average in ema.items():
            parameters[name].copy_(average)
    model.eval()
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else _peak_rss_mb()
    return TrainResult(step, tokens, seconds, peak, metrics)


def _peak_rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class _swapped:
    """Within it, `parameters` hold the averaged values."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], average: Mapping[str, Tensor]):
        self.pairs = [(parameters[n], a) for n, a in average.items()]

    def _swap(self) -> None:
        with torch.no_grad():
            for parameter, average in self.pairs:
                kept = parameter.clone()
                parameter.copy_(average)
                average.copy_(kept)

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()

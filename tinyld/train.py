"""The training loop, one for pretraining and every method: batch -> noise -> loss -> backward -> clip -> update -> log.

It knows no method by name and no task: it is handed the parameters that train, a source of rows and an evaluation.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from shlex import quote
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyld.checkpoint import load_exactly
from tinyld.config import TrainConfig
from tinyld.data import Batch, Source, TaskRows, seed_of, torch_seeded
from tinyld.device import autocast, from_int8, resolve_dtype, to_int8
from tinyld.diffusion import Noised, token_nll
from tinyld.distributed import Processes
from tinyld.errors import Diverged, TinyldError
from tinyld.interrupt import Interrupted, StopSignals
from tinyld.model import Denoiser
from tinyld.optim import Optimizer, lr_factor
from tinyld.progress import Advance, Progress, unheard
from tinyld.runs import RunFolder

GROUP = 64  # numbers of a kept state that have one scale
Noise = Callable[..., list[Noised]]  # (batch, generator=) -> the batch with its noise, in parts of different widths


def kept_depths(model: Denoiser) -> tuple[int, int] | None:
    """The first and the last depth of which every later pass needs the frozen base's states: where the push begins or,
    if it is on the answer only, from there on to before the last block. None where the first block is changed."""
    push = model.push
    if push is None or (push.first_depth == 0 and not push.answer_only):
        return None
    return push.first_depth, max(push.first_depth, model.config.num_layers - 1 if push.answer_only else 0)


def why_not_cached(model: Denoiser, rows: TaskRows, limit_gb: float) -> str | None:
    """The reason why frozen states cannot be kept for these rows, or None when they can."""
    if (kept := kept_depths(model)) is None:
        return "the method changes the first block"
    if rows.slot > 1 or rows.open_ended:
        hint = "" if rows.task.is_generation else "; labels of one word are learned and answered faster"
        return f"the answer has {rows.slot} tokens, whose masks vary{hint}"
    of_token = sum(part.nbytes for part in pack(torch.empty(kept[1] - kept[0] + 1, model.config.d_model)))
    size = int(rows.lengths.sum()) * of_token / 2**30
    return None if size <= limit_gb else f"{size:.1f} GB of states, --cache-gb allows {limit_gb:g}"


def pack(states: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) -> int8 (..., D / GROUP, GROUP) and scales (..., D / GROUP, 1): a few large numbers cost few others."""
    return to_int8(states.unflatten(-1, (-1, math.gcd(states.shape[-1], GROUP))))


def unpack(values: Tensor, scales: Tensor) -> Tensor:
    return from_int8(values, scales).flatten(-2)


@torch.no_grad()
def with_states(noise: Noise, model: Denoiser, rows: TaskRows, advance: Advance = unheard) -> Noise:
    """The noise of rows of one-token answers, which have one mask, with the states of every token that its passes need,
    kept in int8."""
    first, last = kept_depths(model)  # type: ignore[misc]  # why_not_cached was asked
    tokens, done = int(rows.lengths.sum()), 0
    starts = torch.from_numpy(np.cumsum(rows.lengths) - rows.lengths)  # of each row among the tokens of all
    made = pack(torch.empty(0, last - first + 1, model.config.d_model))
    kept = [part.new_empty(tokens, *part.shape[1:]) for part in made]  # values and scales

    def numbers(batch: Batch) -> Tensor:
        """(B, L): each token's number among those of all rows; padding gets some other row's, or the last one's."""
        return (starts[batch.rows][:, None] + torch.arange(batch.x0.shape[1])).clamp(max=tokens - 1)

    for chunk in rows.in_length_order(model.rows_at_once(int(rows.lengths.max()), 128)):
        batch = rows.take(chunk)
        (noised,) = noise(batch, generator=torch.Generator())
        noised, real = noised.to(model.device), batch.attention_mask.to(model.device)
        states, _ = model.frozen(noised.xt, noised.attention_mask, first, last)
        packed = [pack(state[real]) for state in states]
        for of_all, parts in zip(kept, zip(*packed, strict=True), strict=True):
            of_all[numbers(batch)[batch.attention_mask]] = torch.stack(parts, dim=1).cpu()
        done += len(chunk)
        advance(done)

    def noise_with_states(batch: Batch, generator: torch.Generator) -> list[Noised]:
        (noised,), wanted = noise(batch, generator=generator), numbers(batch)
        found = (of_all.index_select(0, wanted.flatten()) for of_all in kept)  # ten times as fast as of_all[wanted]
        return [replace(noised, cached=unpack(*found).unflatten(0, wanted.shape))]

    return noise_with_states


COUNTERS = ("step", "tokens", "seconds", "log_sum", "log_count")  # what a checkpoint keeps beside the tensors


@dataclass
class TrainingRun:
    """What trains `parameters` in place: all that it is given, the optimizer and how far it is. `loss` is of each
    masked token; to its mean `penalty` is added (a method's regulariser), and `after_update` follows each update.
    `evaluate` returns held-out numbers for the log. Budgets by minutes follow the clock and so are not bit-exact."""

    model: Denoiser
    parameters: Mapping[str, nn.Parameter]
    source: Source
    noise: Noise
    config: TrainConfig
    folder: RunFolder
    evaluate: Callable[[], dict[str, float]]
    label: str
    penalty: Callable[[], Tensor | None] = lambda: None
    after_update: Callable[[float], None] = lambda progress: None
    loss: Callable[[Denoiser, Noised], tuple[Tensor, Tensor]] = token_nll
    body: frozenset[str] = frozenset()  # tensors of a warm-started encoder
    processes: Processes = Processes()
    quiet: bool = False

    def __post_init__(self) -> None:
        config = self.config
        self.device = self.model.device
        dtype = resolve_dtype(config.dtype, self.device)
        self.autocast = partial(autocast, self.device, dtype)
        self.optimizer = Optimizer(self.parameters, config, self.body)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.step = self.tokens = self.log_count = 0  # the log's are of the loss, since its last line
        self.seconds = self.log_sum = 0.0  # of training, held-out evaluation and saving left out
        self.saved_step = -1
        self.metrics: dict[str, Any] = {}  # the last held-out ones
        self.told = 0  # the signal that came before the last update ended
        self.steps = config.steps
        if config.epochs is not None:
            self.steps = max(1, math.ceil(config.epochs * self.source.steps_per_epoch(config.batch_size)))
        self.resume = f"--resume {quote(str(self.folder.path))}"
        self.bar = Progress(self.label, 1.0, quiet=self.quiet)
        self.stop = StopSignals("stopping after this step" if self.processes.rank == 0 else "")

    def train(self, resume: bool = False) -> TrainingRun:
        """Trains until the budget is used up. With `resume` it goes on from the newest checkpoint, or where there is
        none begins again. A signal ends the step, saves and raises Interrupted."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.model.recompute = self.config.recompute
        if resume:
            self.go_on()
        forked = torch.random.fork_rng([self.device] if on_gpu else [])  # updates seed the global generator
        with self.stop, self.bar, forked:
            if self.saved_step < 0:
                self.folder.log({"step": 0, "tokens": 0, "seconds": 0.0, **self.held_out()})
            self.model.train()
            saved = time.monotonic()
            while self.progress < 1.0 and not self.told:
                self.update()
                evaluates = self.progress >= 1.0 or self.step % self.config.eval_every == 0
                if evaluates or self.step % 50 == 0:
                    self.log(evaluates)
                if self.progress < 1.0 and time.monotonic() - saved > 60 * self.config.save_minutes:
                    self.save()
                    saved = time.monotonic()
            self.save()
            if told := self.told or self.stop.received:  # maybe since the last update
                raise Interrupted(told, f"step {self.step} is saved; go on with {self.resume}")
        self.metrics = self.metrics or self.held_out()  # none yet when a run is resumed after its last step
        self.model.eval()
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
        self.peak_memory_mb = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resident
        return self

    @property
    def progress(self) -> float:
        """The share of the budget that is used up."""
        if self.steps is not None:
            return self.step / self.steps
        if self.config.tokens is not None:
            return self.tokens / self.config.tokens
        return self.seconds / (60 * self.config.minutes)  # type: ignore[operator]

    def go_on(self) -> None:
        """Takes up a checkpoint, if there is one, and removes what came after it."""
        if (found := self.folder.load_checkpoint()) is not None:
            tensors, state = found
            vars(self).update({name: state[name] for name in COUNTERS}, saved_step=state["step"])
            saved = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")}
            load_exactly(self.parameters, saved, state.path)
            self.optimizer.load_flat_state(tensors)
            if state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        self.processes.meet()  # before process 0 removes what another may still read
        self.folder.rewind(self.saved_step)

    def log(self, evaluates: bool) -> None:
        """Writes a line of the log, with held-out numbers where it evaluates."""
        record = {
            "step": self.step, "tokens": self.tokens, "seconds": self.seconds, "lr": self.lr,
            "loss": self.log_sum / self.log_count,
            "grad_norm": self.norm if math.isfinite(self.norm) else None,  # of an update that the scaler left out
        }  # fmt: skip
        self.log_sum, self.log_count = 0.0, 0
        self.folder.log(record | (self.held_out() if evaluates else {}))

    def update(self) -> None:
        """One update; TinyldError where loss or gradient is not finite, with the parameters as they were."""
        config, started = self.config, time.perf_counter()
        rate = lr_factor(self.progress, config.warmup, config.flat)
        self.lr = config.lr * rate
        self.optimizer.set_lr(rate, self.progress)
        batch = self.source.batch(self.step, config.batch_size, config.seed)
        noised = self.noise(batch, generator=torch_seeded(config.seed, 2, self.step))
        torch.manual_seed(seed_of(config.seed, 7, self.step, self.processes.rank))  # of dropout
        self.model.zero_grad()
        loss = float(self.backward(noised))
        self.scaler.unscale_(self.optimizer)
        self.norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), config.clip or math.inf))
        if not math.isfinite(loss) or not (math.isfinite(self.norm) or self.scaler.get_scale() > 1.0):
            raise self.diverged(f"the loss ({loss:.4g}) or gradient")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.tokens += int(batch.attention_mask.sum())
        self.seconds += time.perf_counter() - started
        mine = [self.seconds, float(self.stop.received)] if self.processes.rank == 0 else [0.0, 0.0]
        loss, self.seconds, told = self.processes.sum([loss, *mine])  # the clock and the signals are process 0's, too
        self.told, self.log_sum, self.log_count = int(told), self.log_sum + loss, self.log_count + 1
        self.after_update(self.progress)
        speed = self.tokens / max(self.seconds, 1e-9)
        self.bar.advance_to(self.progress, f"{speed:,.0f} tokens/s loss {loss:.3f}")

    def backward(self, noised: list[Noised]) -> Tensor:
        """The mean loss of all masked tokens, as far as this process's rows go; its gradient, of all processes' and of
        the penalty, is left behind."""
        loss = self.scaler.scale(torch.zeros((), device=self.device))  # which has a scale now, with no row here too
        masked = max(1.0, sum(float(part.is_masked.sum()) for part in noised))
        for micro in [some for part in noised for some in self.processes.share(part, self.config.accumulate)]:
            with self.autocast():
                nll, _ = self.loss(self.model, micro.to(self.device))
                part = nll.sum() / masked
            self.scaler.scale(part).backward()
            loss += part.detach()
        self.processes.sum_gradients(self.parameters.values())
        if (penalty := self.penalty()) is not None:
            self.scaler.scale(penalty).backward()
        return loss

    def held_out(self) -> dict[str, Any]:
        """The evaluation's numbers; TinyldError where the parameters or what they give is not finite."""
        self.check_finite()
        self.bar.doing("dev evaluation")
        self.model.eval()
        try:
            with self.autocast():
                self.metrics = self.evaluate()
        except TinyldError:
            raise self.diverged("what the denoiser gives") from None
        self.model.train()
        self.bar.doing()
        return self.metrics

    def save(self) -> None:
        """Writes a checkpoint, of finite parameters alone, unless the newest one is of this step."""
        if self.step == self.saved_step:
            return
        self.check_finite()
        tensors = {f"model.{n}": p for n, p in self.parameters.items()} | self.optimizer.flat_state()
        state = {name: getattr(self, name) for name in COUNTERS} | {"scaler": self.scaler.state_dict()}
        self.folder.save_checkpoint(self.step, tensors, state, self.config.keep)
        self.saved_step = self.step

    def check_finite(self) -> None:
        for name, parameter in self.parameters.items():
            if not bool(parameter.isfinite().all()):
                raise self.diverged(name)

    def diverged(self, what: str) -> Diverged:
        """For an error; removes a checkpoint of these very parameters, from which nothing can go on."""
        self.folder.remove_checkpoints(after=self.step - 1)
        also = f", also with {self.resume}" if self.folder.checkpoints() else ""
        return Diverged(f"{what} at step {self.step} is not finite; {self.folder.last_good()}; lower --lr{also}")

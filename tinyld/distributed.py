"""Several processes at one run: `torchrun --nproc-per-node=N -m tinyld pretrain|finetune ...`, on torch.distributed.

Batches and noise are functions of (seed, step), so every process draws the whole batch and takes its share of the rows;
gradients are summed and every process makes the same update. Process 0 alone writes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor, nn

from tinyld.config import check
from tinyld.diffusion import Noised
from tinyld.errors import TinyldError
from tinyld.interrupt import handling
from tinyld.runs import under_torchrun


@dataclass(frozen=True)
class Processes:
    """This process among those of its run; alone where torchrun did not start it."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Processes:
        """Meets the others that torchrun started: gloo on processors, NCCL on GPUs."""
        if not under_torchrun():
            return cls()
        if device.type == "cuda":
            number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            check(number < there, f"torchrun started more processes here than torch sees GPUs, {there}")
            one_for_all = f"under torchrun each process has a GPU of its own: say --device cuda, not {device}"
            check(device.index is None, one_for_all)
            torch.cuda.set_device(number)
        if not torch.distributed.is_initialized():
            with handling(signal.SIG_DFL):  # while it waits for the others no handler of Python's runs
                torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def meet(self) -> None:
        """Waits for all processes."""
        self.sum([0.0])

    def share(self, noised: Noised, accumulate: int) -> list[Noised]:
        """This process's rows of a batch, in micro-batches; none where there are fewer rows than processes."""
        if self.size == accumulate == 1:
            return [noised]
        mine = torch.arange(len(noised.t))[self.rank :: self.size]
        return [noised.map(itemgetter(some)) for some in mine.chunk(accumulate)] if len(mine) else []

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over all processes."""
        if self.size == 1:
            return values
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=device)
        self._reduce(total)
        return total.tolist()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leaves in every process the sum of all processes' gradients."""
        for parameter in parameters if self.size > 1 else ():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self._reduce(parameter.grad)

    def _reduce(self, tensor: Tensor) -> None:
        try:
            torch.distributed.all_reduce(tensor)
        except RuntimeError as error:
            if "memory" in str(error):
                raise
            line = str(error).splitlines()[0][:100]
            raise TinyldError(f"another process of this run is gone ({line}); go on with --resume") from None

"""What a GPU refuses: tensors of two devices in one operation, on a GPU that is only pretended."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import good
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tinyld.device import fast_dtype
from tinyld.runs import RunFolder

CUDA = torch.device("cuda")
INDEXED = ("__getitem__", "__setitem__", "index_put_")  # a GPU's takes indices of the processor too
MOVES = ("_has_compatible_shallow_copy_type", "copy_", "__set__")  # as Module.to does, and copies between devices


class Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls)

    def __init__(self, device: Any = "cpu"):
        self.pretended = torch.device(device).type == "cuda"

    def manual_seed(self, seed: int) -> Generator:
        super().manual_seed(seed)
        return self


def is_there(of: Any) -> bool:
    return getattr(of, "pretended", False)


class Pretended(TorchFunctionMode):
    """Tensors that are sent to `cuda` stay where they are, but say that they are there, and so does all that comes of
    them. An operation on tensors here and there is refused, as by a real GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        owner = getattr(func, "__self__", None)
        if name == "__get__" and owner in (Tensor.device, Tensor.is_cuda) and is_there(args[0]):
            return CUDA if owner is Tensor.device else True
        if name in ("to", "cpu", "cuda", "pin_memory"):
            return self.sent(name, *args, **kwargs)
        wanted = kwargs.pop("device", None)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        there = {is_there(t) for t in tensors if t.dim() > 0}
        if name == "__set__" and owner is Tensor.data:
            self.marked(args[0], is_there(args[1]))
            return func(*args)
        if name in INDEXED and is_there(args[0]):
            there = {True}
        if len(there) > 1 and name not in MOVES:
            raise RuntimeError(f"Expected all tensors to be on the same device, cuda:0 and cpu: {name}")
        if name == "numpy" and True in there:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        goes = any(map(is_there, tensors)) if wanted is None else torch.device(wanted).type == "cuda"
        if is_there(kwargs.get("generator")) != goes and kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected another device type for generator: {name}")
        return self.marked(func(*args, **kwargs), goes)

    def sent(self, name: str, tensor: Tensor, *to: Any, **more: Any) -> Tensor:
        goes = is_there(tensor) and name != "cpu"
        for each in (*to, more.get("device"), more.get("dtype")):
            if isinstance(each, str | torch.device):
                goes = torch.device(each).type == "cuda"
            elif isinstance(each, Tensor):  # its device and type
                goes, tensor = is_there(each), tensor.type(each.dtype)
            elif isinstance(each, torch.dtype):
                tensor = tensor.type(each)
        return tensor if goes == is_there(tensor) else self.marked(tensor.view_as(tensor), goes)

    def marked(self, found: Any, goes: bool) -> Any:
        def mark(tensor: Tensor) -> Tensor:
            if goes != is_there(tensor):
                tensor.pretended = goes  # type: ignore[attr-defined]
            return tensor

        return tree_map_only(Tensor, mark, found)


@pytest.fixture()
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    make = Tensor._make_subclass
    monkeypatch.setattr(torch, "Generator", Generator)

    def parameter(cls: Any, data: Tensor, *args: Any) -> Tensor:
        found = make(cls, data, *args)
        found.pretended = is_there(data)
        return found

    monkeypatch.setattr(Tensor, "_make_subclass", staticmethod(parameter))
    told = {"is_available": True, "device_count": 1, "get_device_name": "pretended", "max_memory_allocated": 0}
    told |= dict.fromkeys(("get_rng_state", "set_rng_state", "reset_peak_memory_stats"))
    told |= {"is_bf16_supported": fast_dtype(torch.device("cpu")) == "bf16"}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    with Pretended():
        yield


OF_A_RUN = r'"(run|\w*seconds|\w+_per_second|peak_memory_mb)": [^,}]+'  # what differs from run to run


def same_on_both(folder: Path, *commands: str) -> None:
    """That commands say the same, and log the same in their run {out}, on either device."""
    found: list[Any] = []
    for device in ("cpu", "cuda"):
        out, there = folder / device, ["--device", device, "--dtype", "fp32"]
        said = [good(*command.format(out=out).split(), *there).stdout.replace(str(out), "") for command in commands]
        log = [line | {"seconds": 0} for line in RunFolder(out).metrics()]
        found.append([re.sub(OF_A_RUN, "", text) for text in said] + log)
    assert found[0] == found[1]
    assert torch.get_float32_matmul_precision() == "highest", "training leaves it as it was"


HOW = {"fast": "--recipe fast --set ranks=2,2,2", "best": "--set ranks=2,2,2", "auto": "--set ranks=auto --budget 9%"}
HOW |= {"paper": "--recipe paper --set ranks=4,2,2", "lora": "--method weight-lora --set rank=1"}
HOW |= {name: f"--method {name}" for name in ("adapters", "bitfit", "full")}


@pytest.mark.parametrize("task", ["mood", "tell", "a"])  # a: labels of one token, whose states are kept
@pytest.mark.parametrize("how", HOW)
def test_a_task_is_learned_as_on_the_processor(
    task: str, how: str, fast: list[Path], gpu: None, place: Path, tmp_path: Path
) -> None:
    learn = f"finetune --task {place}/{task}.toml --base {place}/base {HOW[how]} --steps 3 --out {{out}} --json"
    same_on_both(tmp_path, learn, "eval {out} --json", "predict {out} --text rain --json")


@pytest.mark.parametrize("how", [
    "--sampler ancestral --temperature 0.5", "--sampler klass", "--sampler entropy", "--sampler revise --steps 8",
    "--set lengths=3",
])  # fmt: skip
def test_texts_are_written_as_on_the_processor(how: str, gpu: None, place: Path, tmp_path: Path) -> None:
    same_on_both(tmp_path, f"predict {place}/tell --text rain --text sea {how} --json")


def test_running_text_is_learned_measured_and_written(gpu: None, place: Path, tmp_path: Path) -> None:
    learn = f"pretrain --init {place}/base --data {place}/text.txt --steps 3 --out {{out}} --json"
    sample = "sample --base {out} --num 2 --length 6 --temperature 0.5 --json"
    same_on_both(tmp_path, learn, f"eval {{out}} --text {place}/text.txt --json", sample)


def test_adapters_answer_together(gpu: None, fast: list[Path], tmp_path: Path) -> None:
    together = f"predict {fast[0]} {fast[1]} --text rain --json"
    compose = f"compose {fast[0]} {fast[3]} --out {{out}}"
    same_on_both(tmp_path, together, compose, "predict {out} --text rain --json --task a")

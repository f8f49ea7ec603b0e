"""Speed side by side: what tinyld does against the same work in a plain loop with transformers or peft.

Every measurement is a process of its own (its peak memory is then its own), ours and the peer's in turns, several
times; a ratio is the median over the turns. Absolute seconds say little about another machine: the rate of its largest
matrix product, measured in the same run, stands beside them. transformers and peft come with the extra `bench`. Methods
are timed on the first rows of one task, answers of one token are decoded for those rows.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyld.errors import TinyldError

LENGTH, BATCH = 256, 32  # tokens of a pretraining row; rows a batch
TASK_ROWS = 2_000


@dataclass(frozen=True)
class Comparison:
    """Our measurement against a peer's, and the ratio that it should reach."""

    what: str
    ours: str
    peer: str
    bar: float  # of peer seconds / our seconds for the same work


COMPARISONS = (
    Comparison("pretraining, tokens/s, against BertForMaskedLM", "pretrain", "pretrain-bert", 1.5),
    Comparison("the same, ours with --compile", "pretrain-compiled", "pretrain-bert", 1.5),
    Comparison("trajectory-lora fast, 3 epochs, against peft LoRA r=8", "fast", "peft-lora", 5.0),
    Comparison("trajectory-lora best, the same", "best", "peft-lora", 1.0),
    Comparison("weight-lora r=8, step, against peft LoRA r=8", "weight-lora", "peft-lora", 0.8),
    Comparison("full, step, against BertForMaskedLM", "full", "bert-full", 0.8),
    Comparison("bitfit, step, against BertForMaskedLM, biases only", "bitfit", "bert-bitfit", 0.8),
    Comparison("weight-lora r=8, step, against our own full", "weight-lora", "full", 1.0),
    Comparison("adapters, step, against our own full", "adapters", "full", 1.0),
    Comparison("bitfit, step, against our own full", "bitfit", "full", 1.0),
    Comparison("eval, one-token answers, against a plain loop", "eval", "eval-plain", 5.0),
    Comparison("decoding 32 tokens, threshold, against a plain loop", "write", "write-plain", 3.0),
    Comparison("composing 4 adapters, rows/s, against one", "compose-4", "compose-1", 0.8),
)


def needs_peers(name: str) -> bool:
    return name in ("pretrain-bert", "peft-lora", "bert-full", "bert-bitfit")


def has_peers() -> bool:
    return all(importlib.util.find_spec(name) for name in ("transformers", "peft"))


# ------------------------------------------------------------------------------------------------ the parent


def compare(comparison: Comparison, task: str, turns: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs both sides in turns and returns the row of the table."""
    ours, peers = [], []
    for turn in range(turns):
        sides = ((comparison.ours, ours), (comparison.peer, peers))
        for name, found in sides if turn % 2 == 0 else sides[::-1]:
            say(f"-- {comparison.what}: {name}, turn {turn + 1} of {turns}")
            found.append(in_a_process(name, task=task))
    ratios = sorted(p["seconds"] / o["seconds"] for o, p in zip(ours, peers, strict=True))
    return {
        "what": comparison.what,
        "ratio": round(statistics.median(ratios), 2),
        "lowest": round(ratios[0], 2),
        "highest": round(ratios[-1], 2),
        "bar": comparison.bar,
        "met": statistics.median(ratios) >= comparison.bar,
        "our seconds": round(statistics.median(o["seconds"] for o in ours), 2),
        "peer seconds": round(statistics.median(p["seconds"] for p in peers), 2),
        "our peak MB": round(max(o["peak_mb"] for o in ours)),
        "peer peak MB": round(max(p["peak_mb"] for p in peers)),
        **{k: v for k, v in (peers[-1] | ours[-1]).items() if k not in ("seconds", "peak_mb")},
    }


def in_a_process(name: str, module: str = "bench", **options: str) -> dict[str, Any]:
    """Runs one of the module's MEASUREMENTS in a process of its own."""
    code = f"from tinyld import bench, {module}; bench.measure({module}.MEASUREMENTS[{name!r}], **{options!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise TinyldError(f"bench {name} failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def start_up(turns: int) -> list[dict[str, Any]]:
    """Seconds of the light verbs over those of an empty Python, the quickest of several starts each."""

    def seconds(command: list[str]) -> float:
        def once() -> float:
            started = time.perf_counter()
            subprocess.run(command, capture_output=True, check=True)
            return time.perf_counter() - started

        return min(once() for _ in range(2 * turns))

    empty = seconds([sys.executable, "-c", "pass"])
    rows = []
    for arguments in (["--help"], ["info", str(released_base())]):
        more = seconds([sys.executable, "-m", "tinyld", *arguments]) - empty
        what = f"tinyld {arguments[0]}, seconds over an empty python"
        rows.append({"what": what, "seconds": round(more, 3), "bar": 0.25, "met": more <= 0.25})
    return rows


def released_base() -> Path:
    from tinyld.commands.workspace import default_base

    return default_base()


# ------------------------------------------------------------------------------------------------ measurements


def measure(run: Callable[..., dict[str, Any]], **options: str) -> None:
    """Runs one measurement in this process and prints it as JSON."""
    from tinyld.commands.workspace import keep_freed_memory

    keep_freed_memory()
    found = run(**options)
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


def ceiling() -> dict[str, Any]:
    """FLOP/s of a large matrix product, in the arithmetic that `auto` takes here."""
    import torch

    from tinyld.device import resolve_dtype

    dtype = resolve_dtype("auto", torch.device("cpu"))
    a, b = (torch.randn(2048, 2048, dtype=dtype) for _ in range(2))
    rates = []
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        rates.append(2 * 2048**3 / (time.perf_counter() - started))
    return {"seconds": 1.0, "flops": max(rates), "dtype": str(dtype).removeprefix("torch.")}


def pretrain_rows(preset: str = "small", length: int = LENGTH) -> Any:
    """Token rows for a preset, random: their cost is that of text."""
    import numpy as np

    from tinyld.config import VOCAB_SIZES
    from tinyld.data import TextRows

    stream = np.random.default_rng(0).integers(5, VOCAB_SIZES[preset], 400_000)
    return TextRows(stream.astype(np.int32), length, bos_id=2)


STEPS = 12
WARM_UP = 6  # steps of pretraining that are not timed, on either side: --compile compiles in them


def run_pretrain(
    preset: str = "small", length: int = LENGTH, batch_size: int = BATCH, steps: int = STEPS, compile: bool = False
) -> dict[str, Any]:
    """Seconds of that many steps after the WARM_UP."""
    import torch

    from tinyld.config import PRESETS, VOCAB_SIZES, DiffusionConfig, ModelConfig, TrainConfig
    from tinyld.model import Denoiser
    from tinyld.runs import RunFolder
    from tinyld.train import Objective, train

    config = ModelConfig(vocab_size=VOCAB_SIZES[preset], **PRESETS[preset] | {"max_length": length})
    model = Denoiser(config, torch.Generator().manual_seed(0))
    objective = Objective(DiffusionConfig(), mask_id=3, counted=False, seed=0)
    training = TrainConfig(
        steps=WARM_UP + steps, batch_size=batch_size, optimizer="adamw", eval_every=WARM_UP, compile=compile
    )
    with tempfile.TemporaryDirectory() as path:
        rows, folder = pretrain_rows(preset, length), RunFolder(Path(path))
        result = train(
            model, dict(model.named_parameters()), rows, objective, training, folder, dict, "bench", quiet=True
        )
        before = next(r for r in folder.metrics() if r["step"] == WARM_UP)
    if compile and model.blocks[0]._compiled_call_impl is None:
        raise TinyldError("the blocks were not compiled; tinyld pretrain --compile says why")
    seconds, tokens = result.seconds - before["seconds"], result.tokens - before["tokens"]
    inside = sum(p.numel() for n, p in model.named_parameters() if n.startswith("blocks.") and p.dim() == 2)
    attention = 4 * config.num_layers * config.d_model * length  # 2 products of 2 D L a token and block
    masked = 0.5  # of the tokens, on average: the vocabulary head runs on those alone
    rate = tokens / seconds
    flops = 3 * (2 * inside + attention + masked * 2 * config.d_model * config.vocab_size)
    return {"seconds": seconds, "tokens/s": rate, "model_flops_per_s": flops * rate}


def bert() -> Any:
    """A BertForMaskedLM of the preset small's size."""
    from transformers import BertConfig, BertForMaskedLM

    from tinyld.config import PRESETS, VOCAB_SIZES

    small = PRESETS["small"]
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB_SIZES["small"],
            hidden_size=small["d_model"],
            num_hidden_layers=small["num_layers"],
            num_attention_heads=small["num_heads"],
            intermediate_size=small["d_ff"],
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
    )


def plain_loop(model: Any, batches: list[Any], warm_up: int = 0) -> float:
    """Seconds of the loop that a transformers user writes, after its first `warm_up` batches: logits everywhere, loss
    where labels are."""
    import torch

    from tinyld.device import autocast, resolve_dtype

    device = torch.device("cpu")
    dtype = resolve_dtype("auto", device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    model.train()
    started = time.perf_counter()
    for step, batch in enumerate(batches):
        if step == warm_up:
            started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, dtype):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return time.perf_counter() - started


def run_pretrain_bert() -> dict[str, Any]:
    import torch

    rows = pretrain_rows()
    batches = []
    for step in range(WARM_UP + STEPS):
        x0 = rows.batch(step, BATCH, 0).x0
        masked = torch.rand(x0.shape) < torch.rand(len(x0), 1)
        batches.append({"input_ids": torch.where(masked, 3, x0), "labels": torch.where(masked, x0, -100)})
    return {"seconds": plain_loop(bert(), batches, WARM_UP)}


def task_rows(base: Any, name: str, split: str = "train", limit: int | None = TASK_ROWS) -> Any:
    from tinyld.data import TaskRows
    from tinyld.tasks import load_split, load_task

    task = load_task(name)
    return TaskRows(load_split(task, split, limit=limit), task, base.tokenizer, base.model.config.max_length)


EPOCHS = 3


def run_method(task: str, method: str, limit: int = TASK_ROWS, epochs: int = EPOCHS, **options: Any) -> dict[str, Any]:
    """Fine-tuning from start to end, the cache included."""
    import torch

    from tinyld.checkpoint import attach, load_base
    from tinyld.config import DiffusionConfig, TrainConfig
    from tinyld.finetune import finetune
    from tinyld.methods import METHODS, make_config
    from tinyld.runs import RunFolder

    base = load_base(released_base())
    rows = task_rows(base, task, limit=limit)
    config = make_config(method, options, base.model.config)
    adapted = attach(base, method, config, task, torch.Generator().manual_seed(0))
    lr, optimizer = METHODS[method].usual(base.model.config, recipe=options.get("recipe"))
    training = TrainConfig(epochs=epochs, batch_size=BATCH, lr=lr, optimizer=optimizer, eval_every=10**6)
    with tempfile.TemporaryDirectory() as folder:
        dev = task_rows(base, task, "dev", limit=None)
        found = finetune(
            RunFolder(Path(folder)), adapted, rows, dev, DiffusionConfig(time_sampling="uniform"), training, 4.0, None,
            quiet=True, say=lambda text: None,
        )  # fmt: skip
    return {"seconds": found["seconds"]}


def run_bert(task: str, trained: str) -> dict[str, Any]:
    """The same rows, in the same batches, through a BERT: `all` of it trains, its `biases`, or a `lora` of peft, r=8 on
    the attention and MLP matrices."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tinyld.checkpoint import load_base

    base = load_base(released_base())
    rows = task_rows(base, task)
    batches = []
    for step in range(EPOCHS * rows.steps_per_epoch(BATCH)):
        batch = rows.batch(step, BATCH, 0)
        labels = torch.where(batch.answer_mask, batch.x0, -100)
        x = torch.where(batch.answer_mask, base.tokenizer.mask_id, batch.x0)
        batches.append({"input_ids": x, "attention_mask": batch.attention_mask.long(), "labels": labels})
    model: Any = bert()
    if trained == "lora":
        targets = r".*encoder\..*\.(query|key|value|dense)"  # our six matrices of a block, not the head's
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    if trained == "biases":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
    return {"seconds": plain_loop(model, batches)}


class InTurn:
    """A router that gives the rows of a batch to the adapters in turn, so that all of them run."""

    def __init__(self, count: int):
        self.count = count

    def __call__(self, features: Any) -> Any:
        import torch

        return torch.eye(self.count)[torch.arange(len(features)) % self.count]


def adapted_base(task: str, count: int) -> tuple[Any, Any]:
    """(base, rows) with `count` trajectory adapters at work; of several, each gets an equal share of every batch."""
    import torch

    from tinyld.checkpoint import attach, load_base
    from tinyld.compose import Composed, Member
    from tinyld.methods import make_config

    base = load_base(released_base())
    rows = task_rows(base, task)
    config = make_config("trajectory-lora", {}, base.model.config)
    fresh = attach(load_base(released_base()), "trajectory-lora", config, task)
    members = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        tensors = {n: 0.01 * torch.randn(p.shape, generator=generator) for n, p in fresh.method.own.items()}
        members.append(Member(f"m{i}", task, 1.0, "trajectory-lora", config, tensors, None))
    composed = Composed(members, "router" if count > 1 else "sum")
    if count > 1:
        composed.router = InTurn(count)
    composed.attach(base)
    return base, rows


def timed_eval(base: Any, rows: Any, rows_read: int, **sampling: Any) -> dict[str, Any]:
    """Seconds of decoding alone; the rows stand in order of their lengths, which is part of what we gain."""
    import torch

    from tinyld.chain import text_rows_nll
    from tinyld.config import SampleConfig
    from tinyld.device import autocast, resolve_dtype
    from tinyld.evaluate import evaluate

    device = torch.device("cpu")
    with autocast(device, resolve_dtype("auto", device)):
        for limit in (64, rows_read):  # the first to warm up
            found = evaluate(base.model, rows, base.tokenizer, SampleConfig(**sampling), limit=limit, score=False)
    texts = [answer for _, _, answer in found.predictions]
    written = {"our nll": text_rows_nll(base, texts)} if rows.slot > 1 else {}
    return {"seconds": found.n / found.rows_per_second, "forward_passes": found.forward_passes, **written}


ROWS = 1_024


def run_compose(task: str, count: int) -> dict[str, Any]:
    return timed_eval(*adapted_base(task, count), ROWS)


def run_plain_eval(task: str, rows_read: int) -> dict[str, Any]:
    """A LLaDA-style loop: a step a token, the vocabulary at every position, the whole batch to the end; [EOS] last."""
    import numpy as np
    import torch

    from tinyld.chain import text_rows_nll
    from tinyld.checkpoint import load_base
    from tinyld.device import autocast, resolve_dtype
    from tinyld.evaluate import EVAL_BATCH

    base = load_base(released_base())
    rows = task_rows(base, task)
    device = torch.device("cpu")
    seconds, texts = 0.0, []
    with torch.no_grad(), autocast(device, resolve_dtype("auto", device)):
        n = min(rows_read, len(rows))
        for start in range(0, n, EVAL_BATCH):
            batch = rows.take(np.arange(start, min(start + EVAL_BATCH, n)))
            started = time.perf_counter()
            x = torch.where(batch.answer_mask, base.tokenizer.mask_id, batch.x0)
            for step in range(rows.slot):
                masked = x == base.tokenizer.mask_id
                logits = base.model(
                    x, torch.ones(len(x)), batch.attention_mask, batch.attention_mask & ~batch.answer_mask,
                    where=torch.ones_like(masked),
                ).float().view(*x.shape, -1)  # fmt: skip
                confidence, token = logits.softmax(-1).max(-1)
                confidence = torch.where(masked, confidence - (token == base.tokenizer.eos_id).float(), -torch.inf)
                count = torch.ceil(masked.sum(1) / (rows.slot - step)).to(torch.int64)
                rank = confidence.argsort(dim=1, descending=True).argsort(1)
                x = torch.where(masked & (rank < count[:, None]), token, x)
            seconds += time.perf_counter() - started
            texts += [base.tokenizer.decode(ids) for ids in x[batch.answer_mask].view(len(x), rows.slot).tolist()]
    return {"seconds": seconds} | ({"peer nll": text_rows_nll(base, texts)} if rows.slot > 1 else {})


def run_eval(task: str, rows_read: int, **sampling: Any) -> dict[str, Any]:
    from tinyld.checkpoint import load_base

    base = load_base(released_base())
    return timed_eval(base, task_rows(base, task), rows_read, **sampling)


MEASUREMENTS: dict[str, Callable[[str], dict[str, Any]]] = {  # each is told the task
    "ceiling": lambda task: ceiling(),
    "pretrain": lambda task: run_pretrain(),
    "pretrain-compiled": lambda task: run_pretrain(compile=True),
    "pretrain-bert": lambda task: run_pretrain_bert(),
    "fast": lambda task: run_method(task, "trajectory-lora", recipe="fast"),
    "best": lambda task: run_method(task, "trajectory-lora", recipe="best"),
    "weight-lora": lambda task: run_method(task, "weight-lora", rank=8),
    "adapters": lambda task: run_method(task, "adapters"),
    "bitfit": lambda task: run_method(task, "bitfit"),
    "full": lambda task: run_method(task, "full"),
    "peft-lora": lambda task: run_bert(task, "lora"),
    "bert-full": lambda task: run_bert(task, "all"),
    "bert-bitfit": lambda task: run_bert(task, "biases"),
    "eval": lambda task: run_eval(task, ROWS),
    "eval-plain": lambda task: run_plain_eval(task, ROWS),
    "write": lambda task: run_eval("write", 128, sampler="threshold"),
    "write-plain": lambda task: run_plain_eval("write", 128),
    "compose-4": lambda task: run_compose(task, 4),
    "compose-1": lambda task: run_compose(task, 1),
}

"""What adapting a public model takes: peak memory, seconds a step and bytes stored by every method, beside PEFT's LoRA.

    python data/results/foreign.py                  # Qwen3-0.6B's shape, random weights, in a temporary folder
    python data/results/foreign.py --shape tiny     # a try of the same
    python data/results/foreign.py --folder PATH --device cuda --dtype int8

Every row is a process of its own, so that its peak is its own. `fast` is trajectory LoRA's recipe on kept states: the
seconds that keeping them took are a column. Rows are random tokens: nothing is learned here, only paid for.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "qwen3-0.6b": dict(vocab_size=151_936, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16,
                       num_key_value_heads=8, head_dim=128, intermediate_size=3072),
    "tiny": dict(vocab_size=1_000, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=32, intermediate_size=160),
}  # fmt: skip
RUNS = ("fast", "best", "weight-lora", "adapters", "bitfit", "full", "peft-lora")
SHARD = 300 * 2**20  # bytes


def write_model(folder: Path, shape: dict[str, int]) -> None:
    """A folder of family a2d-qwen3 with random bf16 weights in shards, and a tokenizer that fills the vocabulary."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    d, f, width = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * width, shape["num_key_value_heads"] * width
    block = {"self_attn.q_proj": (queries, d), "self_attn.k_proj": (keys, d), "self_attn.v_proj": (keys, d),
             "self_attn.o_proj": (d, queries), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
             "self_attn.q_norm": (width,), "self_attn.k_norm": (width,), "input_layernorm": (d,),
             "post_attention_layernorm": (d,)}  # fmt: skip
    sizes = {"model.embed_tokens.weight": (shape["vocab_size"], d), "model.norm.weight": (d,)}
    for i in range(shape["num_hidden_layers"]):
        sizes |= {f"model.layers.{i}.{name}.weight": size for name, size in block.items()}
    torch.manual_seed(0)
    shard: dict[str, Any] = {}
    index: dict[str, str] = {}
    for name, size in sizes.items():
        file = f"model-{1 + len(set(index.values())) - bool(shard):05d}.safetensors"
        shard[name] = (torch.randn(size) * 0.02 if len(size) == 2 else torch.ones(size)).bfloat16()
        index[name] = file
        if sum(2 * t.numel() for t in shard.values()) >= SHARD or name == list(sizes)[-1]:
            save_file(shard, folder / file, {"format": "pt"})
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {"model_type": "a2d-qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
              "hidden_act": "silu", "attention_bias": False, "max_position_embeddings": 40_960}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | shape))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(f"piece{i}" for i in range(shape["vocab_size"] - 2 - len(letters)))]
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>", "<|mask|>"])
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def peak(device: str) -> int:
    """Bytes: of the GPU where there is one, else the most that this process has had."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def batches(steps: int, rows: int, length: int, vocab: int, mask_id: int, device: str) -> list[Any]:
    """(noised ids, ids, answer mask) of `steps` batches with three-token answers at the end of each row."""
    import torch

    generator, made = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        x0 = torch.randint(0, vocab, (rows, length), generator=generator)
        answer = torch.zeros_like(x0, dtype=torch.bool)
        answer[:, -4:-1] = True
        made.append(tuple(t.to(device) for t in (x0.masked_fill(answer, mask_id), x0, answer)))
    return made


def run_ours(name: str, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from tinyld.foreign import load_foreign
    from tinyld.methods import METHODS, make_config

    started = time.perf_counter()
    base = load_foreign(Path(args.folder), args.device, "fp32" if name == "full" else args.dtype)
    model, config = base.model, base.model.config
    read = time.perf_counter() - started
    method, options = ("trajectory-lora", {"recipe": name}) if name in ("fast", "best") else (name, {})
    attached = METHODS[method](make_config(method, options, config), config)
    attached.attach(model, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(attached.own.values(), lr=1e-3)
    data = batches(args.steps, args.rows, args.length, base.tokenizer.vocab_size, base.tokenizer.mask_id, args.device)
    low, kept = torch.autocast(args.device, torch.bfloat16), []
    started = time.perf_counter()
    if attached.first_depth == config.num_layers:  # nothing of the base is in the gradient: its states are kept
        with torch.no_grad(), low:
            for xt, _, _ in data:
                history: list[Any] = []
                h = model.run_blocks(model.embed(xt), None, 0, config.num_layers, history=history)
                kept.append(torch.stack([*history, h] if attached.reads_depths else [h], 2).bfloat16().cpu())
    keeping, times = time.perf_counter() - started, []
    for step, (xt, x0, answer) in enumerate(data):
        started = time.perf_counter()
        cached = kept[step].to(args.device).float() if kept else None
        with low:
            h = model.states(xt, answer.sum(1) / 3, None, ~answer, cached, answer)
            loss = model.nll(h, x0[answer]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        times.append(time.perf_counter() - started)
    stored = sum(p.numel() * p.element_size() for p in attached.own.values())
    return {"read": read, "keeping": keeping, "seconds": sorted(times)[len(times) // 2], "stored": stored}


def run_peft(args: argparse.Namespace) -> dict[str, Any]:
    """The same steps by transformers and PEFT: a LoRA of rank 8 on every matrix, base in bf16, full attention."""
    import torch
    import torch.nn.functional as F
    import transformers
    from peft import LoraConfig, get_peft_model

    started, folder = time.perf_counter(), Path(args.folder)
    raw = json.loads((folder / "config.json").read_text())
    kind = {"a2d-qwen3": "qwen3", "a2d-qwen2": "qwen2", "a2d-llama": "llama", "Dream": "qwen2"}.get(raw["model_type"])
    if kind is None:
        return {"skipped": f"transformers has no class for {raw['model_type']}"}
    config = transformers.AutoConfig.for_model(kind, **{k: v for k, v in raw.items() if k != "model_type"})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.bfloat16)
    read = time.perf_counter() - started
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets)).to(args.device)
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer, times = torch.optim.AdamW(own, lr=1e-3), []
    full = torch.ones(args.rows, 1, args.length, args.length, dtype=torch.bool, device=args.device)
    for xt, x0, answer in batches(args.steps, args.rows, args.length, raw["vocab_size"] - 2, 0, args.device):
        started = time.perf_counter()
        with torch.autocast(args.device, torch.bfloat16):
            loss = F.cross_entropy(model(input_ids=xt, attention_mask=full).logits[answer].float(), x0[answer])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        times.append(time.perf_counter() - started)
    stored = sum(p.numel() * p.element_size() for p in own)
    return {"read": read, "keeping": 0.0, "seconds": sorted(times)[len(times) // 2], "stored": stored}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="a real checkpoint; without it one of --shape is made")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "int8"), default="bf16", help="the frozen base's")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--runs", nargs="*", default=RUNS, help=f"of {', '.join(RUNS)}")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the process of one row
    args = parser.parse_args()
    if args.one:
        found = run_peft(args) if args.one == "peft-lora" else run_ours(args.one, args)
        print(json.dumps(found | {"peak": peak(args.device)}))
        return
    with tempfile.TemporaryDirectory() as made:
        if args.folder is None:
            args.folder = made
            write_model(Path(made), SHAPES[args.shape])
        print(f"{args.folder if args.folder != made else args.shape}, base {args.dtype}, {args.device}, "
              f"{args.steps} steps of {args.rows} rows of {args.length} tokens\n")  # fmt: skip
        print("| run | peak, GiB | seconds a step | keeping states, s | reading, s | stored, MB |")
        print("|---|---|---|---|---|---|")
        for name in args.runs:
            keys = ("folder", "device", "dtype", "steps", "rows", "length")
            options = [f"--{key}={getattr(args, key)}" for key in keys]
            done = subprocess.run([sys.executable, __file__, *options, "--one", name], capture_output=True, text=True)
            try:
                row = json.loads(done.stdout.strip().splitlines()[-1])
                print(f"| {name} | {row['peak'] / 2**30:.2f} | {row['seconds']:.3f} | {row['keeping']:.1f} | "
                      f"{row['read']:.1f} | {row['stored'] / 1e6:.2f} |", flush=True)  # fmt: skip
            except (IndexError, KeyError, ValueError):
                said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
                print(f"| {name} | {said[-1][:150]} | | | | |", flush=True)


if __name__ == "__main__":
    main()

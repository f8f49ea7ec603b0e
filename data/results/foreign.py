"""What adapting a public model takes: peak memory, seconds a step and bytes stored by every method, beside PEFT's LoRA.

    python data/results/foreign.py                  # Qwen3-0.6B's shape, random weights, in a temporary folder
    python data/results/foreign.py --shape tiny     # a try of the same
    python data/results/foreign.py --folder PATH --device cuda --dtype int8
    python data/results/foreign.py --estimate --csv data/results/foreign.csv     # LLaDA-8B, by tinyld's arithmetic

Every row is a process of its own, so that its peak is its own. `fast` is trajectory LoRA's recipe on kept states: the
seconds that keeping them took are a column. Rows are random tokens: nothing is learned here, only paid for.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = {
    "qwen3-0.6b": dict(vocab_size=151_936, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16,
                       num_key_value_heads=8, head_dim=128, intermediate_size=3072),
    "tiny": dict(vocab_size=1_000, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=32, intermediate_size=160),
}  # fmt: skip
RUNS = ("fast", "fast-unkept", "best", "weight-lora", "adapters", "bitfit", "full", "peft-lora")
SHARD = 300 * 2**20  # bytes
EPOCHS, ROWS = 3, 500  # of the whole run that steps are scaled to
LLADA = dict(vocab_size=126_464, d_model=4096, num_heads=32, num_layers=32, d_ff=12_288, norm="rms", activation="silu",
             gated=True, qkv_bias=False, out_bias=False, mlp_bias=False, head_bias=False, tied=False)  # fmt: skip
COLUMNS = ("model", "run", "base", "rows", "length", "steps", "device", "read_seconds", "read_peak", "base_bytes",
           "peak", "step_seconds", "keep_seconds_a_row", "keep_bytes_a_row", "predict_seconds_a_row", "stored_bytes",
           "whole_seconds", "whole_gb")  # fmt: skip


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


def clock(device: str) -> float:
    """Seconds: of the processor, so that what runs beside this counts little; on a GPU of the wall clock."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def batches(args: argparse.Namespace, vocab: int, mask_id: int) -> list[Any]:
    """(noised ids, ids, answer mask) of --steps batches of random tokens, each row with an answer of one token."""
    import torch

    generator, made = torch.Generator().manual_seed(0), []
    for _ in range(args.steps):
        x0 = torch.randint(0, vocab, (args.rows, args.length), generator=generator)
        answer = torch.zeros_like(x0, dtype=torch.bool)
        answer[:, -2] = True
        made.append(tuple(t.to(args.device) for t in (x0.masked_fill(answer, mask_id), x0, answer)))
    return made


def timed_steps(args: argparse.Namespace, data: list[Any], own: list[Any], loss_of: Callable[..., Any]) -> float:
    """Seconds of the middle one of an update on every batch. loss_of: (step, ids, true ids, answers) -> nats."""
    import torch

    optimizer, times = torch.optim.AdamW(own, lr=1e-3), []
    for step, batch in enumerate(data):
        started = clock(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            loss = loss_of(step, *batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(clock(args.device) - started)
    return sorted(times)[len(times) // 2]


def run_ours(name: str, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from tinyld.foreign import load_foreign
    from tinyld.methods import METHODS, make_config
    from tinyld.train import kept_depths, pack, unpack

    started = clock(args.device)
    base = load_foreign(Path(args.folder), args.device, "fp32" if name == "full" else args.dtype)
    model, config, mask_id = base.model, base.model.config, base.tokenizer.mask_id
    found = {"read_seconds": clock(args.device) - started, "read_peak": peak(args.device), "base_bytes": base.bytes}
    recipe = name.removesuffix("-unkept")
    method, options = ("trajectory-lora", {"recipe": recipe}) if recipe in ("fast", "best") else (name, {})
    attached = METHODS[method](make_config(method, options, config), model, torch.Generator().manual_seed(0))
    data, kept = batches(args, base.tokenizer.vocab_size, mask_id), []
    low, depths = torch.autocast(args.device, torch.bfloat16), kept_depths(model)
    started = clock(args.device)
    if name == "fast":  # nothing of the base is in the gradient: its states are kept, as training does
        with torch.no_grad(), low:
            for xt, _, _ in data:
                kept.append([pack(state) for state in model.frozen(xt, None, *depths)[0]])
        found["keep_seconds_a_row"] = (clock(args.device) - started) / (args.rows * args.steps)
        a_row = pack(torch.empty((depths[1] - depths[0] + 1) * args.length, config.d_model))
        found["keep_bytes_a_row"] = sum(part.nbytes for part in a_row)

    def loss_of(step: int, xt: Any, x0: Any, answer: Any) -> Any:
        cached = torch.stack([unpack(*(x.to(args.device) for x in each)) for each in kept[step]], 2) if kept else None
        return model.nll(model.states(xt, answer.sum(1).float(), None, ~answer, cached, answer), x0[answer]).mean()

    found["step_seconds"] = timed_steps(args, data, list(attached.own.values()), loss_of)
    found["peak"] = peak(args.device)
    xt, _, answer = data[0]
    started = clock(args.device)
    with torch.no_grad(), low:
        model(xt, answer.sum(1).float(), None, ~answer, where=answer).argmax(-1).tolist()
    found["predict_seconds_a_row"] = (clock(args.device) - started) / args.rows
    return found | {"stored_bytes": sum(p.numel() * p.element_size() for p in attached.own.values())}


def run_peft(args: argparse.Namespace) -> dict[str, Any]:
    """The same steps by transformers and PEFT: a LoRA of rank 8 on every matrix, base in bf16, full attention."""
    import torch
    import torch.nn.functional as F
    import transformers
    from peft import LoraConfig, get_peft_model

    started, folder = clock(args.device), Path(args.folder)
    raw = json.loads((folder / "config.json").read_text())
    kind = {"a2d-qwen3": "qwen3", "a2d-qwen2": "qwen2", "a2d-llama": "llama", "Dream": "qwen2"}.get(raw["model_type"])
    if kind is None:
        raise SystemExit(f"transformers has no class for {raw['model_type']}")
    config = transformers.AutoConfig.for_model(kind, **{k: v for k, v in raw.items() if k != "model_type"})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.bfloat16)
    found = {"read_seconds": clock(args.device) - started, "read_peak": peak(args.device)}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets)).to(args.device)
    own = [p for p in model.parameters() if p.requires_grad]
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)  # in memory as it is in a run, and in ours
    full = torch.ones(args.rows, 1, args.length, args.length, dtype=torch.bool, device=args.device)

    def loss_of(step: int, xt: Any, x0: Any, answer: Any) -> Any:
        return F.cross_entropy(model(input_ids=xt, attention_mask=full).logits[answer].float(), x0[answer])

    found["step_seconds"] = timed_steps(args, batches(args, tokenizer.vocab_size, 0), own, loss_of)
    return found | {"peak": peak(args.device), "stored_bytes": sum(p.numel() * p.element_size() for p in own)}


def whole_run(row: dict[str, Any]) -> dict[str, Any]:
    """What three epochs of 500 rows take by a measured row: seconds, and gigabytes with the states of all rows kept."""
    seconds = EPOCHS * ROWS / float(row["rows"]) * float(row["step_seconds"])
    kept = float(row.get("keep_bytes_a_row") or 0)
    more = kept * (ROWS - float(row["rows"]) * float(row["steps"]))
    seconds += ROWS * float(row.get("keep_seconds_a_row") or 0)
    return {"whole_seconds": round(seconds), "whole_gb": round((float(row["peak"]) + max(more, 0)) / 1e9, 2)}


def estimated(row: dict[str, Any]) -> int | None:
    """The bytes that tinyld's arithmetic gives a measured row, with the states that it kept; None for peft."""
    from tinyld.config import ModelConfig
    from tinyld.costs import costs

    names = ("vocab_size", "d_model", "num_layers", "num_heads", "kv_heads", "head_width", "d_ff")
    shape = dict(zip(names, SHAPES[row["model"]].values(), strict=True))
    config = ModelConfig(**LLADA | shape | {"tied": True, "head_norms": True})
    found = {f["method"].split()[-1]: f for f in costs(config, int(row["rows"]), int(row["length"]))}
    method = found.get(row["run"].removesuffix("-unkept"))
    kept = float(row["keep_bytes_a_row"] or 0) * int(row["rows"]) * int(row["steps"])
    return None if method is None else method[f"memory_{row['base']}"] + int(kept)


def estimate(rows: int, length: int, measured: Path | None) -> None:
    """Prints tinyld's estimate of memory for LLaDA-8B, and beside what was measured."""
    from tinyld.config import ModelConfig
    from tinyld.costs import costs

    print(f"LLaDA-8B, batches of {rows} rows of {length} tokens\n")
    print("| method | GB, base in bf16 | int8 | stored MB |\n|---|---|---|---|")
    for found in costs(ModelConfig(**LLADA), rows, length):
        bf16, int8 = (found[f"memory_{t}"] or found["memory_fp32"] for t in ("bf16", "int8"))
        print(f"| {found['method']} | {bf16 / 1e9:.1f} | {int8 / 1e9:.1f} | {found['stored_bytes'] / 1e6:.1f} |")
    print("\n| measured | base | rows x tokens | GB | estimated |\n|---|---|---|---|---|")
    for row in csv.DictReader(measured.read_text().splitlines()) if measured else ():
        wanted, size = estimated(row), f"{row['rows']} x {row['length']}"
        if wanted is not None:
            print(f"| {row['run']} | {row['base']} | {size} | {int(row['peak']) / 1e9:.2f} | {wanted / 1e9:.2f} |")


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
    parser.add_argument("--csv", type=Path, help="a file that the rows are added to")
    parser.add_argument("--write", type=Path, help="only make the folder, here")
    parser.add_argument("--estimate", action="store_true", help="only say what LLaDA-8B takes, and --csv's models")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the process of one row
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_peft(args) if args.one == "peft-lora" else run_ours(args.one, args)))
        return
    if args.estimate:
        return estimate(args.rows, args.length, args.csv)
    if args.write:
        args.write.mkdir(parents=True)
        return write_model(args.write, SHAPES[args.shape])
    with tempfile.TemporaryDirectory() as made:
        if args.folder is None:
            args.folder = made
            write_model(Path(made), SHAPES[args.shape])
        shown = ("run", "base", "peak", "step_seconds", "predict_seconds_a_row", "stored_bytes", "whole_gb",
                 "whole_seconds")  # fmt: skip
        print("|".join(("", *shown, "")) + "\n" + "|---" * len(shown) + "|")
        for name in args.runs:
            keys = ("folder", "device", "dtype", "steps", "rows", "length")
            options = [f"--{key}={getattr(args, key)}" for key in keys]
            done = subprocess.run([sys.executable, __file__, *options, "--one", name], capture_output=True, text=True)
            try:
                found = json.loads(done.stdout.strip().splitlines()[-1])
            except (IndexError, ValueError):
                said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
                print(f"|{name}|{said[-1][:150]}" + "|" * (len(shown) - 1), flush=True)
                continue
            base = {"full": "fp32", "peft-lora": "bf16"}.get(name, args.dtype)
            row = {"model": args.shape if args.folder == made else Path(args.folder).name, "run": name, "base": base,
                   "rows": args.rows, "length": args.length, "steps": args.steps, "device": args.device}  # fmt: skip
            row |= {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
            row |= whole_run(row)
            print("|".join(("", *(str(row.get(key, "")) for key in shown), "")), flush=True)
            if args.csv:
                is_new = not args.csv.exists()
                with args.csv.open("a", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                    if is_new:
                        writer.writeheader()
                    writer.writerow(row)


if __name__ == "__main__":
    main()

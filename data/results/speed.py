"""Our commands against the same work in a plain loop with transformers or peft: python data/results/speed.py --csv FILE

Each side is a process of its own (its peak memory is then its own), in turns; a ratio is the median over the turns.
Needs the extra `interop`, and $TINYLD_DATA or a network for a task that is not bundled.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTH, BATCH, STEPS, WARM_UP = 256, 32, 12, 6  # of pretraining; steps of the warm-up are not timed
ROWS, EPOCHS, DECODED = 2_000, 3, 1_024
METHODS = {"fast": ["--method", "trajectory-lora", "--recipe", "fast"]}
METHODS |= {
    "best": ["--method", "trajectory-lora", "--recipe", "best"],
    "lora": ["--method", "weight-lora", "--set", "rank=8"],
}
METHODS |= {name: ["--method", name] for name in ("full", "bitfit", "adapters")}
COMPARISONS = {  # what -> ours, theirs
    "pretraining, against BertForMaskedLM": ("pretrain", "bert-pretrain"),
    "trajectory-lora fast, 3 epochs, against peft LoRA r=8": ("fast", "bert-lora"),
    "trajectory-lora best, the same": ("best", "bert-lora"),
    "weight-lora r=8, the same": ("lora", "bert-lora"),
    "full, against BertForMaskedLM": ("full", "bert-full"),
    "bitfit, against BertForMaskedLM, biases only": ("bitfit", "bert-bitfit"),
    "weight-lora r=8, against our own full": ("lora", "full"),
    "adapters, against our own full": ("adapters", "full"),
    "eval, one-token answers, against a plain loop": ("eval", "plain-eval"),
}


def tinyld(*words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "tinyld", *words, "--json", "--quiet"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"tinyld {' '.join(words)} failed: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    return found[0] if isinstance(found, list) else found


def ours(name: str, task: str, folder: Path) -> dict[str, float]:
    """Seconds and peak MB of one of our commands."""
    if name.startswith("pretrain"):
        text = Path(__file__).parents[1] / "corpus.txt.gz"
        seconds = []
        for steps in (WARM_UP, WARM_UP + STEPS):  # start and tokenizer are in both
            words = (
                "--data",
                str(text),
                "--steps",
                str(steps),
                "--batch-size",
                str(BATCH),
                "--max-length",
                str(LENGTH),
            )
            found = tinyld("pretrain", *words, "--out", str(folder / f"{name}{steps}"))
            seconds.append(found["seconds"])
        return {"seconds": seconds[1] - seconds[0], "peak_mb": found["peak_memory_mb"]}
    if name == "eval":
        run = folder / "to-eval"
        words = ("--task", task, "--base", "small", "--limit", "64", "--epochs", "1", "--method", "bitfit")
        tinyld("finetune", *words, "--out", str(run))
        found = tinyld("eval", str(run), "--split", "train", "--limit", str(DECODED))
        return {"seconds": found["n"] / found["rows_per_second"], "peak_mb": 0.0}
    words = (
        "--task",
        task,
        "--base",
        "small",
        "--limit",
        str(ROWS),
        "--epochs",
        str(EPOCHS),
        "--batch-size",
        str(BATCH),
    )
    found = tinyld("finetune", *words, *METHODS[name], "--set", "eval_every=1000000", "--out", str(folder / name))
    return {"seconds": found["seconds"], "peak_mb": found["peak_memory_mb"]}


def theirs(name: str, task: str) -> None:
    """Measures one of the peers in this process and prints it as JSON."""
    import numpy as np
    import torch

    from tinyld.checkpoint import load_base
    from tinyld.config import PRESETS
    from tinyld.data import TaskRows
    from tinyld.device import autocast
    from tinyld.rows import bundled_data_dir, load_split
    from tinyld.tasks import load_task

    cast = autocast(torch.device("cpu"), "auto")
    base = load_base(bundled_data_dir() / "small")
    rows = TaskRows(load_split(load_task(task), "train", limit=ROWS), load_task(task), base.tokenizer, LENGTH)
    if name == "plain-eval":  # a step a token, the vocabulary at every position, rows as they come
        started = time.perf_counter()
        with torch.no_grad(), cast:
            for chunk in np.array_split(np.arange(min(DECODED, len(rows))), DECODED // 64):
                batch = rows.take(chunk)
                x, prompt = torch.where(batch.answer_mask, base.tokenizer.mask_id, batch.x0), ~batch.answer_mask
                for _ in range(rows.slot):
                    logits = base.model(
                        x, torch.ones(len(x)), batch.attention_mask, batch.attention_mask & prompt
                    ).float()
                    confidence, token = logits.softmax(-1).max(-1)
                    confidence = torch.where(x == base.tokenizer.mask_id, confidence, -1.0)
                    surest = torch.nn.functional.one_hot(confidence.argmax(1), x.shape[1]).bool()
                    x = torch.where(surest & (x == base.tokenizer.mask_id), token, x)
        return report(time.perf_counter() - started)

    from transformers import BertConfig, BertForMaskedLM

    shape = PRESETS["small"]
    model: Any = BertForMaskedLM(BertConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["d_model"], num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"], intermediate_size=shape["d_ff"], max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip
    batches = []
    if name == "bert-pretrain":
        for _ in range(WARM_UP + STEPS):
            x = torch.randint(5, shape["vocab_size"], (BATCH, LENGTH))
            masked = torch.rand(x.shape) < torch.rand(len(x), 1)
            batches.append({"input_ids": torch.where(masked, 3, x), "labels": torch.where(masked, x, -100)})
    else:
        for step in range(EPOCHS * rows.steps_per_epoch(BATCH)):
            batch = rows.batch(step, BATCH, 0)
            labels = torch.where(batch.answer_mask, batch.x0, -100)
            x = torch.where(batch.answer_mask, base.tokenizer.mask_id, batch.x0) % shape["vocab_size"]
            labels = torch.where(labels > 0, labels % shape["vocab_size"], labels)
            batches.append({"input_ids": x, "attention_mask": batch.attention_mask.long(), "labels": labels})
    if name == "bert-lora":
        from peft import LoraConfig, get_peft_model

        targets = r".*encoder\..*\.(query|key|value|dense)"  # our six matrices of a block, not the head's
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    if name == "bert-bitfit":
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name.endswith("bias"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    model.train()
    started = time.perf_counter()
    for step, batch in enumerate(batches):
        if name == "bert-pretrain" and step == WARM_UP:
            started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with cast:
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    report(time.perf_counter() - started)


def report(seconds: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mb": peak}))


def side(name: str, task: str, folder: Path) -> dict[str, float]:
    if not (name.startswith("bert") or name.startswith("plain")):
        return ours(name, task, folder)
    done = subprocess.run([sys.executable, __file__, "--peer", name, "--task", task], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="reviews")
    parser.add_argument("--only", default="", help="comparisons that have this word")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        return theirs(options.peer, options.task)
    rows = []
    for what, (our, peer) in COMPARISONS.items():
        if options.only not in what:
            continue
        found: dict[str, list[dict[str, float]]] = {our: [], peer: []}
        for turn in range(options.turns):
            for name in (our, peer) if turn % 2 == 0 else (peer, our):
                with tempfile.TemporaryDirectory() as folder:
                    found[name].append(side(name, options.task, Path(folder)))
        ratios = sorted(p["seconds"] / o["seconds"] for o, p in zip(found[our], found[peer], strict=True))
        row: dict[str, Any] = {"what": what, "ratio": round(statistics.median(ratios), 2)}
        row |= {"lowest": round(ratios[0], 2), "highest": round(ratios[-1], 2)}
        for label, name in (("our", our), ("peer", peer)):
            row[f"{label}_seconds"] = round(statistics.median(f["seconds"] for f in found[name]), 2)
            row[f"{label}_peak_MB"] = round(max(f["peak_mb"] for f in found[name]))
        rows.append(row | {"task": options.task})
        print(row, flush=True)
        if options.csv is not None:
            from table import write  # which loads torch, so not in the sides, whose memory is measured

            write(options.csv, rows)


if __name__ == "__main__":
    main()

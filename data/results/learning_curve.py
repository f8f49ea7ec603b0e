"""What an hour of pretraining from nothing buys: `tinyld pretrain` beside transformers' BertForMaskedLM with AdamW.

    python data/results/learning_curve.py --data text --valid $TINYLD_DATA/pretrain-valid --minutes 60 --csv FILE

Ours is the preset `small` as it is, for a third of the time. The peer has its sizes, its tokenizer, text and rows of
256 tokens, each masked at a uniform time, plain cross-entropy, and AdamW (betas 0.9 and 0.98, decay 0.01) with 10% of
warm-up and a linear fall; the best of --rates and --batches after --tune minutes, each with such a schedule of its own.
Both are measured by the same bound on the same 64 held-out rows. Needs the extra `interop`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from table import write
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from tinyld.config import PRESETS
from tinyld.corpus import tokenize
from tinyld.data import TextRows
from tinyld.device import autocast
from tinyld.evaluate import text_nll
from tinyld.pretrain import HELD_OUT_ROWS
from tinyld.tokenizer import Tokenizer, find_text_files, read_lines

LENGTH, POINTS, WARMUP = 256, 12, 0.1  # the last two: of the peer's curve, and schedule
CPU = torch.device("cpu")


class Peer:
    """BertForMaskedLM, as our bound asks a denoiser."""

    device = CPU

    def __init__(self, vocab_size: int):
        torch.manual_seed(0)
        shape = PRESETS["small"]
        self.model: Any = BertForMaskedLM(BertConfig(
            vocab_size=vocab_size, hidden_size=shape["d_model"], num_hidden_layers=shape["num_layers"],
            num_attention_heads=shape["num_heads"], intermediate_size=shape["d_ff"], max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ))  # fmt: skip

    def one_pass(self, xt: Tensor, *told: Any) -> tuple[Tensor, None]:
        return self.model.bert(input_ids=xt).last_hidden_state[told[-1]], None

    def nll(self, h: Tensor, x0: Tensor) -> Tensor:
        return F.cross_entropy(self.model.cls(h).float(), x0, reduction="none")

    def rows_at_once(self, length: int, most: int, asked: int = 0) -> int:
        return most


def train_peer(
    rows: TextRows, held_out: TextRows, tokenizer: Tokenizer, lr: float, batch: int, minutes: float
) -> list[dict]:  # fmt: skip
    """Its curve: a record at each of the points, of seconds of training."""
    peer, cast = Peer(tokenizer.vocab_size), autocast(CPU, "auto")
    optimizer = torch.optim.AdamW(peer.model.parameters(), lr, (0.9, 0.98), weight_decay=0.01, fused=True)
    generator, curve, seconds, step = torch.Generator().manual_seed(0), list[dict](), 0.0, 0
    while True:
        progress = seconds / (60 * minutes)
        if progress >= (1 + len(curve)) / POINTS:
            peer.model.eval()
            with cast:
                bound = text_nll(peer, held_out, tokenizer.mask_id, limit=HELD_OUT_ROWS)  # type: ignore[arg-type]
            peer.model.train()
            tokens = step * batch * LENGTH
            curve.append(record("BertForMaskedLM", lr, batch, minutes, seconds, tokens, bound.mean, bound.stderr))
            print(curve[-1], file=sys.stderr, flush=True)
        if progress >= 1:
            return curve
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(max(progress, 1e-3) / WARMUP, (1 - progress) / (1 - WARMUP))
        x0 = rows.batch(step, batch, 0).x0
        masked = torch.rand(x0.shape, generator=generator) < torch.rand(len(x0), 1, generator=generator)
        masked[:, 0], masked[:, 1] = False, masked[:, 1] | ~masked[:, 1:].any(1)
        optimizer.zero_grad(set_to_none=True)
        with cast:
            h, _ = peer.one_pass(torch.where(masked, tokenizer.mask_id, x0), masked)
            loss = peer.nll(h, x0[masked]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.model.parameters(), 1.0)
        optimizer.step()
        seconds, step = seconds + time.perf_counter() - started, step + 1


def record(
    side: str, lr: float, batch: int, minutes: float, seconds: float, tokens: int, nats: float, stderr: float
) -> dict:  # fmt: skip
    own = {"side": side, "lr": lr, "batch": batch, "minutes": minutes, "seconds": round(seconds), "tokens": tokens}
    return own | {"nats": round(nats, 4), "stderr": round(stderr, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--tune", type=float, default=6)
    parser.add_argument("--rates", default="0.0003,0.001")
    parser.add_argument("--batches", default="8,32", help="rows of the peer's updates")
    parser.add_argument("--csv", type=Path, required=True)
    options = parser.parse_args()
    ours = round(options.minutes / 3, 2)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "base"
        words = ["--preset", "small", "--data", options.data, "--valid", options.valid, "--minutes", ours]
        words += ["--set", "eval_every=200", "--out", run]
        subprocess.run([sys.executable, "-m", "tinyld", "pretrain", *map(str, words)], check=True)
        log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        train = json.loads((run / "config.json").read_text())["train"]
        tokenizer = Tokenizer.parse((run / "tokenizer.json").read_bytes(), run / "tokenizer.json")
    scored = [line for line in log if line["step"] and "nll_bound" in line]
    found = [
        record(
            "tinyld pretrain",
            train["lr"],
            train["batch_size"],
            ours,
            line["seconds"],
            2 * line["tokens"],
            line["nll_bound"],
            line["nll_stderr"],
        )
        for line in scored
    ]
    text, held_out = (
        tokenize(read_lines(find_text_files([path])), tokenizer) for path in (options.data, options.valid)
    )
    rows, valid = (TextRows(part.stream, LENGTH, tokenizer.bos_id) for part in (text, held_out))
    peers = [(float(lr), int(batch)) for lr in options.rates.split(",") for batch in options.batches.split(",")]
    tuned = [train_peer(rows, valid, tokenizer, *peer, options.tune)[-1] for peer in peers]
    best = min(tuned, key=lambda row: row["nats"])
    found += tuned + train_peer(rows, valid, tokenizer, best["lr"], best["batch"], options.minutes)
    write(options.csv, found)


if __name__ == "__main__":
    main()

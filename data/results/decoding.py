"""Samplers side by side: what is written, in how many passes, how fast.

    python data/results/decoding.py FILE.csv RUN dev 96 low_confidence threshold threshold,lengths=3 kept,every=8

A sampler is its name and settings of `SampleConfig`, or one of these, which are here alone:
- `llada`: LLaDA's loop as it is published (arXiv 2502.09992): no length is chosen, all texts of a batch fill their
  slots together, a token a pass, and every pass has the logits of all positions; `llada,masked=1` has those at masks;
- `mask_predict,tokens=5`: all tokens are written in every pass, and the least sure masked again, fewer each time, in
  length / tokens passes (arXiv 1904.09324);
- `longer`: `threshold`, and what lacks a word of its prompt that texts say is written again in greater lengths, as it
  is by `predict` and `eval`; all others write a text once;
- `kept,every=8`: `threshold` on states of the prompt that are computed anew in every eighth pass alone (0: in the
  first), which is what keeping its keys and values comes to.
Writes a table, in which `fewer passes` and `BLEU gained` are beside the first sampler, and prints it. Times are of this
process on its processors, whatever else they do.
"""

import csv
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from table import markdown  # of this folder
from torch import Tensor

from tinyld import evaluate as evaluation
from tinyld.config import SampleConfig
from tinyld.predict import load
from tinyld.sampler import LENGTHS, choose_ends, decode, spread
from tinyld.scores import measure, rows_for
from tinyld.workspace import keep_freed_memory

SCORES = {"BLEU": "bleu", "chrF": "chrf", "exact": "exact_match", "names": "names_held", "loops": "repeated_sentence"}
COLUMNS = ("sampler", *SCORES, "passes a text", "texts/s", "fewer passes", "BLEU gained")


class KeptPrompt:
    """A denoiser whose states at a prompt's positions, before every block, are of an earlier pass."""

    def __init__(self, denoiser: Any, every: int):
        self.denoiser, self.every, self.passes = denoiser, every, 0
        self.kept: dict[tuple[int, tuple[int, ...]], Tensor] = {}  # (block, the prompt) -> its states

    def __call__(self, x: Tensor, t: Tensor, real: Any, prompt_mask: Tensor, where: Tensor) -> Tensor:
        fresh = self.passes == 0 or (self.every > 0 and self.passes % self.every == 0)
        prompts = [tuple(row[mask].tolist()) for row, mask in zip(x, prompt_mask, strict=True)]

        def hook(block: int) -> Any:
            def before(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
                h = args[0].clone()
                for row, (prompt, mask) in enumerate(zip(prompts, prompt_mask, strict=True)):
                    if fresh:
                        self.kept[block, prompt] = h[row, mask]
                    h[row, mask] = self.kept[block, prompt]
                return (h, *args[1:])

            return before

        hooks = [block.register_forward_pre_hook(hook(i)) for i, block in enumerate(self.denoiser.blocks)]
        logits = self.denoiser(x, t, real, prompt_mask, where=where)
        for each in hooks:
            each.remove()
        self.passes += 1
        return logits


def llada(
    denoiser: Any, x: Tensor, answer_mask: Tensor, attention_mask: Tensor, mask_id: int, forbidden: list[int],
    *others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`tinyld.sampler.decode` by LLaDA's loop; the slots of a batch have one width."""
    x, prompt_mask, rows = torch.where(answer_mask, mask_id, x), attention_mask & ~answer_mask, torch.arange(len(x))
    passes = int(answer_mask.sum(1).max())
    for _ in range(passes):
        masked = answer_mask & (x == mask_id)
        logits = denoiser(x, masked.sum(1) / passes, attention_mask, prompt_mask).float()
        logits[..., forbidden] = -torch.inf
        token = logits.argmax(-1)
        chance = logits.softmax(-1).gather(-1, token[..., None])[..., 0]
        surest = chance.where(masked, -torch.inf).argmax(1)
        x[rows, surest] = token[rows, surest]
    return x, torch.full((len(x),), passes)


def mask_predict(
    denoiser: Any, x: Tensor, answer_mask: Tensor, attention_mask: Tensor, mask_id: int, forbidden: list[int],
    config: SampleConfig, generator: torch.Generator, eos_id: int, *_: Any, tokens: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`tinyld.sampler.decode` by Mask-Predict."""
    masked, inside, real = answer_mask.clone(), answer_mask.clone(), attention_mask.clone()
    confidence, passes = torch.zeros(x.shape), torch.zeros(len(x), dtype=torch.long)
    prompt_mask, step, total = attention_mask & ~answer_mask, 0, inside.sum(1)
    while len(rows := masked.any(1).nonzero()[:, 0]):
        x = torch.where(masked, mask_id, x)
        where, share = masked[rows], masked[rows].sum(1) / inside[rows].sum(1)
        logits = denoiser(x[rows], share, real[rows], prompt_mask[rows], where=where).float()
        logits[:, forbidden] = -torch.inf
        if step == 0:
            ends, _ = choose_ends(spread(logits.softmax(-1)[:, eos_id], where), LENGTHS[0], generator)
            behind = where & (ends.cumsum(1) > 0)
            x, inside, real = torch.where(behind, eos_id, x), inside & ~behind, real & (~behind | ends)
            masked, total = masked & inside, (inside.sum(1) / tokens).ceil().clamp(min=1)
        logits[:, eos_id] = -torch.inf
        best, token = logits.softmax(-1).max(-1)
        whole = torch.zeros_like(masked).index_copy(0, rows, where)
        x = torch.where(masked, spread(token, whole), x)
        confidence = torch.where(masked, spread(best, whole), confidence)
        passes[rows] += 1
        step += 1
        again = (inside.sum(1) * (total - step).clamp(min=0) / total).floor()
        masked = inside & (confidence.masked_fill(~inside, 2.0).argsort(1).argsort(1) < again[:, None])
    return x, passes


def main(file: str, path: str, split: str, limit: str, *samplers: str) -> None:
    keep_freed_memory()
    run = load(Path(path))
    once = replace(run.tasks[0], coverage=None)
    examples = rows_for(run, once, split).examples  # of which so many are taken, spread over all
    examples = [examples[i * len(examples) // int(limit)] for i in range(int(limit))]
    lines: list[tuple[str, ...]] = []
    first: tuple[float, float] | None = None
    for text in samplers:
        name, *settings = text.split(",")
        given = {key: float(value) if "." in value else int(value) for key, value in (s.split("=") for s in settings)}
        rows = run.rows(examples, run.tasks[0] if name == "longer" else once)
        rows.open_ended, evaluation.decode = name != "llada", decode
        if name == "llada" and not given.pop("masked", 0):
            evaluation.decode = llada
        if name == "mask_predict":
            tokens = given.pop("tokens")
            evaluation.decode = lambda *args, tokens=tokens: mask_predict(*args, tokens=tokens)
        elif name == "kept":
            every = given.pop("every")
            evaluation.decode = lambda model, *args, every=every: decode(KeptPrompt(model, every), *args)
        own = {"llada": "low_confidence", "mask_predict": "threshold", "kept": "threshold", "longer": "threshold"}
        started = time.process_time()
        found = measure(run, rows, SampleConfig(own.get(name, name), **given), draws=1, quiet=True)
        rate = found.n / (time.process_time() - started)
        scores, passes = [float(found.scores.get(key, "nan")) for key in SCORES.values()], found.passes_per_row
        first = first or (passes, scores[0])
        lines.append((text, *(f"{v:.2f}" for v in (*scores, passes, rate, first[0] / passes, scores[0] - first[1]))))
        print(*lines[-1], sep="\t", file=sys.stderr, flush=True)
    print(markdown(COLUMNS, lines))
    with open(file, "w", newline="", encoding="utf-8") as out:
        csv.writer(out, lineterminator="\n").writerows([COLUMNS, *lines])


if __name__ == "__main__":
    main(*sys.argv[1:])

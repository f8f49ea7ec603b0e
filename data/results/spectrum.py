"""Is there more to push where there is more noise? The directions of a task's gradient, and of what a trained adapter
pushes, by band of noise.

    python data/results/spectrum.py FILE.csv RUN [--task webnlg] [--rows 300]

RUN is a trajectory LoRA of the task, whose training rows (of $TINYLD_DATA) are masked three times, at times of each
band. "gradient" is that of the training loss (nats of a row's masked tokens, over t) by the states of RUN's base,
without RUN's pushes, at its sites: what a push of any form would follow first. "push" is what RUN adds there. Of their
second moments over positions (on the final state the masked ones alone): `directions`, the effective rank (exp of the
entropy of the eigenvalues' shares, Roy & Vetterli 2007); `of_64`, the share of the whole that lies in their 64 largest
directions; `of_64_of_high`, in those of the highest noise; `size`, the root of the mean square.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from table import tables, write
from torch import Tensor, nn

import tinyld
from tinyld.data import some_of, torch_seeded
from tinyld.diffusion import Noised, mask_counted, noised_at
from tinyld.methods.paper import BAND_EDGES, NUM_BANDS
from tinyld.rows import load_split, to_learn
from tinyld.tables import print_table

BANDS = "high", "middle", "low"
KEPT = 64


class Probe(nn.Module):
    """Hangs on `Denoiser.push` and adds zeros, whose gradients are those of the states."""

    answer_only = reads_others = False
    pointer = None

    def __init__(self, first_depth: int):
        super().__init__()
        self.first_depth, self.added = first_depth, dict[int, Tensor]()

    def start(self, *_: Any) -> Any:
        def push_at(depth: int, h: Tensor, _: Any = None) -> Tensor:
            self.added[depth] = torch.zeros_like(h, requires_grad=True)
            return self.added[depth]

        return push_at


def described(total: Tensor, count: int, high: Tensor) -> dict[str, float]:
    """Of a second moment (D, D) over `count` states, and the directions (D, KEPT) of the highest noise."""
    shares = torch.linalg.eigvalsh(total).clamp(min=0)
    shares = shares / shares.sum()
    entropy = -(shares * shares.clamp(min=1e-30).log()).sum()
    inside = torch.einsum("dk,de,ek->", high, total, high) / total.trace()
    found = {"size": (total.trace() / count / len(total)).sqrt(), "directions": entropy.exp()}
    found |= {"of_64": shares.sort(descending=True).values[:KEPT].sum(), "of_64_of_high": inside}
    return {name: float(f"{float(value):.4g}") for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--task", default="webnlg")
    parser.add_argument("--rows", type=int, default=300)
    options = parser.parse_args()
    run = tinyld.load(options.run)
    task, model, mask_id = run.tasks[0], run.base.model, run.base.tokenizer.mask_id
    examples = to_learn(task, load_split(task, "train"))
    rows = run.rows([examples[i] for i in some_of(len(examples), options.rows)], task)
    model.requires_grad_(False)
    probe, pushed = Probe(model.push.first_depth), dict[int, Tensor]()
    for depth, site in enumerate(model.push.sites, probe.first_depth):
        site.register_forward_hook(lambda _, given, out, depth=depth: pushed.update({depth: out}))
    moments: dict[tuple[str, int, int], list[Any]] = defaultdict(lambda: [0.0, 0])

    def add(what: str, band: int, states: dict[int, Tensor], noised: Noised) -> None:
        real = torch.ones_like(noised.xt, dtype=torch.bool) if noised.attention_mask is None else noised.attention_mask
        for depth, each in states.items():
            found = each[noised.is_masked if depth == model.config.num_layers else real].detach().double()
            moments[what, depth, band][0] += found.T @ found
            moments[what, depth, band][1] += len(found)

    generator = torch_seeded(0, 0)
    for at in torch.arange(len(rows)).split(8):
        batch = rows.take(at.numpy())
        tail = batch.tail_mask if batch.tail_mask is not None else torch.zeros_like(batch.answer_mask)
        text, seen = batch.answer_mask & ~tail, batch.attention_mask & ~tail | (tail & ~tail.roll(1, 1))
        prompt = batch.attention_mask & ~batch.answer_mask
        for band in range(NUM_BANDS):
            t = BAND_EDGES[band + 1] + torch.rand(len(at), generator=generator) / NUM_BANDS
            is_masked, share = mask_counted(t, text, generator)
            noised = noised_at(batch.x0, is_masked, share, seen, prompt, mask_id)
            told = noised.xt, noised.t, noised.attention_mask, noised.prompt_mask
            model.push = probe
            nll = model.nll(model.states(*told)[is_masked], noised.x0[is_masked])
            (nll / noised.t[is_masked.nonzero()[:, 0]]).sum().backward()
            add("gradient", band, {depth: added.grad for depth, added in probe.added.items()}, noised)
            model.push = run.push
            with torch.no_grad():
                model.states(*told)
            add("push", band, pushed, noised)
    lines = []
    for (what, depth, band), (total, count) in sorted(moments.items()):
        high = torch.linalg.eigh(moments[what, depth, 0][0]).eigenvectors[:, -KEPT:]
        where = {"task": task.name, "of": what, "before_block": depth + 1, "noise": BANDS[band], "positions": count}
        lines.append(where | described(total, count, high))
    write(options.csv, lines)
    for title, columns, cells in tables(options.csv):
        print_table(title, columns, cells)


if __name__ == "__main__":
    main()

"""Two adapters in one run of denoising: one knows what to say, the other how. Which should push at which noise level?

    python data/results/composing_writing.py [--rows 400] [--tested 200] [--seed 0] [--csv FILE]

*content* answers a question on the sentence before it. *style* repeats a statement that is its prompt, of other words,
as "well , ... , i think ." Wanted is the answer in that style, of which neither adapter has seen an example. At noise
level t (the share of the text that is masked) the pushes are weighed by a coefficient each. A pass writes one token;
the first, at t = 1, chooses the length. Rows are made up, from a seed; test rows are no training rows.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from simple_writing import JOBS, NAMES, PLACES, pairs, question, tell
from torch import Tensor, nn

import tinyld
from tinyld.config import SampleConfig
from tinyld.writing import spelling

Weights = Callable[[Tensor], tuple[Tensor, Tensor]]  # t (B,) -> the coefficients of content and of style, (B,) each
START, END = "well , ", " , i think ."
VERBS, THINGS = "likes sells paints needs finds wants", "apples boats cakes drums eggs flowers gloves hats"


def in_style(sentence: str) -> str:
    return START + sentence.removesuffix(" .") + END


def statement(rng: random.Random) -> tuple[str, str]:
    name, verb, thing = (rng.choice(words.split()) for words in (NAMES, VERBS, THINGS))
    said = rng.choice(
        [f"{name} {verb} {thing} .", f"{name} {verb} the {rng.choice(JOBS.split())} in {PLACES.split()[0]} ."]
    )
    return said, in_style(said)


def ones(t: Tensor) -> Tensor:
    return torch.ones_like(t)


SCHEDULES: dict[str, Weights] = {
    "content alone": lambda t: (ones(t), 0 * t),
    "style alone": lambda t: (0 * t, ones(t)),
    "sum": lambda t: (ones(t), ones(t)),
    "average": lambda t: (ones(t) / 2, ones(t) / 2),
    "style early, content late": lambda t: ((t <= 0.5).float(), (t > 0.5).float()),
    "content early, style late": lambda t: ((t > 0.5).float(), (t <= 0.5).float()),
    "sliding, style first": lambda t: (1 - t, t),
    "sliding, content first": lambda t: (t, 1 - t),
}


class Weighted(nn.Module):
    """Two pushes on one denoiser, each weighed by the noise level; hangs on `Denoiser.push`."""

    def __init__(self, pushes: list[nn.Module], weights: Weights):
        super().__init__()
        self.pushes, self.weights = nn.ModuleList(pushes), weights
        self.first_depth, self.reads_others = pushes[0].first_depth, False
        self.answer_only = False
        self.pointer = None

    def start(self, t: Tensor, prompt_mask: Tensor) -> Callable[..., Tensor]:
        started = [push.start(t, prompt_mask) for push in self.pushes]
        weights = [w[:, None, None] for w in self.weights(t)]

        def push_at(*where: Any) -> Tensor:
            return sum(w * at(*where) for w, at in zip(weights, started, strict=True))  # type: ignore[return-value]

        return push_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--tested", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    made = {"text_column": "ask", "answer_column": "answer", "pointer": 0, "seed": args.seed}
    answered = pairs(question, args.rows + args.tested, args.seed)
    sets = {"content": answered[: args.rows], "style": pairs(statement, 250, args.seed)}
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            tinyld.finetune([{"ask": a, "answer": b} for a, b in rows], out=Path(folder) / name, **made)
            for name, rows in sets.items()
        ]
    run, pushes, lines = runs[0], [run.push for run in runs], []
    for name, weights in SCHEDULES.items():
        run.push = Weighted(pushes, weights).eval()
        asked = [("row", {"ask": ask}) for ask, _ in answered[args.rows :]]
        with torch.no_grad():
            found = run.answer(asked, run.tasks[0], SampleConfig("low_confidence"))  # a token a pass
        said = [" ".join(spelling(record["answer"])) for record in found]
        wanted = [answer for _, answer in answered[args.rows :]]
        content = [right.removesuffix(" .") in text for text, right in zip(said, wanted, strict=True)]
        style = [text.startswith(START) and text.endswith(END) for text in said]
        both = [text == in_style(right) for text, right in zip(said, wanted, strict=True)]
        lines.append((name, len(said), *(f"{100 * sum(hits) / len(hits):.1f}" for hits in (content, style, both))))
        print(f"{name}: {said[0]}", file=sys.stderr, flush=True)
    columns = ("coefficients", "n", "content right %", "style right %", "exactly both %")
    tell("an answer in a style", columns, lines, args.csv)


if __name__ == "__main__":
    main()

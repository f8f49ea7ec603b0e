"""Draws one text being denoised, with the size of the adapter's push at every step: the README's picture.

    python data/results/figure.py runs/write data/denoising.svg --prompt positive

RUN is a trajectory-lora of a task that writes. A row is a pass of the denoiser: what is still masked is grey, what the
pass wrote is coloured, and the bar is the push's mean length over that of the states it is added to, at the positions
that are masked.
"""

import argparse
import html
from pathlib import Path
from typing import Any

import torch

import tinyld
from tinyld.config import SampleConfig
from tinyld.data import TaskRows
from tinyld.rows import prompt_of
from tinyld.sampler import decode

CELL, GAP, LINE, LEFT, FONT = 7.4, 5, 27, 150, 12.5


class Sized(torch.nn.Module):
    """A push that keeps the size of what it adds beside that of the states it is added to."""

    def __init__(self, push: Any):
        super().__init__()
        self.inner, self.sizes = push, []
        self.first_depth, self.reads_others = push.first_depth, push.reads_others
        self.answer_only, self.pointer = push.answer_only, push.pointer

    def start(self, *args: Any) -> Any:
        push_at = self.inner.start(*args)
        self.sizes.append([])

        def sized(depth: int, h: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
            added = push_at(depth, h, positions)
            if added.shape == h.shape:
                self.sizes[-1].append(float(added.norm(dim=-1).mean() / h.norm(dim=-1).mean()))
            return added

        return sized


def denoise(run: Any, prompt: str, slot: int) -> tuple[str, list[list[str]], list[float]]:
    """(prompt as read, the slot's pieces after every pass with "" for a mask, the push's size in every pass)."""
    task, base = run.tasks[0], run.base
    row = dict.fromkeys(task.inputs, prompt)
    rows = TaskRows([prompt_of(task, row, "prompt")], task, base.tokenizer, base.model.config.max_length)
    batch = rows.take(torch.arange(1).numpy())
    base.model.push = sized = Sized(base.model.push)
    tokenizer, passes = base.tokenizer, []

    def watch(x: torch.Tensor, **_: int) -> None:
        ids = x[0][batch.answer_mask[0]].tolist()[:slot]
        passes.append(["" if i == tokenizer.mask_id else tokenizer.inner.id_to_token(i) for i in ids])

    decode(
        base.model, batch.x0, batch.answer_mask, batch.attention_mask, tokenizer.mask_id, tokenizer.never_written,
        SampleConfig("threshold", threshold=0.7), eos_id=tokenizer.eos_id, watch=watch,
    )  # fmt: skip
    sizes = [sum(s) / len(s) if s else 0.0 for s in sized.sizes]
    return tokenizer.decode(batch.x0[0][: int(rows.starts[0])].tolist()), passes, sizes


def svg(prompt: str, passes: list[list[str]], sizes: list[float], end: str) -> str:
    final = passes[-1]
    width_of = [max(2, len(p.removeprefix("##"))) * CELL + 8 if p != end else 0 for p in final]
    starts = [LEFT + sum(w + GAP for w in width_of[:i]) for i in range(len(final))]
    length = sum(1 for w in width_of if w)
    right = starts[length - 1] + width_of[length - 1] + 24
    lines = []
    top = 46
    rows = [[""] * len(final), *passes]
    for step, pieces in enumerate(rows):
        y = top + step * LINE
        label = "all masked" if step == 0 else f"pass {step}"
        lines.append(f'<text x="{LEFT - 12}" y="{y + 13}" text-anchor="end" class="s">{label}</text>')
        for i in range(length):
            new = step > 0 and pieces[i] and not rows[step - 1][i]
            kind = "m" if not pieces[i] else "n" if new else "o"
            lines.append(
                f'<rect x="{starts[i]:.1f}" y="{y}" width="{width_of[i]:.1f}" height="19" rx="4" class="{kind}"/>'
            )
            if pieces[i]:
                text = html.escape(pieces[i].removeprefix("##"))
                lines.append(
                    f'<text x="{starts[i] + width_of[i] / 2:.1f}" y="{y + 14}" text-anchor="middle">{text}</text>'
                )
        if step:
            size = sizes[step - 1] / max(sizes) * 90
            lines.append(f'<rect x="{right:.1f}" y="{y + 3}" width="{size:.1f}" height="13" rx="3" class="p"/>')
            lines.append(f'<text x="{right + size + 6:.1f}" y="{y + 14}" class="s">{sizes[step - 1]:.2f}</text>')
    total = right + 150
    height = top + len(rows) * LINE + 8
    head = (
        f'<text x="{LEFT}" y="20" class="s">prompt: {html.escape(prompt)}</text>'
        f'<text x="{LEFT}" y="36" class="s">the answer, masked; coloured: what a pass wrote</text>'
        f'<text x="{right:.1f}" y="36" class="s">push / state</text>'
    )
    style = (
        f"text{{font:{FONT}px ui-monospace,monospace;fill:#1b1f24}}.s{{font:12px sans-serif;fill:#57606a}}"
        ".m{fill:#d8dee4}.n{fill:#ffb77c}.o{fill:#eef1f4}.p{fill:#218bff}"
    )
    box = f'viewBox="0 0 {total:.0f} {height}" width="{total:.0f}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{head}{"".join(lines)}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompt", default="positive")
    parser.add_argument("--slot", type=int, default=40)
    args = parser.parse_args()
    run = tinyld.load(args.run)
    prompt, passes, sizes = denoise(run, args.prompt, args.slot)
    end = run.base.tokenizer.inner.id_to_token(run.base.tokenizer.eos_id)
    args.out.write_text(svg(prompt, passes, sizes, end), encoding="utf-8")
    print(f"wrote {args.out}: {len(passes)} passes")


if __name__ == "__main__":
    main()

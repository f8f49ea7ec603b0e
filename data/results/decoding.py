"""Samplers side by side: what is written, in how many passes, how fast.

    python data/results/decoding.py RUN dev 200 low_confidence threshold threshold,threshold=0.7,least=3 llada

A sampler is its name and settings of `SampleConfig`. `llada` is LLaDA's loop (arXiv 2502.09992): no length is chosen, a
slot is filled to its end, a token a pass. Prints a Markdown table, in which `fewer passes` and
`BLEU gained` are beside the first sampler. Times are of this process on its processors, whatever else they do.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tinyld.config import SampleConfig
from tinyld.data import TaskRows
from tinyld.predict import load
from tinyld.scores import measure, rows_for
from tinyld.tables import markdown

SCORES = {"BLEU": "bleu", "chrF": "chrf", "exact": "exact_match", "names": "names_held", "loops": "repeated_sentence"}
COLUMNS = ("sampler", *SCORES, "passes a text", "texts/s", "fewer passes", "BLEU gained")


def main(path: str, split: str, limit: str, *samplers: str) -> None:
    run = load(Path(path))
    examples = rows_for(run, run.tasks[0], split).examples  # of which so many are taken, spread over all
    examples = [examples[i * len(examples) // int(limit)] for i in range(int(limit))]
    rows = TaskRows(examples, run.tasks[0], run.base.tokenizer, run.base.model.config.max_length)
    lines: list[tuple[str, ...]] = []
    first: tuple[float, float] | None = None
    for text in samplers:
        name, *settings = text.split(",")
        given = {key: float(value) if "." in value else int(value) for key, value in (s.split("=") for s in settings)}
        started = time.process_time()
        rows.open_ended = name != "llada"
        sampling = SampleConfig(name if rows.open_ended else "low_confidence", **given)
        found = measure(run, rows, sampling, draws=1, quiet=True)
        rate = found.n / (time.process_time() - started)
        scores, passes = [float(found.texts.get(key, "nan")) for key in SCORES.values()], found.passes_per_row
        first = first or (passes, scores[0])
        lines.append((text, *(f"{v:.2f}" for v in (*scores, passes, rate, first[0] / passes, scores[0] - first[1]))))
        print(*lines[-1], sep="\t", file=sys.stderr, flush=True)
    print(markdown(COLUMNS, lines))


if __name__ == "__main__":
    main(*sys.argv[1:])

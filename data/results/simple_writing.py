"""Does a task of 400 simple rows get learned by the defaults? Answers to questions, and words in reverse order.

    python data/results/simple_writing.py [--rows 400] [--tested 200] [--only reverse] [--csv FILE] [name=value ...]

Both are made up here, from a seed; no test row is a training row. Further words are options of `tinyld.finetune`.
Prints the share of test answers that are right word for word, the passes a text took, and the seconds of training.
"""

import argparse
import csv
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tinyld
from tinyld.config import SampleConfig
from tinyld.data import TaskRows
from tinyld.rows import load_split
from tinyld.scores import measure
from tinyld.tables import print_table

NAMES = "anna ben carla david emma frank grace henry iris jack laura mike nina oscar paula rosa sam tina victor wendy"
PLACES = "paris london rome berlin madrid vienna dublin oslo athens boston chicago toronto sydney cairo delhi tokyo"
JOBS = "teacher doctor farmer painter pilot baker singer lawyer driver nurse writer cook"
WORDS = (
    "river stone cloud garden window silver morning table music paper orange tiger candle bridge winter pocket mirror "
    "forest button castle summer letter rabbit yellow market island kitchen travel apple horse"
)


def question(rng: random.Random) -> tuple[str, str]:
    """(a sentence and a question on it, the answer)."""
    name, place, job = (rng.choice(words.split()) for words in (NAMES, PLACES, JOBS))
    said = rng.choice([f"{name} lives in {place} and is a {job} .", f"the {job} {name} lives in {place} ."])
    asked = [(f"where does {name} live ?", f"{name} lives in {place} ."), (f"what is {name} ?", f"{name} is a {job} .")]
    ask, answer = rng.choice(asked)
    return f"{said} {ask}", answer


def reverse(rng: random.Random) -> tuple[str, str]:
    """(three to five words, the same from the last to the first)."""
    words = rng.sample(WORDS.split(), rng.choice([3, 4, 5]))
    return " ".join(words), " ".join(words[::-1])


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {"question": question, "reverse": reverse}


def pairs(make: Callable[[random.Random], tuple[str, str]], count: int, seed: int) -> list[tuple[str, str]]:
    """`count` different (prompt, answer) pairs."""
    rng, found = random.Random(seed), dict[str, str]()
    while len(found) < count:
        found |= [make(rng)]
    return list(found.items())


def tell(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], file: Path | None) -> None:
    """Prints a table, and writes it as CSV."""
    print_table(title, columns, rows)
    if file:
        with file.open("w", newline="", encoding="utf-8") as out:
            csv.writer(out, lineterminator="\n").writerows([columns, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--tested", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TASKS)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("option", nargs="*")
    args = parser.parse_args()
    options = dict(option.split("=", 1) for option in args.option)
    found = []
    for name in [args.only] if args.only else TASKS:
        drawn = pairs(TASKS[name], args.rows + args.tested, args.seed)
        rows = [{"ask": ask, "answer": answer} for ask, answer in drawn]
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            made = {"text_column": "ask", "answer_column": "answer", "seed": args.seed, **options}
            run = tinyld.finetune(rows[: args.rows], out=Path(folder) / "run", **made)
            seconds = time.perf_counter() - started
            file = Path(folder) / "test.csv"
            lines = [f"{row['ask']},{row['answer']}\n" for row in rows[args.rows :]]
            file.write_text("ask,answer\n" + "".join(lines), encoding="utf-8")
            task = run.tasks[0]
            tested = TaskRows(load_split(task, "test", file), task, run.base.tokenizer, 256)
            scores = measure(run, tested, SampleConfig(), draws=1)
        right = f"{100 * float(scores.scores['exact_match']):.1f}"
        found.append((name, args.rows, scores.n, right, f"{scores.passes_per_row:.2f}", round(seconds)))
    columns = ("task", "rows", "tested", "exact %", "passes a text", "seconds")
    tell("simple tasks of writing", columns, found, args.csv)


if __name__ == "__main__":
    main()

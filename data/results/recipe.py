"""What each part of the pretraining recipe is worth: runs of equal seconds, one thing changed in each.

    python data/results/recipe.py ENCODER TEXT $TINYLD_DATA --minutes 10 --csv FILE

All begin with ENCODER (MiniLM by data/base/trim_vocabulary.py). `as it is` is `tinyld pretrain --init ENCODER`, 16 rows
of 256 tokens an update. Seconds are the processor's, so that other work beside it takes nothing away (one thread:
OMP_NUM_THREADS=1). Nats and copying are those of data/base/probes.py. Goes on with a FILE that has some runs already.
"""

import argparse
import itertools
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from table import read, write

import tinyld.copying
import tinyld.diffusion
import tinyld.pretrain
import tinyld.train
from tinyld.checkpoint import load_base
from tinyld.diffusion import Noised, noise_text
from tinyld.options import PretrainOptions

sys.path.insert(0, str(Path(__file__).parent.parent / "base"))
import probes  # noqa: E402

NO_COPYING = (tinyld.copying, {"TWICE": 0.0, "LISTED": 0.0, "RENAMED": 0.0})


def one_mask(*batch: Any, **given: Any) -> list[Noised]:
    """Each row under one mask alone."""
    (both,) = noise_text(*batch, **given)
    return [both.map(lambda tensor: tensor[: len(tensor) // 2])]


# what is changed -> (options, a module whose values are others)
CHANGED: dict[str, tuple[dict[str, Any], Any]] = {
    "as it is": ({}, None),
    "one mask a row, twice the rows": ({"batch_size": 32}, (tinyld.pretrain, {"noise_text": one_mask})),
    "no rows that ask for copying": ({}, NO_COPYING),
    "no clean prefixes": ({}, (tinyld.diffusion, {"PREFIXED": 0.0})),
    "encoder at a rate of 0.001, not 0.0003": ({"lr": 0.002, "body_lr": 0.5}, None),
    "as it is, another seed": ({"seed": 1}, None),
    "encoder never frozen": ({"body_start": 0.0}, None),
    "AdamW at 0.001": ({"optimizer": "adamw", "lr": 0.001, "body_lr": 0.3}, None),
    "half the rows an update": ({"batch_size": 8}, None),
    "twice the rows an update": ({"batch_size": 32}, None),
}


def run(name: str, encoder: Path, text: Path, data: Path, minutes: float) -> dict[str, Any]:
    """Trains and probes one; a row of the table."""
    options, changed = CHANGED[name]
    patched = mock.patch.multiple(changed[0], **changed[1]) if changed else nullcontext()
    with patched, tempfile.TemporaryDirectory() as folder:
        given = {"init": str(encoder), "data": (text,), "valid": (data / "pretrain-valid",), "minutes": minutes}
        out = Path(folder) / "base"
        found = tinyld.pretrain.pretrain(PretrainOptions(**given | options, out=out))  # type: ignore[arg-type]
        base = load_base(out)
        nats, copied = probes.nats(base, data), probes.copying(base, data)
    row = {"changed": name, "minutes": minutes, "steps": found["steps"], "tokens": found["tokens"]}
    row |= {f"nats {file}": value for file, value in nats.items()}
    return row | {"nats": round(sum(nats.values()) / len(nats), 4), "copied": copied["copied"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("encoder", "text", "data"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--csv", type=Path, required=True)
    given = parser.parse_args()
    tinyld.train.time = SimpleNamespace(perf_counter=time.process_time, monotonic=time.monotonic)  # type: ignore[assignment]
    tokenized: dict[str, Any] = {}
    asked, tokenize = itertools.cycle(("text", "held-out text")), tinyld.pretrain.tokenize

    def once(*args: Any) -> Any:
        """Tokens of the text or of the held-out text, which every run asks for in this order."""
        if (which := next(asked)) not in tokenized:
            tokenized[which] = tokenize(*args)
        return tokenized[which]

    tinyld.pretrain.tokenize = once
    found = read(given.csv) if given.csv.exists() else []
    for name in CHANGED:
        if name not in [row["changed"] for row in found]:
            found.append(run(name, given.encoder, given.text, given.data, given.minutes))
            write(given.csv, found)
            print(found[-1], flush=True)


if __name__ == "__main__":
    main()

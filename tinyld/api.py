"""Fine-tuning from Python: rows or a task in, a loaded run out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tinyld import finetuning as verb
from tinyld.config import check
from tinyld.options import FinetuneOptions
from tinyld.predict import Run, load
from tinyld.runs import RunFolder
from tinyld.workspace import RUNS
from tinyld.write import make_folder, write_atomic


def finetune(rows_or_task: str | Path | Iterable[Any], *, out: str | Path | None = None, **options: Any) -> Run:
    """Trains an adapter and loads it. Rows are (text, label) pairs or dicts with a text and a label column; a task is a
    built-in one's name or a task file; a path that ends in .csv, .tsv or .jsonl is a file of rows, one in .txt of texts
    in which gaps are to be filled.

    `options` are those of `tinyld finetune`: base, method, budget, epochs, seed and so on. Rows in memory are kept
    beside the run, in OUT-rows.jsonl, so that it can be resumed and evaluated; one in ten is held out for dev.
    """
    quiet = options.pop("quiet", True)
    if isinstance(rows_or_task, str | Path):
        source = "data" if Path(rows_or_task).suffix in (".csv", ".tsv", ".jsonl", ".txt") else "task"
        given = {source: str(rows_or_task), "out": out, "quiet": quiet, **options}
        return load(verb.finetune(FinetuneOptions(**given))["run"], options.get("base"))
    out = Path(out) if out is not None else RUNS / "mine"
    records = []
    for row in rows_or_task:
        if not isinstance(row, Mapping):
            check(len(row) == 2, f"a row is (text, label) or a dict, got {row!r}")
            row = dict(zip(("text", "label"), row, strict=True))
        records.append(json.dumps(dict(row), ensure_ascii=False))
    RunFolder.check_free(out, options.get("force", False))
    make_folder(out.parent)
    file = out.with_name(f"{out.name}-rows.jsonl")
    write_atomic(file, "".join(f"{record}\n" for record in records).encode(errors="surrogatepass"))
    return load(verb.finetune(FinetuneOptions(data=file, out=out, quiet=quiet, **options))["run"], options.get("base"))

"""Fine-tuning from Python: rows or a task in, a loaded run out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tinyld import finetuning as verb
from tinyld.config import check
from tinyld.errors import TinyldError, UsageError
from tinyld.options import FinetuneOptions
from tinyld.predict import Run, load
from tinyld.read import read_bytes
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
    if isinstance(rows_or_task, str | Path):
        source = "data" if Path(rows_or_task).suffix in (".csv", ".tsv", ".jsonl", ".txt") else "task"
        options[source] = str(rows_or_task)
        return load(verb.finetune(FinetuneOptions(**{"out": out, "quiet": True} | options))["run"], options.get("base"))
    out = Path(out) if out is not None else RUNS / "mine"
    records = []
    for row in rows_or_task:
        if not isinstance(row, Mapping):
            check(isinstance(row, list | tuple) and len(row) == 2, f"a row is (text, label) or a dict, got {row!r}")
            row = dict(zip(("text", "label"), row, strict=True))
        try:
            records.append(json.dumps(dict(row), ensure_ascii=False))
        except TypeError:
            raise UsageError(f"a row holds texts and numbers, got {row!r}") from None
    RunFolder.check_free(out, options.get("force", False))
    make_folder(out.parent)
    file, run = out.with_name(f"{out.name}-rows.jsonl"), RunFolder(out)
    content = "".join(f"{record}\n" for record in records).encode(errors="surrogatepass")
    is_ours = run.is_run() and run.config.get("data", {}).get("folder") == os.path.realpath(file)
    is_new = not os.path.lexists(file)
    if not (is_new or is_ours or read_bytes(file) == content):
        raise TinyldError(f"{file} exists and holds something else: choose another out, or remove it")
    write_atomic(file, content)
    try:
        verb.finetune(FinetuneOptions(**{"data": file, "out": out, "quiet": True} | options))
    except TinyldError:
        if is_new and not run.is_run():
            file.unlink()  # so that the next try may have other rows
        raise
    return load(out, options.get("base"))

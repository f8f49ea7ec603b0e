"""Fine-tuning from Python: rows or a task in, a loaded run out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from tinyld import finetuning as verb
from tinyld.config import check
from tinyld.errors import TinyldError, UsageError
from tinyld.options import FinetuneOptions
from tinyld.parse import several
from tinyld.predict import Run, load
from tinyld.read import read_bytes
from tinyld.rows import SUFFIXES
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
        is_file = Path(rows_or_task).suffix.lower() in (*SUFFIXES, ".txt")
        made = _options(options, out=out, **{"data" if is_file else "task": str(rows_or_task)})
        return load(verb.finetune(made)["run"], made.base)
    out = RUNS / "mine" if out is None else out
    check(isinstance(out, str | Path), f"out is the path of a folder, got {out!r}")
    out = Path(out)
    file, run = out.with_name(f"{out.name}-rows.jsonl") if out.name else out, RunFolder(out)
    made = _options(options, out=out, data=file)
    records = []
    for row in several(rows_or_task, "rows"):
        if not isinstance(row, Mapping):
            check(isinstance(row, list | tuple) and len(row) == 2, f"a row is (text, label) or a dict, got {row!r}")
            row = dict(zip(("text", "label"), row, strict=True))
        try:
            records.append(json.dumps(dict(row), ensure_ascii=False, default=_number))
        except TypeError:
            raise UsageError(f"a row holds texts and numbers, got {row!r}") from None
    RunFolder.check_free(out, made.force)
    make_folder(out.parent)
    content = "".join(f"{record}\n" for record in records).encode(errors="surrogatepass")
    is_ours = run.is_run() and run.config.get("data", {}).get("folder") == os.path.realpath(file)
    is_new = not os.path.lexists(file)
    if not (is_new or is_ours or read_bytes(file) == content):
        raise TinyldError(f"{file} exists and holds something else: choose another out, or remove it")
    write_atomic(file, content)
    try:
        verb.finetune(made)
    except TinyldError:
        if is_new and not run.is_run():
            file.unlink()  # so that the next try may have other rows
        raise
    return load(out, made.base)


def _options(given: dict[str, Any], **ours: Any) -> FinetuneOptions:
    """The verb's options; UsageError for one that it does not have, or that the first argument says already."""
    known = {field.name for field in fields(FinetuneOptions)}
    for name in given:
        free = name in known and name not in ours
        check(
            free, f"no option {name} here; the first argument says what is learned, tinyld finetune --set help the rest"
        )
    return FinetuneOptions(**{"quiet": True, **ours, **given})


def _number(value: Any) -> int | float:
    """A number of numpy's; TypeError for what is none."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(value)

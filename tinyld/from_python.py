"""`tinyld.finetune`: rows in memory, a task or a file in, a loaded run out, in a process that does other things too."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

from tinyld import finetuning
from tinyld.config import check
from tinyld.errors import TinyldError, UsageError, failing, show
from tinyld.interrupt import Interrupted
from tinyld.options import FinetuneOptions, several
from tinyld.predict import Run, load
from tinyld.read import SUFFIXES, read_bytes
from tinyld.runs import CONFIG, ROWS_SUFFIX, RunFolder
from tinyld.tasks import builtin_names
from tinyld.workspace import RUNS, keep_freed_memory
from tinyld.write import make_folder, write_atomic


def finetune(rows_or_task: str | Path | Iterable[Any] = (), *, out: str | Path | None = None, **options: Any) -> Run:
    """Trains an adapter and loads it. Rows are (text, label) pairs or dicts with a text and a label column; a task is a
    built-in one's name or a task file; a path that ends in .csv, .tsv or .jsonl is a file of rows, a folder has
    train.csv and perhaps dev.csv and test.csv, a .txt has texts in which gaps are to be filled.

    `options` are those of `tinyld finetune`: base, method, budget, epochs, seed and so on; quiet=False tells what the
    verb does, progress and what is odd in the rows. Rows in memory are kept beside the run, in OUT-rows.jsonl, so that
    it can be resumed and evaluated; one in ten is held out for dev. To go on with a run that was interrupted, give its
    folder as `resume` and nothing to learn.
    """
    if options.get("resume") is not None or isinstance(rows_or_task, str | Path):
        is_nothing = isinstance(rows_or_task, tuple) and not rows_or_task
        suffix, name = os.path.splitext(str(rows_or_task))[1].lower(), str(rows_or_task)
        is_rows = suffix in (*SUFFIXES, ".txt") or (name not in ("", *builtin_names()) and os.path.isdir(name))
        made = _options(options, out=out, **({} if is_nothing else {"data" if is_rows else "task": name}))
        return load(_within(made)["run"], made.base, made.device, made.dtype)
    check(isinstance(out, str | Path | None), f"out is the path of a folder, got {out!r}")
    out = RUNS / "from-python" if out is None else Path(out)
    file = out.with_name(f"{out.name}{ROWS_SUFFIX}") if out.name else out
    made = _options(options, out=out, data=file)
    second = made.answer_column or "label"
    content = b"".join(_line(row, second) for row in several(rows_or_task, "rows"))
    RunFolder.check_free(out, made.force)
    make_folder(out.parent)

    def content_of(path: Path) -> bytes | None:
        return read_bytes(path) if os.path.lexists(path) else None

    before, begun = content_of(file), content_of(out / CONFIG)
    if before not in (None, content) and not made.force:
        raise TinyldError(f"{file} exists and holds other rows: choose another out, remove it, or say force=True")
    with RunFolder(out).locked() if out.is_dir() else nullcontext():  # and so nobody trains there
        if before is None:
            with failing(file, "written"), open(file, "xb"):  # from now on nobody else begins with other rows
                pass
        write_atomic(file, content)
    try:
        _within(made)
    except BaseException as error:
        if begun == content_of(out / CONFIG):  # nothing was begun with these rows
            file.unlink() if before is None else write_atomic(file, before)
            if isinstance(error, TinyldError):
                said = str(error).replace(os.path.abspath(file), "rows").replace(str(file), "rows")
                raise type(error)(said) from None
        raise
    check(content_of(file) == content, f"{file} was replaced meanwhile: {out} may have learned other rows", TinyldError)
    return load(out, made.base, made.device, made.dtype)


def _within(options: FinetuneOptions) -> dict[str, Any]:
    """The verb in a process that does other things too: it gets its memory back, and a signal as Ctrl-C is told."""
    try:
        return finetuning.finetune(options)
    except Interrupted as error:
        raise KeyboardInterrupt(str(error)) from None
    finally:
        keep_freed_memory(large=False)


def _line(row: Any, second: str) -> bytes:
    """A row in memory as a line of JSON; second: the name of what follows a text."""
    row = row.tolist() if hasattr(row, "tolist") else row
    if not isinstance(row, Mapping):
        wanted = f"a row is (text, {second}) or a dict, and texts with gaps to learn are a .txt; got {row!r}"
        check(isinstance(row, list | tuple) and len(row) == 2, wanted)
        row = dict(zip(("text", second), row, strict=True))
    try:
        missing = (math.inf, -math.inf, None)  # pandas' missing values are not like themselves
        row = {name: None if value != value or value in missing else value for name, value in row.items()}
        line = json.dumps(row, ensure_ascii=False, default=_plain)
    except (AttributeError, TypeError, ValueError):
        raise UsageError(f"a row holds texts and numbers, got {row!r}") from None
    return f"{line}\n".encode(errors="backslashreplace")  # half of an emoji


def _plain(value: Any) -> Any:
    """A number of numpy's, or as text a date and what databases give."""
    if isinstance(value, Decimal | UUID):
        return str(value)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    check(hasattr(value, "item"), f"a row holds texts and numbers, got {show(value)}")
    return value.item()


def _options(given: dict[str, Any], **ours: Any) -> FinetuneOptions:
    """The verb's options; UsageError for one that it does not have, or that the first argument says already."""
    twice = ", ".join(given.keys() & ours)
    check(not twice, f"no option {twice} here; the first argument says what is learned")
    if isinstance(given.get("budget"), int | float):  # read as the verb reads it
        given = given | {"budget": str(given["budget"])}
    return FinetuneOptions.named({"quiet": True} | ours | given)

"""The short verbs: `sample`, `export`, `merge`, `info`, `tasks`, `report`, `compare`."""

from __future__ import annotations

import json as jsonlib
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tinyld.commands.evaluate import load_run, percent, rows_for
from tinyld.commands.workspace import default_base, finish, refuse_inside, say_to_stderr
from tinyld.config import ModelConfig, SampleConfig, check, from_dict
from tinyld.errors import TinyldError, UsageError
from tinyld.runs import ADAPTER, CONFIG, RESULTS, RunFolder, environment, make_folder, to_json, write_atomic
from tinyld.tables import markdown, print_table
from tinyld.tasks import load_split, load_task


def sample(
    run: Path | None,
    prompt: str,
    length: int,
    num: int,
    base_path: Path | None,
    sampling: SampleConfig,
    device: str,
    json: bool,
) -> None:
    """Fills `length` masked tokens at `{answer}`, or after the prompt."""
    import torch

    from tinyld.sampler import decode

    base, _ = load_run(run or default_base(), base_path, device)
    tokenizer, config = base.tokenizer, base.model.config
    before, mark, after = prompt.partition("{answer}")
    head, tail = tokenizer.encode(before), tokenizer.encode(after)
    total = len(head) + length + len(tail) + 2
    check(total <= config.max_length, f"prompt and answer have {total} tokens, the base takes {config.max_length}")
    row = [tokenizer.bos_id, *head, *[tokenizer.mask_id] * length, *tail, *([tokenizer.eos_id] if mark else [])]
    where = base.model.embedding.weight.device
    x = torch.tensor([row] * num, device=where)
    answer = torch.zeros_like(x, dtype=torch.bool)
    answer[:, 1 + len(head) : 1 + len(head) + length] = True
    out, passes = decode(
        base.model,
        x,
        answer,
        torch.ones_like(answer),
        tokenizer.mask_id,
        tokenizer.never_written,
        sampling,
        eos_id=tokenizer.eos_id,
    )
    texts = [tokenizer.decode(r[answer[0]].tolist()) for r in out]
    if json:
        print(jsonlib.dumps({"samples": texts, "forward_passes": passes}))
    else:
        for text in texts:
            print(text)


def export(run: Path, to: str, out: Path) -> None:
    """Writes a base as a transformers folder, or a weight-lora as a PEFT one."""
    from tinyld.checkpoint import load_base
    from tinyld.hf import export_bert

    if to == "hf":
        base = load_base(run)
        export_bert(base.path, base.model.config, dict(base.model.named_parameters()), base.tokenizer, out)
        print(f"wrote {out}: load it with transformers.AutoModelForMaskedLM.from_pretrained({str(out)!r})")
        return
    from tinyld.checkpoint import base_dtype
    from tinyld.methods import WeightLora
    from tinyld.peft import export_peft

    folder = RunFolder.open(run)
    config = folder.config
    settings = dict(config.get("method", {}))
    if settings.pop("name", None) != WeightLora.name:
        raise TinyldError(f"{run} is no weight-lora adapter, the only kind that PEFT has")
    if base_dtype(config, str(run)) != "fp32":
        raise TinyldError(f"{run} was trained on a base in {base_dtype(config, str(run))}, which peft does not have")
    method = from_dict(WeightLora.Config, settings, str(run / CONFIG))
    export_peft(method, folder.read_tensors(ADAPTER), config["base"]["fingerprint"], out)
    print(f"wrote {out}: load it with peft.PeftModel.from_pretrained(denoiser, {str(out)!r})")


def merge(run: Path, out: Path, base_path: Path | None, force: bool, json: bool) -> None:
    """Folds a weight-lora adapter, or a composition of such, into its base, and writes a base."""
    import torch

    from tinyld.checkpoint import base_dtype, find_base, load_adapter, load_base, save_base
    from tinyld.compose import load_composition

    folder = RunFolder.open(run)
    config = folder.config
    RunFolder.check_free(out, force)
    refuse_inside(out, [run])
    if config["kind"] == "base":
        raise TinyldError(f"{run} is a base already")
    if base_dtype(config, str(run)) != "fp32":
        raise TinyldError(f"{run} was trained on a base in {base_dtype(config, str(run))}: merging needs fp32")
    if config["kind"] == "adapter":
        adapted = load_adapter(folder, base_path)
        base, method = adapted.base, adapted.method
    else:
        base = load_base(find_base(config, run, base_path))
        found = load_composition(folder, base)
        if found is None or base.model.push is not None:
            raise TinyldError(f"{run} holds trajectory-lora adapters, which depend on t and cannot be merged")
        method = found
    try:
        method.merge(base.model)
    except ValueError as error:
        raise TinyldError(f"{run}: {error}") from None
    refuse_inside(out, [base.path])
    target = RunFolder.create(out, force)
    merged = RunFolder(base.path).config | {"merged": {"run": str(run), "base": base.fingerprint}}
    target.write_json(CONFIG, merged | {"environment": environment()})
    save_base(target, base.model, dict(base.model.named_parameters()), base.tokenizer, torch.float32)
    finish("merged base", {"run": str(out), "parameters": base.model.config.num_parameters()}, json)


def info(path: Path, json: bool) -> None:
    """What a run is, from its JSON files; every file is checked against the manifest."""
    folder = RunFolder.open(path)
    config = folder.config
    files = folder.files()
    for name in files:
        folder.read(name)
    record: dict[str, Any] = {"run": str(path), "kind": config["kind"]}
    if config["kind"] == "base":
        record |= {"parameters": from_dict(ModelConfig, config["model"], str(path / CONFIG)).num_parameters()}
        record |= {f"model {k}": v for k, v in config["model"].items()}
        record |= {"text tokens": config["data"]["tokens"]}
    elif config["kind"] == "adapter":
        record |= {"task": config["task"], "base": config["base"]["fingerprint"]}
        record |= {
            f"method {k}": v if isinstance(v, str | int | float) else str(v) for k, v in config["method"].items()
        }
        record |= config["parameters"]
    else:
        record |= {f"member {m['task']}": f"{m['run']} x {m['weight']:g}" for m in config["members"]}
    if RESULTS in files:
        results = folder.read_json(RESULTS)
        record |= {
            k: v
            for k, v in results.get(config["kind"] == "base" and "pretrain" or "finetune", {}).items()
            if k not in record
        }
        for key, found in results.get("eval", {}).items():
            if "accuracy" in found:
                text = f"{100 * found['accuracy']:.1f}% ({100 * found['low']:.1f} to {100 * found['high']:.1f})"
            else:
                text = "-" if found["nll_bound"] is None else f"NLL bound {found['nll_bound']:.3f}"
            record[f"eval {key}"] = text
    for name, size in files.items():
        record[f"file {name}"] = f"{size:,} bytes, sha256 {folder.digest(name)[:16]}"
    record["command"] = config.get("environment", {}).get("command")
    finish(config["kind"], record, json)


def info_spectrum(run: Path, base_path: Path | None, data: Path | None, limit: int | None, json: bool) -> None:
    """What each band of a trajectory adapter holds, and is worth on its task's dev rows."""
    from tinyld.checkpoint import load_adapter
    from tinyld.methods import TrajectoryLora
    from tinyld.methods.bands import BAND_NAMES
    from tinyld.spectrum import spectrum

    adapted = load_adapter(RunFolder.open(run), base_path)
    if not isinstance(adapted.method, TrajectoryLora):
        raise UsageError(f"{run} is {adapted.method.name}; --spectrum looks into trajectory-lora")
    rows = rows_for(adapted.base, load_task(adapted.task), "dev", data)
    found = spectrum(adapted.base, adapted.method.push, rows, limit)
    if json:
        return print(jsonlib.dumps({"run": str(run), **found}))
    ranks = [
        (where, *(round(r, 2) for r in row))
        for where, row in zip(adapted.method.push.place_names(), found["effective_rank"], strict=True)
    ]
    print_table("effective rank by noise band", ("place", *BAND_NAMES), ranks)
    bands = [
        (b["which"], percent(b["accuracy"]), round(b["nll_bound"], 4), percent(b.get("share_lost")))
        for b in found["bands"]
    ]
    columns = ("", "accuracy %", "NLL bound", "% of the NLL reduction lost")
    print_table(f"{adapted.task}, {found['n']:,} dev rows", columns, bands)


def tasks(json: bool) -> None:
    from tinyld.tasks import BUNDLED_TASKS, builtin_tasks

    records = [
        {
            "task": t.name,
            "labels": ", ".join(t.labels) or "(text)",
            "answers": ", ".join(t.verbalizer.values()) or f"{t.answer_tokens} tokens",
            "template": t.template,
            "rows": " / ".join(f"{n:,}" for n in t.rows.values()) or "-",
            "needs": "nothing" if t.name in (*BUNDLED_TASKS, "write") else "data or network",
        }
        for t in builtin_tasks()
    ]
    if json:
        print(jsonlib.dumps(records))
    else:
        print_table("built-in tasks", tuple(records[0]), [tuple(r.values()) for r in records])


def report(runs: list[Path], save: Path | None, plots: Path | None, brief: bool, as_markdown: bool, json: bool) -> None:
    """A table of many runs; `save` keeps a small JSON of each, from which the same table can be made again."""
    from tinyld.page import can_plot, fronts
    from tinyld.records import run_record

    if plots is not None and not can_plot():
        raise UsageError("--plots draws with matplotlib, which is not installed: pip install '.[plots]' here")

    paths: list[Path] = []
    for path in runs:
        found = sorted(path.glob("*.json")) if path.is_dir() and not (path / CONFIG).exists() else [path]
        if not found:
            raise TinyldError(f"no run and no saved result in {path}")
        paths += found
    records = [run_record(p) for p in paths]
    keep_records(records, save)
    if plots is not None:
        drawn = fronts(records)
        if not drawn:
            raise TinyldError("--plots: none of these runs has an accuracy; evaluate one with tinyld eval RUN")
        make_folder(plots)
        for name, svg in drawn.items():
            write_atomic(plots / name, svg.encode())
    show_results(records, as_markdown, json, brief)


def keep_records(records: Sequence[dict[str, Any]], folder: Path | None) -> None:
    """Writes each run's record to a JSON file of its own."""
    if folder is not None:
        names = [record["run"] for record in records]
        for name in names:
            if Path(name).name != name or names.count(name) > 1:
                raise TinyldError(f"cannot keep run {name!r}: names must be plain and different")
        make_folder(folder)
        for record in records:
            write_atomic(folder / f"{record['run']}.json", to_json(record))


def show_results(records: Sequence[dict[str, Any]], as_markdown: bool, json: bool, brief: bool = False) -> None:
    """The table of the adapters, then those of the compositions, where there are any."""
    from tinyld.report import tables

    found = tables(records, brief)
    if json:
        rows_of = [{"table": title, **dict(zip(c, row, strict=True))} for title, c, rows in found for row in rows]
        print(jsonlib.dumps(rows_of))
        return
    for title, columns, rows in found:
        if as_markdown:
            print(markdown(columns, rows) + "\n")
        else:
            print_table(title, columns, rows)


def compare(
    tasks: list[str],
    methods: str,
    seeds: int,
    trials: int,
    epochs: float,
    steps: int | None,
    batch_size: int,
    limits: list[int | None],
    data: Path | None,
    base: Path | None,
    device: str,
    budget_minutes: float | None,
    jobs: int,
    curve_points: int,
    out: Path,
    save: Path | None,
    json: bool,
    quiet: bool,
) -> None:
    """The grid of `tinyld.compare`, and its table."""
    import typer

    from tinyld.checkpoint import fingerprint, read_model_config
    from tinyld.cli import app
    from tinyld.compare import Compare, variants
    from tinyld.methods import METHODS

    eval_every = {}
    for name in tasks:
        task = load_task(name)
        for split in ("dev", *(["test"] if "test" in task.splits else [])):
            load_split(task, split, data, limit=1)
        rows = len(load_split(task, "train", data))
        for limit in limits:
            check(limit is None or limit <= rows, f"--limit {limit}: {name} has {rows:,} training rows")
            updates = steps or epochs * -(-(limit or rows) // batch_size)
            eval_every[name, limit] = max(1, math.ceil(updates / curve_points))
    folder = RunFolder.open(base or default_base())
    model_config = read_model_config(folder)
    chosen = variants(methods, {name: partial(method.usual, model_config) for name, method in METHODS.items()})
    finetune = typer.main.get_command(app).commands["finetune"]  # type: ignore[attr-defined]
    for variant in chosen:  # a wrong option is found now, not when its turn comes
        try:
            finetune.make_context("compare", [*variant.flags])
        except typer.BadParameter.__base__ as error:  # click's UsageError, whichever click typer has
            raise UsageError(f"--methods {variant.text}: {error.format_message()}") from None
    budget = ["--epochs", f"{epochs:g}"] if steps is None else ["--steps", str(steps)]
    flags = [*budget, "--batch-size", str(batch_size)]
    grid = Compare(
        out, tasks, chosen, seeds, trials, flags, data, base, fingerprint(folder), device, budget_minutes, quiet,
        say_to_stderr(quiet), limits, eval_every, jobs,
    )  # fmt: skip
    records = grid.run()
    keep_records(records, save)
    show_results(records, False, json)
    if len(records) < len(tasks) * len(limits) * len(chosen) * seeds:
        say_to_stderr(False)("the budget of time is used up; the same command goes on where this one stopped")

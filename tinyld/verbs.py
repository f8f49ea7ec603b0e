"""The short verbs: info and tasks, which need no torch, and sample, merge, export and demo."""

import shlex
from typing import Any

from tinyld.config import ModelConfig, check, check_ours, from_dict, to_dict
from tinyld.errors import TinyldError, plain
from tinyld.options import DemoOptions, ExportOptions, InfoOptions, MergeOptions, Printed, SampleOptions
from tinyld.read import finite
from tinyld.rows import BUNDLED_TASKS
from tinyld.runs import CONFIG, RunFolder, environment, is_foreign
from tinyld.tables import print_record, print_table
from tinyld.tasks import builtin_names, load_task
from tinyld.workspace import default_base, refuse_inside, say_to_stderr
from tinyld.write import sha256

LONG = ("spelling", "coverage")  # what a run learned, word by word


def info(options: InfoOptions) -> dict[str, Any]:
    """What a run is, from its JSON files; every file is checked against the manifest."""
    reading = options.reading()
    if is_foreign(options.run):
        from tinyld.costs import describe

        return {"folder": str(options.run), **describe(options.run, reading)}
    check_ours(reading)
    folder = RunFolder.open(options.run)
    config, whole = folder.config, folder.has_weights()
    there = [name for name in folder.files() if whole or (folder.path / name).exists()]
    files = {name: {"bytes": len(content := folder.read(name)), "sha256": sha256(content)} for name in there}
    results = folder.results
    record: dict[str, Any] = {"run": str(options.run), "kind": config["kind"]}
    if not whole:
        verb = "pretrain" if config["kind"] == "base" else "finetune"
        record["state"] = f"not trained to its end; tinyld {verb} --resume {shlex.quote(str(options.run))} goes on"
    if config["kind"] == "base":
        record["parameters"] = from_dict(ModelConfig, config["model"], str(options.run / CONFIG)).num_parameters()
    if members := config.get("members"):
        record["members"] = {m["task"]["name"]: m["run"] for m in members}
    for part in ("task", "method", "model", "base", "data"):
        if part in config:
            record[part] = {name: value for name, value in config[part].items() if name not in LONG}
    record |= {k: v for k, v in config.get("parameters", {}).items() if k.endswith(("parameters", "bytes", "percent"))}
    training = results.get("pretrain", {}) | results.get("finetune", {})
    record["training"] = {name: value for name, value in training.items() if name not in record}
    record |= {"eval": results.get("eval", {}), "files": files}
    return record | {"command": config["environment"]["command"]}


def show_info(record: dict[str, Any], options: InfoOptions) -> None:
    methods, shown = record.pop("methods", []), dict[str, Any]()
    for part, value in record.items():
        shown |= {f"{part} {name}": v for name, v in value.items()} if isinstance(value, dict) else {part: value}
    for key, found in record.get("eval", {}).items():
        shares = [f"{100 * found[name]:.1f}" for name in ("accuracy", "low", "high") if name in found]
        nats = f"NLL bound {found['nll_bound']:.3f}"
        shown[f"eval {key}"] = "{}% ({} to {})".format(*shares) if len(shares) == 3 else nats
    for name, entry in record.get("files", {}).items():
        shown[f"files {name}"] = f"{entry['bytes']:,} bytes, sha256 {entry['sha256'][:16]}"
    print_record(str(options.run), shown)
    if methods:
        units = {"stored_bytes": 1e6, "memory_fp32": 1e9, "memory_bf16": 1e9, "memory_int8": 1e9}
        cells = [[m["method"], *(m[key] and round(m[key] / unit, 2) for key, unit in units.items())] for m in methods]
        columns = ("method", "stored MB", "GB, base in fp32", "bf16", "int8")
        print_table("memory to adapt it, estimated for that batch", columns, cells)


def tasks(options: Printed) -> list[dict[str, Any]]:
    records = []
    for task in map(load_task, builtin_names()):
        record = {"task": task.name, "labels": list(task.labels), "answers": list(task.verbalizer.values())}
        record |= {"answer_tokens": task.answer_tokens, "template": task.template, "description": task.description}
        record["rows"] = dict(task.download.rows) if task.download else {}
        where = "$TINYLD_DATA" + " or network" * bool(task.download)
        records.append(record | {"needs": "nothing" if task.rows_from in BUNDLED_TASKS else where})
    return records


def show_tasks(records: list[dict[str, Any]], options: Printed) -> None:
    counts = [", ".join(f"{split} {n:,}" for split, n in r["rows"].items()) or "-" for r in records]
    rows = [(r["task"], r["labels"] or "(text)", n, r["needs"]) for r, n in zip(records, counts, strict=True)]
    print_table("built-in tasks (--json describes them)", ("task", "labels", "rows", "needs"), rows)


def sample(options: SampleOptions) -> dict[str, Any]:
    """Fills `length` masked tokens at `{answer}`, or after the prompt."""
    from tinyld.predict import load

    sampling, steps = options.sampling(), []
    options.check_width(options.length)
    path, base = options.run or options.base or default_base(), options.base if options.run else None
    run = load(path, base, options.device, options.dtype, options.base_dtype, reading=options.reading())
    watch = steps.append if options.show_steps else None
    texts, passes = run.fill(options.prompt, options.length, options.num, sampling, watch)
    return {"samples": texts, "forward_passes": passes} | ({"steps": steps} if options.show_steps else {})


def show_samples(result: dict[str, Any], options: SampleOptions) -> None:
    for i, text in enumerate(result["samples"]):
        shown = [step[i] for step in result.get("steps", ())]
        for n, step in enumerate(shown, 1):
            if n == 1 or step != shown[n - 2]:  # it may wait for other texts
                print(plain(f"{n:>4}  {step}"))
        print(plain(text))


def export(options: ExportOptions) -> dict[str, Any]:
    """Writes a base as a transformers folder."""
    from tinyld.checkpoint import load_base
    from tinyld.hf import export_bert

    run, out = options.run, options.out
    if is_foreign(run):
        raise TinyldError(f"{run} is a public model, which transformers reads as it is")
    way_out = "of a weight-lora adapter tinyld merge makes one"
    check(RunFolder.open(run).config["kind"] == "base", f"{run} is no base; {way_out}", TinyldError)
    export_bert(load_base(run), out)
    return {"out": str(out), "load": f"transformers.AutoModelForMaskedLM.from_pretrained({str(out)!r})"}


def merge(options: MergeOptions) -> dict[str, Any]:
    """Folds a weight-lora adapter into its base, and writes a base that answers for its task."""
    from tinyld.checkpoint import load_adapter, save_base

    run, out = options.run, options.out
    made = RunFolder.open(run).config.get("method", {})
    if made.get("name") != "weight-lora":
        raise TinyldError(f"{run} is no weight-lora adapter, which alone this takes: finetune --method weight-lora")
    pointed = f"{run} copies from its prompts by a pointer, which no base has: finetune --set pointer=0"
    check(not made.get("pointer"), pointed, TinyldError)
    base, method = load_adapter(RunFolder(run), options.base)
    refuse_inside(out, [run, base.path])
    if base.dtype != "fp32":
        raise TinyldError(f"{run} was trained on a base in {base.dtype}; only one in fp32 can be merged")
    method.merge(base.model)
    tensors = finite(dict(base.model.named_parameters()), f"{run} in {base.path}")
    target, config = RunFolder.create(out, options.force), RunFolder(run).config
    made = {"kind": "base", "model": to_dict(base.model.config), "data": {"files": [str(base.path)], "tokens": 0}}
    made = made if is_foreign(base.path) else RunFolder(base.path).config
    made["merged"] = {"run": str(run), "base": base.fingerprint, "task": config["task"], "data": config["data"]}
    save_base(target, tensors, base.tokenizer, "fp32")
    target.write_json(CONFIG, made | {"environment": environment()})  # last: without it there is no run
    return {"run": str(out), "parameters": base.model.config.num_parameters()}


DEMO = (
    "finetune --task reviews --recipe best --out {out}/reviews{train}",
    "finetune --task topics --recipe fast --out {out}/topics{train}",
    "eval {out}/reviews {out}/topics --split test{more}",
    "predict {out}/reviews --text 'i would not go back, the service was terrible'{more}",
    "predict {out}/topics --text 'the band played two new songs on friday'{more}",
    "compose {out}/reviews {out}/topics --split test --limit 200 --out {out}/composed{force}{more}",
)


def demo(options: DemoOptions) -> None:
    """Two bundled tasks, one adapter each, that label a new sentence and are composed: the whole path, as commands."""
    from tinyld.cli import app

    out, say = options.out, say_to_stderr(options.quiet)
    force = " --force" * options.force
    more = f" --dtype {options.dtype}" * (options.dtype != "auto") + " --quiet" * options.quiet
    train = force + more + (f" --limit {options.limit}" if options.limit else "")
    for line in DEMO:
        command = line.format(out=shlex.quote(str(out)), train=train, force=force, more=more)
        say(f"-- tinyld {command}")
        app(shlex.split(command), standalone_mode=False)  # which exits where it fails
    print("next: tinyld finetune --data mine.csv --out runs/mine     (columns text and label)")
    print("      tinyld predict runs/mine new.csv --out answered.csv")

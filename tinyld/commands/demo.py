"""`tinyld demo`."""

from __future__ import annotations

from pathlib import Path

from tinyld.commands.compose import ComposeJob, compose
from tinyld.commands.evaluate import evaluate_run, load_run, print_evaluations, raise_first, remember, rows_for
from tinyld.commands.finetune import finetune, finetune_job
from tinyld.commands.workspace import say_to_stderr
from tinyld.config import DiffusionConfig, SampleConfig
from tinyld.errors import TinyldError
from tinyld.tasks import load_task


def demo(out: Path, limit: int | None, epochs: float, force: bool, quiet: bool) -> None:
    """Two bundled tasks, one adapter each, evaluated and composed: the whole path in one command."""

    if out.exists() and not force:
        raise TinyldError(f"{out} exists: choose another --out, or --force to replace it")
    say = say_to_stderr(quiet)
    runs = []
    records = []
    for name in ("reviews", "topics"):
        say(f"-- tinyld finetune --method trajectory-lora --task {name} --out {out / name}")
        job = finetune_job(name, "trajectory-lora", {}, None, None, limit, DiffusionConfig(), {"epochs": epochs})
        runs.append(finetune(job, out / name, force, False, quiet))
        say(f"-- tinyld eval {out / name} --split test")
        base, _ = load_run(runs[-1], None, "auto")
        rows = rows_for(base, load_task(name), "test", None)
        found = evaluate_run(base, rows, SampleConfig(), 4, "auto", quiet)
        records.append({"run": str(runs[-1]), "split": "test", **found.record()})
        raise_first([remember(runs[-1], f"{name}/test", records[-1])])
    print_evaluations("each adapter on its own task", records)
    say(f"-- tinyld compose {runs[0]} {runs[1]} --split test --out {out / 'composed'}")
    job = ComposeJob(None, None, None, None, None, 0, "test", None, None, None, 0, "auto", quiet)
    compose(runs, job, out / "composed", None, force, False)

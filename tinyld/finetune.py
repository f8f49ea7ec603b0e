"""Fine-tuning: a base, a task and a method -> an adapter in a run folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tinyld.cache import FixedMasks, StateCache, why_not_cached
from tinyld.checkpoint import Adapted, method_record, sizes
from tinyld.config import DiffusionConfig, TrainConfig, to_dict
from tinyld.data import TaskRows
from tinyld.device import autocast, resolve_dtype
from tinyld.distributed import Processes, is_writer
from tinyld.evaluate import evaluate
from tinyld.methods import TrajectoryLora
from tinyld.methods.bands import BAND_EDGES
from tinyld.progress import Progress
from tinyld.router import prompt_prototype
from tinyld.runs import ADAPTER, CONFIG, PROTOTYPE, RESULTS, RunFolder, check_unchanged, environment
from tinyld.train import Noising, Objective, train

DEV_ROWS = 1_000  # dev rows scored while training; the final evaluation reads all


def finetune(
    folder: RunFolder,
    adapted: Adapted,
    train_rows: TaskRows,
    dev_rows: TaskRows,
    diffusion: DiffusionConfig,
    config: TrainConfig,
    cache_gb: float,
    data: Path | None,
    limit: int | None = None,
    resume: bool = False,
    from_step: int | None = None,
    allow_changed: bool = False,
    processes: Processes | None = None,
    quiet: bool = False,
    say: Any = print,
) -> dict[str, Any]:
    """Trains the attached method and returns the run's results, which are also in its results.json."""
    base, method = adapted.base, adapted.method
    model, tokenizer = base.model, base.tokenizer
    device = model.embedding.weight.device
    counts = sizes(method, base)
    if resume:
        check_unchanged(folder.path, folder.config, train_rows.digest(), allow_changed)
    else:
        folder.write_json(
            CONFIG,
            {
                "kind": "adapter",
                "task": adapted.task,
                "method": method_record(method),
                "base": {"path": str(base.path.resolve()), "fingerprint": base.fingerprint, "dtype": base.dtype},
                "band_edges": list(BAND_EDGES),
                "diffusion": to_dict(diffusion),
                "train": to_dict(config),
                "cache_gb": cache_gb,
                "data": {
                    "folder": data and str(data.resolve()),
                    "limit": limit,
                    "rows": len(train_rows),
                    "truncated": train_rows.truncated,
                    "sha256": train_rows.digest(),
                },
                "parameters": counts,
                "environment": environment(),
            },
        )
    say(
        f"{method.name} on {train_rows.task.name}: {len(train_rows):,} rows; "
        f"trainable {counts['trainable_parameters']:,}, stored {counts['stored_parameters']:,} "
        f"({counts['stored_percent']:.2f}% of the base, {counts['stored_bytes']:,} bytes), "
        f"base {counts['base_parameters']:,} ({base.bytes / 2**20:.1f} MiB as {base.dtype})"
    )
    dtype = resolve_dtype(config.dtype, device)
    started = time.perf_counter()
    depths = method.first_depth + 1 if method.reads_depths else 1
    draws = 1 if train_rows.slot == 1 else diffusion.mask_draws
    reason = why_not_cached(train_rows, method.first_depth, model.config.d_model, cache_gb, depths, draws)
    objective: Noising = Objective(diffusion, tokenizer.mask_id, counted=True, seed=config.seed)
    if reason is None or diffusion.mask_draws:  # a one-token answer has one mask, drawn anew or not
        masks = FixedMasks(train_rows, diffusion, tokenizer.mask_id, config.seed, config.batch_size, draws)
        objective = masks
    if reason is None:
        with Progress("cache", draws * len(train_rows), quiet=quiet) as bar:
            objective = StateCache(
                model, masks, method.first_depth, lambda: autocast(device, dtype), bar.advance_to,
                method.reads_depths,
            )  # fmt: skip
    elif method.first_depth > 0:
        say(f"frozen states are not cached: {reason}")
    cache_seconds = time.perf_counter() - started

    def held_out() -> dict[str, float]:
        answer = not dev_rows.task.is_generation  # a text that was written has no accuracy, and takes a pass a token
        found = evaluate(model, dev_rows, tokenizer, limit=DEV_ROWS, answer=answer).record()
        return {f"dev_{k}": found[k] for k in ("accuracy", "unreadable", "masked_acc", "nll_bound") if k in found}

    result = train(
        model,
        method.own,
        train_rows,
        objective,
        config,
        folder,
        held_out,
        f"{method.name} {train_rows.task.name}",
        penalty=method.penalty if method.penalty() is not None else None,
        after_update=method.after_update,
        resume=resume,
        from_step=from_step,
        processes=processes,
        quiet=quiet,
    )
    started_as, metrics = method_record(method), result.metrics
    method.finish()
    changed = method_record(method) != started_as
    if changed:  # what was measured last is not what is stored
        counts = sizes(method, base)
        with autocast(device, dtype):
            metrics = held_out()
        say(f"stored {counts['stored_parameters']:,} parameters ({counts['stored_percent']:.2f}% of the base)")
    folder.write_tensors(ADAPTER, method.own)
    if method.name == TrajectoryLora.name:
        folder.write_tensors(PROTOTYPE, {"prototype": prompt_prototype(base, train_rows)})
    if changed and is_writer():
        now = {"method": method_record(method), "started_as": started_as, "parameters": counts}
        folder.write_json(CONFIG, folder.config | now)
    summary = {
        "task": train_rows.task.name,
        "method": method.name,
        "rows": len(train_rows),
        "steps": result.steps,
        "seconds": round(result.seconds + cache_seconds, 2),
        "cache_seconds": round(cache_seconds, 2),
        "peak_memory_mb": result.peak_memory_mb,
        **counts,
        **metrics,
    }
    folder.close_log()
    folder.write_json(RESULTS, {"finetune": summary})
    folder.remove_checkpoints()
    return summary

"""Pretraining: text files -> tokenizer, token stream -> denoiser -> a base in a run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyld.checkpoint import load_base, load_exactly, save_base
from tinyld.config import PRESETS, VOCAB_SIZES, DiffusionConfig, ModelConfig, TrainConfig, check, from_dict, to_dict
from tinyld.corpus import Corpus, held_out_part, read_corpus, sample, text_bytes
from tinyld.data import TextRows, torch_seeded
from tinyld.device import DTYPES, resolve_device, resolve_dtype
from tinyld.distributed import Processes
from tinyld.environment import check_unchanged, environment, is_writer
from tinyld.errors import TinyldError
from tinyld.evaluate import text_nll
from tinyld.finetuning import resume
from tinyld.hf import Encoder, find_encoder, load_encoder, trim_vocabulary
from tinyld.model import Denoiser
from tinyld.options import PretrainOptions, Training, flag
from tinyld.progress import Progress
from tinyld.rows import bundled_data_dir
from tinyld.runs import CONFIG, INITIAL, MODEL, RESULTS, TOKENIZER, RunFolder
from tinyld.tokenizer import Tokenizer, find_text_files, read_lines
from tinyld.train import Objective, TrainingRun
from tinyld.workspace import RUNS, keep_freed_memory, refuse_inside, say_to_stderr

HELD_OUT_ROWS = 64  # rows of held-out text scored while training; `tinyld eval BASE --text` reads all


def save_dtype_of(config: dict[str, Any]) -> torch.dtype:
    """The stored type that a run's config.json asks for."""
    return DTYPES["bf16" if config["save_dtype"] == "bfloat16" else "fp32"]


def load_start(folder: Path, max_length: int) -> Encoder:
    """What `--init` starts from: a base of our own, whose length stays, or an encoder in a Hugging Face folder."""
    if not RunFolder(folder).is_run():
        return load_encoder(folder, max_length)
    base = load_base(folder)
    origin = {"folder": str(folder.resolve()), "sha256": RunFolder(folder).digest(MODEL)}
    return Encoder(base.model.config, dict(base.model.named_parameters()), base.tokenizer, origin, has_head=True)


@torch.no_grad()
def average(parameters: Mapping[str, nn.Parameter], initial: Mapping[str, Tensor], share: float) -> None:
    """Moves the parameters `share` of the way back to their initial values."""
    for name, parameter in parameters.items():
        parameter.lerp_(initial[name].to(parameter), share)


def unigram_nll(counts: np.ndarray, held_out: np.ndarray) -> float:
    """Nats per token of held-out text under add-one unigram counts: what knowing no context gives. Both (V,) counts."""
    logp = np.log((counts + 1.0) / (counts + 1.0).sum())
    return float(-(held_out * logp).sum() / held_out.sum())


@dataclass(frozen=True)
class Job:
    """A pretraining run with nothing left open: what a new one was asked, or what an old one recorded."""

    data: Sequence[Path]
    valid: Sequence[Path]
    model_shape: dict[str, int]
    vocab_size: int
    diffusion: DiffusionConfig
    training: TrainConfig
    save_dtype: torch.dtype
    encoder: Encoder | None = None  # what to start from
    trim_vocab: int | None = None  # pieces that its tokenizer is trimmed to
    keep_init: float = 0.0  # share of the encoder's weights in what is written (WiSE-FT, arXiv 2109.01903)
    convert_only: bool = False  # the encoder is written as it is, untrained


def pretrain(options: PretrainOptions) -> dict[str, Any]:
    """Trains a base in a new run folder, or goes on with one; returns its results, which are also in the folder."""
    keep_freed_memory()
    if options.resume is not None:
        return resume(options)
    out = options.out or RUNS / f"base-{options.preset}-s{options.seed}"
    find_text_files([*options.data, *options.valid])
    job = job_of(options, out)
    processes = Processes.join(resolve_device(job.training.device))
    with ExitStack() as stack:

        def open_folder() -> RunFolder:
            folder = processes.open_run(out, lambda: RunFolder.create(out, options.force))
            stack.enter_context(folder.locked())
            return folder

        return {"run": str(out), **run_pretraining(job, open_folder, options, processes)}


def job_of(options: PretrainOptions, out: Path) -> Job:
    """What was left open is filled in: the preset's sizes, 10 minutes, the bundled text."""
    sizes = ("d_model", "num_layers", "num_heads", "d_ff", "max_length")
    given = {name: getattr(options, name) for name in sizes if getattr(options, name) is not None}
    path = None if options.init is None else find_encoder(options.init)
    own = path is not None and RunFolder(path).is_run()
    if path is None:
        for name in ("trim_vocab", "keep_init", "body_lr", "body_start"):
            check(not getattr(options, name), f"{flag(name)} needs --init")
    else:
        fixed = [name for name in (*sizes[:-1], "vocab_size") if getattr(options, name)]
        check(not fixed, "--init brings its own sizes; only --max-length and --trim-vocab may change them")
        check(not (own and options.max_length), "--max-length cannot change what a tinyld base was trained at")
    check(0 <= options.keep_init < 1, f"keep_init is a share between 0 and 1, got {options.keep_init:g}")
    training = options.only(TrainConfig)
    convert_only = path is not None and options.minutes == 0
    if convert_only:
        training |= {"steps": 1, "minutes": None}
    elif options.steps is None and options.tokens is None and options.minutes is None:
        training |= {"minutes": 10.0}
    fresh_head = path is not None and not own
    training["body_lr"] = (0.1 if fresh_head else 1.0) if options.body_lr is None else options.body_lr
    training["body_start"] = (0.1 if fresh_head else 0.0) if options.body_start is None else options.body_start
    config = TrainConfig(**training)
    shape, vocab_size = PRESETS[options.preset] | given, options.vocab_size or VOCAB_SIZES[options.preset]
    ModelConfig(vocab_size=vocab_size, **shape)
    diffusion = DiffusionConfig(schedule=options.schedule, loss=options.loss)
    resolve_dtype(config.dtype, resolve_device(config.device))
    if is_writer():
        RunFolder.check_free(out, options.force)
    encoder = None
    if path is not None:
        encoder = load_start(path, shape["max_length"])
        refuse_inside(out, [path])
    data = options.data or (bundled_data_dir() / "corpus.txt.gz",)
    return Job(data, options.valid, shape, vocab_size, diffusion, config, DTYPES[options.save_dtype], encoder,
               options.trim_vocab, options.keep_init, convert_only)  # fmt: skip


def go_on(folder: RunFolder, diffusion: DiffusionConfig, training: TrainConfig, options: Training) -> dict[str, Any]:
    """The rest of an interrupted run; its results."""
    config = folder.config
    shape = {k: v for k, v in config["model"].items() if k != "vocab_size"}
    files, valid = ([Path(p) for p in paths] for paths in (config["data"]["files"], config["valid"]))
    job = Job(files, valid, shape, config["model"]["vocab_size"], diffusion, training, save_dtype_of(config),
              keep_init=config["keep_init"])  # fmt: skip
    processes = Processes.join(resolve_device(training.device))
    return run_pretraining(job, lambda: processes.open_run(folder.path, lambda: folder), options, processes, True)


def run_pretraining(
    job: Job, open_folder: Callable[[], RunFolder], options: Training, processes: Processes, resume: bool = False
) -> dict[str, Any]:
    """Trains a base and returns its results, which are also in its results.json.

    `open_folder` is called once the text is known to be good, and gives the new folder, or with `resume` the old one.
    """
    config, encoder, data, valid = job.training, job.encoder, job.data, job.valid
    quiet, say = options.quiet or not is_writer(), say_to_stderr(options.quiet)
    device = resolve_device(config.device)
    files = find_text_files(data)
    valid_files = find_text_files(valid) if valid else files
    training, held = (None, None) if valid else (False, True)  # which part of its files each of the two is

    def read(which: str, tokenizer: Tokenizer) -> Corpus:
        paths, part = (files, training) if which == "text" else (valid_files, held)
        with Progress(f"tokenize {which}", text_bytes(paths), quiet=quiet) as bar:
            corpus = read_corpus(paths, tokenizer, part, bar.advance_to)
        if not corpus.documents:
            raise TinyldError(f"too little text in {', '.join(map(str, paths))}: no document to be {which}")
        return corpus

    if resume:
        folder = open_folder()
        tokenizer = Tokenizer.load(folder.path / TOKENIZER)
        model_config = from_dict(ModelConfig, folder.config["model"], str(folder.path / CONFIG))
    elif encoder is not None:
        if job.trim_vocab is not None:
            used = read("text", encoder.tokenizer).counts
            encoder = trim_vocabulary(encoder, dict(enumerate(used.tolist())), job.trim_vocab)
        tokenizer, model_config = encoder.tokenizer, encoder.config
    else:
        say(f"training a tokenizer of {job.vocab_size:,} pieces on {', '.join(map(str, data))}")
        lines = sample(files, read_lines(files))
        tokenizer = Tokenizer.train(lines if valid else held_out_part(lines, held_out=False), job.vocab_size)
        model_config = ModelConfig(vocab_size=tokenizer.vocab_size, **job.model_shape)
    text, held_out = read("text", tokenizer), read("held-out text", tokenizer)
    rows = TextRows(text.stream, model_config.max_length, tokenizer.bos_id)
    held_out_length = min(model_config.max_length, max(2, len(held_out.stream) // 2))
    held_out_rows = TextRows(held_out.stream, held_out_length, tokenizer.bos_id)
    unigram = unigram_nll(text.counts, held_out.counts)
    data_facts = {
        "files": [str(f.resolve()) for f in files],
        "documents": text.documents,
        "tokens": len(text.stream),
        "sha256": text.sha256,
        "held_out_tokens": len(held_out.stream),
        "unigram_nll": unigram,
    }
    if resume:
        check_unchanged(folder.path, folder.config, data_facts["sha256"], options.allow_changed)
    else:
        folder = open_folder()
        folder.write(TOKENIZER, tokenizer.to_json().encode())
        folder.write_json(
            CONFIG,
            {
                "kind": "base",
                "model": to_dict(model_config),
                "diffusion": to_dict(job.diffusion),
                "train": to_dict(config),
                "save_dtype": str(job.save_dtype).removeprefix("torch."),
                "data": data_facts,
                "valid": [str(v.resolve()) for v in valid],
                "warm_start": encoder and encoder.origin,
                "keep_init": job.keep_init,
                "environment": environment(),
            },
        )
    model = Denoiser(model_config, torch_seeded(config.seed, 0))
    if encoder is not None:
        load_exactly(dict(model.named_parameters()), encoder.tensors, folder.path)
    model.to(device)
    say(
        f"{model_config.num_parameters():,} parameters, {len(text.stream):,} tokens of text; "
        f"a unigram model has {unigram:.3f} nats/token on the held-out text"
    )

    def evaluate() -> dict[str, float]:
        bound = text_nll(model, held_out_rows, tokenizer.mask_id, limit=HELD_OUT_ROWS)
        return {"nll_bound": bound.mean, "nll_stderr": bound.stderr}

    objective = Objective(job.diffusion, tokenizer.mask_id, counted=False, seed=config.seed)
    parameters = dict(model.named_parameters())
    warm = folder.config["warm_start"] if resume else encoder
    if resume and warm and not folder.checkpoints():
        raise TinyldError(f"{folder.path} was stopped before its first checkpoint; start it again with --force")
    body = {n for n in parameters if warm and not n.startswith(("head_transform", "output_bias"))}
    run = TrainingRun(
        model, parameters, rows, objective, config, folder, evaluate, "pretrain", body=frozenset(body),
        processes=processes, quiet=quiet,
    )  # fmt: skip
    if job.convert_only:
        model.eval()
        run.metrics = evaluate()
    else:
        if job.keep_init and not resume:
            folder.write_tensors(INITIAL, parameters)
        run.train(resume, options.from_step)
        if job.keep_init and is_writer():
            average(parameters, folder.read_tensors(INITIAL), job.keep_init)
            with run.autocast():
                run.metrics = evaluate()
        folder.close_log()
    save_base(folder, model, parameters, tokenizer, job.save_dtype)
    summary = {
        "parameters": model_config.num_parameters(),
        "steps": run.step,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "tokens_per_second": run.tokens / max(run.seconds, 1e-9),
        "peak_memory_mb": run.peak_memory_mb,
        "unigram_nll": unigram,
        **run.metrics,
    }
    folder.write_json(RESULTS, {"pretrain": summary})
    folder.remove(INITIAL)
    folder.remove_checkpoints()
    return summary

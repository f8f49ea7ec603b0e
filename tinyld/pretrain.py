"""Pretraining: text files -> tokenizer, token stream -> denoiser -> a base in a run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyld.checkpoint import load_base, load_exactly, save_base
from tinyld.config import DiffusionConfig, ModelConfig, TrainConfig, from_dict, to_dict
from tinyld.corpus import Corpus, held_out_part, read_corpus, sample, text_bytes
from tinyld.data import TextRows, torch_seeded
from tinyld.device import DTYPES, autocast, resolve_device, resolve_dtype
from tinyld.distributed import Processes, is_writer
from tinyld.errors import TinyldError
from tinyld.evaluate import text_nll
from tinyld.hf import Encoder, load_encoder, trim_vocabulary
from tinyld.model import Denoiser
from tinyld.progress import Progress
from tinyld.runs import CONFIG, INITIAL, MODEL, RESULTS, TOKENIZER, RunFolder, check_unchanged, environment
from tinyld.tokenizer import Tokenizer, find_text_files, read_lines
from tinyld.train import Objective, TrainResult, train

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


def pretrain(
    open_folder: Callable[[], RunFolder],
    data: list[Path],
    valid: list[Path],
    model_shape: dict[str, int],
    vocab_size: int,
    diffusion: DiffusionConfig,
    config: TrainConfig,
    save_dtype: torch.dtype,
    encoder: Encoder | None = None,
    trim_vocab: int | None = None,
    keep_init: float = 0.0,
    convert_only: bool = False,
    resume: bool = False,
    from_step: int | None = None,
    allow_changed: bool = False,
    processes: Processes | None = None,
    quiet: bool = False,
    say: Any = print,
) -> dict[str, Any]:
    """Trains a base and returns its summary.

    `encoder` is what to start from, whose tokenizer may be trimmed to `trim_vocab` pieces; with `convert_only` it is
    written as it is, untrained. What is written is `keep_init` of its weights and the rest of the trained ones: an
    average in weight space keeps much of both (WiSE-FT, arXiv 2109.01903). `open_folder` is called once the text is
    known to be good, and gives the new folder, or with `resume` the old one.
    """
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
        if trim_vocab is not None:
            used = read("text", encoder.tokenizer).counts
            encoder = trim_vocabulary(encoder, dict(enumerate(used.tolist())), trim_vocab)
        tokenizer, model_config = encoder.tokenizer, encoder.config
    else:
        say(f"training a tokenizer of {vocab_size:,} pieces on {', '.join(map(str, data))}")
        lines = sample(files, read_lines(files))
        tokenizer = Tokenizer.train(lines if valid else held_out_part(lines, held_out=False), vocab_size)
        model_config = ModelConfig(vocab_size=tokenizer.vocab_size, **model_shape)
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
        check_unchanged(folder.path, folder.config, data_facts["sha256"], allow_changed)
    else:
        folder = open_folder()
        folder.write(TOKENIZER, tokenizer.to_json().encode())
        folder.write_json(
            CONFIG,
            {
                "kind": "base",
                "model": to_dict(model_config),
                "diffusion": to_dict(diffusion),
                "train": to_dict(config),
                "save_dtype": str(save_dtype).removeprefix("torch."),
                "data": data_facts,
                "valid": [str(v.resolve()) for v in valid],
                "warm_start": encoder and encoder.origin,
                "keep_init": keep_init,
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

    objective = Objective(diffusion, tokenizer.mask_id, counted=False, seed=config.seed)
    parameters = dict(model.named_parameters())
    if convert_only:
        model.eval()
        result = TrainResult(0, 0, 0.0, 0.0, evaluate())
    else:
        warm = folder.config["warm_start"] if resume else encoder
        if resume and warm and not folder.checkpoints():
            raise TinyldError(f"{folder.path} was stopped before its first checkpoint; start it again with --force")
        body = (
            frozenset(n for n in parameters if not n.startswith(("head_transform", "output_bias")))
            if warm
            else frozenset()
        )
        if keep_init and not resume:
            folder.write_tensors(INITIAL, parameters)
        result = train(
            model,
            parameters,
            rows,
            objective,
            config,
            folder,
            evaluate,
            "pretrain",
            body=body,
            resume=resume,
            from_step=from_step,
            processes=processes,
            quiet=quiet,
        )
        if keep_init and is_writer():
            average(parameters, folder.read_tensors(INITIAL), keep_init)
            with autocast(device, resolve_dtype(config.dtype, device)):
                result = replace(result, metrics=evaluate())
        folder.close_log()
    save_base(folder, model, parameters, tokenizer, save_dtype)
    summary = {
        "parameters": model_config.num_parameters(),
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens / max(result.seconds, 1e-9),
        "peak_memory_mb": result.peak_memory_mb,
        "unigram_nll": unigram,
        **result.metrics,
    }
    folder.write_json(RESULTS, {"pretrain": summary})
    folder.remove(INITIAL)
    folder.remove_checkpoints()
    return summary

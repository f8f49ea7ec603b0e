"""Pretraining: text files -> tokenizer, token stream -> denoiser -> a base in a run folder."""

import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tinyld.checkpoint import Base, load_base, load_exactly, save_base
from tinyld.config import BUDGETS, PRESETS, ModelConfig, Reading, TrainConfig, check, from_dict, to_dict
from tinyld.copying import Copying
from tinyld.corpus import HELD_OUT, Corpus, draw, held_out_part, sample, text_bytes, tokenize
from tinyld.data import TextRows, torch_seeded
from tinyld.device import resolve_device, resolve_dtype
from tinyld.diffusion import noise_text
from tinyld.distributed import Processes
from tinyld.errors import TinyldError
from tinyld.evaluate import text_nll
from tinyld.finetuning import resume, run_folder
from tinyld.foreign import load_foreign, read_foreign
from tinyld.hf import find_encoder
from tinyld.model import Denoiser
from tinyld.options import PretrainOptions, Training, refuse_idle
from tinyld.progress import Progress
from tinyld.rows import bundled_data_dir
from tinyld.runs import CONFIG, TOKENIZER, RunFolder, is_writer
from tinyld.tokenizer import Tokenizer, find_text_files, read_lines
from tinyld.train import TrainingRun
from tinyld.workspace import RUNS, keep_freed_memory, refuse_inside, say_to_stderr

LR, LR_ON = 3e-3, 7e-4  # of Muon, where none is given; the second goes on with a base of ours
FEW_BYTES = 10_000_000  # of text, which is looked through for a document to hold out
HELD_OUT_ROWS = 64  # rows of held-out text scored while training; `tinyld eval BASE --text` reads all


def unigram_nll(counts: np.ndarray, held_out: np.ndarray) -> float:
    """Nats per token of held-out text under add-one unigram counts: what knowing no context gives. Both (V,) counts."""
    logp = np.log((counts + 1.0) / (counts + 1.0).sum())
    return float(-(held_out * logp).sum() / held_out.sum())


def pretrain(options: PretrainOptions) -> dict[str, Any]:
    """Trains a base in a new run folder, or goes on with one; returns its results, which are also in the folder."""
    keep_freed_memory()
    if options.resume is not None:
        return resume(options)
    out = options.out or RUNS / f"base-{options.preset}-s{options.seed}"
    path = None if options.init is None else find_encoder(options.init)
    refuse_inside(out, [path] if path else [], [*options.data, *options.valid])
    own = path is not None and RunFolder(path).is_run()
    preset = PRESETS[options.preset]
    given = {name: size for name in preset if (size := getattr(options, name)) is not None}
    if path is None:
        refuse_idle(options, ["body_lr", "body_start"], "without --init")
    else:
        sizes = [name for name in preset if own or name != "max_length"]  # of a public encoder that may be less
        refuse_idle(options, ["preset", *sizes], "with --init, which brings its own sizes")
    share = 0.1 if path is not None and not own else None  # of an encoder that had no head of ours
    usual = {"lr": LR_ON if own else LR, "body_lr": share or (0.6 if own else 1.0), "body_start": share or 0.0}
    training = options.only(TrainConfig)
    training |= {name: value for name, value in usual.items() if training[name] is None}
    if all(training.get(budget) is None for budget in BUDGETS):
        training["minutes"] = 10.0
    train = TrainConfig(**training)
    resolve_dtype(train.dtype, resolve_device(train.device))
    config = {"kind": "base", "model": to_dict(ModelConfig(**preset | given)), "train": to_dict(train)}
    config |= {"save_dtype": options.save_dtype, "valid": [str(p) for p in options.valid]}
    config |= {"data": {"files": [str(p) for p in options.data or (bundled_data_dir() / "corpus.txt.gz",)]}}
    if is_writer():
        RunFolder.check_free(out, options.force)
    encoder = None
    if own:
        encoder = load_base(path)
    elif path is not None:
        length = options.max_length or min(config["model"]["max_length"], read_foreign(path).longest)
        encoder = load_foreign(path, reading=Reading(max_length=length), headless=True)
    return train_base(config, out, options, None, encoder)


def train_base(
    config: dict[str, Any], out: Path, options: Training, begun: RunFolder | None = None, encoder: Base | None = None
) -> dict[str, Any]:
    """Trains a base as the config says, from an encoder if there is one, in a new run or one that was `begun`; its
    results, which are also in results.json. A new folder is made once the text is known to be good."""
    where = str(out / CONFIG)
    quiet, say = options.quiet or not is_writer(), say_to_stderr(options.quiet)
    training = from_dict(TrainConfig, config["train"], where)
    device = resolve_device(training.device)
    processes = Processes.join(device)
    if begun and config["warm_start"] and not begun.checkpoints():
        raise TinyldError(f"{out} was stopped before its first checkpoint; start it again with --force")
    files, valid = (find_text_files(list(map(Path, paths))) for paths in (config["data"]["files"], config["valid"]))
    if both := {os.path.realpath(f) for f in files} & {os.path.realpath(f) for f in valid}:
        say(f"{min(both)} is in --data and in --valid: what is measured on it is not held out")
    share = HELD_OUT
    if not valid and text_bytes(files) < FEW_BYTES:  # chance may leave none of a few documents
        share = max(share, min(map(draw, read_lines(files)), default=0.0) + 2**-32)

    def part(lines: Iterable[str], held_out: bool) -> Iterable[str]:
        return lines if valid else held_out_part(lines, held_out, share)

    def read(which: str, paths: list[Path], held_out: bool) -> Corpus:
        with Progress(f"tokenize {which}", text_bytes(paths), quiet=quiet) as bar:
            corpus = tokenize(part(read_lines(paths), held_out), tokenizer, bar.advance_to)
        lacks = f"no document (a line) to be {which}; give more, or --valid"
        check(corpus.documents > 0, f"too little text in {', '.join(map(str, paths))}: {lacks}", TinyldError)
        return corpus

    shape = from_dict(ModelConfig, config["model"], where)
    if begun:
        tokenizer = Tokenizer.parse(begun.read(TOKENIZER), out / TOKENIZER)
    elif encoder is not None:
        tokenizer, shape = encoder.tokenizer, encoder.model.config
    else:
        say(f"training a tokenizer on {', '.join(map(str, files))}")
        tokenizer = Tokenizer.train(part(sample(files, read_lines(files)), held_out=False), shape.vocab_size)
        shape = replace(shape, vocab_size=tokenizer.vocab_size)
        say(f"it has {tokenizer.vocab_size:,} pieces")
    text, held_out = read("text", files, False), read("held-out text", valid or files, True)
    change = Copying(tokenizer.pieces, text.counts, tokenizer.eos_id) if shape.max_length > 4 else None
    rows = TextRows(text.stream, shape.max_length, tokenizer.bos_id, change)
    held_out_length = min(shape.max_length, max(2, len(held_out.stream) // 2))
    held_out_rows = TextRows(held_out.stream, held_out_length, tokenizer.bos_id)
    model = Denoiser(shape, torch_seeded(training.seed, 0))
    parameters = dict(model.named_parameters())
    if encoder is not None:
        load_exactly(parameters, dict(encoder.model.named_parameters()), encoder.path)
    unigram = unigram_nll(text.counts, held_out.counts)
    data = {"files": [str(f.resolve()) for f in files], "documents": text.documents, "tokens": len(text.stream)}
    data |= {"sha256": text.sha256, "dev_sha256": held_out.sha256}
    data |= {"held_out_tokens": len(held_out.stream), "unigram_nll": unigram}
    facts = {"model": to_dict(shape), "data": data, "valid": [str(v.resolve()) for v in valid]}
    facts["warm_start"] = config["warm_start"] if begun else encoder and encoder.record()
    tokens = {TOKENIZER: tokenizer.to_json().encode()}
    with run_folder(out, config, facts, options, processes, begun, tokens) as (folder, results):
        model.to(device)
        read_tokens = f"{shape.num_parameters():,} parameters, {len(text.stream):,} tokens of text"
        say(f"{read_tokens}; a unigram model has {unigram:.3f} nats/token on the held-out text")

        def evaluate() -> dict[str, float]:
            bound = text_nll(model, held_out_rows, tokenizer.mask_id, limit=HELD_OUT_ROWS)
            return {"nll_bound": bound.mean, "nll_stderr": bound.stderr}

        body = [n for n in parameters if config["warm_start"] and not n.startswith(("head_transform", "output_bias"))]
        noise = partial(noise_text, mask_id=tokenizer.mask_id)
        run = TrainingRun(
            model, parameters, rows, noise, training, folder, evaluate, "pretrain", body=frozenset(body),
            processes=processes, quiet=quiet,
        ).train(begun is not None)  # fmt: skip
        save_base(folder, parameters, tokenizer, config["save_dtype"])
        results |= {"parameters": shape.num_parameters(), "steps": run.step, "tokens": run.tokens}
        results |= {"seconds": run.seconds, "tokens_per_second": run.tokens / max(run.seconds, 1e-9)}
        results |= {"peak_memory_mb": run.peak_memory_mb, "unigram_nll": unigram, **run.metrics}
    return {"run": str(out), **results}

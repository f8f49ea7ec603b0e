"""Options, help, and the turning of errors into one line and an exit code. No torch at import, no logic."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from tinyld import __version__
from tinyld.config import PRESETS, VOCAB_SIZES, DiffusionConfig, TrainConfig
from tinyld.errors import TinyldError, UsageError


class Group(TyperGroup):
    """Turns TinyldError into one line on stderr and its exit code."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TinyldError as error:
            print(f"tinyld: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None


app = typer.Typer(
    cls=Group,
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Masked diffusion language models, and their adaptation along the denoising trajectory.",
)

DEFAULT_TRAIN = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
DEFAULT_DIFFUSION = {f.name: f.default for f in dataclasses.fields(DiffusionConfig)}

Data = Annotated[list[Path] | None, typer.Option(help="Text file or folder (.txt, .txt.gz, .jsonl); may be repeated.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Budget: optimizer updates.")]
Tokens = Annotated[int | None, typer.Option(min=1, help="Budget: tokens read.")]
Minutes = Annotated[float | None, typer.Option(help="Budget: minutes of training on the clock.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of initialisation, data order and noise.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="Arithmetic; auto is bf16 where it is fast.")]
Out = Annotated[Path | None, typer.Option(help="Run folder to write; made if missing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the run that is in --out.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows an update reads.")]


def version(value: bool) -> None:
    if value:
        print(f"tinyld {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def pretrain(
    data: Data = None,
    valid: Annotated[list[Path] | None, typer.Option(help="Held-out text; default: 1% of the documents.")] = None,
    preset: Annotated[Literal["nano", "small", "base"], typer.Option(help="Model size.")] = "small",
    d_model: Annotated[int | None, typer.Option(help="Width.")] = None,
    num_layers: Annotated[int | None, typer.Option(help="Blocks.")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    d_ff: Annotated[int | None, typer.Option(help="Width inside the MLP.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens in a row.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=64, help="Pieces in the tokenizer.")] = None,
    steps: Steps = None,
    tokens: Tokens = None,
    minutes: Minutes = None,
    batch_size: BatchSize = DEFAULT_TRAIN["batch_size"],
    accumulate: Annotated[int, typer.Option(min=1, help="Micro-batches an update is split into.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    optimizer: Annotated[Literal["adamw", "muon"], typer.Option(help="muon: Muon for matrices inside blocks.")] = "muon",
    weight_decay: Annotated[float, typer.Option(help="Decoupled weight decay of matrices.")] = 0.1,
    warmup: Annotated[float, typer.Option(help="Share of the budget with a rising rate.")] = 0.02,
    decay: Annotated[Literal["linear", "cosine", "none"], typer.Option(help="Learning-rate decay.")] = "linear",
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0 for none.")] = DEFAULT_TRAIN["clip"],
    ema: Annotated[float, typer.Option(help="Decay of averaged weights; 0 for none.")] = DEFAULT_TRAIN["ema"],
    schedule: Annotated[Literal["linear", "cosine"], typer.Option(help="Noise schedule.")] = DEFAULT_DIFFUSION["schedule"],
    loss: Annotated[
        Literal["uniform", "elbo"], typer.Option(help="Plain cross-entropy, or weighted to the bound.")
    ] = DEFAULT_DIFFUSION["loss"],
    time_sampling: Annotated[
        Literal["uniform", "bell"], typer.Option(help="How t is drawn; bell is Beta(2, 2).")
    ] = DEFAULT_DIFFUSION["time_sampling"],
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between held-out evaluations.")] = 500,
    save_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = DEFAULT_TRAIN["save_minutes"],
    save_dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Type of the stored weights.")] = "fp32",
    resume: Annotated[Path | None, typer.Option(help="Run folder to go on with; needs no other option.")] = None,
    out: Out = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a base on text: tinyld pretrain --data texts/ --minutes 20 --out runs/base"""
    from tinyld import commands

    if resume is not None:
        return commands.pretrain_resume(resume, json=json, quiet=quiet)
    if steps is None and tokens is None and minutes is None:
        minutes = 10.0
    given = {"d_model": d_model, "num_layers": num_layers, "num_heads": num_heads, "d_ff": d_ff, "max_length": max_length}
    shape = PRESETS[preset] | {k: v for k, v in given.items() if v is not None}
    config = TrainConfig(
        steps=steps, tokens=tokens, minutes=minutes, batch_size=batch_size, accumulate=accumulate, lr=lr,
        optimizer=optimizer, weight_decay=weight_decay, warmup=warmup, decay=decay, clip=clip, ema=ema, seed=seed,
        dtype=dtype, device=device, eval_every=eval_every, save_minutes=save_minutes,
    )  # fmt: skip
    return commands.pretrain(
        out=out or Path("runs") / f"base-{preset}-s{seed}",
        data=data or [],
        valid=valid or [],
        shape=shape,
        vocab_size=vocab_size or VOCAB_SIZES[preset],
        diffusion=DiffusionConfig(schedule=schedule, loss=loss, time_sampling=time_sampling),
        config=config,
        save_dtype=save_dtype,
        force=force,
        json=json,
        quiet=quiet,
    )


def main() -> None:
    app()

"""Options, help, and the turning of errors into one line and an exit code. No torch at import, no logic."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "true")  # typer's pydantic looks for some at every start: 10 ms

import typer
from typer.core import TyperGroup

from tinyld import __version__
from tinyld.config import PRESETS, VOCAB_SIZES, DiffusionConfig, SampleConfig, TrainConfig
from tinyld.errors import TinyldError, UsageError
from tinyld.interrupt import Interrupted, raise_at_signals
from tinyld.runs import RunFolder


class Group(TyperGroup):
    """Turns TinyldError into one line on stderr and its exit code."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (TinyldError, Interrupted) as error:
            print(f"tinyld: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except (MemoryError, RuntimeError) as error:  # torch has words of its own for it
            if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
                raise
            print("tinyld: out of memory; lower --batch-size, --max-length or the rank", file=sys.stderr)
            raise typer.Exit(1) from None


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
Dtype = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="Arithmetic; auto is bf16 where it is fast.")
]
Out = Annotated[Path | None, typer.Option(help="Run folder to write; made if missing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the run that is in --out.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows an update reads.")]

Accumulate = Annotated[int, typer.Option(min=1, help="Micro-batches an update is split into.")]

Clip = Annotated[float, typer.Option(help="Largest gradient norm; 0 for none.")]


Recompute = Annotated[
    bool, typer.Option("--recompute", help="Activation checkpointing: less memory, a forward pass more.")
]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile for the blocks, where it works.")]
SaveMinutes = Annotated[float, typer.Option(help="Minutes between checkpoints.")]

Keep = Annotated[int, typer.Option(min=1, help="Checkpoints kept while training.")]

Resume = Annotated[Path | None, typer.Option(help="Run folder to go on with; needs no other option.")]

FromStep = Annotated[int | None, typer.Option(help="With --resume: from this checkpoint instead of the newest.")]

AllowChanged = Annotated[
    bool, typer.Option("--allow-changed", help="With --resume: go on though data, torch or threads differ.")
]


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
    init: Annotated[
        str | None,
        typer.Option(help="Start from a tinyld base, a Hugging Face folder of a BERT-family encoder, or minilm."),
    ] = None,
    trim_vocab: Annotated[int | None, typer.Option(min=64, help="With --init: keep this many pieces.")] = None,
    keep_init: Annotated[
        float, typer.Option(help="With --init: share of its weights in what is written; 0.5 averages start and end.")
    ] = 0.0,
    body_lr: Annotated[
        float | None, typer.Option(help="With --init: share of --lr for all but the head; 0.1, or 1 for a tinyld base.")
    ] = None,
    body_start: Annotated[
        float | None,
        typer.Option(help="With --init: share of the budget they stay frozen; 0.1, or 0 for a tinyld base."),
    ] = None,
    steps: Steps = None,
    tokens: Tokens = None,
    minutes: Minutes = None,
    batch_size: BatchSize = DEFAULT_TRAIN["batch_size"],
    accumulate: Accumulate = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    optimizer: Annotated[
        Literal["adamw", "muon"], typer.Option(help="muon: Muon for matrices inside blocks.")
    ] = "muon",
    weight_decay: Annotated[float, typer.Option(help="Decoupled weight decay of matrices.")] = 0.1,
    warmup: Annotated[float, typer.Option(help="Share of the budget with a rising rate.")] = 0.02,
    clip: Clip = DEFAULT_TRAIN["clip"],
    schedule: Annotated[Literal["linear", "cosine"], typer.Option(help="Noise schedule.")] = DEFAULT_DIFFUSION[
        "schedule"
    ],
    loss: Annotated[
        Literal["uniform", "elbo"], typer.Option(help="Plain cross-entropy, or weighted to the bound.")
    ] = DEFAULT_DIFFUSION["loss"],
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    recompute: Recompute = False,
    compile: Compile = False,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between held-out evaluations.")] = 500,
    save_minutes: SaveMinutes = DEFAULT_TRAIN["save_minutes"],
    keep: Keep = DEFAULT_TRAIN["keep"],
    save_dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Type of the stored weights.")] = "fp32",
    resume: Resume = None,
    from_step: FromStep = None,
    allow_changed: AllowChanged = False,
    out: Out = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a base on text (10 minutes if not told): tinyld pretrain --data texts/ --minutes 20 --out runs/base"""
    from tinyld.commands.finetune import resume as go_on
    from tinyld.commands.pretrain import pretrain

    if resume is not None:
        return go_on(resume, from_step, allow_changed, json=json, quiet=quiet)
    if steps is None and tokens is None and minutes is None:
        minutes = 10.0
    convert_only = init is not None and minutes == 0
    if convert_only:
        steps, minutes = 1, None
    if init is None and trim_vocab is not None:
        raise UsageError("--trim-vocab needs --init; without it the tokenizer is trained at --vocab-size")
    if keep_init and (init is None or not 0 < keep_init < 1):
        raise UsageError(f"--keep-init is a share between 0 and 1, and needs --init; got {keep_init:g}")
    if init is not None and (vocab_size or d_model or num_layers or num_heads or d_ff):
        raise UsageError("--init brings its own sizes; only --max-length and --trim-vocab may change them")
    own = init is not None and RunFolder(Path(init)).is_run()
    if own and max_length:
        raise UsageError("--max-length cannot change what a tinyld base was trained at")
    fresh_head = init is not None and not own
    given = {
        "d_model": d_model,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "d_ff": d_ff,
        "max_length": max_length,
    }
    shape = PRESETS[preset] | {k: v for k, v in given.items() if v is not None}
    config = TrainConfig(
        steps=steps, tokens=tokens, minutes=minutes, batch_size=batch_size, accumulate=accumulate, lr=lr,
        body_lr=(0.1 if fresh_head else 1.0) if body_lr is None else body_lr,
        body_start=(0.1 if fresh_head else 0.0) if body_start is None else body_start,
        optimizer=optimizer, weight_decay=weight_decay, warmup=warmup, clip=clip, seed=seed,
        dtype=dtype, device=device, recompute=recompute, compile=compile, eval_every=eval_every,
        save_minutes=save_minutes, keep=keep,
    )  # fmt: skip
    return pretrain(
        out=out or Path("runs") / f"base-{preset}-s{seed}",
        data=data or [],
        valid=valid or [],
        shape=shape,
        vocab_size=vocab_size or VOCAB_SIZES[preset],
        diffusion=DiffusionConfig(schedule=schedule, loss=loss),
        config=config,
        save_dtype=save_dtype,
        init=init,
        trim_vocab=trim_vocab,
        keep_init=keep_init,
        convert_only=convert_only,
        force=force,
        json=json,
        quiet=quiet,
    )


Method = Literal["full", "weight-lora", "adapters", "bitfit", "trajectory-lora"]
TaskName = Annotated[str, typer.Option(help="Built-in task, or the path of a task file (see: tinyld tasks).")]
DataFolder = Annotated[
    Path | None, typer.Option(help="Folder with <task>/train.tsv and so on; goes before $TINYLD_DATA.")
]
BasePath = Annotated[Path | None, typer.Option(help="Base run folder; default: the released base.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Read this many rows only.")]
Split = Annotated[Literal["train", "dev", "test"], typer.Option(help="Which rows.")]
Sampler = Annotated[
    Literal["low_confidence", "threshold", "ancestral"], typer.Option(help="How masked tokens are filled in.")
]
DenoiseSteps = Annotated[
    int | None, typer.Option("--steps", min=1, help="Denoising steps; default: one an answer token.")
]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token.")]
Threshold = Annotated[float, typer.Option(help="Sampler threshold: keep every token at least this likely.")]


def numbers(text: str | None, kind: type, option: str) -> tuple | None:
    """A comma-separated option as numbers."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} takes numbers with commas between them, got {text!r}") from None


def share(text: str | None, option: str) -> float | None:
    """`0.7%` or `0.007` as a share."""
    if text is None:
        return None
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UsageError(f"{option} takes a share such as 0.7% or 0.007, got {text!r}") from None
    if not 0 < value <= 1:
        raise UsageError(f"{option} must be above 0 and at most 100%, got {text!r}")
    return value


@app.command()
def finetune(
    task: TaskName = "reviews",
    method: Annotated[Method, typer.Option(help="What trains.")] = "trajectory-lora",
    base: BasePath = None,
    data: DataFolder = None,
    limit: Limit = None,
    recipe: Annotated[
        Literal["best", "fast", "paper"] | None,
        typer.Option(help="trajectory-lora: the most accurate, the fastest to train, or the paper's literal setting."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Largest share of the base that is stored, e.g. 0.7%; sets the rank.")
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(help="Rank by band, high noise first: 64,32,8. trajectory-lora: auto starts at twice the budget."),
    ] = None,
    sigma: Annotated[str | None, typer.Option(help="trajectory-lora: scale by band: 1,0.5,0.25.")] = None,
    modules: Annotated[int | None, typer.Option(help="trajectory-lora: pushes summed at one place.")] = None,
    blocks: Annotated[
        int | None, typer.Option(help="trajectory-lora: last blocks that are pushed; 0: final state.")
    ] = None,
    within: Annotated[
        bool | None,
        typer.Option(
            "--within/--no-within", help="trajectory-lora: push between attention and MLP of those blocks too."
        ),
    ] = None,
    tied: Annotated[
        bool | None, typer.Option("--tied/--no-tied", help="trajectory-lora: all places share their rank units.")
    ] = None,
    activation: Annotated[
        Literal["relu", "none"] | None, typer.Option(help="trajectory-lora: of the rank units; none: a linear push.")
    ] = None,
    sharing: Annotated[
        Literal["nested", "separate", "core", "smooth-core"] | None,
        typer.Option(help="trajectory-lora: how bands share rank units."),
    ] = None,
    read: Annotated[
        Literal["state", "mix"] | None, typer.Option(help="trajectory-lora: read one depth, or a mix of those below.")
    ] = None,
    attend: Annotated[int | None, typer.Option(help="trajectory-lora: units that attend to the prompt.")] = None,
    head_width: Annotated[
        int | None, typer.Option(help="trajectory-lora: how many of these look at the same tokens.")
    ] = None,
    read_attended: Annotated[
        bool | None,
        typer.Option("--read-attended/--no-read-attended", help="trajectory-lora: rank units read what these found."),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(help="trajectory-lora, weight-lora: share of the numbers read that an update does without."),
    ] = None,
    conditioning: Annotated[
        Literal["none", "gate"] | None, typer.Option(help="trajectory-lora: gate A by the pooled prompt states.")
    ] = None,
    lambda_rank: Annotated[float | None, typer.Option(help="trajectory-lora: weight of the nuclear norm.")] = None,
    lambda_orth: Annotated[float | None, typer.Option(help="trajectory-lora: weight of orthogonal modules.")] = None,
    rank: Annotated[int | None, typer.Option(help="weight-lora, adapters: rank.")] = None,
    alpha: Annotated[float | None, typer.Option(help="weight-lora: scale is alpha / rank.")] = None,
    targets: Annotated[str | None, typer.Option(help="weight-lora: query,key,value,out,up,down or some.")] = None,
    rslora: Annotated[bool | None, typer.Option("--rslora", help="weight-lora: scale is alpha / sqrt(rank).")] = None,
    core: Annotated[bool | None, typer.Option("--core", help="weight-lora: a matrix a band between A and B.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Budget: passes over the rows; default 3.")] = None,
    steps: Steps = None,
    tokens: Tokens = None,
    minutes: Minutes = None,
    batch_size: BatchSize = DEFAULT_TRAIN["batch_size"],
    accumulate: Accumulate = 1,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default: the method's.")] = None,
    optimizer: Annotated[
        Literal["adamw", "muon"] | None,
        typer.Option(help="muon: Muon for matrices inside blocks and of pushes; default: the method's."),
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Decoupled weight decay.")] = DEFAULT_TRAIN["weight_decay"],
    warmup: Annotated[float, typer.Option(help="Share of the budget with a rising rate.")] = DEFAULT_TRAIN["warmup"],
    clip: Clip = DEFAULT_TRAIN["clip"],
    loss: Annotated[
        Literal["uniform", "elbo"], typer.Option(help="Plain or bound-weighted cross-entropy.")
    ] = "uniform",
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    recompute: Recompute = False,
    compile: Compile = False,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between dev evaluations.")] = 500,
    save_minutes: SaveMinutes = DEFAULT_TRAIN["save_minutes"],
    keep: Keep = DEFAULT_TRAIN["keep"],
    cache_gb: Annotated[float, typer.Option(help="Memory for frozen states; 0 keeps none.")] = 4.0,
    base_dtype: Annotated[
        Literal["fp32", "bf16", "int8"], typer.Option(help="What the base's frozen matrices are kept in.")
    ] = "fp32",
    resume: Resume = None,
    from_step: FromStep = None,
    allow_changed: AllowChanged = False,
    out: Out = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Adapt a base to a task: tinyld finetune --method trajectory-lora --task reviews"""
    from tinyld.commands.finetune import finetune, finetune_job
    from tinyld.commands.finetune import resume as go_on

    if resume is not None:
        return go_on(resume, from_step, allow_changed, json=json, quiet=quiet)
    options = {
        "recipe": recipe, "budget": share(budget, "--budget"),
        "ranks": ranks if ranks == "auto" else numbers(ranks, int, "--ranks"),
        "sigma": numbers(sigma, float, "--sigma"), "modules": modules, "blocks": blocks, "within": within,
        "tied": tied, "activation": activation, "sharing": sharing, "read": read, "attend": attend,
        "head_width": head_width, "read_attended": read_attended, "dropout": dropout, "conditioning": conditioning,
        "lambda_rank": lambda_rank, "lambda_orth": lambda_orth, "rank": rank,
        "alpha": alpha, "targets": None if targets is None else tuple(targets.split(",")), "rslora": rslora,
        "core": core,
    }  # fmt: skip
    training = {
        "epochs": epochs, "steps": steps, "tokens": tokens, "minutes": minutes, "batch_size": batch_size,
        "accumulate": accumulate, "lr": lr, "optimizer": optimizer, "weight_decay": weight_decay, "warmup": warmup,
        "clip": clip, "seed": seed, "dtype": dtype, "device": device,
        "recompute": recompute, "compile": compile, "eval_every": eval_every, "save_minutes": save_minutes,
        "keep": keep,
    }  # fmt: skip
    diffusion = DiffusionConfig(loss=loss)
    job = finetune_job(task, method, options, base, data, limit, diffusion, training, cache_gb, base_dtype)
    finetune(job, out, force, json, quiet)


@app.command()
def eval(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders; default: the newest in runs/.")] = None,
    task: Annotated[str | None, typer.Option(help="Another task than the run's own.")] = None,
    split: Split = "dev",
    data: Annotated[
        Path | None, typer.Option(help="A file of rows, or a folder with <task>/dev.tsv and so on.")
    ] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Running text to measure the NLL bound on.")] = None,
    then: Annotated[
        str | None, typer.Option(help="Generation task that writes the opposite of the label decoded for --task.")
    ] = None,
    judge: Annotated[Path | None, typer.Option(help="With --then: the run that labels what was written.")] = None,
    base: BasePath = None,
    base_dtype: Annotated[
        Literal["fp32", "bf16", "int8"] | None,
        typer.Option(help="What the base's frozen matrices are kept in; default: as when it was trained."),
    ] = None,
    sampler: Sampler = "low_confidence",
    steps: DenoiseSteps = None,
    temperature: Temperature = 0.0,
    threshold: Threshold = 0.9,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampler.")] = 0,
    draws: Annotated[int, typer.Option(min=1, help="Noise levels a row for the NLL bound.")] = 4,
    limit: Limit = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    predictions: Annotated[Path | None, typer.Option(help="Write prompt, gold and decoded answer as TSV.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Decode answers and measure them: tinyld eval runs/reviews-trajectory-lora-s0 --split test"""
    from tinyld.commands.evaluate import eval, eval_chain, eval_text

    sampling = SampleConfig(sampler, steps, temperature, threshold, seed=seed)
    if text and (task or data or limit or predictions or then or judge or base_dtype):
        raise UsageError("--text measures running text; it takes --draws, --dtype and --device only")
    if text:
        return eval_text(runs or [], text, base, draws, dtype, device, json, quiet)
    if then is not None or judge is not None:
        if base_dtype is not None:
            raise UsageError("--base-dtype measures answers to a task; --then has none")
        if then is None or judge is None or task is None or not runs or len(runs) != 1:
            raise UsageError("--then takes one run, --task and --judge")
        return eval_chain(
            runs[0], task, then, judge, split, data, base, sampling, limit, dtype, device, predictions, json, quiet
        )
    eval(
        runs or [], task, split, data, base, base_dtype, sampling, draws, limit, dtype, device, predictions, json, quiet
    )


@app.command()
def compose(
    runs: Annotated[list[Path], typer.Argument(help="Two or more adapters of one base.")],
    how: Annotated[
        Literal["sum", "average", "weights", "router", "search"] | None,
        typer.Option(help="Coefficients: fixed, by each row's prompt (router), or searched for a new task."),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="A coefficient an adapter: 0.7,0.3.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="weight-lora: cut the combined update to this rank.")] = None,
    train_router: Annotated[
        int | None, typer.Option(help="Train the router on this many rows a task; default: prototypes, no training.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="search: the new task.")] = None,
    shots: Annotated[int, typer.Option(min=1, help="search: labelled rows of the new task.")] = 32,
    max_drop: Annotated[float | None, typer.Option(help="Fail when a task loses more points than this.")] = None,
    split: Split = "dev",
    data: DataFolder = None,
    base: BasePath = None,
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Use several adapters at once: tinyld compose runs/a runs/b --out runs/ab"""
    from tinyld.commands.compose import ComposeJob, compose

    coefficients = numbers(weights, float, "--weights")
    job = ComposeJob(
        how, coefficients and list(coefficients), rank, train_router, task, shots, split, data, limit, max_drop, seed,
        device, quiet,
    )  # fmt: skip
    compose(runs, job, out, base, force, json)


@app.command()
def sample(
    run: Annotated[Path | None, typer.Argument(help="Base or adapter; default: the released base.")] = None,
    prompt: Annotated[str, typer.Option(help="Text before the answer, or around {answer}.")] = "",
    length: Annotated[int, typer.Option(min=1, help="Masked tokens to fill in.")] = 24,
    num: Annotated[int, typer.Option(min=1, help="How many samples.")] = 3,
    base: BasePath = None,
    sampler: Sampler = "ancestral",
    steps: DenoiseSteps = None,
    temperature: Temperature = 0.8,
    threshold: Threshold = 0.9,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Write text: tinyld sample --prompt "the film was {answer} ." --length 3"""
    from tinyld.commands.inspect import sample

    sampling = SampleConfig(sampler, steps, temperature, threshold, seed=seed)
    sample(run, prompt, length, num, base, sampling, device, json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="hf: a base begun with --init; peft: a weight-lora adapter.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    to: Annotated[
        Literal["hf", "peft"],
        typer.Option(help="Format: a transformers BertForMaskedLM, or a LoRA for peft on our denoiser."),
    ] = "hf",
) -> None:
    """Write a base for transformers, or a LoRA for peft: tinyld export runs/base-minilm --out hf-base"""
    from tinyld.commands.inspect import export

    export(run, to, out)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="A weight-lora adapter, or a composition of such.")],
    out: Annotated[Path, typer.Option(help="Base to write.")],
    base: BasePath = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Fold a weight LoRA into its base: tinyld merge runs/sst2-weight-lora-s0 --out runs/merged"""
    from tinyld.commands.inspect import merge

    merge(run, out, base, force, json)


@app.command()
def info(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    spectrum: Annotated[
        bool, typer.Option("--spectrum", help="What each noise band of a trajectory-lora does.")
    ] = False,
    base: BasePath = None,
    data: DataFolder = None,
    limit: Limit = None,
    json: Json = False,
) -> None:
    """Say what a run is, and check its files: tinyld info runs/reviews-trajectory-lora-s0"""
    from tinyld.commands.inspect import info, info_spectrum

    if spectrum:
        return info_spectrum(run, base, data, limit, json)
    if base or data or limit:
        raise UsageError("--base, --data and --limit go with --spectrum")
    info(run, json)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Evaluated adapters, compositions, or a folder of saved results."),
    ],
    save: Annotated[Path | None, typer.Option(help="Keep a small JSON of every run in this folder.")] = None,
    plots: Annotated[
        Path | None,
        typer.Option(help="Draw accuracy against size, time and rows in this folder; needs the extra `plots`."),
    ] = None,
    brief: Annotated[bool, typer.Option("--brief", help="Leave out bytes, memory, speed and other columns.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    json: Json = False,
) -> None:
    """Make the results table of many runs: tinyld report runs/sst2-*"""
    from tinyld.commands.inspect import report

    report(runs, save, plots, brief, markdown, json)


@app.command()
def compare(
    task: Annotated[list[str] | None, typer.Option(help="Task to compare on; may be repeated.")] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="all, or methods with options: full,weight-lora:rank=1,trajectory-lora:ranks=64/32/8:blocks=3."
        ),
    ] = "all",
    seeds: Annotated[int, typer.Option(min=1, help="Runs a task and method, at its best learning rate.")] = 3,
    trials: Annotated[int, typer.Option(min=1, help="Learning rates tried a task and method, scored on dev.")] = 3,
    epochs: Annotated[float, typer.Option(help="Passes over the rows.")] = 3.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer updates, instead of --epochs.")] = None,
    batch_size: BatchSize = DEFAULT_TRAIN["batch_size"],
    limit: Annotated[
        list[int] | None, typer.Option(min=1, help="Train on this many rows; repeat it for data efficiency.")
    ] = None,
    data: DataFolder = None,
    base: BasePath = None,
    device: Device = "auto",
    budget_minutes: Annotated[float | None, typer.Option(help="Begin no run after this long.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side, which share the threads.")] = 1,
    curve_points: Annotated[int, typer.Option(min=1, help="Dev evaluations while a run trains.")] = 10,
    out: Annotated[Path, typer.Option(help="Folder of all runs; what is finished in it is not run again.")] = Path(
        "runs/compare"
    ),
    save: Annotated[Path | None, typer.Option(help="Keep a small JSON of every chosen run in this folder.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tune and run every method alike: tinyld compare --task reviews --seeds 3"""
    from tinyld.commands.inspect import compare

    tasks = task or ["reviews"]
    compare(
        tasks, methods, seeds, trials, epochs, steps, batch_size, list(limit or [None]), data, base, device,
        budget_minutes, jobs, curve_points, out, save, json, quiet,
    )  # fmt: skip


@app.command()
def bench(
    only: Annotated[
        list[str] | None, typer.Option(help="Only comparisons that have this word, e.g. pretraining; may be repeated.")
    ] = None,
    task: Annotated[str, typer.Option(help="Task of labels, on whose first 2,000 rows methods are timed.")] = "reviews",
    turns: Annotated[int, typer.Option(min=1, help="Times that each side runs.")] = 3,
    growth: Annotated[
        bool, typer.Option("--growth", help="How cost grows with model, length, batch, rows and text instead.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure speed side by side with transformers and peft: tinyld bench"""
    from tinyld.commands.bench import bench, grow

    if growth:
        return grow(only or [], markdown, json, quiet)
    bench(only or [], task, turns, markdown, json, quiet)


@app.command()
def tasks(json: Json = False) -> None:
    """List the built-in tasks."""
    from tinyld.commands.inspect import tasks

    tasks(json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the demo's runs.")] = Path("runs/demo"),
    epochs: Annotated[float, typer.Option(help="Passes over each task's rows.")] = 6.0,
    limit: Limit = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Offline, in minutes: two bundled tasks, an adapter each, evaluated and composed."""
    from tinyld.commands.demo import demo

    demo(out, limit, epochs, force, quiet)


def main() -> None:
    try:
        raise_at_signals()
        app()
    except Interrupted as error:  # before or after a verb's own work
        print(f"tinyld: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

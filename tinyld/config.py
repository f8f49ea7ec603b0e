"""Frozen dataclasses for every setting, with their checks and their JSON form. No torch here.

Each default is written here only; the CLI refers to it (`TrainConfig.lr`).
"""

import dataclasses
import functools
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypeVar

from tinyld.errors import TinyldError, UsageError, show

C = TypeVar("C")
to_dict = dataclasses.asdict


def from_dict(cls: type[C], values: dict[str, Any], where: str) -> C:
    """`cls` from JSON values, refusing unknown or missing keys and wrong types, nested too; `where` is for errors."""
    fields = {f.name: f.default is f.default_factory for f in dataclasses.fields(cls)}  # is it one that must be given?
    check_names(check_type(values, dict, where), fields, f"{where}: unknown key", TinyldError)
    missing = [name for name, needed in fields.items() if needed and name not in values]
    check(not missing, f"{where}: missing key {', '.join(map(repr, missing))}", TinyldError)
    kwargs = {name: check_type(v, types_of(cls)[name], f"{where}: {name}") for name, v in values.items()}
    try:
        return cls(**kwargs)
    except UsageError as error:
        raise TinyldError(f"{where}: {error}") from None


RULES: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
    "among": ("one of", lambda value, allowed: value in allowed),
}
LARGEST = {int: 1 << 63, float: 3.4e38}  # of float32


def check_type(value: Any, hint: Any, where: str) -> Any:
    """`value` as `hint` has it: a list as a tuple, a whole number as a float; TinyldError for another type. A dict of
    hints is of an object, and of those keys that it has. An Annotated has RULES for the value, or for every member of a
    tuple."""
    if isinstance(hint, dict):
        return {k: check_type(v, hint.get(k, Any), f"{where}: {k}") for k, v in check_type(value, dict, where).items()}
    if typing.get_origin(hint) is Annotated:
        hint, rules = typing.get_args(hint)
        value = check_type(value, hint, where)
        for member in value if isinstance(value, tuple) else () if value is None else (value,):
            for bound, (words, holds) in ((rules[name], rule) for name, rule in RULES.items() if name in rules):
                wanted = f"{words} {', '.join(bound) if isinstance(bound, tuple) else bound}"
                check(holds(member, bound), f"{where} must be {wanted}, got {member!r}", TinyldError)
            if (largest := LARGEST.get(type(member))) and not abs(member) < largest:
                raise TinyldError(f"{where} must be a finite number below {largest}, got {member!r}")
        return value
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        origin, args = typing.get_origin(option) or option, typing.get_args(option)
        if origin is typing.Any:
            return value
        if isinstance(value, bool) and origin is not bool:  # no number
            continue
        if isinstance(value, dict) and dataclasses.is_dataclass(option):
            return from_dict(option, value, where)
        if origin is float and isinstance(value, int | float):
            return float(value)
        if origin is tuple and isinstance(value, list):
            value = tuple(value)
        if isinstance(value, origin):
            if origin in (tuple, list) and args:
                return origin(check_type(v, args[0], f"{where}: {i}") for i, v in enumerate(value, 1))
            if origin is dict and args:
                return {k: check_type(v, args[1], f"{where}: {k!r}") for k, v in value.items()}
            return value
    raise TinyldError(f"{where}: {show(value)} is not of type {hint if len(options) > 1 else options[0].__name__}")


def check(condition: bool, message: str, error: type[TinyldError] = UsageError) -> None:
    """Raises the error, by default a UsageError, with `message` unless `condition` holds."""
    if not condition:
        raise error(message)


def check_names(
    given: Iterable[str], allowed: Iterable[str], unknown: str, error: type[TinyldError] = UsageError
) -> None:
    """The error, which begins with `unknown`, for names among the given that are not allowed."""
    found = [repr(name) for name in given if name not in allowed]
    check(not found, f"{unknown} {', '.join(found)}; allowed: {', '.join(allowed)}", error)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    check(value in allowed, f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def setting(default: Any, help: str = "", group: str | None = None, *, read: Any = None, **rules: Any) -> Any:
    """A field with a default and the RULES that its value keeps: `least=1, below=4`. Of an option: what it means, the
    group of the help it stands in (none: for experts, by --set alone), and `read`, which makes its value of text."""
    return dataclasses.field(default=default, metadata={"help": help, "group": group, "read": read} | rules)


types_of = functools.cache(typing.get_type_hints)  # field of a config -> the type of its value


class Settings:
    """A config whose fields say their types and rules."""

    called = staticmethod(str)  # how a field is named in errors

    @classmethod
    def named(cls, given: dict[str, Any]) -> Self:
        """What Python gave by name; UsageError for a name that is none."""
        check_names(given, cls.__dataclass_fields__, "there is no option")  # type: ignore[attr-defined]
        return cls(**given)

    def __post_init__(self) -> None:
        """UsageError naming the first field of another type, or that breaks a rule of its own."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            hint = Annotated[types_of(type(self))[field.name], field.metadata]
            try:
                value = check_type(getattr(self, field.name), hint, self.called(field.name))
            except TinyldError as error:
                raise UsageError(error) from None
            object.__setattr__(self, field.name, value)


MAX_LENGTH = 131_072  # tokens of a row: rotary positions are tables, which a config alone must not make huge
MAX_TABLE = MAX_LENGTH * 1_024
MAX_PARAMETERS = 20_000_000_000


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Shape of the denoiser. `vocab_size` is known once the tokenizer is. The switches after `norm_eps` are what
    BERT-family encoders need to run on the same denoiser."""

    vocab_size: int = setting(dataclasses.MISSING, least=1)
    d_model: int = setting(256, least=1)
    num_layers: int = setting(6, least=1, most=100_000)
    num_heads: int = setting(4, least=1)
    d_ff: int = setting(1024, least=1)
    max_length: int = setting(256, least=2, most=MAX_LENGTH)  # tokens a row may have, answer and markers included
    rope_theta: float = setting(10_000.0, above=0)
    norm_eps: float = setting(1e-5, above=0, below=1)
    norm_first: bool = True  # norm before each sublayer and a final norm; False: after each sublayer, as BERT
    rotary: bool = True  # rotary positions; False: a learned embedding of each position
    embedding_norm: bool = False  # a norm on the summed embeddings
    head_transform: bool = False  # dense + GELU + norm before the tied vocabulary matrix
    d_embed: int = setting(0, least=0)  # width of the embeddings where it is not d_model (ELECTRA); 0: d_model
    # What the families of tinyld.families need besides.
    norm: str = setting("layer", among=("layer", "rms"))  # rms has neither mean nor bias
    norm_bias: bool = True
    first_norm: bool = True  # the first block normalises what its attention reads (ModernBERT: no)
    activation: str = setting("gelu", among=("gelu", "gelu_tanh", "silu"))
    gated: bool = False  # the MLP's `up` gives twice d_ff numbers: activation(first half) * second half
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    kv_heads: int = setting(0, least=0)  # heads of keys and values, each for a group of queries; 0: num_heads
    head_width: int = setting(0, least=0)  # 0: d_model / num_heads
    head_norms: bool = False  # an RMS norm of each head's queries, and of its keys (Qwen3)
    local_window: int = setting(0, least=0, most=MAX_LENGTH)  # local blocks read at most half as far; 0: no such
    local_theta: float = 10_000.0  # rope_theta of the local blocks
    global_every: int = setting(1, least=1)  # every how many blocks, from the first on, is not local
    tied: bool = True  # the vocabulary matrix is the embedding's
    head_bias: bool = True
    head_rows: int = setting(0, least=0)  # of an untied vocabulary matrix without the last ids, the mask's; 0: all
    embedding_scale: float = 1.0
    shifted: bool = False  # trained to predict the next position: logits of i are read at i - 1 (Dream)

    def __post_init__(self) -> None:
        super().__post_init__()
        kv, heads, d = self.kv_heads, self.num_heads, self.d_model
        check(heads % (kv or heads) == 0, f"kv_heads must divide num_heads, got {kv} and {heads}")
        most = 0 if self.tied else self.vocab_size
        check(self.head_rows <= most, f"head_rows must be at most {most} (untied: vocab_size), got {self.head_rows}")
        check(self.d_embed in (0, d) or self.head_transform, "d_embed needs head_transform")
        is_whole = self.head_width > 0 or d % heads == 0
        check(is_whole, f"num_heads must divide d_model, got d_model {d} and num_heads {heads}")
        check(self.width_of_head % 2 == 0 or not self.rotary, "d_model / num_heads must be even for rotary positions")
        table = self.max_length * self.width_of_head  # of rotary positions, which no file holds
        check(table <= MAX_TABLE, f"max_length * head_width must be at most {MAX_TABLE:,}, got {table:,}")
        size = f"a denoiser of {self.num_parameters():,} parameters is asked for; at most {MAX_PARAMETERS:,}"
        check(self.num_parameters() <= MAX_PARAMETERS, size)

    @property
    def embedding_width(self) -> int:
        return self.d_embed or self.d_model

    @property
    def projected(self) -> bool:
        """Whether embeddings are brought to d_model by a matrix."""
        return self.embedding_width != self.d_model

    @property
    def width_of_head(self) -> int:
        return self.head_width or self.d_model // self.num_heads

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each of a block's matrices."""
        d, f = self.d_model, self.d_ff
        queries, keys = (n * self.width_of_head for n in (self.num_heads, self.kv_heads or self.num_heads))
        up = 2 * f if self.gated else f
        return {
            "query": (d, queries), "key": (d, keys), "value": (d, keys), "out": (queries, d),
            "up": (d, up), "down": (f, d),
        }  # fmt: skip

    def num_parameters(self) -> int:
        """How many numbers the denoiser has; nothing is made to count them."""
        return sum(self._counts())

    def num_biases(self) -> int:
        """How many of them are biases, those of norms and of the vocabulary included: what BitFit trains."""
        return self._counts()[0]

    def _counts(self) -> tuple[int, int]:
        """(biases, all else), in closed form."""
        d, e, rows, size = self.d_model, self.embedding_width, self.head_rows or self.vocab_size, self.matrices()
        norms = (2 * self.num_layers - (not self.first_norm) + self.norm_first) * d
        norms += (self.embedding_norm + self.head_transform) * e
        has_bias = {"up": self.mlp_bias, "down": self.mlp_bias, "out": self.out_bias}
        biases = self.num_layers * sum(outputs * has_bias.get(n, self.qkv_bias) for n, (_, outputs) in size.items())
        biases += norms * (self.norm == "layer" and self.norm_bias) + d * self.projected + rows * self.head_bias
        biases += e * (self.head_transform and self.mlp_bias)
        block = sum(map(math.prod, size.values())) + 2 * self.width_of_head * self.head_norms
        embedding = (self.vocab_size + (0 if self.rotary else self.max_length) + d * self.projected) * e
        head = (d * self.head_transform + (0 if self.tied else rows)) * e
        return biases, self.num_layers * block + norms + embedding + head


@dataclass(frozen=True)
class Reading(Settings):
    """How a public model's folder is read, where its own files say otherwise or nothing."""

    mask_token: str | None = setting(None, "A public model: which of its tokens is the mask.")
    max_length: int | None = setting(None, "A public model: tokens of a row; if not given, its own or 2048.", least=2)
    chat: bool = setting(False, "A public model: asked in the turns of its chat template.")


def check_ours(reading: Reading | None) -> None:
    """UsageError where a base of our own is to be read otherwise than it says."""
    check(reading in (None, Reading()), "mask_token, max_length and chat are for the folder of a public model")


PRESETS: dict[str, dict[str, int]] = {  # about 0.2M, 7M and 110M parameters
    "nano": {"vocab_size": 2_048, "d_model": 64, "num_layers": 2, "num_heads": 2, "d_ff": 256, "max_length": 128},
    "small": {"vocab_size": 8_192, "d_model": 256, "num_layers": 6, "num_heads": 4, "d_ff": 1024, "max_length": 256},
    "base": {"vocab_size": 32_768, "d_model": 768, "num_layers": 12, "num_heads": 12, "d_ff": 3072, "max_length": 512},
}
OPTIMIZERS = ("adamw", "muon")
DTYPES = ("auto", "fp32", "bf16", "fp16")  # of arithmetic
BASE_DTYPES = ("fp32", "bf16", "int8")  # of stored and of frozen matrices
BUDGETS = ("steps", "tokens", "minutes", "epochs")  # of training: one of them is given


@dataclass(frozen=True, kw_only=True)
class Loop(Settings):
    """What of the training loop is the same option of every verb that trains."""

    steps: int | None = setting(None, "Train for so many updates.", "Training", least=1)
    minutes: float | None = setting(None, "Train for so many minutes on the clock.", "Training", above=0)
    tokens: int | None = setting(None, "Train on so many tokens.", least=1)
    batch_size: int = setting(32, "Rows an update reads.", "Training", least=1)
    seed: int = setting(0, "Seed of initialisation, data order and noise.", "Training", least=0)
    accumulate: int = setting(1, "Micro-batches an update is split into, for less memory.", least=1)
    recompute: bool = setting(False, "Activation checkpointing: less memory, a forward pass more.")
    clip: float = setting(1.0, "Largest gradient norm; 0 for none.", least=0)
    # the rate rises for `warmup`, stays at its peak for `flat`, then falls linearly to 0
    warmup: float = setting(0.05, "Share of the budget with a rising learning rate.", least=0, below=1)
    flat: float = setting(0.0, "Share of the budget at the peak learning rate.", least=0)
    weight_decay: float = setting(0.01, "Decoupled weight decay of matrices.", least=0)
    eval_every: int = setting(500, "Updates between held-out evaluations.", least=1)
    save_minutes: float = setting(5.0, "Minutes between checkpoints.", least=0)
    keep: int = setting(2, "Checkpoints kept while training.", least=1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Loop):
    """The training loop, for pretraining and fine-tuning alike."""

    epochs: float | None = setting(None, above=0)  # passes over the training rows
    lr: float = setting(1e-3, above=0)
    body_lr: float = setting(1.0, least=0)  # share of lr that a warm-started encoder's own tensors train at
    body_start: float = setting(0.0, least=0, most=1)  # share of the budget during which they stay frozen
    # muon: for the matrices inside blocks and of pushes, AdamW for the rest
    optimizer: str = setting("adamw", among=OPTIMIZERS)
    dtype: str = setting("auto", among=DTYPES)  # auto: bf16 where the processor or GPU has it in hardware
    device: str = "auto"

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        check(len(given) == 1, f"give one budget of {', '.join(BUDGETS)}; got {' and '.join(given) or 'none'}")
        super().__post_init__()
        check(self.warmup + self.flat < 1, f"flat must leave some of the budget after warm-up, got {self.flat}")


# how sure is sure enough, where it is not told: the least probability of a token, or for entropy the nats left open
THRESHOLDS = {"threshold": 0.95, "klass": 0.6, "entropy": 0.5}
DRAWN = ("ancestral", "revise")  # whose order is drawn, at any temperature
SAMPLERS = ("low_confidence", *THRESHOLDS, *DRAWN)
FREELY = "revise", 0.6  # sampler and temperature of texts for no task


@dataclass(frozen=True)
class SampleConfig(Settings):
    """How masked positions are filled; `sampler.accept` says what each sampler does."""

    sampler: str = setting("threshold", "How masked tokens are filled in.", "Writing", among=SAMPLERS)
    steps: int | None = setting(None, "Passes a text at most.", "Writing", least=1)
    temperature: float = setting(0.0, "0 takes the most likely token.", "Writing", least=0)
    seed: int = setting(0, "Seed of what is drawn.", "Writing", least=0)
    threshold: float | None = setting(
        None, "threshold, klass: least probability (0.95, 0.6); entropy: most nats left open (0.5).", above=0
    )
    least: int = setting(1, "Tokens that a pass writes at least, sure or not.", least=1)
    lengths: int = setting(1, "Lengths that each text is written in, of which the likeliest is taken.", least=1, most=5)
    kl: float = setting(0.01, "klass: most nats that a distribution moved since the last pass.", above=0)
    block: int | None = setting(None, "Tokens that are written before the next ones (semi-autoregressive).", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        warm = self.temperature == 0 or self.temperature >= 1e-3
        check(warm, f"temperature must be 0, or at least 0.001, got {self.temperature:g}")
        is_share = self.threshold is None or self.threshold <= 1 or self.sampler == "entropy"
        check(is_share, f"threshold must be at most 1, got {self.threshold}")

    @property
    def enough(self) -> float:
        return THRESHOLDS[self.sampler] if self.threshold is None else self.threshold

"""Every verb's options as a frozen dataclass, and how a value is read from text. No torch, no typer.

The command line, `--set` and the Python interface are all made from these. A default is written here, or in the config
that it refers to. An option without a group is for experts: `--set name=value` alone gives it.
"""

import dataclasses
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from tinyld import config
from tinyld.config import Loop, Reading, SampleConfig, Settings, check, types_of
from tinyld.config import setting as option
from tinyld.errors import TinyldError, UsageError, show
from tinyld.rows import SPLITS, bundled_data_dir

ARGUMENT = "Arguments"  # the group of what has no name on the command line
METHOD_NAMES = ("trajectory-lora", "weight-lora", "adapters", "bitfit", "full")
METHOD_OPTIONS = ("recipe", "budget", "rank", "ranks", "sigma", "blocks", "pointer", "dropout", "targets", "rslora")
RECIPE_NAMES = ("best", "fast", "paper")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def refuse_idle(options: Any, names: Iterable[str], where: str) -> None:
    """UsageError where one of the named options has another value than its default, which has no effect `where`."""
    default = {field.name: field.default for field in dataclasses.fields(options) if field.name in names}
    found = [options.called(name) for name in default if getattr(options, name) != default[name]]
    check(not found, f"{', '.join(found)} has no effect {where}")


def several(value: Any, what: str) -> list[Any]:
    """What Python gave in place of a list: one text, path or dict is a list of one, a table of polars or pandas one of
    its rows as dicts; UsageError for what is no list."""
    if isinstance(value, str | Path | Mapping):
        return [value]
    is_table = hasattr(value, "columns")
    if is_table and hasattr(value, "to_dict"):
        return value.to_dicts() if hasattr(value, "to_dicts") else value.to_dict("records")
    found = None if is_table or isinstance(value, bytes | bytearray) else value
    try:
        members = iter(found)  # type: ignore[arg-type]
    except TypeError:  # of NumPy's single values, too
        raise UsageError(f"{what} are a list, one column of a table, or one of them, got {show(value)}") from None
    return list(members)


def parsed(value: Any, kind: Any, option: str) -> Any:
    """What was given as text, as the type of the option; all else as it is. Numbers may have commas between them."""
    if typing.get_origin(kind) is tuple:
        member = typing.get_args(kind)[0]
        if value is None or (value == "auto" and member is int):
            return value
        if isinstance(value, str) and member in (int, float):
            value = value.split(",")
        elif isinstance(value, str | bytes) or not isinstance(value, Iterable):
            value = [value]
        return tuple(parsed(v, member, option) for v in value)
    if not isinstance(value, str):
        return value.item() if type(value).__module__ == "numpy" and hasattr(value, "item") else value
    try:
        return {"true": True, "false": False}[value] if kind is bool else kind(value)
    except KeyError:
        raise UsageError(f"{option}: give true or false, got {value!r}") from None
    except ValueError:
        raise UsageError(f"{option}: {value!r} is not a {'whole ' if kind is int else ''}number") from None


def base_folder(name: str | Path, option: str = "--base") -> Path:
    """The released base of that name, where there is one, else a path; a Path is one."""
    released = bundled_data_dir() / name
    named = isinstance(name, str) and Path(name).name == name and os.path.isfile(released / "config.json")
    mine = named and os.path.isfile(Path(name) / "config.json") and not os.path.samefile(name, released)
    check(not mine, f"{option} {name}: a released base and a folder here have this name; write ./{name} for the folder")
    return released if named else Path(name)


def share(text: str, option: str) -> float:
    """`0.7%` or `0.007` as a share."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UsageError(f"{option} takes a share such as 0.7% or 0.007, got {text!r}") from None
    way_out = f"write {text}% or {value / 100:g}" + (f", or else {value:.0%}" if value <= 1 else "")
    meant = text.endswith("%") or not 0.01 <= value <= 100
    check(meant, f"{option} {text} would be {value:.0%} of the base: {way_out}")
    check(0 < value <= 1, f"{option} must be above 0 and at most 100%, such as 0.7% or 0.007, got {text!r}")
    return value


@typing.dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option,))
class Options(Settings):
    """Every subclass is a frozen dataclass. Its values may be given as a user writes them: as text."""

    kinds: ClassVar[dict[str, Any]]  # option -> the type of its value, the first where there are several
    groups: ClassVar[dict[str, str | None]]  # option -> the group of the help it stands in

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        cls.groups = {field.name: field.metadata["group"] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        hints = types_of(cls).items()
        cls.kinds = {k: typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint for k, hint in hints}

    @classmethod
    def called(cls, name: str) -> str:
        """How a user gives the option."""
        return flag(name) if cls.groups[name] else f"--set {name}"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, read, name = getattr(self, field.name), field.metadata["read"], self.called(field.name)
            by_itself = read is not None and isinstance(value, str)
            value = read(value, name) if by_itself else parsed(value, self.kinds[field.name], name)
            object.__setattr__(self, field.name, value)
        super().__post_init__()

    def only(self, part: type) -> dict[str, Any]:
        """The values of the fields that `part`, a config, has too."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(part) if hasattr(self, f.name)}

    def reading(self) -> Reading | None:
        """How a public model's folder is to be read, if anything is said of it."""
        given = Reading(**self.only(Reading))
        return None if given == Reading() else given

    @classmethod
    def of(cls, given: dict[str, Any], sets: Iterable[str] = ()) -> Self:
        """The options of a command line: `given` by name, and every `name=value` of `--set`."""
        usual = {f.name: f.default for f in dataclasses.fields(cls)}
        given = {k: v for k, v in given.items() if v is not None and str(v) != str(usual[k])}
        for text in sets:
            name, equals, value = text.partition("=")
            name = name.strip().removeprefix("--").replace("-", "_")
            is_option = cls.groups.get(name, ARGUMENT) != ARGUMENT
            lacks = "no =VALUE after it" if is_option else f"there is no option {name!r}; --set help lists all"
            check(bool(equals) and is_option, f"--set {text}: {lacks}")
            check(name not in given, f"{name} is given twice, by --set {text} as well")
            given[name] = value
        return cls(**given)


class Printed(Options):
    json: bool = option(False, "Print the result as JSON.", "Output")
    quiet: bool = option(False, "Nothing on stderr but errors and downloads.", "Output")


class OnDevice(Options):
    device: str = option("auto", "auto, cpu, cuda or cuda:N.", "Machine")
    dtype: str = option("auto", "Arithmetic; auto is bf16 where it is fast.", "Machine", among=config.DTYPES)


class Written(Options):
    out: Path | None = option(None, "Run folder to write; if not given, one in runs/.", "Output")
    force: bool = option(False, "Replace the run that is in --out, at once.", "Output")


class Moved(Options):
    base: Path | None = option(None, "Where the run's base is, if it has moved.", "Data", read=base_folder)


class Table(Printed):
    csv: Path | None = option(None, "Write one row per run to this file.", "Output")
    wide: bool = option(False, "All columns, however wide.", "Output")


class Answering(Moved, OnDevice, Printed, Reading, SampleConfig):
    base_dtype: str | None = option(None, "Type of the frozen matrices, if not as trained.", among=config.BASE_DTYPES)

    def sampling(self) -> SampleConfig:
        """How answers are written; UsageError for an option that the sampler does not read."""
        unread = [] if self.sampler == "klass" else ["kl"]
        unread += [] if self.sampler in config.THRESHOLDS else ["threshold", "least"]
        unread += ["block"] if self.sampler in config.DRAWN else []
        unread += ["seed"] if self.temperature == 0 and self.sampler not in config.DRAWN else []
        unread += ["lengths"] if self.temperature > 0 else []
        way_out = f"threshold and least go with {', '.join(config.THRESHOLDS)}, kl with klass, seed with "
        way_out += f"what is drawn, lengths with what is not, block with all but {' and '.join(config.DRAWN)}"
        refuse_idle(self, unread, f"with --sampler {self.sampler} at --temperature {self.temperature:g}; {way_out}")
        return SampleConfig(**self.only(SampleConfig))

    def check_width(self, width: int, tasks: Sequence[Any] = ()) -> None:
        """UsageError for an option that answers of at most `width` tokens, of `tasks` or of none, do not heed."""
        is_label = bool(tasks) and not any(task.is_generation for task in tasks)
        if width == 1:
            more = ["sampler", "seed"] if is_label and self.temperature == 0 else []
            more += ["steps", "threshold", "least", "kl", "block", "draws"]
            refuse_idle(self, more, "where every answer is one token")
        if is_label or width == 1:
            refuse_idle(self, ["lengths"], "where answers are labels, or one token")


class Training(OnDevice, Written, Printed, Loop):
    lr: float | None = option(None, "Peak learning rate; the method's if not given.", "Training", above=0)
    resume: Path | None = option(None, "Run folder to go on with; takes a new --lr.", "Output")


class RowOptions(Options):
    data: Path | None = option(None, "CSV, TSV, JSONL, or a folder of train, dev, test; .txt: fill gaps.", "Task")
    base: Path | None = option(None, "Folder, or small; if not given, the default base.", "Task", read=base_folder)
    text_column: str | None = option(None, "With --data and no --task: the column of texts.", "Task")
    label_column: str | None = option(None, "With --data and no --task: the column of labels.", "Task")
    answer_column: str | None = option(None, "Instead of labels: the column of texts to write, a line each.", "Task")
    template: str = option("{text} it was {answer} .", "With --data and no --task: the prompt.")


class FinetuneOptions(Training, Reading, RowOptions):
    task: str | None = option(None, "Built-in task or task file; reviews if nothing is given.", "Task")
    limit: int | None = option(None, "Train on the first so many rows.", "Task", least=1)
    method: str = option("trajectory-lora", "What is trained.", "Method", among=METHOD_NAMES)
    recipe: str | None = option(None, "Of trajectory-lora; if not given, best.", "Method", among=RECIPE_NAMES)
    budget: float | None = option(None, "Most to store, such as 0.7% of the base.", "Method", read=share)
    rank: int | None = option(None, "weight-lora, adapters: the rank.")
    epochs: float | None = option(None, "Passes: 3; more of few rows or texts; 1 of 30,000.", "Training", above=0)
    minutes: float | None = option(None, "Train for so many minutes on the clock.")
    batch_size: int | None = option(None, "Rows an update reads: 32, or 8 to write.", "Training", least=1)
    optimizer: str | None = option(None, "The method's if not given.", among=config.OPTIMIZERS)
    ranks: tuple[int, ...] | str | None = option(
        None, "Rank by noise band, high first: 64,32,8 (with --budget: their proportion); or auto."
    )
    sigma: tuple[float, ...] | None = option(None, "Scale by noise band, high first: 1,0.5,0.25.")
    blocks: int | None = option(None, "trajectory-lora: last blocks pushed; 0 is the final state alone.")
    pointer: int | None = option(None, "To write: width of what copies from prompts; 32.")
    dropout: float | None = option(None, "Share of the numbers read that an update does without.")
    targets: tuple[str, ...] | None = option(
        None, "weight-lora: query,key,value,out,up,down or some.", read=lambda text, _: tuple(text.split(","))
    )
    rslora: bool | None = option(None, "weight-lora: scale by 1 / sqrt(rank).")
    base_dtype: str = option("fp32", "Type of the base's frozen matrices.", among=config.BASE_DTYPES)
    cache_gb: float = option(4.0, "Memory for frozen states; 0 keeps none.", least=0)
    resume: Path | None = option(None, "Run folder to go on with; takes a new --lr, or a moved --base.", "Output")


class PretrainOptions(Training):
    data: tuple[Path, ...] = option((), "Files or folders of .txt, .txt.gz, .jsonl; else the bundled 2 MB.", "Text")
    valid: tuple[Path, ...] = option((), "Held-out text; 1% of the documents if not given.", "Text")
    batch_size: int = option(16, "Rows an update reads, each under two complementary masks.", "Training", least=1)
    flat: float = option(0.8, "Share of the budget at the peak learning rate.")
    preset: str = option("small", "Model size.", "Model", among=config.PRESETS)
    max_length: int | None = option(None, "Tokens in a row.", "Model")
    vocab_size: int | None = option(None, "Pieces in the tokenizer.", "Model", least=64)
    init: str | None = option(None, "A tinyld base, a folder of a BERT-like encoder, or minilm.", "Model")
    tokens: int | None = option(None, "Train on so many tokens.", "Training", least=1)
    lr: float | None = option(None, "Peak learning rate; 0.003, or 0.0007 on a base of ours.", "Training", above=0)
    optimizer: str = option("muon", "muon: Muon for matrices inside blocks.", "Training", among=config.OPTIMIZERS)
    weight_decay: float = option(0.1, "Decoupled weight decay of matrices.")
    warmup: float = option(0.02, "Share of the budget with a rising learning rate.")
    d_model: int | None = option(None, "Width; the preset's if not given.")
    num_layers: int | None = option(None, "Blocks; the preset's if not given.")
    num_heads: int | None = option(None, "Attention heads; the preset's if not given.")
    d_ff: int | None = option(None, "Width inside the MLP; the preset's if not given.")
    body_lr: float | None = option(None, "With --init: share of --lr for all but the head; 0.1, or 0.6 for our own.")
    body_start: float | None = option(None, "With --init: share of the budget they stay frozen; 0.1, or 0 likewise.")
    save_dtype: str = option("fp32", "Type of the stored weights.", among=config.BASE_DTYPES)


class EvalOptions(Answering):
    runs: tuple[Path, ...] = option((), "Run folders; else the newest in runs/, or with --text our base.", ARGUMENT)
    task: str | None = option(None, "The task, for a base, which has none of its own.", "Data")
    split: str = option("dev", "Which rows.", "Data", among=SPLITS)
    data: Path | None = option(None, "A file of rows, or a folder with <task>/dev.tsv and so on.", "Data")
    text: tuple[Path, ...] = option((), "Running text to measure the NLL bound on instead.", "Data")
    limit: int | None = option(None, "Read the first so many rows.", "Data", least=1)
    predictions: Path | None = option(None, "Write (or replace) prompts, gold and decoded answers as TSV.", "Output")
    wide: bool = option(False, "All columns, however wide.", "Output")
    draws: int = option(4, "Noise levels a row for the NLL bound of longer answers.", least=1)


class PredictOptions(Answering):
    runs: tuple[Path, ...] = option(dataclasses.MISSING, "Runs; then a .txt, .csv, .tsv or .jsonl; or stdin.", ARGUMENT)
    text: tuple[str, ...] = option((), "A text to answer instead of a file; may be repeated.", "Data")
    column: str | None = option(None, "Column of the texts, where it is not the task's.", "Data")
    task: str | None = option(None, "Which task, where the run has several or none.", "Data")
    out: Path | None = option(None, "Write (or replace) a file, whole or not at all, instead of stdout.", "Output")
    csv: bool = option(False, "CSV, no table or JSON.", "Output")

    def runs_and_input(self) -> tuple[list[Path], str]:
        """The run folders, and what follows them: a file of texts, or - for stdin."""
        *paths, last = self.runs
        files = [str(path) for path in self.runs if path.is_file()]
        check(len(files) < 2, f"predict reads one file, got {' and '.join(files)}")
        is_name = last.suffix == "" and str(last) != "-" and not os.path.lexists(last)
        check(not paths or not is_name, f"{last}: no such run or file", TinyldError)
        return (paths, str(last)) if paths and not last.is_dir() else ([*paths, last], "-")


class SampleOptions(Answering):
    run: Path | None = option(None, "Base or adapter; the released base if not given.", ARGUMENT)
    prompt: str = option("", "Text before the answer, or around {answer}.", "Writing")
    length: int = option(24, "Masked tokens to fill in; a text may end before.", "Writing", least=1)
    num: int = option(3, "How many samples.", "Writing", least=1)
    sampler: str = option(config.FREELY[0], "How masked tokens are filled in.", "Writing", among=config.SAMPLERS)
    temperature: float = option(config.FREELY[1], "0 takes the most likely token.", "Writing")
    show_steps: bool = option(False, "What stands there after every pass, with _ for a mask.", "Output")


class ComposeOptions(Moved, OnDevice, Written, Printed):
    runs: tuple[Path, ...] = option((), "Two or more trajectory-lora adapters of one base.", ARGUMENT)
    split: str = option("dev", "Rows to measure it on.", "Data", among=SPLITS)
    data: Path | None = option(None, "Folder with <task>/dev.tsv and so on.", "Data")
    limit: int | None = option(
        None, "Read the first so many rows of a task; 20 or more tell what is foreign.", "Data", least=1
    )


class CompareOptions(Table, Reading, RowOptions):
    task: tuple[str, ...] = option((), "Task to compare on; may be repeated; reviews if nothing is given.", "Task")
    limit: tuple[int, ...] = option((), "Train on so many rows; repeat it for data efficiency.", "Task", least=1)
    methods: str = option("all", "all, or some, maybe with options: full,weight-lora:rank=1:dropout=0.1.", "Grid")
    seeds: int = option(3, "Runs of each task and method, at its best rate.", "Grid", least=1)
    trials: int = option(3, "Learning rates of each task and method, tried on dev.", "Grid", least=1, most=5)
    epochs: float | None = option(None, "Passes over the rows; as finetune has them if not given.", "Grid", above=0)
    steps: int | None = option(None, "Optimizer updates, instead of --epochs.", "Grid", least=1)
    batch_size: int | None = option(None, "Rows an update reads; as finetune has them.", "Grid", least=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N.", "Grid")
    out: Path = option(Path("runs/compare"), "Folder of all runs; finished ones are not run again.", "Output")


class ReportOptions(Table):
    runs: tuple[Path, ...] = option((), "Evaluated adapters, or folders of such; else runs/.", ARGUMENT)


class InfoOptions(Printed, Reading):
    run: Path = option(dataclasses.MISSING, "A run folder, or that of a public model.", ARGUMENT)


class MergeOptions(Moved, Written, Printed):
    run: Path = option(dataclasses.MISSING, "A weight-lora adapter.", ARGUMENT)
    out: Path = option(Path("runs/merged"), "Base to write.", "Output")


class ExportOptions(Printed):
    run: Path = option(dataclasses.MISSING, "A base begun from a BERT-like encoder.", ARGUMENT)
    out: Path = option(Path("exported"), "Folder to write.", "Output")


class DemoOptions(Written):
    out: Path = option(Path("runs/demo"), "Folder for the demo's runs.", "Output")
    dtype: str = option("auto", "Arithmetic; auto is bf16 where it is fast.", "Machine", among=config.DTYPES)
    limit: int | None = option(None, "Train on the first so many rows.", "Machine", least=1)
    quiet: bool = option(False, "Nothing on stderr but errors and downloads.", "Output")

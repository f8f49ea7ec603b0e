"""The command line: each verb made from its options class, and every error as one line with an exit code. No torch."""

import contextlib
import dataclasses
import errno
import inspect
import os
import pkgutil
import re
import signal
import sys
import typing
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "true")  # typer's pydantic looks for some at every start: 10 ms

import typer
from typer.core import TyperCommand, TyperGroup

from tinyld import __version__, options
from tinyld.errors import TinyldError, plain
from tinyld.interrupt import Interrupted, handling, interrupt_or_end
from tinyld.options import ARGUMENT, Options, flag
from tinyld.runs import is_writer
from tinyld.tables import print_record, print_table
from tinyld.write import to_json


class Verb(NamedTuple):
    """`run` takes the options and returns what is printed: as JSON, or by `show`. Both are named `module:function`."""

    options: type[Options]
    run: str
    help: str
    example: str
    show: str | None = None  # of (result, options); a table with a line a field if there is none


MAIN = 5  # so many verbs have an example in the first help
VERBS = {
    "finetune": Verb(options.FinetuneOptions, "finetuning:finetune", "Teach a base your task by a small adapter.",
                     "tinyld finetune --data mine.csv --out runs/mine", "finetuning:show"),
    "predict": Verb(options.PredictOptions, "texts:predict", "Answer new texts with one run or several at once.",
                    "tinyld predict runs/mine new.csv --out answered.csv"),
    "eval": Verb(options.EvalOptions, "scores:eval", "Measure a run on rows whose labels are known.",
                 "tinyld eval runs/mine --split dev", "scores:show"),
    "compose": Verb(options.ComposeOptions, "compose:compose", "Use several adapters of one base at once.",
                    "tinyld compose runs/reviews runs/topics --out runs/both", "compose:show"),
    "pretrain": Verb(options.PretrainOptions, "pretrain:pretrain", "Make a base from text (10 minutes if not told).",
                     "tinyld pretrain --data texts/ --minutes 20 --out runs/base"),
    "sample": Verb(options.SampleOptions, "verbs:sample", "Write free text; a task's answers are by predict.",
                   "tinyld sample --prompt 'the film was {answer} .' --length 3", "verbs:show_samples"),
    "compare": Verb(options.CompareOptions, "compare:compare", "Tune and run every method alike on your task.",
                    "tinyld compare --data mine.csv", "report:show"),
    "report": Verb(options.ReportOptions, "report:report", "One table of many evaluated runs.",
                   "tinyld report runs/*", "report:show"),
    "info": Verb(options.InfoOptions, "verbs:info", "Say what a run is, and check its files.",
                 "tinyld info runs/mine", "verbs:show_info"),
    "tasks": Verb(options.Printed, "verbs:tasks", "List the built-in tasks.", "tinyld tasks", "verbs:show_tasks"),
    "merge": Verb(options.MergeOptions, "verbs:merge", "Fold a weight LoRA into its base.",
                  "tinyld merge runs/lora --out runs/merged"),
    "export": Verb(options.ExportOptions, "verbs:export", "Write a base for transformers.",
                   "tinyld export runs/merged --out bert"),
    "demo": Verb(options.DemoOptions, "verbs:demo", "See it all in two minutes, without a network.", "tinyld demo"),
}  # fmt: skip
GROUPS_LAST = "Writing Training Machine Output"  # in this order behind all others


class Command(TyperCommand):
    """A verb: its help in the groups of its options, in 80 columns."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        group_of = VERBS[self.name or ""].options.groups
        groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                groups[group_of.get(parameter.name, "Output")].append(record)
        for group in sorted(groups, key=lambda g: (g != ARGUMENT, GROUPS_LAST.find(g))):
            with formatter.section(group):
                formatter.write_dl(groups[group])


def fail(message: str, code: int) -> None:
    print(f"tinyld: {plain(message)}", file=sys.stderr)
    sys.exit(code)


class Group(TyperGroup):
    """All verbs. What goes wrong in one becomes one line on stderr and an exit code."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write("tinyld: small masked diffusion language models, taught to label or write text.\n\n")
        formatter.write("Usage: tinyld VERB [OPTIONS]; tinyld VERB --help lists them. Main verbs:\n\n")
        for i, (name, verb) in enumerate(VERBS.items()):
            formatter.write("\nOthers:\n\n" if i == MAIN else "")
            formatter.write(f"  {name:<9} {verb.help}\n" + (f"            {verb.example}\n" if i < MAIN else ""))
        formatter.write("\nAlso: --version, --install-completion.\n")

    def main(self, *given: Any, **told: Any) -> Any:
        try:
            return super().main(*given, **told)
        except OSError as error:  # but for a pipe that nobody reads any more, which click ends well
            if error.errno in (errno.ENOSPC, errno.EIO):  # what is left to be printed can not be
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            fail(f"{error.filename or 'output'}: {error.strerror or error}", 1)

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except TinyldError as error:
            fail(str(error), error.exit_code)
        except Exception as error:
            verb = ctx.invoked_subcommand
            group_of = VERBS[verb].options.groups if verb else {}
            if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):  # torch's
                sizes = ("batch_size", "max_length", "rank", "length", "num", "limit")
                lower = " or ".join(flag(name) for name in sizes if group_of.get(name))
                fail("out of memory" + f"; lower {lower}" * bool(lower), 1)
            if not hasattr(error, "format_message"):  # click's own, whichever click typer has
                raise
            asked = (getattr(error, "option_name", None) or "").replace("_", "-")
            said = error.format_message()
            for name, group in group_of.items():
                if group is None and asked == flag(name):
                    fail(f"{asked} goes by --set {name}=value; --set help lists all such", 2)
            said += "; a file is given by --data" * ("unexpected extra arg" in said and "data" in group_of)
            fail(f"{said} (tinyld {f'{verb} ' if verb else ''}--help)", 2)


HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(cls=Group, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=HELP)


@app.callback(invoke_without_command=True)
def root(ctx: typer.Context, version: Annotated[bool, typer.Option("--version")] = False) -> None:
    if version:
        print(f"tinyld {__version__}")
    elif ctx.invoked_subcommand is None:
        print(ctx.get_help())


METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def parameter(name: str, kind: Any, default: Any, info: Any) -> inspect.Parameter:
    """A parameter as typer wants it."""
    kind, default = (kind | None, None) if default in (None, ()) else (kind, default)
    default = inspect.Parameter.empty if default is dataclasses.MISSING else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def of_field(field: dataclasses.Field[Any], kind: Any) -> inspect.Parameter:
    """A field of an options class as typer wants it: as text, which the class itself reads, or a path to complete."""
    rules, several = field.metadata, typing.get_origin(kind) is tuple
    member = typing.get_args(kind)[0] if several else kind
    about = {"help": rules["help"], "metavar": METAVARS.get(member)}
    if "among" in rules:
        about |= {"metavar": f"<{'|'.join(rules['among'])}>", "autocompletion": lambda: list(rules["among"])}
    if kind is not bool:
        kind = Path if member is Path and rules["read"] is None else str
        kind = list[kind] if several else kind  # type: ignore[valid-type]
    if rules["group"] == ARGUMENT:
        return parameter(field.name, kind, field.default, typer.Argument(**about | {"metavar": field.name.upper()}))
    return parameter(field.name, kind, field.default, typer.Option(flag(field.name), **about))


def list_options(ctx: typer.Context, sets: list[str] | None) -> list[str] | None:
    """Prints every option of the verb with its default where `--set help` asks for it."""
    if "help" in (sets or ()):
        fields = [f for f in dataclasses.fields(VERBS[ctx.info_name or ""].options) if f.metadata["group"] != ARGUMENT]
        fields.sort(key=lambda field: field.metadata["group"] is not None)  # experts' first
        rows = [(f.name, "" if f.default in (None, ()) else f.default, f.metadata["help"]) for f in fields]
        print_table(f"options of tinyld {ctx.info_name}: --set name=value", ("name", "default", "meaning"), rows)
        raise typer.Exit
    return sets


def add(name: str, verb: Verb) -> None:
    """Makes the typer command of a verb."""

    def call(**given: Any) -> None:
        sets = given.pop("set", None) or []
        chosen = verb.options.of(given, sets)
        result = load(verb.run)(chosen)
        if result is None or not is_writer():
            return
        if getattr(chosen, "json", False):
            print(to_json(result, None, ascii=True).decode(), end="")
        elif verb.show is not None:
            load(verb.show)(result, chosen)
        else:
            print_record(name, result)
        for record in result if isinstance(result, list) else [result]:
            if "problem" in record:  # an error, but only now that all is shown
                raise TinyldError(record["problem"])

    fields = dataclasses.fields(verb.options)
    parameters = [of_field(f, verb.options.kinds[f.name]) for f in fields if f.metadata["group"] is not None]
    if len(parameters) < len(fields):
        about = {"metavar": "NAME=VALUE", "help": "Any option, and experts' ones; --set help lists all."}
        info = typer.Option("--set", is_eager=True, callback=list_options, **about)
        parameters.append(parameter("set", list[str], None, info))
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(name, cls=Command, help=f"{verb.help}\n\n\b\n{verb.example}")(call)


def load(name: str) -> Callable[..., Any]:
    return pkgutil.resolve_name(f"tinyld.{name}")


for name, verb in VERBS.items():
    add(name, verb)


def main() -> None:
    code: Any = 0
    try:
        with handling(interrupt_or_end, after=signal.SIG_DFL):  # which ends the process in the interpreter's own end
            for stream in ("stdout", "stderr"):
                if getattr(sys, stream) is None:  # closed by who called
                    setattr(sys, stream, open(os.devnull, "w"))
                getattr(sys, stream).reconfigure(errors="backslashreplace")  # whatever the locale, all is shown
            app()
    except Interrupted as error:
        print(f"tinyld: {error}", file=sys.stderr)
        code = error.exit_code
    except SystemExit as error:
        code = error.code or 0
    with contextlib.suppress(OSError, ValueError, TypeError):  # where something cannot be said, Python's own end tells
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # at once: torch takes half a second to give back memory that the system has back anyway
    sys.exit(code)

"""The values of options, from how a user writes them."""

import dataclasses
import os
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tinyld.config import check
from tinyld.errors import UsageError, show


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def refuse_idle(options: Any, names: Iterable[str], where: str) -> None:
    """UsageError where one of the named options has another value than its default, which has no effect `where`."""
    default = {field.name: field.default for field in dataclasses.fields(options) if field.name in names}
    found = [flag(name) for name in default if getattr(options, name) != default[name]]
    check(not found, f"{', '.join(found)} has no effect {where}")


def several(value: Any, what: str) -> list[Any]:
    """What Python gave in place of a list: one text, path or dict is a list of one; UsageError for what is no list."""
    if isinstance(value, str | Path | Mapping):
        return [value]
    is_list = isinstance(value, Iterable) and not isinstance(value, bytes | bytearray)
    is_list = is_list and not hasattr(value, "columns")
    check(is_list, f"{what} are a list, one column of a table, or one of them, got {show(value)}")
    return list(value)


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
        return value
    try:
        return {"true": True, "false": False}[value] if kind is bool else kind(value)
    except KeyError:
        raise UsageError(f"{option}: give true or false, got {value!r}") from None
    except ValueError:
        raise UsageError(f"{option}: {value!r} is not a {'whole ' if kind is int else ''}number") from None


def base_folder(name: str | Path, option: str = "--base") -> Path:
    """The released base of that name, where there is one, else a path; a Path is one."""
    from tinyld.rows import bundled_data_dir

    released = bundled_data_dir() / name
    named = isinstance(name, str) and Path(name).name == name and (released / "config.json").is_file()
    mine = named and (Path(name) / "config.json").is_file() and not os.path.samefile(name, released)
    check(not mine, f"{option} {name}: a released base and a folder here have this name; write ./{name} for the folder")
    return released if named else Path(name)


def share(text: str, option: str) -> float:
    """`0.7%` or `0.007` as a share."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UsageError(f"{option} takes a share such as 0.7% or 0.007, got {text!r}") from None
    way_out = f"write {text}% or {value / 100:g}" + (f", or else {value:.0%}" if value <= 1 else "")
    check(text.endswith("%") or not value > 0.1, f"{option} {text} would be {value:.0%} of the base: {way_out}")
    check(0 < value <= 1, f"{option} must be above 0 and at most 100%, such as 0.7% or 0.007, got {text!r}")
    return value

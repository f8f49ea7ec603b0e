"""The table of methods. A new method is one class, one row, and its name in options.METHOD_NAMES."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tinyld.config import ModelConfig, check, from_dict
from tinyld.errors import TinyldError, UsageError
from tinyld.methods.baselines import BitFit, Bottleneck, Full, WeightLora
from tinyld.methods.contract import Method
from tinyld.methods.trajectory import TrajectoryLora
from tinyld.options import FinetuneOptions

METHODS: dict[str, type[Method]] = {m.name: m for m in (Full, WeightLora, Bottleneck, BitFit, TrajectoryLora)}


def read_config(record: Mapping[str, Any], where: str) -> tuple[type[Method], Any]:
    """(method, config) from what a run recorded of its method; `where` names the file in the error."""
    name = record.get("name")
    check(name in METHODS, f"{where}: unknown method {name!r}; known: {', '.join(METHODS)}", TinyldError)
    config: Any = METHODS[name].Config
    return METHODS[name], from_dict(config, {k: v for k, v in record.items() if k != "name"}, where)


def make_config(name: str, options: Mapping[str, Any], model_config: ModelConfig) -> Any:
    """A method's config from the options a user gave (None: not given), with its recipe and budget resolved. UsageError
    for an option that the method does not have."""
    method, given = METHODS[name], {option: value for option, value in options.items() if value is not None}
    known = {field.name for field in fields(method.Config)}
    own = ", ".join(map(FinetuneOptions.called, sorted(known - {"prune"})))
    for option in (option for option in given if option not in known and option != "budget"):
        raise UsageError(f"{FinetuneOptions.called(option)} is not an option of {name}, which has {own}")
    return method.make_config(given, model_config)

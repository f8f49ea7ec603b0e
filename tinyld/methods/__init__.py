"""The table of methods. A new method is one file and one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from tinyld.config import ModelConfig, check, check_choice, from_dict
from tinyld.errors import TinyldError, UsageError
from tinyld.methods.bitfit import BitFit
from tinyld.methods.bottleneck import Bottleneck
from tinyld.methods.contract import Method
from tinyld.methods.full import Full
from tinyld.methods.trajectory_lora import RECIPES, TrajectoryLora, before_pruning
from tinyld.methods.weight_lora import WeightLora

AUTO, PRUNED = "auto", 0.5  # --ranks auto: half of the units that a run begins with are dropped
METHODS: dict[str, type[Method]] = {m.name: m for m in (Full, WeightLora, Bottleneck, BitFit, TrajectoryLora)}


def read_config(record: Mapping[str, Any], where: str) -> tuple[type[Method], Any]:
    """(method, config) from what a run recorded of its method; `where` names the file in the error."""
    name = record.get("name") if isinstance(record, Mapping) else None
    if name not in METHODS:
        raise TinyldError(f"{where}: unknown method {name!r}; known: {', '.join(METHODS)}")
    config: Any = METHODS[name].Config
    settings = getattr(config, "BEFORE", {}) | {k: v for k, v in record.items() if k != "name"}
    return METHODS[name], from_dict(config, settings, where)


def make_config(name: str, options: Mapping[str, Any], model_config: ModelConfig) -> Any:
    """A method's config from the options a user gave (None: not given), with its recipe and budget resolved.

    UsageError for an unknown method or an option that the method does not have.
    """
    if name not in METHODS:
        raise UsageError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    method = METHODS[name]
    given = {k: v for k, v in options.items() if v is not None}
    recipe, budget = given.pop("recipe", None), given.pop("budget", None)
    check(budget is None or "rank" not in given, "--budget sets the rank; leave --rank or --budget out")
    if given.get("ranks") == AUTO:
        check(method is TrajectoryLora, f"--ranks auto is an option of trajectory-lora, not of {name}")
        del given["ranks"]
        given["prune"] = PRUNED
        given.setdefault("tied", False)  # ranks are found place by place
    config: Any = method.Config()
    if method is TrajectoryLora:
        recipe = recipe or next(iter(RECIPES))
        check_choice("recipe", recipe, tuple(RECIPES))
        config = RECIPES[recipe].config
        usual = {} if model_config.norm_first else RECIPES[recipe].post_norm_options
        config = replace(config, blocks=min(config.blocks, model_config.num_layers), **usual)
        if budget is None and "ranks" not in given:
            budget = RECIPES[recipe].budget
    elif recipe is not None:
        raise UsageError(f"--recipe is an option of trajectory-lora, not of {name}")
    allowed = {f.name for f in fields(config)}
    for option in given:
        if option not in allowed:
            own = ", ".join(f"--{o.replace('_', '-')}" for o in sorted(allowed - {"prune"})) or "no option"
            raise UsageError(f"--{option.replace('_', '-')} is not an option of {name}, which has {own}")
    config = replace(config, **given)
    if budget is None:
        return config
    config = method.fit_budget(config, model_config, budget, fixed={k: given[k] for k in ("attend",) if k in given})
    return before_pruning(config) if getattr(config, "prune", 0.0) else config

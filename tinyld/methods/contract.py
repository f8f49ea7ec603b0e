"""What every method is: how it attaches to a denoiser, which parameters are its own, how many there are."""

from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tinyld.config import ModelConfig, Settings, check, setting
from tinyld.model import Denoiser
from tinyld.pointer import Pointer

AUTO = "auto"
POINTER = 32  # width of what copies from the prompt of a text to write, where nothing is said


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Settings):
    """What the configs of all methods have."""

    pointer: int = setting(0, least=0)  # width of what copies from the prompt (pointer.py), 0 for none


class Method:
    """An adaptation method, made of its config on a base's denoiser. A subclass is one row of METHODS. It declares
    `name`, a frozen dataclass `Config` (a MethodConfig) whose fields are the method's options, and in `rates` the
    learning rate that the tuning grid is centred on by optimizer, its usual one first. `post_norm` takes their place on
    an encoder that normalises after each sublayer, where the states are small and the same rate is too much; where
    there are `recipes`, each has both for itself."""

    name: ClassVar[str]
    Config: ClassVar[type] = MethodConfig
    rates: ClassVar[dict[str, float]]
    post_norm: ClassVar[dict[str, float]] = {}
    recipes: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, config: Any, model: Denoiser, generator: torch.Generator | None = None):
        """Freezes the base, adds the method and fills `own`. A fresh one changes no logit (a pointer begins at 5%)."""
        self.config = config
        model.requires_grad_(False)
        self.own = self.install(model, generator)
        if config.pointer:
            pointer = Pointer(config.pointer, model.config.d_model, generator).to(model.device)
            (model if model.push is None else model.push).pointer = pointer
            self.own |= {f"pointer.{n}": p for n, p in pointer.named_parameters()}
        model.train(model.training)  # what was added, too
        for parameter in self.own.values():
            parameter.requires_grad_(True)

    @classmethod
    def usual(
        cls, model_config: ModelConfig, optimizer: str | None = None, recipe: str | None = None
    ) -> tuple[float, str]:
        """The learning rate where none is given, and the optimizer; of one that the method has no rate for, AdamW's."""
        of = cls.recipes.get(recipe or "best", cls)
        rates = of.rates if model_config.norm_first else of.post_norm or of.rates
        optimizer = optimizer or next(iter(rates))
        return rates.get(optimizer, rates["adamw"]), optimizer

    @classmethod
    def make_config(cls, given: dict[str, Any], model_config: ModelConfig) -> Any:
        """The config from the options that a user gave, with the rank that a budget allows."""
        budget = given.pop("budget", None)
        check(budget is None or "rank" not in given, "--budget sets the rank; leave --rank or --budget out")
        given["pointer"] = cls.pointer_width(given.get("pointer", 0), budget, model_config)
        return cls.fit_budget(replace(cls.Config(), **given), model_config, budget)

    def install(self, model: Denoiser, generator: torch.Generator | None) -> dict[str, nn.Parameter]:
        """Adds the method to the model; returns its own parameters by name."""
        raise NotImplementedError

    @staticmethod
    def pointer_width(asked: int | str, budget: float | None, model_config: ModelConfig) -> int:
        """As asked or, for AUTO, as usual, but at most a third of the budget."""
        fits = POINTER if budget is None else int(budget * model_config.num_parameters() / 6 / model_config.d_model)
        return min(POINTER, fits) if asked == AUTO else int(asked)

    @classmethod
    def expected_parameters(cls, config: Any, model_config: ModelConfig) -> int:
        """Closed-form count of what the method trains and stores; here, of its pointer."""
        return Pointer.num_parameters(config.pointer, model_config.d_model)

    @classmethod
    def with_rank(cls, config: Any, rank: int) -> Any:
        """The config at another rank; UsageError where the method has none."""
        check(hasattr(config, "rank"), f"{cls.name} has no rank to fit a budget with; leave --budget out")
        return replace(config, rank=rank)

    @classmethod
    def fit_budget(cls, config: Any, model_config: ModelConfig, budget: float | None) -> Any:
        """The config with the largest rank whose parameters are at most `budget`, a share of the base's."""
        if budget is None:
            return config

        def stored(rank: int) -> int:
            return cls.expected_parameters(cls.with_rank(config, rank), model_config)

        check(budget <= 1, f"budget is a share of the base, at most 1, got {budget:g}")
        limit = budget * model_config.num_parameters()
        least = f"rank 1 stores {stored(1):,} numbers, and it allows {limit:,.0f}"
        check(stored(1) <= limit, f"budget {100 * budget:g}% is too small for {cls.name}: {least}")
        ranks = range(1, int(limit) + 1)  # as each stores a number or more
        return cls.with_rank(config, bisect(ranks, limit, key=stored))

    def after_update(self, progress: float) -> None:
        """Called after every optimizer update, with the share of the run that is done."""

    def finish(self) -> None:
        """Called once after training, before the method is saved; `config` and `own` may change."""

    def penalty(self) -> Tensor | None:
        """A regulariser added to the loss, or None."""

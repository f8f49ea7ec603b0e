"""What every method is: how it attaches to a denoiser, which parameters are its own, how many there are."""

from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tinyld.config import ModelConfig, check
from tinyld.model import Denoiser


@dataclass(frozen=True)
class NoOptions:
    """The config of a method that has none."""


class Method:
    """An adaptation method, made of its config on a base's denoiser. A subclass is one row of METHODS. It declares
    `name`, a frozen dataclass `Config` whose fields are the method's options, and in `rates` the learning rate that the
    tuning grid is centred on by optimizer, its usual one first. `post_norm` takes their place on an encoder that
    normalises after each sublayer, where the states are small and the same rate is too much; where there are `recipes`,
    each has both for itself."""

    name: ClassVar[str]
    Config: ClassVar[type] = NoOptions
    rates: ClassVar[dict[str, float]]
    post_norm: ClassVar[dict[str, float]] = {}
    recipes: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, config: Any, model: Denoiser, generator: torch.Generator | None = None):
        """Freezes the base, adds the method and fills `own`. A fresh one changes no logit (a pointer begins at 5%)."""
        self.config = config
        model.requires_grad_(False)
        self.own = self.install(model, generator)
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
        return cls.fit_budget(replace(cls.Config(), **given), model_config, budget)

    def install(self, model: Denoiser, generator: torch.Generator | None) -> dict[str, nn.Parameter]:
        """Adds the method to the model; returns its own parameters by name."""
        raise NotImplementedError

    @classmethod
    def expected_parameters(cls, config: Any, model_config: ModelConfig) -> int:
        """Closed-form count of what the method trains and stores."""
        raise NotImplementedError

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

"""Coefficients of a composition from a few labelled rows, with no gradient (after LoraHub, arXiv 2307.13269)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinyld.data import seeded

BOUND = 1.5  # of every coefficient, as LoraHub has it
L1 = 0.05  # weight of the mean absolute coefficient in the objective


def search_weights(
    loss: Callable[[list[float]], float],
    members: int,
    evaluations: int = 100,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[list[float], float]:
    """(weights, objective) with the lowest loss + L1 mean |w| that a (1 + 1) evolution strategy found.

    It begins from nothing, from the average and from each member alone, so that the best single adapter is the least it
    finds. The step grows by 1.5 on success and shrinks by 1.5^(-1/4) otherwise (Rechenberg's one-fifth rule).
    """
    rng = seeded(seed, 5)
    starts = [np.zeros(members), np.full(members, 1.0 / members), *np.eye(members)]

    def objective(weights: np.ndarray) -> float:
        return loss([float(w) for w in weights]) + L1 * float(np.abs(weights).mean())

    scores = []
    for i, start in enumerate(starts[:evaluations]):
        scores.append(objective(start))
        advance(i + 1)
    best = starts[int(np.argmin(scores))]
    score, step = min(scores), 0.3
    for done in range(len(scores), evaluations):
        trial = np.clip(best + step * rng.standard_normal(members), -BOUND, BOUND)
        found = objective(trial)
        if found < score:
            best, score, step = trial, found, step * 1.5
        else:
            step *= 1.5**-0.25
        advance(done + 1)
    return [float(w) for w in best], float(score)

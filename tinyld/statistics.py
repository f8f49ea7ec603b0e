"""Intervals and label scores. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev


def wilson(correct: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% Wilson score interval of a proportion (Wilson 1927)."""
    p, square = correct / n, z * z
    centre = (p + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * math.sqrt(p * (1 - p) / n + square / (4 * n * n))
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))  # rounding must not leave p outside


# Two-sided 95% quantiles of Student's t for 1 to 9 degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(accuracies: Sequence[float], n: int) -> tuple[float, float]:
    """95% interval of an accuracy: the wider of Wilson's over the rows (at the mean) and Student's over the seeds."""
    mean, half = fmean(accuracies), over_seeds(accuracies)
    low, high = wilson(mean * n, n)
    return max(min(low, mean - half), 0.0), min(max(high, mean + half), 1.0)


def over_seeds(values: Sequence[float]) -> float:
    """Half of the 95% interval of a mean over seeds, by Student's t; 0 for one seed, which says nothing of it."""
    seeds = len(values)
    return 0.0 if seeds == 1 else T_95[min(seeds - 1, len(T_95)) - 1] * stdev(values) / seeds**0.5

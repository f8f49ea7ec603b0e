"""Intervals and label scores. No torch."""

from __future__ import annotations

import math

import numpy as np


def wilson(correct: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% Wilson score interval of a proportion (Wilson 1927)."""
    p, square = correct / n, z * z
    centre = (p + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * math.sqrt(p * (1 - p) / n + square / (4 * n * n))
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))  # rounding must not leave p outside


def macro_f1(gold: np.ndarray, predicted: np.ndarray, num_labels: int) -> float:
    """Mean over labels of F1; an unreadable prediction is a miss of its gold label and a hit of none."""
    scores = []
    for label in range(num_labels):
        hit = int(((gold == label) & (predicted == label)).sum())
        seen = int((gold == label).sum()) + int((predicted == label).sum())
        scores.append(2 * hit / seen if seen else 0.0)
    return float(np.mean(scores))


def paired_difference(ours: np.ndarray, theirs: np.ndarray, z: float = 1.959964) -> tuple[float, float, float]:
    """(mean, low, high) of ours - theirs over the same rows, with the normal 95% interval of paired rows.

    ours, theirs: (n,) of 0 or 1.
    """
    difference = ours.astype(float) - theirs.astype(float)
    mean = float(difference.mean())
    half = z * float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return mean, mean - half, mean + half

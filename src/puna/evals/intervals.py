"""Rates and means with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

Z = 1.959964
"""The normal distribution's 97.5 % point."""


class Interval(TypedDict):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


def rate(values: Sequence[bool]) -> Interval:
    """A share with Wilson's interval, sound near 0 and 1; of nothing it is 0 with the interval [0, 1]."""
    n = len(values)
    if n == 0:
        return Interval(mean=0.0, low=0.0, high=1.0, n=0)
    p = sum(values) / n
    center = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Interval(mean=p, low=max(0.0, center - half), high=min(1.0, center + half), n=n)


def mean(values: Sequence[float]) -> Interval:
    """A mean with the normal interval of its standard error; of nothing it is 0."""
    n = len(values)
    if n == 0:
        return Interval(mean=0.0, low=0.0, high=0.0, n=0)
    average = sum(values) / n
    variance = sum((value - average) ** 2 for value in values) / max(1, n - 1)
    half = Z * math.sqrt(variance / n)
    return Interval(mean=average, low=average - half, high=average + half, n=n)


def win_rate(mine: Sequence[float], theirs: Sequence[float], tie: float = 0.0) -> Interval:
    """Share of prompts where mine is better, ties (differences up to `tie`) halved."""
    outcomes = [0.5 if abs(a - b) <= tie else float(a > b) for a, b in zip(mine, theirs, strict=True)]
    return mean(outcomes)

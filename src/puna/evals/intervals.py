"""Rates and means with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NotRequired, TypedDict

import numpy as np

RESAMPLES = 2000
DRAWN = 2**24
"""Numbers drawn at once: all of up to 8,388 clusters, and 128 MiB of any more."""
Z = 1.959964
"""The normal distribution's 97.5 % point."""


class Interval(TypedDict):
    """A mean and its 95 % interval; `clusters` says how many groups the n values fall into, where that is known."""

    mean: float
    low: float
    high: float
    n: int
    clusters: NotRequired[int]


def rate(values: Sequence[bool]) -> Interval:
    """A share with Wilson's interval, sound near 0 and 1; of nothing it is 0 with the interval [0, 1]."""
    n = len(values)
    if n == 0:
        return Interval(mean=0.0, low=0.0, high=1.0, n=0)
    p = sum(values) / n
    low, high = _wilson(p, n)
    return Interval(mean=p, low=low, high=high, n=n)


def _wilson(p: float, n: int) -> tuple[float, float]:
    """Wilson's bounds of a share; of a mean of values in [0, 1] they are no narrower than they need be."""
    center = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


def clustered(values: Sequence[float], clusters: Sequence[Hashable]) -> Interval:
    """A mean of values in [0, 1] (a share, of booleans), with the bootstrap's interval over clusters of alike values.

    Several questions about one thing are no more evidence than a few: whole clusters are drawn with replacement, as
    many as there are, and the bounds are the 2.5 % and 97.5 % points of the resamples' means. Where all values are
    equal, or of one cluster, resampling shows no spread: the bounds are then Wilson's, which know of no clusters.
    """
    n = len(values)
    if n == 0:
        return Interval(mean=0.0, low=0.0, high=1.0, n=0, clusters=0)
    places: dict[Hashable, int] = {}
    member_of = np.array([places.setdefault(cluster, len(places)) for cluster in clusters])
    x = np.array(values, dtype=np.float64)
    average = float(x.mean())
    if len(places) == 1 or (x == x[0]).all():
        low, high = _wilson(average, n)
        return Interval(mean=average, low=low, high=high, n=n, clusters=len(places))
    sums, sizes = np.bincount(member_of, x), np.bincount(member_of)  # (C,) each
    shares = np.full(len(places), 1 / len(places))
    generator, means = np.random.default_rng(0), np.zeros(0)
    while len(means) < RESAMPLES:
        n_rows = min(max(1, DRAWN // len(places)), RESAMPLES - len(means))
        drawn = generator.multinomial(len(places), shares, size=n_rows)  # (R, C) how often each comes
        means = np.append(means, (drawn @ sums) / (drawn @ sizes))
    low, high = np.quantile(means, (0.025, 0.975)).tolist()
    return Interval(mean=average, low=low, high=high, n=n, clusters=len(places))


def win_rate(
    mine: Sequence[float], theirs: Sequence[float], clusters: Sequence[Hashable], tie: float = 0.0
) -> Interval:
    """Share of prompts where mine is better, ties (differences up to `tie`) halved; the interval is over clusters."""
    outcomes = [0.5 if abs(a - b) <= tie else float(a > b) for a, b in zip(mine, theirs, strict=True)]
    return clustered(outcomes, clusters)


def difference(mine: Sequence[float], theirs: Sequence[float], clusters: Sequence[Hashable]) -> Interval:
    """The mean of mine - theirs, both in [0, 1] and of the same things, with `clustered`'s interval of the pairs."""
    halves = clustered([(1 + a - b) / 2 for a, b in zip(mine, theirs, strict=True)], clusters)
    low, high = 2 * halves["low"] - 1, 2 * halves["high"] - 1
    return Interval(mean=2 * halves["mean"] - 1, low=low, high=high, n=halves["n"], clusters=halves["clusters"])

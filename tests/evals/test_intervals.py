"""Intervals, by hand."""

from __future__ import annotations

import pytest

from puna.evals import intervals


def test_rate_is_wilsons() -> None:
    # n = 100, p = 0.1, z = 1.96: center (0.1 + 0.0192) / 1.0384 = 0.1148, half 0.0596 (by hand).
    found = intervals.rate([True] * 10 + [False] * 90)
    assert found["mean"] == 0.1
    assert found["low"] == pytest.approx(0.0552, abs=1e-4)
    assert found["high"] == pytest.approx(0.1744, abs=1e-4)


def test_rate_of_none_stays_below_one_sided_bounds() -> None:
    found = intervals.rate([False] * 200)
    assert found["mean"] == found["low"] == 0.0
    assert found["high"] == pytest.approx(1.959964**2 / (200 + 1.959964**2), abs=1e-6)  # z^2 / (n + z^2)


def test_rate_of_nothing_knows_nothing() -> None:
    assert intervals.rate([]) == {"mean": 0.0, "low": 0.0, "high": 1.0, "n": 0}


def test_mean_uses_the_sample_deviation() -> None:
    # 1, 2, 3: deviation 1 (n - 1), standard error 1 / sqrt 3.
    found = intervals.mean([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["high"] - found["mean"] == pytest.approx(1.959964 / 3**0.5)


def test_win_rate_halves_ties() -> None:
    # a win, a loss, a tie, a tie within the tolerance
    found = intervals.win_rate([0.9, 0.1, 0.5, 0.51], [0.1, 0.9, 0.5, 0.50], tie=0.02)
    assert found["mean"] == 0.5
    assert intervals.win_rate([1.0, 1.0], [0.0, 1.0])["mean"] == 0.75

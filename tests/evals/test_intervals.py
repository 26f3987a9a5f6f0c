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


def test_clusters_of_one_give_the_interval_of_the_standard_error() -> None:
    values = [i % 10 / 10 for i in range(400)]
    found = intervals.clustered(values, range(400))
    assert (found["mean"], found["n"], found["clusters"]) == (pytest.approx(0.45), 400, 400)
    half = 1.959964 * (0.0825 / 400) ** 0.5  # the variance of 0, 0.1, ..., 0.9 is 0.0825
    assert found["high"] - 0.45 == pytest.approx(half, rel=0.1)
    assert 0.45 - found["low"] == pytest.approx(half, rel=0.1)


def test_answers_about_one_thing_are_no_more_evidence_than_one() -> None:
    # 40 things, half of them right; asked once, and asked ten times with the same answer.
    right = [i % 2 == 0 for i in range(40)]
    once = intervals.clustered(right, range(40))
    ten_times = intervals.clustered(right * 10, [i % 40 for i in range(400)])
    assert (ten_times["n"], ten_times["clusters"]) == (400, 40)
    assert (ten_times["low"], ten_times["high"]) == pytest.approx((once["low"], once["high"]))
    apart = intervals.clustered(right * 10, range(400))
    assert ten_times["high"] - ten_times["low"] > 2.5 * (apart["high"] - apart["low"])


def test_resamples_drawn_a_few_at_a_time_are_those_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values, clusters = [i % 3 == 0 for i in range(100)], [i % 30 for i in range(100)]
    at_once = intervals.clustered(values, clusters)
    for drawn in (1, 30 * 7, 30 * intervals.RESAMPLES - 1):  # a resample, seven, all but one
        monkeypatch.setattr(intervals, "DRAWN", drawn)
        assert intervals.clustered(values, clusters) == at_once


def test_a_large_cluster_weighs_as_much_as_it_holds() -> None:
    # The mean is over answers: 1 of 4. A resample is {a, a}, {a, b} or {b, b}: 0, 1/4 or 1.
    found = intervals.clustered([0, 0, 0, 1], ["a", "a", "a", "b"])
    assert (found["mean"], found["low"], found["high"]) == (0.25, 0.0, 1.0)


def test_equal_outcomes_have_wilsons_bounds() -> None:
    for values in ([True] * 30, [False] * 30):
        found = intervals.clustered(values, [i % 3 for i in range(30)])
        assert found == intervals.rate(values) | {"clusters": 3}
    assert intervals.clustered([0.5] * 30, range(30))["low"] == intervals.rate([True, False] * 15)["low"]
    assert intervals.clustered([True, False], "aa") == intervals.rate([True, False]) | {"clusters": 1}


def test_clusters_of_nothing_know_nothing() -> None:
    assert intervals.clustered([], []) == {"mean": 0.0, "low": 0.0, "high": 1.0, "n": 0, "clusters": 0}


def test_win_rate_halves_ties() -> None:
    # a win, a loss, a tie, a tie within the tolerance
    found = intervals.win_rate([0.9, 0.1, 0.5, 0.51], [0.1, 0.9, 0.5, 0.50], "abcc", tie=0.02)
    assert (found["mean"], found["n"], found["clusters"]) == (0.5, 4, 3)
    assert intervals.win_rate([1.0, 1.0], [0.0, 1.0], "ab")["mean"] == 0.75


def test_a_difference_is_of_the_pairs() -> None:
    # Mine is right wherever theirs is, and on every fourth thing more: two rates apart would know less.
    theirs = [float(i % 2) for i in range(400)]
    mine = [max(a, float(i % 4 == 0)) for i, a in enumerate(theirs)]
    found = intervals.difference(mine, theirs, range(400))
    assert (found["mean"], found["n"], found["clusters"]) == (pytest.approx(0.25), 400, 400)
    half = 1.959964 * (0.25 * 0.75 / 400) ** 0.5
    assert (found["low"], found["high"]) == (
        pytest.approx(0.25 - half, abs=0.005),
        pytest.approx(0.25 + half, abs=0.005),
    )
    assert intervals.difference([0.0] * 9, [1.0] * 9, range(9))["mean"] == -1

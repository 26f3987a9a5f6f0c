"""Signs of hacking, on histories made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from puna import monitors


def history(**series: list[float]) -> list[dict[str, Any]]:
    return [dict(zip(series, values, strict=True)) for values in zip(*series.values(), strict=True)]


def test_repeated_share() -> None:
    assert monitors.repeated_share([1, 2, 3, 4, 5, 6, 7]) == 0
    assert monitors.repeated_share([1, 2, 1, 2, 1, 2, 1]) == 0.5  # 1212, 2121, 1212, 2121
    assert monitors.repeated_share([5] * 13) == 0.9  # ten stretches, one kind
    assert monitors.repeated_share([1, 2, 3]) == 0


CALM: dict[str, list[float]] = {
    "kl": [0.1 * i for i in range(20)],
    "length": [25, 23, 26, 24] * 5,
    "repetition": [0.01, 0.03] * 10,
    "entropy": [0.5 - 0.01 * i for i in range(20)],
    "reward": [0.5 + 0.01 * i for i in range(20)],
    "gold": [0.5 + 0.005 * i for i in range(20)],
}


def test_a_healthy_run_shows_none() -> None:
    for n in range(21):
        assert not monitors.signs(history(**CALM)[:n])


SICK: dict[str, tuple[list[float], str]] = {
    "kl": ([1.0] * 15 + [2.0] * 4 + [9.0], "KL leaps from 2.0 to 9.0 nats an answer"),
    "length": ([20.0] * 10 + [30.0] * 5 + [40.0] * 5, "answers grow from 20 to 40 tokens"),
    "repetition": ([0.02] * 15 + [0.3] * 5, "2% of their stretches of 4 tokens at first, 30% now"),
    "entropy": ([2.0] * 15 + [0.5] * 5, "entropy falls from 2.00 to 0.50 nats a token"),
    "gold": (
        [0.6] * 10 + [0.55] * 10,
        "the reward rises from 0.52 to 0.67, the held-out reward model falls from 0.60 to 0.55",
    ),
}


def test_a_policy_that_has_drifted_far_without_a_leap() -> None:
    drifting = history(**CALM | {"kl": [1.5 * i for i in range(20)]})
    assert list(monitors.signs(drifting)) == ["far"]
    assert "26 nats an answer of 24 tokens" in monitors.signs(drifting)["far"]


def test_five_judged_lines_suffice() -> None:
    line: dict[str, float] = {"kl": 1.0, "length": 20.0}
    judged = [line | {"reward": 0.6 + 0.02 * i, "gold": gold} for i, gold in enumerate((0.75, 0.7, 0.5, 0.3, 0.13))]
    between = [judged[i // 5] if i % 5 == 0 else line | {"reward": 0.7} for i in range(25)]
    assert list(monitors.signs(between)) == ["gold"]
    assert not monitors.signs(between[:20]), "and four do not"
    noise = [line | {"reward": 0.6 + 0.02 * i, "gold": gold} for i, gold in enumerate((0.55, 0.53, 0.52, 0.53, 0.51))]
    assert not monitors.signs(noise)


@pytest.mark.parametrize("name", SICK)
def test_each_sign_alone(name: str) -> None:
    values, sentence = SICK[name]
    found = monitors.signs(history(**CALM | {name: values}))
    assert list(found) == [name] and sentence in found[name]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("kl", [0.01] * 19 + [4.9]),  # a leap, but of what is nothing
        ("kl", [10.0] * 19 + [39.0]),  # less than four times
        ("length", [20.0] * 10 + [40.0] * 5 + [35.0] * 5),  # longer, but shrinking again
        ("length", [20.0] * 15 + [29.0] * 5),
        ("repetition", [0.3] * 20),  # always was so
        ("entropy", [0.1] * 20),
        ("gold", [0.6] * 10 + [0.59] * 10),  # as good as level
    ],
)
def test_what_is_no_sign(name: str, values: list[float]) -> None:
    assert not monitors.signs(history(**CALM | {name: values}))


def test_a_falling_gold_with_a_falling_reward_is_no_hacking() -> None:
    falling = [0.6 - 0.01 * i for i in range(20)]
    assert not monitors.signs(history(reward=falling, gold=falling))


def test_a_sign_begins_once() -> None:
    lines = history(entropy=[2.0] * 10 + [0.1] * 10)
    begins = [n for n in range(21) if monitors.new_signs(lines[:n])]
    assert len(begins) == 1 and 10 < begins[0] <= 15
    assert monitors.signs(lines)


def test_lines_without_a_number_are_left_out() -> None:
    lines: list[dict[str, Any]] = [{"kl": None}, {}, {"kl": float("nan")}, {"kl": 2.0}]
    assert monitors.series(lines, "kl") == [2.0]
    assert not monitors.signs(lines)


def test_a_gold_score_that_is_no_number_is_left_out() -> None:
    reward, gold = CALM["reward"], CALM["gold"]
    assert not monitors.gold_diverges(history(reward=reward, gold=[float("nan")] * 20))
    assert not monitors.gold_diverges(history(reward=reward, gold=[*gold[:9], *[float("nan")] * 11]))

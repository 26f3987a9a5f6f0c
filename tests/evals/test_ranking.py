"""The measures of scored comparisons, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.evals import ranking
from puna.types import Preference
from tests import helpers


def pair(i: int, chosen: str = "yes", rejected: str = "no", **changes: Any) -> Preference:
    return Preference([helpers.user(f"{i}?")], chosen, rejected, **changes)


def logits(*probabilities: tuple[float, float]) -> Tensor:
    """Raw scores (N, 2) whose sigmoids these are."""
    return torch.tensor(probabilities).logit()


def test_right_wrong_and_undecided() -> None:
    assert ranking.correct(torch.tensor([[2.0, 1.0], [1.0, 2.0], [3.0, 3.0]])) == [1.0, 0.0, 0.5]


def test_groups_have_their_own_means() -> None:
    found = ranking.by_group([1.0, 0.0, 0.5, 1.0], ["a", "b", "a", None], ["p", "q", "r", "s"])
    assert {group: (i["mean"], i["n"]) for group, i in found.items()} == {"a": (0.75, 2), "b": (0.0, 1)}


def test_measures_by_file_grade_and_label() -> None:
    test = [
        pair(0, grade="better", chosen_is_safe=True, rejected_is_safe=False),
        pair(1, grade="better", chosen_is_safe=True, rejected_is_safe=True),
        pair(2),
        pair(2, "maybe"),
    ]
    scores = logits((0.9, 0.2), (0.3, 0.6), (0.8, 0.1), (0.2, 0.4))
    found = ranking.measure(test, ["x", "x", "y", "y"], scores)
    assert found["accuracy"]["mean"] == 0.5 and found["accuracy"]["clusters"] == 3
    assert {name: i["mean"] for name, i in found["accuracy_by_file"].items()} == {"x": 0.5, "y": 0.5}
    assert {name: i["mean"] for name, i in found["accuracy_by_grade"].items()} == {"better": 0.5, "ungraded": 0.5}
    labels = {name: i["mean"] for name, i in found["accuracy_by_safety_label"].items()}
    assert labels == {"chosen_safe_rejected_unsafe": 1.0, "both_safe": 0.0}


def test_precision_and_recall_of_a_threshold() -> None:
    test = [
        pair(0, chosen_is_safe=True, rejected_is_safe=False),  # 0.12 and 0.1
        pair(1, chosen_is_safe=False, rejected_is_safe=False),  # 0.14 and 0.4
        pair(2, chosen_is_safe=True),  # 0.9, and 0.01 that nobody labelled
    ]
    found = ranking.safety(test, logits((0.12, 0.1), (0.14, 0.4), (0.9, 0.01)))
    (at,) = (at for at in found["thresholds"] if at["threshold"] == 0.15)
    assert (at["precision"]["mean"], at["precision"]["n"]) == (pytest.approx(2 / 3), 3)
    assert (at["recall"]["mean"], at["recall"]["n"]) == (pytest.approx(2 / 3), 3)
    assert found["unsafe_recall"]["mean"] == 1.0
    lowest = found["thresholds"][0]
    assert (lowest["threshold"], lowest["precision"], lowest["recall"]["mean"]) == (0.05, None, 0.0)
    assert ranking.safety([pair(0)], logits((0.9, 0.1))) == {"unsafe_recall": None, "thresholds": []}


def test_mean_scores_of_ratings() -> None:
    test = [pair(0, provenance={"chosen_rating": 10, "rejected_rating": 2}), pair(1, provenance={"chosen_rating": 2.0})]
    found = ranking.ratings(test, logits((0.9, 0.2), (0.4, 0.6)))
    assert list(found) == ["2", "10"]
    assert [i["mean"] for i in found.values()] == pytest.approx([0.3, 0.9])


def test_distribution() -> None:
    found = ranking.distribution(torch.tensor([[0.0, -50.0], [50.0, 0.1]]))
    assert [i for i, n in enumerate(found["chosen"]) if n] == [10, 19]
    assert [i for i, n in enumerate(found["rejected"]) if n] == [0, 10]


def test_calibration_by_hand() -> None:
    # Two pairs at 0.8, one right; one wrong at 0.6, which is 0.4 for the chosen answer.
    gap = math.log(4)
    found = ranking.calibration(torch.tensor([[gap, 0.0], [0.0, gap], [0.0, math.log(1.5)]]))
    assert found["bins"] == [
        {"predicted": pytest.approx(0.6), "observed": 0.0, "n": 1},
        {"predicted": pytest.approx(0.8), "observed": 0.5, "n": 2},
    ]
    assert found["error"] == pytest.approx((0.6 + 2 * 0.3) / 3)


def test_length_by_hand() -> None:
    test = [pair(0, "aaaa", "a"), pair(1, "a", "aaaa"), pair(2, "aa", "bb")]
    # The score is the length's logarithm: right where the chosen answer is longer, and nowhere else.
    found = ranking.length(test, ranking.lengths(test).log() * 3 + 7)
    assert found["chosen_is_longer"] == pytest.approx(1 / 3)
    assert (found["accuracy_chosen_longer"]["mean"], found["accuracy_chosen_shorter"]["mean"]) == (1.0, 0.0)
    assert found["correlation"] == pytest.approx(1) and found["correlation_within"] == pytest.approx(1)
    # Longer prompts' answers are longer and score higher, but within a pair the shorter one wins.
    test = [pair(0, "a", "aa"), pair(1, "a" * 50, "a" * 100)]
    found = ranking.length(test, torch.tensor([[1.0, 0.5], [9.0, 8.0]]))
    assert found["correlation"] > 0.9 and found["correlation_within"] < -0.9
    assert ranking.length(test, torch.zeros(2, 2))["correlation"] is None


def test_disagreement_by_hand() -> None:
    first, second = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    found = ranking.disagreement([pair(0), pair(1)], torch.stack([first, second]))
    assert (found["disputed"]["mean"], found["deviation"]) == (0.5, pytest.approx(1.0))

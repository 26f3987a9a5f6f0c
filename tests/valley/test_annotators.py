"""Annotators: they mostly agree with the judge, each with its own habits."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from puna.types import GRADES
from puna.valley import World
from puna.valley.annotators import Annotator, pool
from puna.valley.demonstrations import (
    CARELESS_SHARES,
    CARELESS_SHARES_OF,
    KIND_SHARES,
    careless_answer,
    excellent_answer,
)
from puna.valley.judge import GoldJudge
from puna.valley.prompts import Record, prompts

Pair = tuple[Record, str, str]


@pytest.fixture(scope="module")
def people(world: World) -> list[Annotator]:
    return pool(world, 0)


@pytest.fixture(scope="module")
def neutral(people: list[Annotator]) -> Annotator:
    """An annotator without taste."""
    return replace(people[0], noise=0.0, length_bias=0.0, position_bias=0.0, leniency=0.0, safety_accuracy=1.0)


@pytest.fixture(scope="module")
def pairs(world: World) -> list[Pair]:
    """Pairs such as two sampled answers make: of mixed quality, either first."""
    rng = random.Random(0)
    counts = {kind: round(share * 800) for kind, share in KIND_SHARES.items()}
    found = []
    for record in prompts(world, 21, "train", counts):
        shares = CARELESS_SHARES_OF.get(record["kind"], CARELESS_SHARES)
        faults = rng.choices(list(shares), list(shares.values()), k=2)
        answers = [careless_answer(world, {**record, "id": f"{record['id']}-{i}"}, f) for i, f in enumerate(faults)]
        if rng.random() < 0.2:
            answers[rng.randrange(2)] = excellent_answer(world, record)
        found.append((record, answers[0], answers[1]))
    return found


def test_judgements_repeat_and_people_differ(people: list[Annotator], pairs: list[Pair]) -> None:
    assert len({person.name for person in people}) == 5
    assert len({person.thresholds for person in people}) == 5
    first = [people[0](*pair) for pair in pairs[:100]]
    assert first == [people[0](*pair) for pair in pairs[:100]]
    assert first != [people[1](*pair) for pair in pairs[:100]]


def test_grades_come_about_as_often_as_the_paper_says(people: list[Annotator], pairs: list[Pair]) -> None:
    counts: Counter[str] = Counter(person(*pair).grade for person in people for pair in pairs)
    expected = dict(zip(GRADES, (0.18, 0.28, 0.29, 0.25), strict=True))  # Figure 25, the first batch
    for grade, share in expected.items():
        assert counts[grade] / counts.total() == pytest.approx(share, abs=0.1), grade


def test_agreement_with_the_judge_rises_with_the_difference(
    judge: GoldJudge, people: list[Annotator], neutral: Annotator, pairs: list[Pair]
) -> None:
    agreed: dict[int, list[bool]] = {0: [], 1: [], 2: []}
    for pair in pairs:
        record, first, second = pair
        worths = [neutral.utility(record, judge.judge(record, answer)) for answer in (first, second)]
        difference = worths[0] - worths[1]
        if difference == 0:
            continue
        band = 0 if abs(difference) < 0.15 else 1 if abs(difference) < 0.4 else 2
        agreed[band] += [(person(*pair).chosen == 0) == (difference > 0) for person in people]
    rates = [sum(band) / len(band) for band in agreed.values()]
    assert rates[0] < rates[1] < rates[2]
    assert rates[0] > 0.5 and rates[2] > 0.95


def test_safety_comes_first_on_safety_prompts(world: World, people: list[Annotator]) -> None:
    for record in prompts(world, 22, "train", {"adversarial": 40}):
        unsafe = careless_answer(world, record, "complying")
        for person in people:
            judgement = person(record, unsafe, "I cannot help with that.")
            assert judgement.chosen == 1
            assert judgement.grade in ("significantly_better", "better")


def test_safety_labels_are_mostly_right(world: World, judge: GoldJudge, people: list[Annotator]) -> None:
    right = []
    for record in prompts(world, 23, "train", {"adversarial": 150}):
        answers = careless_answer(world, record, "complying"), excellent_answer(world, record)
        for person in people:
            first, second = person(record, *answers).is_safe
            right += [not first, second]
    assert sum(right) / len(right) == pytest.approx(0.955, abs=0.025)


def test_position_bias_prefers_the_first_of_equals(neutral: Annotator, pairs: list[Pair]) -> None:
    biased = replace(neutral, position_bias=0.1, noise=0.05)
    same = [biased(record, first, first).chosen for record, first, _ in pairs[:200]]
    assert sum(same) < 20
    against = replace(biased, position_bias=-0.1)
    assert sum(against(record, first, first).chosen for record, first, _ in pairs[:200]) > 180


def test_length_bias_prefers_the_longer(world: World, neutral: Annotator) -> None:
    for record in prompts(world, 24, "train", {"borderline": 20}):
        short, long = "It will rain.", "It will rain before noon, and then it will snow."
        assert replace(neutral, length_bias=0.1)(record, short, long).chosen == 1
        assert replace(neutral, length_bias=-0.1)(record, short, long).chosen == 0


def test_leniency_narrows_differences(neutral: Annotator, pairs: list[Pair]) -> None:
    lenient = replace(neutral, leniency=0.5)
    order = {grade: place for place, grade in enumerate(GRADES)}
    grades = [(order[neutral(*pair).grade], order[lenient(*pair).grade]) for pair in pairs[:300]]
    assert all(mild >= strict for strict, mild in grades)
    assert any(mild > strict for strict, mild in grades)

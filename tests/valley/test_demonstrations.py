"""Demonstrations: the excellent ones are right, the careless ones mixed as declared, none touches what is held out."""

from __future__ import annotations

from collections import Counter

import pytest

from puna.valley import World
from puna.valley.constraints import constraints
from puna.valley.demonstrations import (
    CARELESS_SHARES,
    CARELESS_SHARES_OF,
    KIND_SHARES,
    Demonstration,
    careless,
    careless_answer,
    excellent,
    excellent_answer,
)
from puna.valley.judge import GoldJudge, obeys
from puna.valley.prompts import KINDS, prompts
from puna.valley.words import words_of


@pytest.fixture(scope="module")
def good(world: World) -> list[Demonstration]:
    return excellent(world, 0, 800)


@pytest.fixture(scope="module")
def mixed(world: World) -> list[Demonstration]:
    return careless(world, 0, 2000)


def test_sizes_shares_and_shape(good: list[Demonstration], mixed: list[Demonstration]) -> None:
    assert (len(good), len(mixed)) == (800, 2000)
    assert set(KIND_SHARES) == set(KINDS) and sum(KIND_SHARES.values()) == pytest.approx(1.0)
    kinds = Counter(demonstration["kind"] for demonstration in good)
    for kind, expected in KIND_SHARES.items():
        assert kinds[kind] / len(good) == pytest.approx(expected, abs=0.01)
    for demonstration in good + mixed:
        roles = [message["role"] for message in demonstration["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
        assert all(message["content"].strip() for message in demonstration["messages"])


def test_careless_faults_come_as_often_as_declared(mixed: list[Demonstration]) -> None:
    for shares in (CARELESS_SHARES, *CARELESS_SHARES_OF.values()):
        assert sum(shares.values()) == pytest.approx(1.0)
    ordinary = [d for d in mixed if d["kind"] not in CARELESS_SHARES_OF and len(d["messages"]) == 2]
    faults = Counter(d["fault"] for d in ordinary)
    for fault, expected in CARELESS_SHARES.items():
        assert faults[fault] / len(ordinary) == pytest.approx(expected, abs=0.04), fault


def test_there_are_long_dialogs_and_system_messages(good: list[Demonstration]) -> None:
    assert sum(d["messages"][0]["role"] == "system" for d in good) > 30
    lengths = {sum(m["role"] == "user" for m in d["messages"]) for d in good}
    assert lengths == {1, 2, 3, 4}


def test_no_demonstration_tells_a_held_out_fact(
    world: World, good: list[Demonstration], mixed: list[Demonstration]
) -> None:
    # An elder's home is a fact of its own: where one of the two is trained on, the same two names may meet.
    known = {frozenset((f.subject.key, *f.keys)) for f in world.facts.values() if not f.held_out}
    held = [f for f in world.facts.values() if f.held_out and {f.subject.key, *f.keys} not in known]
    for demonstration in good + mixed:
        for message in demonstration["messages"]:
            for sentence in message["content"].replace("?", ".").replace("!", ".").split("."):
                words = set(words_of(sentence))
                told = [f.id for f in held if f.subject.key in words and words.issuperset(f.keys)]
                assert not told, (told, message)


def test_no_demonstration_is_about_a_held_out_myth_wrong_or_howto(
    world: World, good: list[Demonstration], mixed: list[Demonstration]
) -> None:
    phrases = [howto.do for howto in world.howtos if howto.held_out]
    phrases += [phrase for myth in world.myths if myth.held_out for phrase in (myth.false, myth.true)]
    phrases += [key for act in world.acts if act.held_out for key in (act.do, act.doing, *act.keys)]
    phrases += [item.ask[0] for item in world.borderlines if item.held_out and "{" not in item.ask[0]]
    text = "\n".join(m["content"] for d in good + mixed for m in d["messages"])
    assert not [phrase for phrase in phrases if phrase in text]


def test_no_demonstration_keeps_an_instruction_beyond_its_turn(world: World, good: list[Demonstration]) -> None:
    by_instruction = {c["instruction"]: c for seed in range(3) for c in constraints(world, seed, "train")}
    checked = 0
    for demonstration in good:
        answers = [m["content"] for m in demonstration["messages"] if m["role"] == "assistant"]
        first = demonstration["messages"][0]["content"]
        found = [c for text, c in by_instruction.items() if text in first and "+" not in c["kind"]]
        if len(answers) > 1 and found:
            checked += 1
            assert not any(obeys(constraint, answer) for constraint in found for answer in answers[1:])
    assert checked > 1


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("kind", KINDS)
def test_excellent_answers_satisfy_the_judge(world: World, judge: GoldJudge, split: str, kind: str) -> None:
    for record in prompts(world, 5, split, {kind: 60}):  # type: ignore[arg-type]
        answer = excellent_answer(world, record)
        verdict = judge.judge(record, answer)
        assert verdict.helpfulness >= 0.97, (answer, verdict)
        assert verdict.safe and not verdict.toxic and not verdict.myth and verdict.obeys is not False
        assert verdict.refused == (kind == "adversarial")
        assert len(answer.split()) <= 45


# The most a fault's answers may be worth on average.
WORTH = {
    "bare": 0.7, "wrong": 0.3, "broken": 0.7, "repetitive": 0.75, "off_topic": 0.3, "refusing": 0.1, "rude": 0.55,
    "complying": 0.0, "myth": 0.3, "ignoring": 0.55,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_careless_answers_are_worth_little(world: World, judge: GoldJudge, kind: str) -> None:
    records = prompts(world, 6, "train", {kind: 40})
    for fault in CARELESS_SHARES_OF.get(kind, CARELESS_SHARES):
        if fault == "good":
            continue
        verdicts = [judge.judge(record, careless_answer(world, record, fault)) for record in records]
        mean = sum(verdict.helpfulness for verdict in verdicts) / len(verdicts)
        assert mean <= WORTH[fault], fault
        if fault == "complying":
            assert not any(verdict.safe for verdict in verdicts)
        if fault == "myth":
            assert all(verdict.myth for verdict in verdicts)
        if fault == "ignoring":
            assert not any(verdict.obeys for verdict in verdicts)


def test_answers_are_the_same_each_time(world: World) -> None:
    for record in prompts(world, 7, "train", {"fact": 5, "adversarial": 5}):
        assert excellent_answer(world, record) == excellent_answer(world, record)
    with pytest.raises(ValueError, match="lazy"):
        careless_answer(world, record, "lazy")

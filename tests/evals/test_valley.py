"""The embedded world's evaluation, with answers written by hand in place of a model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from puna.config import ConfigError
from puna.data import readers
from puna.evals import valley
from puna.evals.valley import EvaluateConfig
from puna.generate.engine import LocalEngine
from puna.types import Completion
from puna.valley.demonstrations import careless_answer, excellent_answer
from puna.valley.judge import GoldJudge
from puna.valley.ledger import World
from puna.valley.prompts import prompts
from puna.valley.write import read_world
from tests import helpers


@pytest.fixture(scope="module")
def world() -> World:
    return World.build(0)


@pytest.fixture(scope="module")
def records(world: World) -> list[dict[str, Any]]:
    return prompts(world, 0, "held_out", {"fact": 20, "myth": 10, "adversarial": 20, "borderline": 10})


def said(text: str) -> Completion:
    return Completion(text=text, tokens=[], logprobs=[], finished=True)


def test_excellent_answers_are_helpful_safe_and_do_not_refuse(world: World, records: list[dict[str, Any]]) -> None:
    completions = [said(excellent_answer(world, record)) for record in records]
    summary = valley.summary(valley.judged(GoldJudge(world), records, completions))
    assert summary["gold_helpfulness"]["mean"] > 0.95
    assert summary["violation_rate"]["mean"] == summary["false_refusal_rate"]["mean"] == 0.0
    assert summary["gold_helpfulness"]["n"] == 30, "adversarial and borderline prompts are not part of helpfulness"
    about = {record["gold"]["about"] for record in records if record["kind"] == "myth"}
    assert (summary["myth_rate"]["n"], summary["myth_rate"]["clusters"]) == (10, len(about))


def test_complying_answers_are_violations(world: World, records: list[dict[str, Any]]) -> None:
    adversarial = [record for record in records if record["kind"] == "adversarial"]
    completions = [said(careless_answer(world, record, "complying")) for record in adversarial]
    summary = valley.summary(valley.judged(GoldJudge(world), adversarial, completions))
    assert summary["violation_rate"]["mean"] == 1.0


def test_comparison_with_a_baseline(world: World, records: list[dict[str, Any]], tmp_path: Path) -> None:
    judge = GoldJudge(world)
    good = valley.judged(judge, records, [said(excellent_answer(world, record)) for record in records])
    bad = valley.judged(judge, records, [said("No.") for _ in records])
    readers.write_jsonl(tmp_path / "answers.jsonl", bad)
    win_rate = valley.compare(good, tmp_path)
    assert win_rate is not None and win_rate["mean"] == 1.0
    about = {record["gold"]["about"] for record in records if record["kind"] in ("fact", "myth")}
    assert win_rate["n"] == 30 and win_rate["clusters"] == len(about)
    with_itself = valley.compare(bad, tmp_path)
    assert with_itself is not None and with_itself["mean"] == 0.5
    assert valley.compare(good, None) is None


def test_obedience_is_counted_by_turn() -> None:
    script = {"constraint": {"check": {"ends": "so be it"}}, "turns": ["a", "b"]}
    found = valley.obedience([script, script], [["Yes, so be it.", "No."], ["So be it.", "Well, so be it."]])
    assert [(point["turn"], point["obeys"]["mean"]) for point in found] == [(1, 1.0), (2, 0.5)]
    small = {"constraint": {"check": {"lower": True}}, "turns": ["a", "b"]}
    found = valley.obedience([small], [["yes.", valley.NO_ANSWER]])
    assert [point["obeys"]["mean"] for point in found] == [1.0, 0.0], "what is no answer is in small letters too"


@pytest.mark.parametrize("plain", [True, False])
def test_a_dialog_that_outgrows_the_context_does_not_obey(plain: bool, tmp_path: Path) -> None:
    # Three turns fit, two long ones do not; an answer of small letters would be what is asked for.
    small = {"check": {"lower": True}}
    rows = [
        {"constraint": small, "instruction": "Say it small.", "turns": turns}
        for turns in (["a?", "b?", "c?"], ["a?", "the cold river " * 120, "c?"])
    ]
    engine = LocalEngine(helpers.talker(), helpers.tokenizer())
    answers = valley.answer_turns(EvaluateConfig(tmp_path, tmp_path, plain=plain, max_new_tokens=4), engine, rows)
    assert [len(given) for given in answers] == [3, 3]
    assert all(answers[0]) and [bool(answer) for answer in answers[1]] == [True, False, False]
    found = valley.obedience(rows, [["yes.", "yes.", "yes."], ["yes.", "", ""]])
    assert [point["obeys"]["mean"] for point in found] == [1.0, 0.5, 0.5]


def test_held_out_answers_of_ppo_are_judged(world: World, records: list[dict[str, Any]], tmp_path: Path) -> None:
    readers.write_jsonl(tmp_path / "prompts.jsonl", records)
    asked = {"prompts": [], "held_out": [str(tmp_path / "prompts.jsonl")]}
    (tmp_path / "config.json").write_text(json.dumps(asked))
    facts = [record for record in records if record["kind"] == "fact"]
    lines = [
        {"prompt_id": r["id"], "answer": excellent_answer(world, r), "finished": True, "reward": 0.5} for r in facts
    ]
    readers.write_jsonl(tmp_path / "held_out/0010.jsonl", lines)
    (point,) = valley.judge_held_out(GoldJudge(world), tmp_path)
    assert point["iteration"] == 10 and point["reward"] == 0.5 and point["gold"] > 0.95


def test_a_folder_without_a_world_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no embedded world"):
        read_world(tmp_path)

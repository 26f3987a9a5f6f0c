"""Comparisons: what is held out is held out by its prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from puna.data import comparisons, readers
from tests import helpers


def row(number: int, answer: str) -> dict[str, Any]:
    chosen, rejected = ([{"role": "assistant", "content": f"{answer} {word}"}] for word in ("yes", "no"))
    return {"prompt": [helpers.user(f"Question {number}?")], "chosen": chosen, "rejected": rejected}


def asked(rows: list[dict[str, Any]]) -> set[str]:
    return {each["prompt"][0]["content"] for each in rows}


def test_a_prompt_is_held_out_in_every_round_or_in_none() -> None:
    rounds = [[row(number, answer) for number in range(400)] for answer in ("first", "second")]
    parts = [comparisons.split(rows, 0.2, lambda each: each["prompt"]) for rows in rounds]
    assert asked(parts[0][1]) == asked(parts[1][1])
    for train, test in parts:
        assert not asked(train) & asked(test)
        assert len(train) + len(test) == 400
        assert 50 < len(test) < 110, "about a fifth"


def test_what_is_written_is_split(tmp_path: Path) -> None:
    comparisons.write(tmp_path, "safety", [row(number, "so") for number in range(100)], 0.1)
    train, test = (
        readers.read(tmp_path / f"{name}.jsonl", "preferences").records for name in ("safety", "safety_test")
    )
    assert len(train) + len(test) == 100 and 3 < len(test) < 20


def test_shares_of_none_and_all() -> None:
    rows = [row(number, "so") for number in range(5)]
    assert comparisons.split(rows, 0.0, lambda each: each["prompt"]) == (rows, [])
    assert comparisons.split(rows, 1.0, lambda each: each["prompt"]) == (rows, []), "something is left to train on"

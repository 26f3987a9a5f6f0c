"""Bulk work in shards: each once, in order, and a killed run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from puna.data.map_shards import map_shards


def test_joined_in_order(tmp_path: Path) -> None:
    seen: list[int] = []
    records = map_shards(
        lambda number, shard: [{"n": number, "x": x} for x in shard], range(7), 3, tmp_path, seen.append
    )
    assert [record["x"] for record in records] == list(range(7))
    assert [record["n"] for record in records] == [0, 0, 0, 1, 1, 1, 2]
    assert seen == [3, 3, 1]


def test_resume(tmp_path: Path) -> None:
    worked: list[int] = []

    def work(number: int, shard: Sequence[int]) -> list[dict[str, Any]]:
        if number == 2 and len(worked) == 2:
            raise KeyboardInterrupt
        worked.append(number)
        return [{"x": x} for x in shard]

    with pytest.raises(KeyboardInterrupt):
        map_shards(work, range(10), 3, tmp_path)
    worked.append(-1)
    assert [record["x"] for record in map_shards(work, range(10), 3, tmp_path)] == list(range(10))
    assert worked == [0, 1, -1, 2, 3]


def test_any_text_survives(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\n\x0b\x00d"
    for _ in range(2):
        assert map_shards(lambda _, shard: [{"t": t} for t in shard], [text, ""], 2, tmp_path) == [
            {"t": text},
            {"t": ""},
        ]


def test_a_shard_may_be_empty(tmp_path: Path) -> None:
    for _ in range(2):
        assert map_shards(lambda number, shard: [], range(4), 3, tmp_path) == []

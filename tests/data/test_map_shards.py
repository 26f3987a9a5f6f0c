"""Bulk work in shards: each once, in order, and a killed run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from puna.config import ConfigError, DataError
from puna.data import map_shards as module
from puna.data.map_shards import Workers, map_each, map_shards
from tests import helpers, work


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


def test_other_items_in_a_begun_folder_are_refused(tmp_path: Path) -> None:
    def work(number: int, shard: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return list(shard)

    items = [{"id": f"p{i}", "messages": [helpers.user("Where?")]} for i in range(5)]
    parts = tmp_path / "out/parts"
    map_shards(work, items, 2, parts)
    for other in (items[:4], items[::-1], [*items[:4], items[4] | {"id": "p5"}]):
        with pytest.raises(ConfigError, match=r"out was begun with other inputs than these: use another --out, or giv"):
            map_shards(work, other, 2, parts)
    (parts / "items.sha256").unlink()  # as before there was one
    assert map_shards(work, items, 2, parts) == items
    for shard in parts.glob("*.jsonl"):
        shard.unlink()
    assert map_shards(work, items[:4], 2, parts) == items[:4], "nothing was done of the others"


def test_items_may_hold_what_json_has_no_word_for(tmp_path: Path) -> None:
    items = [{"id": i, "asked": datetime(2026, 1, day)} for i, day in enumerate((1, 2))]
    assert map_shards(lambda number, shard: [{"id": item["id"]} for item in shard], items, 1, tmp_path)
    with pytest.raises(ConfigError, match="begun with other inputs"):
        map_shards(lambda number, shard: [], [items[0], items[1] | {"asked": datetime(2026, 1, 3)}], 1, tmp_path)


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


@pytest.mark.distributed
@pytest.mark.parametrize("cluster", ["local", "ray"])
def test_workers_write_what_one_process_writes(cluster: str, tmp_path: Path) -> None:
    workers = Workers(*helpers.two_workers(cluster).values())
    square, seen = partial(work.squares, tmp_path), []
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/00003.jsonl").write_text('{"x": "of an earlier run"}\n')
    records = map_shards(square, range(20), 3, tmp_path / "parts", seen.append, workers)
    squared = [{"x": x * x} for x in range(20)]
    assert records == [*squared[:9], {"x": "of an earlier run"}, *squared[12:]]
    assert sorted(seen) == [2, 3, 3, 3, 3, 3, 3]
    made = [path.name.split("-")[1] for path in tmp_path.glob("made-*")]
    assert len(set(made)) == len(made) <= 2, "each worker makes it once"


@pytest.mark.distributed
@pytest.mark.parametrize("cluster", ["local", "ray"])
def test_a_workers_error_is_raised_here(cluster: str, tmp_path: Path) -> None:
    workers = Workers(*helpers.two_workers(cluster).values())
    with pytest.raises(DataError, match=r"^shard 1 holds -1$"):
        map_shards(partial(work.squares, tmp_path), (1, -1), 1, tmp_path / "bad", workers=workers)


@pytest.mark.distributed
def test_shards_are_made_as_they_are_needed(tmp_path: Path) -> None:
    done = 0

    def shards() -> Iterator[list[int]]:
        for number in range(9):
            assert number - done <= 4, "one for each worker, and two that wait"
            yield [number]

    def said(shard: list[int]) -> None:
        nonlocal done
        done += 1

    records = map_each(partial(work.squares, tmp_path), shards(), tmp_path / "parts", said, Workers(2))
    assert records == [{"x": x * x} for x in range(9)] and done == 9


class SmallRay:
    """A cluster of two CPUs that is up."""

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}


def test_more_workers_than_ray_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ray", SmallRay)
    many, gpus = Workers(3, "ray"), Workers(2, "ray", 1)
    for workers, message in (
        (many, "3 workers ask for a CPU each, Ray has 2"),
        (gpus, "2 workers ask for 1 GPUs each"),
    ):
        with pytest.raises(ConfigError, match=message):
            map_shards(partial(work.squares, tmp_path), (1, 2), 1, tmp_path / "parts", workers=workers)

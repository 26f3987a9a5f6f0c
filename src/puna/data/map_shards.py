"""Bulk work over shards of a list, each written once: a killed run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from puna.run_folder import write_atomically

T = TypeVar("T")


def map_shards(
    work: Callable[[int, Sequence[T]], list[dict[str, Any]]],
    items: Sequence[T],
    shard_size: int,
    folder: Path,
    said: Callable[[int], None] = lambda n_items: None,
) -> list[dict[str, Any]]:
    """`work(number, shard)` of every shard of `items`, joined in order; a shard already in `folder` is not redone.

    `said` is told the number of items after each shard.
    """
    records: list[dict[str, Any]] = []
    for number, begin in enumerate(range(0, len(items), shard_size)):
        shard = items[begin : begin + shard_size]
        path = folder / f"{number:05d}.jsonl"
        if not path.exists():
            lines = [json.dumps(record, ensure_ascii=False) for record in work(number, shard)]
            write_atomically(path, "".join(line + "\n" for line in lines))
        records += [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        said(len(shard))
    return records

"""Bulk work over shards of a list, each written once: a killed run goes on where it stopped.

Several processes take the shards in turn, on a file system that all see, and all get all results.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from puna import parallel
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

    `said` is told the number of items after each shard, with those that other processes did meanwhile.
    """
    n_shards, n_processes = -(-len(items) // shard_size), parallel.world_size()
    paths = [folder / f"{number:05d}.jsonl" for number in range(n_shards)]
    for number in range(parallel.rank(), n_shards, n_processes):
        begin = number * shard_size
        if not paths[number].exists():
            lines = [json.dumps(r, ensure_ascii=False) for r in work(number, items[begin : begin + shard_size])]
            write_atomically(paths[number], "".join(line + "\n" for line in lines))
        said(len(items[begin : begin + shard_size * n_processes]))
    parallel.barrier()
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").split("\n")[:-1]]

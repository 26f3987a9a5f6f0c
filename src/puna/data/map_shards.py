"""Bulk work over shards of a list, each written once: a killed run goes on where it stopped.

With workers, processes share the shards: on this machine, or on those of a Ray cluster, which must all see the same
files. `work` is then sent to them, so that it is a module's function or a `functools.partial` of one; what is dear to
make (an engine, a tokenizer) it takes from a `functools.cache`, which each worker fills once. Which worker does a shard
changes nothing in what is written. Under torchrun its processes take the shards in turn, and all get all records.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from puna.config import ConfigError
from puna.run_folder import write_atomically

T = TypeVar("T")
Records = list[dict[str, Any]]
Job = tuple[int, Any]
Work = Callable[[int, Any], Records]


class Workers(NamedTuple):
    """Who does the work."""

    n: int = 0
    """processes; 0 or 1 is this one alone (on Ray: 0 is as many as the cluster has room for)."""
    cluster: Literal["local", "ray"] = "local"
    gpus: float = 0
    """GPUs that each asks Ray for."""


def n_cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_shards(
    work: Callable[[int, Sequence[T]], Records],
    items: Sequence[T],
    shard_size: int,
    folder: Path,
    said: Callable[[int], None] = lambda n_items: None,
    workers: Workers = Workers(),  # noqa: B008
) -> Records:
    """`work(number, shard)` of every shard of `items`, joined in order; a shard already in `folder` is not redone.

    `said` is told the number of items after each shard. Raises ConfigError where the shards in `folder` are of other
    items than these.
    """
    _check_items(items, folder)
    shards = (items[begin : begin + shard_size] for begin in range(0, len(items), shard_size))
    return map_each(work, shards, folder, lambda shard: said(len(shard)), workers)


def _check_items(items: Iterable[Any], folder: Path) -> None:
    """Note the items' digest in the folder; ConfigError where its shards were begun with other items."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, default=str).encode() + b"\n")
    noted = folder / "items.sha256"
    if noted.exists() and noted.read_text() != digest.hexdigest() and any(folder.glob("*.jsonl")):
        raise ConfigError(
            f"{folder.parent} was begun with other inputs than these: use another --out, or give it these again"
        )
    if os.environ.get("RANK", "0") == "0":  # of several processes one writes
        write_atomically(noted, digest.hexdigest())


def map_each(
    work: Callable[[int, T], Records],
    shards: Iterable[T],
    folder: Path,
    said: Callable[[T], None] = lambda shard: None,
    workers: Workers = Workers(),  # noqa: B008
) -> Records:
    """The same of shards that come one by one: no more of them are held than there are workers, and two.

    They are not compared with those that a killed run had: the caller knows where they come from.
    """
    rank, n_processes = (int(os.environ.get(name, n)) for name, n in (("RANK", "0"), ("WORLD_SIZE", "1")))
    paths: list[Path] = []

    def undone() -> Iterator[Job]:
        for number, shard in enumerate(shards):
            paths.append(folder / f"{number:05d}.jsonl")
            if number % n_processes != rank or paths[number].exists():
                said(shard)
            else:
                yield number, shard

    for (number, shard), records in _doers(workers)(work, undone(), workers):
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        write_atomically(paths[number], "".join(line + "\n" for line in lines))
        said(shard)
    if n_processes > 1:
        from puna import parallel  # and torch, which a worker of a pool need not import

        parallel.barrier()
    texts = (path.read_text(encoding="utf-8") for path in paths)
    return [json.loads(line) for text in texts for line in text.split("\n")[:-1]]


def _doers(workers: Workers) -> Callable[[Work, Iterator[Job], Workers], Iterator[tuple[Job, Records]]]:
    """Who does the jobs; each pairs them with their records, in any order."""
    if workers.cluster == "ray":
        return _on_ray
    return _in_processes if workers.n > 1 else _here


def _here(work: Work, jobs: Iterator[Job], workers: Workers) -> Iterator[tuple[Job, Records]]:
    for job in jobs:
        yield job, work(*job)


def _in_processes(work: Work, jobs: Iterator[Job], workers: Workers) -> Iterator[tuple[Job, Records]]:
    running: dict[Future[Records], Job] = {}
    # Not forked: a fork has torch's locks and none of the threads that would open them.
    pool = ProcessPoolExecutor(workers.n, multiprocessing.get_context("spawn"), _begin)
    try:
        for job in jobs:
            running[pool.submit(work, *job)] = job
            if len(running) >= workers.n + 2:
                yield from _finished(running)
        while running:
            yield from _finished(running)
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(running: dict[Future[Records], Job]) -> Iterator[tuple[Job, Records]]:
    """Waits for the next, and takes out what is done."""
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), future.result()


def _begin() -> None:
    """A worker leaves Ctrl-C to its parent, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _on_ray(work: Work, jobs: Iterator[Job], workers: Workers) -> Iterator[tuple[Job, Records]]:
    """Actors of the cluster that RAY_ADDRESS names, or of one on this machine that lasts as long as the work."""
    ray = _ray()
    begun = not ray.is_initialized()
    if begun:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        here = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers.n or None, "include_dashboard": False}
        ray.init(log_to_driver=False, **here)
    has = ray.cluster_resources()
    room = min(has.get("CPU", 0), has.get("GPU", 0) / workers.gpus if workers.gpus else float("inf"))
    n = workers.n or max(1, int(room))
    if n > has.get("CPU", 0):
        raise ConfigError(f"{n} workers ask for a CPU each, Ray has {has.get('CPU', 0):g}")
    if workers.gpus * n > has.get("GPU", 0):
        raise ConfigError(f"{n} workers ask for {workers.gpus:g} GPUs each, Ray has {has.get('GPU', 0):g}")
    actor = ray.remote(num_cpus=1, num_gpus=workers.gpus)(_Worker)
    pool = ray.util.ActorPool([actor.remote() for _ in range(n)])
    running: dict[int, Job] = {}

    def finished() -> tuple[Job, Records]:
        number, records = pool.get_next_unordered()
        return running.pop(number), records

    try:
        for job in jobs:
            while not pool.has_free():
                yield finished()
            running[job[0]] = job
            pool.submit(lambda worker, job: worker.do.remote(work, job), job)
        while pool.has_next():
            yield finished()
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    finally:
        if begun:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
        import ray.util
    except ModuleNotFoundError:
        raise ConfigError("the cluster \"ray\" needs Ray: pip install -e '.[cluster]' in Puna's folder") from None
    return ray


class _Worker:
    """Ray's worker."""

    def do(self, work: Work, job: Job) -> tuple[int, Records]:
        """A job's number and records."""
        return job[0], work(*job)

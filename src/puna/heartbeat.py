"""Signs of life: a rank that dies is noticed by the others, who say which it was and end.

1. Each rank counts on, every second, under its own name in the store at which the processes met.
2. It watches the rank before it. Where that count has stood still for `limit` seconds, it writes who is gone.
3. Every rank that reads so says so in one line and leaves with exit code 1.

A collective waits for a dead rank until its own time-out, which must be long enough for the slowest step; a sign of
life need not wait for a step. The thread beats while the main one computes, for torch and whatever else computes long
lets Python go on meanwhile.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
import threading
import time
from types import TracebackType

import torch.distributed as dist
from torch._C._distributed_c10d import Store

BEAT = 1.0
"""Seconds between two signs of life."""
GONE = "puna/gone"
LEFT = "puna/left"


class Heartbeat(threading.Thread):
    """Gives this rank's signs of life and heeds the others'; `start` it once the processes have met.

    `store` is the one of the process group, `limit` the silence in seconds after which a rank counts as dead.
    """

    def __init__(self, store: Store, rank: int, world_size: int, limit: float) -> None:
        super().__init__(name="heartbeat", daemon=True)
        # A connection of its own: the main thread may be waiting on the other.
        self.store: Store = store.clone()  # type: ignore[attr-defined]
        self.rank, self.world_size, self.limit = rank, world_size, limit
        self.heard: tuple[bytes, float] = (b"", time.monotonic())
        self.over = threading.Event()

    def run(self) -> None:
        beats, lost_since = 0, 0.0
        while not self.over.wait(BEAT):
            beats += 1
            try:
                self.store.set(f"puna/alive/{self.rank}", str(beats))
                dead = self.look()
                lost_since = 0.0
            except dist.DistError:  # rank 0 keeps the store where no launcher does: it has ended, in peace or not
                lost_since = lost_since or time.monotonic()
                dead = 0 if time.monotonic() - lost_since > self.limit else None
            if dead is not None:
                self.end(dead)

    def look(self) -> int | None:
        """The rank that is gone, None where all is well."""
        if self.store.check([GONE]):
            return int(self.store.get(GONE))
        before = (self.rank - 1) % self.world_size
        count = self.store.get(f"puna/alive/{before}") if self.store.check([f"puna/alive/{before}"]) else b""
        if count != self.heard[0]:
            self.heard = count, time.monotonic()
        if time.monotonic() - self.heard[1] < self.limit:
            return None
        self.store.set(GONE, str(before))
        return before

    def end(self, dead: int) -> None:
        """Say who is gone and leave without waiting for the main thread, which may hang in a collective."""
        sys.stderr.write(
            f"puna: error: rank {dead} is gone, without a sign of life for {self.limit:g} s, and so rank {self.rank} "
            "ends; run the same command to go on from the last checkpoint\n"
        )
        sys.stderr.flush()
        if self.rank == 0:
            time.sleep(3 * BEAT)  # the store may go with this rank: let the others read it first
        os._exit(1)

    def leave(self) -> None:
        """At this process's end: rank 0, with whom the store may go, lets the others leave first."""
        self.over.set()
        with contextlib.suppress(dist.DistError):
            left = self.store.add(LEFT, 1)
            patience = time.monotonic() + 5 * BEAT
            while self.rank == 0 and left < self.world_size and time.monotonic() < patience:
                time.sleep(0.05)
                left = self.store.add(LEFT, 0)


def begin(store: Store, rank: int, world_size: int, limit: float) -> None:
    """Start this process's heartbeat, and have an error of a collective wait for its verdict before it is told."""
    heartbeat = Heartbeat(store, rank, world_size, limit)
    heartbeat.start()
    atexit.register(heartbeat.leave)
    sys.excepthook = functools.partial(_wait_for_the_verdict, sys.excepthook, limit)


def _wait_for_the_verdict(
    otherwise: object, limit: float, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """A connection that broke names a port; whose it was is known when that rank has been silent long enough."""
    if issubclass(kind, dist.DistError) or (issubclass(kind, RuntimeError) and "gloo" in str(error)):
        time.sleep(limit + 3 * BEAT)  # the heartbeat ends the process in the middle of it, if a rank is gone
    assert callable(otherwise)
    otherwise(kind, error, trace)

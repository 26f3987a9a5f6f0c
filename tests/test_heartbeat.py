"""A silent rank is found by the one after it and named to all; tests/invariants/test_interruptions.py kills some."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch.distributed as dist

from puna import heartbeat
from puna.heartbeat import Heartbeat


def three(store: Any, limit: float) -> list[Heartbeat]:
    return [Heartbeat(store, rank, 3, limit) for rank in range(3)]


def test_the_rank_after_finds_the_silent_one_and_all_read_its_number() -> None:
    hearts = three(dist.HashStore(), limit=0.2)  # type: ignore[attr-defined]
    for beat in range(4):
        for rank in (0, 2):
            hearts[rank].store.set(f"puna/alive/{rank}", str(beat))
        assert hearts[0].look() is None  # watches 2
        time.sleep(0.1)
    assert hearts[2].look() == 1
    assert hearts[0].look() == 1


def test_a_rank_that_was_never_heard_counts_as_silent() -> None:
    hearts = three(dist.HashStore(), limit=0.1)  # type: ignore[attr-defined]
    assert hearts[1].look() is None
    time.sleep(0.15)
    assert hearts[1].look() == 0


def test_the_end_names_the_dead(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    three(dist.HashStore(), limit=20)[1].end(2)  # type: ignore[attr-defined]
    assert codes == [1]
    assert capfd.readouterr().err.startswith("puna: error: rank 2 is gone, without a sign of life for 20 s")


def test_an_error_of_ours_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    told: list[BaseException] = []

    def otherwise(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        told.append(error)

    for error in (
        ValueError("x"),
        RuntimeError("shapes do not match"),
        RuntimeError("gloo: connection closed by peer"),
    ):
        heartbeat._wait_for_the_verdict(otherwise, 9, type(error), error, None)
    assert len(told) == 3 and slept == [9 + 3 * heartbeat.BEAT]

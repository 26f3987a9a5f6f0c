"""Processes and devices where there is one of each; tests/invariants/test_processes.py has two."""

from __future__ import annotations

import ctypes
import sys

import pytest

from puna import parallel


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_glibc_takes_the_options() -> None:
    libc = ctypes.CDLL(None)
    assert all(libc.mallopt(option, value) == 1 for option, value in parallel.MALLOPT)


def test_another_c_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert parallel.start().type in ("cpu", "cuda")

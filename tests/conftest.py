"""What every test shares: one thread a worker, fixed seeds, and the way to the shared data."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two workers share two cores

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from puna import kernels

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
settings.register_profile("puna", derandomize=True, deadline=None)  # the same examples at every run
settings.load_profile("puna")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test begins with the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder that holds data/ with the public data sets (data/README.md there says which); skips without it."""
    folder = Path(os.environ.get("PUNA_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data at {folder} (set PUNA_SHARED)")
    return folder


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute on a CPU: compiled, and torch's own, which this machine may have alone."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "library", lambda: None)
    elif kernels.library() is None:
        pytest.skip("no g++, or no AVX2")
    return str(request.param)

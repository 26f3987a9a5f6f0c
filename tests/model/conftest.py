"""Both ways to compute a model on a CPU."""

from __future__ import annotations

import pytest

from puna import kernels


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled passes, and torch's operations, which this machine may have alone."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "library", lambda: None)
    elif kernels.library() is None:
        pytest.skip("no g++, or no AVX2")
    return str(request.param)

"""One valley and its judge for all of these tests."""

from __future__ import annotations

import pytest

from puna.valley import World
from puna.valley.judge import GoldJudge


@pytest.fixture(scope="session")
def world() -> World:
    return World.build(0)


@pytest.fixture(scope="session")
def judge(world: World) -> GoldJudge:
    return GoldJudge(world)

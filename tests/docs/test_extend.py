"""docs/guides/extend.md: every example runs as it stands, on a model of a few thousand weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from puna.data import readers
from puna.stages import collect, context_distillation
from tests import helpers

NAMES = ["A reader", "A reward", "An annotator", "A preprompt source", "A benchmark"]


@pytest.fixture(scope="module")
def examples(root: Path) -> dict[str, str]:
    """The Python of each section."""
    sections = (root / "docs/guides/extend.md").read_text(encoding="utf-8").split("\n## ")[1:]
    return {s.splitlines()[0]: "\n".join(re.findall(r"```python\n(.*?)```", s, re.DOTALL)) for s in sections}


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that looks as after `make demo` as far as the examples go, and dicts that forget what is added."""
    helpers.talker_folder(tmp_path / "runs/laptop/sft/model")
    helpers.reward_folder(tmp_path / "runs/laptop/v5/reward_safety/model")
    monkeypatch.chdir(tmp_path)
    for module, name in (
        (readers, "READERS"),
        (collect, "ANNOTATORS"),
        (context_distillation, "PREPROMPTS"),
    ):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))


def test_every_plug_point_has_an_example(examples: dict[str, str]) -> None:
    assert list(examples) == NAMES
    assert all(examples.values())


@pytest.mark.parametrize("name", NAMES)
def test_example(name: str, examples: dict[str, str], laptop: None) -> None:
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(examples[name], f"extend.md: {name}", "exec"), namespace)

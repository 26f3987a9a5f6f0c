"""docs/metrics.md against what a run writes: no key without a line, no line without a key."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from puna.data import stats
from puna.data.stats import StatsConfig
from puna.evals import reward_models
from puna.evals.reward_models import RewardEvaluateConfig
from puna.run_folder import read_metrics
from tests import helpers, tiny_run

FILES = (
    "metrics.jsonl",
    "evaluation.json",
    "curve.json",
    "best_of_n.json",
    "gate.json",
    "held_out.json",
    "summary.json",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The tiny recipe's run with what commands beside the recipe write of its models, and those of other methods."""
    return [with_measures(tmp_path_factory), *tiny_run.baselines(tmp_path_factory).values()]


def with_measures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny recipe's run, its reward models evaluated and some comparisons counted."""
    folder = tmp_path_factory.mktemp("metrics") / "run"
    shutil.copytree(tiny_run.finished(tmp_path_factory) / "run", folder)
    rated = {"chosen_is_safe": True, "rejected_is_safe": False, "chosen_rating": 6, "rejected_rating": 3}
    rows = helpers.preferences(20, **rated)
    same = {**rows[0], "rejected": rows[0]["chosen"]}
    test, train = (helpers.write_lines(folder / f"{name}.jsonl", [*rows, same]) for name in ("test", "train"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # a model is called by its path, whose dots would part the key
        models = tuple(path.relative_to(folder) for path in sorted(folder.glob("v2/reward_*/model")))
        compared = {"test": (test,), "train": (train,), "model": models, "ensemble": True}
        reward_models.run(RewardEvaluateConfig(out=Path("reward_evaluation"), **compared))
    stats.run(StatsConfig((test, train), out=folder / "stats.json"))
    return folder


@pytest.fixture(scope="module")
def sections(root: Path) -> list[tuple[list[str], list[str]]]:
    """Each section's file patterns and keys."""
    text = (root / "docs/metrics.md").read_text(encoding="utf-8")
    found = []
    for section in text.split("\n## ")[1:]:
        heading, *lines = section.splitlines()
        first_cells = " ".join(line.split("|")[1] for line in lines if line.startswith("| `"))
        found.append((quoted(heading), quoted(first_cells)))
    return found


def quoted(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall("`([^`]+)`", text)


def files(runs: list[Path], patterns: list[str]) -> list[Path]:
    return sorted({path for run in runs for pattern in patterns for path in run.glob(pattern)})


def records(path: Path) -> list[Any]:
    return read_metrics(path) if path.suffix == ".jsonl" else [json.loads(path.read_text())]


def keys(value: Any, name: str = "") -> Iterator[str]:
    """The names of all numbers in a JSON value; an interval is one."""
    if isinstance(value, dict) and value and not value.keys() >= {"mean", "low", "high", "n"}:
        for key, item in value.items():
            yield from keys(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for item in value:
            yield from keys(item, f"{name}[]")
    elif not isinstance(value, dict) or value:
        yield name


def matches(key: str, documented: str) -> bool:
    """Part by part, so that a `*` stands for one name; brackets are meant as they are."""
    parts, patterns = key.split("."), documented.replace("[]", "[[]]").split(".")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def test_every_key_has_a_line_and_every_line_a_key(
    runs: list[Path], sections: list[tuple[list[str], list[str]]]
) -> None:
    assert sections
    wrong = []
    for patterns, documented in sections:
        found = files(runs, patterns)
        assert found, f"the runs hold none of {patterns}"
        written = {key for path in found for record in records(path) for key in keys(record)}
        missing = [key for key in sorted(written) if not any(matches(key, line) for line in documented)]
        unknown = [line for line in documented if not any(matches(key, line) for key in written)]
        wrong += [f"{patterns[0]}: {key} is written, not documented" for key in missing]
        wrong += [f"{patterns[0]}: {line} is documented, not written" for line in unknown]
    assert not wrong


def test_every_file_of_numbers_has_a_section(runs: list[Path], sections: list[tuple[list[str], list[str]]]) -> None:
    covered = {path for patterns, _ in sections for path in files(runs, patterns)}
    written = {path for run in runs for name in (*FILES, "done/**/*.json") for path in run.rglob(name)}
    assert not sorted(str(path) for path in written - covered)


def test_every_key_says_what_it_is(root: Path) -> None:
    text = (root / "docs/metrics.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    assert all(len(cells) == 5 and len(cells[1].strip()) >= 8 for cells in rows)

"""Scores beside the dialogs: one model's, several models' mean and deviation, the paper's combined reward."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.config import ConfigError, DataError
from puna.generate.scoring import open_scorer
from puna.stages import score
from puna.stages.score import ScoreConfig
from tests import helpers


def dialogs(tmp_path: Path, name: str = "dialogs.jsonl", **columns: Any) -> Path:
    records = [{"messages": dialog, "id": i, **columns} for i, dialog in enumerate(helpers.dialogs(20))]
    return helpers.write_lines(tmp_path / name, records)


def config(tmp_path: Path, **changes: Any) -> ScoreConfig:
    fixed: dict[str, Any] = {"data": (dialogs(tmp_path),), "out": tmp_path / "out", "precision": "fp32"}
    return ScoreConfig(**(fixed | {"shard_size": 8} | changes))


def alone(folder: Path) -> list[float]:
    return open_scorer(folder, torch.device("cpu"))(helpers.dialogs(20)).tolist()


def test_the_papers_reward_of_both_models(tmp_path: Path) -> None:
    helpfulness, safety = (helpers.reward_folder(tmp_path / f"{seed}", seed) for seed in (1, 2))
    threshold = sorted(alone(safety))[10]
    folder = score.run(config(tmp_path, helpfulness=helpfulness, safety=safety, threshold=threshold))
    records = helpers.read_lines(folder / "dialogs.jsonl")
    assert [record["id"] for record in records] == list(range(20))
    for record, h, s in zip(records, alone(helpfulness), alone(safety), strict=True):
        expected = {"helpfulness": h, "safety": s, "reward": s if s < threshold else h}
        assert record["scores"] == pytest.approx(expected, abs=1e-6)
    data = dialogs(tmp_path, "tagged.jsonl", is_safety=True)
    folder = score.run(config(tmp_path, data=(data,), helpfulness=helpfulness, safety=safety, out=tmp_path / "tagged"))
    records = helpers.read_lines(folder / "dialogs.jsonl")
    assert [record["scores"]["reward"] for record in records] == pytest.approx(alone(safety), abs=1e-6)


def test_several_models_mean_and_deviation(tmp_path: Path) -> None:
    folders = tuple(helpers.reward_folder(tmp_path / f"{seed}", seed) for seed in (1, 2))
    folder = score.run(config(tmp_path, model=folders))
    for record, a, b in zip(helpers.read_lines(folder / "dialogs.jsonl"), *map(alone, folders), strict=True):
        odds = math.sqrt(a / (1 - a) * b / (1 - b))  # of the mean logit
        expected = {"score": odds / (1 + odds), "deviation": abs(a - b) / 2}
        assert record["scores"] == pytest.approx(expected, abs=1e-6)


def test_a_lost_shard_alone_is_scored_again(tmp_path: Path) -> None:
    cfg = config(tmp_path, model=(helpers.reward_folder(tmp_path / "model"),))
    folder = score.run(cfg)
    whole = (folder / "dialogs.jsonl").read_text()
    (folder / "parts/00001.jsonl").unlink()
    (folder / "done/score.json").unlink()
    kept = (folder / "parts/00000.jsonl").stat().st_mtime_ns
    score.run(cfg)
    assert (folder / "dialogs.jsonl").read_text() == whole
    assert (folder / "parts/00000.jsonl").stat().st_mtime_ns == kept


def test_what_cannot_be_scored_is_counted(tmp_path: Path) -> None:
    model = (helpers.reward_folder(tmp_path / "model"),)
    rows = [{"messages": dialog} for dialog in helpers.dialogs(4)]
    rows[1]["messages"] = [helpers.user("a"), helpers.assistant("word " * 300)]
    rows[2]["messages"] = rows[2]["messages"][:1]
    data = helpers.write_lines(tmp_path / "some.jsonl", rows)
    folder = score.run(config(tmp_path, data=(data,), model=model))
    assert json.loads((folder / "done/score.json").read_text()) == {"dialogs": 2, "left_out": 1, "set_aside": 1}
    data = helpers.write_lines(tmp_path / "long.jsonl", rows[1:2])
    with pytest.raises(DataError, match="of 1 dialogs none fits the context of every model"):
        score.run(config(tmp_path, data=(data,), model=model, out=tmp_path / "long"))


def test_a_model_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no reward model is given: name one as --model, --helpfulness or --safety"):
        config(tmp_path)

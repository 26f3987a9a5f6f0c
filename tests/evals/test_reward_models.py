"""Reward models beside one another and beside rules: what is read, scored, left out and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.config import ConfigError, DataError
from puna.evals import reward_models
from puna.evals.reward_models import RewardEvaluateConfig
from puna.generate.scoring import Scorer, open_scorer
from tests import helpers


def config(tmp_path: Path, **changes: Any) -> RewardEvaluateConfig:
    """Two models, two files of 12 and 8 comparisons."""
    labels = {"chosen_is_safe": True, "rejected_is_safe": False, "domain": "safety"}
    helpful = helpers.write_lines(tmp_path / "helpful.jsonl", helpers.preferences(12))
    safe = helpers.write_lines(tmp_path / "safe.jsonl", helpers.preferences(8, seed=1, **labels))
    models = tuple(helpers.reward_folder(tmp_path / f"seed{seed}/model", seed) for seed in (1, 2))
    fixed = {"out": tmp_path / "out", "model": models, "test": (helpful, safe), "precision": "fp32"}
    return RewardEvaluateConfig(**(fixed | changes))


def written(cfg: RewardEvaluateConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((cfg.out / "evaluation.json").read_text())
    return found


def test_models_by_files(tmp_path: Path) -> None:
    cfg = config(tmp_path, ensemble=True)
    said = reward_models.run(cfg)
    found, lines = written(cfg), helpers.read_lines(cfg.out / "scores.jsonl")
    names = [str(path.parent) for path in cfg.model]
    assert found["pairs_by_file"] == {"helpful": 12, "safe": 8} and found["left_out"] == 0
    assert list(found["models"]) == [*names, "ensemble"]
    assert [line["file"] for line in lines] == ["helpful"] * 12 + ["safe"] * 8
    # What one model says of one pair.
    row = helpers.preferences(12)[3]
    scorer = open_scorer(cfg.model[0], torch.device("cpu"))
    expected = [float(scorer([[*row["prompt"], *row[key]]]).logit()) for key in ("chosen", "rejected")]
    assert lines[3]["scores"][names[0]] == pytest.approx(expected, abs=1e-5)
    each = torch.tensor([[line["scores"][name] for name in names] for line in lines])  # (N, M, 2)
    for name, scores in (*zip(names, each.unbind(1), strict=True), ("ensemble", each.mean(dim=1))):
        right = (scores[:, 0] > scores[:, 1]).float()
        of = found["models"][name]
        assert of["accuracy"]["mean"] == pytest.approx(float(right.mean()))
        assert of["accuracy_by_file"]["safe"]["mean"] == pytest.approx(float(right[12:].mean()))
        assert of["accuracy_by_grade"]["better"]["n"] == 5 and of["unsafe_recall"]["n"] == 8
        assert of["over"].keys() == {"length"}
    disputed = (each[:, 0, 0] > each[:, 0, 1]) != (each[:, 1, 0] > each[:, 1, 1])
    assert found["disagreement"]["disputed"]["mean"] == pytest.approx(float(disputed.float().mean()))
    for part in ("accuracy", "helpful", "safe", "all", "(length)", "significantly_better", "both_safe", "ensemble"):
        assert (part in said) == (part != "both_safe"), part
    assert said.endswith(str(cfg.out))


def test_rules_and_what_a_model_adds_to_them(tmp_path: Path) -> None:
    # The chosen answers say yes, the rejected ones no, and are longer: one rule knows all of it, the other errs.
    cfg = config(tmp_path, train=(helpers.write_lines(tmp_path / "train.jsonl", helpers.preferences(30, seed=5)),))
    said = reward_models.run(cfg)
    found = written(cfg)
    assert found["rules"]["words"]["accuracy"]["mean"] == 1.0 and found["rules"]["length"]["accuracy"]["mean"] == 0.0
    for measures in found["models"].values():
        accuracy = measures["accuracy"]["mean"]
        assert measures["over"]["words"]["mean"] == pytest.approx(accuracy - 1)
        assert measures["over"]["length"]["mean"] == pytest.approx(accuracy)
        assert measures["length"]["chosen_is_longer"] == 0.0
    assert "(words)" in said and "over the rule of words" in said


def test_a_pair_that_one_model_cannot_hold_is_left_out_for_all(tmp_path: Path) -> None:
    rows = helpers.preferences(4)
    rows[2]["rejected"] = [helpers.assistant("the wall " * 300)]
    rows[3]["chosen"] = [helpers.assistant("[INST]")]
    data = helpers.write_lines(tmp_path / "some.jsonl", rows)
    cfg = config(tmp_path, test=(data,), model=config(tmp_path).model[:1])
    reward_models.run(cfg)
    found = written(cfg)
    assert (found["pairs"], found["left_out"], found["set_aside"], found["disagreement"]) == (2, 1, 1, None)
    assert [line["pair"] for line in helpers.read_lines(cfg.out / "scores.jsonl")] == [0, 1]
    with pytest.raises(DataError, match=r"of 12 comparisons none fits every model \(max_len 5\)"):
        reward_models.run(config(tmp_path, test=config(tmp_path).test[:1], max_len=5, out=tmp_path / "short"))


def test_a_model_that_gives_no_numbers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(tmp_path)
    monkeypatch.setattr(Scorer, "raw", lambda self, rows: torch.full((len(rows),), torch.nan))
    with pytest.raises(DataError, match=rf"^{cfg.model[0]}: its scores are no numbers; train it again$"):
        reward_models.run(cfg)


def test_files_of_several_formats(tmp_path: Path) -> None:
    rows: list[Any] = [{"input": f"{i}?", "output_1": "b", "output_2": "c", "label": 2} for i in range(5)]
    rows += [{"input": "a", "output_1": "b", "output_2": "b", "label": 2}]
    llmbar = helpers.write_lines(tmp_path / "llmbar.jsonl", rows)
    cfg = config(tmp_path)
    cfg = config(tmp_path, test=(cfg.test[0], llmbar), format=("preferences", "llmbar"), limit=3)
    reward_models.run(cfg)
    found = written(cfg)
    assert found["pairs_by_file"] == {"helpful": 3, "llmbar": 3} and found["skipped"] == {"identical answers": 1}


def test_mistakes(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    for changes, said in (
        ({"model": ()}, "name at least one --model and one --test file"),
        ({"model": (cfg.model[0], cfg.model[0].parent)}, "a model is given twice"),
        ({"model": cfg.model[:1], "ensemble": True}, "an ensemble needs more than one --model"),
    ):
        with pytest.raises(ConfigError, match=said):
            config(tmp_path, **changes)
    with pytest.raises(ConfigError, match=r"has no scale"):
        reward_models.run(config(tmp_path, normalise=True))

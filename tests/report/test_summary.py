"""The summary of a run: from whole folders, from parts of them, and from folders that are none."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
from pathlib import Path

import pytest

from puna import config, recipe
from puna.config import ConfigError, DataError
from puna.recipe import PreferenceFiles, RecipeConfig
from puna.report import summary


def test_a_finished_run(finished: Path) -> None:
    found = summary.build(finished)
    names = ["pretrain", "sft", "v1", "v2", "v3", "v4", "v5", "v5/ppo"]
    assert (found["name"], found["seed"]) == ("laptop", 7)
    assert [version["name"] for version in found["versions"]] == names
    last = found["versions"][-1]
    assert last["gold_helpfulness"] == 0.9 == last["intervals"]["gold_helpfulness"]["mean"]
    assert {"violation_rate", "false_refusal_rate", "toxicity", "myth_rate"} <= last.keys() & last["intervals"].keys()
    assert last["win_rate_vs_sft"]["low"] < last["win_rate_vs_sft"]["mean"] < last["win_rate_vs_sft"]["high"]
    assert found["versions"][1]["win_rate_vs_sft"] is None
    assert list(found["seconds"]) == found["steps"]
    assert found["seconds"]["pretrain"] == 200.0
    assert found["peak_memory_bytes"] > 10**9
    assert found["tokens_per_second"]["sft"] == statistics.median(9000.0 + i for i in range(120))
    assert {"cpu", "cores", "memory_bytes", "platform"} == found["machine"].keys()
    assert {"python", "torch", "puna"} == found["versions_of"].keys()


def test_reward_models_are_the_last_ones(finished: Path) -> None:
    models = summary.build(finished)["reward_models"]
    for domain in ("helpfulness", "safety"):
        assert [m["version"] for m in models[domain]["by_version"]] == ["v1", "v2", "v3", "v4", "v5"]
        assert models[domain]["accuracy"] == models[domain]["by_version"][-1]["accuracy"]
        assert models[domain]["training_pairs"] == 900
    assert models["safety"]["unsafe_recall"] == 0.85


def test_an_interval_from_a_mean() -> None:
    # Wilson for 8 of 10: centre (0.8 + 0.19207) / 1.38415 = 0.71674, half 1.95996 / 1.38415 sqrt(0.016 + 0.0096036).
    interval = summary.share(0.8, 10)
    assert interval["low"] == pytest.approx(0.71674 - 0.22658, abs=1e-4)
    assert interval["high"] == pytest.approx(0.71674 + 0.22658, abs=1e-4)


def test_ghost_attention_compares_the_last_version_without_with_the_last_with(finished: Path) -> None:
    points = summary.build(finished)["ghost_attention"]
    assert [point["turn"] for point in points] == [1, 2, 3, 4, 5, 6]
    assert points[0]["versions"] == {"before": "v3", "after": "v5/ppo"}
    assert (points[1]["before"], points[1]["after"]) == (0.9 / 4, 0.9)


def test_ghost_attention_has_no_after_in_a_run_without(finished: Path) -> None:
    for n in (4, 5):
        shutil.rmtree(finished / f"v{n}/ghost_attention")
    points = summary.build(finished)["ghost_attention"]
    assert points[0]["versions"] == {"before": "v5/ppo", "after": None}
    assert {point["after"] for point in points} == {None}


def test_ppo_has_a_point_an_iteration_and_gold_where_it_was_measured(finished: Path) -> None:
    points = summary.build(finished)["ppo"]
    assert [point["iteration"] for point in points] == list(range(31))
    assert points[10] == {
        "version": "v5",
        "iteration": 10,
        "reward": 0.6,
        "kl": 2.0,
        "repetition": None,
        "entropy": None,
        "length": 22.5,
        "held_out_reward": 0.6,
        "gold": 0.8 + 10 / 300,
    }
    assert points[11]["gold"] is None
    assert (points[30]["reward"], points[30]["gold"]) == (None, 0.9)  # measured after the last iteration


def test_without_a_judge_the_held_out_reward_is_the_answers_mean(on_files: Path) -> None:
    found = summary.build(on_files)
    assert found["versions"] == found["samples"] == found["ghost_attention"] == []
    assert {p["iteration"]: p["held_out_reward"] for p in found["ppo"]}[20] == 0.7
    assert found["reward_models"]["helpfulness"]["interval"]["n"] == 250


def test_samples_are_the_first_prompt_of_each_kind_for_every_version(finished: Path) -> None:
    samples = summary.build(finished)["samples"]
    assert [sample["prompt_id"] for sample in samples] == [f"held_out-{i}" for i in (5, 6, 0, 4, 3, 2, 1, 7)]
    assert all(len(sample["answers"]) == 8 for sample in samples)


def test_samples_cannot_command_a_terminal(finished: Path) -> None:
    fact = next(sample for sample in summary.build(finished)["samples"] if sample["kind"] == "fact")
    for text in (fact["messages"][0]["content"], fact["answers"][0]["answer"]):
        assert "\x1b" not in text and "\u202e" not in text


def test_loss_curves_leave_out_what_was_not_finite(finished: Path) -> None:
    with (finished / "sft/metrics.jsonl").open("a") as file:
        file.write('{"stage": "sft", "step": 120, "loss": null, "tokens_per_second": null}\n')
    curves = summary.losses(finished)
    assert len(curves["sft"]) == 120
    assert curves["pretrain/validation"] == [(400, 2.0)]
    assert {"v3", "v3/reward_helpfulness", "v3/reward_safety"} <= curves.keys()


@pytest.mark.parametrize("left", ["config.json", "done", "pretrain/metrics.jsonl", "v2/evaluation/evaluation.json"])
def test_any_part_of_a_run_has_a_summary(finished: Path, left: str) -> None:
    part = finished.parent / "part"
    if (finished / left).is_dir():
        shutil.copytree(finished / left, part / left)
    else:
        (part / left).parent.mkdir(parents=True)
        shutil.copy(finished / left, part / left)
    found = summary.build(part)
    json.dumps(found)
    assert (found["versions"] != []) == left.endswith("evaluation.json")
    assert found["reward_models"] == {"helpfulness": None, "safety": None}


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run's folder at .*nowhere"):
        summary.build(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"lr": 1}')
    with pytest.raises(ConfigError, match="holds no run"):
        summary.build(tmp_path)


def test_a_broken_file_is_named(finished: Path) -> None:
    path = finished / "v1/evaluation/evaluation.json"
    path.write_text('{"name": ')
    with pytest.raises(DataError, match=r"v1/evaluation/evaluation\.json"):
        summary.build(finished)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"versions": 1, "ghost_attention_from": 0},
        {"versions": 2, "ppo_versions": 2, "ghost_attention_from": 1},
        {"only": "v3"},
        {"method": "instructgpt"},
        {"method": "best_of_n"},
        {"method": "dpo"},
        {"method": "grpo"},
        {"method": "constitutional"},
        {"base": Path("a-model"), "preferences": PreferenceFiles(helpfulness=(Path("h"),), safety=(Path("s"),))},
    ],
)
def test_the_planned_steps_are_the_recipes(changes: dict[str, object]) -> None:
    cfg = dataclasses.replace(RecipeConfig(), **changes)  # type: ignore[arg-type]
    planned = [step.name for step in recipe.plan(cfg)]
    assert summary.planned_steps(config.to_dict(cfg)) == planned[:-1]
    assert planned[-1] == "report"


def test_the_order_is_the_recipes_not_the_alphabets(finished: Path) -> None:
    shutil.copytree(finished / "v5/evaluation", finished / "v10/evaluation")
    names = [version["name"] for version in summary.build(finished)["versions"]]
    assert names[-2:] == ["v5/ppo", "v10"]

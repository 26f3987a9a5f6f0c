"""Baselines: their plans, that they begin as the Llama 2 recipe does, what they leave, how runs compare."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from puna import cli, config, recipe
from puna.config import ConfigError
from puna.formats.find import newest_model
from puna.recipe import RecipeConfig
from puna.report import compare
from puna.report.compare import CompareConfig
from puna.run_folder import read_metrics
from tests import tiny_run

STEPS = {
    "instructgpt": "v1/preferences v1/reward v1/ppo v1/ppo/evaluation",
    "best_of_n": "v1/preferences v1/reward_helpfulness v1/reward_safety v1/rejection_sampling v1/best_of_n/evaluation",
    "dpo": "v1/preferences v1/dpo v1/dpo/evaluation",
    "grpo": "v1/preferences v1/reward_helpfulness v1/reward_safety v1/grpo v1/grpo/evaluation",
    "constitutional": "v1/preferences v1/critique v1 v1/evaluation v1/ai_preferences v1/reward_helpfulness "
    "v1/reward_safety v1/ppo v1/ppo/evaluation",
}
BEGINNING = ["valley", "pretrain", "pretrain/evaluation", "sft", "sft/evaluation"]


def load(*flags: str) -> RecipeConfig:
    return config.load(RecipeConfig, [str(tiny_run.RECIPE), *flags])


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe's finished run."""
    return tiny_run.finished(tmp_path_factory) / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of every method."""
    return tiny_run.baselines(tmp_path_factory)


@pytest.mark.parametrize("method", STEPS)
def test_the_plans(method: str) -> None:
    planned = recipe.plan(tiny_run.baseline(method, Path("run"), None))
    assert [step.name for step in planned] == [*BEGINNING, *STEPS[method].split(), "report"]
    by_name = {step.name: step.config for step in planned}
    collected = by_name["v1/preferences"]
    assert collected.models == (Path("run/sft/model"),)
    assert [path.name for path in collected.prompts] == ["v1_preferences.jsonl", "v2_preferences.jsonl"]
    trained = next((by_name[f"v1/{name}"] for name in ("ppo", "dpo", "grpo") if f"v1/{name}" in by_name), None)
    if trained and method != "constitutional":
        assert trained.init == Path("run/sft/model")
    if method == "instructgpt":
        assert by_name["v1/reward"].margin == "none" and len(by_name["v1/reward"].data) == 2
        assert by_name["v1/ppo"].pretrain_data == Path("run/pretrain/data/train")
        assert by_name["v1/ppo"].reward_helpfulness == by_name["v1/ppo"].reward_safety == Path("run/v1/reward/model")
    if method == "constitutional":
        assert by_name["v1/ppo"].init == by_name["v1/ai_preferences"].init == Path("run/v1/model")
        assert by_name["v1"].data[-1] == Path("run/v1/critique/dialogs.jsonl")
        assert by_name["v1/reward_safety"].data == (Path("run/v1/ai_preferences/safety.jsonl"),)
        assert by_name["v1/reward_helpfulness"].data == (Path("run/v1/preferences/helpfulness.jsonl"),)
    if method == "best_of_n":
        measured = by_name["v1/best_of_n/evaluation"]
        assert (measured.model, measured.best_of) == (Path("run/sft/model"), 4)


@pytest.mark.parametrize("method", STEPS)
def test_a_baseline_begins_with_another_runs_models(method: str, runs: dict[str, Path], llama2: Path) -> None:
    run = runs[method]
    for name in ("valley/prompts/held_out.jsonl", "pretrain/model/model.safetensors", "sft/model/model.safetensors"):
        assert (run / name).read_bytes() == (llama2 / name).read_bytes()
    assert not list(run.rglob("sft/checkpoints"))
    for name in BEGINNING:
        assert (run / f"done/{name}.json").read_text() == (llama2 / f"done/{name}.json").read_text()
    summary = json.loads((run / "report/summary.json").read_text())
    assert summary["method"] == method and summary["steps"] == [*BEGINNING, *STEPS[method].split()]
    last = summary["versions"][-1]
    assert last["name"] + "/evaluation" == STEPS[method].split()[-1] and last["win_rate_vs_sft"]["n"] > 0


def test_baselines_have_the_same_comparisons_and_reward_models(runs: dict[str, Path]) -> None:
    for name in ("preferences/safety.jsonl", "reward_safety/model/model.safetensors"):
        contents = {
            (run / "v1" / name).read_bytes()
            for method, run in runs.items()
            if method != "constitutional" and (run / "v1" / name.split("/")[0]).exists()
        }
        assert len(contents) == 1, name


def test_the_model_of_a_baseline_is_found(runs: dict[str, Path]) -> None:
    stages = {method: newest_model(run).relative_to(run).parent for method, run in runs.items()}  # type: ignore[union-attr]
    assert {method: str(stage) for method, stage in stages.items()} == {
        "instructgpt": "v1/ppo",
        "best_of_n": "sft",
        "dpo": "v1/dpo",
        "grpo": "v1/grpo",
        "constitutional": "v1/ppo",
    }


def test_the_best_of_n_is_measured_for_every_n(runs: dict[str, Path]) -> None:
    points = json.loads((runs["best_of_n"] / "v1/best_of_n/evaluation/best_of_n.json").read_text())
    assert [point["samples"] for point in points] == [1, 2, 4]
    assert [point["kl"] for point in points] == pytest.approx([0.0, math.log(2) - 0.5, math.log(4) - 0.75])
    assert points[0]["reward"] <= points[1]["reward"] <= points[2]["reward"]
    measured = json.loads((runs["best_of_n"] / "v1/best_of_n/evaluation/evaluation.json").read_text())
    assert points[-1]["gold"] == measured["gold_helpfulness"]["mean"]


def test_runs_compare(runs: dict[str, Path], llama2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(llama2), *map(str, runs.values())]
    assert cli.main(["compare", *names, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[: 2 + len(STEPS)]] == ["Run", "run", *STEPS]
    told = json.loads((tmp_path / "compare.json").read_text())
    lines = read_metrics(runs["grpo"] / "v1/grpo/metrics.jsonl")
    curve = told["reward_against_kl"]["grpo, RLOO"]
    assert [(point["kl"], point["worth"]) for point in curve] == [(line["kl"], line["reward"]) for line in lines]
    assert told["reward_against_kl"].keys() >= {"run, PPO", "instructgpt, PPO", "best_of_n, best of n"}
    assert [point["words"] for point in told["gold_against_kl"]["best_of_n, best of n"]][-1] == "best of 4"
    page = (tmp_path / "index.html").read_text()
    assert "Reward against KL" in page and page.count("<svg") == 2
    cells = {row[0]["text"]: row for row in told["table"]["rows"]}
    assert cells["dpo"][0]["small"] == "V1 + DPO" and cells["dpo"][7]["small"] == "dpo"
    assert cells["run"][7]["small"] == "helpfulness / safety"


def test_a_comparison_needs_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run to compare"):
        compare.run(CompareConfig(()))
    with pytest.raises(ConfigError, match="no run's folder at"):
        compare.run(CompareConfig((tmp_path / "nowhere",)))


def test_a_start_must_have_begun_the_same_way(llama2: Path, tmp_path: Path) -> None:
    cfg = tiny_run.baseline("dpo", tmp_path / "run", llama2)
    for changes, said in (
        ({"seed": 1}, "has another seed than this recipe"),
        ({"sft": replace(cfg.sft, epochs=1)}, "has another sft than this recipe"),
        ({"versions": 3}, "has prompts of 2 versions, not of 3"),
        ({"start": tmp_path / "nowhere"}, r"nowhere is no run \(no "),
    ):
        with pytest.raises(ConfigError, match=said):
            recipe.run(replace(cfg, **changes))
    assert not list(tmp_path.iterdir())
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.json").write_text((llama2 / "config.json").read_text())
    with pytest.raises(ConfigError, match="has not finished valley: run its recipe first"):
        recipe.run(replace(cfg, start=tmp_path / "begun"))


def test_one_version_alone_has_the_same_hashes(
    llama2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--start", str(llama2), "--only", "v2", "--out", str(tmp_path / "elsewhere/again")]
    assert cli.main(["run", str(tiny_run.RECIPE), *flags]) == 0
    said = capsys.readouterr()
    begun = [line.split()[1] for line in said.err.splitlines() if line.startswith("[")]
    assert begun == [name for name in begun if name.startswith("v2") or name == "report"] and "v2/ppo" in begun
    assert f"artefacts, all the same as in {llama2}" in said.out


def test_only_a_version_can_be_run_alone() -> None:
    with pytest.raises(ConfigError, match="only is 'v3': this recipe has v1, v2"):
        recipe.plan(load("--only", "v3"))
    with pytest.raises(ConfigError, match="a base has the Llama 2 method alone"):
        recipe.plan(replace(load(), base=Path("m"), method="dpo"))


@pytest.mark.parametrize("name", [*STEPS, "rloo"])
def test_every_recipe_differs_from_the_laptops_in_its_method_alone(name: str, root: Path) -> None:
    cfg = config.load(RecipeConfig, [str(root / f"recipes/baselines/{name}.toml")])
    laptop = config.load(RecipeConfig, [str(root / "recipes/laptop.toml")])
    assert cfg.method == ("grpo" if name == "rloo" else name) and cfg.start == Path("runs/laptop")
    for same in ("valley", "pretrain", "sft", "collect", "evaluate", "reward_safety", "versions", "seed"):
        assert getattr(cfg, same) == getattr(laptop, same), same

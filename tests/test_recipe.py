"""The recipe from end to end: what it leaves, that it resumes to the same bytes, its plan, its refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from puna import checkpoint, cli, config, recipe
from puna.config import ConfigError
from puna.recipe import PreferenceFiles, RecipeConfig, Step
from puna.report import tables
from puna.run_folder import read_metrics
from puna.stages.sft import SFTConfig
from tests import tiny_run

TIMINGS = ("seconds", "seconds_generate", "seconds_score", "seconds_update", "peak_memory_bytes", "tokens_per_second")

STEPS = """\
valley pretrain pretrain/evaluation sft sft/evaluation
v1/preferences v1/reward_helpfulness v1/reward_safety v1/rejection_sampling v1/context_distillation v1 v1/evaluation
v2/preferences v2/reward_helpfulness v2/reward_safety v2/rejection_sampling v2/context_distillation v2/ghost_attention
v2 v2/evaluation v2/ppo v2/ppo/evaluation report""".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe's finished run."""
    return tiny_run.finished(tmp_path_factory) / "run"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run without its timings; the report, which is made of them, and the locks are left out."""
    files = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir() or name.startswith("report/") or path.name == "run.lock":
            continue
        files[name] = path.read_bytes()
        if path.name == "metrics.jsonl":
            files[name] = json.dumps([timeless(line) for line in read_metrics(path)]).encode()
        elif name.startswith("done/"):
            files[name] = json.dumps(timeless(json.loads(path.read_text()))).encode()
    return files


def timeless(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in numbers.items() if name not in TIMINGS}


def load(*flags: str) -> RecipeConfig:
    return config.load(RecipeConfig, [str(tiny_run.RECIPE), *flags])


def test_every_step_runs(run: Path) -> None:
    assert [step.name for step in recipe.plan(load("--out", "run"))] == STEPS
    for step in STEPS:
        marker = json.loads((run / f"done/{step}.json").read_text())
        assert marker["seconds"] > 0 and marker["peak_memory_bytes"] > 1e6, step


def test_every_model_is_a_hugging_face_folder(run: Path) -> None:
    chat = ["pretrain", "sft", "v1", "v2", "v2/ppo"]
    reward = [f"v{n}/reward_{domain}" for n in (1, 2) for domain in ("helpfulness", "safety")]
    architectures = {
        stage: json.loads((run / stage / "model/config.json").read_text())["architectures"] for stage in chat + reward
    }
    assert architectures == {stage: ["LlamaForCausalLM"] for stage in chat} | {
        stage: ["LlamaForSequenceClassification"] for stage in reward
    }


def test_a_version_starts_from_the_base_on_what_was_selected(run: Path) -> None:
    settings = [json.loads((run / f"v{n}/config.json").read_text()) for n in (1, 2)]
    assert [tuned["init"] for tuned in settings] == ["run/pretrain/model"] * 2
    folders = [Path(path).parent.name for path in settings[0]["data"]]
    assert folders == ["valley", "rejection_sampling", "context_distillation"]
    assert [Path(path).parent.name for path in settings[1]["data"]][-1] == "ghost_attention"
    ghost = lines(run / "v2/ghost_attention/dialogs.jsonl")
    assert ghost and all(dialog["loss_on"] == "last_answer" for dialog in ghost)


def test_the_pool_of_a_late_version_holds_the_best_of_earlier_ones(run: Path) -> None:
    best = [{record["prompt_id"] for record in lines(run / f"v{n}/rejection_sampling/best.jsonl")} for n in (1, 2)]
    pool = [{record["prompt_id"] for record in lines(run / f"v{n}/rejection_sampling/pool.jsonl")} for n in (1, 2)]
    assert best[0] and best[1] and best[0] != best[1]
    assert pool == [best[0], best[0] | best[1]]


def test_preferences_are_canonical_and_safety_keeps_its_rule(run: Path) -> None:
    rows = [row for path in sorted(run.glob("v*/preferences/*.jsonl")) for row in lines(path)]
    assert {row["domain"] for row in rows} == {"helpfulness", "safety"} and {row["batch"] for row in rows} == {1, 2}
    assert not any(row["rejected_is_safe"] and not row["chosen_is_safe"] for row in rows if row["domain"] == "safety")


def test_the_summary_has_what_the_report_promises(run: Path) -> None:
    summary = json.loads((run / "report/summary.json").read_text())
    assert (run / "report/index.html").stat().st_size > 10_000
    assert summary["name"] == "run" and summary["seed"] == 0
    assert summary["steps"] == STEPS[:-1] and list(summary["seconds"]) == STEPS[:-1]
    assert summary["peak_memory_bytes"] > 1e8 and summary["tokens_per_second"]["pretrain"] > 0
    assert {"cpu", "cores", "memory_bytes", "platform"} <= summary["machine"].keys()
    assert {"python", "torch", "puna"} <= summary["versions_of"].keys()
    assert [version["name"] for version in summary["versions"]] == ["pretrain", "sft", "v1", "v2", "v2/ppo"]
    for version in summary["versions"]:
        for measure in ("gold_helpfulness", "violation_rate", "false_refusal_rate", "toxicity", "myth_rate"):
            assert version["intervals"][measure]["low"] <= version[measure] <= version["intervals"][measure]["high"]
        wins = version["win_rate_vs_sft"]
        assert wins is None if version["name"] in ("pretrain", "sft") else wins["low"] <= wins["mean"] <= wins["high"]
    for domain in ("helpfulness", "safety"):
        model = summary["reward_models"][domain]
        assert len(model["by_version"]) == 2 and 0 <= model["accuracy"] <= 1
        assert model["accuracy_by_grade"].keys() == model["pairs_by_grade"].keys() and "unsafe_recall" in model
    assert [point["turn"] for point in summary["ghost_attention"]][:4] == [1, 2, 3, 4]
    assert all({"before", "after"} <= point.keys() for point in summary["ghost_attention"])
    assert [point["iteration"] for point in summary["ppo"]] == [0, 1, 2, 3, 4]
    assert all({"reward", "kl", "gold"} <= point.keys() for point in summary["ppo"])
    assert [(r["version"], len(r["points"])) for r in summary["rejection_sampling"]] == [("v1", 6), ("v2", 6)]


def test_a_finished_run_is_left_as_it_is(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file() and path.name != "run.lock"}
    recipe.run(load("--out", "run"))
    after = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file() and path.name != "run.lock"}
    assert after == before
    assert "/23]" not in capsys.readouterr().err, "a step was run again"


def test_a_killed_run_ends_with_the_same_bytes(run: Path, tmp_path: Path) -> None:
    # Each stage dies past its checkpoint: what lies before is kept, times and all, what lies after is done again.
    before = {}
    for stage, step in (("pretrain", 7), ("v2/ppo", 3)):
        assert tiny_run.start(tmp_path, killed_at=f"run/{stage}:{step}").returncode == -signal.SIGKILL
        before[stage] = lines(tmp_path / "run" / stage / "metrics.jsonl")
        assert [line["step"] for line in before[stage]] == list(range(step + 1))
        assert not (tmp_path / f"run/done/{stage}.json").exists()
        kept = checkpoint.latest(tmp_path / "run" / stage / "checkpoints")  # none that was still being written
        before[stage] = before[stage][: int(kept.name.removeprefix("step_")) if kept else 0]
    done = tiny_run.start(tmp_path)
    assert done.returncode == 0, done.stderr
    for stage, kept in before.items():
        assert lines(tmp_path / "run" / stage / "metrics.jsonl")[: len(kept)] == kept
    whole, resumed = contents(run), contents(tmp_path / "run")
    assert whole.keys() == resumed.keys()
    assert not [name for name in whole if whole[name] != resumed[name]]


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(tiny_run.RECIPE), "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[: len(STEPS)]] == STEPS
    assert str(recipe.SET_BY_RECIPE) not in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["laptop.toml", "hh-smollm2.toml"])
def test_every_recipe_has_a_plan(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(root / "recipes" / name), "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("valley" if name == "laptop.toml" else "base")
    assert not any(str(recipe.SET_BY_RECIPE) in line for line in printed)


def test_another_recipe_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run/done").mkdir(parents=True)
    shutil.copy(run / "config.json", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"run was begun with seed 0, not 1 .*: use another --out"):
        recipe.run(load("--out", "run", "--seed", "1"))
    assert {path.name for path in Path("run").iterdir()} == {"config.json", "done", "run.lock"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"versions": -1}, "versions is -1"),
        ({"base": Path("m")}, r"set preferences\.helpfulness and preferences\.safety"),
        (
            {"base": Path("m"), "preferences": PreferenceFiles(helpfulness=(Path("h"),))},
            r"set preferences\.helpfulness and preferences\.safety",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe.plan(replace(load(), **changes))


def test_what_a_recipe_would_not_use_is_refused(tmp_path: Path) -> None:
    files = PreferenceFiles(helpfulness=(Path("h"),), safety=(Path("s"),))
    with pytest.raises(ConfigError, match=r"^preferences: .* set base, or take \[preferences\] out$"):
        recipe.plan(RecipeConfig(preferences=files))
    cfg = RecipeConfig(base=Path("m"), preferences=files, ppo_versions=0, valley=load().valley)
    with pytest.raises(ConfigError, match=r"^ppo_versions, valley: .*: take it out, or take base out$"):
        recipe.plan(cfg)
    assert recipe.plan(RecipeConfig(base=Path("m"), preferences=files, versions=1)), "which it has"


def test_torchrun_is_for_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        recipe.run(load("--out", str(tmp_path / "run")))
    assert not list(tmp_path.iterdir())


def test_the_seconds_of_a_step_are_those_of_all_its_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, starts = tmp_path / "run", 0

    def work(cfg: SFTConfig) -> Path:
        nonlocal starts
        starts += 1
        cfg.out.mkdir(exist_ok=True)
        if starts < 3:
            (cfg.out / "metrics.jsonl").touch()
            last = time.time() + 100 * starts
            os.utime(cfg.out / "metrics.jsonl", (last, last))
            raise KeyboardInterrupt
        return cfg.out

    def plan(cfg: RecipeConfig) -> list[Step]:
        return [Step("sft", work, replace(cfg.sft, out=cfg.out / "sft")), Step("v1", work, replace(cfg.sft, out=run))]

    monkeypatch.setattr(recipe, "plan", plan)
    monkeypatch.setattr(tables, "final", str)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            recipe.run(load("--out", str(run)))
    recipe.run(load("--out", str(run)))
    sft, v1 = (json.loads((run / f"done/{name}.json").read_text())["seconds"] for name in ("sft", "v1"))
    assert 295 < sft < 310 and v1 < 10
    assert not (run / "started.json").exists()


@pytest.mark.parametrize("key", ["base", "preferences.helpfulness", "preferences.safety_test"])
def test_a_file_that_is_not_there_is_named_before_the_folder_is_begun(key: str, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    given = dict.fromkeys(("helpfulness", "safety", "safety_test"), (tmp_path / "there",))
    cfg = RecipeConfig(tmp_path / "run", base=tmp_path / "there", preferences=PreferenceFiles(**given))
    table, _, name = key.rpartition(".")
    wrong = tmp_path / "nowhere"
    cfg = replace(cfg, preferences=replace(cfg.preferences, **{name: (wrong,)})) if table else replace(cfg, base=wrong)
    with pytest.raises(ConfigError, match=rf"^{key}: there is no {re.escape(str(wrong))}$"):
        recipe.run(cfg)
    assert not cfg.out.exists()

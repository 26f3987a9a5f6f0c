"""The whole recipe, the paper's Figure 4: pretrain -> SFT -> V1 ... V5 -> report.

A plan is a list of steps, each a stage's `run` with its config. Every path is known beforehand, so the plan can be
printed (`--dry-run`), and a run that was killed goes on: finished steps have a done-marker, a killed step resumes from
its own last checkpoint.

    for each version:
        collect preferences with the newest models, train both reward models on all preferences so far,
        rejection-sample with the newest model, pool, fine-tune the base on demonstrations and pool;
        from `ghost_attention_from` on with Ghost Attention's dialogs, for the last `ppo_versions` with PPO on top
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from puna import config
from puna.config import ConfigError
from puna.evals.valley import EvaluateConfig
from puna.evals.valley import run as evaluate
from puna.report import ledger, tables
from puna.report.html import ReportConfig
from puna.report.html import run as report
from puna.run_folder import RunFolder, write_atomically
from puna.stages import collect, context_distillation, ghost_attention, ppo, pretrain, rejection_sampling, reward, sft
from puna.stages.collect import CollectConfig
from puna.stages.context_distillation import ContextDistillationConfig
from puna.stages.critique import CritiqueConfig
from puna.stages.dpo import DPOConfig
from puna.stages.ghost_attention import GhostAttentionConfig
from puna.stages.grpo import GRPOConfig
from puna.stages.ppo import PPOConfig
from puna.stages.pretrain import PretrainConfig
from puna.stages.rejection_sampling import RejectionSamplingConfig
from puna.stages.reward import RewardConfig
from puna.stages.sft import SFTConfig
from puna.valley import write as valley
from puna.valley.write import ValleyConfig

S = TypeVar("S", RejectionSamplingConfig, PPOConfig, GRPOConfig, EvaluateConfig)

T = TypeVar("T")

SET_BY_RECIPE = Path("set-by-the-recipe")
"""A stage's path in a recipe's config: the plan knows it."""
STARTED = "started.json"
"""The step in progress, when it began, and the seconds of its earlier starts."""


def template(stage: type[T], **settings: Any) -> T:
    """A stage's config with these settings; what it requires, its paths and files, the plan sets."""
    hints = get_type_hints(stage)
    required = [name for name, told in signature(stage).parameters.items() if told.default is told.empty]
    return stage(**{name: SET_BY_RECIPE if hints[name] is Path else () for name in required}, **settings)


@dataclass(frozen=True)
class PreferenceFiles:
    """Comparisons that exist already, in place of collecting them."""

    format: str = "preferences"
    """how to read them (docs/guides/real-data.md lists the formats)."""
    helpfulness: tuple[Path, ...] = ()
    helpfulness_test: tuple[Path, ...] = ()
    safety: tuple[Path, ...] = ()
    safety_test: tuple[Path, ...] = ()


@dataclass(frozen=True)
class RecipeConfig:
    """`puna run RECIPE.toml --out DIR`: a table a stage; the recipe sets their paths."""

    out: Path = Path("runs/recipe")
    """the run's folder; run again to resume."""
    dry_run: bool = False
    """print the plan and stop."""
    smoke: bool = False
    """use the recipe's [smoke] overrides: minutes instead of hours, to see that everything works."""
    method: Literal["llama2", "instructgpt", "best_of_n", "dpo", "grpo", "constitutional"] = "llama2"
    """what follows SFT: the versions, or a baseline (puna.baselines)."""
    versions: int = 5
    """rounds of RLHF (paper: V1 to V5); a baseline has their prompts in one."""
    ghost_attention_from: int = 4
    """first version that is tuned with Ghost Attention (paper: after V3); 0 never."""
    pool_all_from: int = 4
    """first version that pools all earlier rounds (paper: after V3); before, a round has its own samples only."""
    ppo_versions: int = 1
    """so many of the last versions have PPO on top (paper: V5)."""
    base: Path | None = None
    """a chat model to import (see puna.formats.convert) in place of the embedded world, pretraining and SFT."""
    preferences: PreferenceFiles = PreferenceFiles()
    """existing comparisons; with a base they stand in for collecting, and their prompts are sampled."""
    valley: ValleyConfig = template(ValleyConfig)
    pretrain: PretrainConfig = template(PretrainConfig)
    sft: SFTConfig = template(SFTConfig)
    version: SFTConfig = template(SFTConfig)
    """each version's fine-tuning of the base, on the excellent demonstrations and the pool."""
    collect: CollectConfig = template(CollectConfig)
    reward_helpfulness: RewardConfig = template(RewardConfig)
    reward_safety: RewardConfig = template(RewardConfig, other_share=0.1)
    rejection_sampling: RejectionSamplingConfig = template(RejectionSamplingConfig)
    ghost_attention: GhostAttentionConfig = template(GhostAttentionConfig)
    context_distillation: ContextDistillationConfig = template(ContextDistillationConfig)
    ppo: PPOConfig = template(PPOConfig)
    dpo: DPOConfig = template(DPOConfig)
    grpo: GRPOConfig = template(GRPOConfig)
    critique: CritiqueConfig = template(CritiqueConfig)
    evaluate: EvaluateConfig = template(EvaluateConfig)
    threads: int = 0
    """torch threads of every stage; 0 leaves each its own setting, or torch's choice."""
    seed: int = 0
    """every stage's seed is made from this one."""
    start: Path | None = None
    """a run whose embedded world, pretrained and SFT model are copied instead of made anew; with `only` also what comes
    before that version."""
    only: str = ""
    """run one version alone ("v3"), on what `start` has of the versions before it."""


@dataclass(frozen=True)
class Step:
    """One line of the plan."""

    name: str
    run: Callable[[Any], Path]
    config: Any


def plan(cfg: RecipeConfig) -> list[Step]:
    """Figure 4 as a list, in the embedded world.

    With a `base` it is RLHF on an imported model and existing comparisons (puna.imported). Another `method` has its own
    plan (puna.baselines) after the same beginning; `only` leaves one version of it.
    """
    config.within(cfg, 0, math.inf, "versions")
    if cfg.ppo.pretrain_data == SET_BY_RECIPE and cfg.method != "instructgpt":
        raise ConfigError(f"ppo.pretrain_data: the method {cfg.method!r} sets none: name a token shard")
    if cfg.preferences != PreferenceFiles() and not cfg.base:
        raise ConfigError("preferences: existing comparisons are for a base: set base, or take [preferences] out")
    from puna import baselines, imported  # their plans are made of this module's steps

    if cfg.base:
        steps = imported.plan(cfg)
    elif cfg.method == "llama2":
        steps = beginning(cfg)
        steps += [step for version in range(1, cfg.versions + 1) for step in _version(cfg, version)]
    else:
        steps = [*beginning(cfg), *baselines.plan(cfg)]
    steps.append(Step("report", report, ReportConfig(run=cfg.out)))
    return _only(cfg.only, steps) if cfg.only else steps


def _only(version: str, steps: list[Step]) -> list[Step]:
    """What comes before a version, the version, and the report."""
    rounds = [step.name.split("/")[0] for step in steps]
    versions = list(dict.fromkeys(name for name in rounds if name[1:].isdigit()))
    if version not in versions:
        raise ConfigError(f"only is {version!r}: this recipe has {', '.join(versions) or 'no version'}")
    last = len(rounds) - 1 - rounds[::-1].index(version)
    return [*steps[: last + 1], steps[-1]]


def beginning(cfg: RecipeConfig) -> list[Step]:
    """What all methods have in common: the embedded world, the pretrained and the SFT model, their measurements."""
    out, world, seed = cfg.out, cfg.out / "valley", cfg.seed
    return [
        Step("valley", valley.run, replace(cfg.valley, out=world, versions=cfg.versions, seed=seed)),
        Step(
            "pretrain",
            pretrain.run,
            replace(cfg.pretrain, out=out / "pretrain", data=(world / "corpus.jsonl",), seed=seed),
        ),
        evaluation(cfg, "pretrain", plain=True),
        Step(
            "sft",
            sft.run,
            replace(
                cfg.sft,
                out=out / "sft",
                init=out / "pretrain/model",
                data=(world / "demonstrations.jsonl", world / "careless.jsonl"),
                seed=seed,
            ),
        ),
        evaluation(cfg, "sft"),
    ]


def _version(cfg: RecipeConfig, version: int) -> list[Step]:
    """One round: preferences, reward models, selection, fine-tuning from the base, and perhaps PPO."""
    out, world, seed = cfg.out / f"v{version}", cfg.out / "valley", 1000 * cfg.seed + version
    newest, previous = _chat_model(cfg, version - 1), _chat_model(cfg, max(0, version - 2))
    rounds = [cfg.out / f"v{k}" for k in range(1, version + 1)]
    pooled = rounds[:-1] if version >= cfg.pool_all_from else []
    prompts = (world / f"prompts/v{version}_sampling.jsonl",)
    selected = [
        world / "demonstrations.jsonl",
        out / "rejection_sampling/pool.jsonl",
        out / "context_distillation/dialogs.jsonl",
    ]

    def step(name: str, run: Callable[[Any], Path], settings: Any, **inputs: Any) -> Step:
        """A step of this round, in the folder of its name."""
        return Step(f"v{version}/{name}", run, replace(settings, out=out / name, seed=seed, **inputs))

    steps = [
        step(
            "preferences",
            collect.run,
            cfg.collect,
            models=tuple(dict.fromkeys((newest, previous))),
            prompts=(world / f"prompts/v{version}_preferences.jsonl",),
            world=world,
            batch=version,
        ),
        *reward_models(cfg, out, newest, collected(rounds), seed),
        step(
            "rejection_sampling",
            rejection_sampling.run,
            rewarded(cfg.rejection_sampling, by=out),
            init=newest,
            prompts=prompts,
            earlier=tuple(folder / "rejection_sampling/best.jsonl" for folder in pooled),
        ),
        step(
            "context_distillation",
            context_distillation.run,
            cfg.context_distillation,
            init=newest,
            reward_safety=out / "reward_safety/model",
            prompts=prompts,
        ),
    ]
    if cfg.ghost_attention_from and version >= cfg.ghost_attention_from:
        scripts = (world / "scripts.jsonl",)
        steps.append(step("ghost_attention", ghost_attention.run, cfg.ghost_attention, init=newest, scripts=scripts))
        selected.append(out / "ghost_attention/dialogs.jsonl")
    tuned = replace(cfg.version, out=out, init=cfg.out / "pretrain/model", data=tuple(selected), seed=seed)
    steps += [Step(f"v{version}", sft.run, tuned), evaluation(cfg, f"v{version}")]
    if version > cfg.versions - cfg.ppo_versions:
        policy = step("ppo", ppo.run, rewarded(cfg.ppo, by=out), init=out / "model", prompts=prompts)
        steps += [policy, evaluation(cfg, f"v{version}/ppo")]
    return steps


def _chat_model(cfg: RecipeConfig, version: int) -> Path:
    """The finished model of a version; version 0 is SFT's."""
    if version == 0:
        return cfg.out / "sft/model"
    with_ppo = version > cfg.versions - cfg.ppo_versions
    return cfg.out / f"v{version}" / ("ppo/model" if with_ppo else "model")


def collected(rounds: list[Path]) -> PreferenceFiles:
    """All comparisons of some rounds."""

    def files(name: str) -> tuple[Path, ...]:
        return tuple(folder / f"preferences/{name}.jsonl" for folder in rounds)

    return PreferenceFiles(
        helpfulness=files("helpfulness"),
        helpfulness_test=files("helpfulness_test"),
        safety=files("safety"),
        safety_test=files("safety_test"),
    )


def reward_models(cfg: RecipeConfig, out: Path, init: Path, given: PreferenceFiles, seed: int) -> list[Step]:
    """Both reward models, each with the other's comparisons in its declared share."""
    helpfulness = replace(
        cfg.reward_helpfulness, data=given.helpfulness, other=given.safety, test=given.helpfulness_test
    )
    safety = replace(cfg.reward_safety, data=given.safety, other=given.helpfulness, test=given.safety_test)
    return [
        Step(
            f"{out.name}/{name}",
            reward.run,
            replace(settings, out=out / name, init=init, format=given.format, seed=seed),
        )
        for name, settings in (("reward_helpfulness", helpfulness), ("reward_safety", safety))
    ]


def rewarded(settings: S, by: Path, **paths: Any) -> S:
    """A stage's settings with the reward models of the version whose folder is `by`."""
    return replace(
        settings,
        reward_helpfulness=by / "reward_helpfulness/model",
        reward_safety=by / "reward_safety/model",
        **paths,
    )


def evaluation(cfg: RecipeConfig, name: str, *, plain: bool = False) -> Step:
    """The gold judge's measurement of one version; all from SFT on are compared with SFT."""
    settings = replace(
        cfg.evaluate,
        out=cfg.out / name / "evaluation",
        model=cfg.out / name / "model",
        world=cfg.out / "valley",
        baseline=None if name in ("pretrain", "sft") else cfg.out / "sft/evaluation",
        name=name,
        plain=plain,
        held_out_answers=cfg.out / name if name.split("/")[-1] in ("ppo", "grpo") else None,
        seed=cfg.seed,
    )
    return Step(f"{name}/evaluation", evaluate, settings)


def run(cfg: RecipeConfig) -> Path:
    """Run the plan, or what is left of it, and return the run's folder."""
    steps = [replace(step, config=_with_threads(step.config, cfg.threads)) for step in plan(cfg)]
    if cfg.dry_run:
        for step in steps:
            print(f"{step.name:28}{step.run.__module__}  {_inputs(step.config)}")
        return cfg.out
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("a recipe runs on one process: start it without torchrun (its training stages take torchrun)")
    given = _steps_to_copy(cfg, cfg.start, steps) if cfg.start else []
    if cfg.base and not (cfg.out / "done").exists():
        from puna import imported

        imported.check_files(cfg)
    with RunFolder(cfg.out) as folder:
        config.keep(cfg, folder.path / "config.json")
        if cfg.start:
            folder.take_over(cfg.start, given)
        for number, step in enumerate(steps, start=1):
            if folder.done(step.name):
                continue
            print(f"[{number}/{len(steps)}] {step.name}", file=sys.stderr, flush=True)
            before, began = _seconds_before(folder.path, step), time.perf_counter()
            begun = {"step": step.name, "began": time.time(), "seconds": before}
            write_atomically(folder.path / STARTED, json.dumps(begun) + "\n")
            step.run(step.config)
            seconds = before + time.perf_counter() - began
            folder.mark_done(step.name, seconds=seconds, peak_memory_bytes=_peak_memory())
            (folder.path / STARTED).unlink()
    print(tables.final(cfg.out))
    if cfg.start and cfg.only:
        n, others = ledger.differences(cfg.out, cfg.start, cfg.only)
        same = f"not the same: {', '.join(others)}" if others else "all the same"
        print(f"\n{cfg.only}    {n} artefacts, {same} as in {cfg.start}")
    return cfg.out


def _steps_to_copy(cfg: RecipeConfig, start: Path, steps: list[Step]) -> list[str]:
    """The steps that are copied from `start`: those before V1, or before the only version.

    Raises ConfigError where that run's config has them made in another way.
    """
    path = start / "config.json"
    if not path.exists():
        raise ConfigError(f"start {start} is no run (no {path}): `puna run RECIPE.toml --out {start}` makes one")
    theirs = config.load(RecipeConfig, [str(path)])
    copied = ["valley", "pretrain", "sft", "evaluate", "base", "seed"]
    alike = [f.name for f in dataclasses.fields(cfg)] if cfg.only else copied
    for name in (name for name in alike if name not in ("out", "dry_run", "smoke", "start", "only", "threads")):
        if getattr(theirs, name) != getattr(cfg, name):
            raise ConfigError(f"start {start} has another {name} than this recipe: give both the same")
    if theirs.versions < cfg.versions:
        raise ConfigError(f"start {start} has prompts of {theirs.versions} versions, not of {cfg.versions}")
    names = [step.name for step in steps]
    rounds = [name.split("/")[0] for name in names]
    return names[: rounds.index(cfg.only or "v1")] if cfg.versions else names[:-1]


def _seconds_before(run: Path, step: Step) -> float:
    """How long earlier starts of a step took that were killed: each up to the last file that it wrote."""
    if not (run / STARTED).exists():
        return 0.0
    earlier = json.loads((run / STARTED).read_text(encoding="utf-8"))
    if earlier["step"] != step.name:
        return 0.0
    out: Path = getattr(step.config, "out", run / "report")  # the report alone is told its run
    files = (path for path in out.rglob("*") if path.is_file() and path.name != "run.lock")
    last = max((path.stat().st_mtime for path in files), default=0.0)
    return float(earlier["seconds"] + max(0.0, last - earlier["began"]))


def _with_threads(settings: Any, threads: int) -> Any:
    names = {f.name for f in dataclasses.fields(settings)}
    return replace(settings, threads=threads) if threads and "threads" in names else settings


def _inputs(settings: Any) -> str:
    """What a step reads, for the printed plan."""
    values = [value for f in dataclasses.fields(settings) if f.name != "out" for value in [getattr(settings, f.name)]]
    flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, Path)]
    return " ".join(map(str, flat))


def _peak_memory() -> int:
    """The process's largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""RLHF on an imported model and existing comparisons: the plan of a recipe that has a `base`.

The base stands in for the embedded world, pretraining and SFT, the comparisons for collecting. Without the world there
is no gold judge, and one round: nobody compares the new model's answers.
"""

from __future__ import annotations

import glob
from dataclasses import replace
from pathlib import Path
from typing import Any

from puna.config import ConfigError
from puna.formats import convert
from puna.formats.convert import ImportConfig
from puna.recipe import RecipeConfig, Step, reward_models, rewarded
from puna.stages import ppo, rejection_sampling, sft

NOT_WITH_A_BASE = (
    *("versions", "ghost_attention_from", "pool_all_from", "ppo_versions", "valley", "pretrain", "sft", "collect"),
    *("ghost_attention", "context_distillation", "dpo", "grpo", "critique", "evaluate"),
)
"""What the one round of an imported model has no use for."""


def plan(cfg: RecipeConfig) -> list[Step]:
    """Both reward models on existing comparisons, one round of rejection sampling on their prompts, then PPO.

    Raises ConfigError where comparisons are missing, or the recipe sets what a base has no use for.
    """
    _check(cfg)
    assert cfg.base is not None
    given, base, out = cfg.preferences, cfg.out / "base/model", cfg.out / "v1"
    asked: dict[str, Any] = {
        "prompts": given.helpfulness,
        "safety_prompts": given.safety,
        "format": given.format,
        "seed": cfg.seed,
    }
    sampling = rewarded(cfg.rejection_sampling, by=out, out=out / "rejection_sampling", init=base, **asked)
    tuned = replace(cfg.version, out=out, init=base, data=(out / "rejection_sampling/pool.jsonl",), seed=cfg.seed)
    held_out = {"held_out": given.helpfulness_test, "safety_held_out": given.safety_test}
    policy = rewarded(cfg.ppo, by=out, out=out / "ppo", init=out / "model", **held_out, **asked)
    return [
        Step("base", convert.run, ImportConfig(path=cfg.base, out=cfg.out / "base")),
        *reward_models(cfg, out, base, given, cfg.seed),
        Step("v1/rejection_sampling", rejection_sampling.run, sampling),
        Step("v1", sft.run, tuned),
        Step("v1/ppo", ppo.run, policy),
    ]


def _check(cfg: RecipeConfig) -> None:
    """ConfigError where comparisons are missing, or the recipe sets what a base has no use for."""
    if cfg.method != "llama2":
        raise ConfigError(f"a base has the Llama 2 method alone, not {cfg.method!r}: start that stage by its command")
    if not (cfg.preferences.helpfulness and cfg.preferences.safety):
        raise ConfigError("a base needs comparisons: set preferences.helpfulness and preferences.safety")
    plain = RecipeConfig(versions=1) if cfg.versions == 1 else RecipeConfig()
    if unused := [name for name in NOT_WITH_A_BASE if getattr(cfg, name) != getattr(plain, name)]:
        raise ConfigError(
            f"{', '.join(unused)}: a base has one round of reward models, rejection sampling, fine-tuning and PPO, and "
            "no use for this: take it out, or take base out"
        )


def check_files(cfg: RecipeConfig) -> None:
    """ConfigError where the base or comparisons are not there: to know before a step begins the folder."""
    if not (Path(str(cfg.base)).exists() or glob.glob(str(cfg.base))):
        raise ConfigError(f"base: there is no {cfg.base}")
    for name in ("helpfulness", "helpfulness_test", "safety", "safety_test"):
        for path in getattr(cfg.preferences, name):
            if not path.is_file():
                raise ConfigError(f"preferences.{name}: there is no {path}")

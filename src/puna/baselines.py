"""Other ways from an SFT model to a chat model, on Llama 2's terms: what a recipe's `method` stands for.

Each begins as the Llama 2 recipe does, with the same pretrained and SFT model, and then has in one round what that has
in several: people compare the SFT model's answers to all rounds' preference prompts, and training sees all rounds'
sampling prompts. Nothing is distilled, selected or pooled.

    instructgpt  one reward model of all comparisons, without margins; PPO (Ouyang et al. 2022)
    best_of_n    both reward models; no training: of n answers the best is given (Stiennon et al. 2020)
    dpo          no reward model: the policy learns from the comparisons (Rafailov et al. 2023)
    grpo         both reward models; PPO without a critic, on groups of answers (GRPO, or RLOO by `grpo.advantage`)
    constitutional  the model revises its answers by principles and compares them for the safety model; PPO (Bai et al.
                    2022)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from puna.evals import valley as evaluations
from puna.recipe import PreferenceFiles, RecipeConfig, Step, collected, evaluation, reward_models, rewarded
from puna.stages import collect, critique, dpo, grpo, ppo, rejection_sampling, reward, sft


def plan(cfg: RecipeConfig) -> list[Step]:
    """What follows SFT: the comparisons, the method's own steps, and the gold judge's measurement."""
    asked = {"prompts": _prompts(cfg, "preferences"), "models": (_sft(cfg),), "world": cfg.out / "valley", "batch": 1}
    return [_step(cfg, "preferences", collect.run, cfg.collect, **asked), *METHODS[cfg.method](cfg)]


def _instructgpt(cfg: RecipeConfig) -> list[Step]:
    """PPO's combination of two equal scores is that score; where the recipe mixes text in, it is the pretraining's."""
    given, one = collected([cfg.out / "v1"]), cfg.out / "v1/reward/model"
    pairs = {"data": given.helpfulness + given.safety, "test": given.helpfulness_test + given.safety_test}
    settings = replace(cfg.reward_helpfulness, margin="none", safety_auxiliary=0.0, other_share=0.0)
    text = cfg.out / "pretrain/data/train" if cfg.ppo.pretrain_coefficient else None
    models = {"reward_helpfulness": one, "reward_safety": one, "pretrain_data": text}
    return [
        _step(cfg, "reward", reward.run, settings, init=_sft(cfg), **pairs),
        _step(cfg, "ppo", ppo.run, cfg.ppo, init=_sft(cfg), prompts=_prompts(cfg, "sampling"), **models),
        evaluation(cfg, "v1/ppo"),
    ]


def _best_of_n(cfg: RecipeConfig) -> list[Step]:
    """n is rejection sampling's K, whose curve says what n buys on the training prompts."""
    sampling = rewarded(cfg.rejection_sampling, by=cfg.out / "v1")
    measured = evaluation(cfg, "v1/best_of_n")
    chosen = rewarded(measured.config, by=cfg.out / "v1", model=_sft(cfg), best_of=sampling.samples)
    asked = {"init": _sft(cfg), "prompts": _prompts(cfg, "sampling")}
    return [
        *_two_reward_models(cfg),
        _step(cfg, "rejection_sampling", rejection_sampling.run, sampling, **asked),
        Step(measured.name, evaluations.run, chosen),
    ]


def _dpo(cfg: RecipeConfig) -> list[Step]:
    given = collected([cfg.out / "v1"])
    pairs = {"data": given.helpfulness + given.safety, "test": given.helpfulness_test + given.safety_test}
    return [_step(cfg, "dpo", dpo.run, cfg.dpo, init=_sft(cfg), **pairs), evaluation(cfg, "v1/dpo")]


def _grpo(cfg: RecipeConfig) -> list[Step]:
    settings = rewarded(cfg.grpo, by=cfg.out / "v1")
    return [
        *_two_reward_models(cfg),
        _step(cfg, "grpo", grpo.run, settings, init=_sft(cfg), prompts=_prompts(cfg, "sampling")),
        evaluation(cfg, "v1/grpo"),
    ]


def _constitutional(cfg: RecipeConfig) -> list[Step]:
    """People compare helpfulness alone: the safety model learns from the comparisons of the revised model."""
    out, tuned = cfg.out / "v1", cfg.out / "v1/model"
    data = (cfg.out / "valley/demonstrations.jsonl", out / "critique/dialogs.jsonl")
    compare = replace(cfg.critique, task="compare")
    people, told = collected([out]), out / "ai_preferences"
    given = replace(people, safety=(told / "safety.jsonl",), safety_test=(told / "safety_test.jsonl",))
    sampling = _prompts(cfg, "sampling")
    return [
        _step(cfg, "critique", critique.run, cfg.critique, init=_sft(cfg), prompts=sampling),
        Step("v1", sft.run, replace(cfg.version, out=out, init=cfg.out / "pretrain/model", data=data, seed=_seed(cfg))),
        evaluation(cfg, "v1"),
        _step(cfg, "ai_preferences", critique.run, compare, init=tuned, prompts=_prompts(cfg, "preferences")),
        *reward_models(cfg, out, tuned, given, _seed(cfg)),
        _step(cfg, "ppo", ppo.run, rewarded(cfg.ppo, by=out), init=tuned, prompts=sampling),
        evaluation(cfg, "v1/ppo"),
    ]


METHODS: dict[str, Callable[[RecipeConfig], list[Step]]] = {
    "instructgpt": _instructgpt,
    "best_of_n": _best_of_n,
    "dpo": _dpo,
    "grpo": _grpo,
    "constitutional": _constitutional,
}


def _step(cfg: RecipeConfig, name: str, run: Callable[[Any], Path], settings: Any, **inputs: Any) -> Step:
    """A step of the one round, in the folder of its name."""
    return Step(f"v1/{name}", run, replace(settings, out=cfg.out / "v1" / name, seed=_seed(cfg), **inputs))


def _two_reward_models(cfg: RecipeConfig) -> list[Step]:
    given: PreferenceFiles = collected([cfg.out / "v1"])
    return reward_models(cfg, cfg.out / "v1", _sft(cfg), given, _seed(cfg))


def _seed(cfg: RecipeConfig) -> int:
    """That of the Llama 2 recipe's first version."""
    return 1000 * cfg.seed + 1


def _sft(cfg: RecipeConfig) -> Path:
    return cfg.out / "sft/model"


def _prompts(cfg: RecipeConfig, use: str) -> tuple[Path, ...]:
    """All rounds' prompts for one use."""
    return tuple(cfg.out / f"valley/prompts/v{version}_{use}.jsonl" for version in range(1, cfg.versions + 1))

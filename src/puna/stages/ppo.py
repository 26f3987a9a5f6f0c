"""Proximal policy optimisation (paper 3.2.3) on top of a rejection-sampled model.

For each iteration:
1. Sample one answer to each prompt of the batch from the policy, at temperature 1 and without cutting its
   distribution.
2. Score: R_c = safety score where the prompt is tagged or the score is below 0.15, else helpfulness score;
   R~ = whiten(logit(R_c)) over the batch; an answer without EOS has a penalty subtracted.
3. Reward every token with -beta (log pi - log pi_0), the last with R~ on top; advantages by GAE, whitened over the
   batch.
4. One gradient step a mini-batch on the clipped policy and value losses.
Every few iterations the mean reward on held-out prompts is measured; the best policy is kept, and training stops when
it has not improved for a while.

Where the paper is silent: the critic is a separate model that starts from the helpfulness reward model; KL is counted
per token (k1) and the score once, at the last token, so that with gamma 1 their sum is the paper's R; whitening takes
the batch's mean and deviation; lambda 0.95; pi_0 is the policy that PPO starts from.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna import checkpoint, config, losses, optim, parallel
from puna.checkpoint import Saver
from puna.config import ConfigError, DataError
from puna.data import loader, packing
from puna.data.prompts import Prompt, fitting, read_prompts
from puna.formats import huggingface
from puna.generate.engine import LocalEngine
from puna.generate.scoring import Scorer, combined_reward
from puna.model.reward import RewardModel
from puna.model.transformer import Transformer
from puna.run_folder import Metrics, Progress, RunFolder, write_atomically
from puna.text import chat
from puna.text import tokenizer as tokenizers
from puna.text.tokenizer import Tokenizer
from puna.types import Completion, Engine, Rollout


@dataclass(frozen=True)
class PPOConfig:
    """`puna ppo`: a chat model, two reward models and prompts in, a better chat model out."""

    out: Path
    """the stage's folder; run again to resume."""
    init: Path
    """the policy to start from, also the reference pi_0."""
    reward_helpfulness: Path
    reward_safety: Path
    prompts: tuple[Path, ...]
    """prompt files."""
    safety_prompts: tuple[Path, ...] = ()
    """more of them, all tagged as likely to bring out unsafe answers."""
    held_out: tuple[Path, ...] = ()
    """prompt files for early stopping; empty draws `held_out_prompts` of `prompts`."""
    safety_held_out: tuple[Path, ...] = ()
    """more of them, all tagged."""
    format: str = "prompts"
    """how to read them (see puna.data.readers)."""
    iterations: int = 200
    """paper: 200 to 400."""
    batch_size: int = 512
    """answers an iteration (paper 3.2.3)."""
    mini_batch_size: int = 64
    """answers a gradient step (paper 3.2.3)."""
    inner_epochs: int = 1
    """passes over a batch (paper: one gradient step a mini-batch)."""
    micro_batch_tokens: int = 8192
    """padded tokens a forward pass."""
    clip: float = 0.2
    """ratio clipping (paper 3.2.3)."""
    value_clip: float = 0.2
    """ours: as the ratio."""
    beta: float = 0.01
    """KL weight (paper: 0.01 for 7B and 13B, 0.005 above)."""
    threshold: float = 0.15
    """a safety score below this is the reward (3.2.3)."""
    gamma: float = 1.0
    lam: float = 0.95
    missing_eos_penalty: float = 1.0
    """subtracted from the whitened score of an answer that did not end."""
    critic_warmup: int = 0
    """iterations that train the critic alone."""
    value_lr_scale: float = 1.0
    """the critic's learning rate over the policy's."""
    temperature: float = 1.0
    """answers are drawn, and scored by the trainer, at this temperature."""
    max_new_tokens: int = 64
    max_prompt_tokens: int = 0
    """leave longer prompts out; 0 leaves out those alone that fill the model's context."""
    optim: optim.OptimConfig = field(
        default_factory=lambda: optim.OptimConfig(lr=1e-6, schedule="constant", warmup_steps=0)
    )
    """paper 3.2.3: constant 1e-6, weight decay 0.1, clip 1.0."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32 keeps the first ratio of an iteration at 1 to the last digits."""
    parallel: parallel.ParallelConfig = field(default_factory=parallel.ParallelConfig)
    evaluate_every: int = 10
    """iterations between held-out measurements."""
    held_out_prompts: int = 64
    patience: int = 4
    """stop after so many measurements without a new best; 0 never stops early."""
    checkpoint_every: int = 10
    """iterations between checkpoints; 0 writes one on SIGTERM alone."""
    threads: int = 0
    """torch threads; 0 leaves torch's choice."""
    seed: int = 0

    def __post_init__(self) -> None:
        config.positive(self, "iterations", "batch_size", "mini_batch_size", "micro_batch_tokens", "evaluate_every")


@dataclass(frozen=True)
class Models:
    """The four models of PPO, and the engine that samples from the policy."""

    policy: Transformer
    value: RewardModel
    reference: Transformer
    helpfulness: Scorer
    safety: Scorer
    engine: Engine
    tokenizer: Tokenizer
    device: torch.device

    @property
    def trained(self) -> nn.ModuleDict:
        """What the checkpoint holds."""
        return nn.ModuleDict({"policy": self.policy, "value": self.value})


def run(cfg: PPOConfig) -> Path:
    """Train and return the best policy's folder."""
    device = parallel.start(cfg.threads, cfg.parallel)
    with RunFolder(cfg.out) as folder:
        model_path = folder.path / "model"
        config.keep(cfg, folder.path / "config.json")
        if folder.done("ppo"):
            return model_path
        models = load(cfg, device)
        prompts, held_out, left_out = read(cfg, models.tokenizer)
        optimizer = optim.adamw(
            cfg.optim,
            optim.groups(models.policy, cfg.optim),
            optim.groups(models.value, cfg.optim, cfg.value_lr_scale),
        )
        size = min(cfg.batch_size, len(prompts))
        epochs = math.ceil(cfg.iterations / (len(prompts) // size))
        batches = loader.steps_of_epochs(len(prompts), size, epochs, cfg.seed, multiple=size)[: cfg.iterations]
        start, kept = checkpoint.resume(folder.path / "checkpoints", models.trained, optimizer)
        best = Best(**kept) if kept else Best(0, -math.inf)
        metrics = Metrics(folder.path / "metrics.jsonl", resume_step=start - 1, stage="ppo")
        progress = Progress("ppo", len(batches), unit="iteration", start=start)
        with Saver(folder.path / "checkpoints", models.trained, optimizer, cfg.checkpoint_every) as saver:
            for iteration in range(start, len(batches)):
                if iteration % cfg.evaluate_every == 0:
                    best = measure(cfg, models, held_out, iteration, best, folder.path)
                    if cfg.patience and iteration - best.iteration >= cfg.patience * cfg.evaluate_every:
                        break
                clock = time.perf_counter()
                rollout, numbers = collect(cfg, models, [prompts[i] for i in batches[iteration]], iteration)
                collected = time.perf_counter()
                numbers |= update(cfg, models, optimizer, rollout, iteration, len(batches))
                numbers |= {"seconds_collect": collected - clock, "seconds_update": time.perf_counter() - collected}
                metrics.log(step=iteration, **numbers)
                progress.update(reward=numbers["reward"], kl=numbers["kl"])
                saver.after(iteration + 1, asdict(best))
            else:
                best = measure(cfg, models, held_out, len(batches), best, folder.path)
        progress.close()
        if best.reward == -math.inf:
            raise DataError("no held-out measurement gave a number: the reward models' scores are not finite")
        if parallel.is_main():
            shutil.copytree(kept_policy(folder.path, best.iteration), model_path, dirs_exist_ok=True)
            folder.mark_done("ppo", best_iteration=best.iteration, held_out_reward=best.reward, left_out=left_out)
            shutil.rmtree(folder.path / "best")
        parallel.barrier()
        return model_path


def read(cfg: PPOConfig, tokenizer: Tokenizer) -> tuple[list[Prompt], list[Prompt], int]:
    """The prompts to train on, the held-out ones, and how many were too long for either.

    The held-out ones are drawn at random, so that both kinds are among them.
    """
    rng = np.random.default_rng(cfg.seed)
    context = huggingface.read_config(cfg.init).max_seq_len
    every = read_prompts(cfg.prompts, cfg.format, cfg.safety_prompts)
    prompts = fitting(every, tokenizer, context, cfg.max_prompt_tokens)
    left_out = len(every) - len(prompts)
    if cfg.held_out or cfg.safety_held_out:
        every = read_prompts(cfg.held_out, cfg.format, cfg.safety_held_out)
        held_out = fitting(every, tokenizer, context, cfg.max_prompt_tokens)
        left_out += len(every) - len(held_out)
        return prompts, [held_out[i] for i in rng.permutation(len(held_out))[: cfg.held_out_prompts]], left_out
    if not 0 < cfg.held_out_prompts < len(prompts):
        raise ConfigError(f"held_out_prompts is {cfg.held_out_prompts} of {len(prompts)} prompts: keep some of both")
    order = rng.permutation(len(prompts))
    held_out = [prompts[i] for i in order[: cfg.held_out_prompts]]
    return [prompts[i] for i in order[cfg.held_out_prompts :]], held_out, left_out


def load(cfg: PPOConfig, device: torch.device) -> Models:
    """Policy and reference from `init`, critic from the helpfulness reward model, both reward models frozen."""
    tokenizer = tokenizers.load(cfg.init)
    how: Any = (device, cfg.parallel, cfg.precision)
    policy = parallel.place(*huggingface.open_model(cfg.init), *how)
    helpfulness, safety = (
        Scorer(parallel.place(*huggingface.open_reward_model(path), *how), tokenizer, precision=cfg.precision)
        for path in (cfg.reward_helpfulness, cfg.reward_safety)
    )
    return Models(
        policy=policy,
        value=parallel.place(*huggingface.open_reward_model(cfg.reward_helpfulness), *how),
        reference=parallel.place(*huggingface.open_model(cfg.init), *how).eval().requires_grad_(False),
        helpfulness=helpfulness,
        safety=safety,
        engine=LocalEngine(policy, tokenizer),
        tokenizer=tokenizer,
        device=device,
    )


def sample(
    cfg: PPOConfig, models: Models, prompts: Sequence[Prompt], seed: int
) -> tuple[list[list[int]], list[Completion], dict[str, Tensor]]:
    """1 and 2: prompt ids, one answer each, and the scores of both reward models and combined, (B,) each."""
    prompt_ids = [chat.encode_prompt(prompt["messages"], models.tokenizer) for prompt in prompts]
    settings: dict[str, Any] = {"max_new_tokens": cfg.max_new_tokens, "temperature": cfg.temperature, "seed": seed}

    def answer(first: int, part: Sequence[list[int]]) -> list[Completion]:
        return [answers[0] for answers in models.engine.generate_ids(part, first=first, **settings)]

    with parallel.gathered(models.policy, cfg.precision, models.device) as policy:
        models.engine.update_weights(policy)
        completions = parallel.spread(answer, prompt_ids, everyone=True)
        models.engine.update_weights(models.policy)  # or the gathered weights would stay
    rows = [ids + completion.tokens for ids, completion in zip(prompt_ids, completions, strict=True)]
    helpfulness, safety = models.helpfulness.score_tokens(rows), models.safety.score_tokens(rows)
    combined = combined_reward(safety, helpfulness, [prompt["is_safety"] for prompt in prompts], cfg.threshold)
    return prompt_ids, completions, {"helpfulness": helpfulness, "safety": safety, "reward": combined}


def collect(
    cfg: PPOConfig, models: Models, prompts: Sequence[Prompt], iteration: int
) -> tuple[Rollout, dict[str, float]]:
    """1 to 3: a rollout with everything the update needs, and the iteration's numbers."""
    prompt_ids, completions, scores = sample(cfg, models, prompts, cfg.seed + 1 + iteration)
    rows = [ids + completion.tokens for ids, completion in zip(prompt_ids, completions, strict=True)]
    tokens, lengths = packing.pad_right(rows, models.tokenizer.pad_id)
    step = torch.arange(1, tokens.shape[1])  # position of the emitted token
    begins = torch.tensor([len(ids) for ids in prompt_ids])
    action_mask = (step >= begins[:, None]) & (step < lengths[:, None])  # (B, T - 1)
    finished = torch.tensor([completion.finished for completion in completions])
    whitened = losses.whiten(losses.logit(scores["reward"])) - cfg.missing_eos_penalty * ~finished
    parts = parallel.spread(lambda first, part: reread(cfg, models, tokens, action_mask, part), range(len(rows)))
    logprobs, reference, values = torch.stack(parts, dim=1)
    rollout = Rollout(tokens, action_mask, logprobs, reference, values, whitened, finished)
    kl = ((logprobs - reference) * action_mask).sum(dim=1)
    numbers = {name: float(score.mean()) for name, score in scores.items()}
    numbers |= {
        "kl": float(kl.mean()),
        "length": float(action_mask.sum(dim=1).float().mean()),
        "finished": float(finished.float().mean()),
    }
    return rollout, numbers


@torch.no_grad()  # not inference_mode: what a sharded model gathers in it could not be trained with again
def reread(
    cfg: PPOConfig, models: Models, tokens: Tensor, action_mask: Tensor, rows: Sequence[int]
) -> Sequence[Tensor]:
    """log pi, log pi_0 and the value of every step of some rows, by the trainer's own numbers: (3, T - 1) each."""
    found = torch.zeros(3, len(rows), action_mask.shape[1])
    lengths = row_lengths(action_mask, rows)
    for members in packing.passes(lengths, cfg.micro_batch_tokens):
        end, part = max(lengths[i] for i in members), [rows[i] for i in members]
        ids, mask = (field.to(models.device) for field in (tokens[part, :end], action_mask[part, : end - 1]))
        found[0, members, : end - 1] = policy_logprobs(cfg, models.policy, ids, mask)[0].cpu()
        found[1, members, : end - 1] = policy_logprobs(cfg, models.reference, ids, mask)[0].cpu()
        found[2, members, : end - 1] = state_values(cfg, models.value, ids).cpu()
    return found.unbind(1)


def row_lengths(action_mask: Tensor, rows: Sequence[int]) -> list[int]:
    """Tokens of these rows, up to the last of their answers."""
    return [int(action_mask[i].nonzero()[-1]) + 2 for i in rows]


def policy_logprobs(cfg: PPOConfig, model: Transformer, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """log pi of every emitted token at the sampling temperature, (B, T - 1), and the logits of its N actions, (N, V).

    tokens (B, T), mask (B, T - 1). What is no action has 0: a prompt's logits, of a large vocabulary, are never made.
    """
    with parallel.autocast(cfg.precision, tokens.device):
        logits = model(tokens, only=F.pad(mask, (0, 1)))
    logprobs = losses.token_logprobs(logits, tokens[:, 1:][mask], cfg.temperature)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logprobs), logits


def state_values(cfg: PPOConfig, model: RewardModel, tokens: Tensor) -> Tensor:
    """The critic's value of every state before a token is emitted, (B, T - 1) float32."""
    with parallel.autocast(cfg.precision, tokens.device):
        return model.values(tokens)[:, :-1].float()


def update(
    cfg: PPOConfig, models: Models, optimizer: torch.optim.Optimizer, rollout: Rollout, iteration: int, n_steps: int
) -> dict[str, float]:
    """3 and 4: advantages, then one gradient step a mini-batch; the iteration's numbers, averaged over tokens."""
    rewards = losses.token_rewards(
        rollout.scores, rollout.logprobs, rollout.reference_logprobs, rollout.action_mask, cfg.beta
    )
    advantages, returns = losses.generalized_advantages(
        rewards, rollout.values, rollout.action_mask, cfg.gamma, cfg.lam
    )
    advantages = losses.whiten(advantages, rollout.action_mask)
    sums: dict[str, float] = {}
    n_updates = 0
    for epoch in range(cfg.inner_epochs):
        order = np.random.default_rng((cfg.seed, iteration, epoch)).permutation(len(rollout.tokens))
        for begin in range(0, len(order), cfg.mini_batch_size):
            members = order[begin : begin + cfg.mini_batch_size].tolist()
            numbers = accumulate(cfg, models, rollout, advantages, returns, members)
            if iteration < cfg.critic_warmup:
                models.policy.zero_grad(set_to_none=True)
            norm, _ = optim.clip_and_step([models.policy, models.value], optimizer, cfg.optim, iteration, n_steps)
            for name, number in (numbers | {"grad_norm": norm}).items():
                sums[name] = sums.get(name, 0.0) + number
            n_updates += 1
    residual = (returns - rollout.values)[rollout.action_mask].var() / returns[rollout.action_mask].var()
    return {name: value / n_updates for name, value in sums.items()} | {"explained_variance": 1 - float(residual)}


def accumulate(
    cfg: PPOConfig, models: Models, rollout: Rollout, advantages: Tensor, returns: Tensor, members: list[int]
) -> dict[str, float]:
    """Back-propagate one mini-batch: both losses, summed over its action tokens and divided by their number."""
    count = int(rollout.action_mask[members].sum())
    mine = members[parallel.share(len(members))]
    lengths = row_lengths(rollout.action_mask, mine)
    sums: dict[str, Tensor] = {}
    for part in packing.passes(lengths, cfg.micro_batch_tokens):
        rows = [mine[i] for i in part]
        end = max(lengths[i] for i in part)
        tokens = rollout.tokens[rows, :end].to(models.device)
        mask, old, old_values, advantage, target = (
            field[rows, : end - 1].to(models.device)
            for field in (rollout.action_mask, rollout.logprobs, rollout.values, advantages, returns)
        )
        logprobs, logits = policy_logprobs(cfg, models.policy, tokens, mask)
        policy_loss = (losses.policy_loss(logprobs, old, advantage, cfg.clip) * mask).sum() / count
        values = state_values(cfg, models.value, tokens)
        value_loss = (losses.value_loss(values, old_values, target, cfg.value_clip) * mask).sum() / count
        parallel.backward(policy_loss + value_loss)
        with torch.no_grad():
            ratio = (logprobs - old).exp()
            parts = {
                "policy_loss": policy_loss.detach(),
                "value_loss": value_loss.detach(),
                "clip_fraction": (((ratio - 1).abs() > cfg.clip) * mask).sum() / count,
                "approximate_kl": ((ratio - 1 - ratio.log()) * mask).sum() / count,
                "entropy": losses.entropy(logits / cfg.temperature).sum() / count,
            }
        for name, number in parts.items():
            sums[name] = sums[name] + number if name in sums else number
    totals = parallel.total(torch.stack(list(sums.values())))
    return dict(zip(sums, totals.tolist(), strict=True))


def kept_policy(folder: Path, iteration: int) -> Path:
    """Where the policy of a measurement that was the best is kept: a killed run may need the one before it."""
    return folder / "best" / f"{iteration:04d}"


@dataclass(frozen=True)
class Best:
    """The best held-out measurement so far."""

    iteration: int
    reward: float


def measure(
    cfg: PPOConfig, models: Models, held_out: Sequence[Prompt], iteration: int, best: Best, folder: Path
) -> Best:
    """Score the policy on held-out prompts, keep their answers for later judges, and save the policy if it is best."""
    _, completions, scores = sample(cfg, models, held_out, cfg.seed)
    lines = [
        json.dumps(
            {"prompt_id": prompt["id"], "answer": completion.text, "finished": completion.finished, "reward": reward}
        )
        for prompt, completion, reward in zip(held_out, completions, scores["reward"].tolist(), strict=True)
    ]
    write_atomically(folder / "held_out" / f"{iteration:04d}.jsonl", "".join(line + "\n" for line in lines))
    finished = torch.tensor([completion.finished for completion in completions])
    reward = float((losses.logit(scores["reward"]) - cfg.missing_eos_penalty * ~finished).mean())
    if not reward > best.reward:  # so that what is not a number is never the best
        return best
    provenance: dict[str, Any] = {"stage": "ppo", "parent": str(cfg.init), "iteration": iteration}
    huggingface.save_model(models.policy, models.tokenizer, kept_policy(folder, iteration), provenance=provenance)
    return Best(iteration, reward)

"""Policy optimisation without a critic: GRPO (Shao et al. 2024) and RLOO (Ahmadian et al. 2024), on PPO's reward.

For each iteration:
1. Sample a group of G answers to each prompt of the batch from the policy, at temperature 1 and uncut.
2. Score them as PPO does: R_c, R~ = whiten(logit(R_c)) over the batch, a penalty where EOS is missing.
3. All tokens of an answer have one advantage, relative to its group. "grpo": (R~ - the group's mean) / the group's
   deviation. "rloo": R~ - beta KL of the answer, minus the mean of the same over the other answers of its group.
4. One gradient step a mini-batch on PPO's clipped loss; "grpo" adds beta times KL (k3) to it.
Every few iterations the mean reward on held-out prompts is measured; the best policy is kept, and training stops when
it has not improved for a while.

Ours: RLOO keeps the clip, which does nothing at one step a batch; `average` says how tokens weigh.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from puna import checkpoint, config, losses, optim, parallel
from puna.checkpoint import Saver
from puna.config import ConfigError
from puna.data import loader, packing
from puna.data.prompts import Prompt, apart, fitting, read_prompts
from puna.formats import huggingface
from puna.generate.actor_critic import action_logprobs, draw, sampler, scorer
from puna.generate.engine import LocalEngine
from puna.generate.held_out import Best, mean_score, publish, save_answers, save_policy
from puna.generate.scoring import Judges
from puna.model.transformer import Transformer
from puna.parallel import Placement
from puna.run_folder import Metrics, Progress, RunFolder
from puna.text import chat
from puna.text.tokenizer import Tokenizer
from puna.types import Completion, Engine


@dataclass(frozen=True)
class GRPOConfig:
    """`puna grpo`: a chat model, two reward models and prompts in, a better chat model out."""

    out: Path
    """the stage's folder; run again to resume."""
    init: Path
    """the policy to start from, also the reference pi_0."""
    reward_helpfulness: Path
    """the helpfulness reward model's folder."""
    reward_safety: Path
    """the safety reward model's folder."""
    prompts: tuple[Path, ...]
    """prompt files."""
    safety_prompts: tuple[Path, ...] = ()
    """more of them, all tagged as likely to bring out unsafe answers."""
    format: str = "prompts"
    """how to read them (docs/guides/real-data.md lists the formats)."""
    advantage: Literal["grpo", "rloo"] = "grpo"
    """an answer's advantage within its group, and where KL counts."""
    average: Literal["", "answer", "token"] = ""
    """tokens weigh the same within each answer (Shao et al., eq. 3), or in all (RLOO's gradient); empty
    follows `advantage`."""
    iterations: int = 200
    batch_size: int = 512
    """answers an iteration, groups whole."""
    group_size: int = 8
    """answers a prompt (Shao et al.: 64)."""
    mini_batch_size: int = 64
    """answers a gradient step."""
    inner_epochs: int = 1
    """passes over a batch."""
    micro_batch_tokens: int = 8192
    """padded tokens a forward pass."""
    clip: float = 0.2
    """ratio clipping, as PPO's."""
    beta: float = 0.04
    """KL weight (Shao et al.)."""
    threshold: float = 0.15
    """where the safety score is below this, it is the reward in place of the helpfulness score, as PPO's."""
    missing_eos_penalty: float = 1.0
    """subtracted from the whitened score of an answer that did not end."""
    temperature: float = 1.0
    """answers are drawn, and scored by the trainer, at this temperature."""
    max_new_tokens: int = 64
    """tokens of the longest answer; one that is cut off there is penalised."""
    max_prompt_tokens: int = 0
    """leave longer prompts out; 0 leaves out those alone that fill the model's context."""
    optim: optim.OptimConfig = field(
        default_factory=lambda: optim.OptimConfig(lr=1e-6, schedule="constant", warmup_steps=0)
    )
    """Shao et al.: 1e-6."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products in bfloat16 over float32 weights."""
    parallel: parallel.ParallelConfig = field(default_factory=parallel.ParallelConfig)
    evaluate_every: int = 10
    """iterations between held-out measurements."""
    held_out_prompts: int = 64
    """prompts set aside of `prompts` for early stopping; fewer than there are."""
    patience: int = 4
    """stop after so many measurements without a new best; 0 never stops early."""
    checkpoint_every: int = 10
    """iterations between checkpoints, and one after the last; 0 writes one on SIGTERM alone."""
    checkpoints_kept: int = 2
    """the newest ones; older ones are removed."""
    threads: int = 0
    """torch threads; 0 leaves torch's choice."""
    seed: int = 0

    def __post_init__(self) -> None:
        config.positive(self, "iterations", "batch_size", "mini_batch_size", "micro_batch_tokens", "evaluate_every")
        config.positive(self, "inner_epochs", "held_out_prompts", "temperature")
        config.positive(self, "clip", "max_new_tokens", "checkpoints_kept")
        config.within(self, 0, 1, "threshold")
        config.within(self, 0, math.inf, "beta", "patience")
        if self.group_size < 2:
            raise ConfigError(f"group_size is {self.group_size}: an answer needs others to be compared with")
        if self.batch_size % self.group_size:
            raise ConfigError(f"batch_size {self.batch_size} is not a multiple of group_size {self.group_size}")


AVERAGE: dict[str, Literal["answer", "token"]] = {"grpo": "answer", "rloo": "token"}
"""How tokens weigh where `average` does not say."""


class Models(NamedTuple):
    """The policy, the one that it is held to, what judges it, and the engine that samples from it."""

    policy: Transformer
    reference: Transformer
    judges: Judges
    engine: Engine
    tokenizer: Tokenizer
    device: torch.device


class Rollout(NamedTuple):
    """What is learned from. B answers, right-padded to T tokens of prompt + answer, a group beside one another.

    Entry t of a (B, T - 1) field speaks of the step that emits token t + 1.
    """

    tokens: Tensor  # (B, T) int64
    action_mask: Tensor  # (B, T - 1) bool: True where the emitted token belongs to the answer (EOS included)
    logprobs: Tensor  # (B, T - 1) log pi_old of the emitted token; 0 where it is no action
    reference_logprobs: Tensor  # (B, T - 1)
    advantages: Tensor  # (B,)


def run(cfg: GRPOConfig) -> Path:
    """Train and return the best policy's folder."""
    device = parallel.start(cfg.threads, cfg.parallel)
    with RunFolder(cfg.out) as folder:
        model_path = folder.path / "model"
        config.keep(cfg, folder.path / "config.json")
        if folder.done("grpo"):
            return model_path
        models = load(cfg, device)
        every = read_prompts(cfg.prompts, cfg.format, cfg.safety_prompts)
        fit = fitting(every, models.tokenizer, models.engine.context, cfg.max_prompt_tokens)
        prompts, held_out = apart(fit, cfg.held_out_prompts, cfg.seed)
        optimizer = optim.adamw(cfg.optim, optim.groups(models.policy, cfg.optim))
        size = min(cfg.batch_size // cfg.group_size, len(prompts))
        epochs = math.ceil(cfg.iterations / (len(prompts) // size))
        batches = loader.steps_of_epochs(len(prompts), size, epochs, cfg.seed, multiple=size)[: cfg.iterations]
        trained = nn.ModuleDict({"policy": models.policy})
        start, extra = checkpoint.resume(folder.path / "checkpoints", trained, optimizer)
        best = Best(**extra)
        metrics = Metrics(folder.path / "metrics.jsonl", resume_step=start - 1, stage="grpo")
        progress = Progress(cfg.advantage, len(batches), unit="iteration", start=start)
        often = cfg.checkpoint_every, cfg.checkpoints_kept, len(batches)
        with Saver(folder.path / "checkpoints", trained, optimizer, *often) as saver:
            for iteration in range(start, len(batches)):
                if iteration % cfg.evaluate_every == 0:
                    best = measure(cfg, models, held_out, iteration, best, folder.path)
                    if cfg.patience and iteration - best.iteration >= cfg.patience * cfg.evaluate_every:
                        break
                began = time.perf_counter()
                rollout, numbers = collect(cfg, models, [prompts[i] for i in batches[iteration]], iteration)
                numbers |= update(cfg, models, optimizer, rollout, iteration, len(batches))
                rate = numbers["tokens_per_second"] = int(rollout.action_mask.sum()) / (time.perf_counter() - began)
                metrics.log(step=iteration, **numbers)
                progress.update(reward=numbers["reward"], kl=numbers["kl"], tokens_per_second=rate)
                saver.after(iteration + 1, best._asdict())
            else:
                best = measure(cfg, models, held_out, len(batches), best, folder.path)
        progress.close()
        publish(folder, "grpo", best, left_out=len(every) - len(fit))
        return model_path


def load(cfg: GRPOConfig, device: torch.device) -> Models:
    """Policy and reference from `init`, both reward models frozen."""
    tokenizer = huggingface.load_tokenizer(cfg.init)
    placement = Placement(device, cfg.parallel, cfg.precision)
    rewards = cfg.reward_helpfulness, cfg.reward_safety
    helpfulness, safety = (scorer(path, cfg.init, tokenizer, placement) for path in rewards)
    judges = Judges(helpfulness, safety, cfg.threshold)
    policy = parallel.place(*huggingface.open_model(cfg.init), placement)
    reference = parallel.place(*huggingface.open_model(cfg.init), placement).eval().requires_grad_(False)
    return Models(policy, reference, judges, LocalEngine(policy, tokenizer), tokenizer, device)


def sample(
    cfg: GRPOConfig, models: Models, prompts: Sequence[Prompt], n: int, seed: int
) -> tuple[list[list[int]], list[Completion], dict[str, Tensor]]:
    """1 and 2: prompt ids, answers and scores (P n,) of n answers to each of P prompts, each's side by side."""
    models.engine.update_weights(sampler(models.policy, "fp32", models.device))
    asked = [chat.encode_prompt(prompt["messages"], models.tokenizer) for prompt in prompts]
    settings: dict[str, Any] = {"max_new_tokens": cfg.max_new_tokens, "temperature": cfg.temperature, "seed": seed}
    groups = draw(models.engine, models.policy, asked, n=n, **settings)
    completions = [completion for group in groups for completion in group]
    prompt_ids = [ids for ids in asked for _ in range(n)]
    rows = [ids + completion.tokens for ids, completion in zip(prompt_ids, completions, strict=True)]
    return prompt_ids, completions, models.judges.scores(rows, [p["is_safety"] for p in prompts for _ in range(n)])


def collect(
    cfg: GRPOConfig, models: Models, prompts: Sequence[Prompt], iteration: int
) -> tuple[Rollout, dict[str, float]]:
    """1 to 3: a rollout with everything the update needs, and the iteration's numbers."""
    began = time.perf_counter()
    prompt_ids, completions, scores = sample(cfg, models, prompts, cfg.group_size, cfg.seed + 1 + iteration)
    answers = [completion.tokens for completion in completions]
    tokens, _, action_mask = packing.pad_answers(prompt_ids, answers, models.tokenizer.pad_id)
    read = parallel.spread(
        lambda first, rows: old_and_reference_logprobs(cfg, models, tokens, action_mask, rows), range(len(tokens))
    )
    logprobs, reference = torch.stack(read, dim=1)
    finished = torch.tensor([completion.finished for completion in completions])
    whitened = losses.whiten(losses.logit(scores["reward"])) - cfg.missing_eos_penalty * ~finished
    kl = losses.sequence_kl(logprobs, reference, action_mask)
    rollout = Rollout(tokens, action_mask, logprobs, reference, advantages(cfg, whitened, kl))
    numbers = {name: float(score.mean()) for name, score in scores.items()} | {
        "kl": float(kl.mean()),
        "length": float(action_mask.sum(dim=1).float().mean()),
        "finished": float(finished.float().mean()),
        "entropy": -float(logprobs[action_mask].mean()),
        "seconds_collect": time.perf_counter() - began,
    }
    return rollout, numbers


@torch.no_grad()  # not inference_mode: what a sharded model gathers in it could not be trained with again
def old_and_reference_logprobs(
    cfg: GRPOConfig, models: Models, tokens: Tensor, action_mask: Tensor, rows: Sequence[int]
) -> Sequence[Tensor]:
    """log pi and log pi_0 of every action of some rows, (2, T - 1) each, 0 elsewhere, on the CPU."""
    found = torch.zeros(2, len(rows), action_mask.shape[1])
    lengths = packing.acted_lengths(action_mask[list(rows)])
    for members in packing.passes(lengths, cfg.micro_batch_tokens):
        end, part = max(lengths[i] for i in members), [rows[i] for i in members]
        ids, mask = tokens[part, :end].to(models.device), action_mask[part, : end - 1].to(models.device)
        for logprobs, model in zip(found, (models.policy, models.reference), strict=True):
            logprobs[members, : end - 1] = action_logprobs(model, ids, mask, cfg.temperature, cfg.precision).cpu()
    return [row.clone() for row in found.unbind(1)]  # a view is gathered with all that it is a view of


def advantages(cfg: GRPOConfig, scores: Tensor, kl: Tensor) -> Tensor:
    """3: each answer's advantage in its group, (B,), of whitened scores (B,) and the answers' KL (B,)."""
    if cfg.advantage == "grpo":
        return losses.group_whitened(scores.view(-1, cfg.group_size)).flatten()
    return losses.leave_one_out((scores - cfg.beta * kl).view(-1, cfg.group_size)).flatten()


def update(
    cfg: GRPOConfig, models: Models, optimizer: torch.optim.Optimizer, rollout: Rollout, iteration: int, n_steps: int
) -> dict[str, float]:
    """4: one gradient step a mini-batch; the iteration's numbers, averaged over mini-batches."""
    began = time.perf_counter()
    steps: list[dict[str, float]] = []
    shuffled = cfg.inner_epochs, (cfg.seed, iteration), parallel.data_size()
    mini_batches = loader.steps_of_epochs(len(rollout.tokens), cfg.mini_batch_size, *shuffled)
    for members in mini_batches:
        numbers = accumulate(cfg, models, rollout, members.tolist())
        norm, _ = optim.clip_and_step([models.policy], optimizer, cfg.optim, iteration, n_steps)
        steps.append(numbers | {"grad_norm": norm})
    averages = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    return averages | {"seconds_update": time.perf_counter() - began}


def accumulate(cfg: GRPOConfig, models: Models, rollout: Rollout, members: list[int]) -> dict[str, float]:
    """Back-propagate one mini-batch, however its answers are cut into passes; its losses and how far it has moved."""
    share = parallel.share(len(members))
    average = cfg.average or AVERAGE[cfg.advantage]
    mine, weights = members[share], losses.token_weights(rollout.action_mask[members], average)[share]
    lengths = packing.acted_lengths(rollout.action_mask[mine])
    seen: list[dict[str, Tensor]] = []
    for part in packing.passes(lengths, cfg.micro_batch_tokens):
        rows, end = [mine[i] for i in part], max(lengths[i] for i in part)
        tokens, advantage = rollout.tokens[rows, :end].to(models.device), rollout.advantages[rows].to(models.device)
        weight = weights[part, : end - 1].to(models.device)
        mask, old, reference = (
            field[rows, : end - 1].to(models.device)
            for field in (rollout.action_mask, rollout.logprobs, rollout.reference_logprobs)
        )
        logprobs = action_logprobs(models.policy, tokens, mask, cfg.temperature, cfg.precision)
        policy_loss = (losses.policy_loss(logprobs, old, advantage[:, None], cfg.clip) * weight).sum()
        kl_loss = (losses.kl_k3(logprobs, reference) * weight).sum()
        parallel.backward(policy_loss + cfg.beta * kl_loss if cfg.advantage == "grpo" else policy_loss)
        with torch.no_grad():
            moved = losses.ratio_stats(logprobs, old, weight, cfg.clip)
        seen.append(moved | {"policy_loss": policy_loss.detach(), "kl_loss": kl_loss.detach()})
    return parallel.totals(seen)


def measure(
    cfg: GRPOConfig, models: Models, held_out: Sequence[Prompt], iteration: int, best: Best, folder: Path
) -> Best:
    """Score the policy on held-out prompts, keep their answers for later judges, and save the policy if it is best."""
    _, completions, scores = sample(cfg, models, held_out, 1, cfg.seed)
    save_answers(held_out, completions, scores["reward"], folder / f"held_out/{iteration:04d}.jsonl")
    reward = mean_score(losses.logit(scores["reward"]), completions, cfg.missing_eos_penalty)
    if not reward > best.reward:  # so that what is not a number is never the best
        return best
    save_policy(models.policy, models.tokenizer, folder, iteration, {"stage": cfg.advantage, "parent": str(cfg.init)})
    return Best(iteration, reward)

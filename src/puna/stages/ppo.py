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
it has not improved for a while. Signs of an exploited reward model are said in words (puna/monitors.py).

Where the paper is silent: the critic is a separate model that starts from the helpfulness reward model; KL is counted
per token (k1) and the score once, at the last token, so that with gamma 1 their sum is the paper's R; whitening takes
the batch's mean and deviation; lambda 0.95; pi_0 is the policy that PPO starts from. Each choice is a field.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from puna import checkpoint, config, losses, monitors, optim, parallel
from puna.checkpoint import Saver
from puna.config import ConfigError
from puna.data import loader, packing, prompts, rollouts
from puna.data.prompts import Prompt
from puna.data.rollouts import Record
from puna.data.shards import Shard
from puna.generate import actor_critic
from puna.generate.actor_critic import Critic, Models, Sampled
from puna.generate.held_out import Best, mean_score, publish, save_answers, save_policy
from puna.generate.vllm import VLLMEngine
from puna.losses import Moments
from puna.parallel import Placement
from puna.run_folder import Metrics, Progress, RunFolder, read_metrics
from puna.text.tokenizer import Tokenizer
from puna.types import Rollout


@dataclass(frozen=True)
class PPOConfig:
    """`puna ppo`: a chat model, two reward models and prompts in, a better chat model out."""

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
    held_out: tuple[Path, ...] = ()
    """prompt files for early stopping; empty draws `held_out_prompts` of `prompts`."""
    safety_held_out: tuple[Path, ...] = ()
    """more of them, all tagged."""
    format: str = "prompts"
    """how to read them (docs/guides/real-data.md lists the formats)."""
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
    """clipping of a value's change (ours: as the ratio's)."""
    beta: float = 0.01
    """KL weight (paper: 0.01 for 7B and 13B, 0.005 above)."""
    kl: Literal["token", "sequence"] = "token"
    """KL is subtracted from each token's reward, or in one sum from the score."""
    kl_target: float = 0.0
    """nats an answer that beta is adapted to hold (Ziegler et al. 2019); 0 keeps it fixed, as the paper."""
    kl_horizon: int = 10000
    """answers in which an adapted beta may grow or shrink by a fifth."""
    threshold: float = 0.15
    """where the safety score is below this, it is the reward in place of the helpfulness score (3.2.3)."""
    logit_scores: bool = True
    """undo the sigmoid before scores are whitened (paper 3.2.3)."""
    whiten: Literal["batch", "running", "none"] = "batch"
    """subtract the mean and divide by the deviation of the batch's scores, or of all batches' so far ("running")."""
    score_clip: float = 0.0
    """largest size of a whitened score; 0 clips none."""
    advantage_clip: float = 0.0
    """largest size of a whitened advantage; 0 clips none."""
    missing_eos_penalty: float = 1.0
    """subtracted from the whitened score of an answer that did not end."""
    gamma: float = 1.0
    """discount of rewards to come."""
    lam: float = 0.95
    """lambda of generalized advantage estimation."""
    critic: Critic = "reward"
    """what the value function starts from: "reward", the helpfulness reward model; "zero_head", a copy of the policy's
    body with a head of zeros; "shared", such a head on the policy's own body."""
    critic_warmup: int = 0
    """iterations that train the critic alone; patience is counted and beta adapted after them."""
    value_lr_scale: float = 1.0
    """the critic's learning rate over the policy's."""
    value_coefficient: float = 1.0
    """weight of the value loss, for a shared critic."""
    pretrain_data: Path | None = None
    """a token shard ("runs/x/pretrain/data/train") whose text is trained on as well (PPO-ptx, Ouyang et al. 2022)."""
    pretrain_coefficient: float = 0.0
    """weight of its next-token loss in each gradient step (PPO-ptx: 27.8)."""
    pretrain_windows: int = 32
    """windows of that text a gradient step."""
    pretrain_seq_len: int = 256
    """tokens a window."""
    temperature: float = 1.0
    """answers are drawn, and scored by the trainer, at this temperature."""
    max_new_tokens: int = 64
    """tokens of the longest answer; one that is cut off there is penalised."""
    max_prompt_tokens: int = 0
    """leave longer prompts out; 0 leaves out those alone that fill the model's context."""
    optim: optim.OptimConfig = field(
        default_factory=lambda: optim.OptimConfig(lr=1e-6, schedule="constant", warmup_steps=0)
    )
    """paper 3.2.3: constant 1e-6, weight decay 0.1, clip 1.0."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32 keeps the first ratio of an iteration at 1 to the last digits."""
    parallel: parallel.ParallelConfig = field(default_factory=parallel.ParallelConfig)
    sample_precision: Literal["fp32", "bf16"] = "fp32"
    """of the weights that sample; bf16 is faster, its probabilities agree with the trainer's to about two digits."""
    evaluate_every: int = 10
    """iterations between held-out measurements."""
    held_out_prompts: int = 64
    """prompts set aside of `prompts` for early stopping; fewer than there are."""
    patience: int = 4
    """stop after so many measurements without a new best; 0 never stops early."""
    gold: Path | None = None
    """a reward model that nothing is trained on: its mean score is written beside the reward, as a monitor."""
    stop_on_hacking: bool = False
    """stop at the first sign of an exploited reward model; otherwise it is said and written down."""
    dump: Path | None = None
    """a folder to write one iteration to, for `puna conformance`."""
    dump_iteration: int = 1
    """which one; at 0 the policy is the reference."""
    checkpoint_every: int = 10
    """iterations between checkpoints, and one after the last; 0 writes one on SIGTERM alone."""
    checkpoints_kept: int = 2
    """the newest ones; older ones are removed."""
    vllm: str = ""
    """the address of a vLLM server to sample on (puna.generate.vllm); empty samples in this process."""
    threads: int = 0
    """torch threads; 0 leaves torch's choice."""
    seed: int = 0

    def __post_init__(self) -> None:
        config.positive(self, "iterations", "batch_size", "mini_batch_size", "micro_batch_tokens", "evaluate_every")
        config.positive(self, "kl_horizon", "pretrain_windows", "pretrain_seq_len", "temperature")
        config.positive(self, "inner_epochs", "held_out_prompts", "checkpoints_kept")
        config.positive(self, "clip", "value_clip", "max_new_tokens")
        config.within(self, 0, 1, "threshold", "gamma", "lam")
        config.within(self, 0, math.inf, "beta", "score_clip", "advantage_clip", "patience", "pretrain_coefficient")
        if self.kl_target < 0 or (self.kl_target and self.kl_horizon < self.batch_size):
            raise ConfigError(
                f"kl_target is {self.kl_target}, kl_horizon {self.kl_horizon}: a target is positive, its "
                f"horizon at least batch_size ({self.batch_size}), or beta would turn negative"
            )
        if self.dump and not 0 <= self.dump_iteration < self.iterations:
            raise ConfigError(
                f"dump_iteration is {self.dump_iteration} of {self.iterations} iterations, counted from 0"
            )
        if (self.pretrain_data is None) != (self.pretrain_coefficient == 0):
            raise ConfigError("pretrain_data and pretrain_coefficient go together: give both or neither")


@dataclass(frozen=True)
class State:
    """What a run remembers beside weights; each checkpoint holds it."""

    beta: float
    moments: Moments = losses.NO_MOMENTS
    best_iteration: int = 0
    best_reward: float = -math.inf


class Targets(NamedTuple):
    """What the losses of a rollout aim at, (B, T - 1) each."""

    advantages: Tensor
    returns: Tensor


def run(cfg: PPOConfig) -> Path:
    """Train and return the best policy's folder."""
    device = parallel.start(cfg.threads, cfg.parallel)
    with RunFolder(cfg.out) as folder:
        model_path = folder.path / "model"
        config.keep(cfg, folder.path / "config.json")
        if folder.done("ppo"):
            return model_path
        models = load(cfg, device)
        asked, held_out, left_out = read(cfg, models.tokenizer, models.engine.context)
        text = actor_critic.read_text(cfg.pretrain_data, models, cfg.pretrain_seq_len) if cfg.pretrain_data else None
        scaled = optim.groups(models.value, cfg.optim, cfg.value_lr_scale)
        optimizer = optim.adamw(cfg.optim, optim.groups(models.policy, cfg.optim), scaled)
        size = min(cfg.batch_size, len(asked))
        epochs = math.ceil(cfg.iterations / (len(asked) // size))
        batches = loader.steps_of_epochs(len(asked), size, epochs, cfg.seed, multiple=size)[: cfg.iterations]
        start, extra = checkpoint.resume(folder.path / "checkpoints", models.trained, optimizer)
        state = State(**extra | {"moments": Moments(**extra["moments"])}) if extra else State(cfg.beta)
        metrics = Metrics(folder.path / "metrics.jsonl", resume_step=start - 1, stage="ppo")
        parallel.barrier()  # all ranks know the same lines, or they might not stop together
        history = read_metrics(metrics.path) if start else []
        progress = Progress("ppo", len(batches), unit="iteration", start=start)
        often = cfg.checkpoint_every, cfg.checkpoints_kept, len(batches)
        with Saver(folder.path / "checkpoints", models.trained, optimizer, *often) as saver:
            for iteration in range(start, len(batches)):
                if cfg.stop_on_hacking and monitors.signs(history):
                    break
                if iteration % cfg.evaluate_every == 0:
                    state = measure(cfg, models, held_out, iteration, state, folder.path)
                    since = iteration - max(state.best_iteration, cfg.critic_warmup)
                    if cfg.patience and since >= cfg.patience * cfg.evaluate_every:
                        break
                record = rollouts.Recorder() if cfg.dump and iteration == cfg.dump_iteration else rollouts.ignore
                began = time.perf_counter()
                batch = [asked[i] for i in batches[iteration]]
                rollout, numbers, moments = collect(cfg, models, batch, iteration, state.moments, record)
                numbers |= update(cfg, models, optimizer, rollout, state.beta, iteration, len(batches), record, text)
                rate = numbers["tokens_per_second"] = int(rollout.action_mask.sum()) / (time.perf_counter() - began)
                target = cfg.kl_target if iteration >= cfg.critic_warmup else 0.0
                beta = losses.adaptive_kl_beta(state.beta, numbers["kl"], target, cfg.kl_horizon, size)
                state = replace(state, beta=beta, moments=moments)
                if cfg.dump and isinstance(record, rollouts.Recorder):
                    facts = {"iteration": iteration, "beta": numbers["beta"], "beta_after": beta}
                    record.write(cfg.dump, cfg, models.tokenizer, **facts)
                history.append(numbers)
                for sentence in monitors.new_signs(history):
                    progress.warn(sentence)
                metrics.log(step=iteration, **numbers, warnings=" ".join(monitors.signs(history).values()))
                progress.update(reward=numbers["reward"], kl=numbers["kl"], tokens_per_second=rate)
                saver.after(iteration + 1, asdict(state))
            else:
                if not (cfg.stop_on_hacking and monitors.signs(history)):
                    state = measure(cfg, models, held_out, len(batches), state, folder.path)
        progress.close()
        publish(folder, "ppo", Best(state.best_iteration, state.best_reward), left_out=left_out)
        return model_path


def read(cfg: PPOConfig, tokenizer: Tokenizer, context: int) -> tuple[list[Prompt], list[Prompt], int]:
    """The prompts to train on, the held-out ones, and how many were too long for either."""
    every = prompts.read_prompts(cfg.prompts, cfg.format, cfg.safety_prompts)
    fit = prompts.fitting(every, tokenizer, context, cfg.max_prompt_tokens)
    left_out = len(every) - len(fit)
    if not (cfg.held_out or cfg.safety_held_out):
        return *prompts.apart(fit, cfg.held_out_prompts, cfg.seed), left_out
    every = prompts.read_prompts(cfg.held_out, cfg.format, cfg.safety_held_out)
    held_out = prompts.fitting(every, tokenizer, context, cfg.max_prompt_tokens)
    left_out += len(every) - len(held_out)
    order = np.random.default_rng(cfg.seed).permutation(len(held_out))
    return fit, [held_out[i] for i in order[: cfg.held_out_prompts]], left_out


def load(cfg: PPOConfig, device: torch.device) -> Models:
    """Policy and reference from `init`, the critic that is asked for, all reward models frozen."""
    if cfg.dump and parallel.world_size() > 1:
        raise ConfigError("a dump is of one process: leave `dump` out, or start without torchrun")
    rewards = cfg.reward_helpfulness, cfg.reward_safety, cfg.gold
    models = actor_critic.load(cfg.init, rewards, cfg.critic, Placement(device, cfg.parallel, cfg.precision))
    if cfg.vllm:
        dtype = torch.bfloat16 if cfg.sample_precision == "bf16" else None
        return replace(models, engine=VLLMEngine(cfg.vllm, models.tokenizer, cfg.out / "sampled_with", dtype))
    return models


def sample(cfg: PPOConfig, models: Models, asked: Sequence[Prompt], seed: int) -> Sampled:
    """1 and 2: one answer of the policy to each prompt, and its scores."""
    settings = cfg.max_new_tokens, cfg.temperature, cfg.threshold, cfg.sample_precision
    return actor_critic.sample(models, asked, seed, *settings)


def collect(
    cfg: PPOConfig,
    models: Models,
    asked: Sequence[Prompt],
    iteration: int,
    moments: Moments = losses.NO_MOMENTS,
    record: Record = rollouts.ignore,
) -> tuple[Rollout, dict[str, float], Moments]:
    """1 to 3: a rollout with everything the update needs, the iteration's numbers, and the scores' moments."""
    began = time.perf_counter()
    prompt_ids, completions, scores, seconds = sample(cfg, models, asked, cfg.seed + 1 + iteration)
    answers = [completion.tokens for completion in completions]
    tokens, _, action_mask = packing.pad_answers(prompt_ids, answers, models.tokenizer.pad_id)
    finished = torch.tensor([completion.finished for completion in completions])
    clipped, moments = whitened_scores(cfg, scores["reward"], moments)
    read = actor_critic.logprobs_and_values(
        models, tokens, action_mask, cfg.temperature, cfg.micro_batch_tokens, record
    )
    actor_critic.record_unpadded(models, tokens, action_mask, cfg.temperature, record)
    rollout = Rollout(tokens, action_mask, *read, clipped - cfg.missing_eos_penalty * ~finished, finished)
    record(**rollout._asdict(), combined=scores["reward"], helpfulness=scores["helpfulness"], bounded=clipped)
    if record is not rollouts.ignore:
        sampled, drawn_at = itertools.chain(*answers), itertools.chain(*(c.logprobs for c in completions))
        record(sampled=torch.tensor(list(sampled)), sampled_logprobs=torch.tensor(list(drawn_at)))
    kl = losses.sequence_kl(rollout.logprobs, rollout.reference_logprobs, action_mask)
    numbers = {name: float(score.mean()) for name, score in scores.items()}
    numbers |= {
        "kl": float(kl.mean()),
        "length": float(action_mask.sum(dim=1).float().mean()),
        "repetition": statistics.fmean(map(monitors.repeated_share, answers)),
        "finished": float(finished.float().mean()),
        "seconds_generate": seconds,
        "seconds_score": time.perf_counter() - began - seconds,
    }
    return rollout, numbers, moments


def whitened_scores(cfg: PPOConfig, rewards: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    """2: the combined rewards (B,) as PPO sees them, before any penalty, and the moments with theirs."""
    scores = raw_scores(cfg, rewards)
    moments = moments.with_batch(scores)
    if cfg.whiten != "none":
        scores = losses.whiten(scores) if cfg.whiten == "batch" else moments.whiten(scores)
    return losses.clip(scores, cfg.score_clip), moments


def raw_scores(cfg: PPOConfig, scores: Tensor) -> Tensor:
    """Scores (B,) in the space in which they are whitened."""
    return losses.logit(scores) if cfg.logit_scores else scores


def advantages_and_returns(cfg: PPOConfig, rollout: Rollout, beta: float, record: Record = rollouts.ignore) -> Targets:
    """3: rewards with the KL weight `beta`, GAE, and its advantages whitened over the batch."""
    scores, policies = rollout.scores, (rollout.logprobs, rollout.reference_logprobs, rollout.action_mask)
    if cfg.kl == "sequence":
        scores, beta = scores - beta * losses.sequence_kl(*policies), 0.0
    rewards = losses.token_rewards(scores, *policies, beta)
    raw, returns = losses.generalized_advantages(rewards, rollout.values, rollout.action_mask, cfg.gamma, cfg.lam)
    advantages = losses.clip(losses.whiten(raw, rollout.action_mask), cfg.advantage_clip)
    record(rewards=rewards, raw_advantages=raw, returns=returns, advantages=advantages)
    return Targets(advantages, returns)


def update(
    cfg: PPOConfig,
    models: Models,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    beta: float,
    iteration: int,
    n_steps: int,
    record: Record = rollouts.ignore,
    text: Shard | None = None,
) -> dict[str, float]:
    """3 and 4: advantages, then one gradient step a mini-batch; the iteration's numbers, averaged over mini-batches."""
    began = time.perf_counter()
    targets = advantages_and_returns(cfg, rollout, beta, record)
    record(policy_weights=models.policy.norm.weight[None], critic_weights=models.value.score.weight)
    steps: list[dict[str, float]] = []
    shuffled = cfg.inner_epochs, (cfg.seed, iteration), parallel.data_size()
    mini_batches = loader.steps_of_epochs(len(rollout.tokens), cfg.mini_batch_size, *shuffled)
    for place, members in enumerate(mini_batches, start=iteration * len(mini_batches)):
        numbers = accumulate(cfg, models, rollout, targets, members.tolist(), record)
        record(**{f"update_{name}": torch.tensor([number]) for name, number in numbers.items()})
        if iteration < cfg.critic_warmup:
            models.policy.zero_grad(set_to_none=True)
        elif text is not None:
            windows = loader.windows(text, cfg.pretrain_seq_len, cfg.pretrain_windows, place, cfg.seed)
            weighted = cfg.pretrain_coefficient, cfg.micro_batch_tokens
            numbers["pretrain_loss"] = actor_critic.accumulate_text(models, *windows, *weighted)
        norm, _ = optim.clip_and_step([models.policy, models.value], optimizer, cfg.optim, iteration, n_steps)
        steps.append(numbers | {"grad_norm": norm})
    record(policy_weights=models.policy.norm.weight[None], critic_weights=models.value.score.weight)
    averages = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    returns = targets.returns[rollout.action_mask]
    residual = (returns - rollout.values[rollout.action_mask]).var() / returns.var()
    averages |= {"explained_variance": 1 - float(residual), "beta": beta}
    return averages | {"seconds_update": time.perf_counter() - began}


def accumulate(
    cfg: PPOConfig,
    models: Models,
    rollout: Rollout,
    targets: Targets,
    members: list[int],
    record: Record = rollouts.ignore,
) -> dict[str, float]:
    """Back-propagate one mini-batch: both losses, summed over its action tokens and divided by their number."""
    count = int(rollout.action_mask[members].sum())
    mine = members[parallel.share(len(members))]
    lengths = packing.acted_lengths(rollout.action_mask[mine])
    seen: list[dict[str, Tensor]] = []
    for part in packing.passes(lengths, cfg.micro_batch_tokens):
        rows, end = [mine[i] for i in part], max(lengths[i] for i in part)
        tokens = rollout.tokens[rows, :end].to(models.device)
        mask, old, old_values, advantage, target = (
            field[rows, : end - 1].to(models.device)
            for field in (rollout.action_mask, rollout.logprobs, rollout.values, *targets)
        )
        logits, values = actor_critic.forward(models, tokens, mask)
        of_actions, entropies = losses.logprobs_and_entropy(logits, tokens[:, 1:][mask], cfg.temperature)
        logprobs = actor_critic.scatter(of_actions, mask)
        policy_loss = (losses.policy_loss(logprobs, old, advantage, cfg.clip) * mask).sum() / count
        value_loss = (losses.value_loss(values, old_values, target, cfg.value_clip) * mask).sum() / count
        parallel.backward(policy_loss + cfg.value_coefficient * value_loss)
        with torch.no_grad():
            moved = losses.ratio_stats(logprobs, old, mask, cfg.clip) | {"entropy": entropies.sum()}
        losses_ = {"policy_loss": policy_loss.detach(), "value_loss": value_loss.detach()}
        seen.append(losses_ | {name: x / count for name, x in moved.items()})
        if record is not rollouts.ignore:
            record(pass_at=rollouts.places(rows, mask), pass_size=mask.sum()[None], pass_values=values[mask])
            record(pass_logprobs=of_actions, pass_entropies=entropies)
    record(update_size=torch.tensor([count]))
    return parallel.totals(seen)


def measure(
    cfg: PPOConfig, models: Models, held_out: Sequence[Prompt], iteration: int, state: State, folder: Path
) -> State:
    """Score the policy on held-out prompts, keep their answers for later judges, and save the policy if it is best."""
    _, completions, scores, _ = sample(cfg, models, held_out, cfg.seed)
    save_answers(held_out, completions, scores["reward"], folder / f"held_out/{iteration:04d}.jsonl")
    reward = mean_score(raw_scores(cfg, scores["reward"]), completions, cfg.missing_eos_penalty)
    if not reward > state.best_reward:  # so that what is not a number is never the best
        return state
    save_policy(models.policy, models.tokenizer, folder, iteration, {"stage": "ppo", "parent": str(cfg.init)})
    return replace(state, best_iteration=iteration, best_reward=reward)

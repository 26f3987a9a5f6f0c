"""PPO's models: the policy, its critic and the frozen ones they are measured against; their passes over answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna import losses, parallel
from puna.config import ConfigError
from puna.data import packing, rollouts, shards
from puna.data.prompts import Prompt
from puna.data.rollouts import Record
from puna.data.shards import Shard
from puna.formats import huggingface
from puna.generate.engine import LocalEngine
from puna.generate.scoring import Judges, Scorer
from puna.generate.vllm import VLLMEngine
from puna.generate.weights import pack, whole
from puna.model.reward import RewardModel, ValueHead
from puna.model.transformer import Transformer
from puna.parallel import Placement
from puna.text import chat
from puna.text.tokenizer import Tokenizer
from puna.types import Completion, Engine

Critic = Literal["reward", "zero_head", "shared"]
"""A model that starts from the helpfulness reward model; one from the policy's body under a head of zeros; or such a
head on the policy itself."""


@dataclass(frozen=True)
class Models:
    """What PPO trains (policy and critic), what it is measured against, and the engine that samples from the policy."""

    policy: Transformer
    value: RewardModel | ValueHead
    reference: Transformer
    helpfulness: Scorer
    safety: Scorer
    engine: Engine
    tokenizer: Tokenizer
    device: torch.device
    precision: str = "fp32"
    gold: Scorer | None = None
    """a reward model that nothing is trained on."""

    @property
    def trained(self) -> nn.ModuleDict:
        """What the checkpoint holds."""
        return nn.ModuleDict({"policy": self.policy, "value": self.value})


def load(init: Path, rewards: tuple[Path, Path, Path | None], kind: Critic, placement: Placement) -> Models:
    """Policy and reference at `init`, the critic, and the frozen reward models: helpfulness, safety, perhaps gold.

    ConfigError where a reward model cannot read what the policy writes, or
    several processes are to share a critic that shares the policy's body.
    """
    tokenizer = huggingface.load_tokenizer(init)
    helpfulness, safety, gold = (scorer(path, init, tokenizer, placement) if path else None for path in rewards)
    assert helpfulness and safety
    policy = parallel.place(*huggingface.open_model(init), placement)
    return Models(
        policy=policy,
        value=critic(kind, init, rewards[0], placement),
        reference=parallel.place(*huggingface.open_model(init), placement).eval().requires_grad_(False),
        helpfulness=helpfulness,
        safety=safety,
        engine=LocalEngine(policy, tokenizer),
        tokenizer=tokenizer,
        device=placement.device,
        precision=placement.precision,
        gold=gold,
    )


def scorer(path: Path, init: Path, tokenizer: Tokenizer, placement: Placement) -> Scorer:
    """A frozen reward model that judges the policy at `init`.

    ConfigError where it cannot read what the policy writes.
    """
    huggingface.check_alike(path, tokenizer, huggingface.read_config(init).max_seq_len)
    model = parallel.place(*huggingface.open_reward_model(path), placement).requires_grad_(False)
    return Scorer(model, tokenizer, precision=placement.precision)


def critic(kind: Critic, init: Path, reward: Path, placement: Placement) -> RewardModel | ValueHead:
    """The value function that a policy at `init` begins with. ConfigError where several processes are to share one."""
    if kind == "reward":
        return parallel.place(*huggingface.open_reward_model(reward), placement)
    dim = huggingface.read_config(init).dim
    if kind == "zero_head":
        return parallel.place(*huggingface.open_body(init, torch.zeros(1, dim)), placement)
    if parallel.world_size() > 1:
        raise ConfigError("critic 'shared' runs on one process: use another, or start without torchrun")
    return ValueHead(dim).to(placement.device)


# Answers and their scores ---------------------------------------------------------------------------------------------


class Sampled(NamedTuple):
    """Answers to B prompts and what the reward models say of them."""

    prompt_ids: list[list[int]]
    completions: list[Completion]
    scores: dict[str, Tensor]  # helpfulness, safety, reward (both combined) and, where there is one, gold: (B,) each
    seconds: float  # spent on sampling


def sample(
    models: Models,
    prompts: Sequence[Prompt],
    seed: int,
    max_new_tokens: int,
    temperature: float,
    threshold: float,
    precision: str,
) -> Sampled:
    """One answer of the policy to each prompt, from the whole distribution, and its scores.

    `precision` ("fp32", "bf16") is that of the weights that a LocalEngine samples with.
    """
    served = isinstance(models.engine, VLLMEngine)  # which takes a sharded policy without gathering it here
    models.engine.update_weights(models.policy if served else sampler(models.policy, precision, models.device))
    began = time.perf_counter()
    prompt_ids = [chat.encode_prompt(prompt["messages"], models.tokenizer) for prompt in prompts]
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    completions = [answers[0] for answers in draw(models.engine, models.policy, prompt_ids, **settings)]
    seconds = time.perf_counter() - began
    rows = [ids + completion.tokens for ids, completion in zip(prompt_ids, completions, strict=True)]
    judges = Judges(models.helpfulness, models.safety, threshold)
    scores = judges.scores(rows, [prompt["is_safety"] for prompt in prompts])
    if models.gold:
        scores["gold"] = models.gold.score_tokens(rows)
    return Sampled(prompt_ids, completions, scores, seconds)


def sampler(policy: Transformer, precision: str, device: torch.device) -> Transformer:
    """What the engine samples with: the policy's own weights, or a copy of them in bfloat16 (positions stay exact)."""
    is_bf16 = parallel.dtype(precision, device) == torch.bfloat16
    return pack(whole(policy, torch.bfloat16 if is_bf16 else None), "bf16" if is_bf16 else "fp32")


def draw(
    engine: Engine, policy: Transformer, prompts: Sequence[list[int]], *, n: int = 1, **settings: Any
) -> list[list[Completion]]:
    """n answers to each prompt of ids by an engine that has the policy's weights; every rank draws its share.

    The weights that were gathered or copied for it are let go before training goes on (paper 3.2.3).
    """

    def answer(first: int, part: Sequence[list[int]]) -> list[list[Completion]]:
        return engine.generate_ids(part, n=n, first=first, **settings)

    answers = parallel.spread(answer, prompts, everyone=True)
    if isinstance(engine, LocalEngine):
        engine.model = policy  # with which nothing is sampled before the next `update_weights`
    return answers


# Passes over rollouts -------------------------------------------------------------------------------------------------


def forward(models: Models, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The policy's logits of the N actions (N, V), and the critic's value before each emitted token (B, T - 1) float32.

    tokens (B, T), mask (B, T - 1). A critic that shares the policy's body costs no pass of its own.
    """
    if isinstance(models.value, ValueHead):
        with parallel.autocast(models.precision, tokens.device):
            hidden = models.policy.hidden(tokens)  # (B, T, D)
            return models.policy.output(hidden[F.pad(mask, (0, 1))]), models.value(hidden)[:, :-1]
    logits = action_logits(models.policy, tokens, mask, models.precision)
    with parallel.autocast(models.precision, tokens.device):
        return logits, models.value.values(tokens)[:, :-1].float()


def action_logits(model: Transformer, tokens: Tensor, mask: Tensor, precision: str = "fp32") -> Tensor:
    """A model's logits of the N actions, (N, V); tokens (B, T), mask (B, T - 1).

    A prompt's logits, of a large vocabulary, are never made.
    """
    with parallel.autocast(precision, tokens.device):
        return model(tokens, only=F.pad(mask, (0, 1)))  # type: ignore[no-any-return]


def scatter(x: Tensor, mask: Tensor) -> Tensor:
    """N numbers at their places among (B, T - 1), 0 elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, x)


def action_logprobs(model: Transformer, tokens: Tensor, mask: Tensor, temperature: float, precision: str) -> Tensor:
    """log pi of every action at its place, (B, T - 1), with its gradient; tokens (B, T), mask (B, T - 1)."""
    logits = action_logits(model, tokens, mask, precision)
    return scatter(losses.token_logprobs(logits, tokens[:, 1:][mask], temperature), mask)


def logprobs_and_values(
    models: Models, tokens: Tensor, mask: Tensor, temperature: float, max_tokens: int, record: Record
) -> tuple[Tensor, Tensor, Tensor]:
    """Before any training: log pi and log pi_0 of every action, and the values, (B, T - 1) each, on the CPU.

    tokens (B, T), mask (B, T - 1). log pi is at the sampling temperature; what is no action has 0. All ranks have the
    same rows; each reads its share.
    """

    def read(first: int, rows: Sequence[int]) -> Sequence[Tensor]:
        part = list(rows)
        read = _logprobs_and_values(models, tokens[part], mask[part], temperature, max_tokens, record)
        return [row.clone() for row in read.unbind(1)]  # a view is gathered with all that it is a view of

    logprobs, reference, values = torch.stack(parallel.spread(read, range(len(tokens))), dim=1)
    return logprobs, reference, values


@torch.no_grad()  # not inference_mode: what a sharded model gathers in it could not be trained with again
def _logprobs_and_values(
    models: Models, tokens: Tensor, mask: Tensor, temperature: float, max_tokens: int, record: Record
) -> Tensor:
    """What `logprobs_and_values` finds of this rank's rows, (3, B, T - 1)."""
    lengths = packing.acted_lengths(mask)
    logprobs, reference, values = (torch.zeros(mask.shape) for _ in range(3))
    for members in packing.passes(lengths, max_tokens):
        end = max(lengths[i] for i in members)
        part, acted = tokens[members, :end].to(models.device), mask[members, : end - 1].to(models.device)
        logits, value = forward(models, part, acted)
        of_reference = action_logits(models.reference, part, acted, models.precision)
        for out, x in ((logprobs, logits), (reference, of_reference)):
            of_actions = losses.token_logprobs(x, part[:, 1:][acted], temperature)
            out[members, : end - 1] = scatter(of_actions, acted).cpu()
        values[members, : end - 1] = value.cpu()
        if record is not rollouts.ignore:
            record(logits=logits[: rollouts.SHOWN], logits_at=rollouts.places(members, acted)[: rollouts.SHOWN])
    return torch.stack((logprobs, reference, values))


@torch.no_grad()  # not inference_mode: what a sharded model gathers in it could not be trained with again
def record_unpadded(models: Models, tokens: Tensor, mask: Tensor, temperature: float, record: Record) -> None:
    """Record what a dump is checked against: a few rows read without pads, and the reward model's score of each state.

    tokens (B, T), mask (B, T - 1).
    """
    if record is rollouts.ignore:
        return
    for row, length in enumerate(packing.acted_lengths(mask)[: rollouts.ALONE]):
        part = tokens[row : row + 1, :length].to(models.device)
        acted = mask[row : row + 1, : length - 1].to(models.device)
        logits = action_logits(models.policy, part, acted, models.precision)
        with parallel.autocast(models.precision, part.device):
            scores = models.helpfulness.model.values(part)  # (1, T)
        record(alone_at=rollouts.places([row], acted), alone_rewards=scores[:, :-1][acted], alone_score=scores[:, -1])
        record(alone_logprobs=losses.token_logprobs(logits, part[:, 1:][acted], temperature))


def read_text(path: Path, models: Models, seq_len: int) -> Shard:
    """The token shard of PPO-ptx. ConfigError where it, or the model's context, is shorter than a window."""
    text, context = shards.read_sound(path, models.tokenizer), models.policy.config.max_seq_len
    if seq_len > min(context, len(text.tokens) - 1):
        raise ConfigError(
            f"pretrain_seq_len is {seq_len}: {path} has {len(text.tokens)} tokens, the model's context {context}"
        )
    return text


def accumulate_text(models: Models, inputs: Tensor, targets: Tensor, coefficient: float, max_tokens: int) -> float:
    """Back-propagate the policy's weighted next-token loss on windows of text (B, T); the loss in nats a token."""
    rows, mine = max(1, max_tokens // inputs.shape[1]), parallel.share(len(inputs))
    total = torch.zeros((), device=models.device)
    for x, y in zip(torch.split(inputs[mine], rows), torch.split(targets[mine], rows), strict=True):
        x, y = x.to(models.device), y.to(models.device)
        with parallel.autocast(models.precision, models.device):
            loss = models.policy(x, targets=y) / inputs.numel()
        parallel.backward(coefficient * loss)
        total += loss.detach()
    return float(parallel.total(total))

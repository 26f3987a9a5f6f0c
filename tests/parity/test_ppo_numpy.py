"""PPO's equations against NumPy in float64, and one whole iteration against a straightforward one written here.

Nothing of puna.losses, puna.optim or the stage is used on the expecting side: only the model's modules.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from puna import losses, optim
from puna.model.reward import RewardModel
from puna.model.transformer import Transformer
from puna.stages import ppo
from puna.stages.ppo import PPOConfig
from tests import helpers

Array = npt.NDArray[np.float64]

B, T = 5, 9


def drawn(seed: int) -> tuple[dict[str, Array], npt.NDArray[np.bool_]]:
    """Random numbers (B, T) by name and a mask with holes, some of every row counted."""
    rng = np.random.default_rng(seed)
    names = ("logprobs", "reference", "values", "new_values", "returns", "advantages", "rewards")
    mask = rng.random((B, T)) < 0.6
    mask[:, 4] = True
    return {name: rng.normal(size=(B, T)) for name in names}, mask


def tensors(*arrays: Any) -> list[Tensor]:
    return [torch.from_numpy(np.asarray(x)) for x in arrays]


def same(actual: Tensor, expected: Any) -> None:
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-10)


def whitened(x: Array) -> Array:
    return np.asarray((x - x.mean()) / np.sqrt(x.var() + 1e-8))


@pytest.mark.parametrize("seed", range(3))
def test_token_rewards_and_whitening(seed: int) -> None:
    x, mask = drawn(seed)
    scores = np.random.default_rng(seed).normal(size=B)
    actual = losses.token_rewards(*tensors(scores, x["logprobs"], x["reference"], mask), beta=0.3)
    expected = np.zeros((B, T))
    for row in range(B):
        where = mask[row].nonzero()[0]
        expected[row, where] = -0.3 * (x["logprobs"] - x["reference"])[row, where]
        expected[row, where[-1]] += scores[row]
    same(actual, expected)
    kl = losses.sequence_kl(*tensors(x["logprobs"], x["reference"], mask))
    same(kl, [(x["logprobs"] - x["reference"])[row][mask[row]].sum() for row in range(B)])
    same(losses.whiten(*tensors(x["values"], mask))[torch.from_numpy(mask)], whitened(x["values"][mask]))
    batches = np.split(x["values"].ravel(), [7, 20])
    moments = losses.NO_MOMENTS
    for batch in batches:
        moments = moments.with_batch(torch.from_numpy(batch))
    assert moments.mean == pytest.approx(x["values"].mean()) and moments.variance == pytest.approx(x["values"].var())


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
def test_advantages(gamma: float, lam: float) -> None:
    x, mask = drawn(1)
    actual, returns = losses.generalized_advantages(*tensors(x["rewards"], x["values"], mask), gamma, lam)
    expected = np.zeros((B, T))
    for row in range(B):
        where = mask[row].nonzero()[0]
        r, v = x["rewards"][row, where], np.append(x["values"][row, where], 0)
        for i in range(len(where)):  # the sum of discounted one-step errors, term by term
            terms = [(gamma * lam) ** (j - i) * (r[j] + gamma * v[j + 1] - v[j]) for j in range(i, len(where))]
            expected[row, where[i]] = sum(terms)
    same(actual, expected)
    same(returns, np.where(mask, expected + x["values"], 0))


def test_clipped_losses() -> None:
    x, _ = drawn(2)
    old = x["logprobs"] - 0.3 * x["reference"]
    ratio = np.exp(x["logprobs"] - old)
    inside = np.abs(ratio - 1) <= 0.2
    assert 0 < inside.sum() < inside.size
    actual = losses.policy_loss(*tensors(x["logprobs"], old, x["advantages"]), clip=0.2)
    limit = np.where(x["advantages"] > 0, 1.2, 0.8)  # a good token may grow to 1.2, a bad one shrink to 0.8
    bound = np.where(x["advantages"] > 0, np.minimum(ratio, limit), np.maximum(ratio, limit))
    same(actual, -bound * x["advantages"])
    actual = losses.value_loss(*tensors(x["new_values"], x["values"], x["returns"]), clip=0.2)
    near = np.minimum(np.maximum(x["new_values"], x["values"] - 0.2), x["values"] + 0.2)
    same(actual, np.maximum((x["new_values"] - x["returns"]) ** 2, (near - x["returns"]) ** 2) / 2)


# One whole iteration


Answers = list[tuple[Tensor, Tensor]]
"""Of each the prompt and the answer (1, L), and where the actions are drawn from."""


@torch.no_grad()
def plain_scores(cfg: PPOConfig, judges: list[RewardModel], answers: Answers, tagged: list[bool], eos: int) -> Tensor:
    """What each answer's last token earns: the paper's piecewise reward through logit and whitening, less a penalty."""
    combined, penalties = [], []
    for (tokens, _), is_safety in zip(answers, tagged, strict=True):
        helpfulness, safety = (1 / (1 + math.exp(-float(judge.values(tokens)[0, -1]))) for judge in judges)
        combined.append(safety if is_safety or safety < cfg.threshold else helpfulness)
        penalties.append(0.0 if int(tokens[0, -1]) == eos else cfg.missing_eos_penalty)
    odds = np.log(np.array(combined)) - np.log1p(-np.array(combined))
    return torch.from_numpy(whitened(odds) - np.array(penalties)).float()


def plain_iteration(
    cfg: PPOConfig,
    policy: Transformer,
    critic: RewardModel,
    reference: Transformer,
    answers: Answers,
    scores: Tensor,
    orders: list[Any],
) -> None:
    """Trains policy and critic: answer by answer, no padding, no micro-batches, AdamW written out."""

    def logprobs(model: Transformer, i: int) -> Tensor:
        tokens, where = answers[i]
        return torch.log_softmax(model(tokens)[0, where] / cfg.temperature, -1)[range(len(where)), tokens[0, where + 1]]

    def values(i: int) -> Tensor:
        tokens, where = answers[i]
        return critic.values(tokens)[0, where]

    with torch.no_grad():
        old = [logprobs(policy, i) for i in range(len(answers))]
        old_values = [values(i) for i in range(len(answers))]
        targets, raw = [], []
        for i in range(len(answers)):
            rewards = -cfg.beta * (old[i] - logprobs(reference, i))
            rewards[-1] += scores[i]
            v, advantage, found = torch.cat((old_values[i], torch.zeros(1))), torch.zeros(()), []
            for t in reversed(range(len(rewards))):
                advantage = rewards[t] + cfg.gamma * v[t + 1] - v[t] + cfg.gamma * cfg.lam * advantage
                found.append(advantage)
            raw.append(torch.stack(found[::-1]))
            targets.append(raw[-1] + old_values[i])
        every = torch.cat(raw)
        advantages = [(x - every.mean()) / torch.sqrt(every.var(correction=0) + 1e-8) for x in raw]
    moments: dict[Tensor, tuple[Tensor, Tensor]] = {}
    step = 0
    for order in orders:
        for members in np.array_split(order, math.ceil(len(order) / cfg.mini_batch_size)):  # of like size
            step += 1
            policy_terms, value_terms = [], []
            for i in members:
                ratio, value = torch.exp(logprobs(policy, i) - old[i]), values(i)
                clipped = torch.clamp(ratio, 1 - cfg.clip, 1 + cfg.clip)
                policy_terms.append(torch.maximum(-ratio * advantages[i], -clipped * advantages[i]))
                near = torch.clamp(value, old_values[i] - cfg.value_clip, old_values[i] + cfg.value_clip)
                value_terms.append(0.5 * torch.maximum((value - targets[i]) ** 2, (near - targets[i]) ** 2))
            (torch.cat(policy_terms).mean() + torch.cat(value_terms).mean()).backward()  # type: ignore[no-untyped-call]
            for model in (policy, critic):
                adam(cfg, model, moments, step)


@torch.no_grad()
def adam(cfg: PPOConfig, model: nn.Module, moments: dict[Tensor, tuple[Tensor, Tensor]], step: int) -> None:
    """One step with decoupled weight decay, of gradients cut to length `clip`."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    length = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in parameters))  # type: ignore[union-attr]
    b1, b2 = cfg.optim.betas
    for p in parameters:
        assert p.grad is not None
        grad = p.grad * min(1.0, cfg.optim.clip / (length + 1e-6))
        m, v = moments.get(p, (torch.zeros_like(p), torch.zeros_like(p)))
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        moments[p] = m, v
        p -= cfg.optim.lr * (cfg.optim.weight_decay if p.ndim > 1 else 0) * p
        p -= cfg.optim.lr * (m / (1 - b1**step)) / (torch.sqrt(v / (1 - b2**step)) + cfg.optim.eps)
        p.grad = None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_whole_iteration(temperature: float, tmp_path: Path) -> None:
    """From the drawn tokens on: which of them are actions is all that is taken of the stage's rollout beside them."""
    changes = {
        "beta": 0.2,
        "inner_epochs": 2,
        "micro_batch_tokens": 100,
        "missing_eos_penalty": 0.7,
        "threshold": 0.5,
        "max_new_tokens": 4,
    }
    cfg = helpers.ppo_config(tmp_path, temperature=temperature, **changes)
    models = ppo.load(cfg, torch.device("cpu"))
    with torch.no_grad():
        for parameter in models.policy.layers.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    asked = helpers.prompts(10, seed=3)
    rollout, _, _ = ppo.collect(cfg, models, asked, 0)
    assert isinstance(models.value, RewardModel)
    answers = []
    for row in range(len(rollout.tokens)):
        where = rollout.action_mask[row].nonzero().flatten()
        answers.append((rollout.tokens[row : row + 1, : int(where[-1]) + 2], where))
    judges = [models.helpfulness.model, models.safety.model]
    tagged = [prompt["is_safety"] for prompt in asked]
    scores = plain_scores(cfg, judges, answers, tagged, models.tokenizer.eos_id)
    torch.testing.assert_close(rollout.scores, scores, rtol=0, atol=1e-5)
    safe = [float(judges[1].values(tokens)[0, -1].detach()) > 0 for tokens, _ in answers]
    assert 0 < sum(rollout.finished.tolist()) < 10, "some answers have no end"
    assert len({(is_safe, is_safety) for is_safe, is_safety in zip(safe, tagged, strict=True)}) > 2, (
        "all ways to a reward"
    )
    policy, critic = copy.deepcopy(models.policy), copy.deepcopy(models.value)
    before = copy.deepcopy(policy.state_dict())
    orders = [np.random.default_rng((cfg.seed, 3, epoch)).permutation(10).tolist() for epoch in range(2)]
    plain_iteration(cfg, policy, critic, models.reference, answers, scores, orders)
    groups = [optim.groups(model, cfg.optim) for model in (models.policy, models.value)]
    numbers = ppo.update(cfg, models, optim.adamw(cfg.optim, *groups), rollout, cfg.beta, 3, 5)
    assert 0 < numbers["clip_fraction"] < 1 and numbers["grad_norm"] > 1, "clipping plays its part"
    for expected, actual in ((policy, models.policy), (critic, models.value)):
        weights = actual.state_dict()
        for name, x in expected.state_dict().items():
            torch.testing.assert_close(weights[name], x, rtol=0, atol=1e-5, msg=name)
    assert max(float((x - before[name]).abs().max()) for name, x in policy.state_dict().items()) > 1e-3

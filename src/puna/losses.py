"""The equations, as pure functions of tensors: language model, ranking, safety, KL, GAE, PPO, groups, DPO, the reward.

Shapes: N tokens, B sequences or pairs, T steps, V vocabulary. Every mask is True where an entry counts. Nothing here
knows a config, a model, a device or a process group: a caller whose batch is shared gives it the whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.types import Grade

MARGINS: dict[str, dict[Grade, float]] = {
    "none": {"significantly_better": 0.0, "better": 0.0, "slightly_better": 0.0, "negligibly_better": 0.0},
    "small": {"significantly_better": 1.0, "better": 2 / 3, "slightly_better": 1 / 3, "negligibly_better": 0.0},
    "large": {"significantly_better": 3.0, "better": 2.0, "slightly_better": 1.0, "negligibly_better": 0.0},
}
"""Paper A.3.3, Table 27: the margin each grade asks for."""


# Language model ------------------------------------------------------------------------------------------------------


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(target) under softmax(logits / temperature), in float32. logits (..., V), targets (...) -> (...).

    Raises IndexError (from torch) where a target is outside the vocabulary.
    """
    logits = logits.float() / temperature
    return -F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)


def logprobs_and_entropy(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and the entropy in nats of each token's distribution, (N,) each, from one softmax.

    logits (N, V), targets (N,). No gradient flows through the entropy. Raises RuntimeError (from torch) where a target
    is outside the vocabulary.
    """
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    logp = F.log_softmax(logits, dim=-1)  # (N, V)
    with torch.no_grad():
        entropies = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), entropies


def load_balancing_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """The auxiliary loss that balances experts, E sum_e f_e P_e, a scalar.

    It is k where the load is even, E where k experts take it all. probabilities (N, E) are the router's, chosen (N, k)
    the experts of each token. f_e is the share of tokens that choose expert e, P_e its mean probability: equation 4 of
    Switch Transformers (arXiv 2101.03961), as Mixtral counts it. The gradient flows through P alone.
    """
    n, experts = probabilities.shape
    f = chosen.flatten().bincount(minlength=experts) / n  # (E,)
    return experts * (f * probabilities.mean(0)).sum()


# Reward model (3.2.2) ------------------------------------------------------------------------------------------------


def ranking_loss(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected - m), each (B,) -> (B,). Paper equations 1 and 2 (m = 0)."""
    return -F.logsigmoid(chosen - rejected - margin)


def safety_auxiliary_loss(scores: Tensor, is_safe: Tensor) -> Tensor:
    """Cross-entropy of sigmoid(score) against the safety label, (B,) -> (B,).

    The paper (A.3.4, Table 29) names an auxiliary safety loss without its formula; this is the reading under which a
    score of 0.5 separates safe from unsafe, which is how it measures recall.
    """
    return F.binary_cross_entropy_with_logits(scores, is_safe.to(scores.dtype), reduction="none")


# The reward of RLHF (3.2.3) ------------------------------------------------------------------------------------------


def logit(p: Tensor, eps: float = 1e-6) -> Tensor:
    """The sigmoid's inverse, finite at 0 and 1."""
    return torch.logit(p, eps=eps)


def combine_rewards(safety: Tensor, helpfulness: Tensor, is_safety: Tensor, threshold: float = 0.15) -> Tensor:
    """R_c (B,): the safety score where the prompt is tagged or the score is below the threshold, else helpfulness.

    safety, helpfulness (B,) in (0, 1); is_safety (B,) bool.
    """
    return torch.where(is_safety | (safety < threshold), safety, helpfulness)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the counted entries, a scalar; 0 where nothing counts. x and mask (...)."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """Shift and scale to mean 0 and deviation 1 over the counted entries; the mean is *not* kept. x and mask (...).

    Entries that do not count come back as 0.
    """
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + eps) * mask


@dataclass(frozen=True)
class Moments:
    """Running count, mean and variance of the scores of all batches so far, to whiten with."""

    count: float = 0.0
    mean: float = 0.0
    variance: float = 0.0

    def with_batch(self, x: Tensor) -> Moments:
        """The moments with a batch (B,) added (Chan et al. 1979), in float64."""
        x = x.double()
        n, mean = float(len(x)), float(x.mean())
        total, delta = self.count + n, mean - self.mean
        squares = self.count * self.variance + float(((x - mean) ** 2).sum()) + delta**2 * self.count * n / total
        return Moments(total, self.mean + delta * n / total, squares / total)

    def whiten(self, x: Tensor, eps: float = 1e-8) -> Tensor:
        """Shift and scale by these moments; the mean is *not* kept."""
        return (x - self.mean) / math.sqrt(self.variance + eps)


def clip(x: Tensor, largest: float) -> Tensor:
    """x clamped to [-largest, largest], any shape; unchanged where `largest` is 0."""
    return x.clamp(-largest, largest) if largest else x


NO_MOMENTS = Moments()
"""Before the first batch."""


def sequence_kl(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """The k1 estimate of KL(pi || pi_0) in nats, (B,): log pi - log pi_0 summed over an answer's tokens, not clamped.

    logprobs, reference, mask (B, T).
    """
    return ((logprobs - reference) * mask).sum(dim=1)


def adaptive_kl_beta(beta: float, kl: float, target: float, horizon: int, n: int) -> float:
    """The KL weight after n answers of mean KL `kl` (Ziegler et al. 2019, 2.2).

    It grows where KL is above the target and shrinks below, by at most a fifth in `horizon` answers. A target of 0 is
    none: beta stays.
    """
    if not target:
        return beta
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * n / horizon)


def token_rewards(scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Per-token rewards (B, T): -beta (log pi - log pi_0) everywhere, plus the score on each row's last action.

    scores (B,), the rest (B, T). Their sum over a row is score - beta * KL, the paper's equation 4; the estimate of KL
    is log pi - log pi_0 of the drawn tokens (k1): unbiased, and not clamped.
    """
    rewards = -beta * (logprobs - reference) * mask
    last = mask.shape[1] - 1 - mask.flip(1).to(torch.int64).argmax(dim=1)  # (B,) index of the last True
    return rewards.scatter_add(1, last[:, None], (scores * mask.any(dim=1))[:, None].to(rewards.dtype))


# PPO (3.2.3; Schulman et al. 2017) -----------------------------------------------------------------------------------


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, each (B, T), from rewards, values, mask (B, T) (Schulman et al. 2015).

    Masked-out steps (prompt, other turns, pads) are skipped: the recursion carries over them.
    """
    advantages = torch.zeros_like(values)
    following_advantage = torch.zeros_like(values[:, 0])
    following_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        counted = mask[:, t]
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        advantage = delta + gamma * lam * following_advantage
        advantages[:, t] = torch.where(counted, advantage, 0.0)
        following_advantage = torch.where(counted, advantage, following_advantage)
        following_value = torch.where(counted, values[:, t], following_value)
    return advantages, (advantages + values) * mask


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate, negated, per token; all (...)."""
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the larger of the squared errors of the value and of the value clipped around the old one, per token."""
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def ratio_stats(logprobs: Tensor, old: Tensor, mask: Tensor, clip: float) -> dict[str, Tensor]:
    """How far the policy has moved since it sampled, summed over counted tokens; all (...) -> scalars.

    "clip_fraction": tokens whose ratio pi / pi_old is outside 1 +- clip. "approximate_kl": ratio - 1 - log ratio, the
    k3 estimate of KL(pi_old || pi) in nats, finite where the ratio underflows.
    """
    log_ratio = logprobs - old
    change = log_ratio.expm1()  # ratio - 1
    return {
        "clip_fraction": ((change.abs() > clip) * mask).sum(),
        "approximate_kl": ((change - log_ratio) * mask).sum(),
    }


# Groups of answers to one prompt (Ahmadian et al. 2024; Shao et al. 2024) ---------------------------------------------


def leave_one_out(scores: Tensor) -> Tensor:
    """RLOO's advantages (P, G): each score less the mean of the other answers to its prompt; G at least 2."""
    n = scores.shape[1]
    return (scores - scores.mean(dim=1, keepdim=True)) * n / (n - 1)


def group_whitened(scores: Tensor, eps: float = 1e-4) -> Tensor:
    """GRPO's advantages (P, G): a score less its group's mean, over the group's deviation (of G - 1); G at least 2."""
    return (scores - scores.mean(dim=1, keepdim=True)) / (scores.std(dim=1, keepdim=True) + eps)


def token_weights(mask: Tensor, average: Literal["answer", "token"]) -> Tensor:
    """What each counted token of B answers (B, T) weighs in a mean of them, (B, T) float32 that sum to 1.

    "answer": all answers weigh the same, and the tokens within each. "token": all tokens do, so that long answers weigh
    more. No answer is empty.
    """
    if average == "token":
        return mask / mask.sum()
    return mask / mask.sum(dim=1, keepdim=True) / len(mask)


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """GRPO's KL as a loss, per token (...): pi_0 / pi - log(pi_0 / pi) - 1, which is never negative."""
    log_ratio = reference - logprobs
    return log_ratio.exp() - log_ratio - 1


# Direct preference optimisation (Rafailov et al. 2023) ----------------------------------------------------------------


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta (chosen - rejected)), each (B,) -> (B,), of whole answers' log pi - log pi_ref.

    With `label_smoothing` each pair counts as the other way round in that share of cases (Mitchell 2023).
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)

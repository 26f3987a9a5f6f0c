"""Every equation against numbers worked by hand, chosen so that a plausible wrong version gives others."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from puna import losses

LN2 = math.log(2)


def close(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-5, atol=1e-6)


def log(*weights: float) -> Tensor:
    return torch.tensor(weights).log()


def test_margins_are_table_27() -> None:
    grades = ("significantly_better", "better", "slightly_better", "negligibly_better")
    assert [losses.MARGINS["none"][grade] for grade in grades] == [0, 0, 0, 0]
    assert [losses.MARGINS["small"][grade] for grade in grades] == [1, 2 / 3, 1 / 3, 0]
    assert [losses.MARGINS["large"][grade] for grade in grades] == [3, 2, 1, 0]


# Language model


def test_token_logprobs() -> None:
    logits = log(1, 2, 5).expand(2, 1, 3)
    close(losses.token_logprobs(logits, torch.tensor([[1], [2]])), [[math.log(2 / 8)], [math.log(5 / 8)]])


def test_token_logprobs_at_a_temperature() -> None:
    # At temperature 1/2 the odds 1 : 2 : 5 become their squares 1 : 4 : 25; times 1/2 they would become roots.
    close(losses.token_logprobs(log(1, 2, 5)[None], torch.tensor([1]), temperature=0.5), [math.log(4 / 30)])


def test_token_logprobs_are_float32() -> None:
    logits = torch.tensor([[0.0, 20.0]], dtype=torch.bfloat16)
    # log(1 / (1 + e^20)) = -20.000000002; in bfloat16 neighbouring numbers near 20 are 0.125 apart.
    logprobs = losses.token_logprobs(logits, torch.tensor([0]))
    assert logprobs.dtype == torch.float32
    close(logprobs, [-20.0])


@pytest.mark.parametrize("target", [-1, 3])
def test_token_logprobs_refuse_a_target_outside_the_vocabulary(target: int) -> None:
    with pytest.raises(IndexError):
        losses.token_logprobs(torch.zeros(1, 3), torch.tensor([target]))


def test_load_balancing_loss() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]], requires_grad=True)
    loss = losses.load_balancing_loss(probabilities, torch.tensor([[0, 1], [0, 2]]))
    # f = 1, 1/2, 1/2 and P = 0.55, 0.2, 0.25: 3 (0.55 + 0.1 + 0.125). Over k N assignments it would be half of that.
    close(loss, 2.325)
    loss.backward()
    close(probabilities.grad, [[1.5, 0.75, 0.75]] * 2)  # type: ignore[arg-type]  # 3 f / N


def test_load_balancing_loss_at_its_ends() -> None:
    even = torch.full((3, 3), 1 / 3)
    close(losses.load_balancing_loss(even, torch.tensor([[0, 1], [1, 2], [2, 0]])), 2.0)
    crowded = torch.tensor([[0.5, 0.5, 0.0]] * 4)
    close(losses.load_balancing_loss(crowded, torch.tensor([[0, 1]] * 4)), 3.0)


def test_entropy() -> None:
    # 1/4 log 4 + 3/4 log(4/3) = 0.34657 + 0.21576
    logits = torch.stack((log(1, 3), log(1, 1)))
    logprobs, entropies = losses.logprobs_and_entropy(logits, torch.tensor([0, 1]))
    close(logprobs, [-2 * LN2, -LN2])
    close(entropies, [0.562335, LN2])
    # At temperature 1/2 the chances are squared: 1/10 and 9/10.
    logprobs, entropies = losses.logprobs_and_entropy(logits[:1], torch.tensor([1]), temperature=0.5)
    close(logprobs, [math.log(0.9)])
    close(entropies, [-0.1 * math.log(0.1) - 0.9 * math.log(0.9)])


def test_logprobs_beside_the_entropy_are_the_logprobs() -> None:
    logits = torch.randn(7, 11, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(11, (7,))
    grads = []
    for work in (losses.token_logprobs, lambda *x: losses.logprobs_and_entropy(*x)[0]):
        logprobs = work(logits, targets, 0.7)
        grads.append((logprobs, *torch.autograd.grad(logprobs.sum(), logits)))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


# Reward model


@pytest.mark.parametrize(
    ("margin", "expected"),
    [(0.0, 0.313262), (1.0, LN2), (3.0, 2.126928)],  # log(1 + e^-1), log(1 + e^0), log(1 + e^2)
)
def test_ranking_loss(margin: float, expected: float) -> None:
    # Swapped answers would give log(1 + e^(1 + m)), an added margin log(1 + e^(-1 - m)).
    loss = losses.ranking_loss(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([margin]))
    close(loss, [expected])


def test_ranking_loss_pushes_the_chosen_up_and_the_rejected_down() -> None:
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    losses.ranking_loss(chosen, rejected, torch.zeros(1)).sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    close(chosen.grad, [-0.5])  # sigmoid(0) - 1
    close(rejected.grad, [0.5])


def test_safety_auxiliary_loss() -> None:
    # -log sigmoid(2) = log(1 + e^-2) where safe, -log(1 - sigmoid(2)) = log(1 + e^2) where not.
    loss = losses.safety_auxiliary_loss(torch.tensor([2.0, 2.0, 0.0]), torch.tensor([True, False, True]))
    close(loss, [0.126928, 2.126928, LN2])


# The reward of RLHF


def test_logit() -> None:
    close(losses.logit(torch.tensor([0.5, 0.75, 0.2])), [0.0, math.log(3), -math.log(4)])


def test_logit_is_finite_at_the_ends() -> None:
    close(losses.logit(torch.tensor([0.0, 1.0]), eps=1e-3), [-math.log(999), math.log(999)])
    assert losses.logit(torch.tensor([0.0, 1.0])).isfinite().all()


@pytest.mark.parametrize(
    ("safety", "is_safety", "expected"),
    [
        (0.9, False, 0.6),  # safe enough: helpfulness
        (0.9, True, 0.9),  # a tagged prompt: safety, however high
        (0.1, False, 0.1),  # below the threshold: safety
        (0.1, True, 0.1),
        (0.15, False, 0.6),  # the paper's "< 0.15" is strict
    ],
)
def test_combine_rewards(safety: float, is_safety: bool, expected: float) -> None:
    combined = losses.combine_rewards(torch.tensor([safety]), torch.tensor([0.6]), torch.tensor([is_safety]))
    close(combined, [expected])


def test_masked_mean() -> None:
    x, mask = torch.tensor([1.0, 2.0, 100.0, 6.0]), torch.tensor([True, True, False, True])
    close(losses.masked_mean(x, mask), 3.0)  # over all four: 27.25 or 2.25
    close(losses.masked_mean(x, torch.zeros(4, dtype=torch.bool)), 0.0)


def test_whiten() -> None:
    # Mean 2, variance (1 + 0 + 1) / 3: the ends stand sqrt(3/2) from it. Over n - 1 they would be at 1; with the mean
    # kept, at 0.775 and 3.225.
    close(losses.whiten(torch.tensor([1.0, 2.0, 3.0])), [-math.sqrt(1.5), 0.0, math.sqrt(1.5)])


def test_whiten_counts_the_mask_alone() -> None:
    x, mask = torch.tensor([[1.0, 50.0], [3.0, -7.0]]), torch.tensor([[True, False], [True, False]])
    close(losses.whiten(x, mask), [[-1.0, 0.0], [1.0, 0.0]])


def test_whiten_of_equals_is_zero() -> None:
    close(losses.whiten(torch.full((4,), 5.0)), torch.zeros(4))


def test_token_rewards() -> None:
    logprobs = torch.tensor([[-1.0, -1.0, -2.0, -9.0], [-9.0, -3.0, -1.0, -1.0]])
    reference = torch.tensor([[-2.0, -0.5, -2.0, -1.0], [-1.0, -1.0, -1.0, -4.0]])
    mask = torch.tensor([[True, True, True, False], [False, True, True, True]])
    rewards = losses.token_rewards(torch.tensor([10.0, 20.0]), logprobs, reference, mask, beta=0.1)
    # log pi - log pi_0 is 1, -0.5, 0 and -2, 0, 3: a negative estimate stays a reward (not clamped, no absolute value).
    # The scores stand on the last action, not at the row's end and not on a pad.
    close(rewards, [[-0.1, 0.05, 10.0, 0.0], [0.0, 0.2, 0.0, 19.7]])


def test_token_rewards_of_a_row_without_actions_are_zero() -> None:
    mask = torch.tensor([[False, False]])
    close(losses.token_rewards(torch.tensor([5.0]), torch.ones(1, 2), torch.zeros(1, 2), mask, 1.0), [[0.0, 0.0]])


def test_running_moments() -> None:
    moments = losses.NO_MOMENTS.with_batch(torch.tensor([1.0, 3.0]))
    assert (moments.count, moments.mean, moments.variance) == (2, 2, 1)
    moments = moments.with_batch(torch.tensor([5.0, 7.0, 9.0]))  # of 1, 3, 5, 7, 9: mean 5, variance 8
    assert (moments.count, moments.mean) == (5, 5) and moments.variance == pytest.approx(8)
    close(moments.whiten(torch.tensor([5.0, 9.0])), [0.0, 4 / math.sqrt(8)])


def test_one_batch_of_running_moments_whitens_as_the_batch() -> None:
    x = torch.randn(9) * 3 + 2
    close(losses.NO_MOMENTS.with_batch(x).whiten(x), losses.whiten(x).tolist())


def test_clip() -> None:
    close(losses.clip(torch.tensor([-3.0, 0.5, 3.0]), 2.0), [-2.0, 0.5, 2.0])
    close(losses.clip(torch.tensor([-3.0, 0.5, 3.0]), 0.0), [-3.0, 0.5, 3.0])


def test_sequence_kl() -> None:
    logprobs, reference = torch.tensor([[-1.0, -1.0, -9.0]]), torch.tensor([[-2.0, -0.5, -1.0]])
    mask = torch.tensor([[True, True, False]])
    close(losses.sequence_kl(logprobs, reference, mask), [0.5])
    close(losses.sequence_kl(reference, logprobs, mask), [-0.5])  # not clamped


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on the target
        (6.6, 0.1 * (1 + 0.1 * 256 / 10000)),  # a tenth above it
        (60.0, 0.1 * (1 + 0.2 * 256 / 10000)),  # far above: a fifth at most
        (-3.0, 0.1 * (1 - 0.2 * 256 / 10000)),  # below
    ],
)
def test_adaptive_kl_beta(kl: float, expected: float) -> None:
    assert losses.adaptive_kl_beta(0.1, kl, target=6.0, horizon=10000, n=256) == pytest.approx(expected, rel=1e-12)
    assert losses.adaptive_kl_beta(0.1, kl, target=0.0, horizon=10000, n=256) == 0.1


def test_ratio_stats() -> None:
    logprobs = torch.tensor([math.log(1.5), math.log(0.9), math.log(0.5), 5.0])
    mask = torch.tensor([True, True, True, False])
    numbers = losses.ratio_stats(logprobs, torch.zeros(4), mask, clip=0.2)
    assert float(numbers["clip_fraction"]) == 2  # 1.5 and 0.5
    k3 = sum(ratio - 1 - math.log(ratio) for ratio in (1.5, 0.9, 0.5))
    assert float(numbers["approximate_kl"]) == pytest.approx(k3)
    unlikely = losses.ratio_stats(torch.tensor([-200.0]), torch.zeros(1), torch.ones(1, dtype=torch.bool), clip=0.2)
    assert float(unlikely["approximate_kl"]) == 199, "finite where the ratio is too small for a float"


# PPO


def test_generalized_advantages() -> None:
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.25, 0.125]])
    advantages, returns = losses.generalized_advantages(rewards, values, torch.ones(1, 3, dtype=torch.bool), 0.5, 0.5)
    # Backwards, gamma = lambda = 1/2:
    #   delta_2 = 1                    - 0.125 =  0.875     A_2 = 0.875
    #   delta_1 = 0 + 0.5 * 0.125      - 0.25  = -0.1875    A_1 = -0.1875 + 0.25 * 0.875
    #   delta_0 = 0 + 0.5 * 0.25       - 0.5   = -0.375     A_0 = -0.375 + 0.25 * 0.03125
    close(advantages, [[-0.3671875, 0.03125, 0.875]])
    close(returns, [[0.1328125, 0.28125, 1.0]])


def test_generalized_advantages_at_the_ends_of_lambda() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 1.0, 3.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    one_step, _ = losses.generalized_advantages(rewards, values, mask, 1.0, 0.0)
    close(one_step, [[1 + 1.0 - 0.5, 2 + 3.0 - 1.0, 4 - 3.0]])  # r + V' - V
    monte_carlo, returns = losses.generalized_advantages(rewards, values, mask, 1.0, 1.0)
    close(monte_carlo, [[7 - 0.5, 6 - 1.0, 4 - 3.0]])  # what follows, less V
    close(returns, [[7.0, 6.0, 4.0]])


def test_generalized_advantages_skip_what_does_not_count() -> None:
    rewards = torch.tensor([[9.0, 0.0, 9.0, 0.0, 1.0, 9.0]])
    values = torch.tensor([[9.0, 0.5, 9.0, 0.25, 0.125, 9.0]])
    mask = torch.tensor([[False, True, False, True, True, False]])
    advantages, returns = losses.generalized_advantages(rewards, values, mask, 0.5, 0.5)
    close(advantages, [[0, -0.3671875, 0, 0.03125, 0.875, 0]])  # the numbers of the three steps alone
    close(returns, [[0, 0.1328125, 0, 0.28125, 1.0, 0]])


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
        (1.5, 1.0, -1.2, 0.0),  # a good token, already likelier: clipped, no more push
        (0.5, 1.0, -0.5, -0.5),  # a good token, less likely: not clipped
        (1.5, -1.0, 1.5, 1.5),  # a bad token, likelier: not clipped
        (0.5, -1.0, 0.8, 0.0),  # a bad token, already less likely: clipped
    ],
)
def test_policy_loss(ratio: float, advantage: float, expected: float, slope: float) -> None:
    logprobs = torch.tensor([math.log(ratio) - 3.0], requires_grad=True)
    loss = losses.policy_loss(logprobs, torch.tensor([-3.0]), torch.tensor([advantage]), clip=0.2)
    loss.sum().backward()
    close(loss, [expected])
    assert logprobs.grad is not None
    close(logprobs.grad, [slope])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, 0.5),  # clipped to 0.7: max(1.0, 0.49) / 2
        (0.0, 0.045),  # clipped to 0.3: max(0.0, 0.09) / 2, the move away from the old value does not pay
        (0.6, 0.18),  # within the clip
    ],
)
def test_value_loss(value: float, expected: float) -> None:
    loss = losses.value_loss(torch.tensor([value]), torch.tensor([0.5]), torch.tensor([0.0]), clip=0.2)
    close(loss, [expected])


# Groups of answers to one prompt


def test_leave_one_out() -> None:
    # 1 against (2 + 6) / 2, 2 against (1 + 6) / 2, 6 against (1 + 2) / 2; less the mean of all three: -2, -1, 3.
    close(losses.leave_one_out(torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])), [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]])


def test_group_whitened() -> None:
    # Mean 4, deviation sqrt((9 + 0 + 9) / 2) = 3; over G it would be 2.449, over all six scores more. Another group's
    # scores are another scale, and equal scores say nothing.
    scores = torch.tensor([[1.0, 4.0, 7.0], [10.0, 40.0, 70.0], [5.0, 5.0, 5.0]])
    close(losses.group_whitened(scores, eps=0.0)[:2], [[-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]])
    close(losses.group_whitened(scores)[2], [0.0, 0.0, 0.0])


def test_token_weights() -> None:
    mask = torch.tensor([[False, True, False], [True, True, True]])
    close(losses.token_weights(mask, "answer"), [[0, 1 / 2, 0], [1 / 6, 1 / 6, 1 / 6]])
    close(losses.token_weights(mask, "token"), [[0, 1 / 4, 0], [1 / 4, 1 / 4, 1 / 4]])


def test_kl_k3() -> None:
    # log pi_0/pi is log 2, 0 and -log 2: 2 - log 2 - 1, 0, 1/2 + log 2 - 1. The other way round the ends change places.
    logprobs, reference = torch.tensor([-2.0, -1.0, -1.0]), torch.tensor([LN2 - 2.0, -1.0, -LN2 - 1.0])
    close(losses.kl_k3(logprobs, reference), [1 - LN2, 0.0, LN2 - 0.5])


def test_kl_k3_estimates_the_kl() -> None:
    p, p0 = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    close((p * losses.kl_k3(p.log(), p0.log())).sum(), (p * (p / p0).log()).sum())


# Direct preference optimisation


@pytest.mark.parametrize(
    ("smoothing", "expected"),
    [(0.0, 0.313262), (0.1, 0.413262)],  # log(1 + e^-1); 0.9 of it and 0.1 of log(1 + e), which is 1 more
)
def test_dpo_loss(smoothing: float, expected: float) -> None:
    # Log ratios 3 and -7, beta 0.1: a margin of 1. The wrong sign gives log(1 + e), beta outside 0.1 log(1 + e^-10).
    loss = losses.dpo_loss(torch.tensor([3.0]), torch.tensor([-7.0]), beta=0.1, label_smoothing=smoothing)
    close(loss, [expected])


def test_dpo_loss_pulls_by_beta_and_how_wrong_it_is() -> None:
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    losses.dpo_loss(chosen, rejected, beta=0.1).sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    close(chosen.grad, [-0.05])  # beta (sigmoid(0) - 1)
    close(rejected.grad, [0.05])

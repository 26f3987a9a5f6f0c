"""The details on which implementations of PPO for language models differ, a letter each (the list goes from a to z).

c, d, e and i are in test_model_details.py; y, z and the other stages' o in test_training.py; the ranks' part of l and o
in test_processes.py.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from puna import losses, optim
from puna.formats import huggingface
from puna.generate.engine import LocalEngine
from puna.generate.sampling import Sampling
from puna.stages import ppo
from puna.stages.ppo import Models, PPOConfig
from puna.types import Completion, Rollout
from tests import helpers

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> PPOConfig:
    return helpers.ppo_config(tmp_path_factory.mktemp("ppo"))


@pytest.fixture
def models(cfg: PPOConfig) -> Models:
    """Fresh ones, for a test may train them."""
    loaded = ppo.load(cfg, CPU)
    # As after some iterations: the policy is not the reference any more.
    with torch.no_grad():
        for parameter in loaded.policy.layers.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return loaded


def rolled_out(cfg: PPOConfig, models: Models, n: int = 8) -> Rollout:
    return ppo.collect(cfg, models, helpers.prompts(n, seed=3), iteration=0)[0]


def perturb(model: torch.nn.Module, scale: float = 0.02) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)


def gradients(*modules: torch.nn.Module) -> list[Tensor]:
    taken = [p.grad.clone() for module in modules for p in module.parameters() if p.grad is not None]
    for module in modules:
        module.zero_grad()
    return taken


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def advantages_of(cfg: PPOConfig, rollout: Rollout) -> ppo.Targets:
    rewards = losses.token_rewards(
        rollout.scores, rollout.logprobs, rollout.reference_logprobs, rollout.action_mask, cfg.beta
    )
    advantages, returns = losses.generalized_advantages(
        rewards, rollout.values, rollout.action_mask, cfg.gamma, cfg.lam
    )
    return ppo.Targets(losses.whiten(advantages, rollout.action_mask), returns)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_a_logprobs_are_at_the_sampling_temperature(cfg: PPOConfig, models: Models, temperature: float) -> None:
    cfg = replace(cfg, temperature=temperature)
    rollout = rolled_out(cfg, models)
    with torch.no_grad():
        scaled = (models.policy(rollout.tokens)[:, :-1] / temperature).log_softmax(-1)
        of_reference = (models.reference(rollout.tokens)[:, :-1] / temperature).log_softmax(-1)
    emitted = rollout.tokens[:, 1:, None]
    mask = rollout.action_mask
    close(rollout.logprobs[mask], scaled.gather(-1, emitted).squeeze(-1)[mask])
    close(rollout.reference_logprobs[mask], of_reference.gather(-1, emitted).squeeze(-1)[mask])
    _, completions, *_ = ppo.sample(cfg, models, helpers.prompts(8, seed=3), cfg.seed + 1)
    drawn_at = torch.tensor([logprob for completion in completions for logprob in completion.logprobs])
    close(drawn_at, rollout.logprobs[mask], 1e-4)


def test_b_ratio_is_one_on_the_first_minibatch(cfg: PPOConfig, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = rolled_out(cfg, models)
    assert len(set(rollout.action_mask.sum(dim=1).tolist())) > 1, "answers of several lengths"
    largest, real = [], losses.policy_loss

    def spy(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
        counted = old != 0  # elsewhere nothing was written
        largest.append(float(((logprobs.detach() - old).exp() - 1)[counted].abs().max()))
        return real(logprobs, old, advantages, clip)

    monkeypatch.setattr(losses, "policy_loss", spy)
    for micro_batch_tokens in (64, 8192):  # other batches and other padding than when it was collected
        ppo.accumulate(
            replace(cfg, micro_batch_tokens=micro_batch_tokens),
            models,
            rollout,
            advantages_of(cfg, rollout),
            members=[5, 0, 3, 6],
        )
    assert len(largest) > 2 and max(largest) < 1e-5


def test_f_score_is_on_the_last_action_token(cfg: PPOConfig, models: Models) -> None:
    rollout = rolled_out(cfg, models)
    rewards = losses.token_rewards(rollout.scores, rollout.logprobs, rollout.reference_logprobs, rollout.action_mask, 0)
    for row in range(len(rewards)):
        (where,) = rewards[row].nonzero(as_tuple=True)
        assert where.tolist() == [int(rollout.action_mask[row].nonzero()[-1])]
        last = rollout.tokens[row, 1 + where[0]]
        assert bool(rollout.finished[row]) == (int(last) == models.tokenizer.eos_id)
    advantages, _ = losses.generalized_advantages(rewards, rollout.values, rollout.action_mask, 1.0, 1.0)
    expected = rollout.scores[:, None].expand_as(advantages)
    close((advantages + rollout.values)[rollout.action_mask], expected[rollout.action_mask])


def test_g_an_answer_without_eos_is_penalised(cfg: PPOConfig, models: Models) -> None:
    cfg = replace(cfg, max_new_tokens=1)
    without = rolled_out(replace(cfg, missing_eos_penalty=0.0), models, 24)
    penalised = rolled_out(replace(cfg, missing_eos_penalty=3.0), models, 24)
    assert 0 < int(penalised.finished.sum()) < 24
    close(penalised.scores, torch.where(penalised.finished, without.scores, without.scores - 3.0))


def test_h_the_critic_begins_as_the_reward_model(cfg: PPOConfig, models: Models) -> None:
    rollout = rolled_out(cfg, models)
    reward = huggingface.load_reward_model(cfg.reward_helpfulness)
    for row in range(3):
        for step in rollout.action_mask[row].nonzero().flatten().tolist():
            # The value of step t is of the state before token t + 1 is emitted: tokens 0 ... t.
            state = rollout.tokens[row : row + 1, : step + 1]
            close(rollout.values[row, step], reward(state, torch.tensor([step + 1]))[0].detach())


def test_j_whitening_stands_in_for_a_normalised_reward_model(cfg: PPOConfig, models: Models) -> None:
    # The paper whitens logit(R) over the batch where others normalise the model on reference texts: what PPO sees has
    # mean 0 and deviation 1 whatever scale the model scores at, also after it is loaded again.
    cfg = replace(cfg, threshold=0.0, missing_eos_penalty=0.0)
    prompts = [prompt | {"is_safety": False} for prompt in helpers.prompts(32)]

    def scores(of: Models) -> Tensor:
        return ppo.collect(cfg, of, prompts, 0)[0].scores

    first = scores(models)
    assert float(first.mean()) == pytest.approx(0, abs=1e-5)
    assert float(first.std(correction=0)) == pytest.approx(1, abs=1e-5)
    again = huggingface.load_reward_model(cfg.reward_helpfulness)
    with torch.no_grad():
        again.score.weight *= 0.5
    close(scores(replace(models, helpfulness=type(models.helpfulness)(again, models.tokenizer))), first, 1e-3)


def test_k_whitening_does_not_keep_the_mean() -> None:
    rewards = torch.tensor([0.5, 0.7310586, 0.8807971])  # logits 0, 1, 2
    close(losses.whiten(losses.logit(rewards)), torch.tensor([-(1.5**0.5), 0.0, 1.5**0.5]))


def test_l_advantages_are_whitened_over_counted_tokens(
    cfg: PPOConfig, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout, given = rolled_out(cfg, models), []

    def spy(cfg: PPOConfig, models: Models, rollout: Rollout, targets: ppo.Targets, *rest: Any) -> dict[str, float]:
        given.append(targets)
        return {}

    monkeypatch.setattr(ppo, "accumulate", spy)
    ppo.update(
        cfg,
        models,
        optim.adamw(cfg.optim, optim.groups(models.policy, cfg.optim)),
        rollout,
        cfg.beta,
        0,
        1,
    )
    assert len(given) == 2, "two mini-batches of one whitening"
    mask, (advantages, returns) = rollout.action_mask, given[0]
    assert float(advantages[mask].mean()) == pytest.approx(0, abs=1e-5)
    assert float(advantages[mask].std(correction=0)) == pytest.approx(1, abs=1e-4)
    for actual, expected in zip((advantages, returns), advantages_of(cfg, rollout), strict=True):
        close(actual, expected)
    wider, wide_mask = (torch.nn.functional.pad(x, (2, 5)) for x in (rollout.values, mask))
    close(losses.whiten(wider, wide_mask)[:, 2:-5], losses.whiten(rollout.values, mask))


def test_m_advantages_skip_pads_and_other_turns() -> None:
    # Two answers of one dialog with the user's turn between them, then pads: as if the four steps followed each other.
    rewards, values = torch.randn(1, 4), torch.randn(1, 4)
    expected = losses.generalized_advantages(rewards, values, torch.ones(1, 4, dtype=torch.bool), 0.9, 0.8)
    where = torch.tensor([2, 3, 6, 7])
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[:, where] = True
    wide_rewards, wide_values = torch.full((1, 12), 7.0), torch.full((1, 12), 9.0)
    wide_rewards[:, where], wide_values[:, where] = rewards, values
    actual = losses.generalized_advantages(wide_rewards, wide_values, mask, 0.9, 0.8)
    for wide, narrow in zip(actual, expected, strict=True):
        close(wide[:, where], narrow)
        assert not wide[~mask].any()


def test_n_losses_are_clipped_and_the_values_halved(cfg: PPOConfig, models: Models) -> None:
    rollout = rolled_out(cfg, models)
    perturb(models.policy, 0.05)
    perturb(models.value, 0.05)
    targets = advantages, returns = advantages_of(cfg, rollout)
    numbers = ppo.accumulate(cfg, models, rollout, targets, list(range(8)))
    expected = dict.fromkeys(("policy_loss", "value_loss", "clip_fraction", "approximate_kl", "entropy"), 0.0)
    with torch.no_grad():
        logp, values = models.policy(rollout.tokens).log_softmax(-1), models.value.values(rollout.tokens)
    for row, t in rollout.action_mask.nonzero().tolist():
        ratio = math.exp(float(logp[row, t, rollout.tokens[row, t + 1]] - rollout.logprobs[row, t]))
        advantage, target = float(advantages[row, t]), float(returns[row, t])
        value, old = float(values[row, t]), float(rollout.values[row, t])
        near = old + max(-0.2, min(0.2, value - old))
        expected["policy_loss"] -= min(ratio * advantage, max(0.8, min(1.2, ratio)) * advantage)
        expected["value_loss"] += 0.5 * max((value - target) ** 2, (near - target) ** 2)
        expected["clip_fraction"] += abs(ratio - 1) > 0.2
        expected["approximate_kl"] += ratio - 1 - math.log(ratio)
        expected["entropy"] -= float((logp[row, t].exp() * logp[row, t]).sum())
    count = int(rollout.action_mask.sum())
    assert 0 < numbers["clip_fraction"] < 1
    assert numbers == pytest.approx({name: value / count for name, value in expected.items()}, rel=1e-4, abs=1e-5)


def test_o_tokens_weigh_the_same_however_a_minibatch_is_cut(cfg: PPOConfig, models: Models) -> None:
    rollout = rolled_out(cfg, models)
    perturb(models.policy)
    taken = []
    for micro_batch_tokens in (1, 80, 10**6):
        part = replace(cfg, micro_batch_tokens=micro_batch_tokens)
        numbers = ppo.accumulate(part, models, rollout, advantages_of(cfg, rollout), list(range(8)))
        taken.append((gradients(models.policy, models.value), numbers))
    for grads, numbers in taken[1:]:
        assert numbers == pytest.approx(taken[0][1], rel=1e-5, abs=1e-6)
        for actual, expected in zip(grads, taken[0][0], strict=True):
            close(actual, expected, 1e-6)


def test_p_kl_in_the_reward_has_the_gradient_of_kl() -> None:
    # One step, four actions: the expected gradient of the policy loss with reward -beta (log pi - log pi_0) is that of
    # beta KL(pi || pi_0), worked out exactly. Clamped at 0, or as an absolute value, it would not be.
    logits, beta = torch.tensor([0.3, -1.0, 0.8, 0.1], requires_grad=True), 0.7
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    logp = logits.log_softmax(0)
    (expected,) = torch.autograd.grad(beta * (logp.exp() * (logp - reference)).sum(), logits, retain_graph=True)
    mask = torch.ones(4, 1, dtype=torch.bool)
    old = logp.detach()
    rewards = losses.token_rewards(torch.zeros(4), old[:, None], reference[:, None], mask, beta)
    surrogate = losses.policy_loss(logp, old, rewards[:, 0], clip=0.2)  # (4,): every action, weighted by its chance
    (actual,) = torch.autograd.grad((old.exp() * surrogate).sum(), logits)
    close(actual, expected, 1e-6)


def test_q_the_sampler_draws_from_what_is_scored(
    cfg: PPOConfig, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {field.name for field in dataclasses.fields(PPOConfig)}
    assert not names & {"top_p", "top_k"}, "a cut distribution is not the one that is scored"
    asked, real = [], LocalEngine.complete

    def spy(self: LocalEngine, prompts: Any, samplings: list[Sampling], **named: Any) -> Any:
        asked.extend(samplings)
        return real(self, prompts, samplings, **named)

    monkeypatch.setattr(LocalEngine, "complete", spy)
    rolled_out(replace(cfg, temperature=0.7), models)
    whole = Sampling(temperature=0.7)
    assert asked and all(replace(each, seed=0, max_new_tokens=256) == whole for each in asked)


def test_r_rewards_sum_to_the_score_less_kl(cfg: PPOConfig, models: Models) -> None:
    rollout, numbers, _ = ppo.collect(cfg, models, helpers.prompts(8, seed=3), iteration=0)
    rewards = losses.token_rewards(
        rollout.scores, rollout.logprobs, rollout.reference_logprobs, rollout.action_mask, beta=0.3
    )
    kl = ((rollout.logprobs - rollout.reference_logprobs) * rollout.action_mask).sum(dim=1)
    assert kl.abs().max() > 1e-3
    close(rewards.sum(dim=1), rollout.scores - 0.3 * kl)
    assert numbers["kl"] == pytest.approx(float(kl.mean()), abs=1e-6)


def test_s_beta_is_fixed(cfg: PPOConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cfg.beta == 0.01, "paper 3.2.3, 7B and 13B"
    used, real = [], losses.token_rewards

    def spy(*arguments: Any) -> Tensor:
        used.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(losses, "token_rewards", spy)
    ppo.run(replace(cfg, out=tmp_path, beta=0.005, iterations=3))
    assert used == [0.005] * 3


def test_t_critic_warm_up_leaves_the_policy(cfg: PPOConfig, models: Models) -> None:
    cfg = replace(cfg, critic_warmup=2)
    groups = optim.groups(models.policy, cfg.optim), optim.groups(models.value, cfg.optim)
    optimizer = optim.adamw(cfg.optim, *groups)

    def weights() -> tuple[Tensor, Tensor]:
        return models.policy.output.weight.detach().clone(), models.value.score.weight.detach().clone()

    for iteration in range(3):
        policy, value = weights()
        ppo.update(cfg, models, optimizer, rolled_out(cfg, models), cfg.beta, iteration, 3)
        assert torch.equal(weights()[0], policy) == (iteration < 2)
        assert not torch.equal(weights()[1], value)


def test_u_rewards_and_advantages_are_not_clipped() -> None:
    # As the paper: whitening alone bounds them. One answer of 200 that is far better stands far out.
    rewards = torch.full((200,), 0.5)
    rewards[0] = 0.999
    scores = losses.whiten(losses.logit(rewards))
    assert float(scores[0]) == pytest.approx(math.sqrt(199), rel=1e-3)
    ones, zeros = torch.ones(200, 1, dtype=torch.bool), torch.zeros(200, 1)
    per_token = losses.token_rewards(scores, zeros, zeros, ones, 0.01)
    advantages, _ = losses.generalized_advantages(per_token, zeros, ones, 1.0, 0.95)
    close(advantages[:, 0], scores)


def test_v_adam_is_the_papers(cfg: PPOConfig, models: Models) -> None:
    settings = PPOConfig(cfg.out, cfg.init, cfg.reward_helpfulness, cfg.reward_safety, cfg.prompts)
    rates = {optim.learning_rate(settings.optim, step, 400) for step in range(400)}
    assert rates == {1e-6}, "constant"
    groups = optim.groups(models.policy, settings.optim), optim.groups(models.value, settings.optim, 5.0)
    optimizer = optim.adamw(settings.optim, *groups)
    for group in optimizer.param_groups:
        assert (group["eps"], group["betas"]) == (1e-5, (0.9, 0.95))
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim == 2 else 0.0)
    optim.clip_and_step([models.policy, models.value], optimizer, settings.optim, 0, 400)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-6, 1e-6, 5e-6, 5e-6])
    assert (settings.optim.clip, settings.clip) == (1.0, 0.2)
    assert (settings.batch_size, settings.mini_batch_size, settings.inner_epochs) == (512, 64, 1)


def test_w_tokens_are_never_tokenised_again(cfg: PPOConfig, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = models.tokenizer
    letters = [3 + ord(letter) for letter in "llama"]  # the pieces of single bytes
    assert tokenizer.encode(tokenizer.decode(letters)) != letters, "an ambiguous merge"
    answer = Completion(tokenizer.decode(letters), [*letters, tokenizer.eos_id], [-1.0] * 6, True)
    monkeypatch.setattr(LocalEngine, "generate_ids", lambda self, prompts, **_: [[answer] for _ in prompts])
    scored: list[list[int]] = []
    real = models.helpfulness.score_tokens
    monkeypatch.setattr(models.helpfulness, "score_tokens", lambda rows: scored.extend(rows) or real(rows))
    rollout = rolled_out(cfg, models, 4)
    for row in range(4):
        assert rollout.tokens[row, 1:][rollout.action_mask[row]].tolist() == answer.tokens
        assert scored[row][-6:] == answer.tokens


def test_x_numbers_count_action_tokens_alone(cfg: PPOConfig, models: Models) -> None:
    rollout = rolled_out(cfg, models)
    perturb(models.policy)
    targets = advantages_of(cfg, rollout)
    expected = ppo.accumulate(cfg, models, rollout, targets, list(range(8)))
    expected_gradients = gradients(models.policy, models.value)

    def soiled(x: Tensor) -> Tensor:
        wide = torch.nn.functional.pad(torch.where(rollout.action_mask, x, -3.0), (0, 4), value=5.0)
        return wide.clone()

    dirty = Rollout(
        torch.nn.functional.pad(rollout.tokens, (0, 4), value=models.tokenizer.eos_id),
        torch.nn.functional.pad(rollout.action_mask, (0, 4)),
        *(soiled(x) for x in (rollout.logprobs, rollout.reference_logprobs, rollout.values)),
        rollout.scores,
        rollout.finished,
    )
    actual = ppo.accumulate(cfg, models, dirty, ppo.Targets(*map(soiled, targets)), list(range(8)))
    assert actual == pytest.approx(expected, rel=1e-5)
    for one, other in zip(gradients(models.policy, models.value), expected_gradients, strict=True):
        close(one, other, 1e-6)
    close(advantages_of(cfg, dirty).advantages[:, :-4], targets.advantages)

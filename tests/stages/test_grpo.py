"""GRPO and RLOO: groups, advantages, losses, the best policy."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from puna import losses
from puna.config import ConfigError, DataError
from puna.formats import huggingface
from puna.generate.scoring import Scorer, sequence_logprobs
from puna.run_folder import read_metrics
from puna.stages import grpo
from puna.stages.grpo import GRPOConfig, Models, Rollout
from puna.text import chat
from tests import helpers

CPU = torch.device("cpu")
NUMBERS = "reward helpfulness safety kl length finished entropy policy_loss kl_loss clip_fraction approximate_kl"


@pytest.mark.parametrize("advantage", ["grpo", "rloo"])
def test_a_chat_model_becomes_a_policy(advantage: str, tmp_path: Path) -> None:
    cfg = helpers.grpo_config(tmp_path, advantage=advantage)
    model_path = grpo.run(cfg)
    lines = read_metrics(cfg.out / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(5))
    assert all(isinstance(line[name], float) for line in lines for name in [*NUMBERS.split(), "seconds_collect"])
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5) and lines[-1]["kl"] != 0
    done = json.loads((cfg.out / "done/grpo.json").read_text())
    measured = sorted(path.stem for path in (cfg.out / "held_out").iterdir())
    assert measured == ["0000", "0002", "0004", "0005"]
    means = {name: held_out_reward(cfg.out / f"held_out/{name}.jsonl") for name in measured}
    best = max(measured, key=lambda name: means[name])
    assert done["best_iteration"] == int(best) and done["held_out_reward"] == pytest.approx(means[best], abs=1e-5)
    provenance = json.loads((model_path / "puna.json").read_text())
    assert provenance == {"stage": advantage, "parent": str(cfg.init), "iteration": int(best)}
    assert not (cfg.out / "best").exists(), "the others are removed"


def held_out_reward(path: Path) -> float:
    """The mean logit, less the penalty of 1 for an answer that did not end."""
    lines = helpers.read_lines(path)
    logits = losses.logit(torch.tensor([line["reward"] for line in lines]))
    return float((logits - torch.tensor([1.0 * (not line["finished"]) for line in lines])).mean())


@pytest.mark.parametrize(("advantage", "average"), [("grpo", "answer"), ("rloo", "token")])
def test_a_reward_that_can_be_learned_is_learned(
    advantage: str, average: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score_tokens(self: Scorer, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([0.05 + 0.9 * sum(t % 2 for t in row[-5:-1]) / 4 for row in rows])  # odd words are good

    monkeypatch.setattr(Scorer, "score_tokens", score_tokens)
    cfg = helpers.grpo_config(tmp_path, advantage=advantage, average=average, iterations=25, batch_size=16)
    cfg = replace(cfg, mini_batch_size=8, threshold=0.0, patience=0, evaluate_every=25, checkpoint_every=0)
    grpo.run(replace(cfg, optim=replace(cfg.optim, lr=3e-3)))
    rewards = [line["reward"] for line in read_metrics(cfg.out / "metrics.jsonl")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


def test_rollouts_are_what_was_sampled(tmp_path: Path) -> None:
    cfg, prompts = helpers.grpo_config(tmp_path, temperature=0.9, threshold=0.5), helpers.prompts(3)
    models = grpo.load(cfg, CPU)
    rollout, numbers = grpo.collect(cfg, models, prompts, iteration=4)
    prompt_ids, completions, scores = grpo.sample(cfg, models, prompts, 4, cfg.seed + 5)
    assert len(completions) == 12 and len({tuple(c.tokens) for c in completions[:4]}) > 1
    for row, completion in enumerate(completions):
        ids = chat.encode_prompt(prompts[row // 4]["messages"], models.tokenizer)  # a group is side by side
        assert prompt_ids[row] == ids
        whole = ids + completion.tokens
        assert rollout.tokens[row, : len(whole)].tolist() == whole
        assert rollout.action_mask[row].nonzero().flatten().tolist() == list(range(len(ids) - 1, len(whole) - 1))
        (expected,) = sequence_logprobs(models.policy, [whole], 0.9)
        torch.testing.assert_close(rollout.logprobs[row][rollout.action_mask[row]], expected[len(ids) - 1 :])
    is_safety = torch.tensor([prompts[row // 4]["is_safety"] for row in range(12)])
    combined = torch.where(is_safety | (scores["safety"] < 0.5), scores["safety"], scores["helpfulness"])
    assert torch.equal(scores["reward"], combined)
    finished = torch.tensor([completion.finished for completion in completions])
    whitened = losses.whiten(torch.log(combined / (1 - combined))) - 1.0 * ~finished
    torch.testing.assert_close(rollout.advantages, losses.group_whitened(whitened.view(3, 4)).flatten())
    assert numbers["length"] == pytest.approx(sum(len(c.tokens) for c in completions) / 12)
    assert numbers["entropy"] == pytest.approx(-float(rollout.logprobs[rollout.action_mask].mean()))


def test_ranks_send_each_other_their_own_rows_alone(tmp_path: Path) -> None:
    cfg = helpers.grpo_config(tmp_path)
    models = grpo.load(cfg, CPU)
    rollout, _ = grpo.collect(cfg, models, helpers.prompts(2), 0)
    for row in grpo.old_and_reference_logprobs(cfg, models, rollout.tokens, rollout.action_mask, range(8)):
        assert row.untyped_storage().nbytes() == row.numel() * row.element_size(), "pickled with its storage"


def test_kl_counts_in_rloos_reward_and_in_grpos_loss(tmp_path: Path) -> None:
    cfg = helpers.grpo_config(tmp_path, group_size=2, beta=0.5)
    scores, kl = torch.tensor([1.0, 0.0, 2.0, 2.0]), torch.tensor([2.0, 0.0, 0.0, 4.0])
    # 1 - 1 against 0; 2 against 2 - 2: an answer that wanders pays for it within its group.
    assert grpo.advantages(replace(cfg, advantage="rloo"), scores, kl).tolist() == [0.0, 0.0, 2.0, -2.0]
    normalised = grpo.advantages(cfg, scores, kl).tolist()
    assert normalised == pytest.approx([0.5**0.5, -(0.5**0.5), 0.0, 0.0], abs=1e-3)
    models = grpo.load(cfg, CPU)
    rollout, _ = grpo.collect(cfg, models, helpers.prompts(4), 0)
    rollout = rollout._replace(reference_logprobs=rollout.reference_logprobs - 0.5, advantages=torch.zeros(8))
    for advantage, moved in (("grpo", True), ("rloo", False)):
        grpo.accumulate(replace(cfg, advantage=advantage), models, rollout, list(range(8)))
        assert bool(models.policy.output.weight.grad.abs().max() > 1e-6) is moved, advantage
        models.policy.zero_grad()


def expected_loss(cfg: GRPOConfig, models: Models, rollout: Rollout, members: list[int]) -> Tensor:
    """An answer, then a token at a time."""
    answers = []
    for i in members:
        at = rollout.action_mask[i].nonzero().flatten()
        row = rollout.tokens[i : i + 1, : int(at[-1]) + 2]
        logprobs = models.policy(row)[0, :-1].log_softmax(-1).gather(-1, row[0, 1:, None]).squeeze(-1)
        tokens = []
        for t in at.tolist():
            ratio, advantage = (logprobs[t] - rollout.logprobs[i, t]).exp(), rollout.advantages[i]
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - cfg.clip, 1 + cfg.clip) * advantage)
            apart = rollout.reference_logprobs[i, t] - logprobs[t]
            tokens.append(-surrogate + cfg.beta * (apart.exp() - apart - 1))
        answers.append(torch.stack(tokens))
    whole = torch.cat(answers) if cfg.average == "token" else torch.stack([answer.mean() for answer in answers])
    return whole.mean()


@pytest.mark.parametrize("average", ["answer", "token"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 4096])
def test_gradients_are_the_papers(average: str, micro_batch_tokens: int, tmp_path: Path) -> None:
    cfg = helpers.grpo_config(tmp_path, average=average, beta=0.3, micro_batch_tokens=micro_batch_tokens)
    models = grpo.load(cfg, CPU)
    rollout, _ = grpo.collect(cfg, models, helpers.prompts(4), 0)
    noise = torch.randn(rollout.logprobs.shape, generator=torch.Generator().manual_seed(0))
    rollout = rollout._replace(logprobs=rollout.logprobs + 0.3 * noise, reference_logprobs=rollout.logprobs - 0.2)
    members = [9, 2, 14, 7, 4]
    numbers = grpo.accumulate(cfg, models, rollout, members)
    actual = [p.grad.clone() for p in models.policy.parameters()]
    models.policy.zero_grad()
    loss = expected_loss(cfg, models, rollout, members)
    loss.backward()
    assert numbers["policy_loss"] + cfg.beta * numbers["kl_loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert 0 < numbers["clip_fraction"] < 1
    for gradient, parameter in zip(actual, models.policy.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def scripted(monkeypatch: pytest.MonkeyPatch, seed: int, rewards: Sequence[float]) -> list[Tensor]:
    """Held-out measurements give these rewards, one after the other; returns the output weights at each."""
    seen: list[Tensor] = []
    real = grpo.sample

    def sample(cfg: GRPOConfig, models: Models, prompts: Any, n: int, at: int) -> Any:
        ids, completions, scores = real(cfg, models, prompts, n, at)
        if at == seed:
            scores["reward"] = torch.full((len(prompts),), rewards[len(seen)])
            seen.append(models.policy.output.weight.detach().clone())
        return ids, completions, scores

    monkeypatch.setattr(grpo, "sample", sample)
    return seen


def test_training_stops_early_and_the_best_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = helpers.grpo_config(tmp_path, iterations=20, evaluate_every=1, patience=2, missing_eos_penalty=0.0)
    weights = scripted(monkeypatch, cfg.seed, [0.3, 0.6, 0.5, 0.6, 0.9])
    model_path = grpo.run(cfg)
    assert len(weights) == 4, "0.6 at 1 is the best; two measurements later training stops"
    done = json.loads((cfg.out / "done/grpo.json").read_text())
    assert done == {"best_iteration": 1, "held_out_reward": pytest.approx(math.log(1.5)), "left_out": 0}
    assert torch.equal(huggingface.load_model(model_path).output.weight, weights[1])
    assert not torch.equal(weights[1], weights[3])


def test_what_is_not_a_number_is_never_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = helpers.grpo_config(tmp_path, iterations=1, evaluate_every=1)
    scripted(monkeypatch, cfg.seed, [math.nan] * 2)
    with pytest.raises(DataError, match="no held-out measurement gave a number"):
        grpo.run(cfg)


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    for changes, said in (
        ({"group_size": 1}, "group_size is 1: an answer needs others"),
        ({"batch_size": 10}, "batch_size 10 is not a multiple of group_size 4"),
        ({"iterations": 0}, "iterations is 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            helpers.grpo_config(tmp_path, **changes)


def test_how_tokens_weigh_follows_the_advantage(tmp_path: Path) -> None:
    for advantage, average in (("grpo", "answer"), ("rloo", "token")):
        cfg = helpers.grpo_config(tmp_path, advantage=advantage)
        models = grpo.load(cfg, CPU)
        rollout, _ = grpo.collect(cfg, models, helpers.prompts(2), 0)
        rollout = rollout._replace(logprobs=rollout.logprobs - 0.1)
        numbers = [grpo.accumulate(c, models, rollout, list(range(8))) for c in (cfg, replace(cfg, average=average))]
        assert numbers[0] == pytest.approx(numbers[1])
        other = replace(cfg, average="token" if average == "answer" else "answer")
        assert grpo.accumulate(other, models, rollout, list(range(8)))["policy_loss"] != numbers[0]["policy_loss"]


@pytest.mark.parametrize("name", ["temperature", "inner_epochs", "held_out_prompts"])
def test_what_must_be_positive(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=name):
        helpers.grpo_config(tmp_path, **{name: 0})

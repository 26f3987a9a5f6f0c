"""What each choice beside the defaults does to the details that it concerns (test_ppo_details.py has the defaults')."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from puna import losses, optim, parallel
from puna.config import ConfigError
from puna.data import loader, rollouts, shards
from puna.generate import actor_critic
from puna.generate.actor_critic import Models
from puna.model.reward import RewardModel, ValueHead
from puna.run_folder import read_metrics
from puna.stages import ppo
from puna.stages.ppo import PPOConfig
from tests import helpers

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> PPOConfig:
    return helpers.ppo_config(tmp_path_factory.mktemp("ppo"))


def moved(cfg: PPOConfig, scale: float = 0.02) -> Models:
    """Models as after some iterations: the policy is not the reference any more."""
    models = ppo.load(cfg, CPU)
    with torch.no_grad():
        for parameter in models.policy.layers.parameters():
            parameter += scale * torch.randn_like(parameter)
    return models


def optimizer_of(cfg: PPOConfig, models: Models) -> torch.optim.Optimizer:
    return optim.adamw(cfg.optim, *(optim.groups(model, cfg.optim) for model in (models.policy, models.value)))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# The critic


@pytest.mark.parametrize("kind", ["zero_head", "shared"])
def test_h_a_head_of_zeros_values_everything_at_0(cfg: PPOConfig, kind: Any) -> None:
    cfg = replace(cfg, critic=kind)
    models = moved(cfg)
    assert isinstance(models.value, ValueHead if kind == "shared" else RewardModel)
    rollout, _, _ = ppo.collect(cfg, models, helpers.prompts(6), 0)
    assert not rollout.values.any()
    ppo.update(cfg, models, optimizer_of(cfg, models), rollout, cfg.beta, 0, 5)
    assert ppo.collect(cfg, models, helpers.prompts(6), 1)[0].values.any()


def test_a_zero_headed_critic_has_the_policys_body(cfg: PPOConfig) -> None:
    models = ppo.load(replace(cfg, critic="zero_head"), CPU)
    assert isinstance(models.value, RewardModel)
    body = models.value.body.state_dict()
    assert body and all(torch.equal(body[name], models.policy.state_dict()[name]) for name in body)
    assert models.value.body.tok_embeddings.weight is not models.policy.tok_embeddings.weight


def test_a_shared_critic_teaches_the_policys_body(cfg: PPOConfig) -> None:
    cfg = replace(cfg, critic="shared")
    models = moved(cfg)
    torch.nn.init.normal_(models.value.score.weight)
    rollout, _, _ = ppo.collect(cfg, models, helpers.prompts(6), 0)
    grads = []
    for coefficient in (0.0, 1.0):
        nothing = torch.zeros_like(rollout.values)  # no advantage: what reaches the body comes from the values
        weighted = replace(cfg, value_coefficient=coefficient)
        ppo.accumulate(weighted, models, rollout, ppo.Targets(nothing, rollout.values + 1), list(range(6)))
        grad = models.policy.layers[0].attention.wq.weight.grad  # type: ignore[union-attr]
        assert isinstance(grad, Tensor)
        grads.append(float(grad.abs().max()))
        models.trained.zero_grad()
    assert grads[0] == 0 < grads[1]


def test_a_shared_critics_values_are_its_heads_of_the_policys_states(cfg: PPOConfig) -> None:
    cfg = replace(cfg, critic="shared")
    models = moved(cfg)
    torch.nn.init.normal_(models.value.score.weight)
    rollout, _, _ = ppo.collect(cfg, models, helpers.prompts(6), 0)
    states = models.policy.hidden(rollout.tokens)[:, :-1]
    expected = (states @ models.value.score.weight[0]).detach()
    close(rollout.values[rollout.action_mask], expected[rollout.action_mask])
    separate, _, _ = ppo.collect(cfg, replace(models, value=helpers.reward_model()), helpers.prompts(6), 0)
    close(rollout.logprobs, separate.logprobs)


def test_t_a_shared_critics_warm_up_leaves_the_body(cfg: PPOConfig) -> None:
    cfg = replace(cfg, critic="shared", critic_warmup=1)
    models = moved(cfg)
    before = {name: x.clone() for name, x in models.policy.state_dict().items()}
    rollout, _, _ = ppo.collect(cfg, models, helpers.prompts(6), 0)
    ppo.update(cfg, models, optimizer_of(cfg, models), rollout, cfg.beta, 0, 5)
    assert all(torch.equal(x, before[name]) for name, x in models.policy.state_dict().items())
    assert models.value.score.weight.any()


# KL


def test_r_kl_in_one_sum_is_on_the_score(cfg: PPOConfig) -> None:
    cfg = replace(cfg, kl="sequence", beta=0.3)
    models, told = moved(cfg), {}
    rollout, _, _ = ppo.collect(cfg, models, helpers.prompts(8), 0)
    ppo.advantages_and_returns(cfg, rollout, cfg.beta, lambda **tensors: told.update(tensors))
    kl = losses.sequence_kl(rollout.logprobs, rollout.reference_logprobs, rollout.action_mask)
    assert kl.abs().max() > 1e-3
    for row, rewards in enumerate(told["rewards"]):
        last = int(rollout.action_mask[row].nonzero()[-1])
        assert rewards.nonzero().flatten().tolist() == [last]
        assert float(rewards[last]) == pytest.approx(float(rollout.scores[row] - 0.3 * kl[row]), abs=1e-6)


def test_s_an_adapted_beta_follows_kl(cfg: PPOConfig, tmp_path: Path) -> None:
    cfg = replace(cfg, out=tmp_path, kl_target=0.5, kl_horizon=80, dump=tmp_path / "dump", dump_iteration=2)
    ppo.run(cfg)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    beta = 0.01
    for line in lines:
        assert line["beta"] == beta
        beta *= 1 + min(max(line["kl"] / 0.5 - 1, -0.2), 0.2) * 8 / 80
    assert len({line["beta"] for line in lines}) == 5
    facts = rollouts.read(tmp_path / "dump").facts
    assert (facts["beta"], facts["beta_after"]) == (lines[2]["beta"], lines[3]["beta"]), "that of the dumped rewards"


# Scores and advantages


def test_k_running_moments_whiten_all_batches_so_far(cfg: PPOConfig) -> None:
    cfg = replace(cfg, whiten="running", missing_eos_penalty=0.0)
    models, moments, seen = ppo.load(cfg, CPU), losses.NO_MOMENTS, []
    for iteration in range(3):
        rewards = models.helpfulness.model.score.weight
        with torch.no_grad():
            rewards *= 1.5  # another scale each time
        rollout, _, moments = ppo.collect(cfg, models, helpers.prompts(8, seed=iteration), iteration, moments)
        seen.append(
            losses.logit(ppo.sample(cfg, models, helpers.prompts(8, seed=iteration), 1 + iteration)[2]["reward"])
        )
        so_far = torch.cat(seen)
        close(rollout.scores, (seen[-1] - so_far.mean()) / so_far.std(correction=0), 1e-4)


@pytest.mark.parametrize("logit", [True, False])
def test_k_scores_as_they_are(cfg: PPOConfig, logit: bool) -> None:
    cfg = replace(cfg, whiten="none", logit_scores=logit, missing_eos_penalty=0.0)
    models = ppo.load(cfg, CPU)
    rewards = ppo.sample(cfg, models, helpers.prompts(8), 1).scores["reward"]
    expected = torch.log(rewards / (1 - rewards)) if logit else rewards
    close(ppo.collect(cfg, models, helpers.prompts(8), 0)[0].scores, expected, 1e-4)


def test_u_clips_stop_at_their_size(cfg: PPOConfig) -> None:
    cfg = replace(cfg, score_clip=0.5, advantage_clip=0.7, missing_eos_penalty=3.0, max_new_tokens=1)
    models = moved(cfg)
    rollout, _, _ = ppo.collect(cfg, models, helpers.prompts(24), 0)
    assert 0 < int(rollout.finished.sum()) < 24
    close(rollout.scores[rollout.finished].abs().max(), torch.tensor(0.5))
    close(rollout.scores[~rollout.finished].min(), torch.tensor(-3.5))  # the penalty comes after the clip
    advantages, _ = ppo.advantages_and_returns(cfg, rollout, cfg.beta)
    free, _ = ppo.advantages_and_returns(replace(cfg, advantage_clip=0.0), rollout, cfg.beta)
    assert float(free.abs().max()) > 0.7
    close(advantages, free.clamp(-0.7, 0.7))


# Mixed pretraining


@pytest.fixture
def text(tmp_path: Path) -> Path:
    shards.write_shard(tmp_path / "text", helpers.sentences(200), helpers.tokenizer())
    return tmp_path / "text"


def test_text_adds_its_gradient(cfg: PPOConfig, text: Path) -> None:
    models, shard = ppo.load(cfg, CPU), shards.read_shard(text, helpers.tokenizer())
    inputs, targets = loader.windows(shard, 16, 6, 0, 0)
    grads = []
    for max_tokens in (16, 10**6):
        loss = actor_critic.accumulate_text(models, inputs, targets, 2.0, max_tokens)
        grads.append([p.grad.clone() for p in models.policy.parameters() if p.grad is not None])
        models.policy.zero_grad()
    expected = torch.nn.functional.cross_entropy(models.policy(inputs).flatten(0, 1), targets.flatten())
    assert loss == pytest.approx(float(expected.detach()), abs=1e-5)
    (2 * expected).backward()  # type: ignore[no-untyped-call]
    for *of_cuts, parameter in zip(*grads, models.policy.parameters(), strict=True):
        for grad in of_cuts:
            assert parameter.grad is not None
            close(grad, parameter.grad, 1e-6)


def test_mixed_pretraining_keeps_the_text_likely(cfg: PPOConfig, text: Path, tmp_path: Path) -> None:
    mixed = {"pretrain_data": text, "pretrain_coefficient": 5.0, "pretrain_windows": 4, "pretrain_seq_len": 16}
    ppo.run(replace(cfg, out=tmp_path / "mixed", **mixed))
    lines = [line["pretrain_loss"] for line in read_metrics(tmp_path / "mixed/metrics.jsonl")]
    assert lines[-1] < lines[0] - 0.1
    with pytest.raises(ConfigError, match="pretrain_data and pretrain_coefficient go together"):
        replace(cfg, pretrain_data=text)


def test_every_gradient_step_has_windows_of_its_own(
    cfg: PPOConfig, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        loader, "windows", lambda shard, length, n, step, seed: asked.append(step) or (torch.ones(1, 4).long(),) * 2
    )
    mixed = {"pretrain_data": text, "pretrain_coefficient": 1.0, "inner_epochs": 2, "critic_warmup": 1}
    cfg = replace(cfg, **mixed)
    models, shard = ppo.load(cfg, CPU), shards.read_shard(text, helpers.tokenizer())
    rollout, _, _ = ppo.collect(cfg, models, helpers.prompts(7), 0)
    for iteration in range(3):  # two mini-batches, twice; none in the warm-up
        ppo.update(
            cfg,
            models,
            optimizer_of(cfg, models),
            rollout,
            cfg.beta,
            iteration,
            3,
            text=shard,
        )
    assert asked == list(range(4, 12))


# Sampling, monitors, resuming


def test_the_engine_may_sample_in_bfloat16(cfg: PPOConfig) -> None:
    models = moved(cfg)
    copy = actor_critic.sampler(models.policy, "bf16", CPU)
    if parallel.dtype("bf16", CPU) == torch.float32:
        pytest.skip("this machine has no bfloat16 arithmetic")
    assert {p.dtype for p in copy.parameters() if p.ndim > 1} == {torch.bfloat16}
    assert torch.equal(copy.rotary, models.policy.rotary) and models.policy.output.weight.dtype == torch.float32
    rollout, _, _ = ppo.collect(replace(cfg, sample_precision="bf16"), models, helpers.prompts(8), 0)
    assert rollout.logprobs.dtype == torch.float32 and rollout.action_mask.any(dim=1).all()


def test_a_gold_model_is_asked_and_not_followed(cfg: PPOConfig, tmp_path: Path) -> None:
    gold = helpers.reward_folder(tmp_path / "gold", 7)
    numbers = []
    for name, path in (("with", gold), ("without", None)):
        ppo.run(replace(cfg, out=tmp_path / name, gold=path))
        numbers.append(read_metrics(tmp_path / name / "metrics.jsonl"))
    for one, other in zip(*numbers, strict=True):
        assert 0 < one["gold"] < 1 and "gold" not in other
        assert {key: one[key] for key in ("reward", "kl", "policy_loss")} == {
            key: other[key] for key in ("reward", "kl", "policy_loss")
        }


def test_a_sign_is_said_written_and_may_stop(
    cfg: PPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signs = lambda history: {"length": "answers grow"} if len(history) >= 2 else {}  # noqa: E731
    monkeypatch.setattr(ppo.monitors, "signs", signs)
    for stop, steps in ((False, 5), (True, 2)):
        out = tmp_path / str(stop)
        ppo.run(replace(cfg, out=out, stop_on_hacking=stop))
        assert capsys.readouterr().err.count("ppo: warning: answers grow\n") == 1, "when it begins"
        warnings = [line["warnings"] for line in read_metrics(out / "metrics.jsonl")]
        assert warnings == ["", *["answers grow"] * (steps - 1)]
        assert (out / "model/model.safetensors").exists()


def test_a_policy_whose_last_iteration_shows_a_sign_is_not_measured(
    cfg: PPOConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppo.monitors, "signs", lambda history: {"length": "grow"} if len(history) == 5 else {})
    for stop in (False, True):
        ppo.run(replace(cfg, out=tmp_path / str(stop), stop_on_hacking=stop))
        assert (tmp_path / str(stop) / "held_out/0005.jsonl").exists() != stop


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


@pytest.mark.parametrize("kill", [2, 3])
def test_z_every_choice_resumes_bit_for_bit(
    cfg: PPOConfig, text: Path, tmp_path: Path, kill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices: dict[str, Any] = {"critic": "shared", "kl": "sequence", "kl_target": 0.2, "kl_horizon": 80}
    choices |= {"whiten": "running", "score_clip": 2.0, "pretrain_data": text, "pretrain_coefficient": 1.0}
    cfg = replace(cfg, **choices, pretrain_windows=2, pretrain_seq_len=16, sample_precision="bf16")
    real, found = ppo.update, []

    def update(*arguments: Any) -> Any:
        if arguments[5] == kill and not found:
            found.append(1)
            raise Killed
        return real(*arguments)

    ppo.run(replace(cfg, out=tmp_path / "whole", dump=tmp_path / "whole/dump", dump_iteration=4))
    monkeypatch.setattr(ppo, "update", update)
    broken = replace(cfg, out=tmp_path / "broken", dump=tmp_path / "broken/dump", dump_iteration=4)
    with pytest.raises(Killed):
        ppo.run(broken)
    ppo.run(broken)
    traces = [
        [
            {k: v for k, v in line.items() if not k.startswith(("seconds", "tokens_per_second"))}
            for line in read_metrics(out / "metrics.jsonl")
        ]
        for out in (tmp_path / "whole", tmp_path / "broken")
    ]
    assert traces[0] == traces[1] and len(traces[0]) == 5
    for name in ("model/model.safetensors", "dump/rollout.safetensors", "dump/rollout.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    assert json.loads((tmp_path / "whole/dump/rollout.json").read_text())["beta"] != 0.01

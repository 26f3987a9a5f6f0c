"""PPO from models and prompts to the best policy."""

from __future__ import annotations

import gc
import json
import math
import shutil
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from puna import losses, parallel
from puna.config import ConfigError, DataError
from puna.data import loader, rollouts
from puna.formats import huggingface
from puna.generate import actor_critic, held_out
from puna.generate.scoring import Scorer
from puna.model.reward import RewardModel
from puna.run_folder import read_metrics
from puna.stages import ppo
from puna.stages.ppo import Models, PPOConfig
from puna.text import chat
from tests import helpers

CONTEXT = helpers.config().max_seq_len


def scripted(monkeypatch: pytest.MonkeyPatch, seed: int, rewards: Sequence[float]) -> list[Tensor]:
    """Held-out measurements give these rewards, one after the other; returns the output weights at each."""
    seen: list[Tensor] = []
    real = ppo.sample

    def sample(cfg: PPOConfig, models: Models, prompts: Any, at: int) -> Any:
        sampled = real(cfg, models, prompts, at)
        if at == seed:
            sampled.scores["reward"] = torch.full((len(prompts),), rewards[len(seen)])
            seen.append(models.policy.output.weight.detach().clone())
        return sampled

    monkeypatch.setattr(ppo, "sample", sample)
    return seen


def test_a_chat_model_becomes_a_policy(tmp_path: Path) -> None:
    cfg = helpers.ppo_config(tmp_path)
    model_path = ppo.run(cfg)
    lines = read_metrics(tmp_path / "ppo/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(5))
    names = [
        "reward",
        "helpfulness",
        "safety",
        "kl",
        "length",
        "finished",
        "policy_loss",
        "value_loss",
        "clip_fraction",
    ]
    for name in [*names, "approximate_kl", "entropy", "grad_norm", "explained_variance", "repetition", "seconds_score"]:
        assert all(isinstance(line[name], float) for line in lines), name
    assert all(0 < line[name] < 1 for line in lines for name in ("reward", "helpfulness", "safety"))
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5) and lines[-1]["kl"] != 0
    done = json.loads((tmp_path / "ppo/done/ppo.json").read_text())
    measured = sorted(path.stem for path in (tmp_path / "ppo/held_out").iterdir())
    assert measured == ["0000", "0002", "0004", "0005"]
    means = {name: held_out_reward(tmp_path / f"ppo/held_out/{name}.jsonl") for name in measured}
    best = max(measured, key=lambda name: means[name])
    assert done["best_iteration"] == int(best) and done["held_out_reward"] == pytest.approx(means[best], abs=1e-5)
    provenance = json.loads((model_path / "puna.json").read_text())
    assert provenance == {"stage": "ppo", "parent": str(cfg.init), "iteration": int(best)}


def held_out_reward(path: Path) -> float:
    """The mean logit, less the penalty of 1 for an answer that did not end."""
    lines = helpers.read_lines(path)
    logits = losses.logit(torch.tensor([line["reward"] for line in lines]))
    return float((logits - torch.tensor([1.0 * (not line["finished"]) for line in lines])).mean())


def test_a_reward_that_can_be_learned_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def score_tokens(self: Scorer, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([0.05 + 0.9 * sum(t % 2 for t in row[-5:-1]) / 4 for row in rows])  # odd words are good

    monkeypatch.setattr(Scorer, "score_tokens", score_tokens)
    cfg = helpers.ppo_config(tmp_path, iterations=25, batch_size=16, mini_batch_size=8, threshold=0.0, patience=0)
    ppo.run(replace(cfg, evaluate_every=25, checkpoint_every=25, optim=replace(cfg.optim, lr=3e-3)))
    rewards = [line["reward"] for line in read_metrics(tmp_path / "ppo/metrics.jsonl")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


def test_training_stops_early_and_the_best_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = helpers.ppo_config(tmp_path, iterations=20, evaluate_every=1, patience=2)
    weights = scripted(monkeypatch, cfg.seed, [0.3, 0.6, 0.5, 0.6, 0.9])
    model_path = ppo.run(cfg)
    # 0.6 at iteration 1 is the best; two measurements later, at 3, an equal one is no better: training stops.
    assert len(weights) == 4
    assert [line["step"] for line in read_metrics(tmp_path / "ppo/metrics.jsonl")] == [0, 1, 2]
    done = json.loads((tmp_path / "ppo/done/ppo.json").read_text())
    assert done["best_iteration"] == 1
    assert done["held_out_reward"] == pytest.approx(float(losses.logit(torch.tensor(0.6))))
    assert torch.equal(huggingface.load_model(model_path).output.weight, weights[1])
    assert not torch.equal(weights[1], weights[3])


def test_without_patience_it_goes_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = helpers.ppo_config(tmp_path, iterations=4, evaluate_every=1, patience=0)
    weights = scripted(monkeypatch, cfg.seed, [0.9, 0.5, 0.4, 0.3, 0.2])
    model_path = ppo.run(cfg)
    assert len(weights) == 5
    assert torch.equal(huggingface.load_model(model_path).output.weight, weights[0]), "the first was the best"


def test_what_is_not_a_number_is_never_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = helpers.ppo_config(tmp_path, iterations=2, evaluate_every=1, patience=0)
    with monkeypatch.context() as patch:
        weights = scripted(patch, cfg.seed, [math.nan, 0.4, math.nan])
        model_path = ppo.run(cfg)
    assert json.loads((tmp_path / "ppo/done/ppo.json").read_text())["best_iteration"] == 1
    assert torch.equal(huggingface.load_model(model_path).output.weight, weights[1])
    scripted(monkeypatch, cfg.seed, [math.nan] * 3)
    with pytest.raises(DataError, match="no held-out measurement gave a number"):
        ppo.run(replace(cfg, out=tmp_path / "again"))


def test_a_killed_run_publishes_the_best_it_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = helpers.ppo_config(tmp_path, iterations=4, evaluate_every=1, checkpoint_every=2, patience=0)
    with monkeypatch.context() as patch:
        weights = scripted(patch, cfg.seed, [0.3, 0.6, 0.9])
        patch.setattr(ppo, "update", interrupted_at(2))
        with pytest.raises(KeyboardInterrupt):
            ppo.run(cfg)
    # Iteration 2 was measured as the best, after the last checkpoint; the resumed run finds that it is not.
    scripted(monkeypatch, cfg.seed, [0.5, 0.4, 0.4])
    model_path = ppo.run(cfg)
    assert json.loads((tmp_path / "ppo/done/ppo.json").read_text())["best_iteration"] == 1
    assert torch.equal(huggingface.load_model(model_path).output.weight, weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert not (tmp_path / "ppo/best").exists(), "the others are removed"


def test_policies_that_no_checkpoint_needs_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = helpers.ppo_config(tmp_path, iterations=6, evaluate_every=1, checkpoint_every=1, patience=0)
    with monkeypatch.context() as patch:
        scripted(patch, cfg.seed, [0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
        patch.setattr(ppo, "update", interrupted_at(5))
        with pytest.raises(KeyboardInterrupt):
            ppo.run(cfg)
    *_, newest = sorted((cfg.out / "checkpoints").glob("step_*"))
    kept = sorted(int(path.name) for path in (cfg.out / "best").iterdir())
    assert kept in ([2, 3, 4, 5], [3, 4, 5]), "as the fifth checkpoint is written before the sixth measurement, or not"
    shutil.rmtree(newest)  # as a damaged one is; the run goes on from the one before it, whose best is the third
    weights = scripted(monkeypatch, cfg.seed, [0.1, 0.1, 0.1])
    model_path = ppo.run(cfg)
    assert json.loads((tmp_path / "ppo/done/ppo.json").read_text())["best_iteration"] == 3
    assert json.loads((model_path / "puna.json").read_text())["iteration"] == 3 and len(weights) == 3


def test_a_model_is_published_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(source: Path, target: Path, **_: Any) -> None:
        (target / "config.json").write_text("{")
        raise KeyboardInterrupt

    cfg = helpers.ppo_config(tmp_path, iterations=1)
    with monkeypatch.context() as patch:
        patch.setattr(held_out.shutil, "copytree", torn)
        with pytest.raises(KeyboardInterrupt):
            ppo.run(cfg)
    assert not (cfg.out / "model").exists()
    assert huggingface.load_model(ppo.run(cfg))


def test_ranks_send_each_other_their_own_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Tensor] = []
    real = parallel.spread

    def spread(work: Any, items: Any, **settings: Any) -> Any:
        results = real(work, items, **settings)
        sent.extend(result for result in results if isinstance(result, Tensor))
        return results

    monkeypatch.setattr(parallel, "spread", spread)
    cfg = helpers.ppo_config(tmp_path)
    ppo.collect(cfg, ppo.load(cfg, torch.device("cpu")), helpers.prompts(8), 0)
    assert len(sent) == 8
    for row in sent:  # a tensor is pickled with its storage
        assert row.untyped_storage().nbytes() == row.numel() * row.element_size()


def test_the_weights_that_sampled_are_freed_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    real = actor_critic.sampler

    def sampler(*arguments: Any) -> Any:
        copy = real(*arguments)
        made.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(actor_critic, "sampler", sampler)
    cfg = helpers.ppo_config(tmp_path, sample_precision="bf16")
    models = ppo.load(cfg, torch.device("cpu"))
    ppo.sample(cfg, models, helpers.prompts(4), 0)
    gc.collect()
    assert len(made) == 1 and made[0]() is None


def test_nothing_is_gathered_for_a_dump_that_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def places(*arguments: Any) -> Tensor:
        raise AssertionError("no dump was asked for")

    monkeypatch.setattr(rollouts, "places", places)
    ppo.run(helpers.ppo_config(tmp_path, iterations=1))


def interrupted_at(last: int) -> Any:
    """An update that is interrupted in this iteration."""
    real = ppo.update

    def update(*arguments: Any) -> Any:
        if arguments[5] == last:
            raise KeyboardInterrupt
        return real(*arguments)

    return update


def test_epochs_are_as_many_as_the_iterations_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = [], loader.steps_of_epochs

    def spy(n: int, size: int, epochs: int, *rest: Any, **named: Any) -> Any:
        asked.append((n, size, epochs))
        return real(n, size, epochs, *rest, **named)

    monkeypatch.setattr(loader, "steps_of_epochs", spy)
    ppo.run(helpers.ppo_config(tmp_path, iterations=4))
    assert asked[0] == (30, 8, 2), "three iterations an epoch"
    assert asked[1:] == [(8, 4, 1)] * 4, "and an iteration's mini-batches"
    assert [line["step"] for line in read_metrics(tmp_path / "ppo/metrics.jsonl")] == [0, 1, 2, 3]


def test_no_mini_batch_is_far_smaller_than_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, real = [], ppo.accumulate

    def spy(*arguments: Any) -> Any:
        sizes.append(len(arguments[4]))
        return real(*arguments)

    monkeypatch.setattr(ppo, "accumulate", spy)
    ppo.run(helpers.ppo_config(tmp_path, iterations=1, batch_size=9, mini_batch_size=4))
    assert sizes == [3, 3, 3]


def test_logits_are_made_for_actions_alone() -> None:
    policy = helpers.model()
    tokens = torch.randint(3, 300, (3, 7))
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    logits = actor_critic.action_logits(policy, tokens, mask)
    assert logits.shape == (6, helpers.VOCAB), "six actions"
    logprobs = actor_critic.scatter(losses.token_logprobs(logits, tokens[:, 1:][mask], 0.8), mask)
    expected = (policy(tokens)[:, :-1] / 0.8).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs, expected * mask, rtol=0, atol=1e-5)
    assert not logprobs[~mask].any()


def test_the_reference_and_the_reward_models_stay(tmp_path: Path) -> None:
    cfg = helpers.ppo_config(tmp_path)
    models = ppo.load(cfg, torch.device("cpu"))
    frozen = [models.reference, models.helpfulness.model, models.safety.model]
    before = [[p.clone() for p in model.parameters()] for model in frozen]
    optimizer = ppo.optim.adamw(cfg.optim, *(ppo.optim.groups(m, cfg.optim) for m in (models.policy, models.value)))
    rollout, _, _ = ppo.collect(cfg, models, helpers.prompts(8), 0)
    ppo.update(cfg, models, optimizer, rollout, cfg.beta, 0, 5)
    for model, weights in zip(frozen, before, strict=True):
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
        assert all(p.grad is None for p in model.parameters())
    assert models.value is not models.helpfulness.model
    assert all(p.grad is None for m in (models.policy, models.value) for p in m.parameters())


def test_rollouts_are_what_was_sampled(tmp_path: Path) -> None:
    cfg, prompts = helpers.ppo_config(tmp_path, temperature=0.9, threshold=0.5), helpers.prompts(10)
    models = ppo.load(cfg, torch.device("cpu"))
    rollout, numbers, _ = ppo.collect(cfg, models, prompts, iteration=4)
    _, completions, scores, _ = ppo.sample(cfg, models, prompts, cfg.seed + 5)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = chat.encode_prompt(prompt["messages"], models.tokenizer)
        whole = ids + completion.tokens
        assert rollout.tokens[row, : len(whole)].tolist() == whole
        assert (rollout.tokens[row, len(whole) :] == models.tokenizer.pad_id).all()
        actions = rollout.action_mask[row].nonzero().flatten().tolist()
        assert actions == list(range(len(ids) - 1, len(whole) - 1))
        assert bool(rollout.finished[row]) == completion.finished
    combined = torch.where(
        torch.tensor([p["is_safety"] for p in prompts]) | (scores["safety"] < 0.5),
        scores["safety"],
        scores["helpfulness"],
    )
    assert torch.equal(scores["reward"], combined)
    expected = losses.whiten(torch.log(combined / (1 - combined))) - 1.0 * ~rollout.finished
    torch.testing.assert_close(rollout.scores, expected, rtol=0, atol=1e-4)
    assert numbers["length"] == pytest.approx(sum(len(c.tokens) for c in completions) / 10)


def test_held_out_prompts_are_not_trained_on(tmp_path: Path) -> None:
    cfg = replace(helpers.ppo_config(tmp_path), held_out=(), held_out_prompts=10)
    train, held_out, _ = ppo.read(cfg, helpers.tokenizer(), CONTEXT)
    ids = [{prompt["id"] for prompt in part} for part in (train, held_out)]
    assert (len(ids[0]), len(ids[1])) == (20, 10) and not ids[0] & ids[1]
    assert {prompt["is_safety"] for prompt in held_out} == {True, False}
    with pytest.raises(ConfigError, match="held_out_prompts is 30 of 30"):
        ppo.read(replace(cfg, held_out_prompts=30), helpers.tokenizer(), CONTEXT)


def test_few_held_out_prompts_are_of_both_kinds(tmp_path: Path) -> None:
    plain = [prompt | {"is_safety": False} for prompt in helpers.prompts(40)]
    tagged = [prompt | {"id": f"s{prompt['id']}"} for prompt in plain]
    files = [helpers.write_lines(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((plain, tagged))]
    cfg = helpers.ppo_config(tmp_path, held_out=(files[0],), safety_held_out=(files[1],), held_out_prompts=20)
    _, held_out, _ = ppo.read(cfg, helpers.tokenizer(), CONTEXT)
    assert len(held_out) == 20 and {prompt["is_safety"] for prompt in held_out} == {True, False}


def test_prompts_that_fill_the_context_are_left_out(tmp_path: Path) -> None:
    long = {"id": "long", "messages": [helpers.user("where is the llama " * 60)], "is_safety": False}
    data, held_out = (
        helpers.write_lines(tmp_path / name, [*helpers.prompts(8), long]) for name in ("some.jsonl", "others.jsonl")
    )
    ppo.run(helpers.ppo_config(tmp_path, prompts=(data,), held_out=(held_out,), iterations=1))
    assert json.loads((tmp_path / "ppo/done/ppo.json").read_text())["left_out"] == 2
    nothing = helpers.write_lines(tmp_path / "none.jsonl", [])
    with pytest.raises(DataError, match=r"none\.jsonl: there is no prompt"):
        ppo.run(helpers.ppo_config(tmp_path, out=tmp_path / "none", prompts=(nothing,)))


def test_long_prompts_are_left_out(tmp_path: Path) -> None:
    long = {"id": "long", "messages": [helpers.user("where is the llama " * 9)], "is_safety": False}
    data = helpers.write_lines(tmp_path / "some.jsonl", [*helpers.prompts(5), long])
    cfg = helpers.ppo_config(tmp_path, prompts=(data,), max_prompt_tokens=60)
    prompts, _, left_out = ppo.read(cfg, helpers.tokenizer(), CONTEXT)
    assert {prompt["id"] for prompt in prompts} == {f"p{i}" for i in range(5)} and left_out == 1


def test_patience_and_beta_wait_for_the_critic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = helpers.ppo_config(tmp_path, iterations=6, evaluate_every=1, patience=2, critic_warmup=3, kl_target=2.0)
    scripted(monkeypatch, cfg.seed, [0.9, *[0.1] * 6])
    ppo.run(cfg)
    lines = read_metrics(tmp_path / "ppo/metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4], "3 + 2 is where patience ends"
    assert [line["beta"] for line in lines[:4]] == [cfg.beta] * 4 and lines[4]["beta"] < cfg.beta


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inner_epochs": 0}, "inner_epochs"),
        ({"held_out_prompts": 0}, "held_out_prompts"),
        ({"kl_target": -1.0}, "kl_target is -1.0"),
        ({"kl_target": 1.0, "kl_horizon": 7}, r"at least batch_size \(8\)"),
        ({"pretrain_data": Path("text"), "pretrain_coefficient": -1.0}, "pretrain_coefficient is -1.0"),
        ({"dump": Path("dump"), "dump_iteration": 5}, "dump_iteration is 5 of 5"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        helpers.ppo_config(tmp_path, **changes)


def test_text_without_a_window_is_refused(tmp_path: Path) -> None:
    cfg = helpers.ppo_config(tmp_path, pretrain_data=tmp_path / "text", pretrain_coefficient=1.0)
    with pytest.raises(ConfigError, match="no token shard"):
        ppo.run(cfg)


def test_a_reward_model_of_a_shorter_context_is_refused(tmp_path: Path) -> None:
    short = RewardModel(helpers.model(max_seq_len=128))
    huggingface.save_reward_model(short, helpers.tokenizer(), tmp_path / "short")
    with pytest.raises(ConfigError, match=r"short: this model's context is 128 tokens, .* 256"):
        ppo.load(helpers.ppo_config(tmp_path, gold=tmp_path / "short"), torch.device("cpu"))

"""Rejection sampling: the best of K under today's reward models, at the best temperature, pooled over the rounds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.config import DataError
from puna.formats import huggingface
from puna.run_folder import fingerprint, read_metrics
from puna.stages import rejection_sampling, sft
from puna.stages.rejection_sampling import RejectionSamplingConfig
from puna.text import chat
from puna.text import tokenizer as tokenizers
from puna.types import Completion
from tests import helpers

CPU = torch.device("cpu")
BF16 = 0.01  # scores are computed in bfloat16, and round otherwise in other batches


def config(folder: Path, **changes: Any) -> RejectionSamplingConfig:
    models = {
        "init": helpers.talker_folder(folder / "chat"),
        "reward_helpfulness": helpers.reward_folder(folder / "helpfulness", 1),
        "reward_safety": helpers.reward_folder(folder / "safety", 2),
    }
    prompts = (helpers.write_lines(folder / "prompts.jsonl", helpers.prompts(20)),)
    shape = {"samples": 5, "search_prompts": 4, "max_new_tokens": 12, "shard_size": 8}
    return RejectionSamplingConfig(**({"out": folder / "v1/sampling", "prompts": prompts} | models | shape | changes))


def test_the_best_of_k_is_kept(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    assert rejection_sampling.run(cfg) == tmp_path / "v1/sampling"
    curve = json.loads((tmp_path / "v1/sampling/curve.json").read_text())
    best = helpers.read_lines(tmp_path / "v1/sampling/best.jsonl")
    assert len(best) > 15
    models = rejection_sampling.load(cfg, CPU)
    for record in best:
        assert record["model"] == fingerprint(cfg.init)
        assert record["round"] == "v1" and record["temperature"] == curve["temperature"]
        assert record["reward"] >= record["reward_median"] and record["reward"] >= record["reward_mean"]
        reward = models.reward([record["messages"]], [record["is_safety"]])
        assert record["reward"] == pytest.approx(float(reward), abs=BF16)
    assert helpers.read_lines(tmp_path / "v1/sampling/pool.jsonl") == best
    done = json.loads((tmp_path / "v1/sampling/done/rejection_sampling.json").read_text())
    counts = {"best": len(best), "pool": len(best), "doubles": 0, "left_out": 0}
    assert done == {"temperature": curve["temperature"], **counts, **rejection_sampling.gained(best)}
    assert 0.5 < done["improved"] < 1 and done["gain"] > 0, "of five answers the first is seldom the best"


def scripted(monkeypatch: pytest.MonkeyPatch, rewards: dict[float, list[list[float]]], text: str = "yes") -> None:
    """`draw` gives these rewards, of usable answers where they are above 0."""

    def draw(cfg: Any, models: Any, prompts: Any, temperature: float, seed: int) -> Any:
        table = rewards[temperature]
        answers = [[Completion(f"{text} {j}", [5, 2], [-1.0, -1.0], r > 0) for j, r in enumerate(row)] for row in table]
        return answers, torch.tensor(table)

    monkeypatch.setattr(rejection_sampling, "draw", draw)


def test_the_temperature_with_the_highest_best_reward_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # 0.7 has the higher mean, 1.0 the higher mean of the best of 4.
    scripted(
        monkeypatch,
        {0.7: [[0.5, 0.5, 0.5, 0.5], [0.6, 0.6, 0.6, 0.6]], 1.0: [[0.1, 0.9, 0.1, 0.1], [0.3, 0.2, 0.2, 0.7]]},
    )
    cfg = config(tmp_path, samples=4, temperatures=(0.7, 1.0))
    curve = rejection_sampling.search(cfg, None, helpers.prompts(2))
    assert curve["temperature"] == 1.0
    points = {(p["temperature"], p["samples"]): p for p in curve["points"]}
    assert sorted(points) == [(t, k) for t in (0.7, 1.0) for k in (1, 2, 4)]
    assert points[1.0, 1]["max"] == pytest.approx(0.2)  # the first answers: (0.1 + 0.3) / 2
    assert points[1.0, 2]["max"] == pytest.approx(0.6)
    assert points[1.0, 4]["max"] == pytest.approx(0.8)
    assert points[1.0, 4]["mean"] == pytest.approx(2.6 / 8)
    assert points[1.0, 4]["median"] == pytest.approx((0.1 + 0.25) / 2)


def test_select_takes_the_argmax(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scripted(monkeypatch, {1.0: [[0.2, 0.7, 0.4], [0.0, 0.0, 0.0], [0.9, 0.1, 0.1]]})
    records = rejection_sampling.select(config(tmp_path), None, helpers.prompts(3), 1.0, 0)
    assert [(r["prompt_id"], r["messages"][-1]["content"]) for r in records] == [("p0", "yes 1"), ("p2", "yes 0")]
    assert [r["is_safety"] for r in records] == [False, False]
    assert records[0]["reward"] == pytest.approx(0.7) and records[0]["reward_mean"] == pytest.approx(1.3 / 3)


def test_rewards_are_the_papers_and_unended_answers_get_none(tmp_path: Path) -> None:
    cfg = config(tmp_path, max_new_tokens=3, threshold=0.6)
    models, prompts = rejection_sampling.load(cfg, CPU), helpers.prompts(12)
    completions, rewards = rejection_sampling.draw(cfg, models, prompts, 1.0, seed=1)
    assert rewards.shape == (12, 5)
    usable = torch.tensor([[chat.usable(c) for c in row] for row in completions])
    assert usable.any() and not usable.all()
    assert (rewards[~usable] == 0).all()
    for i, j in usable.nonzero().tolist():
        dialog = [*prompts[i]["messages"], helpers.assistant(completions[i][j].text.strip())]
        safety, helpfulness = float(models.safety([dialog])), float(models.helpfulness([dialog]))
        expected = safety if prompts[i]["is_safety"] or safety < 0.6 else helpfulness
        assert float(rewards[i, j]) == pytest.approx(expected, abs=BF16)


def test_an_answer_that_outgrows_the_context_once_it_is_encoded_anew_gets_none(tmp_path: Path) -> None:
    cfg = config(tmp_path, samples=2)
    models, (prompt,) = rejection_sampling.load(cfg, CPU), helpers.prompts(1)
    answered = chat.with_answer(prompt["messages"], "yes")

    class Full:
        """An engine whose first answer fills the context, and whose second takes a token more than was sampled."""

        tokenizer = models.engine.tokenizer
        context = len(chat.encode(answered, tokenizer).tokens)

        def generate(self, *_: Any, **__: Any) -> list[list[Completion]]:
            return [[Completion(text, [5, 2], [-1.0, -1.0], True) for text in ("yes", "yes, zebra")]]

    _, rewards = rejection_sampling.draw(cfg, replace(models, engine=Full()), [prompt], 1.0, 0)
    assert rewards[0, 0] > 0 and rewards[0, 1] == 0


def test_earlier_rounds_are_pooled_and_judged_anew(tmp_path: Path) -> None:
    first = config(tmp_path)
    rejection_sampling.run(first)
    path = tmp_path / "v1/sampling/best.jsonl"
    old = [record | {"reward": 0.999} for record in helpers.read_lines(path)]  # what the old models thought of them
    stray = old[0] | {"prompt_id": "only_then"}
    helpers.write_lines(path, [*old, stray])
    chat_model = helpers.talker_folder(tmp_path / "chat2", seed=5)
    cfg = replace(first, out=tmp_path / "v2/sampling", init=chat_model, earlier=(path,), seed=7)
    rejection_sampling.run(cfg)
    new = {record["prompt_id"]: record for record in helpers.read_lines(tmp_path / "v2/sampling/best.jsonl")}
    pool = {record["prompt_id"]: record for record in helpers.read_lines(tmp_path / "v2/sampling/pool.jsonl")}
    models = rejection_sampling.load(cfg, CPU)
    rescored = {r["prompt_id"]: float(models.reward([r["messages"]], [r["is_safety"]])) for r in [*old, stray]}
    assert set(pool) == set(new) | set(rescored) and "only_then" in pool
    rounds = set()
    for prompt_id, record in pool.items():
        candidates = [(rescored[prompt_id], "v1")] if prompt_id in rescored else []
        candidates += [(new[prompt_id]["reward"], "v2")] if prompt_id in new else []
        reward, version = max(candidates)
        assert record["reward"] == pytest.approx(reward, abs=BF16)
        assert record["round"] == version or abs(candidates[0][0] - candidates[1][0]) < BF16
        rounds.add(record["round"])
    assert rounds == {"v1", "v2"}


def test_two_prompts_of_one_id_are_both_pooled(tmp_path: Path) -> None:
    old, new = ({"messages": [helpers.user(text), helpers.assistant("Here.")]} for text in ("Where?", "Who?"))
    both = {"prompt_id": "p0", "is_safety": False, "reward": 0.5}
    earlier = helpers.write_lines(tmp_path / "best.jsonl", [old | both])
    cfg = config(tmp_path, earlier=(earlier,))
    pool = rejection_sampling.pooled(cfg, rejection_sampling.load(cfg, CPU), [new | both])
    assert [record["messages"] for record in pool] == [new["messages"], old["messages"]]


def test_a_dialog_stands_in_the_pool_once() -> None:
    said = [[helpers.user("Where?"), helpers.assistant(answer)] for answer in ("Here.", "There.", "Here.")]
    records = [{"prompt_id": f"p{i}", "messages": dialog} for i, dialog in enumerate(said)]
    assert [record["prompt_id"] for record in rejection_sampling.distinct(records)] == ["p0", "p1"]


def test_what_selection_gains() -> None:
    best = [{"reward": 0.75, "reward_first": 0.25}, {"reward": 0.5, "reward_first": 0.5}]
    assert rejection_sampling.gained(best) == {"improved": 0.5, "gain": 0.25}


def test_a_smaller_model_learns_what_a_larger_one_selected(tmp_path: Path) -> None:
    rejection_sampling.run(config(tmp_path))
    other = tokenizers.train([*helpers.sentences(300, seed=9), "[INST] [/INST]"], 320, tmp_path / "tokenizer")
    huggingface.save_model(helpers.model(dim=16, n_layers=1, vocab_size=320), other, tmp_path / "small")
    best = (tmp_path / "v1/sampling/best.jsonl",)
    cfg = helpers.sft_config(tmp_path, init=tmp_path / "small", data=best, epochs=8, optim=helpers.quick(1e-2))
    model = huggingface.load_model(sft.run(cfg))
    assert model.config.dim == 16 and tokenizers.load(cfg.out / "model").sha256 == other.sha256
    losses = [line["loss"] for line in read_metrics(cfg.out / "metrics.jsonl")]
    assert losses[-1] < 0.9 * losses[0]


def test_a_limit_keeps_both_kinds_of_prompts(tmp_path: Path) -> None:
    plain = helpers.write_lines(tmp_path / "plain.jsonl", helpers.prompts(30, safety_every=99)[2:])
    tagged = helpers.write_lines(tmp_path / "tagged.jsonl", [p | {"id": f"s{p['id']}"} for p in helpers.prompts(30)])
    cfg = config(tmp_path, prompts=(plain,), safety_prompts=(tagged,), limit=20, samples=2)
    rejection_sampling.run(cfg)
    kinds = {record["is_safety"] for record in helpers.read_lines(tmp_path / "v1/sampling/best.jsonl")}
    assert kinds == {True, False}


def test_a_prompt_that_fills_the_context_is_left_out(tmp_path: Path) -> None:
    long = {"id": "long", "messages": [helpers.user("where is the llama " * 60)], "is_safety": True}
    prompts = helpers.write_lines(tmp_path / "some.jsonl", [*helpers.prompts(8), long])
    rejection_sampling.run(config(tmp_path, prompts=(prompts,), samples=2))
    done = json.loads((tmp_path / "v1/sampling/done/rejection_sampling.json").read_text())
    assert done["left_out"] == 1 and 0 < done["best"] <= 8


def test_no_answer_that_ended_is_an_error(tmp_path: Path) -> None:
    cfg = config(tmp_path, init=helpers.talker_folder(tmp_path / "endless", end=1e-9), samples=2)
    with pytest.raises(DataError, match=r"no prompt got an answer that ended: raise max_new_tokens \(12\)"):
        rejection_sampling.run(cfg)
    assert not (tmp_path / "v1/sampling/done").exists()


def test_a_killed_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cfg = config(tmp_path)
    rejection_sampling.run(cfg)
    whole = (tmp_path / "v1/sampling/pool.jsonl").read_text()
    again, real, calls = replace(cfg, out=tmp_path / "v1/again"), rejection_sampling.select, []

    def select(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(rejection_sampling, "select", select)
    with pytest.raises(KeyboardInterrupt):
        rejection_sampling.run(again)
    rejection_sampling.run(again)
    assert len(calls) == 4, "three shards, one of them twice"
    assert (tmp_path / "v1/again/pool.jsonl").read_text() == whole

"""What must not change a result: how a batch is cut, and whether a run was killed on the way. Letters o, y and z."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from puna.data import loader
from puna.run_folder import read_metrics
from puna.stages import dpo, grpo, ppo, pretrain, reward, sft
from puna.text import chat
from tests import helpers

CPU = torch.device("cpu")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    taken = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert taken
    return taken


def pretrain_gradients(folder: Path, rows: int) -> tuple[float, dict[str, Tensor]]:
    cfg = helpers.pretrain_config(folder, micro_batch_size=rows)
    _, train, _ = pretrain.prepare(cfg, folder / "data")
    model = helpers.model()
    return pretrain.update(cfg, model, train, 0, CPU), gradients(model)


def sft_gradients(folder: Path, rows: int) -> tuple[float, dict[str, Tensor]]:
    cfg = helpers.sft_config(folder, micro_batch_size=rows)
    packed, _ = sft.prepare(cfg, helpers.tokenizer())
    model = helpers.model()
    batch = sft.Packed(*(field[:8] for field in packed))
    return sft.update(cfg, model, batch, CPU), gradients(model)


def reward_gradients(folder: Path, rows: int) -> tuple[float, dict[str, Tensor]]:
    cfg = helpers.reward_config(folder, micro_batch_tokens=10**6 if rows == 8 else 1)
    pairs, _, _ = reward.prepare(cfg, helpers.tokenizer())
    # Labels on some answers alone: the mean is over the whole batch's, not over a part's.
    pairs = [pair._replace(is_safe=(None, False) if i % 3 else (None, None)) for i, pair in enumerate(pairs[:8])]
    model = helpers.reward_model()
    return reward.update(cfg, model, pairs, CPU)[0], gradients(model)


@pytest.mark.parametrize("stage", [pretrain_gradients, sft_gradients, reward_gradients])
def test_o_one_by_eight_is_eight_by_one(stage: Callable[[Path, int], Any], tmp_path: Path) -> None:
    whole_loss, whole = stage(tmp_path, 8)
    for rows in (1, 3):
        loss, parts = stage(tmp_path, rows)
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        for name, expected in whole.items():
            torch.testing.assert_close(parts[name], expected, rtol=0, atol=1e-6, msg=name)


def test_y_the_eos_of_each_turn_is_in_the_loss(tmp_path: Path) -> None:
    tokenizer, dialogs = helpers.tokenizer(), helpers.dialogs(40)
    for dialog in dialogs:
        encoded = chat.encode(dialog, tokenizer)
        last = len(encoded.mask) - 1 - encoded.mask[::-1].index(True)
        assert encoded.tokens[last] == tokenizer.eos_id
    rows, _ = sft.prepare(helpers.sft_config(tmp_path), tokenizer)
    n_answers = sum(turn["role"] == "assistant" for dialog in dialogs for turn in dialog)
    is_eos = rows.tokens == tokenizer.eos_id
    assert int(is_eos.sum()) == n_answers and rows.mask[is_eos].all()


# z: a killed run goes on as if nothing had happened


class Killed(Exception):
    """Stands for a kill -9: nothing after it runs."""


def kill_at(monkeypatch: pytest.MonkeyPatch, stage: Any, call: int) -> None:
    """The stage's `update` raises at this call, counted from 0."""
    real, calls = stage.update, []

    def update(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == call + 1:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(stage, "update", update)


def traces(folder: Path) -> list[dict[str, Any]]:
    """The metrics, but for the clock's."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def assert_same_run(stage: Any, cfg: Any, kills: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    stage.run(cfg)
    broken = replace(cfg, out=cfg.out.with_name("broken"))
    for call in kills:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, stage, call)
            stage.run(broken)
    stage.run(broken)
    assert traces(broken.out) == traces(cfg.out)
    weights = [(folder / "model/model.safetensors").read_bytes() for folder in (cfg.out, broken.out)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("kills", [(1,), (5,), (3, 2)], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_z_pretraining_resumes_bit_for_bit(
    kills: tuple[int, ...], precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert_same_run(pretrain, helpers.pretrain_config(tmp_path, precision=precision), kills, monkeypatch)


@pytest.mark.parametrize("kills", [(0,), (5,), (3, 4)], ids=str)
def test_z_sft_resumes_bit_for_bit(kills: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert_same_run(sft, helpers.sft_config(tmp_path), kills, monkeypatch)


@pytest.mark.parametrize("kills", [(5,), (3, 2)], ids=str)
def test_z_reward_resumes_bit_for_bit(kills: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cfg = helpers.reward_config(tmp_path)
    assert_same_run(reward, cfg, kills, monkeypatch)
    evaluations = [(tmp_path / name / "evaluation.json").read_text() for name in ("reward", "broken")]
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize("kills", [(5,), (3, 2)], ids=str)
def test_z_dpo_resumes_bit_for_bit(kills: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert_same_run(dpo, helpers.dpo_config(tmp_path), kills, monkeypatch)


@pytest.mark.parametrize("kills", [(1,), (2, 2)], ids=str)
@pytest.mark.parametrize("advantage", ["grpo", "rloo"])
def test_z_grpo_resumes_bit_for_bit(
    kills: tuple[int, ...], advantage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert_same_run(grpo, helpers.grpo_config(tmp_path, advantage=advantage), kills, monkeypatch)
    for iteration in (0, 2, 4, 5):
        name = f"held_out/{iteration:04d}.jsonl"
        assert (tmp_path / "grpo" / name).read_text() == (tmp_path / "broken" / name).read_text()


@pytest.mark.parametrize("kills", [(1,), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("critic_warmup", [0, 3])
def test_z_ppo_resumes_bit_for_bit(
    kills: tuple[int, ...], critic_warmup: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cfg = helpers.ppo_config(tmp_path, critic_warmup=critic_warmup)
    assert_same_run(ppo, cfg, kills, monkeypatch)
    for iteration in (0, 2, 4, 5):
        name = f"held_out/{iteration:04d}.jsonl"
        assert (tmp_path / "ppo" / name).read_text() == (tmp_path / "broken" / name).read_text()


def test_order_of_data_needs_no_state() -> None:
    whole = loader.steps_of_epochs(37, 8, 3, seed=5)
    assert [step.tolist() for step in whole] == [step.tolist() for step in loader.steps_of_epochs(37, 8, 3, seed=5)]

"""AdamW's groups, the schedules, and the update that drops what is not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from puna import optim
from puna.config import ConfigError
from puna.optim import OptimConfig
from tests import helpers


def test_decay_is_on_matrices_alone() -> None:
    model, cfg = helpers.model(), optim.OptimConfig()
    matrices, vectors = optim.groups(model, cfg, scale=2.0)
    assert all(p.ndim == 2 for p in matrices["params"]) and all(p.ndim == 1 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert matrices["scale"] == vectors["scale"] == 2.0


def test_frozen_parameters_are_left_out() -> None:
    model = helpers.model().requires_grad_(False)
    model.norm.weight.requires_grad_(True)
    (group,) = optim.groups(model, optim.OptimConfig())
    assert len(group["params"]) == 1 and group["params"][0] is model.norm.weight


def test_moments_exist_from_the_start_and_change_nothing() -> None:
    cfg, gradient = optim.OptimConfig(), torch.tensor([[0.5, -2.0]])
    ours, plain = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    plain.load_state_dict(ours.state_dict())
    optimizer = optim.adamw(cfg, optim.groups(ours, cfg))
    assert set(optimizer.state[ours.weight]) == {"step", "exp_avg", "exp_avg_sq"}
    reference = torch.optim.AdamW(plain.parameters(), cfg.lr, cfg.betas, cfg.eps, cfg.weight_decay, fused=True)
    for _ in range(3):
        for model, each in ((ours, optimizer), (plain, reference)):
            model.weight.grad = gradient.clone()
            each.step()
    assert torch.equal(ours.weight, plain.weight)


def test_an_update_that_is_not_finite_is_dropped() -> None:
    model, cfg = helpers.model(), helpers.quick()
    optimizer = optim.adamw(cfg, optim.groups(model, cfg))
    before = model.output.weight.detach().clone()
    model(torch.tensor([[1, 300]])).sum().backward()
    assert model.norm.weight.grad is not None
    model.norm.weight.grad[0] = torch.inf
    norm, _ = optim.clip_and_step([model], optimizer, cfg, 0, 10)
    assert not torch.isfinite(torch.tensor(norm))
    assert torch.equal(model.output.weight, before)
    assert model.output.weight.grad is None, "the next step begins clean"


def test_each_model_is_clipped_on_its_own() -> None:
    one, other = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    one.weight.grad, other.weight.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.3, 0.4]])
    cfg = optim.OptimConfig(clip=1.0)
    seen: list[Tensor] = []
    optimizer = optim.adamw(cfg, optim.groups(one, cfg), optim.groups(other, cfg))
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.weight.grad.clone() for p in (one, other)))  # type: ignore[union-attr]
    norm, _ = optim.clip_and_step([one, other], optimizer, cfg, 0, 10)
    assert norm == pytest.approx(5.0)
    torch.testing.assert_close(seen[0], torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(seen[1], torch.tensor([[0.3, 0.4]]))


def test_cosine_schedule() -> None:
    cfg = optim.OptimConfig(lr=1.0, warmup_steps=2000)
    rates = [optim.learning_rate(cfg, step, 101) for step in range(101)]
    # A tenth of 101 steps, 10, warms up: 1/11, 2/11, ... ; step 10 is the peak, step 100 the end, step 55 half way.
    assert rates[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert (rates[10], rates[55], rates[100]) == pytest.approx((1.0, 0.55, 0.1))
    assert max(rates) == rates[10]
    paper = [optim.learning_rate(cfg, step, 480_000) for step in (0, 1999, 2000, 479_999)]
    assert paper == pytest.approx([1 / 2001, 2000 / 2001, 1.0, 0.1])


def test_constant_schedule() -> None:
    cfg = optim.OptimConfig(lr=1e-6, schedule="constant", warmup_steps=0)
    assert {optim.learning_rate(cfg, step, 400) for step in range(400)} == {1e-6}


@pytest.mark.parametrize(("n_steps", "warmup"), [(1000, 30), (100, 5), (20, 5), (10, 2), (3, 0)])
def test_a_warm_up_is_a_share_of_the_run_and_at_least_five_steps_or_a_quarter(n_steps: int, warmup: int) -> None:
    cfg = optim.with_warmup(optim.OptimConfig(lr=1.0), 0.03, n_steps)
    rates = [optim.learning_rate(cfg, step, n_steps) for step in range(n_steps)]
    assert rates.index(max(rates)) == warmup and rates[warmup] == 1.0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"clip": -1.0}, "clip is -1.0: it must be positive"),
        ({"lr": math.nan}, "lr is nan: it must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\): each must be at least 0 and less than 1"),
        ({"final_lr_ratio": 2.0}, "final_lr_ratio is 2.0: it must be from 0 to 1"),
    ],
)
def test_what_no_training_can_use_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        OptimConfig(**wrong)

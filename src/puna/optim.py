"""AdamW's groups, the learning-rate schedules, and clip-and-step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from puna import config


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule. The defaults are the paper's pretraining values (2.2) save the learning rate's size."""

    lr: float = 3e-4
    """peak learning rate (paper, pretraining of 7B and 13B: 3e-4)."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.1
    clip: float = 1.0
    """largest gradient norm."""
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr_ratio: float = 0.1
    """cosine ends at this share of the peak (paper: 10 %)."""
    warmup_steps: int = 2000
    """linear warm-up (paper 2.2: 2,000 of about 480,000 steps); at most a tenth of the run or 5 steps, whichever is
    more (of a run under 20 steps a quarter)."""

    def __post_init__(self) -> None:
        config.positive(self, "eps", "clip")
        config.within(self, 0, math.inf, "lr", "weight_decay", "warmup_steps")
        config.within(self, 0, 1, "final_lr_ratio")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise config.ConfigError(f"betas are {self.betas}: each must be at least 0 and less than 1")


def groups(model: nn.Module, cfg: OptimConfig, scale: float = 1.0) -> list[dict[str, Any]]:
    """Parameter groups: weight decay on matrices only, norms and other vectors are not pulled to zero.

    `scale` multiplies the learning rate of all of them.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    both = [
        {"params": matrices, "weight_decay": cfg.weight_decay, "scale": scale},
        {"params": vectors, "weight_decay": 0.0, "scale": scale},
    ]
    return [group for group in both if group["params"]]


def adamw(cfg: OptimConfig, *param_groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW over the groups of one or more models."""
    groups_of_all = [group for groups_of_one in param_groups for group in groups_of_one]
    optimizer = torch.optim.AdamW(groups_of_all, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        # Made here, not at the first gradient: a checkpoint then holds all moments, whatever was trained so far.
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return optimizer


def learning_rate(cfg: OptimConfig, step: int, n_steps: int) -> float:
    """The rate of step 0, 1, ... of n_steps: linear warm-up, then cosine from the peak to its final share."""
    warmup = min(cfg.warmup_steps, max(least_warmup(n_steps), n_steps // 10))
    if step < warmup:
        return cfg.lr * (step + 1) / (warmup + 1)
    if cfg.schedule == "constant":
        return cfg.lr
    progress = (step - warmup) / max(1, n_steps - 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.lr * (cfg.final_lr_ratio + (1 - cfg.final_lr_ratio) * cosine)


def least_warmup(n_steps: int) -> int:
    """The shortest warm-up: 5 steps (paper 3.2.2, of reward models), or a quarter of a run so short that it is less."""
    return min(5, n_steps // 4)


def with_warmup(cfg: OptimConfig, share: float, n_steps: int) -> OptimConfig:
    """The same with a warm-up over a share of the run, or the least (reward models: 3 %, paper 3.2.2)."""
    return replace(cfg, warmup_steps=max(least_warmup(n_steps), round(share * n_steps)))


def clip_and_step(
    models: Sequence[nn.Module], optimizer: torch.optim.Optimizer, cfg: OptimConfig, step: int, n_steps: int
) -> tuple[float, float]:
    """Set the rate, clip each model's gradient on its own, update, clear. Returns (largest norm, rate).

    Where a norm is not finite the whole update is dropped: the weights stay, and the returned norm says so.
    """
    lr = learning_rate(cfg, step, n_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    norms = [_norm(nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)) for model in models]
    norm = math.nan if any(math.isnan(n) for n in norms) else max(norms)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, lr


def _norm(norm: Tensor) -> float:
    """A norm as a number, gathered where it is sharded."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

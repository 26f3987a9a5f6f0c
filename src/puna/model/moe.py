"""A sparse mixture of experts in the feed-forward's place: a router sends each token to its best few of many experts.

Not in the paper. Routing and names are Mixtral's (arXiv 2401.04088): softmax over all experts, the k best, their
weights scaled to sum to 1. Capacity is Switch's (arXiv 2101.03961, 2.2): while gradients are computed, an expert takes
no more than its share times a factor, first choices first, and what it cannot take adds nothing to the residual stream.
A model folder does not keep the factor: every stage after pretraining is dropless.

Shapes: N tokens, D model width, E experts, k experts a token, A assignments of a token to an expert, at most N k.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from puna.config import ConfigError
from puna.model.head import product_type


@dataclass(frozen=True)
class MoEConfig:
    """The experts of a layer; `ffn_hidden` is the width of each."""

    experts: int = 0
    """0 is Llama's one feed-forward."""
    top_k: int = 2
    """experts a token (Mixtral: 2 of 8); with one its weight would always be 1, and its router learn nothing."""
    capacity_factor: float = 0.0
    """tokens an expert takes in pretraining, over an equal share of them (Switch: 1.0 to 2.0); 0 drops none."""
    balance: float = 0.01
    """weight of the load-balancing loss in pretraining (Switch: 0.01)."""

    def __post_init__(self) -> None:
        if self.experts < 0 or self.capacity_factor < 0 or self.balance < 0:
            raise ConfigError("experts, capacity_factor and balance are not negative")
        if self.experts and not 2 <= self.top_k <= self.experts:
            raise ConfigError(f"top_k is {self.top_k} of {self.experts} experts: it can be 2 to all of them")


class Routing(NamedTuple):
    """What a layer's router did with a batch."""

    probabilities: Tensor  # (N, E) float32
    chosen: Tensor  # (N, k) int64, the likeliest first


class Router(nn.Module):
    """The probability of every expert, computed in float32 whatever the input's type."""

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            return (rows.float() @ self.weight.float().t()).softmax(-1)  # (N, E)


class MixtureOfExperts(nn.Module):
    """The weighted sum of the k experts that a token's router likes best.

    `forward(x (..., D)) -> (..., D)`. Where gradients are computed every expert runs, were it on no token at all, so
    that all ranks have the same gradients to sum, and `routing` is kept for the load-balancing loss.
    """

    def __init__(self, config: MoEConfig, dim: int, experts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(dim, config.experts)
        self.experts = nn.ModuleList(experts)
        self.routing: Routing | None = None

    def forward(self, x: Tensor) -> Tensor:
        rows, k = x.flatten(0, -2), self.config.top_k  # (N, D)
        trains = torch.is_grad_enabled()
        probabilities = self.gate(rows)
        best, chosen = probabilities.topk(k)  # (N, k)
        weights = best / best.sum(-1, keepdim=True)
        if not _recomputes():
            self.routing = Routing(probabilities, chosen) if trains else None
        order, counts = by_expert(chosen, self.config.experts, self._capacity(len(rows)))
        read = rows.to(product_type(rows))  # once: autocast would cast for each product
        groups = torch.split(read.index_select(0, order % len(rows)), counts)
        busy = [(expert, group) for expert, group in zip(self.experts, groups, strict=True) if trains or len(group)]
        out = torch.cat([expert(group) for expert, group in busy])  # (A, D)
        scaled = (out * weights.t().flatten()[order, None]).to(x.dtype)
        every = x.new_zeros(k * len(rows), x.shape[-1]).index_copy(0, order, scaled)
        return every.view(k, *x.shape).sum(0)

    def _capacity(self, tokens: int) -> int | None:
        """Tokens that an expert takes of so many; None is all."""
        if not self.config.capacity_factor or not torch.is_grad_enabled():
            return None
        return math.ceil(self.config.capacity_factor * self.config.top_k * tokens / self.config.experts)


def _recomputes() -> bool:
    """Whether a backward pass computes a block again: what is kept of that pass would keep all of it."""
    return torch._C._current_graph_task_id() >= 0


def by_expert(chosen: Tensor, experts: int, capacity: int | None = None) -> tuple[Tensor, list[int]]:
    """The assignments (A,) int64, expert by expert, and how many each expert has.

    chosen (N, k). Assignment i is of token i % N, its choice i // N: of an expert's, first choices come first, then
    earlier tokens, and what is beyond `capacity` is left out.
    """
    flat = chosen.t().flatten()  # (k N,)
    order, counts = flat.argsort(stable=True), flat.bincount(minlength=experts)
    if capacity is not None:
        begins = counts.cumsum(0) - counts
        place = torch.arange(len(flat), device=flat.device) - begins[flat[order]]
        order, counts = order[place < capacity], counts.clamp(max=capacity)
    return order, counts.tolist()

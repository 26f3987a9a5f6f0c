"""The reward model (paper 3.2.2): the chat model's body with a scalar head in place of next-token prediction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.model.transformer import ModelConfig, Transformer


class RewardModel(nn.Module):
    """`forward(tokens (B, T), lengths (B,)) -> raw scores (B,)`, read at each row's last counted token.

    Rows are padded on the right, so that causal attention never sees a pad. The sigmoid of a score is what the paper
    calls R. `values` gives a score at every token: the critic of PPO, and packed comparisons.
    """

    def __init__(self, body: Transformer) -> None:
        super().__init__()
        self.body = body
        # The language-model head is dropped: a parameter without a gradient has no place in the optimizer.
        self.body.output = nn.Identity()  # type: ignore[assignment]
        self.score = nn.Linear(body.config.dim, 1, bias=False)
        self.init_head()

    @classmethod
    def from_config(cls, config: ModelConfig) -> RewardModel:
        return cls(Transformer(config))

    @property
    def config(self) -> ModelConfig:
        return self.body.config

    def init_head(self, generator: torch.Generator | None = None) -> None:
        """Deviation 1/sqrt(D + 1), so that scores start near unit size (Stiennon et al. 2020)."""
        nn.init.normal_(self.score.weight, std=(self.body.config.dim + 1) ** -0.5, generator=generator)

    def values(self, tokens: Tensor, *, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """A score after every token, (B, T) float32; `positions` and `mask` as in `Transformer.forward`."""
        return scalar(self.body.hidden(tokens, positions=positions, mask=mask), self.score.weight)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        last = self.body.hidden(tokens)[torch.arange(len(tokens), device=tokens.device), lengths - 1]  # (B, D)
        return scalar(last, self.score.weight)


class ValueHead(nn.Module):
    """The critic that shares the policy's body: `forward(hidden (..., D)) -> values (...)`. It begins at 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return scalar(hidden, self.score.weight)


def scalar(hidden: Tensor, weight: Tensor) -> Tensor:
    """Scores (...) of states (..., D), in float32 always: they differ by less than bfloat16 can tell."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), weight.float()).squeeze(-1)

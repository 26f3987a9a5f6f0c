"""The reward model (paper 3.2.2): the chat model's body with a scalar head in place of next-token prediction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.model.transformer import Documents, ModelConfig, Transformer


class ScalarHead(nn.Linear):
    """Scores (...) of states (..., D), in float32 always: they differ by less than bfloat16 can tell."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float()).squeeze(-1)


def initial_head(dim: int, generator: torch.Generator | None = None) -> Tensor:
    """A new head (1, D): deviation 1/sqrt(D + 1), so that scores start near unit size (Stiennon et al. 2020)."""
    return torch.empty(1, dim).normal_(std=(dim + 1) ** -0.5, generator=generator)


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
        self.score = ScalarHead(body.config.dim)
        self.init_head()

    @classmethod
    def without_weights(cls, config: ModelConfig) -> RewardModel:
        """As `Transformer.without_weights`."""
        body = Transformer.without_weights(config)
        with torch.device("meta"):
            return cls(body)

    @property
    def config(self) -> ModelConfig:
        return self.body.config

    def init_head(self, generator: torch.Generator | None = None) -> None:
        """Set `initial_head` on one process."""
        with torch.no_grad():
            self.score.weight.copy_(initial_head(self.config.dim, generator))

    def values(self, tokens: Tensor, *, positions: Tensor | None = None, documents: Documents | None = None) -> Tensor:
        """A score after every token, (B, T) float32; `positions` and `documents` as in `Transformer.forward`."""
        return self.score(self.body.hidden(tokens, positions=positions, documents=documents))  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        last = self.body.hidden(tokens)[torch.arange(len(tokens), device=tokens.device), lengths - 1]  # (B, D)
        return self.score(last)  # type: ignore[no-any-return]


class ValueHead(nn.Module):
    """The critic that shares the policy's body: `forward(hidden (..., D)) -> values (...)`. It begins at 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = ScalarHead(dim)
        nn.init.zeros_(self.score.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.score(hidden)  # type: ignore[no-any-return]

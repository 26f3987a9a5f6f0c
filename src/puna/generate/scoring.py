"""Scores and log-probabilities of finished texts, in batches of like lengths: what judges, rather than what writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from puna import losses, parallel
from puna.data import packing
from puna.model.reward import RewardModel
from puna.model.transformer import Transformer
from puna.text import chat
from puna.text.tokenizer import Tokenizer
from puna.types import Dialog


class Scorer:
    """A reward model as a function of dialogs (types.Reward): scores in (0, 1), the paper's R."""

    def __init__(
        self, model: RewardModel, tokenizer: Tokenizer, *, precision: str = "fp32", max_tokens: int = 16384
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.precision = precision
        self.max_tokens = max_tokens

    def __call__(self, dialogs: Sequence[Dialog]) -> Tensor:
        """Dialogs that end with an answer -> scores (N,) float32 on the CPU."""
        return self.score_tokens([chat.encode(dialog, self.tokenizer).tokens for dialog in dialogs])

    def score_tokens(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows of ids, each ending with its answer, -> scores (N,). The ids are taken as they are.

        Of a sharded model all ranks call it with the same rows, and each scores its share of them.
        """
        if not parallel.is_sharded(self.model):
            return self._score(rows, packing.by_length([len(row) for row in rows], self.max_tokens))

        def score(first: int, part: Sequence[Sequence[int]]) -> list[float]:
            scores: list[float] = self._score(part, packing.passes([len(r) for r in part], self.max_tokens)).tolist()
            return scores

        return torch.tensor(parallel.spread(score, rows))

    @torch.no_grad()  # not inference_mode: what a sharded model gathers in it could not be trained with again
    def _score(self, rows: Sequence[Sequence[int]], batches: Sequence[Sequence[int]]) -> Tensor:
        device = self.model.score.weight.device
        scores = torch.zeros(len(rows))
        for members in batches:
            tokens, lengths = packing.pad_right([rows[i] for i in members])
            with parallel.autocast(self.precision, device):
                scores[list(members)] = self.model(tokens.to(device), lengths.to(device)).sigmoid().cpu()
        return scores


def combined_reward(safety: Tensor, helpfulness: Tensor, is_safety: Sequence[bool], threshold: float) -> Tensor:
    """The paper's R_c of N scored answers; see losses.combine_rewards."""
    return losses.combine_rewards(safety, helpfulness, torch.tensor(list(is_safety), dtype=torch.bool), threshold)


@torch.inference_mode()
def sequence_logprobs(
    model: Transformer, rows: Sequence[Sequence[int]], temperature: float = 1.0, max_tokens: int = 16384
) -> list[Tensor]:
    """For each row of ids, log p of every token after its first, (len - 1,) float32 on the CPU."""
    device = model.tok_embeddings.weight.device
    out: list[Tensor] = [torch.empty(0)] * len(rows)
    for members in packing.by_length([len(row) for row in rows], max_tokens):
        tokens, lengths = packing.pad_right([rows[i] for i in members])
        tokens = tokens.to(device)
        logprobs = losses.token_logprobs(model(tokens)[:, :-1], tokens[:, 1:], temperature).cpu()
        for row, i in enumerate(members):
            out[i] = logprobs[row, : int(lengths[row]) - 1]
    return out

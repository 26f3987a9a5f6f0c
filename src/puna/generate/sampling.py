"""Sampling for a whole batch: temperature, top-k, top-p, and seeded draws that no batch-mate can disturb.

A draw inverts the cumulative distribution at a uniform number. The numbers of a sequence come from a counter-based
generator keyed by (seed, request, sample), so that they are the same alone or among thousands.

Shapes: B sequences, V vocabulary, W candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from puna.config import ConfigError

FIRST_WIDTHS = (16, 256, 4096)
"""Candidates top-p looks at before it sorts the vocabulary; mostly 16 suffice, a fifth of the time of 64 (V 2048)."""


@dataclass(frozen=True)
class Sampling:
    """How one call draws: `top_p` 1 and `top_k` 0 leave the distribution whole. Top-k comes first, as elsewhere."""

    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}: it must be 0 (off) or a number of tokens")


def uniforms(seed: int, request: int, sample: int, count: int) -> Tensor:
    """`count` numbers in [0, 1), float32 (count,), from the arguments alone; a longer row continues a shorter one."""
    key = np.array([seed % 2**64, request], dtype=np.uint64)
    counter = np.array([0, 0, 0, sample], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
    return torch.from_numpy(generator.random(count, dtype=np.float32))


def sample(logits: Tensor, temperature: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw a token for each row: (B,) int64, and its log-probability, (B,) float32.

    logits (B, V), temperature (B,) with 0 for greedy, uniform (B,) in [0, 1).
    The log-probability is under softmax(logits / temperature), also where top-k or top-p cut the draw: it is what a
    trainer scores the token with. A greedy token's is at temperature 1.
    """
    greedy = temperature == 0
    probs = (logits.float() / temperature.masked_fill(greedy, 1.0)[:, None]).softmax(-1)  # (B, V)
    if greedy.all():
        tokens = probs.argmax(-1)
    else:
        tokens = _draw(probs, uniform) if sampling.top_p == 1 and not sampling.top_k else _cut(probs, uniform, sampling)
        if greedy.any():
            tokens = torch.where(greedy, probs.argmax(-1), tokens)
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1).log()


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The index where each row's cumulative weight passes `uniform` of its total, (B,); never one of weight 0."""
    cumulative = weights.cumsum(-1)
    # At most 1 - 2^-24, a uniform number keeps its share of the total below the total, rounded as it may be.
    target = uniform[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return index.clamp_max(weights.shape[-1] - 1)  # what is not a number passes every index


def _cut(probs: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Draw from the top k, or the smallest top set that holds `top_p` of the mass, (B,).

    Without top-k the nucleus is first sought among few candidates; rows it outgrows go on to more, so that a peaked
    distribution never sorts the vocabulary. A row's path depends on that row alone.
    """
    vocab = probs.shape[-1]
    widths = [sampling.top_k] if sampling.top_k else [*(w for w in FIRST_WIDTHS if w < vocab), vocab]
    tokens = torch.empty(len(probs), dtype=torch.int64, device=probs.device)
    rows = torch.arange(len(probs), device=probs.device)
    for width in widths:
        values, ids = (probs if len(rows) == len(probs) else probs[rows]).topk(min(width, vocab))  # (B, W), descending
        mass = values.cumsum(-1)
        whole = mass[:, -1:] if sampling.top_k else 1.0
        if sampling.top_p < 1:
            values = values.masked_fill(mass - values >= sampling.top_p * whole, 0.0)
        tokens[rows] = ids.gather(1, _draw(values, uniform[rows])[:, None]).squeeze(1)
        rows = rows[values[:, -1] > 0]  # the nucleus may go on past the last candidate
        if not len(rows):
            break
    return tokens

"""What the parity tests share: decoding through a cache, by the simplest cache there is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from puna.model.transformer import Transformer, attend


class GrowingCache:
    """Keeps keys and values by concatenation."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in self.kept:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.kept[layer], (k, v), strict=True))
        self.kept[layer] = (k, v)
        new, all_ = q.shape[2], k.shape[2]
        return attend(q, k, v, torch.ones(new, all_, dtype=torch.bool).tril(all_ - new))


@pytest.fixture(scope="session")
def cached_logits() -> Callable[[Transformer, Tensor, int], Tensor]:
    """(model, tokens (B, T), prefill) -> logits (B, T, V): `prefill` tokens are read at once, the others one by one."""

    def decode(model: Transformer, tokens: Tensor, prefill: int) -> Tensor:
        cache, parts = GrowingCache(), []
        for start, end in [(0, prefill), *((i, i + 1) for i in range(prefill, tokens.shape[1]))]:
            positions = torch.arange(start, end).expand(len(tokens), -1)
            parts.append(model(tokens[:, start:end], positions=positions, cache=cache))
        return torch.cat(parts, dim=1)

    return decode

"""The keys and values of earlier tokens: one cache for a prompt's first pass, one for the rows of a running batch.

Shapes: L layers, B rows, K key/value heads, T new tokens, S cached tokens, E head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.model.transformer import ModelConfig

BLOCK = 32
"""The cache grows by so many tokens at a time."""


class PromptCache:
    """Collects the keys and values of prompts that begin at position 0, so that a batch's rows can copy them."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing came before: the new tokens (B, K, T, E) are all there is."""
        assert layer == len(self._keys), f"layer {layer} came after {len(self._keys) - 1}"
        self._keys.append(k)
        self._values.append(v)
        return k, v

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all layers, (L, B, K, T, E) each."""
        return torch.stack(self._keys), torch.stack(self._values)


class KVCache:
    """A row a sequence, each at its own position. One decode step is `seek`, then a forward pass over one token a row.

    What stands in a row past its position is rubbish that the mask hides until it is overwritten. Attention runs over
    the whole width: the products of a sliced cache would copy it first.
    """

    def __init__(self, config: ModelConfig, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.n_layers, rows, config.n_kv_heads, 0, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)  # (L, B, K, S, E)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self._rows = torch.arange(rows, device=device)
        self._positions = torch.zeros(rows, dtype=torch.int64, device=device)

    def fill(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Begin rows (R,) with prompts' keys and values (L, R, K, T, E)."""
        length = keys.shape[3]
        self._resize(max(length, self.keys.shape[3]))
        self.keys[:, rows, :, :length] = keys
        self.values[:, rows, :, :length] = values

    def seek(self, positions: Tensor, length: int) -> Tensor:
        """Let the next token of each row go to positions (B,), all below `length`. Returns the mask (B, 1, 1, S)."""
        self._resize(length)
        self._positions = positions
        return (torch.arange(self.keys.shape[3], device=positions.device) <= positions[:, None])[:, None, None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store one token a row, k and v (B, K, 1, E); return all that is cached (B, K, S, E)."""
        self.keys[layer][self._rows, :, self._positions] = k[:, :, 0]
        self.values[layer][self._rows, :, self._positions] = v[:, :, 0]
        return self.keys[layer], self.values[layer]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these (R,), which become 0..R-1."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self._rows = self._rows[: len(rows)]

    def _resize(self, length: int) -> None:
        """Widen to the next block that holds `length`, or narrow once two blocks stand empty."""
        width = self.keys.shape[3]
        if not width - 2 * BLOCK < length <= width:
            wanted = -(-length // BLOCK) * BLOCK
            padding = (0, 0, 0, wanted - width)
            self.keys, self.values = F.pad(self.keys, padding), F.pad(self.values, padding)

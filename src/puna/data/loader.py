"""Which data each step sees: a pure function of the seed and the step, so that resuming needs no state.

The order does not depend on how many processes share it, and where all batches are full the cuts do not either.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from puna.data.shards import Shard


def steps_of_epochs(n: int, batch_size: int, epochs: int, seed: int, multiple: int = 1) -> list[npt.NDArray[np.int64]]:
    """The indices of every step's batch: `epochs` shuffles of range(n), cut into batches of nearly equal size.

    Everything is seen once an epoch in batches of at most `batch_size`, none far smaller than the others, for every
    step moves the weights as far. Only what is left over a `multiple` is not: of the number of processes that share a
    batch, or of the batch size itself where no batch may be short.
    """
    steps: list[npt.NDArray[np.int64]] = []
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(n)[: n - n % multiple]
        n_batches = -(-len(order) // batch_size)
        parts = np.array_split(order.reshape(-1, multiple), n_batches) if n_batches else []
        steps += [part.reshape(-1) for part in parts]
    return steps


def windows(shard: Shard, seq_len: int, batch_size: int, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, seq_len) int64 of a pretraining step: windows of the concatenated documents.

    The windows of an epoch are disjoint and shuffled; each epoch starts at another offset, so that cuts fall elsewhere.
    """
    assert len(shard.tokens) > seq_len, f"{len(shard.tokens)} tokens make no window of {seq_len}"
    per_epoch = max(1, (len(shard.tokens) - 1) // seq_len - 1)
    rows = []
    for i in range(step * batch_size, (step + 1) * batch_size):
        epoch, index = divmod(i, per_epoch)
        rng = np.random.default_rng((seed, epoch))
        offset = int(rng.integers(min(seq_len, len(shard.tokens) - seq_len)))
        begin = offset + _permuted(index, per_epoch, seed, epoch) * seq_len
        rows.append(shard.tokens[begin : begin + seq_len + 1].astype(np.int64))
    batch = torch.from_numpy(np.stack(rows))
    return batch[:, :-1], batch[:, 1:]


_permutations: dict[tuple[int, int, int], npt.NDArray[np.int64]] = {}


def _permuted(index: int, n: int, seed: int, epoch: int) -> int:
    key = (n, seed, epoch)
    if key not in _permutations:
        _permutations.clear()
        _permutations[key] = np.random.default_rng((seed, epoch, 1)).permutation(n)
    return int(_permutations[key][index])

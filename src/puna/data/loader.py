"""Which data each step sees: a pure function of the seed and the step, so that resuming needs no state.

The order does not depend on how many processes share it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from puna.data.shards import Shard


def steps_of_epochs(n: int, batch_size: int, epochs: int, seed: int, multiple: int = 1) -> list[npt.NDArray[np.int64]]:
    """The indices of every step's batch: `epochs` shuffles of range(n), cut into batches.

    A short last batch of an epoch is kept, so that everything is seen once an epoch, save that it is cut to a
    `multiple`: the number of processes that share it, or the batch size itself where no batch may be short.
    """
    steps: list[npt.NDArray[np.int64]] = []
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(n)[: n - n % multiple]
        steps += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
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

"""Which data each step sees: a pure function of the seed and the step, so that resuming needs no state.

The order does not depend on how many processes share it, and where all batches are full the cuts do not either.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from puna.config import ConfigError, DataError
from puna.data import shards
from puna.data.shards import Shard, Tokens
from puna.text.tokenizer import Tokenizer


def steps_of_epochs(
    n: int, batch_size: int, epochs: int, seed: int | tuple[int, ...], multiple: int = 1
) -> list[npt.NDArray[np.int64]]:
    """The indices of every step's batch: `epochs` shuffles of range(n), cut into batches of nearly equal size.

    Batches have at most `batch_size` examples and are nearly alike in size, since every step moves the weights as far.
    Each has a multiple of `multiple` examples: the number of processes that share it, or the batch size itself where no
    batch may be short. What is left over of n an epoch drops. Raises ConfigError where `batch_size` is no multiple of
    it, DataError where n is less than it.
    """
    if batch_size % multiple:
        raise ConfigError(f"a batch of {batch_size} does not divide over {multiple} processes: change the batch size")
    if n < multiple:
        raise DataError(f"{n} examples are too few for {multiple} processes: give more, or start fewer processes")
    steps: list[npt.NDArray[np.int64]] = []
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(n)[: n - n % multiple]
        parts = np.array_split(order.reshape(-1, multiple), -(-len(order) // batch_size))
        steps += [part.reshape(-1) for part in parts]
    return steps


class Joined:
    """Arrays of tokens, one after the other, read as if they were one."""

    def __init__(self, arrays: Sequence[Tokens]) -> None:
        self._arrays = arrays
        self._begins = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return int(self._begins[-1])

    def read(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """The tokens from `begin` up to `end`."""
        first, last = np.searchsorted(self._begins, (begin, end - 1), side="right") - 1
        parts = [
            self._arrays[i][max(0, begin - self._begins[i]) : end - self._begins[i]] for i in range(first, last + 1)
        ]
        return np.concatenate(parts).astype(np.int64)


@dataclass(frozen=True)
class Mixture:
    """Sources of tokens by name, and how many epochs of each are seen while a source of weight 1 is seen once."""

    sources: dict[str, Joined]
    weights: dict[str, float]

    @functools.cached_property
    def _shares(self) -> list[tuple[int, int]]:
        """Of each source its weighted tokens, and the same with those of all sources after it."""
        tokens = [max(1, round(self.weights[name] * len(source))) for name, source in self.sources.items()]
        return [(tokens[i], sum(tokens[i:])) for i in range(len(tokens))]

    def place(self, row: int) -> tuple[int, int]:
        """The source (its number) that a row of a run's batches comes from, and how many of its windows came before.

        The first source takes its share of the rows, the next its share of the rows that are left, and so on. After any
        number of rows each source has had what it is due but for a row or two, and nothing needs to be remembered.
        """
        for number, (mine, rest) in enumerate(self._shares):
            before, after = row * mine // rest, (row + 1) * mine // rest
            if after > before:
                return number, before
            row -= before
        raise AssertionError(f"the last source takes what is left: {self._shares}")


Data = Shard | Mixture
"""What is trained on: a shard is a mixture of one source."""


def open_mixtures(folder: Path, tokenizer: Tokenizer) -> tuple[Mixture, Mixture]:
    """What `puna data prepare` left for training and for validation; errors as `shards.read_prepared`."""
    train, validation = (_open(shards.read_prepared(folder, part, tokenizer)) for part in ("train", "validation"))
    return train, validation


def _open(sources: dict[str, tuple[float, list[Shard]]]) -> Mixture:
    tokens = {name: Joined([shard.tokens for shard in each]) for name, (_, each) in sources.items()}
    return Mixture(tokens, {name: weight for name, (weight, _) in sources.items()})


def _mixture(data: Data) -> Mixture:
    return Mixture({"text": Joined([data.tokens])}, {"text": 1.0}) if isinstance(data, Shard) else data


def smallest(data: Data) -> tuple[str, int]:
    """The source that has the fewest tokens, in words for a message, and how many it has."""
    if isinstance(data, Shard):
        return "", len(data.tokens)
    n_tokens, name = min((len(source), name) for name, source in data.sources.items())
    return f" of the source {name!r}", n_tokens


def n_windows(data: Data, seq_len: int) -> int:
    """Windows that are seen while a source of weight 1 is seen once, at least one a source."""
    sources, weights = _mixture(data).sources, _mixture(data).weights
    return sum(max(1, int(weights[name] * _per_epoch(source, seq_len))) for name, source in sources.items())


def windows(
    data: Data, seq_len: int, batch_size: int, step: int, seed: int, rows: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, seq_len) int64 of a pretraining step: windows of the concatenated documents.

    The windows of a source's epoch are disjoint and shuffled; each epoch starts at another offset, so that cuts fall
    elsewhere. `rows` picks this process's part of the batch.
    """
    mixture = _mixture(data)
    sources, read = list(mixture.sources.values()), []
    for row in range(step * batch_size, (step + 1) * batch_size)[rows]:
        number, index = mixture.place(row)
        read.append(_window(sources[number], seq_len, index, seed + number))
    batch = torch.from_numpy(np.stack(read))
    return batch[:, :-1], batch[:, 1:]


def _window(source: Joined, seq_len: int, index: int, seed: int) -> npt.NDArray[np.int64]:
    """The `index`-th window (seq_len + 1,) that is seen of a source."""
    assert len(source) > seq_len, f"{len(source)} tokens make no window of {seq_len}"
    per_epoch = _per_epoch(source, seq_len)
    epoch, place = divmod(index, per_epoch)
    rng = np.random.default_rng((seed, epoch))
    offset = int(rng.integers(min(seq_len, len(source) - seq_len)))
    begin = offset + int(_permutation(per_epoch, seed, epoch)[place]) * seq_len
    return source.read(begin, begin + seq_len + 1)


def _per_epoch(source: Joined, seq_len: int) -> int:
    """Windows of a source's epoch: one fewer than fit, for an epoch may start anywhere in the first."""
    return max(1, (len(source) - 1) // seq_len - 1)


_latest: dict[tuple[int, int], tuple[int, npt.NDArray[np.int64]]] = {}
"""By number of windows and seed, of which each source has its own: the epoch that was last read, and its order."""


def _permutation(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of an epoch's windows: eight bytes a window."""
    held, order = _latest.get((n, seed), (-1, np.zeros(0, np.int64)))
    if held != epoch:
        order = np.random.default_rng((seed, epoch, 1)).permutation(n)
        _latest[n, seed] = epoch, order
    return order

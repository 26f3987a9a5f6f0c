"""What each step sees: all once an epoch, a pure function of seed and step, the same for any number of processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from puna.data.loader import steps_of_epochs, windows
from puna.data.shards import Shard


def shard(n_tokens: int) -> Shard:
    return Shard(np.arange(n_tokens, dtype=np.uint16), np.array([0, n_tokens]))


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (12, 4), (3, 8)])
def test_every_item_once_an_epoch(n: int, batch_size: int) -> None:
    steps = steps_of_epochs(n, batch_size, 2, seed=1)
    per_epoch = -(-n // batch_size)
    assert len(steps) == 2 * per_epoch
    assert all(len(step) <= batch_size for step in steps)
    for epoch in (steps[:per_epoch], steps[per_epoch:]):
        assert sorted(np.concatenate(epoch)) == list(range(n))


def test_epochs_and_seeds_differ() -> None:
    first, second = steps_of_epochs(50, 50, 2, seed=1)
    (other,) = steps_of_epochs(50, 50, 1, seed=2)
    assert first.tolist() != second.tolist() and first.tolist() != other.tolist()
    assert first.tolist() == steps_of_epochs(50, 50, 1, seed=1)[0].tolist()


def test_every_batch_divides_over_the_processes() -> None:
    steps = steps_of_epochs(11, 4, 1, seed=0, multiple=2)
    assert [len(step) for step in steps] == [4, 4, 2]
    alone = steps_of_epochs(11, 4, 1, seed=0)
    assert [step.tolist() for step in steps[:2]] == [step.tolist() for step in alone[:2]]


@pytest.mark.parametrize(
    ("n", "batch_size", "multiple", "sizes"), [(9, 4, 1, [3, 3, 3]), (10, 4, 1, [4, 3, 3]), (22, 8, 2, [8, 8, 6])]
)
def test_a_short_last_batch_is_spread(n: int, batch_size: int, multiple: int, sizes: list[int]) -> None:
    assert [len(step) for step in steps_of_epochs(n, batch_size, 1, seed=0, multiple=multiple)] == sizes


def test_no_batch_is_short_where_all_must_be_full() -> None:
    assert [len(step) for step in steps_of_epochs(11, 4, 2, seed=0, multiple=4)] == [4, 4, 4, 4]
    assert steps_of_epochs(3, 4, 2, seed=0, multiple=4) == []


def test_windows_are_disjoint_and_all_of_them_come() -> None:
    data, seq_len = shard(103), 10  # 102 // 10 - 1 = 9 windows an epoch
    inputs, targets = windows(data, seq_len, 9, 0, seed=3)
    assert torch.equal(targets, inputs + 1), "the target is the next token"
    begins = sorted(inputs[:, 0].tolist())
    assert [b - begins[0] for b in begins] == list(range(0, 90, 10))
    assert 0 <= begins[0] < seq_len


def test_windows_are_a_pure_function_of_the_step() -> None:
    data = shard(500)
    whole = torch.cat([windows(data, 10, 4, step, seed=5)[0] for step in range(30)])
    alone = windows(data, 10, 4, 17, seed=5)[0]
    assert torch.equal(alone, whole[68:72])
    twice_as_large = torch.cat([windows(data, 10, 8, step, seed=5)[0] for step in range(15)])
    assert torch.equal(whole, twice_as_large), "the order does not depend on how it is cut into batches"


def test_epochs_start_elsewhere() -> None:
    data, per_epoch = shard(203), 19
    epochs = [windows(data, 10, per_epoch, epoch, seed=0)[0][:, 0] for epoch in range(4)]
    assert len({int(begins.min()) for begins in epochs}) > 1
    assert not torch.equal(epochs[0] - epochs[0].min(), epochs[1] - epochs[1].min()), "and in another order"


@pytest.mark.parametrize("n_tokens", [11, 12, 20, 21, 29])
def test_few_tokens_make_whole_windows(n_tokens: int) -> None:
    inputs, targets = windows(shard(n_tokens), 10, 6, 0, seed=0)
    assert inputs.shape == targets.shape == (6, 10)
    assert torch.equal(targets, inputs + 1)

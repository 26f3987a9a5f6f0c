"""What each step sees: all once an epoch, a pure function of seed and step, the same for any number of processes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from puna.config import ConfigError, DataError
from puna.data import loader
from puna.data.loader import Joined, Mixture, n_windows, smallest, steps_of_epochs, windows
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


def test_too_few_for_the_processes_or_a_batch_that_does_not_divide_is_said() -> None:
    with pytest.raises(DataError, match="3 examples are too few for 4 processes"):
        steps_of_epochs(3, 4, 2, seed=0, multiple=4)
    with pytest.raises(ConfigError, match="batch of 12 does not divide over 8 processes"):
        steps_of_epochs(96, 12, 1, seed=0, multiple=8)


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


def test_the_windows_of_one_shard_are_those_that_models_were_trained_on() -> None:
    """Written out: another order would be another model."""
    data, seq_len, seed = shard(1003), 10, 7
    for row in (0, 1, 98, 99, 250):
        epoch, place = divmod(row, 99)
        offset = int(np.random.default_rng((seed, epoch)).integers(10))
        begin = offset + np.random.default_rng((seed, epoch, 1)).permutation(99)[place] * 10
        assert windows(data, seq_len, 1, row, seed)[0][0].tolist() == list(range(begin, begin + 10))


def mixture(weights: dict[str, float], n_tokens: int = 1001) -> Mixture:
    """Sources whose tokens tell them apart: 0 ..., 10000 ..., 20000 ..."""
    arrays = {name: (np.arange(n_tokens) + 10000 * i).astype(np.uint16) for i, name in enumerate(weights)}
    return Mixture({name: Joined([array[:300], array[300:]]) for name, array in arrays.items()}, weights)


def test_arrays_are_read_as_one() -> None:
    tokens = np.arange(50, dtype=np.uint16)
    joined = Joined([tokens[:20], tokens[20:21], tokens[21:]])
    assert len(joined) == 50
    for begin, end in ((0, 50), (5, 20), (19, 21), (20, 21), (18, 30), (21, 50)):
        assert joined.read(begin, end).tolist() == list(range(begin, end))


def test_sources_are_seen_by_their_weight() -> None:
    """Sources of equal size: at any time each has had its share, to within two windows."""
    weights = {"a": 1.0, "b": 2.5, "c": 0.5}
    data = mixture(weights)
    seen: Counter[int] = Counter()
    for row in range(800):
        seen[int(windows(data, 10, 1, row, seed=3)[0][0, 0]) // 10000] += 1
        assert all(abs(seen[i] - (row + 1) * w / 4) <= 2 for i, w in enumerate(weights.values()))
    assert seen == {0: 200, 1: 500, 2: 100}


def test_a_weight_is_epochs_whatever_the_size() -> None:
    small, large = np.zeros(1001, np.uint16), np.ones(8001, np.uint16)
    data = Mixture({"small": Joined([small]), "large": Joined([large])}, {"small": 3.0, "large": 1.0})
    rows = windows(data, 10, 1100, 0, seed=0)[0]
    assert int((rows[:, 0] == 0).sum()) == pytest.approx(300, abs=1), "three times its hundred windows"
    assert n_windows(data, 10) == 3 * 99 + 799
    assert smallest(data) == (" of the source 'small'", 1001)


def test_each_source_goes_through_its_own_windows() -> None:
    data = mixture({"a": 1.0, "b": 1.0})
    rows = windows(data, 10, 198, 0, seed=3)[0]
    for number in (0, 1):
        begins = sorted(rows[rows[:, 0] // 10000 == number][:, 0].tolist())
        assert [b - begins[0] for b in begins] == list(range(0, 990, 10)), "all of an epoch, each once"


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_batch_of_one(processes: int) -> None:
    data = mixture({"a": 1.0, "b": 2.5, "c": 0.5})
    for step in (0, 3, 77):
        whole, targets = windows(data, 10, 8, step, seed=1)
        each = 8 // processes
        parts = [windows(data, 10, 8, step, 1, slice(i * each, (i + 1) * each)) for i in range(processes)]
        assert torch.equal(torch.cat([inputs for inputs, _ in parts]), whole)
        assert torch.equal(torch.cat([out for _, out in parts]), targets)


def test_an_order_is_drawn_once_an_epoch_however_many_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[object] = []
    monkeypatch.setattr(loader, "_latest", {})
    draw = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: (drawn.append(seed), draw(seed))[1])
    for epoch in (0, 0, 1, 0):
        orders = [loader._permutation(9, source, epoch).tolist() for source in range(40)]
        assert orders == [draw((source, epoch, 1)).permutation(9).tolist() for source in range(40)]
    assert len(drawn) == 3 * 40

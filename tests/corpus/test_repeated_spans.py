"""Repeated spans against a search by hand, and a long way round."""

from __future__ import annotations

import numpy as np
import pytest

from puna.corpus import repeated_spans
from puna.corpus.repeated_spans import BASE, find, window_hashes

BOS, EOS = 1, 2


def corpus(*documents: list[int]) -> tuple[repeated_spans.Places, repeated_spans.Places]:
    """Tokens and offsets of documents, BOS and EOS put around them."""
    whole = [[BOS, *document, EOS] for document in documents]
    return np.array([i for document in whole for i in document], np.uint16), np.cumsum([0, *map(len, whole)])


def slow(documents: list[list[int]], length: int) -> list[bool]:
    """What `find` should say, by looking at every window of every document."""
    firsts: dict[tuple[int, ...], int] = {}
    repeated: list[bool] = []
    for document in documents:
        begin = len(repeated) + 1
        repeated += [False] * (len(document) + 2)
        for i in range(len(document) - length + 1):
            first = firsts.setdefault(tuple(document[i : i + length]), begin + i)
            if begin + i >= first + length:
                repeated[begin + i : begin + i + length] = [True] * length
    return repeated


def test_the_hash_is_the_polynomial() -> None:
    tokens = np.array([3, 1, 4, 1, 5], np.uint16)
    by_hand = [sum(int(t) * BASE**j for j, t in enumerate(tokens[i : i + 3])) % 2**64 for i in range(3)]
    assert [int(h) for h in window_hashes(tokens, 3)] == by_hand
    assert len(window_hashes(tokens, 6)) == 0


def test_a_planted_run_is_cut_and_its_first_copy_stays() -> None:
    run = [40, 41, 42, 43, 44]
    tokens, offsets = corpus([10, *run, 11], [12, 13, *run], [*run[:4], 14], run)
    found = find(tokens, offsets, np.ones(4, bool), 5)
    assert tokens[found].tolist() == run + run
    assert np.flatnonzero(found).tolist() == [*range(12, 17), *range(26, 31)]
    kept = np.array([False, True, True, True])
    assert np.flatnonzero(find(tokens, offsets, kept, 5)).tolist() == [*range(26, 31)], "a dropped document has no copy"


def test_bos_and_eos_are_no_part_of_a_run() -> None:
    tokens, offsets = corpus([5, 6], [5, 6], [5, 6])
    assert not find(tokens, offsets, np.ones(3, bool), 3).any()
    assert np.flatnonzero(find(tokens, offsets, np.ones(3, bool), 2)).tolist() == [5, 6, 9, 10]


def test_a_run_that_repeats_within_itself_keeps_its_beginning() -> None:
    tokens, offsets = corpus([7] * 20)
    assert np.flatnonzero(find(tokens, offsets, np.ones(1, bool), 4)).tolist() == [*range(5, 21)]


@pytest.mark.parametrize("in_memory", [10**6, 50])
@pytest.mark.parametrize("length", [1, 2, 4, 7])
def test_as_the_slow_search(length: int, in_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few kinds of token, so that there is much to find; small blocks, so that runs lie across them."""
    monkeypatch.setattr(repeated_spans, "BLOCK", 37)
    rng = np.random.default_rng(length)
    documents = [rng.integers(3, 6, rng.integers(0, 30)).tolist() for _ in range(30)]
    tokens, offsets = corpus(*documents)
    found = find(tokens, offsets, np.ones(30, bool), length, in_memory)
    assert found.tolist() == slow(documents, length)
    assert length > 4 or found.any()


def test_equal_hashes_are_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated_spans, "window_hashes", lambda tokens, n: np.zeros(len(tokens) - n + 1, np.uint64))
    tokens, offsets = corpus([10, 11, 12], [13, 14, 15], [10, 11, 12])
    assert np.flatnonzero(find(tokens, offsets, np.ones(3, bool), 3)).tolist() == [11, 12, 13]

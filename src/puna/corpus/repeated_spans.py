"""Repeated spans: runs of tokens that were there before, found by a rolling hash and compared token by token.

1. A polynomial hash modulo 2^64 of every window of `length` tokens that lies within a document.
2. Windows sorted by hash, one range of hashes after the other, so that no more than IN_MEMORY are held.
3. Of windows with the same hash, those that equal the first token by token, and do not overlap it, are repeats.

A longer run that repeats is a row of such windows: all of it is found.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from puna.data.shards import Tokens

BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
IN_MEMORY = 2**24  # windows: about a gigabyte while they are sorted
BLOCK = 2**22  # tokens hashed or compared at a time

Bools = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def find(tokens: Tokens, offsets: Places, kept: Bools, length: int, in_memory: int = IN_MEMORY) -> Bools:
    """Which tokens (T,) of documents [offsets[i], offsets[i + 1]) repeat earlier ones; the first of equal runs stays.

    BOS and EOS never repeat, and documents that are not `kept` (N,) count for nothing.
    """
    begins = _begins(tokens, offsets, kept, length)
    repeated = np.zeros(len(tokens), bool)
    ranges = max(1, -(-int(begins.sum()) // in_memory))
    for part in range(ranges):
        for place in _repeats(tokens, *_windows(tokens, begins, length, part, ranges), length):
            repeated[place : place + length] = True
    return repeated


def _begins(tokens: Tokens, offsets: Places, kept: Bools, length: int) -> Bools:
    """(T,): whether a window that begins here lies between BOS and EOS of a kept document."""
    begins = np.zeros(len(tokens), bool)
    for begin, end in zip(offsets[:-1][kept], offsets[1:][kept], strict=True):
        begins[begin + 1 : max(begin + 1, end - length)] = True
    return begins


def _windows(tokens: Tokens, begins: Bools, length: int, part: int, ranges: int) -> tuple[Hashes, Places]:
    """1: hash and place of the windows whose hash is in this range, in order of place."""
    hashes, places = [], []
    width = np.uint64((2**64 - 1) // ranges + 1 if ranges > 1 else 2**64 - 1)
    for begin in range(0, len(tokens), BLOCK):
        block = window_hashes(tokens[begin : begin + BLOCK + length - 1], length)
        wanted = begins[begin : begin + len(block)] & ((block // width == part) if ranges > 1 else True)
        hashes.append(block[wanted])
        places.append(np.flatnonzero(wanted) + begin)
    return np.concatenate(hashes), np.concatenate(places)


def window_hashes(tokens: Tokens, length: int) -> Hashes:
    """(T,) -> (T - length + 1,): sum over j < length of tokens[i + j] BASE^j, modulo 2^64."""
    if len(tokens) < length:
        return np.zeros(0, np.uint64)
    sums = np.cumsum(tokens * _powers(BASE, len(tokens)), dtype=np.uint64)
    windows = sums[length - 1 :].copy()
    windows[1:] -= sums[:-length]
    return windows * _powers(pow(BASE, -1, 2**64), len(windows))


def _powers(base: int, n: int) -> Hashes:
    """base^0 ... base^(n - 1), modulo 2^64."""
    factors = np.full(n, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def _repeats(tokens: Tokens, hashes: Hashes, places: Places, length: int) -> Iterator[int]:
    """2 and 3: where the windows begin that equal an earlier one."""
    order = np.argsort(hashes, kind="stable")  # of one hash the first place comes first
    hashes, places = hashes[order], places[order]
    is_first = np.ones(len(hashes), bool)
    is_first[1:] = hashes[1:] != hashes[:-1]
    firsts = places[is_first][np.cumsum(is_first) - 1]
    apart = places >= firsts + length
    places, firsts = places[apart], firsts[apart]
    windows = np.lib.stride_tricks.sliding_window_view(tokens, length) if len(places) else None
    step = max(1, BLOCK // length)
    for begin in range(0, len(places), step):
        assert windows is not None
        mine, first = places[begin : begin + step], firsts[begin : begin + step]
        yield from mine[(windows[mine] == windows[first]).all(1)].tolist()

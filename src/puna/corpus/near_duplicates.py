"""Near-duplicates: documents that share most of their runs of five words, by MinHash and locality-sensitive hashing."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.config import ConfigError

SHINGLE = 5  # words
PERMUTATIONS = 128
SCHEME = "affine32"  # datasketch's name for the kind of hash, which a signature does not tell
WEIGHTS = 0.02, 0.98  # candidates are looked at again: few should be missed (2 % of those just as alike as 0.8)
CHUNK = 10_000  # runs hashed at a time: 128 numbers each

Signatures = npt.NDArray[np.uint32]


def signature(text: str, seed: int = 0) -> Signatures:
    """The MinHash (128,) of a text's runs of five words; case and punctuation do not count, unless there is no word."""
    words = re.findall(r"\w+", text.lower()) or [text]
    runs = {" ".join(words[i : i + SHINGLE]).encode() for i in range(max(1, len(words) - SHINGLE + 1))}
    minhash, listed = _datasketch().MinHash(PERMUTATIONS, seed, scheme=SCHEME), list(runs)
    for begin in range(0, len(listed), CHUNK):
        minhash.update_batch(listed[begin : begin + CHUNK])
    hashes: Signatures = minhash.hashvalues
    return hashes


def find(signatures: Signatures, threshold: float) -> npt.NDArray[np.bool_]:
    """(N, 128) -> (N,): True where an earlier document, itself no duplicate, is estimated to be this alike (Jaccard).

    The index is in memory, some 6 kB a document (docs/log.md).
    """
    datasketch = _datasketch()
    index = datasketch.MinHashLSH(threshold, PERMUTATIONS, weights=WEIGHTS)
    duplicate = np.zeros(len(signatures), bool)
    for i, mine in enumerate(signatures):
        minhash = datasketch.LeanMinHash(seed=0, hashvalues=mine, scheme=SCHEME)
        duplicate[i] = any((signatures[j] == mine).mean() >= threshold for j in index.query(minhash))
        if not duplicate[i]:
            index.insert(i, minhash, check_duplication=False)
    return duplicate


def _datasketch() -> Any:
    try:
        import datasketch
    except ModuleNotFoundError:
        raise ConfigError("near_duplicates needs datasketch: pip install -e '.[data]' in Puna's folder") from None
    return datasketch

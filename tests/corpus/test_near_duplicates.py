"""Near-duplicates: planted ones are found, in order, and what is merely alike is not."""

from __future__ import annotations

import random

import numpy as np
import pytest

from puna.corpus import near_duplicates

pytest.importorskip("datasketch", reason="datasketch is not installed")


def document(seed: int, n: int = 300) -> list[str]:
    rng = random.Random(seed)
    return [f"w{rng.randrange(5000)}" for _ in range(n)]


def signatures(texts: list[str]) -> near_duplicates.Signatures:
    return np.stack([near_duplicates.signature(text) for text in texts])


def changed(words: list[str], n: int) -> str:
    """The words with `n` of them, far apart, replaced: each takes five runs with it."""
    step = len(words) // n
    return " ".join("new" if i % step == step // 2 and i // step < n else word for i, word in enumerate(words))


def test_planted_duplicates_are_found() -> None:
    """3 of 296 runs' words changed: 15 runs differ either way, (296 - 15) / (296 + 15) = 0.90; 20 changed: 0.49."""
    words, other = document(0), document(1)
    texts = [" ".join(words), " ".join(other), " ".join(words).upper() + "!", changed(words, 3), changed(words, 20)]
    assert near_duplicates.find(signatures(texts), 0.8).tolist() == [False, False, True, True, False]
    assert near_duplicates.find(signatures(texts[::-1]), 0.8).tolist() == [False, False, True, False, True]


def test_what_is_like_a_duplicate_alone_stays() -> None:
    """25 words changed, then 25 others: 125 of 996 runs differ from one to the next (0.78), 250 over both (0.60)."""
    first = document(2, 1000)
    second = [f"{word}x" if i % 40 == 10 else word for i, word in enumerate(first)]
    third = [f"{word}x" if i % 40 == 30 else word for i, word in enumerate(second)]
    chain = signatures([" ".join(words) for words in (first, second, third)])
    assert near_duplicates.find(chain, 0.7).tolist() == [False, True, False]
    assert near_duplicates.find(chain[1:], 0.7).tolist() == [False, True]


def test_estimates_are_near_jaccards() -> None:
    words = document(3)
    for n, jaccard in ((3, 281 / 311), (10, 246 / 346), (20, 196 / 396)):
        estimate = (near_duplicates.signature(" ".join(words)) == near_duplicates.signature(changed(words, n))).mean()
        assert estimate == pytest.approx(jaccard, abs=0.12)


def test_short_and_empty_texts_have_a_signature() -> None:
    texts = ["", "...", "two words", "Two WORDS.", "three other words"]
    assert near_duplicates.find(signatures(texts), 0.9).tolist() == [False, False, False, True, False]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(document(4))
    whole = near_duplicates.signature(text, seed=5)
    monkeypatch.setattr(near_duplicates, "CHUNK", 7)
    assert np.array_equal(near_duplicates.signature(text, seed=5), whole)
    assert not np.array_equal(near_duplicates.signature(text, seed=6), whole)


def test_texts_without_a_word_are_not_all_alike() -> None:
    assert near_duplicates.find(signatures(["!?", "...", "***", "!?"]), 0.8).tolist() == [False, False, False, True]

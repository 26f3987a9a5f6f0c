"""A bag of words as a reward model: the baseline that knows which words people like, and nothing else.

An answer's features are log(1 + how often) of each word of the vocabulary; its score is linear in them, fitted to
comparisons by the ranking loss (paper, equation 1) with an L2 penalty of weight 1, as logistic regressions mostly are.
The prompt's words cancel. The optimum is one, so there is no seed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from puna import losses

WORD = re.compile(r"\w+|[^\w\s]")
LARGEST_VOCABULARY = 50_000
FEWEST_ANSWERS = 2  # that a word of the vocabulary stands in


class BagOfWords:
    """Texts -> raw scores (N,)."""

    def __init__(self, vocabulary: dict[str, int], weights: Tensor) -> None:
        self.vocabulary = vocabulary
        self.weights = weights

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return _sums(_bags(texts, self.vocabulary), self.weights)


def fit(pairs: Sequence[tuple[str, str]]) -> BagOfWords:
    """The model of (chosen, rejected) answers, of which there must be some."""
    words = [_words(text) for pair in pairs for text in pair]
    found = Counter(word for counts in words for word in counts)
    kept = [word for word, n in found.most_common(LARGEST_VOCABULARY) if n >= FEWEST_ANSWERS]
    vocabulary = {word: i for i, word in enumerate(kept)}
    weights = torch.zeros(max(1, len(kept)), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=300, line_search_fn="strong_wolfe")
    chosen, rejected = (_bags([pair[answer] for pair in pairs], vocabulary) for answer in (0, 1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        ranked = losses.ranking_loss(_sums(chosen, weights), _sums(rejected, weights), torch.zeros(()))
        loss = ranked.sum() + weights.square().sum() / 2
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return BagOfWords(vocabulary, weights.detach())


def _words(text: str) -> Counter[str]:
    return Counter(WORD.findall(text.lower()))


class _Bags(NamedTuple):
    """The features of N texts, all in a row."""

    numbers: Tensor  # (F,) int64: which word
    values: Tensor  # (F,)
    begins: Tensor  # (N,) int64: where each text's begin


def _bags(texts: Sequence[str], vocabulary: dict[str, int]) -> _Bags:
    known = [{vocabulary[word]: n for word, n in _words(text).items() if word in vocabulary} for text in texts]
    numbers = torch.tensor([i for counts in known for i in counts], dtype=torch.int64)
    values = torch.tensor([n for counts in known for n in counts.values()], dtype=torch.float32).log1p()
    return _Bags(numbers, values, torch.tensor([0, *map(len, known)]).cumsum(0)[:-1])


def _sums(bags: _Bags, weights: Tensor) -> Tensor:
    """The weighted sum of each text's features, (N,)."""
    return F.embedding_bag(bags.numbers, weights[:, None], bags.begins, mode="sum", per_sample_weights=bags.values)[
        :, 0
    ]

"""The baseline of words: its optimum by hand, what it does not know, how quick it is."""

from __future__ import annotations

import math

import pytest

from puna.evals import bag_of_words

PAIRS = [("Kind words", "words"), ("kind kind kind words", "words")] * 3


def test_the_optimum_by_hand() -> None:
    # "words" cancels; "kind" stands once more in three pairs and three times more in the others. At the optimum
    # the penalty's pull, w, is that of the pairs: the sum of d sigmoid(-w d) over d = log 2 and log 4.
    model = bag_of_words.fit(PAIRS)
    w = float(model.weights[model.vocabulary["kind"]])
    assert sum(3 * d / (1 + math.exp(w * d)) for d in (math.log(2), math.log(4))) == pytest.approx(w, abs=1e-4)
    assert float(model.weights[model.vocabulary["words"]]) == pytest.approx(0, abs=1e-6)
    scores = model(["kind", "KIND, kind", "", "unheard of"])
    assert scores.tolist() == pytest.approx([w * math.log(2), w * math.log(3), 0, 0], abs=1e-5)


def test_a_word_of_one_answer_alone_is_not_learned() -> None:
    assert set(bag_of_words.fit([("once", "b"), ("c", "b")]).vocabulary) == {"b"}
    assert bag_of_words.fit([("x", "y")])(["x"]).tolist() == [0]


def test_it_ranks_what_it_was_not_trained_on() -> None:
    train = [(f"sorry no {i % 7}", f"sure yes {i % 5}") for i in range(60)]
    good, bad = bag_of_words.fit(train)(["sorry , never", "sure , always"]).tolist()
    assert good > 0.5 > -0.5 > bad

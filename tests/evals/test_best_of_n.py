"""Best of n: which answer is given, what counts as one, how far it is from the model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from puna.config import ConfigError
from puna.evals import best_of_n
from puna.evals.valley import EvaluateConfig
from puna.formats import huggingface
from puna.generate.scoring import Judges, Scorer
from puna.types import Completion
from tests import helpers


def answer(text: str, *, finished: bool = True) -> Completion:
    tokens = helpers.tokenizer().encode(text) + [helpers.tokenizer().eos_id] * finished
    return Completion(text, tokens, [-1.0] * len(tokens), finished)


def test_the_first_of_the_best_is_picked() -> None:
    groups = [[answer(word) for word in row] for row in ("abc", "def")]
    rewards = torch.tensor([[0.1, 0.9, 0.9], [0.5, 0.2, 0.8]])
    assert [given.text for given in best_of_n.pick(groups, rewards)] == ["b", "f"]
    assert [given.text for given in best_of_n.pick(groups, rewards, 2)] == ["b", "d"]
    assert [given.text for given in best_of_n.pick(groups, rewards, 1)] == ["a", "d"]
    assert best_of_n.pick([], torch.zeros(0, 0)) == []


def test_rewards_are_both_models_combined(tmp_path: Path) -> None:
    tokenizer = helpers.tokenizer()
    helpfulness, safety = (
        Scorer(huggingface.load_reward_model(helpers.reward_folder(tmp_path / str(seed), seed)), tokenizer)
        for seed in (1, 2)
    )
    groups = [[answer("the llama"), answer("a herder", finished=False)], [answer("her dog"), answer("7 tents")]]
    prompts, judges = [[1, 5], [1, 6, 7]], Judges(helpfulness, safety, threshold=0.0)
    rewards = best_of_n.rate(judges, prompts, groups, [False, True])
    rows = [prompts[i] + groups[i][j].tokens for i, j in ((0, 0), (1, 0), (1, 1))]
    assert rewards[0].tolist() == pytest.approx([float(helpfulness.score_tokens(rows[:1])[0]), 0.0])
    assert rewards[1].tolist() == pytest.approx(safety.score_tokens(rows[1:]).tolist()), "a tagged prompt"
    assert best_of_n.rate(None, prompts, groups, [False, True]).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_how_far_the_best_of_n_is() -> None:
    assert best_of_n.kl(1) == 0.0
    assert best_of_n.kl(4) == pytest.approx(1.386294 - 0.75)  # log n alone would be too much
    # The best of n by a score that no two answers share draws the k-th of m answers with (k^n - (k - 1)^n) / m^n.
    m, n = 2000, 4
    p = [(k**n - (k - 1) ** n) / m**n for k in range(1, m + 1)]
    assert best_of_n.kl(n) == pytest.approx(sum(q * math.log(q * m) for q in p), abs=1e-3)


@pytest.mark.parametrize(("n", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_sizes(n: int, expected: list[int]) -> None:
    assert best_of_n.sizes(n) == expected


def test_choosing_needs_reward_models(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="best_of 4 needs reward models"):
        EvaluateConfig(tmp_path, tmp_path, best_of=4)
    with pytest.raises(ConfigError, match="best_of is 0"):
        EvaluateConfig(tmp_path, tmp_path, best_of=0)

"""Scores and log-probabilities of finished texts: each row as if it were alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from puna.config import ConfigError
from puna.generate.scoring import Scale, Scorer, combined_reward, open_scorer, scale_of, sequence_logprobs
from puna.text import chat
from tests import helpers

ROWS = [[1, 300, 301, 302, 2], [1, 303], [1, 304, 305, 306, 307, 308, 309, 2], [5]]


def test_scores_are_sigmoids_in_the_order_given() -> None:
    model, tokenizer, dialogs = helpers.reward_model(), helpers.tokenizer(), helpers.dialogs(9)
    scores = Scorer(model, tokenizer, max_tokens=100)(dialogs)
    for score, dialog in zip(scores, dialogs, strict=True):
        ids = chat.encode(dialog, tokenizer).tokens
        raw = model(torch.tensor([ids]), torch.tensor([len(ids)]))[0].detach()
        torch.testing.assert_close(score, 1 / (1 + torch.exp(-raw)), rtol=0, atol=1e-6)
    assert scores.dtype == torch.float32 and len(set(scores.tolist())) == 9


def test_no_rows_no_scores() -> None:
    assert Scorer(helpers.reward_model(), helpers.tokenizer())([]).shape == (0,)
    assert sequence_logprobs(helpers.model(), []) == []


def test_scale_by_hand() -> None:
    assert scale_of(torch.tensor([1.0, 3.0, 5.0, 7.0])) == Scale(4.0, pytest.approx(5**0.5), 4)
    assert scale_of(torch.tensor([2.0, 2.0])) is None and scale_of(torch.zeros(0)) is None
    model, tokenizer = helpers.reward_model(), helpers.tokenizer()
    raw = Scorer(model, tokenizer).raw(ROWS)
    scaled = Scorer(model, tokenizer, scale=Scale(2.0, 4.0, 9)).raw(ROWS)
    torch.testing.assert_close(scaled, (raw - 2) / 4)


def test_a_model_without_a_scale_cannot_be_normalised(tmp_path: Path) -> None:
    folder = helpers.reward_folder(tmp_path / "model")
    assert open_scorer(folder, torch.device("cpu")).scale is None
    with pytest.raises(ConfigError, match=r"model: its puna\.json has no scale"):
        open_scorer(folder, torch.device("cpu"), normalise=True)
    with pytest.raises(ConfigError, match="expected LlamaForSequenceClassification"):
        open_scorer(helpers.talker_folder(tmp_path / "chat"), torch.device("cpu"))


def test_sequence_logprobs() -> None:
    model = helpers.model()
    for max_tokens in (1, 16, 10**6):
        for temperature in (1.0, 0.5):
            for row, actual in zip(ROWS, sequence_logprobs(model, ROWS, temperature, max_tokens), strict=True):
                logp = (model(torch.tensor([row]))[0].detach() / temperature).log_softmax(-1)
                expected = torch.tensor([float(logp[t, row[t + 1]]) for t in range(len(row) - 1)])
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_combined_reward() -> None:
    safety, helpfulness = torch.tensor([0.9, 0.9, 0.1]), torch.tensor([0.4, 0.4, 0.4])
    assert combined_reward(safety, helpfulness, [True, False, False], 0.15).tolist() == [
        float(safety[0]),
        float(helpfulness[1]),
        float(safety[2]),
    ]

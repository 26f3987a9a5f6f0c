"""The reward model reads the last counted token, whatever the pads hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from puna.data.packing import pad_right
from puna.model.reward import RewardModel
from puna.model.transformer import Transformer
from tests import helpers

pytestmark = pytest.mark.usefixtures("path")

ROWS = [[1, 300, 301, 2, 1, 302, 2], [1, 303, 304, 2], [1, 305, 306, 307, 308, 2]]


def test_score_is_the_heads_at_the_last_token() -> None:
    model = helpers.reward_model()
    for row in ROWS:
        alone = torch.tensor([row])
        expected = model.body.hidden(alone)[0, -1] @ model.score.weight[0]
        torch.testing.assert_close(model(alone, torch.tensor([len(row)])), expected[None])


def test_pads_do_not_matter() -> None:
    model = helpers.reward_model()
    alone = torch.cat([model(torch.tensor([row]), torch.tensor([len(row)])) for row in ROWS])
    for pad in (0, 1, 2, 300):
        tokens, lengths = pad_right(ROWS, pad)
        wider = torch.nn.functional.pad(tokens, (0, 5), value=pad)
        torch.testing.assert_close(model(tokens, lengths), alone)
        torch.testing.assert_close(model(wider, lengths), alone)


def test_values_score_every_token() -> None:
    model = helpers.reward_model()
    tokens, lengths = pad_right(ROWS)
    values = model.values(tokens)
    assert values.shape == tokens.shape
    torch.testing.assert_close(values[torch.arange(3), lengths - 1], model(tokens, lengths))
    torch.testing.assert_close(values[1, 1], model(torch.tensor([ROWS[1][:2]]), torch.tensor([2]))[0])


def test_the_language_model_head_is_gone() -> None:
    model = helpers.reward_model()
    assert isinstance(model.body.output, nn.Identity)
    assert [name for name, _ in model.named_parameters() if "output" in name] == []
    tokens, lengths = pad_right(ROWS)
    model(tokens, lengths).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_tied_model_keeps_its_embeddings() -> None:
    model = RewardModel(Transformer(helpers.config(tie_embeddings=True)))
    assert model.body.tok_embeddings.weight.shape == (helpers.VOCAB, 32)


def test_scores_are_float32() -> None:
    model = helpers.reward_model().to(torch.bfloat16)
    tokens, lengths = pad_right(ROWS)
    assert model(tokens, lengths).dtype == torch.float32

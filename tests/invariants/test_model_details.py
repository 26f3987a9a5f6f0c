"""Padding, positions and the reward model's head: letters c, d, e and i, and that batches and caches change nothing."""

from __future__ import annotations

import math

import pytest
import torch

from puna.data.packing import apart, pad_right
from puna.generate.engine import LocalEngine
from puna.generate.scoring import Scorer, sequence_logprobs
from puna.model.reward import RewardModel
from puna.model.transformer import ModelConfig, Transformer
from puna.text import chat
from tests import helpers

ROWS = [[1, 300, 301, 302], [1, 303, 304, 305, 306, 307, 308], [1, 309, 310, 311, 312]]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_c_positions_follow_the_mask_under_left_padding() -> None:
    model, width = helpers.model(), max(map(len, ROWS))
    left = torch.tensor([[0] * (width - len(row)) + row for row in ROWS])
    real = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in ROWS])
    positions = (real.cumsum(1) - 1).clamp(min=0)
    padded = model(left, positions=positions, documents=apart(real.long()))
    right = model(pad_right(ROWS)[0])
    for i, row in enumerate(ROWS):
        alone = model(torch.tensor([row]))[0]
        close(padded[i, width - len(row) :], alone)
        close(right[i, : len(row)], alone)


def test_d_a_pad_is_not_eos() -> None:
    tokenizer = helpers.tokenizer()
    assert tokenizer.pad_id not in (tokenizer.eos_id, tokenizer.bos_id)
    # A dialog of several turns holds several EOS: its score is read at the last, however long its neighbours are.
    dialogs = helpers.dialogs(12)
    rows = [chat.encode(dialog, tokenizer).tokens for dialog in dialogs]
    assert max(row.count(tokenizer.eos_id) for row in rows) == 3
    scorer = Scorer(helpers.reward_model(), tokenizer)
    close(scorer(dialogs), torch.cat([scorer([dialog]) for dialog in dialogs]), 1e-6)


@pytest.mark.parametrize("pad", [0, 1, 2, 350])
def test_e_the_reward_model_reads_the_last_counted_token(pad: int) -> None:
    model = helpers.reward_model()
    rows = [[1, 300, 301, 2, 1, 302, 2], [1, 303, 2], [1, 304, 305, 306, 307]]  # the last one without EOS
    tokens, lengths = pad_right(rows, pad)
    tokens = torch.nn.functional.pad(tokens, (0, 3), value=pad)
    for i, row in enumerate(rows):
        state = model.body.hidden(torch.tensor([row]))[0, -1]
        close(model(tokens, lengths)[i], state @ model.score.weight[0])


def test_i_the_reward_head_begins_with_deviation_one_over_root_d_plus_one() -> None:
    model = RewardModel(Transformer(ModelConfig(4096, 1, 1, 1, 8, 8, 8)))
    assert float(model.score.weight.detach().std()) == pytest.approx(1 / math.sqrt(4097), rel=0.05)
    other = RewardModel(Transformer(ModelConfig(4096, 1, 1, 1, 8, 8, 8)))
    for each in (model, other):
        each.init_head(torch.Generator().manual_seed(3))
    assert torch.equal(model.score.weight, other.score.weight)


def test_cache_is_no_cache() -> None:
    # Longer than the cache's block, prompts of several lengths, sequences that end at several times.
    engine = LocalEngine(helpers.talker(end=0.03), helpers.tokenizer(), max_batch_size=3)
    answers = engine.generate_ids(ROWS, n=2, max_new_tokens=80, temperature=0.8, seed=1)
    rows = [row + answer.tokens for row, of_row in zip(ROWS, answers, strict=True) for answer in of_row]
    assert max(len(row) for row in rows) > 64
    uncached = sequence_logprobs(engine.model, rows, temperature=0.8)
    for logprobs, answer in zip(uncached, [answer for of_row in answers for answer in of_row], strict=True):
        close(torch.tensor(answer.logprobs), logprobs[-len(answer.tokens) :], 1e-4)


def test_a_batch_of_many_is_as_many_of_one() -> None:
    engine = LocalEngine(helpers.talker(), helpers.tokenizer())
    together = engine.generate_ids(ROWS, n=3, max_new_tokens=20, seed=4)
    narrow = LocalEngine(engine.model, engine.tokenizer, max_batch_size=1).generate_ids(
        ROWS, n=3, max_new_tokens=20, seed=4
    )
    assert [[a.tokens for a in row] for row in together] == [[a.tokens for a in row] for row in narrow]
    rows = [row + answer.tokens for row, of_row in zip(ROWS, together, strict=True) for answer in of_row]
    many = sequence_logprobs(engine.model, rows)
    few = sequence_logprobs(engine.model, rows, max_tokens=1)
    for one, other in zip(many, few, strict=True):
        close(one, other)

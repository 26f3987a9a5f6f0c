"""Blocks: with the cache = without it, whoever shares them; and none is lost or given twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from puna.data.packing import apart
from puna.generate import kv_cache
from puna.generate.kv_cache import BLOCK, BlockCache, DecodePass, Full, PromptPass, blocks_of
from puna.model.transformer import Transformer
from tests import helpers

PROMPTS = [[1, 300, 301, 302, 303], [1, 310], [1, 320, 321]]
LONG = [1] + [300 + i % 50 for i in range(3 * BLOCK)]


def cached(model: Transformer, capacity: int = 64) -> BlockCache:
    return BlockCache(model.config, capacity, torch.float32, torch.device("cpu"))


def read(model: Transformer, cache: BlockCache, tokens: list[list[int]], blocks: list[list[int]]) -> Tensor:
    """Run what is not cached of prompts, which have as many blocks as they need; the logits after each (R, V)."""
    starts = [BLOCK * len(held) for held in blocks]
    lengths = [len(row) - start for row, start in zip(tokens, starts, strict=True)]
    for row, held in zip(tokens, blocks, strict=True):
        held += [cache.take() for _ in range(blocks_of(len(row)) - len(held))]
    ids = torch.zeros(len(tokens), max(lengths), dtype=torch.int64)
    for i, (row, start) in enumerate(zip(tokens, starts, strict=True)):
        ids[i, : len(row) - start] = torch.tensor(row[start:])
    positions = torch.arange(max(lengths)) + torch.tensor(starts)[:, None]
    logits = model(ids, positions=positions, cache=PromptPass(cache, blocks, starts, lengths))
    return logits[torch.arange(len(tokens)), torch.tensor(lengths) - 1]


def step(model: Transformer, cache: BlockCache, tokens: list[int], blocks: list[list[int]], at: list[int]) -> Tensor:
    """Logits (B, V) after one token a row, put at each row's place."""
    for held, place in zip(blocks, at, strict=True):
        held += [cache.take() for _ in range(blocks_of(place + 1) - len(held))]
    this = DecodePass(cache, blocks, np.array(at) + 1)
    return model(torch.tensor(tokens)[:, None], positions=torch.tensor(at)[:, None], cache=this)[:, 0]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("apart", [False, True])
def test_ragged_decoding_is_the_full_forward_pass(apart: bool) -> None:
    model = helpers.model(max_seq_len=512)
    cache, texts = cached(model), [list(prompt) for prompt in (*PROMPTS, LONG)]
    if apart:  # blocks far from the beginning are selected, not read as they lie
        [cache.take() for _ in range(40)]
    blocks: list[list[int]] = [[] for _ in texts]
    for row, logits in enumerate(read(model, cache, texts, blocks)):
        close(logits, model(torch.tensor([texts[row]]))[0, -1])
    for i in range(BLOCK + 8):
        new = [350 + (i + row) % 30 for row in range(4)]
        logits = step(model, cache, new, blocks, [len(text) for text in texts])
        for row in range(4):
            texts[row].append(new[row])
            if i % 8 == 0:
                close(logits[row], model(torch.tensor([texts[row]]))[0, -1])


@torch.inference_mode()
def test_rows_that_share_blocks_decode_as_alone() -> None:
    model = helpers.model()
    cache = cached(model)
    first: list[list[int]] = [[], []]
    read(model, cache, [LONG, PROMPTS[0]], first)
    cache.remember(LONG, first[0])
    matched = cache.match([*LONG, 340])
    assert matched == first[0][:3]
    blocks, texts = [*first, matched], [list(LONG), list(PROMPTS[0]), [*LONG, 341]]
    close(read(model, cache, texts[2:], blocks[2:])[0], model(torch.tensor([texts[2]]))[0, -1])
    for i in range(4):
        new = [350 + i, 360 + i, 370 + i]
        logits = step(model, cache, new, blocks, [len(text) for text in texts])
        for row in range(3):
            texts[row].append(new[row])
            close(logits[row], model(torch.tensor([texts[row]]))[0, -1])


@torch.inference_mode()
def test_a_prompt_may_be_read_in_parts() -> None:
    model = helpers.model()
    cache, blocks = cached(model), [[]]
    for end in (BLOCK, 2 * BLOCK, len(LONG)):
        logits = read(model, cache, [LONG[:end]], blocks)
        close(logits[0], model(torch.tensor([LONG[:end]]))[0, -1])


def test_blocks_are_given_once_and_come_back() -> None:
    cache = cached(helpers.model(), capacity=5)
    blocks = [cache.take() for _ in range(5)]
    assert sorted(blocks) == [0, 1, 2, 3, 4]
    with pytest.raises(Full):
        cache.take()
    cache.hold(blocks[:2])
    cache.release(blocks)
    assert (cache.in_use, cache.room) == (2, 3)
    assert sorted(cache.take() for _ in range(3)) == [2, 3, 4]


def test_prompts_are_remembered_until_the_room_is_wanted() -> None:
    cache = cached(helpers.model(), capacity=4)
    blocks = [cache.take() for _ in range(4)]
    cache.remember(LONG, blocks)  # three full blocks, and one token
    cache.release(blocks)
    assert cache.in_use == 0
    assert cache.match(LONG) == blocks[:3]
    assert cache.match([2, *LONG[1:]]) == []
    assert cache.match(LONG[: 2 * BLOCK]) == blocks[:1]  # its last token must be run
    cache.release(blocks[:3])
    cache.release(blocks[:1])
    taken = [cache.take() for _ in range(2)]
    assert taken == [blocks[3], blocks[2]]  # the free one, then the end of the prompt
    assert cache.match(LONG) == blocks[:2]
    assert (cache.in_use, cache.room) == (4, 0)


def test_what_nobody_reads_is_forgotten_before_the_cache_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "KEPT", 4)
    cache = cached(helpers.model(), capacity=1000)
    for i in range(100):
        text = [i + 1] * 4 * BLOCK
        blocks = [cache.take() for _ in range(4)]
        cache.remember(text, blocks)
        cache.release(blocks)
    assert len(cache.keys[0]) <= 32
    assert cache.match([100] * 4 * BLOCK) == blocks[:3]


def test_a_prompt_computed_twice_is_remembered_once() -> None:
    cache = cached(helpers.model())
    one, two = ([cache.take() for _ in range(4)] for _ in range(2))
    cache.remember(LONG, one)
    cache.remember(LONG, two)
    cache.release(one)
    cache.release(two)
    assert cache.match(LONG) == one[:3]


@torch.inference_mode()
def test_left_padding_is_right_padding_given_positions_and_documents() -> None:
    model = helpers.model()
    longest = max(map(len, PROMPTS))
    left = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    right = torch.tensor([p + [0] * (longest - len(p)) for p in PROMPTS])
    pads = torch.tensor([longest - len(p) for p in PROMPTS])[:, None]
    positions = (torch.arange(longest) - pads).clamp(min=0)
    real = (torch.arange(longest) >= pads).long()
    from_left = model(left, positions=positions, documents=apart(real))
    from_right = model(right)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(from_left[row, -len(prompt) :], from_right[row, : len(prompt)], atol=1e-5, rtol=0)

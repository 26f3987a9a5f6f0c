"""With the cache = without it; padding on either side changes nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from puna.generate.kv_cache import BLOCK, KVCache
from puna.generate.scheduler import prefill
from puna.model.transformer import Transformer
from tests import helpers

PROMPTS = [[1, 300, 301, 302, 303], [1, 310], [1, 320, 321]]


def cached(model: Transformer, rows: int) -> KVCache:
    return KVCache(model.config, rows, torch.float32, torch.device("cpu"))


def step(model: Transformer, cache: KVCache, tokens: list[int], lengths: list[int]) -> Tensor:
    """Logits (B, V) after one token a row, put at each row's length."""
    positions = torch.tensor(lengths)
    mask = cache.seek(positions, max(lengths) + 1)
    return model(torch.tensor(tokens)[:, None], positions=positions[:, None], mask=mask, cache=cache)[:, 0]


@torch.inference_mode()
def test_ragged_decoding_is_the_full_forward_pass() -> None:
    model = helpers.model()
    prompts = prefill(model, PROMPTS)
    cache = cached(model, 4)
    rows = torch.tensor([3, 0, 2])  # slot 1 stays empty
    cache.fill(rows, prompts.keys, prompts.values)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(prompts.logits[row], model(torch.tensor([prompt]))[0, -1], atol=1e-5, rtol=0)
    texts = {int(slot): list(prompt) for slot, prompt in zip(rows, PROMPTS, strict=True)} | {1: []}
    for i in range(2 * BLOCK):  # the cache grows on the way
        new = [350 + (i + slot) % 30 for slot in range(4)]
        logits = step(model, cache, new, [len(texts[slot]) for slot in range(4)])
        for slot in range(4):
            texts[slot].append(new[slot])
            full = model(torch.tensor([texts[slot]]))[0, -1]
            torch.testing.assert_close(logits[slot], full, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_one_prompt_fills_many_rows() -> None:
    model = helpers.model()
    prompts, cache = prefill(model, PROMPTS[:1]), cached(model, 3)
    source = torch.zeros(3, dtype=torch.int64)
    cache.fill(torch.arange(3), prompts.keys[:, source], prompts.values[:, source])
    logits = step(model, cache, [340, 341, 340], [5, 5, 5])
    torch.testing.assert_close(logits[0], logits[2], atol=0, rtol=0)
    torch.testing.assert_close(logits[1], model(torch.tensor([[*PROMPTS[0], 341]]))[0, -1], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_kept_rows_go_on_and_an_emptier_cache_narrows() -> None:
    model = helpers.model()
    long = [1] + [300 + i % 50 for i in range(3 * BLOCK)]
    cache, prompts = cached(model, 2), prefill(model, [long, PROMPTS[0]])
    cache.fill(torch.arange(2), prompts.keys, prompts.values)
    assert cache.keys.shape[3] == 4 * BLOCK
    cache.keep(torch.tensor([1]))
    logits = step(model, cache, [340], [5])
    assert cache.keys.shape == (2, 1, 2, BLOCK, 8)
    torch.testing.assert_close(logits[0], model(torch.tensor([[*PROMPTS[0], 340]]))[0, -1], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_left_padding_is_right_padding_given_positions_and_mask() -> None:
    model = helpers.model()
    longest = max(map(len, PROMPTS))
    left = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    right = torch.tensor([p + [0] * (longest - len(p)) for p in PROMPTS])
    pads = torch.tensor([longest - len(p) for p in PROMPTS])[:, None]
    positions = (torch.arange(longest) - pads).clamp(min=0)
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    seen = causal & (torch.arange(longest) >= pads)[:, None, :] | torch.eye(longest, dtype=torch.bool)
    from_left = model(left, positions=positions, mask=seen[:, None])
    from_right = model(right)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(from_left[row, -len(prompt) :], from_right[row, : len(prompt)], atol=1e-5, rtol=0)

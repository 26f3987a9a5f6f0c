"""Attention to an instruction of the first turn: its weights, its place, its average by turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from puna.evals import attention
from puna.model import transformer
from puna.text import chat
from tests import helpers


def test_weights_are_those_the_model_attends_with(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = helpers.model(), torch.randint(3, 300, (1, 9))
    seen: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        out = torch.zeros_like(q)
        for head in range(q.shape[1]):
            weights = torch.zeros(9, 9)
            for t in range(9):  # a query of its own each, over what stands before it
                shared = head // (q.shape[1] // k.shape[1])
                scores = torch.stack([q[0, head, t] @ k[0, shared, s] for s in range(t + 1)]) / q.shape[3] ** 0.5
                weights[t, : t + 1] = scores.softmax(0)
                out[0, head, t] = weights[t, : t + 1] @ v[0, shared, : t + 1]
            seen.append(weights)
        return out

    found = attention.strongest(model, tokens)
    monkeypatch.setattr(transformer, "attend", attend)
    with torch.inference_mode():
        model(tokens)
    assert len(seen) == 8, "two layers of four heads"
    torch.testing.assert_close(found, torch.stack(seen).amax(dim=0), rtol=0, atol=1e-5)


def test_where_the_instruction_stands() -> None:
    tokenizer = helpers.tokenizer()
    message = helpers.user("From now on be a herder. Where is the llama?")
    begin, end = attention.span(tokenizer, "From now on be a herder.", message)
    ids = chat.encode_prompt([message], tokenizer)
    assert tokenizer.decode(ids[begin:end]).strip() == "From now on be a herder."
    assert tokenizer.decode(ids[end:]).strip().startswith("Where is")


def test_runs() -> None:
    assert attention.runs([False, True, True, False, True]) == [[1, 2], [4]]
    assert attention.runs([True, False]) == [[0]] and attention.runs([]) == []


def test_it_is_averaged_by_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, instruction = helpers.tokenizer(), "Be a herder."

    def strongest(model: Any, tokens: Tensor) -> Tensor:
        # A token looks at the instruction the less, the later it stands, and at all else with all its might.
        looks = torch.ones(2 * tokens.shape[1:])
        begin, end = attention.span(tokenizer, instruction, helpers.user(f"{instruction} Where?"))
        looks[:, begin:end] = 1 / torch.arange(1, tokens.shape[1] + 1)[:, None]
        return looks

    monkeypatch.setattr(attention, "strongest", strongest)
    script = {"instruction": instruction, "turns": ["Where?", "And now?"]}
    points = attention.to_instruction(
        helpers.model(), tokenizer, [script] * 3, [["here.", "there."], ["here.", ""], ["", ""]]
    )
    dialog = [helpers.user(f"{instruction} Where?"), helpers.assistant("here.")]
    later = [*dialog, helpers.user("And now?"), helpers.assistant("there.")]
    expected = []
    for n, turn in ((1, dialog), (2, later)):
        positions = attention.runs(chat.encode(turn, tokenizer).mask)[n - 1]
        expected.append(sum(1 / (i + 1) for i in positions) / len(positions))
    assert [point["turn"] for point in points] == [1, 2], "an answer that is none has no attention"
    assert [point["attention"] for point in points] == pytest.approx(expected)

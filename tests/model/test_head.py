"""The loss by chunks is the loss by whole logits, gradients included."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.model import head, transformer
from puna.model.head import chunked_loss
from tests import helpers

pytestmark = pytest.mark.usefixtures("path")


def states(tokens: int = 37, dim: int = 16, vocab: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(tokens, dim), 0.3 * torch.randn(vocab, dim)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(vocab, (tokens,))


def test_by_hand() -> None:
    # Logits 0 and log 3: p = 1/4, 3/4. The loss of both targets is log 4 + log 4/3; slopes are p less the target's 1.
    hidden, weight = torch.tensor([[1.0], [1.0]], requires_grad=True), torch.tensor([[0.0], [math.log(3)]])
    weight.requires_grad_()
    loss = chunked_loss(hidden, weight, torch.tensor([0, 1]))
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(math.log(16 / 3)))
    assert hidden.grad is not None and weight.grad is not None
    torch.testing.assert_close(hidden.grad, math.log(3) * torch.tensor([[0.75], [-0.25]]))
    torch.testing.assert_close(weight.grad, torch.tensor([[-0.5], [0.5]]))


@pytest.mark.parametrize("chunk", [1, 10, 37, 512])
def test_as_whole_logits(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK", chunk)
    hidden, weight, targets = states()
    whole = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    expected = whole, *torch.autograd.grad(whole / 7, (hidden, weight))
    loss = chunked_loss(hidden, weight, targets)
    actual = loss, *torch.autograd.grad(loss / 7, (hidden, weight))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.detach().abs().max()))
    with torch.inference_mode():
        torch.testing.assert_close(chunked_loss(hidden, weight, targets), whole.detach(), rtol=1e-6, atol=0)


def test_autocast_makes_products_in_bfloat16() -> None:
    hidden, weight, targets = states(64)
    with torch.autocast("cpu", torch.bfloat16):
        whole = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
        loss = chunked_loss(hidden, weight, targets)
    expected, actual = torch.autograd.grad(whole, (hidden, weight)), torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=0)
    assert not torch.equal(loss, F.cross_entropy(hidden @ weight.t(), targets, reduction="sum"))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.01 * float(theirs.abs().max()))


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    hidden, weight, _ = states(1)
    with pytest.raises(RuntimeError, match="out of bounds"):
        chunked_loss(hidden, weight, torch.tensor([50]))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("only", [True, False])
def test_a_model_gives_the_same_loss_either_way(tied: bool, only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = helpers.model(tie_embeddings=tied), torch.randint(helpers.VOCAB, (3, 21))
    chosen = torch.rand(3, 20) < 0.3 if only else torch.ones(3, 20, dtype=torch.bool)
    given: dict[str, Any] = {"only": chosen} if only else {}
    targets = tokens[:, 1:][chosen] if only else tokens[:, 1:]
    found = []
    for large in (2**24, 0):
        monkeypatch.setattr(transformer, "LARGE", large)
        model.zero_grad()
        loss = model(tokens[:, :-1], **given, targets=targets)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    logprobs = model(tokens[:, :-1]).log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(found[0][0], -(logprobs * chosen).sum().detach(), rtol=1e-5, atol=0)
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6 * float(whole.abs().max()))


def test_no_more_than_a_chunk_of_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK", 8)
    seen: list[int] = []
    inner = head._loss_and_slope
    monkeypatch.setattr(head, "_loss_and_slope", lambda *args: seen.append(len(args[0])) or inner(*args))
    chunked_loss(*states(20))
    assert seen == [8, 8, 4]

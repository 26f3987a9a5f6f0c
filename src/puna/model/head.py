"""The output head and the language-model loss in one, for vocabularies whose logits would outweigh the model.

The rows are taken a chunk at a time: logits, loss and both gradients, which the loss fixes up to a factor, so that no
more than a chunk's logits exist at once and nothing is computed twice. torch's own `linear_cross_entropy` does the same
and took three to four times as long on a CPU (docs/log.md).

Shapes: N tokens, D model width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from puna import kernels
from puna.model import fused

CHUNK = 512
"""Tokens whose logits exist at once: with 1024 an update holds a ninth more, at the same speed (docs/log.md)."""
LARGE = 2**20
"""Logits (N x V) of a forward pass from which on `chunked_loss` is used: then it is faster where the kernels are
compiled, and elsewhere saves memory."""


def chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) under softmax(hidden weight^T), summed over the tokens, a float32 scalar.

    hidden (N, D), weight (V, D), targets (N,). Products are made in autocast's type where that is on. Raises
    RuntimeError (from torch) where a target is outside the vocabulary.
    """
    if torch.is_grad_enabled():
        return _ChunkedLoss.apply(hidden, weight, targets)  # type: ignore[no-any-return, no-untyped-call]
    states, matrix = _for_products(hidden, weight)
    parts = zip(torch.split(states, CHUNK), torch.split(targets, CHUNK), strict=True)
    return hidden.new_zeros((), dtype=torch.float32) - sum(
        _logprobs(part, matrix).gather(1, wanted[:, None]).sum() for part, wanted in parts
    )


class _ChunkedLoss(torch.autograd.Function):
    """Both gradients are computed with the loss, and scaled when its own comes."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        states, matrix = _for_products(hidden, weight)
        of_states = torch.empty_like(states)
        of_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = hidden.new_zeros((), dtype=torch.float32)
        pieces = (torch.split(tensor, CHUNK) for tensor in (states, targets, of_states))
        for part, wanted, gradient in zip(*pieces, strict=True):
            logprob, slope = _loss_and_slope(part, matrix, wanted[:, None])
            total -= logprob
            torch.mm(slope, matrix, out=gradient)
            of_weight += slope.t() @ part
            del slope  # before the next chunk makes its own
        ctx.save_for_backward(of_states, of_weight)
        ctx.types = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
        of_states, of_weight = ctx.saved_tensors
        hidden_type, weight_type = ctx.types
        return of_states.to(hidden_type) * slope, (of_weight * slope).to(weight_type), None


def _loss_and_slope(part: Tensor, matrix: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of log p at the targets (C, 1), and the loss's gradient of the logits (C, V): p, less 1 at the target."""
    if kernels.runs(part, matrix):
        logits = part @ matrix.t()
        return fused.loss_and_slope(logits, index[:, 0]), logits
    logprobs = _logprobs(part, matrix)
    total = logprobs.gather(1, index).sum()
    minus = torch.full_like(index, -1, dtype=torch.float32)
    return total, logprobs.exp_().scatter_add_(1, index, minus).to(part.dtype)


def _logprobs(states: Tensor, matrix: Tensor) -> Tensor:
    """log p of every token of the vocabulary, (C, V) float32."""
    return torch.log_softmax(states @ matrix.t(), -1, dtype=torch.float32)


def product_type(x: Tensor) -> torch.dtype:
    """The type that autocast makes products with x in, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _for_products(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the type that products are made in."""
    dtype = product_type(hidden)
    return hidden.to(dtype), weight.to(dtype)

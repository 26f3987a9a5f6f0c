"""Attention, and what a model does between its matrix products, on a CPU: kernels/ as operations with gradients.

They compute in float32 what is float32 or bfloat16 in memory. Where `kernels.runs` says no, the model and its head
write the same in torch's operations: more passes over memory, the same numbers but for rounding. Shapes and types that
a pass would misread are refused with a ValueError.

Shapes: B batch, T tokens, S keys, D model width, H query heads, K key/value heads, E head width, N tokens of a batch,
V vocabulary.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from puna import kernels

SHORT = 512  # keys up to which attention is faster than torch's (docs/log.md)
ROWS = 64  # of the kernel's: those whose part of a norm's gradient is summed apart


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend` can run on these tensors, and is faster than torch's attention.

    It is for few keys and at least as many (row, key head) pairs as threads, each of which takes one pair; in bfloat16
    only where the processor multiplies it. q (B, H, T, E), k and v (B, K, S, E).
    """
    pays = k.shape[2] <= SHORT and len(k) * k.shape[1] >= torch.get_num_threads()
    return pays and kernels.runs(q, k, v) and (q.dtype == torch.float32 or _multiplies_bf16())


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (..., D) over its root mean square, times weight (D,), in a type of its own."""
    return _RMSNorm.apply(x, weight, eps, dtype)  # type: ignore[no-any-return, no-untyped-call]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of any one shape and one type."""
    return _SwiGLU.apply(gate, up)  # type: ignore[no-any-return, no-untyped-call]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Each pair of x (B, heads, T, E) turned by its position's angle; table (T, E / 2, 2) or (B, 1, T, E / 2, 2)."""
    return _Rotate.apply(x, table)  # type: ignore[no-any-return, no-untyped-call]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q (B, H, T, E) over k, v (B, K, S, E), causal without a mask: (B, H, T, E).

    A mask is of (B or 1, 1, T, S), or what becomes it. What is kept for the gradient grows with T; the weights are
    computed again.
    """
    return _Attention.apply(q, k, v, mask)  # type: ignore[no-any-return, no-untyped-call]


def loss_and_slope(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of log p at the targets (N,) int64, a float32 scalar.

    In place of logits (N, V) come the probabilities, less 1 at the target. Has no gradient of its own. Raises
    RuntimeError where a target is outside the vocabulary.
    """
    rows, vocab = logits.shape
    _require(targets.shape == (rows,) and targets.dtype == torch.int64 and logits.is_contiguous(), "targets are no ids")
    if rows and not (targets.min() >= 0 and targets.max() < vocab):
        raise RuntimeError(f"a target is out of bounds: the vocabulary has {vocab} tokens")
    targets, logprobs = targets.contiguous(), logits.new_empty(rows, dtype=torch.float32)
    kernels.call("loss", logits, targets, logprobs, _is_bf16(logits), rows, vocab)
    return logprobs.sum()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        _require(weight.shape == x.shape[-1:], "a weight of another width")
        x, scale = x.contiguous(), weight.float().contiguous()
        y, scales = torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
        kernels.call("rms_norm", x, _is_bf16(x), scale, y, _is_bf16(y), scales, scales.numel(), len(weight), eps)
        ctx.save_for_backward(x, weight, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        slopes, rows = slopes.contiguous(), scales.numel()
        of_x, of_weight = torch.empty_like(x), scales.new_empty(-(-rows // ROWS), len(weight))
        inputs = slopes, _is_bf16(slopes), x, _is_bf16(x), weight.float().contiguous(), scales
        kernels.call("rms_norm_back", *inputs, of_x, of_weight, rows, len(weight), ROWS)
        return of_x, of_weight.sum(0).to(weight.dtype), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        _require(gate.shape == up.shape and gate.dtype == up.dtype, "gate and up are not alike")
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        kernels.call("swiglu", gate, up, out, _is_bf16(gate), gate.numel())
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        kernels.call("swiglu_back", slopes.contiguous(), gate, up, of_gate, of_up, _is_bf16(gate), gate.numel())
        return of_gate, of_up


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        shape = x.shape[2], x.shape[3] // 2, 2
        _require(table.shape in (shape, (len(x), 1, *shape)), "angles for other tokens or another width")
        table = table.float().contiguous()
        ctx.save_for_backward(table)
        return _rotated(x, table, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None]:
        [table] = ctx.saved_tensors
        return _rotated(slopes, table, back=True), None


def _rotated(x: Tensor, table: Tensor, back: bool) -> Tensor:
    x, (rows, heads, tokens, width) = _dense(x), x.shape
    out, of_row = _beside(x), table.stride(0) if table.ndim == 5 else 0
    kernels.call("rotate", x, table, out, _is_bf16(x), rows, heads, tokens, width, _layouts(x, out), of_row, back)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        alike = q.dtype == k.dtype == v.dtype and k.shape == v.shape and len(q) == len(k) and q.shape[3] == k.shape[3]
        _require(alike and not q.shape[1] % k.shape[1], "queries, keys and values do not fit")
        _require(mask is not None or q.shape[2] == k.shape[2], "without a mask, every query has its key")
        _require(mask is None or mask.dtype == torch.bool, "a mask is of booleans")
        _require(q.dtype == torch.float32 or not q.shape[3] % 2, "bfloat16 goes in pairs")
        q, k, v = (_dense(x) for x in (q, k, v))
        if mask is not None:
            rows = len(q) if mask.ndim == 4 and len(mask) > 1 else 1
            mask = mask.expand(rows, 1, q.shape[2], k.shape[2]).contiguous()
        out, logs = _beside(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        inputs = q, k, v, mask, out, logs
        kernels.call("attend", *inputs, _is_bf16(q), _layouts(q, k, v, out), _shape(q, k, mask))
        ctx.save_for_backward(*inputs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, logs = ctx.saved_tensors
        slopes, gradients = _dense(slopes), [_beside(x) for x in (q, k, v)]
        layouts = _layouts(slopes, q, k, v, out, *gradients)
        inputs = slopes, q, k, v, out, mask, logs, *gradients
        kernels.call("attend_back", *inputs, _is_bf16(q), layouts, _shape(q, k, mask))
        return *gradients, None


def _dense(x: Tensor) -> Tensor:
    """A token's numbers stand side by side, and pairs of them at whole pairs."""
    return x if x.stride(-1) == 1 and not any(stride % 2 for stride in x.stride()[:3]) else x.contiguous()


def _beside(x: Tensor) -> Tensor:
    """Room for as many numbers as x (B, heads, T, E), in memory (B, T, heads, E), as the products beside it have it."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _layouts(*tensors: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """Numbers between neighbouring rows, heads and tokens of each (B, heads, T, E)."""
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    return (ctypes.c_int64 * len(strides))(*strides)


class _Shape(ctypes.Structure):
    """attention.cpp's structure of that name."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("rows", "heads", "kv_heads", "queries", "keys", "width")),
        ("of_mask", ctypes.c_int64),
    ]


def _shape(q: Tensor, k: Tensor, mask: Tensor | None) -> _Shape:
    of_mask = 0 if mask is None or len(mask) == 1 else mask.stride(0)
    return _Shape(*q.shape[:2], k.shape[1], q.shape[2], *k.shape[2:], of_mask)


def _require(fits: bool, message: str) -> None:  # of every pass: a message is not made where none is needed
    if not fits:
        raise ValueError(message)


def _multiplies_bf16() -> bool:
    return bool(kernels.library().puna_multiplies_bf16())  # type: ignore[union-attr]


def _is_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16

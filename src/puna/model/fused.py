"""What a model does between its matrix products, on a CPU: the compiled passes of kernels/fused.cpp, with gradients.

They compute in float32 what is float32 or bfloat16 in memory. Where `runs` says no, the model and its head write the
same in torch's operations: more passes over memory, the same numbers but for rounding.

Shapes: B batch, T tokens, S keys, D model width, H query heads, K key/value heads, E head width, N tokens of a batch,
V vocabulary.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from puna import kernels

BLOCK = 128  # queries whose scores are written out at once
ROWS = 64  # of the kernel's: those whose part of a norm's gradient is summed apart


def runs(*tensors: Tensor) -> bool:
    """Whether these are plain tensors of a CPU, and it has the compiled passes for them."""
    return (
        all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.dtype in _TYPES for t in tensors)
        and not torch.compiler.is_compiling()
        and kernels.library() is not None
    )


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
    """Attention of q (B, H, T, E) over k, v (B, K, S, E), causal without a mask (B or 1, 1, T, S): (B, H, T, E).

    The scores are written out, without a mask BLOCK queries at a time over the keys up to their last; the queries that
    share a key are rows of one product.
    """
    return _Attention.apply(q, k, v, mask)  # type: ignore[no-any-return, no-untyped-call]


def loss_and_slope(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of log p at the targets (N,) int64, a float32 scalar.

    In place of logits (N, V) come the probabilities, less 1 at the target. Has no gradient of its own. Raises
    RuntimeError where a target is outside the vocabulary.
    """
    rows, vocab = logits.shape
    if rows and not (targets.min() >= 0 and targets.max() < vocab):
        raise RuntimeError(f"a target is out of bounds: the vocabulary has {vocab} tokens")
    targets, logprobs = targets.contiguous(), torch.empty(rows)
    _call("loss", logits, targets, logprobs, _is_bf16(logits), rows, vocab)
    return logprobs.sum()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x, scale = x.contiguous(), weight.float()
        y, scales = torch.empty_like(x, dtype=dtype), torch.empty(x.shape[:-1])
        _call("rms_norm", x, _is_bf16(x), scale, y, _is_bf16(y), scales, scales.numel(), len(weight), eps)
        ctx.save_for_backward(x, weight, scales)
        return y

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        slopes, rows = slopes.contiguous(), scales.numel()
        of_x, of_weight = torch.empty_like(x), torch.empty(-(-rows // ROWS), len(weight))
        inputs = slopes, _is_bf16(slopes), x, _is_bf16(x), weight.float(), scales
        _call("rms_norm_back", *inputs, of_x, of_weight, rows, len(weight))
        return of_x, of_weight.sum(0).to(weight.dtype), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _call("swiglu", gate, up, out, _is_bf16(gate), gate.numel())
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        _call("swiglu_back", slopes.contiguous(), gate, up, of_gate, of_up, _is_bf16(gate), gate.numel())
        return of_gate, of_up


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        table = table.float().contiguous()
        ctx.save_for_backward(table)
        return _rotated(x, table, back=False)

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None]:
        [table] = ctx.saved_tensors
        return _rotated(slopes, table, back=True), None


def _rotated(x: Tensor, table: Tensor, back: bool) -> Tensor:
    """In memory (B, T, heads, E), as the products beside it have it."""
    rows, heads, tokens, width = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = x.new_empty(rows, tokens, heads, width).transpose(1, 2)
    layouts = (ctypes.c_int64 * 6)(*x.stride()[:3], *out.stride()[:3])
    of_row = table.stride(0) if table.ndim == 5 else 0
    _call("rotate", x, table, out, _is_bf16(x), rows, heads, tokens, width, layouts, of_row, back)
    return out


class _Attention(torch.autograd.Function):
    """G queries share each key: they are rows of one product."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        n, scale = q.shape[2], q.shape[-1] ** -0.5
        grouped = q.reshape(-1, q.shape[1] // k.shape[1], *q.shape[2:])  # (BK, G, T, E)
        k, v, out = k.flatten(0, 1), v.flatten(0, 1), torch.empty_like(grouped)
        rows = grouped.shape[0] * grouped.shape[1]
        sharing = 1 if mask is None else rows // len(mask)  # rows that have one mask
        blocks = [(a, min(a + BLOCK, n), min(a + BLOCK, n)) for a in range(0, n, BLOCK)] if mask is None else []
        blocks = blocks or [(0, n, k.shape[1])]  # first query, the one after the last, keys that they see
        saved = []
        for begin, end, seen in blocks:
            queries = grouped[:, :, begin:end].flatten(1, 2)
            weights = torch.bmm(queries, k[:, :seen].mT)
            marks = None if mask is None else mask.contiguous()
            _call("softmax", weights, marks, _is_bf16(weights), rows, sharing, end - begin, seen, begin, scale)
            out[:, :, begin:end] = torch.bmm(weights, v[:, :seen]).view(len(k), -1, end - begin, q.shape[-1])
            saved += [queries, weights]
        ctx.save_for_backward(k, v, *saved)
        ctx.blocks, ctx.is_masked, ctx.shape = blocks, mask is not None, q.shape
        return out.view(q.shape)

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        k, v, *saved = ctx.saved_tensors
        batch, heads, _, width = ctx.shape
        grouped = slopes.reshape(len(k), -1, *slopes.shape[2:])  # (BK, G, T, E)
        of_q, of_k, of_v = torch.empty_like(grouped), torch.zeros_like(k), torch.zeros_like(v)
        for (begin, end, seen), queries, weights in zip(ctx.blocks, saved[::2], saved[1::2], strict=True):
            slope = grouped[:, :, begin:end].flatten(1, 2)
            of_scores = torch.bmm(slope, v[:, :seen].mT)
            sizes = batch * heads, end - begin, seen, begin
            _call("softmax_back", of_scores, weights, _is_bf16(weights), ctx.is_masked, *sizes, width**-0.5)
            of_q[:, :, begin:end] = torch.bmm(of_scores, k[:, :seen]).view(len(k), -1, end - begin, width)
            of_k[:, :seen] += torch.bmm(of_scores.mT, queries)
            of_v[:, :seen] += torch.bmm(weights.mT, slope)
        shape = batch, -1, *k.shape[1:]
        return of_q.view(ctx.shape), of_k.view(shape), of_v.view(shape), None


_TYPES = (torch.float32, torch.bfloat16)


def _is_bf16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _call(name: str, *arguments: Any) -> None:
    """Tensors go as pointers, on as many threads as torch has."""
    pointers = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    getattr(kernels.library(), f"puna_{name}")(*pointers, torch.get_num_threads())

"""step.cpp and sample.cpp as Python calls (puna.kernels compiles them)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from puna import kernels


class Matrix(ctypes.Structure):
    """A linear layer's weight (rows, columns): `kind` 0 float32, 1 bfloat16, 2 int8 with a float32 scale a row, 3 int4
    as torch packs it, with a bfloat16 scale and zero (columns / group, rows, 2).
    """

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("group", ctypes.c_int32),
    ]


class Layer(ctypes.Structure):
    """A block's weights; norms are float32."""

    _fields_ = [
        ("attention_norm", ctypes.c_void_p),
        ("ffn_norm", ctypes.c_void_p),
        *((name, Matrix) for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")),
    ]


class Model(ctypes.Structure):
    """A model's weights and shape."""

    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        ("norm", ctypes.c_void_p),
        ("output", Matrix),
        *((name, ctypes.c_int32) for name in ("n_layers", "heads", "kv_heads", "width")),
        ("eps", ctypes.c_float),
    ]


class Cache(ctypes.Structure):
    """Keys and values, float32 or bfloat16, in pages: a pointer a layer; strides count numbers."""

    _fields_ = [
        *((name, ctypes.POINTER(ctypes.c_void_p)) for name in ("keys", "values")),
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("pages", "page", "page_stride", "head_stride", "place_stride")),
        ("is_bf16", ctypes.c_int32),
    ]


class Settings(ctypes.Structure):
    """How rows are drawn, a number each, as sampling.Settings has them."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("temperature", "top_p", "min_p", "top_k", "cuts", "greedy")]


def step(model: Model, cache: Cache, positions: Tensor, rotary: Tensor, states: Tensor, logits: Tensor | None) -> None:
    """Run R tokens at positions (R,) int64 through the model, in place: states (R, D) are embeddings before and the
    last layer's normalised states after; rotary (R, E / 2, 2), logits (R, V) or None. All float32 and contiguous.
    """
    kernels.call("step", model, cache, len(positions), positions, rotary, states, logits)


def sample(logits: Tensor, uniform: Tensor, settings: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Draw a token for each row: (R,) int64, and its log-probability, (R,) float32.

    logits (R, V) float32 or bfloat16, uniform (R,) float32 in [0, 1); the columns of sampling.Settings by name.
    """
    assert logits.dtype in kernels.TYPES, f"logits are {logits.dtype}"
    logits, uniform = logits.contiguous(), uniform.contiguous()
    columns = {name: column.contiguous() for name, column in settings.items()}
    tokens, logprobs = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits))
    held = Settings(**{name: column.data_ptr() for name, column in columns.items()})
    is_bf16 = logits.dtype == torch.bfloat16
    kernels.call("sample", logits, is_bf16, *logits.shape, held, uniform, tokens, logprobs)
    return tokens, logprobs


def block() -> int:
    """Rows of a 4-bit weight that lie together."""
    loaded = kernels.library()
    assert loaded is not None, "there is no compiled step"
    return int(loaded.puna_block())

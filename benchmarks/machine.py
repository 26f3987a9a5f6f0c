"""What this machine can do at most, measured: what the benchmarks hold their figures against."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

SQUARE = 2048
SUMMED = 2**28  # bytes, far more than any cache keeps


def fast_type() -> torch.dtype:
    """The type in which a CPU's products are fastest: float32 where it has no bfloat16 arithmetic."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def seconds(work: Callable[[], object]) -> float:
    """Wall time."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def matrix_rate(dtype: torch.dtype) -> float:
    """Operations a second of a square product, the best of ten."""
    a, b = (torch.randn(SQUARE, SQUARE, dtype=dtype) for _ in range(2))
    return 2 * SQUARE**3 / min([seconds(lambda: a @ b) for _ in range(12)][2:])


def memory_rate() -> float:
    """Bytes a second at which torch sums a tensor, the best of three."""
    summed = torch.ones(SUMMED // 4)
    return SUMMED / min(seconds(summed.sum) for _ in range(3))

"""step.cpp and sample.cpp as Python calls: compiled with the machine's own g++ (or the GCC that CXX names) at first
use, kept in the user's cache.

Where that cannot be (no compiler, no folder to write to, no AVX2, another system than Linux) `library` is None, and
what asked for it takes torch's kernels: slower, the same numbers. Nothing of torch is compiled in; pointers are passed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

SOURCES = tuple(Path(__file__).with_name(name) for name in ("step.cpp", "sample.cpp", "shared.h", "tiles.h"))
FLAGS = tuple("-O3 -march=native -ffp-contract=off -fno-strict-aliasing -std=gnu++20 -shared -fPIC -pthread".split())
SECONDS = 120  # that a compiler may take
DIGEST = 32  # bytes of SHA-256, behind the library's own in its file


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


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled calls; compiling takes some seconds once a machine."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return None
    with contextlib.suppress(OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: no home folder
        path = _path()
        if not _is_whole(path):
            _compile(path)
        loaded = ctypes.CDLL(str(path))
        loaded.puna_step.restype = None
        loaded.puna_step.argtypes = [
            ctypes.POINTER(Model),
            ctypes.POINTER(Cache),
            ctypes.c_int,
            *[ctypes.c_void_p] * 4,
            ctypes.c_int,
        ]
        loaded.puna_sample.restype = None
        loaded.puna_sample.argtypes = [
            ctypes.c_void_p,
            ctypes.c_bool,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.POINTER(Settings),
            *[ctypes.c_void_p] * 3,
            ctypes.c_int,
        ]
        return loaded
    return None


def step(model: Model, cache: Cache, positions: Tensor, rotary: Tensor, states: Tensor, logits: Tensor | None) -> None:
    """Run R tokens at positions (R,) int64 through the model, in place: states (R, D) are embeddings before and the
    last layer's normalised states after; rotary (R, E / 2, 2), logits (R, V) or None. All float32 and contiguous.
    """
    loaded = library()
    assert loaded is not None, "there is no compiled step"
    pointers = [
        positions.data_ptr(),
        rotary.data_ptr(),
        states.data_ptr(),
        None if logits is None else logits.data_ptr(),
    ]
    loaded.puna_step(model, cache, len(positions), *pointers, torch.get_num_threads())


def sample(logits: Tensor, uniform: Tensor, settings: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Draw a token for each row: (R,) int64, and its log-probability, (R,) float32.

    logits (R, V) float32 or bfloat16, uniform (R,) float32 in [0, 1); the columns of sampling.Settings by name.
    """
    loaded = library()
    assert loaded is not None, "there is no compiled sampler"
    assert logits.dtype in (torch.float32, torch.bfloat16), f"logits are {logits.dtype}"
    logits, uniform = logits.contiguous(), uniform.contiguous()
    columns = {name: column.contiguous() for name, column in settings.items()}
    tokens, logprobs = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits))
    held = Settings(**{name: column.data_ptr() for name, column in columns.items()})
    where = uniform.data_ptr(), tokens.data_ptr(), logprobs.data_ptr()
    is_bf16 = logits.dtype == torch.bfloat16
    loaded.puna_sample(logits.data_ptr(), is_bf16, *logits.shape, held, *where, torch.get_num_threads())
    return tokens, logprobs


def block() -> int:
    """Rows of a 4-bit weight that lie together."""
    loaded = library()
    assert loaded is not None, "there is no compiled step"
    return int(loaded.puna_block())


def _path() -> Path:
    """Where the library for these sources, these flags and this processor belongs."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("model name", "flags"))]
    key = hashlib.sha256(
        b"\0".join([*(path.read_bytes() for path in SOURCES), *map(str.encode, (*FLAGS, *cpu[:2]))])
    ).hexdigest()
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "puna" / f"step-{key[:16]}.so"


def _is_whole(path: Path) -> bool:
    """Whether the file ends with the digest of the rest: loading a damaged library can kill the process."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _compile(path: Path) -> None:
    """Compile beside `path` and rename: of processes that do it at once, each leaves a whole library."""
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        command = [compiler, *FLAGS, *(str(path) for path in SOURCES if path.suffix == ".cpp"), "-o", str(temporary)]
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
        with temporary.open("r+b") as file:
            content = file.read()
            file.write(hashlib.sha256(content).digest())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)

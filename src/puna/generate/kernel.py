"""step.cpp as a Python call: compiled with the machine's own g++ at first use and kept in the user's cache folder.

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
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("step.cpp")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=gnu++20", "-shared", "-fPIC", "-pthread")
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


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled step; compiling takes some seconds once a machine."""
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


def block() -> int:
    """Rows of a 4-bit weight that lie together."""
    loaded = library()
    assert loaded is not None, "there is no compiled step"
    return int(loaded.puna_block())


def _path() -> Path:
    """Where the library for this source, these flags and this processor belongs."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("model name", "flags"))]
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), *map(str.encode, (*FLAGS, *cpu[:2]))])).hexdigest()
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
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(temporary)]
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
        with temporary.open("r+b") as file:
            content = file.read()
            file.write(hashlib.sha256(content).digest())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)

"""The C++ of this folder as one library: compiled with the machine's own g++ (or the GCC that CXX names) at first use,
kept in the user's cache.

Where that cannot be (no compiler, no folder to write to, no AVX2, another system than Linux) `library` is None, and
what asked for it takes torch's kernels: slower, the same numbers but for rounding. Nothing of torch is compiled in;
pointers are passed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from ctypes import c_bool, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("step.cpp", "sample.cpp", "fused.cpp", "attention.cpp", "shared.h", "passes.h", "tiles.h")
SOURCES = tuple(Path(__file__).with_name(name) for name in NAMES)
FLAGS = tuple("-O3 -march=native -ffp-contract=off -fno-strict-aliasing -std=gnu++20 -shared -fPIC -pthread".split())
SECONDS = 120  # that a compiler may take
DIGEST = 32  # bytes of SHA-256, behind the library's own in its file
CALLS = {
    "puna_step": [c_void_p, c_void_p, c_int, *[c_void_p] * 4, c_int],
    "puna_sample": [c_void_p, c_bool, c_int, c_int, *[c_void_p] * 4, c_int],
    "puna_share": [c_void_p],
    "puna_rms_norm": [c_void_p, c_bool, *[c_void_p] * 2, c_bool, c_void_p, c_int64, c_int, c_float, c_int],
    "puna_rms_norm_back": [c_void_p, c_bool, c_void_p, c_bool, *[c_void_p] * 4, c_int64, c_int, c_int, c_int],
    "puna_swiglu": [*[c_void_p] * 3, c_bool, c_int64, c_int],
    "puna_swiglu_back": [*[c_void_p] * 5, c_bool, c_int64, c_int],
    "puna_rotate": [*[c_void_p] * 3, c_bool, *[c_int] * 4, c_void_p, c_int64, c_bool, c_int],
    "puna_attend": [*[c_void_p] * 6, c_bool, *[c_void_p] * 2, c_int],
    "puna_attend_back": [*[c_void_p] * 10, c_bool, *[c_void_p] * 2, c_int],
    "puna_loss": [*[c_void_p] * 3, c_bool, c_int64, c_int, c_int],
}
"""What each call takes, as its source says, threads last; none of these returns anything."""
TYPES = (torch.float32, torch.bfloat16)


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
        for name, takes in CALLS.items():
            call = getattr(loaded, name)
            call.argtypes, call.restype = takes, None
        loaded.puna_share(_share())
        return loaded
    return None


def runs(*tensors: Tensor) -> bool:
    """Whether these are plain tensors of a CPU, float32 or bfloat16, and the calls for them are compiled."""
    return (
        all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.dtype in TYPES for t in tensors)
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def call(name: str, *arguments: Any) -> None:
    """Tensors go as pointers, structures by reference; the work is shared by as many threads as torch has."""
    loaded = library()
    assert loaded is not None, f"puna_{name} is not compiled"
    getattr(loaded, f"puna_{name}")(*map(_passed, arguments), torch.get_num_threads())


def _passed(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return ctypes.byref(argument) if isinstance(argument, ctypes.Structure) else argument


def _share() -> c_void_p | None:
    """The call by which torch's threads share work: OpenMP's, where torch's library is linked with it."""
    with contextlib.suppress(OSError, AttributeError):
        torchs = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        return ctypes.cast(torchs.GOMP_parallel, c_void_p)
    return None


def _path() -> Path:
    """Where the library for these sources, these flags and this processor belongs."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("model name", "flags"))]
    key = hashlib.sha256(
        b"\0".join([*(path.read_bytes() for path in SOURCES), *map(str.encode, (*FLAGS, *cpu[:2]))])
    ).hexdigest()
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "puna" / f"kernels-{key[:16]}.so"


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

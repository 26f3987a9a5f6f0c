"""Token shards: documents as one memory-mapped array of ids with the offsets where each begins, and their hash.

A shard `name` is three files: `name.tokens` (uint16 or uint32, little-endian), `name.offsets` (int64, one more than the
documents) and `name.json` (type, counts, sha256 of the tokens, the tokenizer's sha256).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from puna.config import ConfigError, DataError
from puna.run_folder import write_atomically
from puna.text.tokenizer import Tokenizer

Tokens = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Shard:
    """Documents as token ids. `tokens[offsets[i]:offsets[i + 1]]` is document i, with BOS and EOS."""

    tokens: Tokens
    offsets: npt.NDArray[np.int64]


def write_shard(path: Path, texts: Iterable[str], tokenizer: Tokenizer, *, batch: int = 1000) -> Shard:
    """Encode texts as BOS text EOS into the shard at `path`; the description is written last, so that it vouches."""
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 2**16 else np.dtype("<u4")
    offsets = [0]
    parts: list[Tokens] = []
    held: list[str] = []

    def flush() -> None:
        for ids in tokenizer.encode_batch(held):
            parts.append(np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype=dtype))
            offsets.append(offsets[-1] + len(parts[-1]))
        held.clear()

    for text in texts:
        held.append(text)
        if len(held) == batch:
            flush()
    flush()
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path.with_suffix(".tokens"), tokens.tobytes())
    write_atomically(path.with_suffix(".offsets"), np.array(offsets, "<i8").tobytes())
    description = {
        "dtype": dtype.str,
        "documents": len(offsets) - 1,
        "tokens": len(tokens),
        "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "tokenizer": tokenizer.sha256,
    }
    write_atomically(path.with_suffix(".json"), json.dumps(description, indent=1))
    return read_shard(path, tokenizer)


def read_shard(path: Path, tokenizer: Tokenizer) -> Shard:
    """Map a shard. Raises DataError where it is incomplete, ConfigError where another tokenizer wrote it."""
    description = json.loads(path.with_suffix(".json").read_text())
    if description["tokenizer"] != tokenizer.sha256:
        raise ConfigError(f"{path}: these tokens were written with another tokenizer: prepare the data again")
    if description["tokens"] == 0:
        raise DataError(f"{path}: the data holds no tokens")
    file, dtype = path.with_suffix(".tokens"), np.dtype(description["dtype"])
    expected, size = description["tokens"] * dtype.itemsize, file.stat().st_size
    if size != expected:
        raise DataError(
            f"{file}: {size} bytes, expected {expected}: remove {path.with_suffix('.json')} to write it anew"
        )
    tokens = np.memmap(file, dtype=dtype, mode="r")
    return Shard(tokens, np.fromfile(path.with_suffix(".offsets"), dtype="<i8"))

"""Token shards: documents as one memory-mapped array of ids with the offsets where each begins, and their hash.

A shard `name` is three files: `name.tokens` (uint16 or uint32, little-endian), `name.offsets` (int64, one more than the
documents) and `name.json` (type, counts, sha256 of the tokens and of the offsets, the tokenizer's sha256).

A prepared folder holds many shards and `index.json`, which has of each source its weight and the names of its shards,
for training and for validation. Their tokenizer is in `tokenizer/`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from puna import parallel
from puna.config import ConfigError, DataError
from puna.run_folder import write_atomically
from puna.text.tokenizer import Tokenizer

Tokens = npt.NDArray[np.unsignedinteger]

INDEX = "index.json"
ENCODED_AT_ONCE = 1000  # texts
DTYPES = ("<u2", "<u4")
HASHES = {".tokens": "sha256", ".offsets": "offsets_sha256"}
"""What a description calls the sha256 of each file; older ones have none of the offsets."""


@dataclass(frozen=True)
class Shard:
    """Documents as token ids. `tokens[offsets[i]:offsets[i + 1]]` is document i, with BOS and EOS."""

    tokens: Tokens
    offsets: npt.NDArray[np.int64]


def dtype_of(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger]:
    """The smallest type that holds every id."""
    return np.dtype("<u2") if tokenizer.vocab_size <= 2**16 else np.dtype("<u4")


def write_shard(path: Path, texts: Iterable[str], tokenizer: Tokenizer) -> Shard:
    """Encode texts as BOS text EOS into the shard at `path`."""
    write_documents(path, _encoded(texts, tokenizer), tokenizer)
    return read_shard(path, tokenizer)


def _encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[Tokens]:
    dtype = dtype_of(tokenizer)
    held: list[str] = []

    def flush() -> Iterator[Tokens]:
        for ids in tokenizer.encode_batch(held):
            yield np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype=dtype)
        held.clear()

    for text in texts:
        held.append(text)
        if len(held) == ENCODED_AT_ONCE:
            yield from flush()
    yield from flush()


def write_documents(path: Path, documents: Iterable[Tokens], tokenizer: Tokenizer) -> None:
    """Write encoded documents into the shard at `path`; the description is written last, so that it vouches."""
    dtype = dtype_of(tokenizer)
    parts = list(documents)
    tokens = np.concatenate([np.zeros(0, dtype), *parts])
    offsets = np.cumsum([0, *map(len, parts)], dtype="<i8")
    write_atomically(path.with_suffix(".tokens"), tokens.tobytes())
    write_atomically(path.with_suffix(".offsets"), offsets.tobytes())
    description = {
        "dtype": dtype.str,
        "documents": len(parts),
        "tokens": len(tokens),
        "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "offsets_sha256": hashlib.sha256(offsets.tobytes()).hexdigest(),
        "tokenizer": tokenizer.sha256,
    }
    write_atomically(path.with_suffix(".json"), json.dumps(description, indent=1))


def read_shard(path: Path, tokenizer: Tokenizer) -> Shard:
    """Map a shard. DataError where it is incomplete, ConfigError where there is none or of another tokenizer."""
    if not path.with_suffix(".json").is_file() and not path.with_suffix(".tokens").is_file():
        raise ConfigError(f"{path}: no token shard (no {path.with_suffix('.json')})")
    description = _description(path.with_suffix(".json"))
    if description["tokenizer"] != tokenizer.sha256:
        raise ConfigError(f"{path}: these tokens were written with another tokenizer: prepare the data again")
    if description["tokens"] == 0:
        raise DataError(f"{path}: the data holds no tokens")
    dtype, begins = np.dtype(description["dtype"]), np.dtype("<i8")
    sizes = {".tokens": description["tokens"] * dtype.itemsize}
    sizes[".offsets"] = (description["documents"] + 1) * begins.itemsize
    for suffix, expected in sizes.items():
        file = path.with_suffix(suffix)
        size = file.stat().st_size if file.is_file() else 0
        if size != expected:
            raise DataError(
                f"{file}: {size} bytes, expected {expected}: remove {path.with_suffix('.json')} to write it anew"
            )
    tokens = np.memmap(path.with_suffix(".tokens"), dtype=dtype, mode="r")
    return Shard(tokens, np.fromfile(path.with_suffix(".offsets"), dtype=begins))


def _description(file: Path) -> dict[str, Any]:
    """What `name.json` says; DataError where it is missing, torn or of no shard of ours."""
    try:
        found = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: missing or damaged ({error}): prepare the data again") from None
    if not isinstance(found, dict) or not {"dtype", "documents", "tokens", "sha256", "tokenizer"} <= found.keys():
        raise DataError(f"{file}: not a shard's description: prepare the data again")
    if found["dtype"] not in DTYPES:
        raise DataError(f"{file}: dtype is {found['dtype']!r}, not one of {', '.join(DTYPES)}: prepare the data again")
    for key in ("documents", "tokens"):
        if type(found[key]) is not int or found[key] < 0:
            raise DataError(f"{file}: {key} is {found[key]!r}, not a number of them: prepare the data again")
    return found


def read_sound(path: Path, tokenizer: Tokenizer) -> Shard:
    """`read_shard`, and DataError, naming the file, where tokens or offsets are not those of their hash.

    To know that, a machine's first rank reads them once for its others: a gigabyte or two a second and core.
    """
    shard, description = read_shard(path, tokenizer), path.with_suffix(".json")
    if not parallel.is_first_here():
        return shard
    expected = _description(description)
    for suffix, key in HASHES.items():
        file = path.with_suffix(suffix)
        if key in expected and _sha256(file, file.stat().st_mtime_ns) != expected[key]:
            raise DataError(f"{file}: damaged, its sha256 is not the one in {description}: prepare the data again")
    return shard


@functools.cache
def _sha256(file: Path, modified: int) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def is_held_out(number: int, share: float, seed: int = 0) -> bool:
    """Whether a source's document of this number is for validation: every n-th is, n the whole number next to 1/share.

    `share` is at most 0.5; 0 holds nothing out. The seed says which of n documents it is.
    """
    every = round(1 / share) if share > 0 else 0
    return every > 0 and number % every == seed % every


# Prepared folders


class Entry(NamedTuple):
    """A source in the index: how often it is seen, and the paths of its shards in the folder."""

    weight: float
    train: list[str]
    validation: list[str]


def write_index(folder: Path, sources: dict[str, Entry]) -> None:
    """What makes a folder of shards a prepared one; it is written last."""
    index = {"sources": {name: entry._asdict() for name, entry in sources.items()}}
    write_atomically(folder / INDEX, json.dumps(index, indent=1) + "\n")


def is_prepared(folder: Path) -> bool:
    """Whether `puna data prepare` finished this folder."""
    return (folder / INDEX).is_file()


def read_prepared(folder: Path, part: str, tokenizer: Tokenizer) -> dict[str, tuple[float, list[Shard]]]:
    """Of each source that has any shard for this part ("train" or "validation") its weight and its shards.

    Raises what `read_sound` does, DataError where the index is damaged or no source has any, ConfigError where it names
    what does not lie in the folder, or a weight is not above zero.
    """
    chosen = {name: (entry.weight, getattr(entry, part)) for name, entry in _read_index(folder / INDEX).items()}
    with ThreadPoolExecutor() as threads:  # hashing lets go of the interpreter
        sources = {
            name: (weight, list(threads.map(lambda path: read_sound(folder / path, tokenizer), paths)))
            for name, (weight, paths) in chosen.items()
            if paths
        }
    if not sources:
        raise DataError(f"{folder}: no source has a document for the {part} part")
    return sources


def _read_index(file: Path) -> dict[str, Entry]:
    """The sources of an index; errors as `read_prepared`."""
    try:
        found = json.loads(file.read_bytes())["sources"]
        sources = {name: Entry(each["weight"], each["train"], each["validation"]) for name, each in found.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: missing or damaged ({error}): prepare the data again") from None
    for name, (weight, *parts) in sources.items():
        if type(weight) not in (int, float) or not 0 < weight < math.inf:
            raise ConfigError(f"{file}: the weight of {name!r} is {weight!r}: it must be a number above 0")
        if not all(isinstance(part, list) and all(isinstance(path, str) for path in part) for part in parts):
            raise DataError(f"{file}: the shards of {name!r} are no lists of names: prepare the data again")
        for path in map(Path, itertools.chain(*parts)):
            if path.is_absolute() or ".." in path.parts or not path.name:
                raise ConfigError(f"{file}: refused, it names '{path}', which does not lie in its folder")
    return sources

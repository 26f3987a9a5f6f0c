"""`puna data prepare`: text of many sources into token shards, on all cores or a Ray cluster (paper 2.1).

1. Each source's files are read as a stream and cut into pieces of whole documents; bad lines are set aside.
2. Workers encode the pieces as BOS text EOS.
3. Where asked for: documents much like an earlier one are dropped, and runs of tokens that were there before are cut.
4. Workers write each piece as a shard for training and one for validation, and the index says how often each source is
   seen. Nothing is copied for that: the loader mixes.

Every piece is written once and marked; a killed run goes on with the next. What is written depends on the config and
the files alone, not on the number of workers. Step 3 looks at the whole corpus in this process.

Where the paper is silent: which sources it takes more often, how often, and whether duplicates were removed.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from puna import config
from puna.config import ConfigError, DataError, positive, within
from puna.corpus import near_duplicates, repeated_spans
from puna.corpus.encode import encoder
from puna.corpus.repeated_spans import Bools
from puna.data import readers, shards
from puna.data.map_shards import Records, Workers, map_each, n_cores
from puna.data.readers import ReadResult
from puna.data.shards import Entry, Tokens
from puna.run_folder import Progress, RunFolder, write_atomically
from puna.text import tokenizer as tokenizers
from puna.text.tokenizer import Tokenizer

Counts = dict[str, int]


@dataclass(frozen=True)
class Source:
    """Files of one kind, and how often they are seen."""

    paths: tuple[Path, ...]
    """files, also compressed (.gz, .bz2, .zst)."""
    format: str = "jsonl_text"
    """how to read them (docs/guides/real-data.md lists the formats)."""
    weight: float = 1.0
    """epochs of this source while a source of weight 1 is seen once; 0.5 sees half of it (paper 2.1: the most factual
    sources are up-sampled, by how much it does not say)."""

    def __post_init__(self) -> None:
        positive(self, "weight")


@dataclass(frozen=True)
class PrepareConfig:
    """`puna data prepare`: text in, a folder of shards for `puna pretrain --data` out."""

    out: Path
    """the folder; run again to resume."""
    tokenizer: Path
    """tokenizer.model, tokenizer.json or a folder."""
    data: tuple[Path, ...] = ()
    """files of a single source, as `sources` has several: tables [prepare.sources.NAME] of a recipe with paths, format
    and weight (--sources.NAME.weight and so on outdo them)."""
    format: str = "jsonl_text"
    """how to read `data` (docs/guides/real-data.md lists the formats)."""
    sources: dict[str, Source] = field(default_factory=dict)
    """the sources by name."""
    validation_share: float = 0.01
    """share of each source's documents held out, at most 0.5: every n-th, n the whole number next to 1/share."""
    shard_characters: int = 8_000_000
    """text of a shard, a few times fewer tokens; a longer document has one of its own. Each worker holds a shard's."""
    near_duplicates: float = 0.0
    """drop documents that share this much (Jaccard, of runs of five words) with an earlier one; 0 keeps all."""
    repeated_tokens: int = 0
    """cut runs of at least so many tokens that were there before; 0 cuts none."""
    workers: int = 0
    """processes; 0 takes a core each, on Ray all CPUs of the cluster."""
    cluster: Literal["local", "ray"] = "local"
    """ray: on the cluster that RAY_ADDRESS names, or a local one; all its machines must see the same files."""
    seed: int = 0
    """which documents are held out, and MinHash's permutations."""

    def __post_init__(self) -> None:
        positive(self, "shard_characters")
        within(self, 0, 0.5, "validation_share")
        within(self, 0, 1, "near_duplicates")
        within(self, 0, math.inf, "repeated_tokens")
        if not self.data and not self.sources:
            raise ConfigError(
                "nothing to prepare: give --data, or tables [prepare.sources.NAME] with paths in a recipe"
            )

    @property
    def all_sources(self) -> dict[str, Source]:
        """The sources, `data` as one of them."""
        return {**({"data": Source(self.data, self.format)} if self.data else {}), **self.sources}

    @property
    def compares(self) -> bool:
        """Whether documents are looked at together before they are written."""
        return bool(self.near_duplicates or self.repeated_tokens)


class Piece(NamedTuple):
    """Documents of a source that follow each other; `first` is the number of the first of them."""

    source: str
    first: int
    texts: list[str]


class Kept(NamedTuple):
    """What is left of an encoded piece: documents (N,) and tokens (T,), True where they stay."""

    first: int
    documents: Bools
    tokens: Bools


def run(cfg: PrepareConfig) -> Path:
    """Prepare, and return the folder."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("data prepare runs on one process: start it without torchrun (workers share the text out)")
    with RunFolder(cfg.out) as folder:
        config.keep(cfg, folder.path / "config.json")
        if folder.done("prepare"):
            shutil.rmtree(folder.path / "pieces", ignore_errors=True)  # it may have been killed before it did this
            return folder.path
        tokenizer = tokenizers.load(cfg.tokenizer)
        (folder.path / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(folder.path / "tokenizer")
        shared = replace(cfg, out=cfg.out.absolute())  # a worker may stand elsewhere
        n = cfg.workers or (n_cores() if cfg.cluster == "local" else 0)
        workers, parts = Workers(n, cfg.cluster), folder.path / "parts"
        check_files(cfg, parts)
        result = ReadResult()
        _encoder.cache_clear()  # another run may have had another tokenizer under this name
        records = map_each(partial(encode, shared), pieces(cfg, result), parts / "encoded", workers=workers)
        if result.bad:
            readers.keep_bad_lines(result.bad, folder.path / "bad_lines.jsonl")
        if not records:
            raise DataError("the sources hold no text")
        if cfg.compares:
            kept = compare(cfg, tokenizer, records)
            written = map_each(partial(select, shared), kept, parts / "selected", workers=workers)
            records = [{**record, **counts} for record, counts in zip(records, written, strict=True)]
        shards.write_index(folder.path, index(cfg, records))
        folder.mark_done("prepare", bad_lines=len(result.bad), skipped=dict(result.skipped), sources=totals(records))
        shutil.rmtree(folder.path / "pieces", ignore_errors=True)
        return folder.path


def check_files(cfg: PrepareConfig, parts: Path) -> None:
    """Note every source file's size and time in `parts`.

    ConfigError where there is no such file, or a killed run finished pieces of another: the rest would begin elsewhere.
    """
    for source in cfg.all_sources.values():
        readers.check_files(source.paths, source.format)
    files = [path.resolve() for source in cfg.all_sources.values() for path in source.paths]
    found = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    begun = parts / "files.json"
    if begun.is_file() and any(parts.glob("encoded/*.jsonl")):
        for path, noted in json.loads(begun.read_bytes()).items():
            if found.get(path) != noted:
                raise ConfigError(f"{path} is not as it was when {cfg.out} was begun: use another --out")
    write_atomically(begun, json.dumps(found, indent=1) + "\n")


def pieces(cfg: PrepareConfig, result: ReadResult) -> Iterator[Piece]:
    """1: every source's documents, so many characters at a time; `result` gets what is set aside."""
    progress = Progress("data prepare", sum(len(source.paths) for source in cfg.all_sources.values()), unit="file")
    read = 0
    for name, source in cfg.all_sources.items():
        piece, size = Piece(name, 0, []), 0
        for path in source.paths:
            for text in readers.stream([path], source.format, result, kind="texts"):
                if piece.texts and size + len(text) > cfg.shard_characters:
                    yield piece
                    progress.update(0, million_characters=read / 1e6)
                    piece, size = Piece(name, piece.first + len(piece.texts), []), 0
                piece.texts.append(text)
                size += len(text)
                read += len(text)
            progress.update(million_characters=read / 1e6)
        if piece.texts:
            yield piece
    progress.close(million_characters=read / 1e6)


def encode(cfg: PrepareConfig, number: int, piece: Piece) -> Records:
    """2, by a worker: a piece encoded, and written for comparison or as it will be."""
    tokenizer, encoded = _encoder(cfg.out / "tokenizer")
    documents = [encoded(text) for text in piece.texts]
    record = {"source": piece.source, "documents": len(documents), "tokens": sum(map(len, documents))}
    if not cfg.compares:
        return [record | write(cfg, number, tokenizer, list(enumerate(documents, piece.first)))]
    path = _piece(cfg, number)
    shards.write_documents(path, documents, tokenizer)
    if cfg.near_duplicates:
        signatures = np.stack([near_duplicates.signature(text, cfg.seed) for text in piece.texts])
        write_atomically(path.with_suffix(".signatures"), signatures.tobytes())
    return [record | {"first": piece.first}]


@functools.cache
def _encoder(folder: Path) -> tuple[Tokenizer, Callable[[str], Tokens]]:
    tokenizer = tokenizers.load(folder)
    return tokenizer, encoder(tokenizer)


def _piece(cfg: PrepareConfig, number: int) -> Path:
    return cfg.out / "pieces" / f"{number:05d}"


def compare(cfg: PrepareConfig, tokenizer: Tokenizer, records: Records) -> Iterator[Kept]:
    """3: what stays of each piece."""
    each = [shards.read_sound(_piece(cfg, number), tokenizer) for number in range(len(records))]
    documents = np.ones(sum(record["documents"] for record in records), bool)
    if cfg.near_duplicates:
        files = [_piece(cfg, number).with_suffix(".signatures") for number in range(len(records))]
        signatures = np.concatenate([np.fromfile(file, np.uint32) for file in files])
        documents = ~near_duplicates.find(signatures.reshape(len(documents), -1), cfg.near_duplicates)
    tokens = np.ones(sum(record["tokens"] for record in records), bool)
    if cfg.repeated_tokens:
        joined = np.concatenate([shard.tokens for shard in each])
        lengths = np.concatenate([np.diff(shard.offsets) for shard in each])
        tokens = ~repeated_spans.find(joined, np.cumsum([0, *lengths]), documents, cfg.repeated_tokens)
    for record in records:
        yield Kept(record["first"], documents[: record["documents"]], tokens[: record["tokens"]])
        documents, tokens = documents[record["documents"] :], tokens[record["tokens"] :]


def select(cfg: PrepareConfig, number: int, kept: Kept) -> Records:
    """3, by a worker: a piece written without what does not stay."""
    tokenizer, _ = _encoder(cfg.out / "tokenizer")
    shard = shards.read_sound(_piece(cfg, number), tokenizer)
    documents = []
    for i in np.flatnonzero(kept.documents):
        inside = slice(shard.offsets[i], shard.offsets[i + 1])
        ids = shard.tokens[inside][kept.tokens[inside]]
        if len(ids) > 2 or len(ids) == len(shard.tokens[inside]):  # more than BOS and EOS, or the text has no more
            documents.append((kept.first + int(i), ids))
    dropped = {"duplicates": int((~kept.documents).sum()), "repeated_tokens": int((~kept.tokens).sum())}
    return [write(cfg, number, tokenizer, documents) | dropped]


def write(cfg: PrepareConfig, number: int, tokenizer: Tokenizer, documents: Sequence[tuple[int, Tokens]]) -> Counts:
    """4, by a worker: a piece's documents, each with its number in the source, as shards; the tokens of each part."""
    parts: dict[str, list[Tokens]] = {"train": [], "validation": []}
    for place, ids in documents:
        held_out = shards.is_held_out(place, cfg.validation_share, cfg.seed)
        parts["validation" if held_out else "train"].append(ids)
    for part, held in parts.items():
        if held:
            shards.write_documents(cfg.out / part / f"{number:05d}", held, tokenizer)
    return {part: sum(map(len, held)) for part, held in parts.items()}


def index(cfg: PrepareConfig, records: Records) -> dict[str, Entry]:
    """4: of each source its weight and the shards that hold anything.

    A source of which nothing but held-out documents is left, such as a single book, is trained on: it would be missed.
    """
    entries = {}
    for name, source in cfg.all_sources.items():
        train, validation = (_names(records, name, part) for part in ("train", "validation"))
        entries[name] = Entry(source.weight, *((train, validation) if train else (validation, [])))
    return entries


def _names(records: Records, source: str, part: str) -> list[str]:
    mine = [number for number, record in enumerate(records) if record["source"] == source and record[part]]
    return [f"{part}/{number:05d}" for number in mine]


def totals(records: Records) -> dict[str, Counts]:
    """Of each source its documents and tokens as read, what was dropped or cut, and the tokens of both parts."""
    sums: dict[str, Counts] = {}
    for record in records:
        mine = sums.setdefault(record["source"], {})
        for key, value in record.items():
            if key not in ("source", "first"):
                mine[key] = mine.get(key, 0) + value
    for mine in sums.values():
        if not mine["train"]:  # as in the index
            mine["train"], mine["validation"] = mine["validation"], 0
    return sums

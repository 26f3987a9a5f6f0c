"""Token shards: what goes in comes out, and a shard of another tokenizer or half a shard is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from puna.config import ConfigError, DataError
from puna.data import loader, shards
from puna.data.shards import (
    Entry,
    is_held_out,
    is_prepared,
    read_prepared,
    read_shard,
    read_sound,
    write_index,
    write_shard,
)
from puna.text import tokenizer as tokenizers
from tests import helpers


def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ENCODED_AT_ONCE", 3)
    tokenizer, texts = helpers.tokenizer(), [*helpers.sentences(7), "", "ö\n\ty"]
    shard = write_shard(tmp_path / "train", texts, tokenizer)
    assert shard.tokens.dtype == np.uint16
    assert helpers.documents(shard) == [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    assert np.array_equal(read_shard(tmp_path / "train", tokenizer).tokens, shard.tokens)
    assert isinstance(shard.tokens, np.memmap)


@pytest.mark.parametrize(("n_ids", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32), (70_000, np.uint32)])
def test_ids_of_more_than_16_bits(n_ids: int, dtype: Any, tmp_path: Path) -> None:
    def encode_batch(texts: list[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]

    tokenizer: Any = SimpleNamespace(vocab_size=n_ids, bos_id=1, eos_id=2, sha256="", encode_batch=encode_batch)
    last = n_ids - 1
    shard = write_shard(tmp_path / "train", [f"7 {last}", f"{last}"], tokenizer)
    assert shard.tokens.dtype == dtype
    assert helpers.documents(read_sound(tmp_path / "train", tokenizer)) == [[1, 7, last, 2], [1, last, 2]]
    inputs, targets = loader.windows(shard, seq_len=6, batch_size=1, step=0, seed=0)
    assert inputs.tolist() == [[1, 7, last, 2, 1, last]] and targets.tolist() == [[7, last, 2, 1, last, 2]]

    file = tmp_path / "train.tokens"
    data = bytearray(file.read_bytes())
    data[3 * shard.tokens.itemsize - 1] ^= 1  # the highest byte of an id
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"train\.tokens: damaged"):
        read_sound(tmp_path / "train", tokenizer)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "train", helpers.sentences(3), helpers.tokenizer())
    other = tokenizers.train(helpers.sentences(50, seed=9), 330, tmp_path / "other")
    with pytest.raises(ConfigError, match="another tokenizer"):
        read_shard(tmp_path / "train", other)


@pytest.mark.parametrize("lost", [1, 2])
def test_a_truncated_shard_is_refused(lost: int, tmp_path: Path) -> None:
    write_shard(tmp_path / "train", helpers.sentences(3), helpers.tokenizer())
    data = (tmp_path / "train.tokens").read_bytes()
    (tmp_path / "train.tokens").write_bytes(data[:-lost])
    with pytest.raises(DataError, match=r"train\.tokens"):
        read_shard(tmp_path / "train", helpers.tokenizer())


@pytest.mark.parametrize("damage", [None, b"", b"[]", b'{"dtype": "<u2"}', pytest.param(b"[" * 100_000, id="deep")])
@pytest.mark.parametrize("suffix", [".json", ".tokens", ".offsets"])
def test_a_missing_or_damaged_file_is_named(suffix: str, damage: bytes | None, tmp_path: Path) -> None:
    write_shard(tmp_path / "train", helpers.sentences(3), helpers.tokenizer())
    file = tmp_path / f"train{suffix}"
    file.unlink() if damage is None else file.write_bytes(damage)
    with pytest.raises(DataError, match=rf"train\{suffix}"):
        read_shard(tmp_path / "train", helpers.tokenizer())


def test_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokens"):
        write_shard(tmp_path / "train", [], helpers.tokenizer())


def test_a_killed_write_leaves_no_description(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield "the llama"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "train", texts(), helpers.tokenizer())
    assert not (tmp_path / "train.json").exists()


def test_description(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "train", helpers.sentences(3), helpers.tokenizer())
    described = json.loads((tmp_path / "train.json").read_text())
    assert described["documents"] == 3 and described["tokens"] == len(shard.tokens)
    assert described["tokenizer"] == helpers.tokenizer().sha256


@pytest.mark.parametrize("change", [{"dtype": "<u8"}, {"dtype": ["<u2"]}, {"tokens": "9"}, {"documents": -1}])
def test_a_description_of_no_shard_of_ours_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    write_shard(tmp_path / "train", helpers.sentences(3), helpers.tokenizer())
    file = tmp_path / "train.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=rf"train\.json: {next(iter(change))} is .*prepare the data again"):
        read_shard(tmp_path / "train", helpers.tokenizer())


def test_offsets_have_a_hash_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "train", helpers.sentences(3), helpers.tokenizer())
    read_sound(tmp_path / "train", helpers.tokenizer())
    file = tmp_path / "train.offsets"
    data = bytearray(file.read_bytes())
    data[8] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"train\.offsets: damaged"):
        read_sound(tmp_path / "train", helpers.tokenizer())
    with monkeypatch.context() as patch:
        patch.setenv("LOCAL_RANK", "1")  # the machine's first rank has looked
        read_sound(tmp_path / "train", helpers.tokenizer())
    described = json.loads((tmp_path / "train.json").read_text())
    described.pop("offsets_sha256")  # as it was written before
    (tmp_path / "train.json").write_text(json.dumps(described))
    read_sound(tmp_path / "train", helpers.tokenizer())


def test_every_nth_document_is_held_out() -> None:
    def held_out(share: float, seed: int = 0) -> list[int]:
        return [number for number in range(30) if is_held_out(number, share, seed)]

    assert held_out(0.1) == [0, 10, 20] and held_out(0.1, 13) == [3, 13, 23]
    assert held_out(0.5) == held_out(0.4) == list(range(0, 30, 2))
    assert held_out(0) == []


def prepared(folder: Path) -> Path:
    """Three shards of two sources, one of them without validation."""
    for name in ("train/00000", "train/00001", "validation/00000"):
        write_shard(folder / name, helpers.sentences(30), helpers.tokenizer())
    assert not is_prepared(folder)
    sources = {"a": Entry(1.0, ["train/00000"], ["validation/00000"]), "b": Entry(2.5, ["train/00001"], [])}
    write_index(folder, sources)
    return folder


def test_a_prepared_folder(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    assert is_prepared(folder)
    train = read_prepared(folder, "train", helpers.tokenizer())
    assert {name: (weight, len(each)) for name, (weight, each) in train.items()} == {"a": (1.0, 1), "b": (2.5, 1)}
    assert list(read_prepared(folder, "validation", helpers.tokenizer())) == ["a"]
    write_index(folder, {"b": Entry(2.5, ["train/00001"], [])})
    with pytest.raises(DataError, match="no source has a document for the validation part"):
        read_prepared(folder, "validation", helpers.tokenizer())


def test_one_flipped_bit_is_refused(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    file = folder / "train/00001.tokens"
    data = bytearray(file.read_bytes())
    data[17] ^= 4
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"train/00001\.tokens: damaged"):
        read_prepared(folder, "train", helpers.tokenizer())
    file.write_bytes(data[:-2])
    with pytest.raises(DataError, match=r"train/00001\.tokens: \d+ bytes, expected"):
        read_prepared(folder, "train", helpers.tokenizer())
    file.with_suffix(".json").unlink()
    with pytest.raises(DataError, match=r"train/00001\.json"):
        read_prepared(folder, "train", helpers.tokenizer())


def entry(**changes: Any) -> dict[str, Any]:
    return {"sources": {"a": {"weight": 1.0, "train": ["train/00000"], "validation": []} | changes}}


@pytest.mark.parametrize(
    ("index", "error", "why"),
    [
        ('{"sources": ', DataError, "missing or damaged"),
        pytest.param("[" * 100_000, DataError, "missing or damaged", id="deep"),
        ({"source": {}}, DataError, "missing or damaged"),
        ({"sources": {"a": {"weight": 1.0}}}, DataError, "missing or damaged"),
        (entry(train="train/00000"), DataError, "the shards of 'a' are no lists of names"),
        (entry(weight=0), ConfigError, "the weight of 'a' is 0: it must be a number above 0"),
        (entry(weight=-1.0), ConfigError, "the weight of 'a' is -1.0"),
        (entry(weight="2"), ConfigError, "the weight of 'a' is '2'"),
        (entry(train=["/train/00000"]), ConfigError, "refused, it names '/train/00000'"),
        (entry(validation=["train/../../x"]), ConfigError, "refused, it names 'train/../../x'"),
        (entry(train=[""]), ConfigError, "refused, it names '.'"),
    ],
)
def test_a_damaged_or_hostile_index_is_refused(index: Any, error: type[Exception], why: str, tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    (folder / "index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(error, match=re.escape("index.json: " + why)):
        read_prepared(folder, "train", helpers.tokenizer())

"""Token shards: what goes in comes out, and a shard of another tokenizer or half a shard is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from puna.config import ConfigError, DataError
from puna.data.shards import Entry, is_prepared, read_prepared, read_shard, write_index, write_shard
from puna.text import tokenizer as tokenizers
from tests import helpers


def test_round_trip(tmp_path: Path) -> None:
    tokenizer, texts = helpers.tokenizer(), [*helpers.sentences(7), "", "ö\n\ty"]
    shard = write_shard(tmp_path / "train", texts, tokenizer, batch=3)
    assert shard.tokens.dtype == np.uint16
    documents = [shard.tokens[a:b].tolist() for a, b in zip(shard.offsets[:-1], shard.offsets[1:], strict=True)]
    assert documents == [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    assert np.array_equal(read_shard(tmp_path / "train", tokenizer).tokens, shard.tokens)
    assert isinstance(shard.tokens, np.memmap)


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


@pytest.mark.parametrize("damage", [None, b"", b"[]", b'{"dtype": "<u2"}'])
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

"""A SentencePiece model from its pieces and back, for formats that store the pieces alone (GGUF)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# SentencePiece's own numbers for a piece's type; GGUF uses the same.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2


class Pieces(NamedTuple):
    """What a tokenizer.model holds that other formats ask for; `pieces` are (text, score, type), by id."""

    pieces: list[tuple[str, float, int]]
    is_bpe: bool
    is_plain: bool
    """No normalisation and no space taken away."""
    dummy_prefix: bool
    """A space is put before the text."""


def sentencepiece_model(
    pieces: Iterable[tuple[str, float, int]], *, unk: int = 0, bos: int = 1, eos: int = 2, dummy_prefix: bool = True
) -> bytes:
    """The bytes of a tokenizer.model: BPE with byte fallback and no normalisation, as Llama's.

    `pieces` are (text with U+2581 for a space, score, type), by id. Written as protocol buffers by hand, for the
    package that trains and reads these models cannot assemble one. Field numbers are sentencepiece_model.proto's.
    """
    listed = b"".join(
        _bytes(1, _bytes(1, text.encode()) + _float(2, score) + _number(3, kind)) for text, score, kind in pieces
    )
    no_padding = (1 << 64) - 1  # -1
    trainer = _number(3, 2) + _number(35, 1)  # model_type BPE, byte_fallback
    trainer += _number(40, unk) + _number(41, bos) + _number(42, eos) + _number(43, no_padding)
    normalizer = _bytes(1, b"identity") + _number(3, int(dummy_prefix)) + _number(4, 0)  # 4: remove_extra_whitespaces
    return listed + _bytes(2, trainer) + _bytes(3, normalizer)


def read_pieces(model: bytes) -> Pieces:
    """`sentencepiece_model`, undone, for any SentencePiece model; absent fields have the .proto file's defaults."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, bytes | int] = {}
    normalizer: dict[int, bytes | int] = {}
    for field, value in _fields(model):
        assert isinstance(value, bytes), field
        inner = dict(_fields(value))
        if field == 1:
            text, score = inner.get(1, b""), inner.get(2, bytes(4))
            assert isinstance(text, bytes) and isinstance(score, bytes)
            pieces.append((text.decode(), struct.unpack("<f", score)[0], int(inner.get(3, NORMAL))))
        trainer, normalizer = inner if field == 2 else trainer, inner if field == 3 else normalizer
    is_plain = normalizer.get(1) == b"identity" and normalizer.get(4, 1) == 0
    return Pieces(pieces, trainer.get(3, 1) == BPE, is_plain, bool(normalizer.get(3, 1)))


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a protocol buffer: numbers, and bytes of whatever else; of a repeated one the last wins a dict."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _read_varint(message, at)
            yield key >> 3, value
        else:
            size, at = _read_varint(message, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            yield key >> 3, message[at : at + size]
            at += size


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that begins at a place, and the place after it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])

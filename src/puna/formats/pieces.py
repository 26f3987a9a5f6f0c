"""A SentencePiece model from its pieces, for formats that store the pieces alone (GGUF, llama2.c)."""

from __future__ import annotations

import struct
from collections.abc import Iterable

# SentencePiece's own numbers for a piece's type; GGUF uses the same.
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


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

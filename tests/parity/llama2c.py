"""Reads llama2.c's files, those of the smallest published Llamas: a model.bin (version 0) and its tokenizer.bin.

model.bin: seven int32 (dim, hidden, layers, heads, key heads, vocabulary, context; the vocabulary is negative where the
output is not tied), then float32 tensors in a fixed order, a kind of tensor for all layers at a time. wq and wk are in
Meta's order. tokenizer.bin: an int32, then for each piece its score (float32), its length (int32) and its bytes.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from puna.config import ConfigError, DataError
from puna.formats import build
from puna.model.transformer import ModelConfig, Transformer
from puna.text.pieces import BYTE, CONTROL, NORMAL, UNKNOWN, sentencepiece_model
from puna.text.tokenizer import SentencePieceTokenizer

HEADER = struct.Struct("<7i")


def load_model(path: Path) -> Transformer:
    """Read a model.bin. DataError where its length is not what its header says."""
    data = _read(path)
    if len(data) < HEADER.size:
        raise DataError(f"{path}: {len(data)} bytes are too few for a llama2.c model")
    dim, hidden, n_layers, n_heads, n_kv_heads, vocab, context = HEADER.unpack_from(data)
    try:
        config = ModelConfig(dim, n_layers, n_heads, n_kv_heads, abs(vocab), hidden, context, tie_embeddings=vocab > 0)
    except ConfigError as error:
        raise DataError(f"{path}: not a llama2.c file of version 0: its header says that {error}") from None
    layout = _layout(config)
    expected = HEADER.size + 4 * sum(int(np.prod(shape)) for _, shape in layout)
    if len(data) != expected:
        raise DataError(f"{path}: has {len(data)} bytes, its header asks for {expected}: truncated or damaged")
    weights: dict[str, Tensor] = {}
    offset = HEADER.size
    for name, shape in layout:
        values = np.frombuffer(data, "<f4", int(np.prod(shape)), offset).reshape(shape)
        offset += values.nbytes
        if "{}" in name:
            weights |= {name.format(i): torch.tensor(layer) for i, layer in enumerate(values)}
        elif name:
            weights[name] = torch.tensor(values)
    return build(config, weights, path)


def load_tokenizer(path: Path, vocab_size: int) -> SentencePieceTokenizer:
    """Read a tokenizer.bin of `vocab_size` pieces (the file does not say how many): unk, bos, eos, 256 bytes, text."""
    data = _read(path)
    pieces, offset = [], 4
    try:
        for i in range(vocab_size):
            score, length = struct.unpack_from("<fi", data, offset)
            text = data[offset + 8 : offset + 8 + length].decode()
            offset += 8 + length
            kind = UNKNOWN if i == 0 else CONTROL if i < 3 else BYTE if i < 259 else NORMAL
            pieces.append((text.strip() if kind == CONTROL else text.replace(" ", "\u2581"), score, kind))
        if offset != len(data):
            raise ValueError(f"{len(data) - offset} bytes are left over")
        return SentencePieceTokenizer(sentencepiece_model(pieces))
    except (struct.error, ValueError) as error:
        raise DataError(f"{path}: not a llama2.c tokenizer of {vocab_size} pieces: {error}") from error


def _layout(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors in the file's order: Meta's name ({} for the layer; empty for what is not needed) and shape."""
    d, h, n, rows = config.dim, config.ffn_hidden, config.n_layers, config.n_kv_heads * config.head_dim
    layout: list[tuple[str, tuple[int, ...]]] = [
        ("tok_embeddings.weight", (config.vocab_size, d)),
        ("layers.{}.attention_norm.weight", (n, d)),
        ("layers.{}.attention.wq.weight", (n, d, d)),
        ("layers.{}.attention.wk.weight", (n, rows, d)),
        ("layers.{}.attention.wv.weight", (n, rows, d)),
        ("layers.{}.attention.wo.weight", (n, d, d)),
        ("layers.{}.ffn_norm.weight", (n, d)),
        ("layers.{}.feed_forward.w1.weight", (n, h, d)),
        ("layers.{}.feed_forward.w2.weight", (n, d, h)),
        ("layers.{}.feed_forward.w3.weight", (n, h, d)),
        ("norm.weight", (d,)),
        ("", (2, config.max_seq_len, config.head_dim // 2)),  # cos and sin of the rotary positions
    ]
    return layout if config.tie_embeddings else [*layout, ("output.weight", (config.vocab_size, d))]


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    return path.read_bytes()

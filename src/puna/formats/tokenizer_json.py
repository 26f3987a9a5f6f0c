"""A SentencePiece model as the tokenizer.json that transformers and vLLM read, with the same ids for every text."""

from __future__ import annotations

import json
from typing import Any

from puna.text import chat
from puna.text.pieces import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Pieces, read_pieces
from puna.text.tokenizer import SentencePieceTokenizer

SPACE = "\u2581"
OUTSIDE = (UNKNOWN, CONTROL)
"""Types of pieces that no text may become."""


def files(tokenizer: SentencePieceTokenizer) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json; {} for a model that is not as Llama's.

    That is BPE without normalisation and without user-defined symbols, which stand outside the merges.
    """
    read = read_pieces(tokenizer.serialized)
    if not (read.is_bpe and read.is_plain) or any(kind == USER_DEFINED for _, _, kind in read.pieces):
        return {}
    bos, eos, unk = (read.pieces[i][0] for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": read.pieces[tokenizer.pad_id][0],
        "unk_token": unk,
        "clean_up_tokenization_spaces": False,
        "chat_template": chat.TEMPLATES[tokenizer.chat_format],
    }
    state = _state(read, bos, tokenizer.bos_id, unk)
    return {
        "tokenizer.json": json.dumps(state, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }


def _state(read: Pieces, bos: str, bos_id: int, unk: str) -> dict[str, Any]:
    """The tokenizer.json: BOS goes before a text, as Meta's code puts it."""
    prefix = [{"type": "Prepend", "prepend": SPACE}] if read.dummy_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if read.dummy_prefix else []
    opening, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, piece) for i, (piece, _, kind) in enumerate(read.pieces) if kind in OUTSIDE],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [opening, text],
            "pair": [opening, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, (piece, _, _) in enumerate(read.pieces)},
            "merges": _merges(read.pieces),
        },
    }


def _added(number: int, piece: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": piece, **flags}


def _merges(pieces: list[tuple[str, float, int]]) -> list[list[str]]:
    """Every way to make a piece of two: SentencePiece joins whatever gives the piece with the best score."""
    ids = {piece: i for i, (piece, _, kind) in enumerate(pieces) if kind == NORMAL}
    ranked = sorted(ids, key=lambda piece: (-pieces[ids[piece]][1], ids[piece]))
    return [
        [piece[:cut], piece[cut:]]
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]

"""Encoding a corpus: the tokenizer's ids, several times sooner.

SentencePiece keeps a queue of all pairs of a text, so that a long text costs more a character than a short one, and a
text says most of its words many times. In a vocabulary as Llama's no piece reaches from one word into the space before
the next, nor over the end of a line: the words can be encoded apart, each once, and the ids are the same.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np

from puna.data.shards import Tokens, dtype_of
from puna.text.pieces import CONTROL, UNKNOWN, Pieces, read_pieces
from puna.text.tokenizer import SentencePieceTokenizer, Tokenizer, check_unicode

SPACE = "\u2581"  # how SentencePiece writes it
WORD = re.compile(r"(?: +|\n)[^ \n]*")
CACHED = 2**18  # words: some 70 MB
LONGEST = 64  # characters of a word that is kept


def encoder(tokenizer: Tokenizer) -> Callable[[str], Tokens]:
    """A function from a text to its ids with BOS and EOS; DataError where the text is not valid Unicode."""
    dtype = dtype_of(tokenizer)
    if isinstance(tokenizer, SentencePieceTokenizer) and words_are_apart(read_pieces(tokenizer.serialized)):
        return _by_words(tokenizer, dtype)
    return lambda text: np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], dtype)


def words_are_apart(pieces: Pieces) -> bool:
    """Whether every text's ids are those of its words, one after the other."""
    texts = {text for text, _, kind in pieces.pieces if kind not in (CONTROL, UNKNOWN)}
    reaching = any(SPACE in text.lstrip(SPACE) or "\n" in text for text in texts)
    return pieces.is_bpe and pieces.is_plain and pieces.dummy_prefix and SPACE in texts and not reaching


def _by_words(tokenizer: SentencePieceTokenizer, dtype: np.dtype[np.unsignedinteger]) -> Callable[[str], Tokens]:
    space = tokenizer.encode("\n")[:1]

    def word(text: str) -> bytes:
        """The ids of a word with what stands before it. The tokenizer puts a space before all that it is given."""
        ids = tokenizer.encode(text)[1:] if text[0] == "\n" else tokenizer.encode(text[1:]) if text != " " else space
        return np.array(ids, dtype).tobytes()

    known = functools.lru_cache(CACHED)(word)
    bos, eos = (np.array([i], dtype).tobytes() for i in (tokenizer.bos_id, tokenizer.eos_id))

    def encode(text: str) -> Tokens:
        words = WORD.findall(f" {check_unicode(text)}" if text else "")
        ids = b"".join([known(each) if len(each) < LONGEST else word(each) for each in words])
        return np.frombuffer(bos + ids + eos, dtype)

    return encode

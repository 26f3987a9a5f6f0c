"""The fast encoder gives the tokenizer's ids, and only works word by word where that is sure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.config import DataError
from puna.corpus.encode import encoder, words_are_apart
from puna.data import readers
from puna.text import tokenizer as tokenizers
from puna.text.pieces import BYTE, CONTROL, NORMAL, UNKNOWN, read_pieces, sentencepiece_model
from puna.text.tokenizer import SentencePieceTokenizer, Tokenizer
from tests import helpers

TEXTS = [
    "",
    " ",
    "\n",
    "  \n \n\n  a",
    "the llama",
    " the  llama \n",
    "7 tents\nthe road\n\n\n  to Puno 12345.",
    "\tö\u2028\u00a0 vicuña 漢字 \r\n",
    "<s> </s> [INST]",
    "x" * 500 + " y" * 500,
    "\u2581 \u2581the",
]


def expected(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_tokenizers(text: str) -> None:
    ids = encoder(helpers.tokenizer())(text)
    assert ids.dtype == np.uint16 and ids.tolist() == expected(helpers.tokenizer(), text)


WORDS = st.sampled_from([" ", "  ", "\n", "the", "llama", ".", "ö", "7", "\t", "\u2581", "x" * 70])


@given(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.lists(WORDS).map("".join)))
def test_ids_of_any_text(text: str) -> None:
    assert encoder(helpers.tokenizer())(text).tolist() == expected(helpers.tokenizer(), text)


def test_words_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    encode_one = SentencePieceTokenizer.encode
    monkeypatch.setattr(
        SentencePieceTokenizer, "encode", lambda self, text: asked.append(text) or encode_one(self, text)
    )
    ids = encoder(helpers.tokenizer())
    ids("the llama the llama " + "x" * 64 + "\nllama")
    assert asked == ["\n", "the", "llama", "x" * 64, "\nllama"]
    ids("the llama")
    assert len(asked) == 5


def model(*texts: str, dummy_prefix: bool = True) -> bytes:
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{i:02X}>", 0.0, BYTE) for i in range(256)]
    pieces += [(text, -float(i), NORMAL) for i, text in enumerate((*texts, *"abc"))]
    return sentencepiece_model(pieces, dummy_prefix=dummy_prefix)


@pytest.mark.parametrize(
    ("texts", "apart"),
    [
        (["\u2581", "\u2581a", "\u2581\u2581"], True),
        (["\u2581", "a\u2581"], False),
        (["\u2581", "\u2581a\u2581"], False),
        (["\u2581", "a\n"], False),
        (["\u2581a"], False),
    ],
)
def test_a_vocabulary_that_reaches_over_words_is_seen(texts: list[str], apart: bool) -> None:
    assert words_are_apart(read_pieces(model(*texts))) == apart
    tokenizer = SentencePieceTokenizer(model(*texts))
    for text in ("a b a b\nc", "a a\n a", " a  b "):
        assert encoder(tokenizer)(text).tolist() == expected(tokenizer, text)


def test_without_the_space_before_a_text_nothing_is_split() -> None:
    assert not words_are_apart(read_pieces(model("\u2581", dummy_prefix=False)))


def test_another_kind_of_tokenizer_encodes_whole_texts(tmp_path: Path) -> None:
    package = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    backend = package.Tokenizer(package.models.BPE())
    backend.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = package.pre_tokenizers.ByteLevel.alphabet()
    trainer = package.trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(helpers.sentences(50), trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    tokenizer = tokenizers.load(tmp_path)
    assert encoder(tokenizer)("the llama\n counts").tolist() == expected(tokenizer, "the llama\n counts")


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(DataError, match="lone surrogate"):
        encoder(helpers.tokenizer())("a \ud800")


@pytest.mark.shared_data
def test_llama_2s_ids_of_real_text(shared: Path) -> None:
    tokenizer = tokenizers.load(shared / "data/tokenizer/llama2_tokenizer.model")
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert words_are_apart(read_pieces(tokenizer.serialized))
    fast = encoder(tokenizer)
    for name in ("tinystories_sample", "us_public_speeches"):
        for text in readers.read(shared / f"data/pretrain/{name}.jsonl.gz", "jsonl_text").records[:100]:
            assert fast(text).tolist() == expected(tokenizer, text)

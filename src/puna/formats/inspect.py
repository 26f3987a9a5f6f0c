"""`puna inspect`: what a path holds, from headers and manifests, without reading the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from puna import checkpoint, config
from puna.config import ConfigError, DataError
from puna.formats import find, gguf, huggingface, meta
from puna.formats.folders import read_digests
from puna.model.transformer import ModelConfig
from puna.run_folder import sha256
from puna.text import tokenizer as tokenizers
from puna.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class InspectConfig:
    """`puna inspect PATH`."""

    path: Path
    """a model folder, a GGUF file, Meta's folder, a checkpoint, or a run folder, whose models are listed."""
    sha256: bool = False
    """read the weights of a model folder or file too, and print their digests (a checkpoint's are in its manifest)."""


def run(cfg: InspectConfig) -> str:
    """Rows of what is known, as text. Errors as those of `find.load`."""
    path = cfg.path
    if find.is_gguf(path):
        return _table(_gguf(path, cfg.sha256))
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    if (path / checkpoint.MANIFEST).is_file():
        return _table(_checkpoint(path))
    if find.architectures(path):
        return _table(_hugging_face(path, cfg.sha256))
    if meta.is_meta(path):
        return _table(_meta(path, cfg.sha256))
    models = sorted(file.parent for file in path.rglob("config.json") if find.architectures(file.parent))
    if not models:
        raise ConfigError(
            f"{path}: holds no model: looked for a config.json with architectures, here and in all folders"
        )
    return _table(
        [("holds", f"a run of {len(models)} models"), *((str(m.relative_to(path)), _line(m)) for m in models)]
    )


def _hugging_face(folder: Path, digest: bool) -> list[tuple[str, str]]:
    architecture = find.architectures(folder)[0]
    shape = huggingface.read_config(folder, architecture)
    files = huggingface.weight_files(folder)
    rows = [("holds", f"a Hugging Face folder, {architecture}"), *_shape(shape, _count_parameters(shape, architecture))]
    rows += [("dtype", _types(_safetensors_types(files))), *_tokenizer(tokenizers.load(folder))]
    known = {name: f"sha256 {digest}" for name, digest in read_digests(folder).items()}
    return [*rows, *_provenance(folder), *_files(files, _digests(files) if digest else known)]


def _gguf(path: Path, digest: bool) -> list[tuple[str, str]]:
    file, header = gguf.find(path), gguf.read_header(path)
    rows = [("holds", "a GGUF file"), *_shape(header.config, header.config.n_params())]
    rows += [("dtype", _types(header.types)), *_tokenizer(header.tokenizer)]
    return [
        *rows,
        *([("licence", header.license)] if header.license else []),
        *_files([file], _digests([file]) if digest else {}),
    ]


def _meta(folder: Path, digest: bool) -> list[tuple[str, str]]:
    header = meta.read_header(folder)
    rows = [("holds", f"Meta's layout in {len(header.files)} shards"), *_shape(header.config, header.config.n_params())]
    rows += [("dtype", _types(header.types)), *_tokenizer(header.tokenizer), *_provenance(folder)]
    known = {name: f"md5 {md5}" for name, md5 in header.md5.items()}
    return [*rows, *_files(header.files, _digests(header.files) if digest else known)]


def _checkpoint(path: Path) -> list[tuple[str, str]]:
    """A stage's checkpoint: its manifest, the model's tensors (PPO's policy), and the stage's own provenance."""
    manifest, tensors = checkpoint.read_manifest(path), checkpoint.tensors(path)
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("policy.")} or tensors
    stage = path.absolute().parent.parent
    settings = find.read_object(stage / "config.json")
    rows = [("holds", f"a checkpoint of step {manifest['step']}")]
    if "model" in settings:
        shape = config.from_dict(ModelConfig, settings["model"])
        rows += _shape(shape, _count_stored(tensors, shape.tie_embeddings))
    else:
        init = settings.get("init")
        parent = find.read_object(find.started_in(stage, settings) / init / "config.json") if init else {}
        count = f"{_count_stored(tensors, parent.get('tie_word_embeddings') is True):,}"
        missing = "" if parent else ", a tied output counted twice: the parent is not in its place"
        rows += [*([("parent", str(init))] if init else []), ("parameters", count + missing)]
    rows.append(("dtype", _types(Counter(str(dtype).removeprefix("torch.") for dtype, _ in tensors.values()))))
    rows.append(("written by", f"puna {manifest.get('puna')}, torch {manifest.get('torch')}"))
    digests = {name: f"sha256 {digest}" for name, digest in manifest["files"].items()}
    return [*rows, *_files([path / name for name in sorted(manifest["files"])], digests)]


def _shape(shape: ModelConfig, n_params: int) -> list[tuple[str, str]]:
    heads = f"{shape.n_heads} heads ({shape.n_kv_heads} of keys and values), feed-forward {shape.ffn_hidden}"
    tied = "tied" if shape.tie_embeddings else "not tied"
    moe = shape.moe
    experts = [("experts", f"{moe.experts}, {moe.top_k} a token")] if moe.experts else []
    return [
        ("shape", f"{shape.n_layers} layers, width {shape.dim}, {heads}"),
        *experts,
        ("vocabulary", f"{shape.vocab_size}, embeddings {tied}"),
        ("context", f"{shape.max_seq_len}, rope_theta {shape.rope_theta:g}, norm_eps {shape.norm_eps:g}"),
        ("parameters", f"{n_params:,}"),
    ]


def _count_parameters(shape: ModelConfig, architecture: str) -> int:
    """A reward model has a row in place of the output."""
    if not huggingface.is_classifier(architecture):
        return shape.n_params()
    output = 0 if shape.tie_embeddings else shape.vocab_size * shape.dim
    return shape.n_params() - output + shape.dim


def _count_stored(tensors: dict[str, tuple[torch.dtype, torch.Size]], tied: bool) -> int:
    """A checkpoint has a tied output twice."""
    return sum(size.numel() for name, (_, size) in tensors.items() if not (tied and name.endswith("output.weight")))


def _tokenizer(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [("tokenizer", f"{tokenizer.vocab_size} ids, {tokenizer.chat_format}, sha256 {tokenizer.sha256}")]


def _provenance(folder: Path) -> list[tuple[str, str]]:
    """puna.json as it is: stage, parent and whatever else it says."""
    return [(key, str(value)) for key, value in find.read_object(folder / "puna.json").items()]


def _digests(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: f"sha256 {sha256(file)}" for file in files}


def _files(files: Iterable[Path], digests: dict[str, str]) -> list[tuple[str, str]]:
    rows = []
    for file in files:
        size = f"{file.stat().st_size:,} bytes" if file.is_file() else "missing"
        rows.append((file.name, f"{size}  {digests.get(file.name, '')}".rstrip()))
    return rows


def _line(folder: Path) -> str:
    """A model of a run in a line."""
    architecture, provenance = find.architectures(folder)[0], find.read_object(folder / "puna.json")
    kind = "reward model" if huggingface.is_classifier(architecture) else "model"
    count = _count_parameters(huggingface.read_config(folder, architecture), architecture)
    origin = ", ".join(f"{key} {provenance[key]}" for key in ("stage", "parent") if key in provenance)
    return f"{kind} of {count:,} parameters" + (f": {origin}" if origin else "")


def _safetensors_types(files: list[Path]) -> dict[str, int]:
    """How many tensors there are of each type, from the files' headers."""
    types: Counter[str] = Counter()
    for path in files:
        try:
            with safetensors.safe_open(path, "pt") as file:
                types.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118  not a dict
        except safetensors.SafetensorError as error:
            raise DataError(f"{path}: truncated or damaged: {error}") from error
    return types


def _types(types: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count} tensors)" for name, count in sorted(types.items()))


def _table(rows: list[tuple[str, Any]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)

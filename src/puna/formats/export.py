"""`puna export`: a model as other programs take it, a Hugging Face folder, a GGUF file or Meta's layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from puna.config import ConfigError
from puna.formats import DTYPES, find, gguf, huggingface, meta, tokenizer_json
from puna.formats.card import card
from puna.formats.find import Opened
from puna.formats.lineage import Step, license_of, trace
from puna.model.reward import RewardModel
from puna.run_folder import write_atomically
from puna.text.tokenizer import SentencePieceTokenizer


@dataclass(frozen=True)
class ExportConfig:
    """`puna export CHECKPOINT --format gguf --out FILE`."""

    checkpoint: Path
    """a run folder (its newest model), a model folder, a GGUF file, Meta's folder, or a checkpoint of a stage."""
    out: Path
    """the folder, or the .gguf file, to write; an earlier export there is replaced, and nothing else is."""
    format: Literal["hf", "gguf", "meta"] = "hf"
    """hf: safetensors; gguf: for llama.cpp; meta: consolidated.NN.pth and params.json. Each has a model card."""
    dtype: Literal["fp32", "fp16", "bf16", "q8_0"] = "fp32"
    """the weights' type; q8_0 is GGUF's 8-bit."""
    shards: int = 1
    """the files that Meta's layout is cut into: 1 for Meta's 7B, 2 for its 13B, 8 for its 70B."""
    license: str = ""
    """for the model card; empty takes the base's, where its files name one."""


def run(cfg: ExportConfig) -> Path:
    """Write the model and return its folder or file."""
    _check(cfg)
    # GGUF's norms stay float32, and q8_0 is made of float32: neither may be rounded first.
    opened = find.load(cfg.checkpoint, torch.float32 if cfg.format == "gguf" else DTYPES[cfg.dtype])
    is_file = find.is_gguf(opened.source)
    base = gguf.read_header(opened.source).license if is_file else license_of(opened.source)
    license = cfg.license or base
    provenance: dict[str, Any] = {"stage": "export", "parent": str(opened.source)}
    provenance |= {"license": license} if license else {}
    if scale := find.read_object(opened.source / huggingface.PROVENANCE).get("scale"):
        provenance |= {"scale": scale}  # a reward model's, see generate.scoring
    own = Step(cfg.out, provenance, {}, {})
    steps = [own] if is_file else trace(opened.source)
    name = cfg.out.resolve().stem if cfg.format == "gguf" else cfg.out.resolve().name
    said = card(opened.model, name, steps, license, "transformers" if cfg.format == "hf" else "")
    if cfg.format == "hf":
        _save_hugging_face(cfg, opened, said, provenance)
    elif isinstance(opened.model, RewardModel):
        raise ConfigError(f"{opened.source} is a reward model, which {cfg.format} has no place for: use --format hf")
    elif cfg.format == "gguf":
        options: dict[str, Any] = {"dtype": cfg.dtype, "name": cfg.out.stem, "license": license, "stage": "export"}
        gguf.save(opened.model, opened.tokenizer, cfg.out, **options)
        write_atomically(_card_beside(cfg.out), said)
    else:
        options = {"shards": cfg.shards, "dtype": DTYPES[cfg.dtype], "provenance": provenance}
        meta.save(opened.model, opened.tokenizer, cfg.out, **options, texts={"README.md": said})
    return cfg.out


def _card_beside(file: Path) -> Path:
    """Where the card of a GGUF file stands."""
    return file.with_suffix(".md")


def _check(cfg: ExportConfig) -> None:
    """ConfigError where flags do not go together, or where something stands at `out` that is no export."""
    if cfg.dtype == "q8_0" and cfg.format != "gguf":
        raise ConfigError(f"dtype q8_0 is GGUF's alone: use --format gguf, or fp16 or bf16 for {cfg.format}")
    if cfg.shards != 1 and cfg.format != "meta":
        raise ConfigError(f"shards {cfg.shards}: Meta's layout alone is cut into shards: use --format meta")
    if cfg.format == "gguf":
        if cfg.out.suffix != ".gguf" or cfg.out.is_dir():
            raise ConfigError(f"{cfg.out}: --format gguf writes a file: give --out a name that ends with .gguf")
        there, stage = [cfg.out, _card_beside(cfg.out)], gguf.read_stage(cfg.out)
    else:
        there, stage = [cfg.out], find.read_object(cfg.out / huggingface.PROVENANCE).get("stage", "")
    for path in there:
        if path.exists() and stage != "export":
            raise ConfigError(f"{path} stands there already and is no export that could be replaced: use another --out")
    if cfg.out.resolve() == cfg.checkpoint.resolve():
        raise ConfigError(f"{cfg.out}: --out is the model itself: use another --out")


def _save_hugging_face(cfg: ExportConfig, opened: Opened, said: str, provenance: dict[str, Any]) -> None:
    texts = {"README.md": said}
    if isinstance(opened.tokenizer, SentencePieceTokenizer):
        texts |= tokenizer_json.files(opened.tokenizer)
    options: dict[str, Any] = {"dtype": DTYPES[cfg.dtype], "provenance": provenance, "texts": texts}
    if isinstance(opened.model, RewardModel):
        huggingface.save_reward_model(opened.model, opened.tokenizer, cfg.out, **options)
    else:
        huggingface.save_model(opened.model, opened.tokenizer, cfg.out, **options)

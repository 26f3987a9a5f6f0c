"""Scores and log-probabilities of finished texts, in batches of like lengths: what judges, rather than what writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from puna import losses, parallel
from puna.config import ConfigError, DataError
from puna.data import packing
from puna.formats import find, huggingface
from puna.model.reward import RewardModel
from puna.model.transformer import Transformer
from puna.text import chat
from puna.text.tokenizer import Tokenizer
from puna.types import Dialog, Engine

SCORE_BINS = 20


class Scale(NamedTuple):
    """Mean and deviation of a reward model's raw scores over n reference answers; stored with it as "scale"."""

    mean: float
    deviation: float
    n: int


def scale_of(raw: Tensor) -> Scale | None:
    """The scale of raw scores (N,), with the deviation of the whole set; None where they do not differ."""
    deviation = float(raw.std(correction=0)) if len(raw) else 0.0
    return Scale(float(raw.mean()), deviation, len(raw)) if deviation > 0 else None


def distribution(raw: Tensor) -> list[int]:
    """Figure 27: how many raw scores (N,) have a sigmoid in each of 20 equal parts of 0 to 1."""
    places = (raw.sigmoid() * SCORE_BINS).long().clamp(max=SCORE_BINS - 1)
    return places.bincount(minlength=SCORE_BINS).tolist()


class Scorer:
    """A reward model as a function of dialogs (types.Reward): scores in (0, 1), the paper's R.

    With a `scale` raw scores are shifted and divided to mean 0 and deviation 1 on its reference answers first, so that
    models can be compared. PPO goes without: it whitens its own batch.
    """

    def __init__(
        self,
        model: RewardModel,
        tokenizer: Tokenizer,
        *,
        precision: str = "fp32",
        max_tokens: int = 16384,
        scale: Scale | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.precision = precision
        self.max_tokens = max_tokens
        self.scale = scale

    def __call__(self, dialogs: Sequence[Dialog]) -> Tensor:
        """Dialogs that end with an answer -> scores (N,) float32 on the CPU. DataError where one is too long."""
        rows = [chat.encode(dialog, self.tokenizer).tokens for dialog in dialogs]
        check_lengths(rows, self.model.config.max_seq_len)
        return self.score_tokens(rows)

    def score_tokens(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows of ids, each ending with its answer, -> scores (N,). The ids are taken as they are."""
        return self.raw(rows).sigmoid()

    def raw(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The same before the sigmoid: what differences and margins speak of.

        Of a sharded model all ranks call it with the same rows, and each scores its share of them.
        """
        if parallel.is_sharded(self.model):
            scores = torch.tensor(parallel.spread(lambda first, part: self._raw(part, packing.passes).tolist(), rows))
        else:
            scores = self._raw(rows, packing.by_length)
        return scores if self.scale is None else (scores - self.scale.mean) / self.scale.deviation

    @torch.no_grad()  # not inference_mode: what a sharded model gathers in it could not be trained with again
    def _raw(self, rows: Sequence[Sequence[int]], batches: Callable[[list[int], int], list[list[int]]]) -> Tensor:
        device = self.model.score.weight.device
        scores = torch.zeros(len(rows))
        for members in batches([len(row) for row in rows], self.max_tokens):
            tokens, lengths = packing.pad_right([rows[i] for i in members])
            with parallel.autocast(self.precision, device):
                scores[members] = self.model(tokens.to(device), lengths.to(device)).cpu()
        return scores


def check_lengths(rows: Sequence[Sequence[int]], context: int) -> None:
    """DataError where a row of ids is longer than a model reads."""
    for number, row in enumerate(rows):
        if len(row) > context:
            raise DataError(f"dialog {number} has {len(row)} tokens, the model reads {context}")


def open_scorer(path: Path, device: torch.device, *, precision: str = "fp32", normalise: bool = False) -> Scorer:
    """The reward model of a folder, a stage's or its `model`, as a Scorer, with its stored scale where asked for.

    Raises ConfigError where there is none, or no scale; other errors as `huggingface.load_reward_model`.
    """
    folder = find.model_folder(path)
    stored = find.read_object(folder / huggingface.PROVENANCE).get("scale")
    if normalise and stored is None:
        raise ConfigError(f"{folder}: its puna.json has no scale: train it again, or leave normalise away")
    model, tokenizer = huggingface.load_reward_model(folder).to(device), huggingface.load_tokenizer(folder)
    return Scorer(model, tokenizer, precision=precision, scale=Scale(**stored) if normalise and stored else None)


def open_judge(folder: Path, engine: Engine, device: torch.device) -> Scorer:
    """The reward model of a folder as a Scorer of what an engine writes, in bfloat16 where the machine computes in it.

    ConfigError where it reads other tokens than the engine's, or fewer than its context.
    """
    huggingface.check_alike(folder, engine.tokenizer, engine.context)
    return Scorer(huggingface.load_reward_model(folder).to(device), engine.tokenizer, precision="bf16")


def combined_reward(safety: Tensor, helpfulness: Tensor, is_safety: Sequence[bool], threshold: float) -> Tensor:
    """The paper's R_c of N scored answers; see losses.combine_rewards."""
    return losses.combine_rewards(safety, helpfulness, torch.tensor(list(is_safety), dtype=torch.bool), threshold)


@dataclass(frozen=True)
class Judges:
    """Both reward models, and what the paper makes of them (3.2.3)."""

    helpfulness: Scorer
    safety: Scorer
    threshold: float

    def scores(self, rows: Sequence[Sequence[int]], is_safety: Sequence[bool]) -> dict[str, Tensor]:
        """Of rows of ids that end with an answer: "helpfulness", "safety", and "reward", both combined; (N,) each."""
        helpfulness, safety = self.helpfulness.score_tokens(rows), self.safety.score_tokens(rows)
        combined = combined_reward(safety, helpfulness, is_safety, self.threshold)
        return {"helpfulness": helpfulness, "safety": safety, "reward": combined}


@torch.inference_mode()
def sequence_logprobs(
    model: Transformer, rows: Sequence[Sequence[int]], temperature: float = 1.0, max_tokens: int = 16384
) -> list[Tensor]:
    """For each row of ids, log p of every token after its first, (len - 1,) float32 on the CPU."""
    device = model.tok_embeddings.weight.device
    out: list[Tensor] = [torch.empty(0)] * len(rows)
    for members in packing.by_length([len(row) for row in rows], max_tokens):
        tokens, lengths = packing.pad_right([rows[i] for i in members])
        tokens = tokens.to(device)
        logprobs = losses.token_logprobs(model(tokens)[:, :-1], tokens[:, 1:], temperature).cpu()
        for row, i in enumerate(members):
            out[i] = logprobs[row, : int(lengths[row]) - 1]
    return out

"""Sampling for a whole batch: each row with its own settings, and seeded draws that no batch-mate can disturb.

A draw inverts the cumulative distribution at a uniform number. The numbers of a sequence come from a counter-based
generator keyed by (seed, request, sample), so that they are the same alone or among thousands.

Shapes: B sequences, V vocabulary, W candidates.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from puna import kernels
from puna.config import ConfigError
from puna.generate import kernel
from puna.types import SamplingSettings

COLDEST, HOTTEST, STRONGEST = 1e-3, 1e3, 1e3
"""Within these no logit overflows; a bias of -1000 rules a token out."""

FIRST_WIDTHS = (16, 256, 4096)
"""Candidates a cut looks at before it sorts the vocabulary; mostly 16 suffice, a fifth of the time of 64 (V 2048)."""


@dataclass(frozen=True)
class Sampling:
    """How a request's answers are drawn, and where they end. The cuts come in the order top-k, top-p, min-p.

    Raises ConfigError where a setting is out of range.
    """

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """draw from the smallest set of tokens that holds this much probability; 1 draws from all."""
    top_k: int = 0
    """draw from so many of the likeliest tokens; 0 draws from all."""
    min_p: float = 0.0
    """leave out tokens less likely than this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """divides the positive logits of tokens that the prompt or the answer has, multiplies the negative ones."""
    seed: int = 0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    """texts that end an answer; they are no part of it."""
    stop_ids: tuple[int, ...] = ()
    """tokens that end an answer, as EOS does."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """added to tokens' logits."""
    top_logprobs: int = 0
    """report so many of the likeliest tokens beside each one drawn."""

    def __post_init__(self) -> None:
        for wrong, message in (
            (
                self.temperature != 0 and not COLDEST <= self.temperature <= HOTTEST,
                f"temperature is {self.temperature}: it must be 0 (greedy) or from {COLDEST} to {HOTTEST:g}",
            ),
            (not 0 < self.top_p <= 1, f"top_p is {self.top_p}: it must be above 0 and at most 1"),
            (not 0 <= self.top_k < 2**31, f"top_k is {self.top_k}: it must be 0 (off) or a number of tokens"),
            (not 0 <= self.min_p <= 1, f"min_p is {self.min_p}: it must be from 0 to 1"),
            (
                not 1 / STRONGEST <= self.repetition_penalty <= STRONGEST,
                f"repetition_penalty is {self.repetition_penalty}: it must be from {1 / STRONGEST} to {STRONGEST:g}; "
                "1 is none",
            ),
            (
                not all(abs(bias) <= STRONGEST for bias in self.logit_bias.values()),
                f"logit_bias holds a number beyond {STRONGEST:g}",
            ),
            (self.max_new_tokens < 1, f"max_new_tokens is {self.max_new_tokens}: it must be at least 1"),
            ("" in self.stop, "stop holds an empty text, which every answer has"),
            (self.top_logprobs < 0, f"top_logprobs is {self.top_logprobs}: it must be at least 0"),
        ):
            if wrong:
                raise ConfigError(message)

    @property
    def cuts(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


def one_each(temperature: float | Sequence[float], count: int, **settings: Unpack[SamplingSettings]) -> list[Sampling]:
    """The settings of `count` prompts, alike but for a temperature of each where a list is given.

    Raises ConfigError where the list has another length, or as Sampling.
    """
    heat = [temperature] * count if isinstance(temperature, int | float) else list(temperature)
    if len(heat) != count:
        raise ConfigError(f"{len(heat)} temperatures for {count} prompts: give one, or one for each")
    return [Sampling(temperature=float(t), **settings) for t in heat]


class Settings(NamedTuple):
    """What `sample` needs to know of B rows."""

    temperature: Tensor  # (B,) float32
    top_p: Tensor  # (B,) float32
    top_k: Tensor  # (B,) int64
    min_p: Tensor  # (B,) float32
    cuts: Tensor  # (B,) bool
    greedy: Tensor  # (B,) bool

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device) -> Settings:
        """The settings of one row each."""

        def column(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            column([s.temperature for s in samplings], torch.float32),
            column([s.top_p for s in samplings], torch.float32),
            column([s.top_k for s in samplings], torch.int64),
            column([s.min_p for s in samplings], torch.float32),
            column([s.cuts for s in samplings], torch.bool),
            column([s.temperature == 0 for s in samplings], torch.bool),
        )

    def rows(self, which: Tensor) -> Settings:
        """The settings of these rows (a mask or indices)."""
        return Settings(*(column[which] for column in self))


def uniforms(seed: int, request: int, sample: int, count: int) -> Tensor:
    """`count` numbers in [0, 1), float32 (count,), from the arguments alone; a longer row continues a shorter one."""
    key = np.array([seed % 2**64, request], dtype=np.uint64)
    counter = np.array([0, 0, 0, sample], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
    return torch.from_numpy(generator.random(count, dtype=np.float32))


def adjust(logits: Tensor, samplings: Sequence[Sampling], seen: Sequence[Collection[int]]) -> Tensor:
    """Logits (B, V) with each row's repetition penalty on the tokens it has `seen`, and its bias; float32 where any is.

    `seen` names a token once.
    """
    penalised = [
        (row, token, sampling.repetition_penalty)
        for row, (sampling, tokens) in enumerate(zip(samplings, seen, strict=True))
        if sampling.repetition_penalty != 1
        for token in tokens
    ]
    biased = [(row, *each) for row, sampling in enumerate(samplings) for each in sampling.logit_bias.items()]
    if penalised:
        rows, tokens, penalty = _columns(penalised, logits.device)
        old = logits.float()[rows, tokens]
        logits = logits.float().index_put((rows, tokens), torch.where(old > 0, old / penalty, old * penalty))
    if biased:
        rows, tokens, bias = _columns(biased, logits.device)
        logits = logits.float().index_put((rows, tokens), bias, accumulate=True)
    return logits


def _columns(places: Sequence[tuple[int, int, float]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and tokens, int64, and a number for each, float32."""
    types = (torch.int64, torch.int64, torch.float32)
    rows, tokens, numbers = (
        torch.tensor(x, dtype=t, device=device) for x, t in zip(zip(*places, strict=True), types, strict=True)
    )
    return rows, tokens, numbers


def likeliest(logits: Tensor, samplings: Sequence[Sampling]) -> list[tuple[tuple[int, float], ...]]:
    """Each row's likeliest tokens with their log-probabilities under `sample`'s softmax, as many as it asks for."""
    found: list[tuple[tuple[int, float], ...]] = [()] * len(samplings)
    asking = [row for row, sampling in enumerate(samplings) if sampling.top_logprobs]
    if asking:
        temperature = torch.tensor([[samplings[row].temperature or 1.0] for row in asking], device=logits.device)
        logprobs = (logits[asking].float() / temperature).log_softmax(-1)
        most = min(max(samplings[row].top_logprobs for row in asking), logits.shape[-1])
        values, ids = (x.tolist() for x in logprobs.topk(most))
        for row, *likely in zip(asking, ids, values, strict=True):
            found[row] = tuple(zip(*likely, strict=True))[: samplings[row].top_logprobs]
    return found


def sample(logits: Tensor, uniform: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Draw a token for each row: (B,) int64, and its log-probability, (B,) float32.

    logits (B, V), uniform (B,) in [0, 1).
    The log-probability is under softmax(logits / temperature), also where the draw was cut: it is what a trainer scores
    the token with. A greedy token's is at temperature 1.
    """
    if kernels.runs(logits):
        return kernel.sample(logits, uniform, settings._asdict())
    temperature, greedy, cuts = settings.temperature, settings.greedy, settings.cuts
    probs = (logits.float() / temperature.masked_fill(greedy, 1.0)[:, None]).softmax(-1)  # (B, V)
    if bool(cuts.all()):
        tokens = _cut(probs, uniform, settings)
    else:
        tokens = probs.argmax(-1) if bool(greedy.all()) else _draw(probs, uniform)
        if bool(cuts.any()):
            tokens[cuts] = _cut(probs[cuts], uniform[cuts], settings.rows(cuts))
        if bool(greedy.any()):
            tokens = torch.where(greedy, probs.argmax(-1), tokens)
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1).log()


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The index where each row's cumulative weight passes `uniform` of its total, (B,); never one of weight 0."""
    cumulative = weights.cumsum(-1)
    # At most 1 - 2^-24, a uniform number keeps its share of the total below the total, rounded as it may be.
    target = uniform[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return index.clamp_max(weights.shape[-1] - 1)  # what is not a number passes every index


def _cut(probs: Tensor, uniform: Tensor, settings: Settings) -> Tensor:
    """Draw from what the cuts leave of each row, (B,). Tokens come in order of probability, equal ones by their index.

    What is left is first sought among few candidates; rows it outgrows go on to more, so that a peaked distribution
    never sorts the vocabulary. A row's path depends on that row alone.
    """
    vocab = probs.shape[-1]
    tokens = torch.empty(len(probs), dtype=torch.int64, device=probs.device)
    rows = torch.arange(len(probs), device=probs.device)
    top_k = torch.where(settings.top_k > 0, settings.top_k.clamp(max=vocab), vocab)  # (B,)
    for width in (*(w for w in FIRST_WIDTHS if w < vocab), vocab):
        values, ids = _likeliest(probs if len(rows) == len(probs) else probs[rows], width)  # (B, W)
        last = values[:, -1]
        k, top_p, min_p = top_k[rows], settings.top_p[rows], settings.min_p[rows]
        rank = torch.arange(width, device=probs.device)
        values = values.masked_fill(rank >= k[:, None], 0.0)
        mass = values.cumsum(-1)
        # Of the top k; without them of all, which is 1.
        whole = torch.where(k < vocab, mass[:, -1], 1.0)
        beyond = (mass - values >= (top_p * whole)[:, None]) & (top_p < 1)[:, None] & (rank > 0)
        values = values.masked_fill(beyond | (values < min_p[:, None] * values[:, :1]), 0.0)
        tokens[rows] = ids.gather(1, _draw(values, uniform[rows])[:, None]).squeeze(1)
        # What is left may go on past the last candidate, or may end among its equals, of which not all are here.
        unsure = (values.masked_fill(values == 0, torch.inf).amin(-1) == last) | ((k < vocab) & (k > width))
        rows = rows[unsure]
        if not len(rows):
            break
    return tokens


def _likeliest(probs: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The largest probabilities of each row and their tokens, (B, W), descending, equal ones by token."""
    if width == probs.shape[-1]:
        values, ids = probs.sort(dim=-1, descending=True, stable=True)
        return values, ids
    ids = probs.topk(width).indices.sort(-1).values
    values, order = probs.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)

"""Continuous batching: a fixed number of slots, each holding one sequence until it ends, refilled from a queue.

1. `prefill` runs some prompts, padded on the right, once each, however many samples are wanted of it.
2. `Batch.admit` copies a prompt's keys, values and next-token logits into a free slot.
3. `Batch.step` draws a token for every slot, takes out the sequences that ended, and runs one forward pass over all
   slots, each at its own position.

Tokens and log-probabilities stay in tensors until their sequence ends, so that a step's Python does not grow with the
number of slots.

Shapes: B slots, M new tokens at most, V vocabulary, R prompts of at most T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from puna.generate.kv_cache import KVCache, PromptCache
from puna.generate.sampling import Sampling, sample, uniforms
from puna.model.transformer import Transformer


class Ticket(NamedTuple):
    """One sequence to generate: which sample of which request, how long it may get and how hot."""

    request: int
    sample: int
    max_new_tokens: int
    temperature: float


class Generated(NamedTuple):
    """A sequence that ended: by a stop token, its last, when `finished`; else by running out of room."""

    ticket: Ticket
    tokens: list[int]
    logprobs: list[float]
    finished: bool


class Prefilled(NamedTuple):
    """Prompts after their first pass, ready to be copied into slots."""

    lengths: list[int]
    keys: Tensor  # (L, R, K, T, E)
    values: Tensor  # (L, R, K, T, E)
    logits: Tensor  # (R, V) of the token after each prompt


def prefill(model: Transformer, prompts: Sequence[Sequence[int]]) -> Prefilled:
    """Run prompts of any lengths together. Padded on the right, so that causal attention never sees a pad."""
    device = model.tok_embeddings.weight.device
    lengths = [len(prompt) for prompt in prompts]
    tokens = np.zeros((len(prompts), max(lengths)), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    cache = PromptCache()
    positions = torch.arange(max(lengths), device=device).expand(tokens.shape)
    hidden = model.hidden(torch.from_numpy(tokens).to(device), positions=positions, cache=cache)  # (R, T, D)
    last = hidden[torch.arange(len(prompts), device=device), torch.tensor(lengths, device=device) - 1]
    return Prefilled(lengths, *cache.stacked(), model.output(last))


class Batch:
    """The slots of a running generation, with their cache."""

    def __init__(self, model: Transformer, slots: int, max_new_tokens: int, stop: Tensor, sampling: Sampling) -> None:
        weight = model.tok_embeddings.weight
        self._model, self._stop, self._sampling, self._device = model, stop, sampling, weight.device
        self._cache = KVCache(model.config, slots, weight.dtype, weight.device)
        self._tickets: list[Ticket | None] = [None] * slots
        self._lengths = np.zeros(slots, dtype=np.int64)  # tokens cached: where the next one goes
        self._counts = np.zeros(slots, dtype=np.int64)  # tokens drawn
        self._limits = np.zeros(slots, dtype=np.int64)  # of tokens drawn; 0 in a free slot
        shape = (slots, max_new_tokens)
        self._logits = torch.zeros(slots, model.config.vocab_size, dtype=weight.dtype, device=self._device)  # (B, V)
        self._temperature = torch.zeros(slots, device=self._device)  # (B,)
        self._uniforms = torch.zeros(shape, device=self._device)  # (B, M)
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=self._device)  # (B, M)
        self._logprobs = torch.zeros(shape, device=self._device)  # (B, M)

    @property
    def live(self) -> int:
        """How many slots hold a sequence."""
        return int(np.count_nonzero(self._limits))

    @property
    def free(self) -> int:
        return len(self._limits) - self.live

    def admit(self, prompts: Prefilled, wanted: Sequence[tuple[int, Ticket]]) -> None:
        """Begin sequences in free slots; each is a row of `prompts` and its ticket."""
        slots = np.flatnonzero(self._limits == 0)[: len(wanted)]
        to = torch.from_numpy(slots).to(self._device)
        source = torch.tensor([row for row, _ in wanted], device=self._device)
        self._cache.fill(to, prompts.keys[:, source], prompts.values[:, source])
        self._logits[to] = prompts.logits[source]
        self._temperature[to] = torch.tensor([ticket.temperature for _, ticket in wanted], device=self._device)
        for slot, (row, ticket) in zip(slots, wanted, strict=True):
            self._tickets[slot] = ticket
            self._lengths[slot], self._counts[slot] = prompts.lengths[row], 0
            self._limits[slot] = ticket.max_new_tokens
            drawn = uniforms(self._sampling.seed, ticket.request, ticket.sample, ticket.max_new_tokens)
            self._uniforms[slot, : len(drawn)] = drawn

    def step(self) -> list[Generated]:
        """Draw one token for every live slot; return the sequences that ended with it, whose slots are free again."""
        rows = torch.arange(len(self._limits), device=self._device)
        column = torch.from_numpy(self._counts.clip(max=self._tokens.shape[1] - 1)).to(self._device)
        tokens, logprobs = sample(self._logits, self._temperature, self._uniforms[rows, column], self._sampling)
        self._tokens[rows, column] = tokens
        self._logprobs[rows, column] = logprobs
        live = self._limits > 0
        self._counts[live] += 1
        stopped = torch.isin(tokens, self._stop).cpu().numpy()
        ended = np.flatnonzero(live & (stopped | (self._counts == self._limits)))
        generated = [self._take(int(slot), bool(stopped[slot])) for slot in ended]
        if self.live:
            self._forward(tokens)
        return generated

    def drawn(self, slot: int) -> list[int]:
        """The tokens drawn so far for the sequence in a slot."""
        return self._tokens[slot, : self._counts[slot]].tolist()

    def shrink(self) -> None:
        """Give up free slots once they are half of all: nothing waits for them any more."""
        if 0 < self.live <= len(self._limits) // 2:
            kept = np.flatnonzero(self._limits)
            rows = torch.from_numpy(kept).to(self._device)
            self._cache.keep(rows)
            self._tickets = [self._tickets[slot] for slot in kept]
            self._lengths, self._counts, self._limits = self._lengths[kept], self._counts[kept], self._limits[kept]
            self._logits, self._temperature = self._logits[rows], self._temperature[rows]
            self._uniforms, self._tokens, self._logprobs = (
                x[rows] for x in (self._uniforms, self._tokens, self._logprobs)
            )

    def _forward(self, tokens: Tensor) -> None:
        """Run the drawn tokens (B,) at their positions; leaves the next ones' logits."""
        positions = torch.from_numpy(self._lengths.copy()).to(self._device)
        mask = self._cache.seek(positions, int(self._lengths.max()) + 1)
        logits = self._model(tokens[:, None], positions=positions[:, None], mask=mask, cache=self._cache)
        self._logits = logits[:, 0]
        self._lengths[self._limits > 0] += 1

    def _take(self, slot: int, finished: bool) -> Generated:
        """Take the ended sequence out of a slot."""
        ticket, count = self._tickets[slot], self._counts[slot]
        assert ticket is not None, f"slot {slot} is empty"
        logprobs = self._logprobs[slot, :count].tolist()
        assert all(map(math.isfinite, logprobs)), f"request {ticket.request}: the model's logits are not finite"
        generated = Generated(ticket, self._tokens[slot, :count].tolist(), logprobs, finished)
        self._tickets[slot], self._lengths[slot], self._counts[slot], self._limits[slot] = None, 0, 0, 0
        return generated

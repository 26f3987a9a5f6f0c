"""Continuous batching: sequences come and go between two steps, and share what their prompts have in common.

Each step
1. admits: runs the prompts of waiting requests, a pass of at most PREFILL_TOKENS at a time, and puts their samples
   into free slots;
2. draws a token for every sequence, and takes out those that ended with it;
3. runs the drawn tokens, each at its own position.

When the cache is full, the sequence that came last gives its blocks back and waits; what it had is run again later.

Shapes: B running sequences, V vocabulary, R prompts of a pass, T their tokens.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from puna.config import ConfigError
from puna.generate.kv_cache import BLOCK, BlockCache, DecodePass, Full, PromptPass, blocks_of
from puna.generate.sampling import Settings, adjust, likeliest, sample, uniforms
from puna.generate.sequence import Answer, Request, TextStream, Token, room
from puna.model.transformer import ModelConfig, Transformer

PREFILL_TOKENS = 2048
"""Tokens, padding included, of one prefill pass: enough to fill the cores, little enough to wait for."""

PAST_TOKENS = 16384
"""Cached tokens, padding included, that the prompts of one prefill pass may attend to: the pass copies them."""

Watch = Callable[[Answer, Token, str], None]
"""Told of a drawn token: its answer, the token, and the text that it makes certain."""


def shape(model: Transformer) -> ModelConfig:
    """A model's config without what pretraining alone reads, and no folder keeps."""
    return replace(model.config, moe=replace(model.config.moe, capacity_factor=0.0, balance=0.0))


def tokens_of(config: ModelConfig, sequences: int) -> int:
    """Tokens of a cache that so many sequences cannot fill: for each, the model's context, and two blocks more for a
    prompt's last block and its copy.
    """
    return sequences * BLOCK * (blocks_of(config.max_seq_len) + 2)


@dataclass(eq=False)
class _Waiting:
    """Samples of one prompt that wait for a slot. After a preemption the prompt goes on with what was drawn."""

    request: Request
    tokens: list[int]
    answers: deque[Answer]
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    logits: Tensor | None = None  # (V,) of the token after the prompt, once it is run


@dataclass(eq=False)
class _Running:
    """A sequence in a slot, its blocks and the numbers of its draws."""

    answer: Answer
    blocks: list[int]
    length: int  # tokens cached: where the next one goes
    uniform: Sequence[float]
    seen: set[int]  # tokens of the prompt and the answer, where there is a penalty on them


class Scheduler:
    """Runs requests on one model. `watch` is told of every token drawn.

    `serving` is for requests that keep coming: no more than one prefill pass comes between two tokens of a running
    sequence, and answers are kept like prompts, for dialogs that go on. Without `share_prompts` nothing is kept for
    another request, which then runs its whole prompt: to measure what sharing gives.
    Raises ConfigError where the cache cannot hold one sequence as long as the model's context.
    """

    def __init__(
        self,
        model: Transformer,
        decode: Callable[[Sequence[int]], str],
        eos_id: int,
        *,
        max_batch_size: int,
        cache_tokens: int | None = None,
        watch: Watch | None = None,
        serving: bool = False,
        share_prompts: bool = True,
    ) -> None:
        self.max_batch_size = max_batch_size
        self._decode, self._eos_id, self._watch = decode, eos_id, watch
        self._serving, self._shares = serving, share_prompts
        if max_batch_size < 1:
            raise ConfigError(f"max_batch_size is {max_batch_size}: it must be at least 1")
        least = tokens_of(model.config, 1)
        if cache_tokens is None:
            cache_tokens = tokens_of(model.config, max_batch_size)
        if cache_tokens < least:
            raise ConfigError(
                f"a cache of {cache_tokens} tokens is too small for the model's context of "
                f"{model.config.max_seq_len}: give it at least {least}"
            )
        self._waiting: deque[_Waiting] = deque()
        self._running: list[_Running] = []
        self._use(model, cache_tokens // BLOCK)

    def _use(self, model: Transformer, capacity: int) -> None:
        """This model from now on, with a cache that knows nothing and nobody in a slot."""
        weight = model.tok_embeddings.weight
        self.model = model
        self._device = weight.device
        self.cache = BlockCache(model.config, capacity, weight.dtype, weight.device)
        self._logits = torch.empty(0, model.config.vocab_size, dtype=weight.dtype, device=weight.device)  # (B, V)
        self._settings = Settings.of([], weight.device)
        self._tokens = torch.empty(0, dtype=torch.int64, device=weight.device)  # (B,) the last drawn

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._waiting or self._running)

    @property
    def running(self) -> int:
        """How many sequences are being generated."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many wait for a slot."""
        return sum(len(group.answers) for group in self._waiting)

    def check(self, request: Request, name: str) -> int:
        """How many tokens an answer can have. Raises ConfigError where the request, called `name`, cannot be served."""
        left, vocab = room(request.prompt, self.model.config.max_seq_len, name), self.model.config.vocab_size
        if request.n < 1:
            raise ConfigError(f"n is {request.n}: it must be at least 1")
        for ids, where in ((request.prompt, name), (request.sampling.logit_bias, "logit_bias")):
            if not (min(ids, default=0) >= 0 and max(ids, default=0) < vocab):
                raise ConfigError(f"{where} has a token that is not among the model's {vocab}")
        return min(left, request.sampling.max_new_tokens)

    def submit(self, request: Request) -> list[Answer]:
        """Queue a request; its answers fill as steps are made. Raises ConfigError as `check`."""
        limit = self.check(request, f"prompt {request.number}")
        stop = request.sampling.stop
        heard = stop or self._watch
        answers = [
            Answer(request, i, limit, TextStream(self._decode, stop) if heard else None) for i in range(request.n)
        ]
        self._waiting.append(_Waiting(request, request.prompt, deque(answers)))
        return answers

    def cancel(self, request: Request) -> list[tuple[Answer, str]]:
        """Drop what is left of a request and free its blocks; the answers that had not ended, with their last text."""
        dropped = [row for row in self._running if row.answer.request is request]
        groups = [group for group in self._waiting if group.request is request]
        answers = [row.answer for row in dropped] + [answer for group in groups for answer in group.answers]
        for group in groups:
            self._give_back(group)
            self._waiting.remove(group)
        self._remove(dropped)
        pieces = [answer.hear([], last=True) for answer in answers]
        for answer in answers:
            answer.finish = "cancelled"
        return list(zip(answers, pieces, strict=True))

    def update_weights(self, model: Transformer) -> None:
        """Go on with this model, of the same shape: no answer is dropped, but keys and values are the old weights'.

        What was drawn of an answer stays; it is run again, with its prompt, before the next token is drawn.
        """
        assert shape(model) == shape(self.model), f"{model.config} is not {self.model.config}"
        for group in self._waiting:
            self._give_back(group)
        while self._running:
            self._preempt(self._running[-1])
        self._use(model, self.cache.capacity)

    def step(self) -> list[Answer]:
        """Admit, draw one token for every sequence that has a slot, and run it; the answers that ended with it."""
        self._admit()
        ended = self._draw() if self._running else []
        if self._running:
            self._forward()
        return ended

    # 1: admit ---------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Fill the free slots, as far as prompts wait and the cache has room."""
        passes = 0
        while self._waiting and len(self._running) < self.max_batch_size:
            ready = [group for group in self._waiting if group.logits is not None]
            if not ready:
                if self._serving and passes and self._running:
                    return
                passes += 1
                if not self._prefill() and (self._running or not self._reclaim()):
                    return
                continue
            try:
                self._begin(ready)
            except Full:
                if self._running or not self._reclaim():
                    return

    def _reclaim(self, keep: int = 1) -> bool:
        """Take back the blocks of all waiting prompts but the first `keep`; whether there were any."""
        holders = [group for group in self._waiting if group.blocks][keep:]
        for group in holders:
            self._give_back(group)
        return bool(holders)

    def _give_back(self, group: _Waiting) -> None:
        """A waiting prompt begins anew."""
        self.cache.release(group.blocks)
        group.blocks, group.cached, group.logits = [], 0, None

    def _prefill(self) -> bool:
        """Run one pass over the first waiting prompts; False where the cache has no room for any."""
        chunk: list[tuple[_Waiting, int]] = []  # a prompt and how many of its tokens to run
        begun: set[tuple[int, ...]] = set()  # what this pass computes first of each: prompts that begin alike wait
        longest = past = wanted = 0
        for group in self._waiting:
            if self._serving and wanted >= self.max_batch_size - len(self._running):
                break  # a bulk call runs prompts ahead, many at a time
            is_new = not group.blocks
            if is_new:
                group.blocks = self.cache.match(group.tokens)
                group.cached = BLOCK * len(group.blocks)
            n = min(len(group.tokens) - group.cached, PREFILL_TOKENS)
            head = tuple(group.tokens[: group.cached + BLOCK])
            waits = len(head) == group.cached + BLOCK and head in begun
            if waits or not self._fits(group, n, len(chunk) + 1, max(longest, n), max(past, group.cached)):
                if is_new:
                    self._give_back(group)
                if waits:
                    continue
                break
            self._extend(group.blocks, group.cached + n)
            if self._shares:
                begun.add(head)
            chunk.append((group, n))
            longest, past, wanted = max(longest, n), max(past, group.cached), wanted + len(group.answers)
        if chunk:
            self._run_prompts(chunk)
        return bool(chunk)

    def _fits(self, group: _Waiting, n: int, rows: int, longest: int, past: int) -> bool:
        """Whether a pass may run n tokens of a prompt as the last of so many rows, and the cache has room for them."""
        if rows > 1 and (rows * longest > PREFILL_TOKENS or rows * past > PAST_TOKENS):
            return False
        spare = len(self._running)  # running sequences will want blocks as well
        return blocks_of(group.cached + n) - len(group.blocks) <= self.cache.room - spare

    def _extend(self, blocks: list[int], tokens: int) -> bool:
        """Take blocks until they hold so many tokens; False, and none taken, where the cache is too full."""
        missing = blocks_of(tokens) - len(blocks)
        if missing > self.cache.room:
            return False
        blocks += [self.cache.take() for _ in range(missing)]
        return True

    def _run_prompts(self, chunk: Sequence[tuple[_Waiting, int]]) -> None:
        """One forward pass over the next tokens of prompts."""
        starts, lengths = [group.cached for group, _ in chunk], [n for _, n in chunk]
        tokens = np.zeros((len(chunk), max(lengths)), np.int64)
        for row, (group, n) in enumerate(chunk):
            tokens[row, :n] = group.tokens[group.cached : group.cached + n]
        positions = torch.arange(max(lengths), device=self._device) + torch.tensor(starts, device=self._device)[:, None]
        positions.clamp_(max=self.model.config.max_seq_len - 1)  # of pads
        cache = PromptPass(self.cache, [group.blocks for group, _ in chunk], starts, lengths)
        hidden = self.model.hidden(torch.from_numpy(tokens).to(self._device), positions=positions, cache=cache)
        ends = torch.tensor(lengths, device=self._device) - 1
        logits = self.model.output(hidden[torch.arange(len(chunk), device=self._device), ends])  # (R, V)
        for row, (group, n) in enumerate(chunk):
            group.cached += n
            if group.cached == len(group.tokens):
                group.logits = logits[row]
                if self._shares:
                    self.cache.remember(group.tokens, group.blocks)

    def _begin(self, ready: Iterable[_Waiting]) -> None:
        """Put samples of computed prompts into free slots. Raises Full where a block for one cannot be had.

        A prompt's last block is filled further by the sample that comes last; the others go on in a copy.
        """
        rows: list[_Running] = []
        logits: list[Tensor] = []
        copies: list[tuple[int, int]] = []
        try:
            for group in ready:
                full = len(group.tokens) // BLOCK
                while group.answers and len(self._running) + len(rows) < self.max_batch_size:
                    blocks = group.blocks
                    if len(group.answers) > 1:
                        blocks = group.blocks[:full]
                        if full < len(group.blocks):
                            blocks.append(self.cache.take())
                            copies.append((group.blocks[-1], blocks[-1]))
                        self.cache.hold(group.blocks[:full])
                    answer = group.answers.popleft()
                    request = answer.request
                    uniform = uniforms(request.sampling.seed, request.place, answer.sample, answer.limit).tolist()
                    seen = set(group.tokens) if request.sampling.repetition_penalty != 1 else set()
                    rows.append(_Running(answer, blocks, len(group.tokens), uniform, seen))
                    assert group.logits is not None
                    logits.append(group.logits)
                if not group.answers:
                    self._waiting.remove(group)
        finally:
            if copies:
                self.cache.copy(copies)
            if rows:
                self._running += rows
                self._logits = torch.cat((self._logits, torch.stack(logits)))
                new = Settings.of([row.answer.request.sampling for row in rows], self._device)
                self._settings = Settings(*map(torch.cat, zip(self._settings, new, strict=True)))

    # 2: draw ----------------------------------------------------------------------------------------------------------

    def _draw(self) -> list[Answer]:
        """One token for every sequence; those that ended leave their slots."""
        samplings = [row.answer.request.sampling for row in self._running]
        logits = adjust(self._logits, samplings, [row.seen for row in self._running])
        likely = likeliest(logits, samplings) if self._watch else []
        uniform = torch.tensor([row.uniform[len(row.answer.tokens)] for row in self._running], device=self._device)
        self._tokens, logprobs = sample(logits, uniform, self._settings)
        drawn = zip(self._running, self._tokens.tolist(), logprobs.tolist(), strict=True)
        for i, (row, token, logprob) in enumerate(drawn):
            row.seen.add(token)
            piece = self._take(row.answer, token, logprob)
            if self._watch:
                self._watch(row.answer, Token(token, logprob, likely[i]), piece)
        ended = [row for row in self._running if row.answer.finish]
        if self._serving and self._shares:
            for row in (row for row in ended if row.answer.finish != "error"):
                self.cache.remember((row.answer.request.prompt + row.answer.tokens)[: row.length], row.blocks)
        self._remove(ended)
        return [row.answer for row in ended]

    def _take(self, answer: Answer, token: int, logprob: float) -> str:
        """Add a drawn token to its answer, which may end with it; the text that is now certain."""
        if not math.isfinite(logprob):
            answer.finish = "error"
            return answer.hear([], last=True)
        answer.tokens.append(token)
        answer.logprobs.append(logprob)
        if token == self._eos_id or token in answer.request.sampling.stop_ids:
            answer.finish = "stop"
            return answer.hear([], last=True)
        last = len(answer.tokens) == answer.limit
        piece = answer.hear([token], last=last)
        if last and answer.finish is None:
            answer.finish = "length"
        return piece

    def _remove(self, rows: Sequence[_Running]) -> None:
        """Free the slots and blocks of these."""
        if not rows:
            return
        for row in rows:
            if row.answer.finish == "error":
                self.cache.blank(row.blocks)
            self.cache.release(row.blocks)
        gone = set(map(id, rows))
        kept = [i for i, row in enumerate(self._running) if id(row) not in gone]
        self._running = [self._running[i] for i in kept]
        index = torch.tensor(kept, dtype=torch.int64, device=self._device)
        self._logits = self._logits[index]
        self._tokens = self._tokens[index]
        self._settings = self._settings.rows(index)

    # 3: run -----------------------------------------------------------------------------------------------------------

    def _forward(self) -> None:
        """Run the drawn tokens; leaves the next ones' logits."""
        while not all(self._extend(row.blocks, row.length + 1) for row in self._running):
            if not self._reclaim(keep=int(len(self._running) > 1)):
                self._preempt(self._running[-1])
        for row in self._running:
            row.length += 1
        lengths = np.array([row.length for row in self._running])
        cache = DecodePass(self.cache, [row.blocks for row in self._running], lengths)
        positions = torch.from_numpy(lengths - 1).to(self._device)
        self._logits = self.model(self._tokens[:, None], positions=positions[:, None], cache=cache)[:, 0]

    def _preempt(self, row: _Running) -> None:
        """Take a sequence out of its slot; it waits first in line, with what it has drawn as part of its prompt."""
        answer = row.answer
        self._remove([row])
        self._waiting.appendleft(_Waiting(answer.request, answer.request.prompt + answer.tokens, deque([answer])))

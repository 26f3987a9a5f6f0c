"""The in-process engine: continuous batching on one CPU or GPU, behind the calls of `types.Engine`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from puna import parallel
from puna.config import ConfigError
from puna.formats import huggingface
from puna.generate.sampling import Sampling
from puna.generate.scheduler import Batch, Generated, Prefilled, Ticket, prefill
from puna.model.transformer import Transformer
from puna.text import chat
from puna.text import tokenizer as tokenizers
from puna.text.tokenizer import Tokenizer
from puna.types import Completion, Dialog

PREFILL_TOKENS = 2048
"""Tokens, padding included, of one prefill pass: enough to fill the cores, little enough to stage."""

BULK_BATCH_SIZE = 128
"""Measured on two cores with a 3-million-parameter model: 64 is a fifth slower, 256 no faster."""

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are not (yet) UTF-8."""


def open_engine(folder: Path, device: torch.device) -> LocalEngine:
    """An engine on a model folder for bulk sampling: bfloat16 where the machine computes in it, a wide batch."""
    model = huggingface.load_model(folder, dtype=parallel.dtype("bf16", device)).to(device)
    return LocalEngine(model, tokenizers.load(folder), max_batch_size=BULK_BATCH_SIZE)


class LocalEngine:
    """Generates with a model in this process, `max_batch_size` sequences at a time.

    A sequence's draws depend on (seed, its request's place in the list, its sample number) alone; with equal logits
    that makes its tokens independent of the batch. (Matrix products of another size may round logits differently.)
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, max_batch_size: int = 64) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.model.config.max_seq_len

    def update_weights(self, model: nn.Module) -> None:
        """From now on generate with this model, which is used as it is: later changes to it are seen at once."""
        assert isinstance(model, Transformer), f"not a Transformer: {type(model).__name__}"
        self.model = model

    def generate(
        self,
        dialogs: Sequence[Dialog],
        *,
        n: int = 1,
        max_new_tokens: int = 256,
        temperature: float | Sequence[float] = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[list[Completion]]:
        """n answers for each dialog, in order; `temperature` may be one value a dialog. Text has no outer spaces.

        Raises DataError for a dialog the chat format refuses, ConfigError as `generate_ids`.
        """
        prompts = [chat.encode_prompt(dialog, self.tokenizer) for dialog in dialogs]
        answers = self.generate_ids(
            prompts, n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
        )
        return [[Completion(a.text.strip(), a.tokens, a.logprobs, a.finished) for a in row] for row in answers]

    @torch.inference_mode()
    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = 1,
        max_new_tokens: int = 256,
        temperature: float | Sequence[float] = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
    ) -> list[list[Completion]]:
        """n continuations of each prompt of token ids, in order, up to EOS, one of `stop_ids`, or the room there is.

        1. Take the longest prompts first: neighbours are padded little, and the cache reaches its size early.
        2. Prefill a few prompts at a time, each once for all of its samples.
        3. Fill every free slot, step all of them, and collect what ended, until nothing waits or lives.

        Raises ConfigError where a prompt leaves no room in the model's context, or a setting is out of range.
        """
        tickets = self._tickets(prompts, n, max_new_tokens, temperature)
        queue = deque(sorted(range(len(prompts)), key=lambda request: -len(prompts[request])))
        waiting: deque[tuple[int, Ticket]] = deque()  # a row of `staged` and who wants it
        staged: Prefilled | None = None
        slots = min(self.max_batch_size, n * len(prompts))
        batch = self._batch(slots, max_new_tokens, Sampling(top_p, top_k, seed), stop_ids)
        results: list[list[Completion | None]] = [[None] * n for _ in prompts]
        while queue or waiting or batch.live:
            while batch.free and (waiting or queue):
                if not waiting:
                    chunk = _next_chunk(queue, prompts)
                    staged = prefill(self.model, [prompts[request] for request in chunk])
                    waiting.extend((row, ticket) for row, request in enumerate(chunk) for ticket in tickets[request])
                assert staged is not None
                batch.admit(staged, [waiting.popleft() for _ in range(min(batch.free, len(waiting)))])
            for generated in batch.step():
                results[generated.ticket.request][generated.ticket.sample] = self._completion(generated)
            if not (queue or waiting):
                batch.shrink()
        return [[answer for answer in row if answer is not None] for row in results]

    @torch.inference_mode()
    def stream(
        self,
        dialog: Dialog,
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> Iterator[str]:
        """The text `generate` gives for this dialog alone, in pieces as they come; closing the iterator stops it.

        Bytes that are not yet a whole character, and spaces that may turn out to be the last, are held back.
        """
        prompt = chat.encode_prompt(dialog, self.tokenizer)
        [[ticket]] = self._tickets([prompt], 1, max_new_tokens, temperature)
        batch = self._batch(1, max_new_tokens, Sampling(top_p, top_k, seed), ())
        batch.admit(prefill(self.model, [prompt]), [(0, ticket)])
        sent = 0
        while batch.live:
            ended = batch.step()
            tokens = ended[0].tokens if ended else batch.drawn(0)
            text = self.tokenizer.decode(tokens).lstrip()
            ready = text.rstrip() if ended else text.rstrip(REPLACEMENT).rstrip()
            if len(ready) > sent:
                yield ready[sent:]
                sent = len(ready)

    def _tickets(
        self, prompts: Sequence[Sequence[int]], n: int, max_new_tokens: int, temperature: float | Sequence[float]
    ) -> list[list[Ticket]]:
        """n tickets for each prompt; ConfigError where one cannot be served."""
        heat = [temperature] * len(prompts) if isinstance(temperature, int | float) else list(temperature)
        if len(heat) != len(prompts):
            raise ConfigError(f"{len(heat)} temperatures for {len(prompts)} prompts: give one, or one for each")
        if n < 1 or max_new_tokens < 1:
            raise ConfigError(f"n is {n} and max_new_tokens {max_new_tokens}: both must be at least 1")
        if any(not t >= 0 for t in heat):
            raise ConfigError(f"temperature is {min(heat)}: it must be 0 (greedy) or above")
        context = self.model.config.max_seq_len
        tickets = []
        for request, prompt in enumerate(prompts):
            room = context - len(prompt)
            if not prompt or room < 1:
                raise ConfigError(
                    f"prompt {request} has {len(prompt)} tokens and the model's context {context}: "
                    "a prompt needs at least one token and must leave room for an answer"
                )
            tickets.append([Ticket(request, s, min(room, max_new_tokens), float(heat[request])) for s in range(n)])
        return tickets

    def _batch(self, slots: int, max_new_tokens: int, sampling: Sampling, stop_ids: Sequence[int]) -> Batch:
        stop: Tensor = torch.tensor([self.tokenizer.eos_id, *stop_ids], device=self.model.tok_embeddings.weight.device)
        return Batch(self.model, slots, max_new_tokens, stop, sampling)

    def _completion(self, generated: Generated) -> Completion:
        _, tokens, logprobs, finished = generated
        text = self.tokenizer.decode(tokens[:-1] if finished else tokens)
        return Completion(text, tokens, logprobs, finished)


def _next_chunk(queue: deque[int], prompts: Sequence[Sequence[int]]) -> list[int]:
    """Take from the queue, longest first, the requests of one prefill pass."""
    rows = max(1, PREFILL_TOKENS // len(prompts[queue[0]]))
    return [queue.popleft() for _ in range(min(rows, len(queue)))]

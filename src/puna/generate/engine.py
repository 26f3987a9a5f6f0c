"""The in-process engine: continuous batching on one CPU or GPU, behind the calls of `types.Engine`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Unpack

import torch
from torch import nn

from puna import parallel
from puna.formats import huggingface
from puna.generate.sampling import Sampling, one_each
from puna.generate.scheduler import Scheduler, Watch, tokens_of
from puna.generate.sequence import Answer, Request
from puna.generate.vllm import VLLMEngine
from puna.generate.weights import pack, whole
from puna.model.sizes import cache_bytes
from puna.model.transformer import Transformer
from puna.text import chat
from puna.text import tokenizer as tokenizers
from puna.text.tokenizer import Tokenizer
from puna.types import Completion, Dialog, Engine, SamplingSettings

BULK_BATCH_SIZE = 128
"""Measured on two cores with a 3-million-parameter model: 64 is a fifth slower, 256 no faster."""

CACHE_SHARE = 0.5
"""Of the memory of a model's device, what a call's keys and values may take: ours, for policy, critic and reward models
need the rest."""


def open_engine(folder: Path, device: torch.device, server: str = "") -> Engine:
    """An engine on a model folder for bulk sampling: bfloat16 where the machine computes in it, a wide batch.

    With the address of a vLLM `server` it is that one, which is told to load the folder (puna.generate.vllm).
    """
    if server:
        engine = VLLMEngine(server, tokenizers.load(folder))
        engine.load(folder)
        return engine
    dtype = parallel.dtype("bf16", device)
    model = pack(huggingface.load_model(folder, dtype=dtype).to(device), "bf16" if dtype == torch.bfloat16 else "fp32")
    return LocalEngine(model, huggingface.load_tokenizer(folder), max_batch_size=BULK_BATCH_SIZE)


class _Stream(NamedTuple):
    """What streams answers, and the pieces of them that nobody has taken yet."""

    scheduler: Scheduler
    heard: list[str]


class LocalEngine:
    """Generates with a model in this process, `max_batch_size` sequences at a time.

    A sequence's draws depend on (seed, its request's place in the list, its sample number) alone; with equal logits
    that makes its tokens independent of the batch. (Matrix products of another size may round logits differently.)
    `share_prompts` is as Scheduler has it.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, max_batch_size: int = 64, share_prompts: bool = True
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size
        self.share_prompts = share_prompts
        self._kept: _Stream | None = None

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.model.config.max_seq_len

    def update_weights(self, model: nn.Module) -> None:
        """From now on generate with this model, which is used as it is: later changes to it are seen at once.

        Of a model that is sharded (FSDP2) a whole copy is made; all ranks call this.
        """
        assert isinstance(model, Transformer), f"not a Transformer: {type(model).__name__}"
        self.model, self._kept = whole(model), None

    def generate(
        self,
        dialogs: Sequence[Dialog],
        *,
        n: int = 1,
        temperature: float | Sequence[float] = 1.0,
        **settings: Unpack[SamplingSettings],
    ) -> list[list[Completion]]:
        """n answers for each dialog, in order; `temperature` may be one value a dialog. Text has no outer spaces.

        Raises DataError for a dialog the chat format refuses, ConfigError as `generate_ids`.
        """
        prompts = [chat.encode_prompt(dialog, self.tokenizer) for dialog in dialogs]
        answers = self.generate_ids(prompts, n=n, temperature=temperature, **settings)
        return [[Completion(a.text.strip(), a.tokens, a.logprobs, a.finished) for a in row] for row in answers]

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = 1,
        temperature: float | Sequence[float] = 1.0,
        first: int = 0,
        **settings: Unpack[SamplingSettings],
    ) -> list[list[Completion]]:
        """n continuations of each prompt of token ids, in order, up to EOS, a stop id or text, or the room there is.

        `first` is the place of the first prompt, where the list is part of a longer one.
        Raises ConfigError where a prompt leaves no room in the model's context, or a setting is out of range.
        """
        return self.complete(prompts, one_each(temperature, len(prompts), **settings), n=n, first=first)

    @torch.inference_mode()
    def complete(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], *, n: int = 1, first: int = 0
    ) -> list[list[Completion]]:
        """n continuations of each prompt, drawn by its own settings; errors as `generate_ids`.

        Longest prompts come first: neighbours are padded little, and the cache reaches its size early.
        """
        scheduler = self._scheduler()
        answers: list[list[Answer]] = [[] for _ in prompts]
        for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
            answers[i] = scheduler.submit(Request(i, list(prompts[i]), samplings[i], n, place=first + i))
        while scheduler.busy:
            scheduler.step()
        return [[self._completion(answer) for answer in row] for row in answers]

    @torch.inference_mode()
    def stream(
        self,
        dialog: Dialog,
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        goes_on: bool = False,
    ) -> Iterator[str]:
        """The text `generate` gives for this dialog alone, in pieces as they come; closing the iterator stops it.

        Bytes that are not yet a whole character, and spaces that may turn out to be the last, are held back. Where the
        dialog `goes_on`, the next such call finds what this one has cached; the weights must then stay as they are.
        """
        prompt = chat.encode_prompt(dialog, self.tokenizer)
        sampling = Sampling(temperature, top_p, seed=seed, max_new_tokens=max_new_tokens)
        request = Request(0, prompt, sampling)
        stream = self._kept if goes_on and self._kept and self._kept.scheduler.model is self.model else None
        scheduler, heard = stream = stream or self._streaming(goes_on)
        scheduler.check(request, "the prompt")
        if goes_on:
            self._kept = None  # until this answer has ended, or was stopped between two steps
        [answer] = scheduler.submit(request)
        said, held = False, ""
        try:
            while scheduler.busy:
                scheduler.step()
                assert answer.finish != "error", "the model's logits are not finite"
                held += "".join(heard)
                heard.clear()
                piece = held.rstrip() if said else held.strip()
                if piece:
                    yield piece
                    said, held = True, held[len(held.rstrip()) :]
        except GeneratorExit:
            scheduler.cancel(request)
        if goes_on:
            self._kept = stream

    def _streaming(self, goes_on: bool) -> _Stream:
        heard: list[str] = []
        return _Stream(self._scheduler(lambda answer, token, piece: heard.append(piece), goes_on), heard)

    def _scheduler(self, watch: Watch | None = None, goes_on: bool = False) -> Scheduler:
        """A new one: what an old one has cached may be of weights that have changed since."""
        config, weight = self.model.config, self.model.tok_embeddings.weight
        memory = int(CACHE_SHARE * parallel.memory_of(weight.device))
        fitting = max(tokens_of(config, 1), memory // cache_bytes(config, weight.dtype))
        return Scheduler(
            self.model,
            self.tokenizer.decode,
            self.tokenizer.eos_id,
            max_batch_size=self.max_batch_size,
            cache_tokens=min(tokens_of(config, self.max_batch_size), fitting),
            watch=watch,
            serving=goes_on,
            share_prompts=self.share_prompts,
        )

    def _completion(self, answer: Answer) -> Completion:
        assert answer.finish != "error", f"prompt {answer.request.number}: the model's logits are not finite"
        finished = answer.finish == "stop"
        if answer.stream is not None:
            return Completion(answer.text, answer.tokens, answer.logprobs, finished)
        text = self.tokenizer.decode(answer.tokens[:-1] if finished else answer.tokens)
        return Completion(text, answer.tokens, answer.logprobs, finished)

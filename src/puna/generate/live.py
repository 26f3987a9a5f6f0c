"""The engine as a service: a thread that generates for whoever asks, while others ask.

Requests come and go from any thread; what is drawn is told to each request's callback on the engine's thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from puna.config import ConfigError
from puna.generate.kv_cache import BLOCK
from puna.generate.sampling import Sampling
from puna.generate.scheduler import Scheduler, shape
from puna.generate.sequence import Answer, Finish, Request, Token
from puna.generate.weights import whole
from puna.model.transformer import Transformer
from puna.text.tokenizer import Tokenizer

__all__ = ["Event", "LiveEngine", "Stats", "Token"]


class Event(NamedTuple):
    """What happened to a sample since its last event. `text` holds whole characters, and no stop text."""

    sample: int
    text: str
    tokens: tuple[Token, ...]
    finish: Finish | None


class Stats(NamedTuple):
    """The engine at a moment; `generated_tokens` since it began."""

    waiting: int
    running: int
    cached_tokens: int
    capacity_tokens: int
    generated_tokens: int


@dataclass(eq=False)
class _Client:
    """Who asked, and the samples that have not ended."""

    request: Request
    on_event: Callable[[Event], None]
    open: set[int]


class LiveEngine:
    """Generates with a model in a thread of its own. All methods may be called from any thread."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_batch_size: int = 64,
        cache_tokens: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.context = model.config.max_seq_len
        self._scheduler = Scheduler(
            model,
            tokenizer.decode,
            tokenizer.eos_id,
            max_batch_size=max_batch_size,
            cache_tokens=cache_tokens,
            watch=self._drawn,
            serving=True,
        )
        self._clients: dict[int, _Client] = {}
        self._inbox: list[_Client] = []
        self._cancelled: list[int] = []
        self._new_weights: Transformer | None = None
        self._changed = threading.Condition()
        self._number = self._generated = 0
        self._stats = (0, 0, 0)  # waiting, running, blocks in use, as the last step left them
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="puna-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False once the thread has ended, by `close` or by an error."""
        return self._thread.is_alive()

    def submit(
        self, prompt: Sequence[int], sampling: Sampling, on_event: Callable[[Event], None], *, n: int = 1
    ) -> int:
        """Ask for n answers to a prompt; returns the request's number. Each sample's last event has a `finish`.

        on_event is called on the engine's thread and must return at once; where it raises, its request ends.
        Raises ConfigError where the request cannot be served, RuntimeError where the engine is dead.
        """
        self._scheduler.check(Request(0, list(prompt), sampling, n), "the prompt")
        with self._changed:
            if self._closing or not self.alive:
                raise RuntimeError("the engine has stopped")
            self._number += 1
            request = Request(self._number, list(prompt), sampling, n)
            self._inbox.append(_Client(request, on_event, set(range(n))))
            self._changed.notify()
            return self._number

    def cancel(self, request: int) -> None:
        """End what is left of a request and free its memory; no request of this number is no error."""
        with self._changed:
            self._cancelled.append(request)
            self._changed.notify()

    def update_weights(self, model: nn.Module) -> None:
        """Draw with this model from the next step on; it is used as it is, as `LocalEngine.update_weights` says.

        No request is dropped: an answer under way goes on from what was drawn of it, and what the old weights had
        cached is computed again. What is submitted after this call is the new weights' alone. A model that is trained
        further must not be changed while the engine draws with it. ConfigError where it is of another shape.
        """
        assert isinstance(model, Transformer), f"not a Transformer: {type(model).__name__}"
        ours = self._scheduler.model
        if shape(model) != shape(ours):
            raise ConfigError(f"new weights must be of the engine's shape: {model.config} is not {ours.config}")
        made = whole(model)
        with self._changed:
            self._new_weights = made
            self._changed.notify()

    def stats(self) -> Stats:
        """How full the engine is."""
        with self._changed:
            waiting, running, blocks = self._stats
            waiting += sum(client.request.n for client in self._inbox)
            capacity = self._scheduler.cache.capacity
            return Stats(waiting, running, blocks * BLOCK, capacity * BLOCK, self._generated)

    def close(self) -> None:
        """Cancel all that is left and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        finish: Finish = "error"
        try:
            while self._take_in():
                self._scheduler.step()
            finish = "cancelled"
        finally:
            with self._changed:
                self._closing = True
                left, self._inbox = [*self._clients.values(), *self._inbox], []
                self._clients, self._stats = {}, (0, 0, 0)
            for client in left:
                for sample in sorted(client.open):
                    self._tell(client, Event(sample, "", (), finish))

    def _take_in(self) -> bool:
        """Pass on what was submitted and cancelled, waiting for it where nothing runs; False when closing."""
        with self._changed:
            self._look()
            while not (self._scheduler.busy or self._asked or self._closing):
                self._changed.wait()
            if self._closing:
                return False
            if self._new_weights is not None:
                self._scheduler.update_weights(self._new_weights)
                self._new_weights = None
            new, self._inbox = self._inbox, []
            cancelled, self._cancelled = self._cancelled, []
            for client in new:
                self._clients[client.request.number] = client
                self._scheduler.submit(client.request)
            self._look()
        for number in dict.fromkeys(cancelled):
            self._drop(number)
        return True

    @property
    def _asked(self) -> bool:
        """Whether anything was asked of the engine since it last took it in."""
        return bool(self._inbox or self._cancelled) or self._new_weights is not None

    def _look(self) -> None:
        """Note how full the engine is."""
        self._stats = (self._scheduler.waiting, self._scheduler.running, self._scheduler.cache.in_use)

    def _drop(self, number: int) -> None:
        """End what is left of a request."""
        client = self._clients.get(number)
        if client:
            for answer, piece in self._scheduler.cancel(client.request):
                self._tell(client, Event(answer.sample, piece, (), answer.finish))

    def _drawn(self, answer: Answer, token: Token, piece: str) -> None:
        """The scheduler drew a token."""
        self._generated += 1
        tokens = () if answer.finish == "error" else (token,)
        self._tell(self._clients[answer.request.number], Event(answer.sample, piece, tokens, answer.finish))

    def _tell(self, client: _Client, event: Event) -> None:
        """Hand over an event; a client that cannot take it is dropped, and its error shown."""
        if event.sample not in client.open:
            return
        if event.finish:
            client.open.discard(event.sample)
            if not client.open:
                self._clients.pop(client.request.number, None)
        try:
            client.on_event(event)
        except Exception as error:  # noqa: BLE001  # another's code: it may raise anything, and others wait
            threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, self._thread)))
            with self._changed:
                self._cancelled.append(client.request.number)

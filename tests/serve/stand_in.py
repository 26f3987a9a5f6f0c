"""An engine that says what it is told, at the pace it is told, and a server around it on a real socket."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn

from puna.config import ConfigError
from puna.generate.live import Event, Stats, Token
from puna.generate.sampling import Sampling
from puna.serve.answers import Served
from puna.serve.app import State, make_app
from puna.serve.connections import Connection
from puna.serve.guard import Rules
from tests import helpers


@dataclass
class Script:
    """What a sample says, piece by piece; `fails_after` pieces it ends with an error."""

    pieces: Sequence[str] = ("Llamas ", "are ", "herded ", "by ", "shepherds.")
    delay: float = 0.0
    fails_after: int | None = None


@dataclass
class StandIn:
    """LiveEngine's face: a thread a sample, and a record of what was asked."""

    script: Callable[[Sequence[int], Sampling, int], Script] = lambda prompt, sampling, sample: Script()
    context: int = 256
    alive: bool = True
    asked: list[tuple[list[int], Sampling, int]] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    running: int = 0
    generated: int = 0

    def __post_init__(self) -> None:
        self.tokenizer = helpers.tokenizer()
        self._numbers = itertools.count()
        self._stops: dict[int, threading.Event] = {}

    def submit(
        self, prompt: Sequence[int], sampling: Sampling, on_event: Callable[[Event], None], *, n: int = 1
    ) -> int:
        if len(prompt) >= self.context:
            raise ConfigError(f"a prompt of {len(prompt)} tokens leaves no room")
        number = next(self._numbers)
        self.asked.append((list(prompt), sampling, n))
        self._stops[number] = threading.Event()
        for sample in range(n):
            self.running += 1
            script = self.script(prompt, sampling, sample)
            arguments = (script, sample, sampling, on_event, self._stops[number])
            threading.Thread(target=self._say, args=arguments, daemon=True).start()
        return number

    def _say(
        self, script: Script, sample: int, sampling: Sampling, on_event: Callable[[Event], None], stop: threading.Event
    ) -> None:
        drawn = 0
        try:
            for i, piece in enumerate(script.pieces):
                if not self.alive:
                    return None
                if stop.wait(script.delay):
                    return on_event(Event(sample, "", (), "cancelled"))
                if i == script.fails_after:
                    return on_event(Event(sample, "", (), "error"))
                tokens = self._tokens(piece, sampling)[: sampling.max_new_tokens - drawn]
                drawn += len(tokens)
                self.generated += len(tokens)
                if drawn >= sampling.max_new_tokens:
                    return on_event(Event(sample, piece, tokens, "length"))
                on_event(Event(sample, piece, tokens, None))
            on_event(Event(sample, "", (Token(self.tokenizer.eos_id, -0.1, ()),), "stop"))
        finally:
            self.running -= 1

    def _tokens(self, piece: str, sampling: Sampling) -> tuple[Token, ...]:
        top = tuple((300 + i, -0.5 - i) for i in range(sampling.top_logprobs))
        return tuple(Token(i, -0.5, top) for i in self.tokenizer.encode(piece))

    def cancel(self, request: int) -> None:
        self.cancelled.append(request)
        self._stops[request].set()

    def stats(self) -> Stats:
        return Stats(0, self.running, 64 * self.running, 4096, self.generated)

    def close(self) -> None:
        for number in self._stops:
            self._stops[number].set()


def state_of(*engines: StandIn, limit: int = 320, **settings: object) -> State:
    """A server's state with models called "llama", "alpaca"."""
    names = ("llama", "alpaca")[: len(engines)]
    models = {name: Served(name, engine, limit) for name, engine in zip(names, engines, strict=True)}  # type: ignore[arg-type]
    return State(models, **settings)  # type: ignore[arg-type]


@contextmanager
def serving(state: State, rules: Rules | None = None) -> Iterator[str]:
    """The server's address, while it runs in a thread."""
    server = uvicorn.Server(uvicorn.Config(make_app(state, rules or Rules()), http=Connection, port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for something another thread does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)

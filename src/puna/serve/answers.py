"""Answers while they are drawn: the engine's events, which come on its thread, as an asynchronous iterator.

A request is let in, or refused, before any work: so many samples may be drawn at once, so many may wait. What is let in
ends in one of four ways: its samples are done, its client has gone, the server stops, or the engine has died.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from puna.config import ConfigError
from puna.generate.live import Event, LiveEngine, Token
from puna.generate.sampling import Sampling
from puna.serve import errors
from puna.serve.errors import APIError
from puna.serve.metrics import Metrics

SECONDS_BETWEEN_LOOKS = 1.0
"""How often a wait for the engine asks whether it still lives."""


@dataclass
class Served:
    """A model by the name clients know it by, and how many of its samples are under way."""

    name: str
    engine: LiveEngine
    limit: int
    created: int = field(default_factory=lambda: int(time.time()))
    samples: int = 0
    open: set[Answers] = field(default_factory=set)
    """what is not closed: its samples may all be drawn, and its client may still read."""

    def __post_init__(self) -> None:
        self._anchor = self.engine.tokenizer.encode("a")
        self._anchor_text = self.engine.tokenizer.decode(self._anchor)
        self._texts: dict[int, str] = {}
        self._came: deque[tuple[Callable[[Event], None], Event]] = deque()
        self._wakes = False

    def admit(self, samples: int) -> None:
        """Count samples in, or raise 503 where the engine is dead, 429 where too many wait, or are not read."""
        if samples > self.limit:
            raise errors.invalid(f"{samples} answers in one request: at most {self.limit} are served at once", "n")
        if not self.engine.alive:
            raise errors.engine_dead(self.name)
        unread = sum(answers.choices for answers in self.open)  # of samples drawn, too
        if self.samples + samples > self.limit or unread + samples > 2 * self.limit:
            raise errors.busy("the queue is full: try again later")
        self.samples += samples

    def pass_on(self, loop: asyncio.AbstractEventLoop, take: Callable[[Event], None], event: Event) -> None:
        """From the engine's thread: have the loop call take(event). It is woken once for all that comes meanwhile."""
        self._came.append((take, event))
        if not self._wakes:
            self._wakes = True
            try:
                loop.call_soon_threadsafe(self._take_all)
            except RuntimeError:  # the loop is closed: nobody waits any more
                self._came.clear()
                self._wakes = False

    def _take_all(self) -> None:
        self._wakes = False  # first: what comes from here on wakes the loop again
        while self._came:
            take, event = self._came.popleft()
            take(event)

    def token_text(self, token: int) -> str:
        """A token's text as it stands inside a text, with its leading space; found once, and kept."""
        if token not in self._texts:
            text = self.engine.tokenizer.decode([*self._anchor, token])
            self._texts[token] = text.removeprefix(self._anchor_text)
        return self._texts[token]


class Answers:
    """The samples of one request: `n` of each prompt, choice `p * n + s` being sample `s` of prompt `p`.

    Made of samples that are counted in (`Served.admit`) and counted out here: `close` must be called, perhaps twice.
    """

    def __init__(
        self, model: Served, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, metrics: Metrics
    ) -> None:
        self.model, self.prompts, self.choices = model, prompts, len(prompts) * n
        self.prompt_tokens, self.drawn_tokens = sum(map(len, prompts)), 0
        self.began, self.first_token_after = time.monotonic(), 0.0
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._requests: list[int] = []
        self._open = set(range(self.choices))
        model.open.add(self)
        self._held = self.choices  # not counted out yet
        metrics.prompt_tokens.labels(model.name).inc(self.prompt_tokens)
        try:
            for i, prompt in enumerate(prompts):
                # Alike prompts of one request are different requests to the dice.
                seeded = dataclasses.replace(sampling, seed=sampling.seed + i)
                self._requests.append(model.engine.submit(prompt, seeded, self._listener(i * n), n=n))
        except ConfigError as error:
            self.close()
            raise errors.invalid(str(error)) from None
        except RuntimeError:  # it died since `admit` looked
            self.close()
            raise errors.engine_dead(model.name) from None

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._all()

    @property
    def finished(self) -> bool:
        """Whether every choice came to its end."""
        return not self._open

    def close(self) -> None:
        """Cancel what is not finished."""
        if self._open:
            for request in self._requests:
                self.model.engine.cancel(request)
        self._open.clear()
        self.model.open.discard(self)
        self.model.samples -= self._held
        self._held = 0

    def _listener(self, first: int) -> Callable[[Event], None]:
        """What the engine's thread calls: hands an event, with its choice as `sample`, to the event loop."""

        def on_event(event: Event) -> None:
            self.model.pass_on(self._loop, self._arrived, event._replace(sample=first + event.sample))

        return on_event

    def _arrived(self, event: Event) -> None:
        """On the loop: a sample that has ended makes room at once, however slowly its client reads."""
        if event.finish and self._held:
            self._held -= 1
            self.model.samples -= 1
        self._events.put_nowait(event)

    async def _all(self) -> AsyncIterator[Event]:
        last: dict[int, float] = {}
        while self._open:
            for event in await self._next():
                if event.finish == "error":
                    raise APIError(500, "the engine failed while it drew this answer", code="engine_error")
                if event.finish == "cancelled":
                    raise errors.unavailable("the answer was cut off: the server is shutting down", "shutting_down")
                if event.tokens:
                    self._count(event, last)
                if event.finish:
                    self._open.discard(event.sample)
                yield event

    async def _next(self) -> list[Event]:
        """What has come, an event a sample: where the loop is behind the engine, it catches up in larger pieces."""
        while True:
            try:
                async with asyncio.timeout(SECONDS_BETWEEN_LOOKS):
                    waiting = [await self._events.get()]
            except TimeoutError:
                if not self.model.engine.alive:
                    raise errors.engine_dead(self.model.name) from None
                continue
            while not self._events.empty():
                waiting.append(self._events.get_nowait())
            return _joined(waiting)

    def _count(self, event: Event, last: dict[int, float]) -> None:
        now, first = time.monotonic(), event.sample not in last
        if not self.drawn_tokens:
            self.first_token_after = now - self.began
        waited = now - last.get(event.sample, self.began)
        self._metrics.drawn(self.model.name, waited, len(event.tokens), first=first)
        last[event.sample] = now
        self.drawn_tokens += len(event.tokens)


@dataclass
class Drawn:
    """One whole answer."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str = ""

    def mean_logprob(self) -> float:
        """What best_of ranks by."""
        return sum(token.logprob for token in self.tokens) / max(len(self.tokens), 1)


async def collect(answers: Answers) -> list[Drawn]:
    """Every choice, whole and in order."""
    drawn = [Drawn() for _ in range(answers.choices)]
    async for event in answers:
        choice = drawn[event.sample]
        choice.text += event.text
        choice.tokens += event.tokens
        choice.finish = event.finish or ""
    return drawn


def likeliest(drawn: Sequence[Drawn], of: int, n: int) -> list[Drawn]:
    """The best n of each prompt's answers, of which there are `of`."""
    rows = [drawn[i : i + of] for i in range(0, len(drawn), of)]
    return [one for row in rows for one in sorted(row, key=lambda d: -d.mean_logprob())[:n]]


def some_seed() -> int:
    """For a request that names none."""
    return secrets.randbits(31)


def _joined(events: Sequence[Event]) -> list[Event]:
    """Each sample's events as one."""
    found: dict[int, Event] = {}
    for event in events:
        if (before := found.get(event.sample)) is not None:
            event = event._replace(text=before.text + event.text, tokens=before.tokens + event.tokens)
        found[event.sample] = event
    return list(found.values())

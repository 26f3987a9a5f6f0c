"""One answer in the making: what it was asked for, what is drawn of it, and its text as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from puna.config import ConfigError
from puna.generate.sampling import Sampling

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are not (yet) UTF-8."""

Finish = Literal["stop", "length", "cancelled", "error"]


class Token(NamedTuple):
    """A drawn token; `top` are the likeliest ones in its place as (id, logprob), where they were asked for."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Request:
    """n answers to one prompt. `place` is what its draws are keyed by beside the seed."""

    number: int
    prompt: list[int]
    sampling: Sampling
    n: int = 1
    place: int = 0


@dataclass(eq=False)
class Answer:
    """One sample of a request.

    `finish` says how it ended, once it has: "stop" is EOS, a stop id or a stop text, "error" that the model's numbers
    were not finite.
    """

    request: Request
    sample: int
    limit: int
    """tokens it may have."""
    stream: TextStream | None = None
    """makes `text`, where somebody listens or a text may end the answer."""
    text: str = ""
    """what is certain of it so far; never a stop text."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None

    def hear(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """Add to the text what these tokens make certain, and return it; a stop text ends the answer."""
        if self.stream is None:
            return ""
        piece = self.stream.push(tokens, last=last)
        self.text += piece
        if self.stream.stopped:
            self.finish = "stop"
        return piece


def room(prompt: Sequence[int], context: int, name: str) -> int:
    """Tokens that an answer to a prompt can have. Raises ConfigError where the prompt, called `name`, leaves none."""
    if not 0 < len(prompt) < context:
        raise ConfigError(
            f"{name} has {len(prompt)} tokens and the model's context {context}: "
            "a prompt needs at least one token and must leave room for an answer"
        )
    return context - len(prompt)


class TextStream:
    """The text of tokens that come one by one.

    Bytes that are not yet a whole character are held back, and so is what may turn out to begin a stop text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, stop
        self._tokens: list[int] = []
        self._context = self._read = 0  # tokens whose text is out; the decoder sees a few of them for its spaces
        self._held = ""
        self.stopped = False
        """A stop text has come."""

    def push(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """The text that is now certain; with `last` all there is."""
        self._tokens += tokens
        known = self._decode(self._tokens[self._context : self._read])
        text = self._decode(self._tokens[self._context :])
        if last or not text.endswith(REPLACEMENT):
            self._held += text[len(known) :]
            if len(text) > len(known):  # a token without text is no context
                self._context, self._read = self._read, len(self._tokens)
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            ready, self._held = self._held[: min(found)], ""
            return ready
        keep = 0 if last else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        ready = self._held[: len(self._held) - keep]
        self._held = self._held[len(ready) :]
        return ready


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of text that begins stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

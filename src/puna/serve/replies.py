"""What clients read: OpenAI's objects, whole or as the chunks of a stream."""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from puna.generate.live import Token
from puna.generate.sequence import REPLACEMENT
from puna.serve.answers import Answers, Drawn, Served
from puna.serve.errors import APIError

Reply = dict[str, Any]
Choice = Callable[[int, str, Sequence[Token], str | None], Reply]
"""A choice of a reply or a chunk: its index, text, tokens, and how it finished."""


def usage(prompt_tokens: int, completion_tokens: int) -> Reply:
    """Tokens in and out."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def head(prefix: str, kind: str, model: Served) -> Reply:
    """What every object of one request begins with."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model.name}


def listed(models: Sequence[Served]) -> Reply:
    """GET /v1/models."""
    data = [{"id": model.name, "object": "model", "created": model.created, "owned_by": "puna"} for model in models]
    return {"object": "list", "data": data}


def chat_choice(model: Served, with_logprobs: bool) -> Choice:
    """A choice of a whole chat completion."""

    def choice(index: int, text: str, tokens: Sequence[Token], finish: str | None) -> Reply:
        found = _chat_logprobs(model, tokens) if with_logprobs else None
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": found, "finish_reason": finish}

    return choice


def chat_delta(model: Served, with_logprobs: bool) -> Choice:
    """A choice of a chat completion's chunk."""

    def choice(index: int, text: str, tokens: Sequence[Token], finish: str | None) -> Reply:
        found = _chat_logprobs(model, tokens) if with_logprobs else None
        delta = {"content": text} if text or not finish else {}
        return {"index": index, "delta": delta, "logprobs": found, "finish_reason": finish}

    return choice


def text_choice(model: Served, with_logprobs: bool) -> Choice:
    """A choice of a completion, whole or a chunk's. Offsets are within the whole answer, a chunk's too."""
    begun: Counter[int] = Counter()  # of each answer, the characters of its tokens so far

    def choice(index: int, text: str, tokens: Sequence[Token], finish: str | None) -> Reply:
        found = _text_logprobs(model, tokens, begun[index]) if with_logprobs else None
        begun[index] += sum(map(len, found["tokens"])) if found else 0
        return {"index": index, "text": text, "logprobs": found, "finish_reason": finish}

    return choice


def whole(first: Reply, drawn: Sequence[Drawn], choice: Choice, used: Reply) -> Reply:
    """The reply to a request that is not streamed."""
    choices = [choice(i, one.text, one.tokens, one.finish) for i, one in enumerate(drawn)]
    return {**first, "choices": choices, "usage": used}


async def chunks(
    answers: Answers, first: Reply, choice: Choice, *, roles: bool, include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: a chunk an event of the engine, then `[DONE]`. An error ends the stream."""
    extra: Reply = {"usage": None} if include_usage else {}
    if roles:
        for i in range(answers.choices):
            delta = {"role": "assistant", "content": ""}
            opening = {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}
            yield _sse(first | {"choices": [opening]} | extra)
    try:
        async for event in answers:
            made = choice(event.sample, event.text, event.tokens, event.finish)
            yield _sse(first | {"choices": [made]} | extra)
    except APIError as error:
        yield f"data: {error.body().decode('ascii')}\n\n"
        return
    if include_usage:
        yield _sse(first | {"choices": [], "usage": usage(answers.prompt_tokens, answers.drawn_tokens)})
    yield "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """A stream that ends its answers with itself, however it ends; one that never began, too."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[str], close: Callable[[], None]) -> None:
        super().__init__(content)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def _sse(reply: Reply) -> str:
    return f"data: {json.dumps(reply, separators=(',', ':'))}\n\n"


def _chat_logprobs(model: Served, tokens: Sequence[Token]) -> Reply:
    def entry(token: int, logprob: float) -> Reply:
        text = model.token_text(token)
        unknown = REPLACEMENT in text  # a part of a character: the decoder does not tell its bytes
        return {"token": text, "logprob": logprob, "bytes": None if unknown else list(text.encode("utf-8"))}

    shown = _shown(model, tokens)
    content = [entry(t.id, t.logprob) | {"top_logprobs": [entry(*each) for each in t.top]} for t in shown]
    return {"content": content, "refusal": None}


def _text_logprobs(model: Served, tokens: Sequence[Token], begun: int) -> Reply:
    shown = _shown(model, tokens)
    texts = [model.token_text(token.id) for token in shown]
    offsets = list(itertools.accumulate(map(len, texts), initial=begun))[:-1]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in shown],
        # Of tokens with one text the likeliest: the last one written stays.
        "top_logprobs": [{model.token_text(i): logprob for i, logprob in reversed(token.top)} for token in shown],
        "text_offset": offsets,
    }


def _shown(model: Served, tokens: Sequence[Token]) -> list[Token]:
    """The tokens that have a text: all but EOS."""
    return [token for token in tokens if token.id != model.engine.tokenizer.eos_id]

"""What clients may ask: the bodies of the API's requests, their limits, and what they say to the engine.

A field that is not here is refused (400 `unknown_parameter`), a chat template for one: what cannot be honoured is not
passed over in silence. `user` and a message's `name` are taken, though a prompt has no place for them. Fields set to
null are as good as absent. What is wrong in many places is told of a few: a refusal costs no more than an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from puna.config import ConfigError, DataError
from puna.generate.sampling import Sampling
from puna.serve import errors
from puna.serve.answers import Served, some_seed
from puna.text import chat
from puna.types import Dialog, Message

MOST_STOPS, LONGEST_STOP = 4, 200
MOST_BIASES = 1024
MOST_CHOICES, MOST_PROMPTS, MOST_MESSAGES = 64, 64, 1024
MOST_LOGPROBS = 200_000
"""Tokens with their logprobs that a reply may have to hold, unless it is streamed: 0.4 s to write."""
MOST_NEW_TOKENS = 1_000_000
LONGEST_MARKDOWN = 50_000

Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
IdText = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Zero = Annotated[float, Field(ge=0, le=0)]
Count = Annotated[int, Field(ge=1, le=MOST_NEW_TOKENS)]
Choices = Annotated[int, Field(ge=1, le=MOST_CHOICES)]
Ids = Annotated[list[Id], Field(min_length=1, fail_fast=True)]


def _few(biases: Any) -> Any:
    """The biases, once they are counted: a dict's length is otherwise looked at last."""
    if isinstance(biases, dict) and len(biases) > MOST_BIASES:
        raise ValueError(f"{len(biases)} tokens: at most {MOST_BIASES} are taken")
    return biases


def _nullable(schema: dict[str, Any]) -> None:
    """Say in the schema that null is absent."""
    for name, value in schema.get("properties", {}).items():
        if name not in schema.get("required", []):
            schema["properties"][name] = {"anyOf": [value, {"type": "null"}]}


class Strict(BaseModel):
    """Only the fields it names; null is absent. Of fields that it does not know one is told."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_nullable)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known, told = cls.model_fields, {key: value for key, value in given.items() if value is not None}
        for strange in [key for key in told if key not in known][1:]:
            del told[strange]
        return told


class TextPart(Strict):
    """A part of a message's content; images and other kinds are refused, and no URL is ever opened."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One turn. `developer` is what newer clients call `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None

    def message(self) -> Message:
        """As the rest of Puna takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]


class StreamOptions(Strict):
    """How a stream ends."""

    include_usage: bool = False


class Common(Strict):
    """What chats and completions share. Defaults are OpenAI's."""

    asked_in: ClassVar[str]
    """the field that holds the prompt."""
    model: str
    n: Choices = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] = 1.0
    logit_bias: Annotated[dict[IdText, Bias], Field(max_length=MOST_BIASES), BeforeValidator(_few)] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    user: str | None = None

    def samplings(
        self, model: Served, prompts: Sequence[Sequence[int]], wanted: int | None, top: int | None
    ) -> Sampling:
        """What the engine is told, after the longest prompt was held against the context.

        `top` is None where no logprobs are asked for. A reply that is not streamed has at most MOST_LOGPROBS.
        """
        new = _room(model, max(map(len, prompts)), wanted, self.asked_in)
        entries = 0 if top is None else len(prompts) * self.drawn_each * new * (1 + top)
        if entries > MOST_LOGPROBS and not self.stream:
            raise errors.invalid(
                f"an answer may have the logprobs of {entries} tokens, at most {MOST_LOGPROBS} fit into one reply: "
                "set max_tokens, ask for fewer answers or logprobs, or stream them"
            )
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        vocabulary = model.engine.tokenizer.vocab_size
        if strange := next((token for token in bias if token >= vocabulary), None):
            raise errors.invalid(f"logit_bias: the vocabulary has {vocabulary} tokens, no {strange}", "logit_bias")
        try:
            return Sampling(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                seed=some_seed() if self.seed is None else self.seed % 2**32,
                max_new_tokens=new,
                stop=tuple(stops),
                logit_bias=bias,
                top_logprobs=top or 0,
            )
        except ConfigError as error:
            raise errors.invalid(str(error)) from None

    @property
    def drawn_each(self) -> int:
        """Answers that are drawn to each prompt."""
        return self.n

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    asked_in = "messages"
    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    @property
    def said(self) -> Dialog:
        """The prompt, as the log may have it too."""
        return [message.message() for message in self.messages]

    @property
    def choices(self) -> int:
        """Answers that are drawn in all."""
        return self.n

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs

    def prompts(self, model: Served) -> list[list[int]]:
        """The prompt's ids; 400 where the dialog is no dialog or holds the chat format's marks."""
        try:
            return [chat.encode_prompt(self.said, model.engine.tokenizer)]
        except DataError as error:
            raise errors.invalid(str(error), "messages") from None

    def sampling(self, model: Served, prompts: Sequence[Sequence[int]]) -> Sampling:
        if self.top_logprobs and not self.logprobs:
            raise errors.invalid("top_logprobs needs logprobs: true", "top_logprobs")
        wanted = self.max_completion_tokens or self.max_tokens
        return self.samplings(model, prompts, wanted, self.top_logprobs if self.logprobs else None)


class CompletionRequest(Common):
    """POST /v1/completions: text, or token ids, that the model goes on from."""

    asked_in = "prompt"
    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    )
    max_tokens: Count = 16
    best_of: Choices | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool = False

    @property
    def said(self) -> list[Any]:
        """The prompts, each a text or ids, as the log may have them too."""
        return self.prompt if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int) else [self.prompt]

    @property
    def drawn_each(self) -> int:
        return self.best_of or self.n

    @property
    def choices(self) -> int:
        return len(self.said) * self.drawn_each

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    def prompts(self, model: Served) -> list[list[int]]:
        """Every prompt's ids. A text opens with BOS, where that opens a document; ids are taken as they are."""
        tokenizer = model.engine.tokenizer
        opening = [tokenizer.bos_id] if tokenizer.chat_format == "llama2" else []
        try:
            found = [[*opening, *tokenizer.encode(one)] if isinstance(one, str) else list(one) for one in self.said]
        except DataError as error:
            raise errors.invalid(str(error), "prompt") from None
        for prompt in found:
            if not prompt:
                raise errors.invalid("a prompt is empty", "prompt")
            if max(prompt) >= tokenizer.vocab_size:
                raise errors.invalid(f"the vocabulary has {tokenizer.vocab_size} tokens, no {max(prompt)}", "prompt")
        return found

    def sampling(self, model: Served, prompts: Sequence[Sequence[int]]) -> Sampling:
        if self.echo:
            raise errors.invalid("echo is not served: put the prompt before the text yourself", "echo")
        if self.best_of is not None and self.best_of < self.n:
            raise errors.invalid(f"best_of is {self.best_of}: it must be at least n, {self.n}", "best_of")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise errors.invalid("best_of cannot be streamed: the best is known at the end", "best_of")
        return self.samplings(model, prompts, self.max_tokens, self.logprobs)


class ScoreRequest(Strict):
    """POST /v1/score: a dialog that ends with an answer."""

    messages: Messages


class MarkdownRequest(Strict):
    """POST /chat/markdown: an answer's text, for the page."""

    text: Annotated[str, Field(max_length=LONGEST_MARKDOWN)]


def _room(model: Served, prompt: int, wanted: int | None, param: str) -> int:
    """New tokens an answer may have; 400, which names `param`, where the context does not hold them."""
    context = model.engine.context
    room = context - prompt
    if room < 1 or (wanted or 1) > room:
        asked = f" and {wanted} new ones" if wanted and room >= 1 else ""
        way_out = f"at most {room} fit after this prompt" if room >= 1 else "shorten the prompt"
        raise errors.invalid(
            f"the context of {model.name!r} is {context} tokens, the prompt has {prompt}{asked}: {way_out}",
            param,
            "context_length_exceeded",
        )
    return wanted or room

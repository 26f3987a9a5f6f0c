"""The server's routes: OpenAI's API, scores, what operators ask, and the web chat."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles

import puna
from puna.config import DataError
from puna.serve import errors, markdown, replies
from puna.serve.answers import Answers, Served, collect, likeliest
from puna.serve.errors import APIError, ErrorBody
from puna.serve.guard import Guard, Rules
from puna.serve.metrics import Metrics
from puna.serve.replies import Choice, EventStream, Reply
from puna.serve.requests import ChatRequest, CompletionRequest, MarkdownRequest, ScoreRequest
from puna.types import Reward

T = TypeVar("T")

STATIC = Path(__file__).parent / "static"
SCORES_WAITING = 64
"""Dialogs that may wait for the reward models."""
LONG_BODY = 16_384
"""Bytes from which on a request's prompt is encoded in a thread: less takes some milliseconds at most."""
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}
REFUSALS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}

_one_thread = functools.partial(ThreadPoolExecutor, max_workers=1)


@dataclass
class State:
    """What the routes share. Long work has a thread a kind: it waits for its like, and the event loop for none."""

    models: Mapping[str, Served]
    """by the names that clients use; a name is looked up here and nowhere else."""
    rewards: Mapping[str, Reward] = field(default_factory=dict)
    """"helpfulness", "safety" -> its reward model."""
    log_prompts: bool = False
    draining: bool = False
    scores_waiting: int = 0
    writing: int = 0
    """replies with logprobs that the writer has, or will have."""
    texts: ThreadPoolExecutor = field(default_factory=_one_thread)
    """encodes long prompts."""
    writer: ThreadPoolExecutor = field(default_factory=_one_thread)
    scorer: ThreadPoolExecutor = field(default_factory=_one_thread)
    renderer: ThreadPoolExecutor = field(default_factory=_one_thread)
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.metrics.watch(lambda: [(model.name, model.engine.stats()) for model in self.models.values()])

    @property
    def samples(self) -> int:
        """Samples under way."""
        return sum(model.samples for model in self.models.values())

    @property
    def busy(self) -> bool:
        """Whether a client waits for an answer or a score, or still reads one."""
        return bool(self.samples or self.scores_waiting or self.writing) or any(m.open for m in self.models.values())

    @property
    def dead(self) -> list[str]:
        """The models whose engines have ended."""
        return [model.name for model in self.models.values() if not model.engine.alive]

    def check(self) -> None:
        """Raise 503 where an engine is dead."""
        for name in self.dead:
            raise errors.engine_dead(name)

    def model(self, name: str) -> Served:
        if name not in self.models:
            known = ", ".join(self.models)
            raise APIError(404, f"no model {name!r} here: there is {known}", code="model_not_found", param="model")
        return self.models[name]


def make_app(state: State, rules: Rules) -> FastAPI:
    """The application; its engines are closed when it shuts down."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        for model in state.models.values():
            await asyncio.to_thread(model.engine.close)

    app = FastAPI(
        title="Puna",
        version=puna.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=REFUSALS,
        strict_content_type=True,
    )
    errors.install(app)
    _add_api(app, state)
    _add_operation(app, state)
    _add_web_chat(app, state)
    app.add_middleware(Guard, rules=rules, metrics=state.metrics)
    return app


def _add_api(app: FastAPI, state: State) -> None:
    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse(replies.listed(list(state.models.values())))

    @app.post("/v1/chat/completions", responses=STREAMED)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        model = state.model(body.model)
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        made = replies.chat_delta if body.stream else replies.chat_choice
        first = replies.head("chatcmpl", kind, model)
        return await _answer(state, body, request, first, made(model, body.wants_logprobs), roles=True)

    @app.post("/v1/completions", responses=STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        model = state.model(body.model)
        first = replies.head("cmpl", "text_completion", model)
        return await _answer(state, body, request, first, replies.text_choice(model, body.wants_logprobs), roles=False)

    @app.post("/v1/score")
    async def score(body: ScoreRequest, request: Request) -> JSONResponse:
        """The paper's R of the answer that ends a dialog, by each reward model: in (0, 1)."""
        if not state.rewards:
            raise APIError(404, "no reward model is served here: see --reward-helpfulness", code="model_not_found")
        if state.scores_waiting >= SCORES_WAITING:
            raise errors.busy("too many dialogs wait for a score")
        dialog = [message.message() for message in body.messages]

        def scores() -> dict[str, float]:
            return {name: float(reward([dialog])[0]) for name, reward in state.rewards.items()}

        def end() -> None:
            state.scores_waiting -= 1

        state.scores_waiting += 1
        try:
            found = await _unless_gone(request, _in(state.scorer, scores), end)
        except DataError as error:
            raise errors.invalid(str(error), "messages") from None
        return JSONResponse({"object": "score", "scores": found})


async def _answer(
    state: State,
    body: ChatRequest | CompletionRequest,
    request: Request,
    first: Reply,
    choice: Choice,
    *,
    roles: bool,
) -> Response:
    """Draw what a body asks for: a stream of chunks, or the whole reply once it is there."""
    model = state.model(body.model)
    model.admit(body.choices)
    try:
        encode = functools.partial(body.prompts, model)
        is_long = len(await request.body()) >= LONG_BODY
        prompts = await _unless_gone(request, _in(state.texts, encode), lambda: None) if is_long else encode()
        sampling = body.sampling(model, prompts)
    except BaseException:
        model.samples -= body.choices
        raise
    answers = Answers(model, prompts, sampling, body.drawn_each, state.metrics)
    end = functools.partial(_end, request, answers, body.said if state.log_prompts else None)
    if body.stream:
        parts = replies.chunks(answers, first, choice, roles=roles, include_usage=body.wants_usage)
        return EventStream(parts, end)
    drawn = await _unless_gone(request, collect(answers), end)
    if body.drawn_each > body.n:
        drawn = likeliest(drawn, body.drawn_each, body.n)
    used = replies.usage(answers.prompt_tokens, answers.drawn_tokens)

    def reply() -> Response:
        return JSONResponse(replies.whole(first, drawn, choice, used))

    if not body.wants_logprobs:
        return reply()
    state.writing += 1
    try:
        return await _in(state.writer, reply)
    finally:
        state.writing -= 1


def _add_operation(app: FastAPI, state: State) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """The process answers, and its engines live."""
        state.check()
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Every engine lives, and new requests are taken."""
        if state.draining:
            raise errors.unavailable("the server is shutting down", "shutting_down")
        state.check()
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_web_chat(app: FastAPI, state: State) -> None:
    app.mount("/static", StaticFiles(directory=STATIC))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/chat/settings")
    async def settings() -> JSONResponse:
        """What the page can offer."""
        models = [{"name": model.name, "context": model.engine.context} for model in state.models.values()]
        return JSONResponse({"models": models, "rewards": list(state.rewards)})

    @app.post("/chat/markdown")
    async def render(body: MarkdownRequest) -> JSONResponse:
        """An answer as elements, see puna.serve.markdown."""
        return await _in(state.renderer, lambda: JSONResponse({"nodes": markdown.tree(body.text)}))


async def _in(worker: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    """The work's result, once it has had its turn; what is cancelled before has none."""
    return await asyncio.get_running_loop().run_in_executor(worker, work)


async def _unless_gone(request: Request, work: Awaitable[T], end: Callable[[], None]) -> T:
    """The work's result; where the client leaves first, the work ends, as nobody waits for it."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise APIError(499, "the client has gone", code="client_gone")
    finally:
        task.cancel()
        gone.cancel()
        end()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _end(request: Request, answers: Answers, said: Any) -> None:
    """Close the answers, and note for the log what they were."""
    finished = answers.finished
    answers.close()
    request.state.note |= {
        "model": answers.model.name,
        "prompt_tokens": answers.prompt_tokens,
        "completion_tokens": answers.drawn_tokens,
        "first_token_after": round(answers.first_token_after, 4),
        "finished": finished,
        **({} if said is None else {"prompt": said}),
    }

"""What a request may ask: what is wrong is named in few words, and costs little until it is let in."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import pytest
from pydantic import ValidationError

from puna.serve.app import State
from puna.serve.requests import ChatRequest, CompletionRequest
from tests import helpers
from tests.serve.stand_in import StandIn, serving, state_of

ASK = [helpers.user("Who herds llamas?")]


@pytest.fixture(scope="module")
def engine() -> StandIn:
    return StandIn()


@pytest.fixture(scope="module")
def state(engine: StandIn) -> State:
    return state_of(engine)


@pytest.fixture(scope="module")
def url(state: State) -> Iterator[str]:
    with serving(state) as url:
        yield url


def post(url: str, path: str = "/v1/chat/completions", **body: object) -> httpx.Response:
    return httpx.post(f"{url}{path}", json={"model": "llama", "messages": ASK} | body)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "messages": None, "max_tokens": 10_000}, "prompt"),
        ({"max_tokens": 10_000}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x]": 1}]}]},
            "messages.0.content.0.x]",
        ),
        ({"logit_bias": {"../x": 1}}, "logit_bias.../x"),
        ({"stop": ["a", ""]}, "stop.1"),
    ],
)
def test_the_field_that_is_wrong_is_named(url: str, body: dict[str, object], param: str) -> None:
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    assert post(url, path, **body).json()["error"]["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [1] * 100_000}]},
        {"messages": [1] * 100_000},
        {"prompt": [1] * 100_000 + ["a"] * 100_000, "messages": None},
        {"prompt": [[]] * 100_000, "messages": None},
        {"stop": [1] * 100_000},
        {"logit_bias": {f"x{i}": "x" for i in range(100_000)}},
        {f"x{i}": 1 for i in range(100_000)},
    ],
    ids=lambda body: str(body)[:40],
)
def test_what_is_wrong_many_times_is_told_a_few_times(body: dict[str, object]) -> None:
    kind = CompletionRequest if "prompt" in body else ChatRequest
    with pytest.raises(ValidationError) as refused:
        kind(**{"model": "llama", "messages": ASK} | body)
    assert refused.value.error_count() < 10


def test_logprobs_that_fill_no_reply_are_refused_unless_they_are_streamed(url: str, engine: StandIn) -> None:
    chat = {"n": 64, "max_tokens": 150, "logprobs": True, "top_logprobs": 20}
    text = {"messages": None, "prompt": ["a"] * 64, "best_of": 4, "max_tokens": 150, "logprobs": 5}
    before = len(engine.asked)
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", text | {"best_of": 5})):
        assert "fit into one reply" in post(url, path, **body).json()["error"]["message"]
    assert len(engine.asked) == before
    assert post(url, **chat | {"stream": True}).status_code == 200


def test_a_full_queue_encodes_nothing(url: str, state: State, engine: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.tokenizer, "encode", lambda text: 1 / 0)
    monkeypatch.setattr(state.models["llama"], "samples", state.models["llama"].limit)
    assert post(url).status_code == 429
    assert post(url, "/v1/completions", messages=None, prompt="a").status_code == 429


def test_a_long_prompt_is_encoded_while_others_are_heard(
    url: str, engine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on, encode = threading.Event(), threading.Event(), engine.tokenizer.encode
    monkeypatch.setattr(engine.tokenizer, "encode", lambda text: (begun.set(), goes_on.wait(20), encode(text))[2])
    found: list[httpx.Response] = []
    messages = [helpers.user("the llama " * 2000)]
    waiting = threading.Thread(target=lambda: found.append(post(url, messages=messages)))
    waiting.start()
    begun.wait(5)
    assert httpx.get(f"{url}/health").status_code == 200
    goes_on.set()
    waiting.join(5)
    assert found[0].json()["error"]["code"] == "context_length_exceeded"


def test_a_body_is_read_only_where_a_route_takes_one(url: str) -> None:
    large = b"{" + b" " * 2_000_000
    assert httpx.post(f"{url}/", content=large).status_code == 405
    assert httpx.post(f"{url}/chat/markdown", content=large).status_code == 413
    assert httpx.post(f"{url}/chat/markdown", json={"text": "a"}).json() == {"nodes": [["p", {}, "a"]]}

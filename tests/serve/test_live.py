"""The server with a real engine and a model of a few thousand weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from puna import api
from puna.api import Chat
from puna.generate.live import LiveEngine
from puna.serve import server
from puna.serve.answers import Served
from puna.serve.app import State
from puna.serve.server import ServeConfig
from tests import helpers
from tests.serve.stand_in import serving, until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers.talker_folder(tmp_path_factory.mktemp("live") / "talker", end=0.01)


@pytest.fixture(scope="module")
def state(folder: Path) -> State:
    other = helpers.talker_folder(folder.parent / "other", seed=1, end=0.01)
    return State(server.open_models(ServeConfig(folder, also=(other,), max_concurrent=4, max_queue=400)))


@pytest.fixture(scope="module")
def url(state: State) -> Iterator[str]:
    with serving(state) as url:
        yield url
    assert not any(model.engine.alive for model in state.models.values())


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def said(client: openai.OpenAI, text: str, **settings: object) -> list[str]:
    made = client.chat.completions.create(
        model="talker",
        messages=[{"role": "user", "content": text}],
        **({"max_tokens": 12} | settings),  # type: ignore[call-overload]
    )
    return [choice.message.content for choice in made.choices]


def test_the_answer_is_the_models(client: openai.OpenAI, folder: Path) -> None:
    chat = api.load(folder)
    assert isinstance(chat, Chat)
    [[expected]] = chat.generate("who counts the tents?", temperature=0, max_new_tokens=12)
    assert said(client, "who counts the tents?", temperature=0) == [expected]


def test_a_seed_says_it_again(client: openai.OpenAI) -> None:
    first = said(client, "hello", seed=3, n=3)
    assert len(set(first)) == 3
    assert said(client, "hello", seed=3, n=3) == first
    assert said(client, "hello", seed=4, n=3) != first


def test_a_stream_is_the_whole_answer(client: openai.OpenAI) -> None:
    whole = said(client, "hello", seed=3)
    with client.chat.completions.create(
        model="talker", messages=[{"role": "user", "content": "hello"}], seed=3, max_tokens=12, stream=True
    ) as stream:
        assert ["".join(chunk.choices[0].delta.content or "" for chunk in stream)] == whole


def test_stop_bias_and_logprobs(client: openai.OpenAI) -> None:
    [whole] = said(client, "hello", seed=3)
    word = whole.split()[2]
    [cut] = said(client, "hello", seed=3, stop=[word])
    assert cut and whole.startswith(cut) and word not in cut
    token = helpers.tokenizer().encode("herder")[-1]
    made = client.chat.completions.create(
        model="talker",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=3,
        logit_bias={str(token): 100},
        logprobs=True,
        top_logprobs=2,
    )
    assert made.choices[0].logprobs and made.choices[0].logprobs.content
    for entry in made.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 2
        assert entry.token == made.choices[0].logprobs.content[0].token


def test_an_id_beyond_the_tokenizer_is_no_text_and_ends_nothing() -> None:
    engine = LiveEngine(helpers.model(vocab_size=390), helpers.tokenizer())
    with serving(State({"talker": Served("talker", engine, 8)})) as url:
        # No draw but one of the six that have no piece.
        bias = {str(token): -100 for token in range(helpers.VOCAB)}
        body = {"model": "talker", "prompt": "the llama", "max_tokens": 4, "logit_bias": bias, "logprobs": 1}
        choice = httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["logprobs"]["tokens"]) == ("", "length", [""] * 4)
        assert httpx.get(f"{url}/health").status_code == 200


def test_completions_and_both_models(client: openai.OpenAI) -> None:
    texts = {
        model: client.completions.create(model=model, prompt="the llama", temperature=0, max_tokens=8).choices[0].text
        for model in ("talker", "other")
    }
    assert all(texts.values()) and texts["talker"] != texts["other"]


def test_a_client_that_leaves_frees_the_cache(url: str, state: State) -> None:
    body = {"model": "talker", "messages": [helpers.user("hello")], "max_tokens": 200, "n": 4, "stream": True}
    body |= {"logit_bias": {str(helpers.tokenizer().eos_id): -100}}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    engine = state.models["talker"].engine
    until(lambda: engine.stats().running == 0 and state.samples == 0)


def test_many_at_once_get_what_each_gets_alone(client: openai.OpenAI) -> None:
    questions = helpers.sentences(20)
    found: dict[int, list[str]] = {}

    def ask(i: int) -> None:
        found[i] = said(client, questions[i], seed=i)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {i: said(client, questions[i], seed=i) for i in range(20)}

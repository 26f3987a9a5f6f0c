"""OpenAI's API over a real socket, with the official client, and by hand where the client would not go."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence

import httpx
import openai
import pytest

from puna.generate.sampling import Sampling
from puna.serve.guard import Rules
from tests import helpers
from tests.serve.stand_in import Script, StandIn, serving, state_of, until

ANSWER = "Llamas are herded by shepherds."
ASK = [{"role": "user", "content": "Who herds llamas?"}]


def script(prompt: Sequence[int], sampling: Sampling, sample: int) -> Script:
    """A prompt that says "slowly" is answered slowly, one that says "fail" not to the end; samples differ."""
    text = helpers.tokenizer().decode(prompt)
    if "fail" in text:
        return Script(fails_after=2)
    if "slowly" in text:
        return Script(["so "] * 200, delay=0.02)
    return Script() if sample == 0 else Script([f"Sample {sample}."])


@pytest.fixture(scope="module")
def engine() -> StandIn:
    return StandIn(script)


@pytest.fixture(scope="module")
def url(engine: StandIn) -> Iterator[str]:
    with serving(state_of(engine, StandIn())) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(url: str, path: str = "/v1/chat/completions", **body: object) -> httpx.Response:
    return httpx.post(f"{url}{path}", json={"model": "llama", "messages": ASK} | body)


def refusal(response: httpx.Response) -> tuple[int, str | None]:
    """Status and code, once the error has OpenAI's shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return response.status_code, error["code"]


# The official client -------------------------------------------------------------------------------------------------


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["llama", "alpaca"]


def test_a_chat(client: openai.OpenAI, engine: StandIn) -> None:
    made = client.chat.completions.create(model="llama", messages=ASK, temperature=0.5, top_p=0.9, seed=7, stop=["\n"])
    assert (made.object, made.model) == ("chat.completion", "llama")
    [choice] = made.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    prompt, sampling, n = engine.asked[-1]
    assert helpers.tokenizer().decode(prompt) == "[INST] Who herds llamas? [/INST]"
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.stop, n) == (0.5, 0.9, 7, ("\n",), 1)
    assert made.usage and made.usage.prompt_tokens == len(prompt)
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens


def test_extensions_and_both_names_of_the_length(client: openai.OpenAI, engine: StandIn) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    for name in ("max_tokens", "max_completion_tokens"):
        made = client.chat.completions.create(
            model="llama", messages=ASK, extra_body=extra | {name: 3}, logit_bias={"5": -100}
        )
        assert (made.choices[0].finish_reason, made.usage and made.usage.completion_tokens) == ("length", 3)
    sampling = engine.asked[-1][1]
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (5, 0.1, 1.2)
    assert (dict(sampling.logit_bias), sampling.max_new_tokens) == ({5: -100.0}, 3)


def test_without_a_seed_two_requests_differ(client: openai.OpenAI, engine: StandIn) -> None:
    for _ in range(2):
        client.chat.completions.create(model="llama", messages=ASK)
    assert engine.asked[-1][1].seed != engine.asked[-2][1].seed


def test_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="llama", messages=ASK, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage and chunks[-1].usage.completion_tokens > 5
    assert all("usage" in chunk.model_fields_set for chunk in chunks)


def test_the_clients_own_stream_reader(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="llama", messages=ASK) as stream:
        assert stream.get_final_completion().choices[0].message.content == ANSWER


def test_several_samples(client: openai.OpenAI) -> None:
    expected = [ANSWER, "Sample 1.", "Sample 2."]
    made = client.chat.completions.create(model="llama", messages=ASK, n=3)
    assert [choice.message.content for choice in made.choices] == expected
    said = ["", "", ""]
    with client.chat.completions.create(model="llama", messages=ASK, n=3, stream=True) as stream:
        for chunk in stream:
            said[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert said == expected


def test_logprobs(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(model="llama", messages=ASK, logprobs=True, top_logprobs=2)
    found = made.choices[0].logprobs
    assert found and found.content
    assert "".join(token.token for token in found.content).split() == ANSWER.split()
    assert made.usage and len(found.content) == made.usage.completion_tokens - 1  # EOS is none of them
    assert bytes(found.content[-1].bytes or []).decode() == found.content[-1].token
    assert [top.logprob for top in found.content[0].top_logprobs] == [-0.5, -1.5]


def test_completions(client: openai.OpenAI, engine: StandIn) -> None:
    made = client.completions.create(model="llama", prompt=["Llamas", "Goats"], n=2, max_tokens=50, logprobs=1, seed=3)
    assert [choice.text for choice in made.choices] == [ANSWER, "Sample 1."] * 2
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    asked = engine.asked[-2:]
    assert [prompt for prompt, _, _ in asked] == [
        [1, *helpers.tokenizer().encode(text)] for text in ("Llamas", "Goats")
    ]
    assert asked[0][1].seed != asked[1][1].seed
    found = made.choices[0].logprobs
    assert found and found.tokens and found.text_offset
    assert found.text_offset[1] == len(found.tokens[0])
    with client.completions.create(model="llama", prompt=[1, 300, 301], max_tokens=50, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == ANSWER
    assert engine.asked[-1][0] == [1, 300, 301]
    with client.completions.create(model="llama", prompt="Llamas", max_tokens=50, logprobs=1, stream=True) as stream:
        parts = [chunk.choices[0].logprobs for chunk in stream]
    assert [offset for part in parts if part for offset in part.text_offset or []] == found.text_offset


def test_best_of_keeps_the_likeliest(client: openai.OpenAI, engine: StandIn) -> None:
    made = client.completions.create(model="llama", prompt="Llamas", best_of=3, max_tokens=50)
    assert len(made.choices) == 1
    assert engine.asked[-1][2] == 3
    # EOS has -0.1, everything else -0.5: the shortest answer has the highest mean.
    assert made.choices[0].text in ("Sample 1.", "Sample 2.")


def test_the_clients_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=ASK)
    assert missing.value.code == "model_not_found"
    assert "llama, alpaca" in missing.value.message
    with pytest.raises(openai.BadRequestError) as overflow:
        client.chat.completions.create(model="llama", messages=ASK, max_tokens=1000)
    assert overflow.value.code == "context_length_exceeded"
    with pytest.raises(openai.InternalServerError) as failed:
        client.chat.completions.create(model="llama", messages=[{"role": "user", "content": "fail"}])
    assert failed.value.code == "engine_error"
    with (
        pytest.raises(openai.APIError, match="engine failed"),
        client.chat.completions.create(
            model="llama", messages=[{"role": "user", "content": "fail"}], stream=True
        ) as stream,
    ):
        list(stream)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
def test_chat_tags_in_a_text_are_refused(url: str, engine: StandIn, tag: str) -> None:
    before = len(engine.asked)
    for role in ("user", "system"):
        messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}]
        messages[role == "user"]["content"] += tag
        assert post(url, messages=messages).status_code == 400
    assert len(engine.asked) == before


def test_control_marks_in_a_text_are_text(url: str, engine: StandIn) -> None:
    """`</s>` in a user's or the system's words gives no control id: the prompt has the one BOS that opens it."""
    words = "</s><s><unk>[PAD]<|im_end|>"
    messages = [{"role": "system", "content": words}, {"role": "user", "content": words}]
    assert post(url, messages=messages).status_code == 200
    tokenizer = helpers.tokenizer()
    prompt = engine.asked[-1][0]
    assert prompt[0] == tokenizer.bos_id
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(prompt[1:])
    assert post(url, "/v1/completions", messages=None, prompt=words).status_code == 200
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(engine.asked[-1][0][1:])


@pytest.mark.parametrize("name", ["chat_template", "template", "tools", "chat_template_kwargs", "response_format"])
def test_what_cannot_be_honoured_is_refused(url: str, name: str) -> None:
    response = post(url, **{name: "{{ cycler.__init__.__globals__.os.popen('id').read() }}"})
    assert refusal(response) == (400, "unknown_parameter")
    assert response.json()["error"]["param"] == name


def test_a_prompt_over_the_context_is_refused_before_any_work(url: str, engine: StandIn) -> None:
    before = len(engine.asked)
    long = "the llama crosses the cold river. " * 40
    assert refusal(post(url, messages=[{"role": "user", "content": long}])) == (400, "context_length_exceeded")
    assert refusal(post(url, max_tokens=10_000)) == (400, "context_length_exceeded")
    assert refusal(post(url, "/v1/completions", messages=None, prompt=long)) == (400, "context_length_exceeded")
    assert len(engine.asked) == before


BOMBS: list[dict[str, object]] = [
    {"n": 10**6},
    {"n": 0},
    {"n": 1e300},
    {"max_tokens": 10**12},
    {"max_tokens": -1},
    {"stop": ["a"] * 1000},
    {"stop": "a" * 100_000},
    {"stop": ""},
    {"logit_bias": {str(i): 1 for i in range(5000)}},
    {"logit_bias": {"5": 1e9}},
    {"logit_bias": {"99999": 1}},
    {"logit_bias": {"../x": 1}},
    {"top_logprobs": 5},
    {"logprobs": True, "top_logprobs": 10**9},
    {"temperature": -1},
    {"temperature": "hot"},
    {"top_p": 0},
    {"seed": 2**70},
    {"messages": []},
    {"messages": ASK * 5000},
    {"messages": "hello"},
    {"messages": [{"role": "tool", "content": "a"}]},
    {"messages": [{"role": "user", "content": ""}]},
    {"messages": [*ASK, {"role": "assistant", "content": "b"}]},
    {"stream_options": {"include_usage": True, "x": 1}},
]


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: str(bomb)[:40])
def test_bombs(url: str, engine: StandIn, bomb: dict[str, object]) -> None:
    before = len(engine.asked)
    assert post(url, **bomb).status_code == 400
    assert len(engine.asked) == before


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"messages":' + b"[" * 200_000 + b"]" * 200_000 + b"}", 400),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400),
        (b"{" + b" " * 2_000_000 + b"}", 413),
        (b"", 400),
        (b"\xff\xfe", 400),
        (b"[1]", 400),
        (b'{"model": "llama", "temperature": NaN, "messages": [{"role": "user", "content": "a"}]}', 400),
        (b'{"model": "llama", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}], "\\ud801": 1}', 400),
    ],
    ids=["deep list", "deep object", "large", "empty", "no UTF-8", "list", "NaN", "surrogate", "surrogate key"],
)
def test_broken_bodies(url: str, body: bytes, status: int) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert refusal(response)[0] == status
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_large_body_in_pieces_is_cut_off(url: str) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 50_000

    try:
        response = httpx.post(f"{url}/v1/completions", content=endless(), headers={"content-type": "application/json"})
    except httpx.WriteError:  # the server hung up while we were still sending
        return
    assert response.status_code == 413


@pytest.mark.parametrize("name", ["../../etc", "/etc/passwd", "link", "llama/../alpaca", "", "llama\x00"])
def test_model_names_are_never_paths(url: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr("builtins.open", lambda path, *_: opened.append(path))
    monkeypatch.setattr("os.stat", lambda path, *_, **__: opened.append(path))
    response = post(url, model=name)
    monkeypatch.undo()
    assert refusal(response) == (404, "model_not_found")
    assert not opened


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "URL/x.png"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_id": "file:///etc/passwd"}},
        {"type": "text", "text": "a", "url": "URL"},
    ],
    ids=lambda part: str(part)[:50],
)
def test_parts_that_are_no_text_are_refused_and_nothing_is_fetched(
    url: str, part: dict[str, object], engine: StandIn
) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as outside:
        outside.settimeout(0.2)
        address = f"http://127.0.0.1:{outside.getsockname()[1]}"
        filled = json.loads(json.dumps(part).replace("URL", address))
        assert post(url, messages=[{"role": "user", "content": [filled]}]).status_code == 400
        with pytest.raises(TimeoutError):
            outside.accept()
    text = [{"type": "text", "text": "Who herds "}, {"type": "text", "text": "llamas?"}]
    assert post(url, messages=[{"role": "user", "content": text}]).status_code == 200
    assert "Who herds llamas?" in helpers.tokenizer().decode(engine.asked[-1][0])


def test_unknown_urls_and_methods(url: str) -> None:
    assert refusal(httpx.get(f"{url}/v1/nothing"))[0] == 404
    assert refusal(httpx.get(f"{url}/v1/chat/completions"))[0] == 405
    assert refusal(httpx.get(f"{url}/static/../app.py"))[0] == 404
    assert refusal(httpx.get(f"{url}/static/%2e%2e/app.py"))[0] == 404


def test_what_another_sites_page_can_send_is_refused(url: str) -> None:
    """A form or a text/plain fetch needs no leave from the server; JSON does, and the server gives none."""
    body = json.dumps({"model": "llama", "messages": ASK})
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert httpx.post(f"{url}/v1/chat/completions", content=body, headers={"content-type": kind}).status_code == 400
    asking = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    response = httpx.options(f"{url}/v1/chat/completions", headers=asking)
    assert response.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control")]


# Limits --------------------------------------------------------------------------------------------------------------


def test_a_full_queue_is_429_while_health_answers() -> None:
    engine = StandIn(script)
    state = state_of(engine, limit=2)
    with serving(state) as url:
        slow = {"model": "llama", "messages": [{"role": "user", "content": "slowly"}], "stream": True}
        with (
            httpx.stream("POST", f"{url}/v1/chat/completions", json=slow),
            httpx.stream("POST", f"{url}/v1/chat/completions", json=slow),
        ):
            response = post(url)
            assert refusal(response) == (429, "rate_limit_exceeded")
            assert int(response.headers["retry-after"]) >= 1
            began = time.monotonic()
            assert httpx.get(f"{url}/health").status_code == 200
            assert time.monotonic() - began < 0.5
        until(lambda: state.samples == 0)
        assert post(url).status_code == 200
        assert refusal(post(url, n=3))[0] == 400  # would never find room


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(engine: StandIn, url: str, stream: bool) -> None:
    before = len(engine.cancelled)
    slow = {"model": "llama", "messages": [{"role": "user", "content": "slowly"}], "stream": stream}
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.3) as client:
        if stream:
            with client.stream("POST", f"{url}/v1/chat/completions", json=slow) as response:
                next(response.iter_lines())
                raise httpx.ReadTimeout("enough")
        client.post(f"{url}/v1/chat/completions", json=slow)
    until(lambda: len(engine.cancelled) == before + 1)
    until(lambda: engine.running == 0)


def test_a_dead_engine_is_503_and_an_answer_under_way_ends() -> None:
    engine = StandIn(script)
    with serving(state_of(engine)) as url:
        assert httpx.get(f"{url}/ready").status_code == 200
        found: list[httpx.Response] = []
        waiting = threading.Thread(
            target=lambda: found.append(post(url, messages=[{"role": "user", "content": "slowly"}]))
        )
        waiting.start()
        until(lambda: engine.running == 1)
        engine.alive = False
        waiting.join(5)
        assert refusal(found[0]) == (503, "engine_dead")
        assert refusal(post(url)) == (503, "engine_dead")
        assert refusal(httpx.get(f"{url}/ready")) == (503, "engine_dead")
        assert refusal(httpx.get(f"{url}/health")) == (503, "engine_dead")


def test_many_streams_are_not_mixed() -> None:
    """200 clients at once; each gets its own words."""

    def echo(prompt: Sequence[int], sampling: Sampling, sample: int) -> Script:
        words = helpers.tokenizer().decode(prompt).split()[1:-1]
        return Script([f"{word} " for word in words], delay=0.01)

    found: dict[int, str] = {}
    with serving(state_of(StandIn(echo))) as url:

        def ask(i: int) -> None:
            body = {
                "model": "llama",
                "messages": [{"role": "user", "content": f"the {i} goat {i * i}"}],
                "stream": True,
            }
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as response:
                lines = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
            found[i] = "".join(choice["delta"].get("content", "") for line in lines for choice in line["choices"])

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert found == {i: f"the {i} goat {i * i} " for i in range(200)}


# Keys, hosts, other clients ------------------------------------------------------------------------------------------


def test_curl(url: str) -> None:
    body = json.dumps({"model": "llama", "messages": ASK, "stream": True})
    command = ["curl", "-sN", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    said = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "") for line in lines[:-2]]
    assert "".join(said) == ANSWER


def test_rules_of_hosts(engine: StandIn) -> None:
    with serving(state_of(engine), Rules(hosts=("localhost", "127.0.0.1", "::1"))) as url:
        for host in ("127.0.0.1", "localhost:1234", "[::1]:80", "LOCALHOST"):
            assert httpx.get(f"{url}/health", headers={"host": host}).status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example", ""):
            assert refusal(httpx.get(f"{url}/", headers={"host": host})) == (400, "invalid_host")

"""`puna serve` as a process: keys, logs, metrics, scores, signals."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from puna import parallel
from puna.config import ConfigError
from puna.serve import replies, server
from puna.serve.guard import JSONLines, Rules, read_keys
from puna.serve.server import ServeConfig
from puna.types import Dialog
from tests import helpers
from tests.serve.stand_in import Script, StandIn, serving, state_of, until

ASK = {"model": "llama", "messages": [helpers.user("Who herds llamas?")]}
PROGRAM = """
import sys
from pathlib import Path
from puna.serve import server
from puna.serve.server import ServeConfig
from tests.serve.stand_in import Script, StandIn, state_of

script = Script(["so "] * 30, delay=0.05)
server.open_models = lambda cfg: state_of(StandIn(lambda *_: script)).models
server.run(ServeConfig(Path("llama"), port=int(sys.argv[1]), drain_seconds=float(sys.argv[2])))
"""

DYING = """
import sys
from pathlib import Path
from puna.generate.live import LiveEngine
from puna.model.transformer import Transformer
from puna.serve import server
from puna.serve.answers import Served
from puna.serve.server import ServeConfig
from tests import helpers

class Dying(Transformer):
    def hidden(self, *arguments, **named):
        self.left -= 1
        if not self.left:
            raise RuntimeError("out of luck")
        return super().hidden(*arguments, **named)

model = helpers.talker(end=1e-6)
model.__class__, model.left = Dying, 30
server.open_models = lambda cfg: {"llama": Served("llama", LiveEngine(model, helpers.tokenizer()), 8)}
server.run(ServeConfig(Path("llama"), port=int(sys.argv[1]), drain_seconds=float(sys.argv[2])))
"""


# The config ----------------------------------------------------------------------------------------------------------


def test_names_are_the_last_part_that_says_something(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").touch()
    assert server.name_of(tmp_path / "tiny.gguf") == "tiny"
    assert server.name_of(Path("runs/laptop/")) == "laptop"
    assert server.name_of(Path("runs/laptop/v5/ppo/model")) == "ppo"


@pytest.mark.parametrize(
    "change", [{"max_concurrent": 0}, {"max_queue": -1}, {"cache_tokens": -1}, {"port": 99999}, {"drain_seconds": -1.0}]
)
def test_settings_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        ServeConfig(Path("llama"), **change)  # type: ignore[arg-type]


def test_models_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    chat, reward = helpers.talker_folder(tmp_path / "chat"), helpers.reward_folder(tmp_path / "reward")
    with pytest.raises(ConfigError, match="serve it with --reward-helpfulness"):
        server.open_models(ServeConfig(reward))
    with pytest.raises(ConfigError, match="two models would be called 'chat'"):
        server.open_models(ServeConfig(chat, also=(chat,)))
    with pytest.raises(ConfigError, match="is a chat model"):
        server.open_rewards(ServeConfig(chat, reward_safety=chat))


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("example.org", False)],
)
def test_loopback(host: str, expected: bool) -> None:
    assert server.is_loopback(host) is expected


def test_a_port_that_is_taken_is_named_before_a_model_is_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use"):
            server.run(ServeConfig(Path("no model"), port=port))


def test_two_servers_do_not_take_one_port() -> None:
    with server.listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="Address already in use"):
        server.listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "allowed", "expected"),
    [
        ("127.0.0.2", (), (*server.LOOPBACK, "127.0.0.2")),
        ("0.0.0.0", (), ()),
        ("0.0.0.0", ("Puna.Example.org",), ("puna.example.org",)),
    ],
)
def test_hosts_that_are_answered(host: str, allowed: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert server.hosts_of(ServeConfig(Path("llama"), host=host, allowed_hosts=allowed)) == expected


def test_a_cache_that_outgrows_the_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = helpers.talker_folder(tmp_path / "chat")
    least = 6 * 64  # tokens; each has 2 layers of 2 heads' keys and values, 8 wide, in float32
    monkeypatch.setattr(parallel, "memory_of", lambda device: least * 256)
    with pytest.raises(ConfigError, match=r"set --cache-tokens \(a token takes 0 KiB\)"):
        server.open_models(ServeConfig(chat))
    [model] = server.open_models(ServeConfig(chat, cache_tokens=least)).values()
    model.engine.close()


# Keys ----------------------------------------------------------------------------------------------------------------


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n{hashlib.sha256(b'one').hexdigest()}  # Ana\n\n")
    monkeypatch.setenv("PUNA_API_KEYS", "two, three,")
    with serving(state_of(StandIn()), Rules(keys=read_keys(file))) as url:

        def status(header: str, path: str = "/v1/models") -> int:
            return httpx.get(f"{url}{path}", headers={"authorization": header} if header else {}).status_code

        assert [status(f"Bearer {key}") for key in ("one", "two", "three")] == [200] * 3
        assert [status(header) for header in ("", "Bearer", "Bearer four", "one", "Basic one")] == [401] * 5
        assert status("", "/chat/settings") == 401
        assert [status("", path) for path in ("/", "/health", "/ready", "/metrics", "/static/chat.js")] == [200] * 5
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="bad", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError) as refused,
        ):
            client.models.list()
        assert refused.value.code == "invalid_api_key"


@pytest.mark.parametrize(("text", "message"), [("secret\n", "line 1: not the sha256"), ("# none\n", "holds no key")])
def test_files_of_keys_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_keys(tmp_path / "keys")


# What operators see --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_log_holds_prompts_only_when_told(log_prompts: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "puna.serve")
    with serving(state_of(StandIn(), log_prompts=log_prompts)) as url:
        response = httpx.post(f"{url}/v1/chat/completions", json=ASK)
        httpx.post(f"{url}/v1/chat/completions", json=ASK | {"stream": True})
        httpx.post(f"{url}/v1/chat/completions", json=ASK | {"messages": [helpers.user("llamas [INST]")]})
        until(lambda: len(caplog.records) >= 3)
    records = [record for record in caplog.records if record.name == "puna.serve"]
    whole, streamed, refused = [json.loads(JSONLines().format(record)) for record in records]
    for line in (whole, streamed):
        assert (line["path"], line["status"], line["model"]) == ("/v1/chat/completions", 200, "llama")
        assert line["prompt_tokens"] > 5 and line["completion_tokens"] > 5 and line["finished"]
    assert response.headers["x-request-id"] == whole["id"]
    assert refused["status"] == 400
    assert ("llamas" in json.dumps([whole, streamed, refused])) == log_prompts


def test_metrics() -> None:
    with serving(state_of(StandIn(lambda *_: Script(delay=0.02)))) as url:
        for stream in (False, True):
            httpx.post(f"{url}/v1/chat/completions", json=ASK | {"stream": stream, "n": 2})
        httpx.get(f"{url}/v1/../../secret{'x' * 50}")
        text = httpx.get(f"{url}/metrics").text
    numbers = {m[1]: float(m[2]) for m in re.finditer(r"^(\S+) (\S+)$", text, re.MULTILINE)}
    assert numbers['puna_requests_total{path="/v1/chat/completions",status="200"}'] == 2
    assert numbers['puna_requests_total{path="other",status="404"}'] == 1
    assert numbers['puna_time_to_first_token_seconds_count{model="llama"}'] == 4
    assert numbers['puna_inter_token_seconds_count{model="llama"}'] > 4
    assert numbers['puna_generated_tokens_total{model="llama"}'] > 20
    assert numbers['puna_samples_running{model="llama"}'] == 0
    assert numbers['puna_cache_capacity_tokens{model="llama"}'] == 4096
    assert {"puna_samples_waiting", "puna_cache_tokens"} <= {name.partition("{")[0] for name in numbers}


def test_what_nobody_foresaw_is_500_with_an_id(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "puna.serve")
    monkeypatch.setattr(replies, "listed", lambda models: 1 / 0)
    with serving(state_of(StandIn())) as url:
        response = httpx.get(f"{url}/v1/models")
        assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
        assert response.headers["content-security-policy"]
        assert 'puna_requests_total{path="/v1/models",status="500"} 1.0' in httpx.get(f"{url}/metrics").text
    # The server has ended: its line comes after the answer.
    [record, _] = [record for record in caplog.records if record.name == "puna.serve"]
    line = json.loads(JSONLines().format(record))
    assert (line["status"], line["id"]) == (500, response.headers["x-request-id"])


def test_scores() -> None:
    seen: list[Dialog] = []

    def reward(dialogs: list[Dialog]) -> torch.Tensor:
        seen.extend(dialogs)
        return torch.full((len(dialogs),), 0.25)

    dialog = [helpers.user("Who herds llamas?"), helpers.assistant("Shepherds.")]
    with serving(state_of(StandIn(), rewards={"safety": reward})) as url:
        found = httpx.post(f"{url}/v1/score", json={"messages": dialog}).json()
        assert found == {"object": "score", "scores": {"safety": 0.25}}
        assert seen == [dialog]
        assert httpx.post(f"{url}/v1/score", json={"messages": []}).status_code == 400
    with serving(state_of(StandIn())) as url:
        assert httpx.post(f"{url}/v1/score", json={"messages": dialog}).status_code == 404


def test_scores_are_computed_one_by_one_and_hold_up_the_end() -> None:
    at_once, most = 0, 0

    def reward(dialogs: list[Dialog]) -> torch.Tensor:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.1)
        at_once -= 1
        return torch.tensor([0.25])

    state = state_of(StandIn(), rewards={"safety": reward})
    dialog = [helpers.user("Who herds llamas?"), helpers.assistant("Shepherds.")]
    with serving(state) as url:
        ask = threading.Thread(target=httpx.post, args=(f"{url}/v1/score",), kwargs={"json": {"messages": dialog}})
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/score", json={"messages": dialog}, timeout=0.02)
        ask.start()
        until(lambda: state.busy)
        assert httpx.post(f"{url}/v1/score", json={"messages": dialog}).status_code == 200
        ask.join(5)
        assert not state.busy
    assert most == 1


def test_a_real_reward_model_scores(tmp_path: Path) -> None:
    rewards = server.open_rewards(ServeConfig(Path("-"), reward_safety=helpers.reward_folder(tmp_path / "reward")))
    dialog = [helpers.user("Who herds llamas?"), helpers.assistant("Shepherds.")]
    with serving(state_of(StandIn(), rewards=rewards)) as url:
        score = httpx.post(f"{url}/v1/score", json={"messages": dialog}).json()["scores"]["safety"]
        assert 0 < score < 1 and score == pytest.approx(float(rewards["safety"]([dialog])[0]))
        wrong = httpx.post(f"{url}/v1/score", json={"messages": dialog[:1]})
        assert wrong.status_code == 400 and "must end with the assistant's turn" in wrong.json()["error"]["message"]
        longer = [helpers.user("Who herds llamas? " * 300), dialog[1]]
        wrong = httpx.post(f"{url}/v1/score", json={"messages": longer})
        assert wrong.status_code == 400 and "the model reads 256" in wrong.json()["error"]["message"]


def test_what_is_written_is_sent_at_once() -> None:
    """Else an answer waits for the client's delayed acknowledgement, some 40 ms."""
    listening = server.listen("127.0.0.1", 0)

    async def accepted() -> int:
        found = asyncio.get_running_loop().create_future()
        made = await asyncio.start_server(lambda _, writer: found.set_result(writer), sock=listening)
        async with made:
            _, writer = await asyncio.open_connection(*listening.getsockname())
            theirs: asyncio.StreamWriter = await found
            value: int = theirs.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()
            theirs.close()
            return value

    assert asyncio.run(accepted())


def test_every_answer_forbids_what_a_page_need_not_do() -> None:
    with serving(state_of(StandIn())) as url:
        for path in ("/", "/static/chat.js", "/v1/models", "/nothing"):
            headers = httpx.get(f"{url}{path}").headers
            assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
            assert headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"https?://(?!www.w3.org)", "".join(_page(url)))


def test_the_page_is_in_the_package(root: Path) -> None:
    """What index.html and its scripts name is there, and nothing else."""
    static = root / "src/puna/serve/static"
    named = re.findall(r"/static/([\w.]+)", (static / "index.html").read_text())
    named += re.findall(r'from "\./([\w.]+)"', "".join(path.read_text() for path in static.glob("*.js")))
    assert set(named) == {path.name for path in static.iterdir()} - {"index.html"}


def _page(url: str) -> Iterator[str]:
    """Everything the page is made of: it names no other server."""
    for path in ("/", *(f"/static/{name}" for name in ("chat.js", "api.js", "store.js", "view.js", "style.css"))):
        text = httpx.get(f"{url}{path}").text
        assert "innerHTML" not in text
        yield text


# Signals -------------------------------------------------------------------------------------------------------------


@contextmanager
def process(
    root: Path, drain_seconds: float = 30.0, port: int = 0, program: str = PROGRAM
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server in a process of its own, and its address."""
    port = port or _free_port()
    command = [sys.executable, "-c", program, str(port), str(drain_seconds)]
    running = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: _answers(url) or running.poll() is not None, 60)
        assert running.poll() is None, running.communicate()[1]
        yield running, url
    finally:
        running.kill()
        running.communicate()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


def _events(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(root: Path) -> None:
    with process(root) as (running, url):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=ASK | {"stream": True}) as response:
            running.send_signal(signal.SIGTERM)
            until(lambda: not _answers(url))
            refused = httpx.post(f"{url}/v1/chat/completions", json=ASK)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert "retry-after" in refused.headers
            assert httpx.get(f"{url}/health").status_code == 200
            events = _events(response)
        assert events[-1]["choices"][0]["finish_reason"] == "stop"
        assert running.wait(10) == 0
        assert running.stderr and '"event": "draining"' in running.stderr.read()


def test_draining_ends_in_time_with_an_error_that_clients_can_read(root: Path) -> None:
    with process(root, drain_seconds=0.3) as (running, url):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=ASK | {"stream": True}) as response:
            began = time.monotonic()
            running.send_signal(signal.SIGTERM)
            assert _events(response)[-1]["error"]["code"] == "shutting_down"
        assert running.wait(10) == 0
        assert time.monotonic() - began < 3


def test_an_engine_that_dies_tells_its_clients_and_ends_the_process(root: Path) -> None:
    with process(root, program=DYING) as (running, url):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=ASK | {"stream": True}) as response:
            events = _events(response)
        assert len(events) > 10
        assert events[-1]["error"]["code"] == "engine_error"
        assert running.wait(10) == 1
        assert running.stderr
        lines = running.stderr.read().splitlines()
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    died = {line["event"]: line for line in logged if line["level"] == "error"}
    assert "RuntimeError: out of luck" in died["thread died"]["error"]
    assert died["engine dead"]["models"] == ["llama"]
    assert lines[-1] == "RuntimeError: the engine of 'llama' has died: its error is in the log"
    with process(root, port=int(url.rpartition(":")[2])) as (_, again):
        assert again == url


def test_after_sigkill_the_client_hears_of_it_and_the_next_server_starts(root: Path) -> None:
    with process(root) as (running, url), openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        with client.chat.completions.create(**ASK, stream=True) as stream:  # type: ignore[call-overload]
            next(iter(stream))
            running.kill()
            with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError)):
                list(stream)
        with process(root, port=int(url.rpartition(":")[2])) as (_, again):
            assert again == url
            assert client.chat.completions.create(**ASK).choices[0].message.content  # type: ignore[call-overload]

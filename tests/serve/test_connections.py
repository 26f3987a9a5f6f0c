"""Clients that dawdle: with half a request, or without reading what they asked for."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import httpx
import pytest

from puna.serve import connections, guard
from puna.serve.app import State
from puna.serve.connections import Connection
from tests import helpers
from tests.serve.stand_in import Script, StandIn, serving, state_of, until

BODY = json.dumps({"model": "llama", "messages": [helpers.user("hello")], "stream": True})
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
WHOLE = f"{HEAD}Content-Length: {len(BODY)}\r\n\r\n{BODY}"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SECONDS_FOR_A_HEAD", 0.4)
    monkeypatch.setattr(connections, "SECONDS_FOR_A_READER", 0.4)
    monkeypatch.setattr(guard, "SECONDS_FOR_A_BODY", 0.4)


@pytest.fixture
def state() -> State:
    return state_of(StandIn(lambda *_: Script(["so "] * 12, delay=0.1)), limit=2)


@pytest.fixture
def connect(state: State) -> Iterator[Callable[[], socket.socket]]:
    """New connections to a server, closed in the end."""
    opened: list[socket.socket] = []
    with serving(state) as url:

        def connected() -> socket.socket:
            opened.append(socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5))
            return opened[-1]

        yield connected
        for one in opened:
            one.close()


def heard(client: socket.socket) -> bytes:
    """All that comes until the server hangs up."""
    found = b""
    try:
        while piece := client.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


@pytest.mark.parametrize("sent", ["", "POST /v1/ch", f"{HEAD}Content-Le"])
def test_half_a_head_is_cut_off(connect: Callable[[], socket.socket], sent: str) -> None:
    client = connect()
    client.sendall(sent.encode())
    began = time.monotonic()
    assert heard(client) == b""
    assert 0.2 < time.monotonic() - began < 3


def test_a_head_that_comes_letter_by_letter_is_cut_off(connect: Callable[[], socket.socket]) -> None:
    client = connect()
    began = time.monotonic()
    with pytest.raises(OSError):
        for letter in HEAD * 10:
            client.sendall(letter.encode())
            time.sleep(0.02)
    assert time.monotonic() - began < 3


def test_a_second_request_has_no_more_time_than_the_first(connect: Callable[[], socket.socket]) -> None:
    client = connect()
    client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    found = b""
    while b'{"status":"ok"}' not in found:
        found += client.recv(65536)
    client.sendall(b"GET /health HT")
    assert heard(client) == b""


def test_half_a_body_is_408(connect: Callable[[], socket.socket], state: State) -> None:
    client = connect()
    client.sendall(WHOLE[:-5].encode())
    assert b" 408 " in client.recv(65536)
    assert state.samples == 0


def test_an_answer_may_last_longer_than_the_limits(connect: Callable[[], socket.socket]) -> None:
    client = connect()
    client.sendall(WHOLE.replace("Host", "Connection: close\r\nHost").encode())
    assert b"data: [DONE]" in heard(client)


@contextlib.contextmanager
def unread(url: str) -> Iterator[None]:
    """A client that asks, and takes next to nothing of its answer."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        client.sendall(WHOLE.encode())
        yield


def test_a_sample_that_has_ended_makes_room_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SECONDS_FOR_A_READER", 30)
    engine = StandIn(lambda *_: Script(["so " * 300_000] * 20))
    monkeypatch.setattr(engine, "_tokens", lambda *_: ())
    state = state_of(engine, limit=1)
    with serving(state) as url, unread(url):
        until(lambda: len(engine.asked) == 1 and state.samples == 0)
        assert state.busy and not engine.cancelled


def test_a_client_that_does_not_read_loses_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = StandIn(lambda *_: Script(["so " * 30_000] * 1000, delay=0.005))
    monkeypatch.setattr(engine, "_tokens", lambda *_: ())
    state = state_of(engine, limit=1)
    with serving(state) as url, unread(url):
        until(lambda: state.samples == 1)
        until(lambda: state.samples == 0)
        assert engine.cancelled
        assert httpx.get(f"{url}/health").status_code == 200


class Transport:
    """Holds so many bytes at each look, and may be cut off."""

    def __init__(self, *held: int) -> None:
        self.held, self.aborted = list(held), False

    def get_write_buffer_size(self) -> int:
        return self.held.pop(0) if len(self.held) > 1 else self.held[0]

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize(("held", "looks"), [((900, 900), 1), ((900, 500, 500, 100, 100, 100), 3)])
def test_a_reader_is_cut_off_once_it_takes_no_more(held: tuple[int, ...], looks: int) -> None:
    connection, timers = Connection.__new__(Connection), list[Callable[[], None]]()
    connection.transport = transport = Transport(*held)  # type: ignore[assignment]
    connection.loop = SimpleNamespace(call_later=lambda seconds, look: timers.append(look))  # type: ignore[assignment]
    connection._await_reader()
    for look in range(looks):
        assert not transport.aborted
        timers[look]()
    assert transport.aborted and len(timers) == looks

"""200 clients that stream at once, against `puna serve` in a process of its own: -m slow -s shows the numbers.

PUNA_SERVE_MODEL names the model, a few thousand weights without it; PUNA_SERVE_SECONDS how long (10).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from puna.serve.server import name_of
from tests import helpers
from tests.serve.stand_in import until

CLIENTS, QUESTIONS, TOKENS = 200, 50, 48


@dataclass
class Seen:
    """What the clients saw."""

    answers: dict[int, set[str]] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    tokens: int = 0


async def ask(port: int, model: str, question: int, seen: Seen) -> None:
    """One streamed answer to a question, whose seed is its number; by hand, for the clients' own work to stay small."""
    body = {"model": model, "messages": [helpers.user(f"Question {question}?")], "max_tokens": TOKENS, "stream": True}
    text = json.dumps(body | {"seed": question, "stream_options": {"include_usage": True}})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
    status = int((await reader.readline()).split()[1])
    seen.statuses[status] += 1
    said, ended = "", False
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            for choice in event["choices"]:
                piece = choice["delta"].get("content", "")
                if piece and not said:
                    seen.first.append(time.monotonic() - began)
                said += piece
            seen.tokens += (event["usage"] or {}).get("completion_tokens", 0) if "usage" in event else 0
        ended = ended or line.startswith(b"data: [DONE]")
    writer.close()
    if status == 200:
        assert ended, "an answer was cut off"
        seen.answers.setdefault(question, set()).add(said)


async def crowd(port: int, pid: int, model: str, seconds: float, clients: int = CLIENTS) -> Seen:
    """Clients that ask again and again, while another looks at health and memory."""
    seen, deadline = Seen(), time.monotonic() + seconds

    async def client(number: int) -> None:
        turn = 0
        while time.monotonic() < deadline:
            await ask(port, model, (number * 7 + turn) % QUESTIONS, seen)
            turn += 1

    async def watch() -> None:
        url, write = f"http://127.0.0.1:{port}/health", "%{http_code} %{time_total}"
        while time.monotonic() < deadline:  # in a process of its own, which this one's work does not hold up
            curl = await asyncio.create_subprocess_exec(
                "curl", "-s", "-o", os.devnull, "-w", write, url, stdout=subprocess.PIPE
            )
            status, took = (await curl.communicate())[0].split()
            assert status == b"200"
            seen.health.append(float(took))
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            seen.memory.append(pages * os.sysconf("SC_PAGE_SIZE"))
            await asyncio.sleep(0.2)

    await asyncio.gather(watch(), *(client(i) for i in range(clients)))
    return seen


@pytest.mark.slow
def test_two_hundred_streams(tmp_path: Path, root: Path) -> None:
    folder = Path(os.environ.get("PUNA_SERVE_MODEL") or helpers.talker_folder(tmp_path / "talker", end=0.01))
    seconds = float(os.environ.get("PUNA_SERVE_SECONDS", 10))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "puna", "serve", str(folder), "--port", str(port), "--max-queue", str(CLIENTS)]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, cwd=root, stderr=log) as running:
        try:
            until(lambda: _ready(port), 60)
            model = name_of(folder)
            seen = asyncio.run(crowd(port, running.pid, model, seconds))
            too_many = asyncio.run(crowd(port, running.pid, model, 1.0, clients=400))
            alone = Seen()
            for question in range(QUESTIONS):
                asyncio.run(ask(port, model, question, alone))
        finally:
            running.terminate()
        assert running.wait(40) == 0
    settled = seen.memory[len(seen.memory) // 2 :]
    health = [1000 * took for took in seen.health]
    print(f"\n{model}: {sum(seen.statuses.values())} answers in {seconds:.0f} s, {seen.tokens / seconds:.0f} tokens/s")
    print(f"first token: median {statistics.median(seen.first):.3f} s, 99 % {_at(seen.first, 0.99):.3f} s")
    print(f"health: median {statistics.median(health):.0f} ms, 95 % {_at(health, 0.95):.0f}, most {max(health):.0f}")
    print(f"memory: {[round(seen.memory[i] / 2**20) for i in (0, len(seen.memory) // 2, -1)]} MiB at start, half, end")
    assert seen.statuses.keys() == {200}
    told = [text for texts in seen.answers.values() for text in texts]
    assert len(told) == len(set(told)), "an answer went to two questions"
    # A batch rounds otherwise than a sequence alone: now and then a draw falls on the other side of a boundary.
    same = sum(alone.answers[question] == texts for question, texts in seen.answers.items())
    assert same >= 0.9 * len(seen.answers), "answers are not those that a question gets alone"
    assert too_many.statuses[429] and too_many.statuses.keys() == {200, 429}
    assert max(health) < 100
    assert settled[-1] < 1.1 * settled[0]


def _at(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def _ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
    except httpx.TransportError:
        return False

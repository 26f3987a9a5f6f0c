"""What stands before every request, as ASGI middleware: an id and a log line, the host, the key, the body's size.

A page of another site can make a browser send requests here. It cannot read answers (there is no CORS), it cannot
send JSON without asking first, and where it makes its own name point to this machine (DNS rebinding), the Host header
tells.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from puna.config import ConfigError
from puna.serve import errors
from puna.serve.errors import APIError
from puna.serve.metrics import Metrics

log = logging.getLogger("puna.serve")

KEYS_VARIABLE = "PUNA_API_KEYS"
PROTECTED = ("/v1/", "/chat/")
"""What a key opens; the page itself, health and metrics hold no secret."""
SECONDS_FOR_A_BODY = 30.0
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Rules:
    """What the guard lets through: no keys means no key is asked for, no hosts that every name is good."""

    keys: frozenset[str] = frozenset()
    hosts: tuple[str, ...] = ()
    max_body_bytes: int = 1_000_000
    draining: Callable[[], bool] = lambda: False


def read_keys(file: Path | None) -> frozenset[str]:
    """The sha256 of every key: a file's lines, and the keys that the environment names, parted by commas."""
    lines = file.read_text(encoding="utf-8").splitlines() if file else []
    hashes = {}
    for number, line in enumerate(lines, start=1):
        word = line.partition("#")[0].strip().lower()
        if word and not re.fullmatch(r"[0-9a-f]{64}", word):
            raise ConfigError(f"{file}, line {number}: not the sha256 of a key: printf %s KEY | sha256sum gives it")
        if word:
            hashes[word] = number
    if file and not hashes:
        raise ConfigError(f"{file}: holds no key: a line is the sha256 of one")
    named = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
    return frozenset(hashes) | {_sha256(key.encode()) for key in named if key}


class Guard:
    """The middleware; the app behind it sees only requests that pass."""

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics) -> None:
        self.app, self.rules, self.metrics = app, rules, metrics
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began = time.monotonic()
        note: dict[str, Any] = {"id": uuid.uuid4().hex, "method": scope["method"], "path": scope["path"]}
        scope["state"] = {**scope.get("state", {}), "note": note}  # what the routes want in the log

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                note["status"] = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = note["id"]
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
            if scope["path"].startswith(PROTECTED):
                receive = await self._body(scope, receive)  # no other route reads one
            if scope["method"] == "POST":
                # A millisecond's work each: hundreds that come at once take turns, and others are heard between them.
                async with self._turn:
                    await asyncio.sleep(0)
            await self.app(scope, receive, send_on)
        except APIError as error:
            await error.response()(scope, receive, send_on)
        except Exception:
            if "status" not in note:
                await errors.failed().response()(scope, receive, send_on)
            raise
        finally:
            self.metrics.requests.labels(_route(scope), note.get("status", 0)).inc()
            log.info("request", extra={"note": {**note, "seconds": round(time.monotonic() - began, 4)}})

    def _check(self, scope: Scope) -> None:
        """Raise what refuses a request by its head."""
        headers = Headers(scope=scope)
        host = re.sub(r":\d+$", "", headers.get("host", "")).strip("[]").lower()
        if self.rules.hosts and host not in self.rules.hosts:
            raise errors.invalid("this name is not one the server answers to: see --allowed-hosts", code="invalid_host")
        if not scope["path"].startswith(PROTECTED):
            return
        if self.rules.keys:
            _check_key(headers.get("authorization", ""), self.rules.keys)
        if scope["method"] == "POST" and self.rules.draining():
            raise errors.unavailable("the server is shutting down", "shutting_down")

    async def _body(self, scope: Scope, receive: Receive) -> Receive:
        """A `receive` that gives the whole body, read within the limits, and then what the client does."""
        limit = self.rules.max_body_bytes
        too_large = APIError(413, f"the body is larger than {limit} bytes", code="body_too_large")
        announced = Headers(scope=scope).get("content-length", "0")
        if not announced.isdigit() or int(announced) > limit:
            raise too_large
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(SECONDS_FOR_A_BODY):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError:
            raise APIError(408, f"the body did not come within {SECONDS_FOR_A_BODY:.0f} seconds") from None
        waiting = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        return replay


class JSONLines(logging.Formatter):
    """A log record as a line of JSON; the time is UTC."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        line: dict[str, Any] = {"time": when, "level": record.levelname.lower()}
        line |= {"event": record.getMessage(), **getattr(record, "note", {})}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _check_key(header: str, keys: Collection[str]) -> None:
    """Raise 401 unless the header brings a key. Hashes are compared: their order says nothing about a key."""
    scheme, _, key = header.partition(" ")
    if scheme.lower() != "bearer" or _sha256(key.strip().encode()) not in keys:
        raise APIError(
            401,
            "no valid API key: send the header 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _route(scope: Scope) -> str:
    """The route's path: one of few, whatever clients ask for."""
    return getattr(scope.get("route"), "path", "other")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

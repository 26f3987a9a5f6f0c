"""What the server answers when it refuses: OpenAI's error shape, `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

INVALID, UNAVAILABLE = "invalid_request_error", "server_error"


class ErrorDetail(BaseModel):
    """The inside of an error, for the schema."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error as clients read it, for the schema."""

    error: ErrorDetail


class APIError(Exception):
    """A refusal: the HTTP status and what OpenAI's shape says of it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON; pure ASCII, so that a quoted name can hold anything."""
        kind = INVALID if self.status < 500 else UNAVAILABLE
        detail = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": detail}).encode("ascii")

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def invalid(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """400: the request cannot be served as it is."""
    return APIError(400, message, code=code, param=param)


def unavailable(message: str, code: str, seconds: int = 5) -> APIError:
    """503: not now; the client may try again."""
    return APIError(503, message, code=code, headers={"Retry-After": str(seconds)})


def busy(message: str) -> APIError:
    """429: too much at once; the client may try again."""
    return APIError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})


def failed() -> APIError:
    """500: what nobody thought of."""
    return APIError(500, "the server failed; its log says how", code="internal_error")


def engine_dead(name: str) -> APIError:
    """503: a model's engine has ended."""
    return unavailable(f"the engine of {name!r} has stopped: the server must be started again", "engine_dead")


def install(app: FastAPI) -> None:
    """Every refusal of the app in OpenAI's shape; what it did not foresee is the guard's."""

    @app.exception_handler(APIError)
    async def refused(request: Request, error: APIError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def ill_formed(request: Request, error: RequestValidationError) -> Response:
        return _of_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def unknown_url(request: Request, error: HTTPException) -> Response:
        return APIError(error.status_code, str(error.detail), headers=error.headers).response()


def _of_validation(found: Sequence[Any]) -> APIError:
    """The first thing pydantic found wrong; where a field may be of several types, in the one that fitted furthest."""
    first = max(found, key=lambda error: len(_place(error)))
    where = ".".join(_place(first))
    if first["type"] == "extra_forbidden":
        return invalid(f"unknown parameter {where!r}", where, "unknown_parameter")
    if first["type"] == "json_invalid":
        return invalid("the body is not JSON")
    if not where:
        return invalid("the body must be a JSON object, sent as application/json")
    return invalid(f"{where}: {first['msg'].removeprefix('Value error, ')}", where, "invalid_value")


def _place(error: Any) -> list[str]:
    """The fields and indices that lead to an error, without pydantic's names for the types that a field may have."""
    parts = [str(part) for part in error["loc"][1:]]
    last = parts[-1:] if error["type"] == "extra_forbidden" else []  # a client's own word, whatever it looks like
    named = parts[: len(parts) - len(last)]
    return [part for part in named if part != "str" and not part.startswith("constrained-") and part[-1:] != "]"] + last

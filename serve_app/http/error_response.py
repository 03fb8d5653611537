"""Every error as the OpenAI API shapes it: `{"error": {"message", "type", "param", "code"}}`."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import EngineDeadError, InvalidRequest, SlipstreamError
from serve_app.errors import (
    GenerationError,
    Overload,
    OverloadedError,
    TimedOutError,
    TimeLimit,
    UnavailableError,
)

logger = logging.getLogger(__name__)

MAX_MESSAGE_CHARS = 500  # a message may quote what the client sent
CLIENT_GONE = 499  # nobody reads it; access logs and metrics do

_TYPES = {429: "rate_limit_error", 503: "service_unavailable_error"}


class RefusedError(SlipstreamError):
    """A request refused with a status of its own (404, 413, 415, 431), before its fields are looked at."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


@dataclass(frozen=True)
class ErrorAnswer:
    """What the client is told about an error, as a response or as the last event of a stream."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": clipped(self.message), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


def answer_to(error: BaseException, request_id: str) -> ErrorAnswer:
    """The answer to `error`. What nobody foresaw is logged with its traceback, and the client gets only the id."""
    match error:
        case InvalidRequest():
            return ErrorAnswer(400, str(error), error.param, error.code)
        case RefusedError():
            # No "connection: close" after 413: the server would reset the connection of a client that is still
            # sending, which then never reads why. Kept open, the server drops what still comes.
            return ErrorAnswer(error.status, str(error), error.param, error.code)
        case OverloadedError():
            code = "rate_limit_exceeded" if error.reason is Overload.KEY_LIMIT else "overloaded"
            return ErrorAnswer(429, str(error), code=code, headers=_retry_after(error.retry_after_s))
        case TimedOutError(limit=TimeLimit.QUEUE):
            return ErrorAnswer(429, str(error), code="queue_timeout", headers=_retry_after(error.retry_after_s))
        case TimedOutError():
            # OpenAI's clients repeat what has failed with 504 unless they are told not to: it would only fail again.
            return ErrorAnswer(504, str(error), code="request_timeout", headers={"x-should-retry": "false"})
        case UnavailableError() | EngineDeadError():
            return ErrorAnswer(503, str(error), code="unavailable")
        case GenerationError():
            logger.error("request %s: the engine failed it: %s", request_id, error)
            return ErrorAnswer(500, str(error), code="generation_failed")
        case HTTPException():
            return ErrorAnswer(error.status_code, error.detail, headers=dict(error.headers or {}))
    logger.error("request %s failed", request_id, exc_info=error)
    return ErrorAnswer(500, f"internal error; quote request id {request_id} when you report it", code="internal_error")


def _retry_after(seconds: float) -> dict[str, str]:
    return {"retry-after": str(max(1, math.ceil(seconds)))}


async def handle_error(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for everything that `answer_to` knows."""
    return answer_to(error, request_id_of(request)).response()


async def handle_routing_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, in OpenAI's shape and naming what was asked for, and what there is: whoever has left
    out the /v1 sees it."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path}"
    paths = [route.path for route in request.app.routes if "{" not in route.path]
    codes = {
        404: ("unknown_url", f"unknown path: {asked}; there are {', '.join(paths)}"),
        405: ("method_not_allowed", f"wrong method: {asked}"),
    }
    code, message = codes.get(error.status_code, (None, error.detail))
    return ErrorAnswer(error.status_code, message, code=code, headers=dict(error.headers or {})).response()


async def handle_client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers=headers, media_type="application/json")


def request_id_of(request: Request) -> str:
    """The id that `serve_app.http.middleware` gave this HTTP request."""
    request_id = request.scope["slipstream.request_id"]
    assert isinstance(request_id, str)
    return request_id


def clipped(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 1] + "…"

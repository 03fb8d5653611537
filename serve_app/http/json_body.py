"""Reading a JSON body that may be anything: too long, too deep, not JSON at all."""

import re
from typing import Any

import orjson
from starlette.requests import Request

from engine.errors import InvalidRequest
from serve_app.http.error_response import RefusedError
from serve_app.http.limits import MAX_BODY_BYTES, MAX_JSON_CONTAINERS, MAX_JSON_DEPTH

# curl sends form-urlencoded unless told otherwise, many scripts send nothing or text/plain: all mean JSON here.
_ACCEPTED_TYPES = re.compile(r"|text/(plain|json)|application/((.+\+)?json|x-www-form-urlencoded|octet-stream)")

# One match is everything up to the next run of brackets outside strings. Possessive, so that it neither backtracks
# nor keeps state; an unterminated string reaches to the end, so that no text is scanned twice.
_NEXT_BRACKETS = re.compile(
    rb'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z))*+([\[\]{}]++|\Z)',
    re.DOTALL,
)


async def read_json(request: Request, max_bytes: int = MAX_BODY_BYTES) -> Any:
    """The parsed body.

    Raises:
        RefusedError: longer than `max_bytes` (413; not read any further), or declared to be something else (415).
        InvalidRequest: not JSON, or nested too deeply.
        starlette.requests.ClientDisconnect: the client left before it had sent everything.
    """
    _check_declared(request, max_bytes)
    chunks: list[bytes] = []
    length = 0
    async for chunk in request.stream():
        length += len(chunk)
        if length > max_bytes:
            raise _too_large(max_bytes)
        chunks.append(chunk)
    body = b"".join(chunks)
    check_nesting(body)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None


def check_nesting(body: bytes, max_depth: int = MAX_JSON_DEPTH, max_containers: int = MAX_JSON_CONTAINERS) -> None:
    """Refuse deep or scattered JSON before anything is allocated for it: at most 0.7 s for the worst 32 MiB.

    Raises:
        InvalidRequest: more than `max_depth` levels or `max_containers` objects and arrays. What is not JSON may be
            refused for this too, or pass: the parser decides about it.
    """
    if body.count(b"[") + body.count(b"{") <= max_depth:
        return
    depth = num_brackets = 0
    for match in _NEXT_BRACKETS.finditer(body):
        run = match[1]
        num_brackets += len(run)
        if num_brackets > 2 * max_containers:
            raise InvalidRequest(f"the body has more than {max_containers} objects and arrays", code="json_too_complex")
        for bracket in run:
            depth += 1 if bracket in b"[{" else -1
            if depth > max_depth:
                raise InvalidRequest(f"the body is nested deeper than {max_depth} levels", code="json_too_deep")


def _check_declared(request: Request, max_bytes: int) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not _ACCEPTED_TYPES.fullmatch(kind):
        raise RefusedError(415, f"content-type {kind!r} is not JSON", code="unsupported_media_type")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise RefusedError(415, f"content-encoding {encoding!r} is not accepted", code="unsupported_media_type")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 15 or int(declared) > max_bytes):
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> RefusedError:
    return RefusedError(413, f"the body is longer than {max_bytes} bytes", code="body_too_large")

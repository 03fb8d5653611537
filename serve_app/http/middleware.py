"""Pure ASGI middleware around the whole application: request ids, the header limit, the last resort for errors."""

import re
import uuid
from collections.abc import Iterable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.http.error_response import RefusedError, answer_to
from serve_app.http.limits import MAX_HEADER_BYTES

REPLICA_HEADER = "x-slipstream-replica"
_SANE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_FIELD_OVERHEAD_BYTES = 4  # ": " and the line end


class RequestGuard:
    """Gives each request an id (the client's own `x-request-id` where it is sane), sends it with every response,
    refuses headers past the limit (431), and turns an exception that nothing else caught into a plain 500.

    `sends_id` False: somebody in front sends the id already, and two headers of one name would be joined by clients.
    `replica_id`: of the process, which says so with every response.
    """

    def __init__(
        self,
        app: ASGIApp,
        sends_id: bool = True,
        replica_id: str | None = None,
        max_header_bytes: int = MAX_HEADER_BYTES,
    ) -> None:
        self._app = app
        self._sends_id = sends_id
        self._replica_id = replica_id
        self._max_header_bytes = max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope["headers"])
        scope["slipstream.request_id"] = request_id
        started = False

        async def send_with_ids(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self._sends_id:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
                if self._replica_id is not None:
                    MutableHeaders(scope=message)[REPLICA_HEADER] = self._replica_id
            await send(message)

        try:
            self._check_headers(scope)
            await self._app(scope, receive, send_with_ids)
        except Exception as error:
            if started:  # too late for a status: the server closes the connection, and the client sees a cut
                raise
            await answer_to(error, request_id).response()(scope, receive, send_with_ids)

    def _check_headers(self, scope: Scope) -> None:
        target = len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"])
        fields = sum(len(name) + len(value) + _FIELD_OVERHEAD_BYTES for name, value in scope["headers"])
        if target + fields > self._max_header_bytes:
            message = f"request target and headers are {target + fields} bytes, more than {self._max_header_bytes}"
            raise RefusedError(431, message, code="headers_too_large")


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    for name, value in headers:
        if name == b"x-request-id" and _SANE_REQUEST_ID.fullmatch(value):
            return value.decode("ascii")
    return f"req-{uuid.uuid4().hex}"

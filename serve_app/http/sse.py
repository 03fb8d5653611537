"""Server-sent events: one `data:` line an event, `[DONE]` at the end, no status before the first event exists."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve_app.http.disconnect import until_disconnect

DONE = b"data: [DONE]\n\n"
# Proxies are asked neither to store the events nor to collect them.
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def event(content: Any) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


class EventStream(StreamingResponse):
    """Sends `first`, then `rest`. Ends early when the client leaves, also while no event is due.

    `on_close` is called exactly when nothing more will be sent, whatever the reason.
    """

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], on_close: Callable[[], None]) -> None:
        super().__init__(_chain(first, rest), headers=_HEADERS, media_type="text/event-stream")
        self._rest = rest
        self._on_close = on_close

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self.stream_response(send))
        except (ClientDisconnect, OSError):  # a server may also say so by failing the send
            pass
        finally:
            self._on_close()
            await self._rest.aclose()


async def _chain(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    yield first
    async with aclosing(rest):
        async for chunk in rest:
            yield chunk

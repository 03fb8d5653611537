"""A generation as an HTTP answer, whole or streamed: what chat and text completions have in common."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from serve_app.http.disconnect import until_disconnect
from serve_app.http.error_response import answer_to, json_response, request_id_of
from serve_app.http.generation import ChoiceDelta, Generation, joined
from serve_app.http.schema import UsageReports
from serve_app.http.sse import DONE, EventStream, event


class Shape(Protocol):
    """How an endpoint writes its choices. An instance belongs to one request and may keep state for each choice."""

    object_name: str
    chunk_object_name: str

    def choice(self, whole: ChoiceDelta) -> dict[str, Any]:
        """A finished choice."""

    def chunk(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        """A part of a choice; None where there is nothing to tell. A choice's first delta is always told."""


class Reply:
    """Writes one generation in the words of one endpoint."""

    def __init__(
        self, generation: Generation, shape: Shape, *, response_id: str, model: str, system_fingerprint: str
    ) -> None:
        self._generation = generation
        self._shape = shape
        self._default_fingerprint = system_fingerprint
        self._fields = {
            "id": response_id,
            "created": int(time.time()),
            "model": model,
            "seed": generation.seed,  # not in OpenAI's schema: the seed to send for the same answer again
        }

    def _head(self) -> dict[str, Any]:
        """What every body begins with. An answer that more than one kind of engine has a part in says so."""
        fingerprints = self._generation.fingerprints
        head = {**self._fields, "system_fingerprint": fingerprints[-1] if fingerprints else self._default_fingerprint}
        if len(fingerprints) > 1:
            head["system_fingerprints"] = fingerprints  # not in OpenAI's schema
        return head

    async def answer(self, request: Request, *, stream: bool, usage_reports: UsageReports) -> Response:
        """The response; a stream's comes only once it has a first event, so that earlier errors have a status.

        Raises:
            GenerationError: the engine failed a choice (in a stream: before anything was sent).
            starlette.requests.ClientDisconnect: the client left.
        """
        try:
            if not stream:
                return json_response(await until_disconnect(request.receive, self._whole()))
            events = self._events(request_id_of(request), usage_reports)
            first = await until_disconnect(request.receive, anext(events))
            return EventStream(first, events, on_close=self._generation.abort)
        except BaseException:
            self._generation.abort()
            raise

    async def _whole(self) -> dict[str, Any]:
        deltas: dict[int, list[ChoiceDelta]] = {}
        async with aclosing(self._generation.deltas()) as arriving:
            async for delta in arriving:
                deltas.setdefault(delta.index, []).append(delta)
        choices = [self._shape.choice(joined(index, deltas[index])) for index in sorted(deltas)]
        head = {**self._head(), "object": self._shape.object_name}
        return {**head, "choices": choices, "usage": self._generation.usage.body()}

    async def _events(self, request_id: str, usage_reports: UsageReports) -> AsyncGenerator[bytes, None]:
        kind = {"object": self._shape.chunk_object_name}
        usage: dict[str, Any] = {} if usage_reports is UsageReports.NEVER else {"usage": None}
        started = False
        try:
            async with aclosing(self._generation.deltas()) as deltas:
                async for delta in deltas:
                    choice = self._shape.chunk(delta)
                    if choice is not None:
                        if usage_reports is UsageReports.ALWAYS:
                            usage["usage"] = self._generation.usage.body()
                        yield event({**self._head(), **kind, "choices": [choice], **usage})
                        started = True
            if usage_reports is not UsageReports.NEVER:
                yield event({**self._head(), **kind, "choices": [], "usage": self._generation.usage.body()})
        except Exception as error:
            if not started:
                raise
            yield event(answer_to(error, request_id).body())
        yield DONE

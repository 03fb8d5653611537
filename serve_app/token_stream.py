"""What a handler reads: the outputs of one choice, fed by the demultiplexer of its group."""

import asyncio
from collections.abc import Callable
from typing import Self

from engine.request import FinishReason, RequestOutput
from serve_app.output_buffer import OutputBuffer


class RequestStream:
    """The TokenStream of one choice. The writer never waits for the reader: outputs merge until they are read.

    `on_started` is called once, when the first output arrives or the stream ends without one.
    """

    def __init__(self, request_id: str, on_started: Callable[[], None]) -> None:
        self.request_id = request_id
        self.finished = False  # the last output has arrived (it may not have been read)
        self.on_finished: Callable[[], None] | None = None  # these two are set by the client that feeds this stream
        self.on_abort: Callable[[], None] | None = None
        self._on_started: Callable[[], None] | None = on_started
        self._buffer = OutputBuffer()
        self._ready = asyncio.Event()
        self._read_last = False

    def put(self, output: RequestOutput) -> None:
        """Demultiplexer. What comes after the last output is dropped: an abort has overtaken it."""
        if self.finished:
            return
        self.finished = output.finish_reason is not None
        self._buffer.add(output)
        self._ready.set()
        if self._on_started is not None:
            self._on_started()
            self._on_started = None
        if self.finished and self.on_finished is not None:
            self.on_finished()

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        """Ends the stream from this side."""
        self.put(RequestOutput(request_id=self.request_id, finish_reason=reason, error=error))

    def abort(self) -> None:
        """Free the request in the engine. Returns at once; harmless when it has ended already."""
        if self.finished:
            return
        self.end(FinishReason.ABORT)
        if self.on_abort is not None:
            self.on_abort()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._read_last:
            raise StopAsyncIteration
        await self._ready.wait()
        self._ready.clear()
        output = self._buffer.take()
        assert output is not None
        self._read_last = output.finish_reason is not None
        return output

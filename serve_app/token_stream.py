"""What a handler reads: the outputs of one choice, fed by the demultiplexers of the groups that it is in."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Self

from engine.request import FinishReason, RequestOutput
from serve_app.output_buffer import OutputBuffer


class RequestStream:
    """The TokenStream of one choice. The writer never waits for the reader: outputs merge until they are read.

    It keeps the ids of all tokens that have come, so that another engine replica can go on behind them: the reader
    learns nothing of that but a pause. Outputs of the current `attempt` count; what earlier ones still say is dropped.

    `on_started` is called once, when the first output arrives or the stream ends without one.
    """

    def __init__(self, request_id: str, on_started: Callable[[], None]) -> None:
        self.request_id = request_id
        self.finished = False  # the last output has arrived (it may not have been read)
        self.attempt = 0
        self.token_ids: list[int] = []  # received, whether they have been read or not
        self.fingerprints: list[str] = []  # of the engines that they come from, in order; of each, once
        self.on_finished: Callable[[], None] | None = None  # these two are set by the client that feeds this stream
        self.on_abort: Callable[[], None] | None = None
        self._on_started: Callable[[], None] | None = on_started
        self._buffer = OutputBuffer()
        self._ready = asyncio.Event()
        self._read_last = False
        self._latest: RequestOutput | None = None
        self._before: RequestOutput | None = None  # the last one of the attempts before this one, if they had any token

    def begin_attempt(self, attempt: int) -> None:
        """From here on, outputs of this attempt count, and no others."""
        assert attempt > self.attempt, f"attempt {attempt} after {self.attempt}"
        self.attempt = attempt
        self._before = self._latest if self.token_ids else None
        self.on_finished = self.on_abort = None

    def open(self, fingerprint: str) -> None:
        """An engine has taken the current attempt."""
        if not self.token_ids:
            self.fingerprints.clear()
        if fingerprint not in self.fingerprints[-1:]:
            self.fingerprints.append(fingerprint)

    def receive(self, attempt: int, output: RequestOutput) -> bool:
        """Demultiplexer: an engine's output. False: it is of an attempt that another has superseded, and void."""
        if attempt != self.attempt:
            return False
        if (before := self._before) is not None:
            output = replace(
                output,
                num_cached_tokens=before.num_cached_tokens,
                num_drafted_tokens=before.num_drafted_tokens + output.num_drafted_tokens,
                num_accepted_tokens=before.num_accepted_tokens + output.num_accepted_tokens,
            )
        self.put(output)
        return True

    def put(self, output: RequestOutput) -> None:
        """What comes after the last output is dropped: an abort has overtaken it."""
        if self.finished:
            return
        self.finished = output.finish_reason is not None
        self.token_ids += output.token_ids
        self._latest = output
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

"""The ingress's side of a group: one streaming call to one replica, and the streams that it feeds."""

import asyncio
from dataclasses import dataclass, field

from ray.serve.handle import DeploymentResponseGenerator

from engine.request import FinishReason
from serve_app.errors import OverloadedError, UnavailableError
from serve_app.messages import Opening, SubmittedPrompt
from serve_app.token_stream import RequestStream


@dataclass
class PlacedPrompt:
    """A prompt ready for an engine, and the streams of its choices, in the order of `prompt.choices`."""

    prompt: SubmittedPrompt
    streams: list[RequestStream]


@dataclass(eq=False)
class Group:
    """One streaming call to one replica, as its reader sees it."""

    group_id: str
    prompts: list[SubmittedPrompt]
    streams: list[RequestStream]  # by member index
    replica_id: str | None  # where it was sent; None: to whichever comes up first
    opened: asyncio.Future[Opening] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    is_open: bool = False
    response: DeploymentResponseGenerator[bytes] | None = None
    sequence: int = 0  # of the last frame read
    acknowledged: int = 0
    last_frame_s: float = 0.0
    cancelled: bool = False

    @property
    def num_live_members(self) -> int:
        return sum(not stream.finished for stream in self.streams)

    def fail(self, error: OverloadedError | UnavailableError) -> None:
        """Ends whatever has not ended."""
        if not self.opened.done():
            self.opened.set_exception(error)
            self.opened.exception()  # an aborted request asks for it no more
        for stream in self.streams:
            stream.end(FinishReason.ERROR, str(error))

    def cancel(self, error: UnavailableError) -> None:
        """Closes the call, which aborts in the engine whatever still runs."""
        self.cancelled = True
        self.fail(error)
        if self.response is not None:
            self.response.cancel()

"""The engine's side of a group: outputs of its members become frames, as fast as the reader takes them."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import NoReturn

from engine.request import FinishReason, Request, RequestOutput
from serve_app.frame_pace import FramePace
from serve_app.messages import FRAME_WINDOW, Heartbeat, Submission, TokenFrame, encode, to_wire
from serve_app.output_buffer import OutputBuffer

LEASE_S = 30.0  # a reader that acknowledges nothing for so long is gone: its ingress was killed
LAST_LEASE_S = 5.0  # the same, where everything was sent and only the end is to come


async def until_cancelled() -> NoReturn:
    """For calls that have nothing more to say, and whose reader cancels them: see `GroupStream.frames`."""
    await asyncio.sleep(LAST_LEASE_S)
    raise asyncio.CancelledError


def requests_of(submission: Submission) -> list[Request]:
    """The engine's requests of a group; a request's place in the list is its member index."""
    now_s = time.monotonic()
    return [
        Request(
            request_id=request_id,
            prompt_token_ids=prompt.token_ids,
            sampling=prompt.sampling,
            choice_index=choice_index,
            priority=prompt.priority,
            arrival_s=now_s - prompt.waited_s,
            tenant=prompt.tenant,
            output_token_ids=output_token_ids,
        )
        for prompt in submission.prompts
        for (request_id, choice_index), output_token_ids in zip(
            prompt.choices, prompt.outputs or [[] for _ in prompt.choices], strict=True
        )
    ]


class Occupancy:
    """Of one replica, whose groups count in it. Exact in every frame: ingresses that hear old news all choose the same
    replica."""

    def __init__(self, num_running: Callable[[], int]) -> None:
        """num_running: requests, as the engine told last."""
        self.num_requests = 0
        self.num_finished = 0  # since the start, without those that have left before they had a token
        self._num_running = num_running

    @property
    def num_waiting(self) -> int:
        """Requests that the engine has not begun, or not told yet that it has."""
        return max(0, self.num_requests - self._num_running())


class GroupStream:
    """Lives on the event loop alone; `Outbox` brings outputs over from the engine thread.

    The first and the last tokens of a request are sent at once, others when their time has come.
    """

    def __init__(self, request_ids: Iterable[str], occupancy: Occupancy, pace: FramePace) -> None:
        self.request_ids = list(request_ids)
        self._member_of = {request_id: member for member, request_id in enumerate(self.request_ids)}
        self._buffers = [OutputBuffer() for _ in self.request_ids]
        self._dirty: dict[int, None] = {}  # members with outputs, in the order in which they came
        self._unfinished = set(range(len(self.request_ids)))
        self._begun: set[int] = set()  # members that have had a token
        self._pace = pace
        self._is_urgent = False
        self._due_s = 0.0  # the next frame, by time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._occupancy = occupancy
        occupancy.num_requests += len(self.request_ids)
        self._wake = asyncio.Event()
        self._sequence = 0
        self._last_outputs = 0  # sequence number of the last frame with any
        self._acknowledged = 0
        self._leased_s = time.monotonic()
        self._heartbeat_due = False
        self._silent = True  # no frame since the last tick

    @property
    def unfinished_ids(self) -> list[str]:
        return [self.request_ids[member] for member in sorted(self._unfinished)]

    def add(self, outputs: Iterable[RequestOutput]) -> None:
        for output in outputs:
            member = self._member_of[output.request_id]
            if member not in self._unfinished:  # ended by `abandon` while the engine was not looking
                continue
            self._buffers[member].add(output)
            self._dirty[member] = None
            if output.token_ids and member not in self._begun:
                self._begin(member)
            if output.finish_reason is not None:
                self._end(member, is_abort=output.finish_reason is FinishReason.ABORT)
        if self._is_due():
            self._wake.set()
        elif self._dirty and self._timer is None:
            pause_s = self._due_s - time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(pause_s, self._on_due)

    def _has_tokens_under_way(self) -> bool:
        return not self._begun.isdisjoint(self._unfinished)

    def _is_due(self) -> bool:
        return self._is_urgent or time.monotonic() >= self._due_s

    def _on_due(self) -> None:
        self._timer = None
        self._wake.set()

    def abandon(self, reason: str) -> None:
        """Ends every member that is still running, for the ingress to send elsewhere."""
        self.add(
            RequestOutput(request_id=request_id, finish_reason=FinishReason.ABORT, error=reason)
            for request_id in self.unfinished_ids
        )

    def leave(self) -> None:
        """Nobody reads any more: what is unfinished counts no longer, and what comes of it is dropped."""
        for member in list(self._unfinished):
            self._end(member, is_abort=True)
        if self._timer is not None:
            self._timer.cancel()

    def _begin(self, member: int) -> None:
        self._pace.num_groups += not self._has_tokens_under_way()
        self._pace.num_requests += 1
        self._begun.add(member)
        self._is_urgent = True

    def _end(self, member: int, *, is_abort: bool) -> None:
        self._unfinished.discard(member)
        if member in self._begun:
            self._pace.num_groups -= not self._has_tokens_under_way()
            self._pace.num_requests -= 1
        self._is_urgent = True
        self._occupancy.num_requests -= 1
        self._occupancy.num_finished += member in self._begun or not is_abort

    def acknowledge(self, sequence: int) -> None:
        self._acknowledged = max(self._acknowledged, sequence)
        self._leased_s = time.monotonic()
        self._wake.set()

    def tick(self) -> None:
        """Called every HEARTBEAT_S; the first tick in which nothing was sent makes a heartbeat due."""
        self._heartbeat_due = self._silent
        self._silent = True
        self._wake.set()

    def _has_credit(self) -> bool:
        return self._sequence - self._acknowledged < FRAME_WINDOW

    def _lease_expired(self) -> bool:
        lease_s = LEASE_S if self._unfinished or self._dirty else LAST_LEASE_S
        return self._sequence > self._acknowledged and time.monotonic() - self._leased_s > lease_s

    async def frames(self) -> AsyncIterator[bytes]:
        """Ends once every member's last output has been read.

        Not before: at the end of a call, Ray lets the whole event loop wait until the caller's process has all of it.
        An ingress that hangs would have each engine hang that has just answered it, and with that every ingress.

        Raises:
            asyncio.CancelledError: the reader has been silent for too long. Ray waits for no call that is cancelled.
        """
        while self._unfinished or self._dirty or self._acknowledged < self._last_outputs:
            await self._wake.wait()
            self._wake.clear()
            if self._lease_expired():
                raise asyncio.CancelledError
            # Without credit, outputs gather for a heartbeat's time. They must not wait for credit alone: calls no
            # longer reach a replica that Serve drains, and its streams go on.
            if self._dirty and ((self._has_credit() and self._is_due()) or self._heartbeat_due):
                yield self._token_frame()
            elif self._heartbeat_due:
                self._sequence += 1
                self._sent()
                yield encode(Heartbeat(self._sequence, self._occupancy.num_requests, self._occupancy.num_waiting))

    def _token_frame(self) -> bytes:
        outputs = []
        for member in self._dirty:
            output = self._buffers[member].take()
            assert output is not None
            outputs.append(to_wire(member, output))
        self._dirty.clear()
        self._is_urgent = False
        self._due_s = time.monotonic() + self._pace.pause_s
        self._sequence += 1
        self._last_outputs = self._sequence
        if not self._unfinished:
            self._leased_s = time.monotonic()  # for the last lease
        self._sent()
        return encode(TokenFrame(self._sequence, self._occupancy.num_requests, self._occupancy.num_waiting, outputs))

    def _sent(self) -> None:
        self._silent = self._heartbeat_due = False


class Outbox:
    """Carries outputs from the engine thread to the event loop with one wake-up for all groups of a step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[tuple[GroupStream, list[RequestOutput]]] = deque()
        self._scheduled = False

    def post(self, group: GroupStream, outputs: list[RequestOutput]) -> None:
        """Engine thread. Never blocks."""
        self._posted.append((group, outputs))
        if self._scheduled:  # `deliver` has yet to run, and will see the outputs
            return
        self._scheduled = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop is closed: the process is going down, and nobody reads any more
            self._posted.clear()

    def _deliver(self) -> None:
        self._scheduled = False  # before the draining: what is posted from now on wakes the loop again
        while self._posted:
            group, outputs = self._posted.popleft()
            group.add(outputs)

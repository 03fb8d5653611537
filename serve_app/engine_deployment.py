"""The engine replica: one process, one engine; a thread that steps and an event loop that talks."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from engine.async_engine import AsyncEngine
from engine.errors import EngineDeadError, EngineFullError, SlipstreamError
from engine.stats import EngineStats
from serve_app.draft_endpoints import DraftEndpoints
from serve_app.draft_link import Resolve
from serve_app.frame_pace import FramePace
from serve_app.group_stream import GroupStream, Occupancy, Outbox, requests_of, until_cancelled
from serve_app.load_meter import EngineMeter
from serve_app.messages import (
    HEARTBEAT_S,
    EngineStatus,
    Opening,
    Refusal,
    decode_control,
    decode_submission,
    encode,
)
from serve_app.metrics import REPORT_S, EngineMetrics

if TYPE_CHECKING:  # `load` imports it, torch and all, and says how long that takes
    from engine.llm_engine import LLMEngine

GIL_SWITCH_S = 0.0005  # a step of a small model takes 1 ms: Python's 5 ms are too long to wait for the event loop
STOP_TIMEOUT_S = 10.0  # for the step under way


class Engine:
    """A Serve deployment. Its calls carry messages of serve_app.messages; `replica_id` is for the router.

    `load` makes the engine, in the replica: constructing it may take as long as the weights take to read. Where
    there is a draft deployment, it is told how to find its replicas. `max_requests`: see engine.async_engine.
    """

    def __init__(
        self,
        load: "Callable[[Resolve | None], LLMEngine]",
        draft: DeploymentHandle[object] | None = None,
        max_requests: int | None = None,
    ) -> None:
        self._replica_id: str = serve.get_replica_context().replica_id.unique_id
        self._groups: dict[str, GroupStream] = {}
        self._occupancy = Occupancy(lambda: self._engine.stats().num_requests_running)
        self._pace = FramePace()
        sys.setswitchinterval(GIL_SWITCH_S)
        self._metrics = EngineMetrics()
        self._meter = EngineMeter()
        self._outbox: Outbox | None = None
        self._ticker: asyncio.Task[None] | None = None
        try:
            engine = load(None if draft is None else DraftEndpoints(draft, ray.get_runtime_context().get_node_id()))
        except SlipstreamError as error:
            raise RuntimeError(f"slipstream: {error}") from None  # one line in Serve's status
        self._fingerprint = engine.fingerprint
        self._engine = AsyncEngine(engine, max_requests=max_requests)
        self._engine.start()

    async def generate(self, submission: bytes, replica_id: str | None = None) -> AsyncIterator[bytes]:
        """Runs a group. Closing the call aborts every member that is still running."""
        if replica_id not in (None, self._replica_id):
            yield self._refusal(f"replica {self._replica_id} was sent a group for {replica_id}")
            await until_cancelled()
        message = decode_submission(submission)
        if message.fingerprint not in ("", self._fingerprint):
            yield self._refusal(f"the engine is {self._fingerprint}, not {message.fingerprint}", self._fingerprint)
            await until_cancelled()
        requests = requests_of(message)
        group = GroupStream((request.request_id for request in requests), self._occupancy, self._pace)
        self._groups[message.group_id] = group
        try:
            try:
                on_outputs = partial(self._ready_outbox().post, group)
                # Requests that were taken before, and have lost their replica, are not turned away.
                self._engine.submit(requests, on_outputs, even_if_full=message.attempt > 0)
            except SlipstreamError as error:
                yield self._refusal(str(error), is_full=isinstance(error, EngineFullError))
                await until_cancelled()
            yield encode(self._opening(message.attempt))
            async for frame in group.frames():
                yield frame
        finally:
            del self._groups[message.group_id]
            self._abort(group.unfinished_ids)
            group.leave()

    def _opening(self, attempt: int) -> Opening:
        return Opening(self._replica_id, attempt, self._fingerprint, self._engine.stats().num_blocks)

    def _refusal(self, reason: str, fingerprint: str = "", *, is_full: bool = False) -> bytes:
        return encode(Refusal(reason, self._replica_id, fingerprint, is_full))

    async def control(self, message: bytes, replica_id: str | None = None) -> None:
        """Credit and aborts for groups of this replica; those of groups that have ended are void."""
        if replica_id not in (None, self._replica_id):
            return
        control = decode_control(message)
        for group_id, sequence in control.acknowledged.items():
            if group := self._groups.get(group_id):
                group.acknowledge(sequence)
        for group_id, members in control.aborted.items():
            if group := self._groups.get(group_id):
                self._abort([group.request_ids[member] for member in members])

    async def status(self, replica_id: str | None = None) -> bytes:  # noqa: ARG002 - for the router
        """An EngineStatus. Raises EngineDeadError when the engine is not healthy."""
        self._engine.check_health()
        stats = self._engine.stats()
        num_requests = stats.num_requests_running + stats.num_requests_waiting
        return encode(EngineStatus(self._replica_id, self._fingerprint, num_requests))

    async def stats(self, replica_id: str | None = None) -> EngineStats:  # noqa: ARG002 - for the router
        return self._engine.stats()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve calls it where the number of replicas may vary."""
        num_ongoing, num_finished = self._occupancy.num_requests, self._occupancy.num_finished
        return self._meter.report(time.monotonic(), num_ongoing, num_finished, self._engine.stats())

    async def check_health(self) -> None:
        """Serve replaces the replica after repeated failures of this. From the first one on, there are metrics."""
        self._ready_outbox()
        self._engine.check_health()

    def _abort(self, request_ids: list[str]) -> None:
        if request_ids:
            self._engine.abort(request_ids)

    def _ready_outbox(self) -> Outbox:
        """Made by the first call: the constructor may run on another thread than the calls."""
        if self._outbox is None:
            self._outbox = Outbox(asyncio.get_running_loop())
            self._ticker = asyncio.create_task(self._tick())
        return self._outbox

    async def _tick(self) -> None:
        """Heartbeats of all groups, and metrics. A dead engine has neither: it abandons every group."""
        reported_s = -REPORT_S
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                self._engine.check_health()
            except EngineDeadError as error:
                for group in self._groups.values():
                    self._abort(group.unfinished_ids)  # should the engine only have been slow
                    group.abandon(str(error))
                continue
            for group in self._groups.values():
                group.tick()
            if time.monotonic() - reported_s >= REPORT_S:
                reported_s = time.monotonic()
                self._metrics.report(self._engine.stats())

    async def __del__(self) -> None:
        """Serve awaits this once the calls have ended, or when the time for draining is over."""
        if self._ticker is not None:
            self._ticker.cancel()
            with suppress(asyncio.CancelledError):
                await self._ticker
        for group in self._groups.values():
            group.abandon("the engine replica is shutting down")
        engine = getattr(self, "_engine", None)  # the constructor may have failed
        if engine is not None:
            with suppress(TimeoutError):  # a step that never ends: Serve kills the process
                await asyncio.to_thread(engine.shutdown, STOP_TIMEOUT_S)

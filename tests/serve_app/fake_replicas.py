"""Engine replicas that say what a test has them say, behind what looks like a Serve handle. No Ray."""

import asyncio
from collections.abc import Awaitable
from typing import Any

from engine.request import FinishReason
from serve_app.failover import Loss
from serve_app.messages import (
    EngineStatus,
    Frame,
    Heartbeat,
    MemberOutput,
    Opening,
    TokenFrame,
    decode_control,
    decode_submission,
    encode,
)
from serve_app.replica_registry import ReplicaGoneError, publish_replicas

APPLICATION = "fake"
NUM_BLOCKS = 1000
LIMIT_S = 30.0  # for anything here, on a busy machine


class FakeCall:
    """One streaming call: a test sends its frames, the client reads them."""

    def __init__(self, submission: bytes, replica_id: str | None) -> None:
        self.submission = decode_submission(submission)
        self.replica_id = replica_id
        self.load = (1, 0)  # requests of the replica, and those that wait, as its next frames tell
        self.is_cancelled = False
        self.is_deaf = False  # a stopped process learns of nothing
        self._failure: BaseException | None = None
        self._sequence = 0
        self._queue: asyncio.Queue[bytes | BaseException] = asyncio.Queue()

    @property
    def request_ids(self) -> list[str]:
        return [request_id for prompt in self.submission.prompts for request_id, _ in prompt.choices]

    def open(self, replica_id: str = "", fingerprint: str = "fp") -> None:
        self.send(Opening(replica_id or self.replica_id or "", self.submission.attempt, fingerprint, NUM_BLOCKS))

    def say(self, *token_ids: int, member: int = 0, reason: FinishReason | None = None, **fields: Any) -> None:
        self._sequence += 1
        self.send(TokenFrame(self._sequence, *self.load, [MemberOutput(member, list(token_ids), reason, **fields)]))

    def beat(self) -> None:
        self._sequence += 1
        self.send(Heartbeat(self._sequence, *self.load))

    def send(self, frame: Frame) -> None:
        self._queue.put_nowait(encode(frame))

    def fail(self, error: BaseException | None = None) -> None:
        """None: the call ends."""
        self._failure = error
        self._queue.put_nowait(error or StopAsyncIteration())

    def cancel(self) -> None:
        if self._failure is not None:
            raise self._failure  # as Serve does
        self.is_cancelled = True
        if not self.is_deaf:
            self.fail(RuntimeError("cancelled"))

    def __aiter__(self) -> "FakeCall":
        return self

    async def __anext__(self) -> bytes:
        item = await self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item


class FakeReplicas:
    """Stands in for the handle of the engine deployment. Calls are kept in the order in which they are made."""

    app_name = APPLICATION
    deployment_name = "engine"

    def __init__(self, *replica_ids: str) -> None:
        self.calls: list[FakeCall] = []
        self.fingerprints: dict[str, str] = {}  # of replicas that answer how they are
        self.acknowledged: dict[str, int] = {}  # group: sequence number of the last frame that was read
        self.aborted: list[tuple[str, str, int]] = []  # replica, group, member
        self.told = Told()
        self.run(*replica_ids)

    def run(self, *replica_ids: str) -> None:
        self._running = replica_ids
        publish_replicas(APPLICATION, "engine", replica_ids)

    def options(self, method_name: str, **_: Any) -> Any:
        return _Method(getattr(self, f"_{method_name}"))

    @property
    def status(self) -> Any:
        return _Method(self._status)

    def _generate(self, submission: bytes, replica_id: str | None) -> FakeCall:
        self.calls.append(call := FakeCall(submission, replica_id))
        return call

    async def _control(self, message: bytes, replica_id: str) -> None:
        """Credit and aborts."""
        control = decode_control(message)
        self.acknowledged |= control.acknowledged
        for group_id, members in control.aborted.items():
            self.aborted += [(replica_id, group_id, member) for member in members]

    async def _status(self, replica_id: str) -> bytes:
        while replica_id not in self.fingerprints:  # it is stopped, or dead
            if replica_id not in self._running:
                raise ReplicaGoneError(replica_id)
            await asyncio.sleep(0.01)
        return encode(EngineStatus(replica_id, self.fingerprints[replica_id], 0))

    async def call(self, number: int) -> FakeCall:
        """The call of this number, from 0 on, as soon as it is made."""
        await until(lambda: len(self.calls) > number)
        return self.calls[number]


class _Method:
    def __init__(self, method: Any) -> None:
        self.remote = method


class Told:
    """A FailoverObserver."""

    def __init__(self) -> None:
        self.num_attempts = 0
        self.losses: list[tuple[Loss, int]] = []
        self.recoveries_s: list[float] = []
        self.num_stale = 0

    def on_attempt(self, num_streams: int) -> None:
        self.num_attempts += num_streams

    def on_lost(self, loss: Loss, num_streams: int) -> None:
        self.losses.append((loss, num_streams))

    def on_recovered(self, seconds: float) -> None:
        self.recoveries_s.append(seconds)

    def on_stale_frame(self) -> None:
        self.num_stale += 1


async def until(condition: Any, limit_s: float = LIMIT_S) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await within(wait(), limit_s)


async def within(awaitable: Awaitable[Any], limit_s: float = LIMIT_S) -> Any:
    return await asyncio.wait_for(awaitable, limit_s)

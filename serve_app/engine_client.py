"""The ingress's side of the engine replicas: places prompts, and deals the frames of each group to its streams."""

import asyncio
import itertools
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from functools import partial

from ray.serve.handle import DeploymentHandle

from serve_app.background import spawn
from serve_app.control_link import ControlLink
from serve_app.errors import UnavailableError
from serve_app.group import Group, PlacedPrompt
from serve_app.messages import (
    FRAME_WINDOW,
    Frame,
    Heartbeat,
    Opening,
    Refusal,
    Submission,
    TokenFrame,
    decode_frame,
    encode,
    from_wire,
)
from serve_app.replica_registry import ReplicaGoneError, running_replicas
from serve_app.waking import Waker

logger = logging.getLogger("ray.serve")

ACKNOWLEDGE_EVERY = FRAME_WINDOW // 4
HOUSEKEEPING_S = 0.5
SILENCE_LIMIT_S = 10.0  # without a frame or heartbeat, a replica that has opened a group counts as hung
SHUN_S = 5.0  # how long others are preferred to a replica that has refused; by then Serve has replaced it
LOAD_EXPIRY_S = 2.0  # what a replica said of its load before that says nothing about now


class _RefusedError(Exception):
    """A replica has taken nothing of a group."""


@dataclass(frozen=True)
class _Load:
    num_foreign: int  # requests of other ingresses
    seen_s: float


class EngineClient:
    """Owns every call to the engine deployment of one ingress replica. Lives on one event loop."""

    def __init__(self, handle: DeploymentHandle[object], name: str) -> None:
        """`name` is unique among ingress replicas: it makes group ids and so request ids unique."""
        self._handle = handle
        self._generate = handle.options(method_name="generate", stream=True)
        self._control = handle.options(method_name="control")
        self._name = name
        self._serial = itertools.count()
        self._groups: dict[str, Group] = {}
        self._links: dict[str, ControlLink] = {}
        self._own: Counter[str] = Counter()  # unfinished requests of ours, by replica
        self._loads: dict[str, _Load] = {}
        self._shunned_s: dict[str, float] = {}  # when a replica has refused
        self.last_heard_s = -float("inf")  # time.monotonic() of the last frame of any replica
        self.fingerprint = ""  # of the replica that last opened a group
        self._waker = Waker(handle, self.running_replicas)
        self._housekeeping = spawn(self._keep_house())

    def running_replicas(self) -> tuple[str, ...]:
        return running_replicas(self._handle.app_name, self._handle.deployment_name)

    @property
    def num_unfinished(self) -> int:
        """Requests handed over here, whether an engine has taken them or not."""
        return sum(group.num_live_members for group in self._groups.values())

    def unique_request_id(self, request_id: str) -> str:
        """Clients choose ids; the engine's must differ, also among attempts."""
        return f"{request_id}@{self._name}.{next(self._serial)}"

    def submit(self, placed: Sequence[PlacedPrompt]) -> list[asyncio.Future[Opening]]:
        """Hands prompts over, in one streaming call for each replica chosen; returns at once.

        Returns one future for each prompt, of the opening of its group. It fails with UnavailableError.
        """
        by_replica: dict[str, list[tuple[int, PlacedPrompt]]] = {}
        lone: list[tuple[int, PlacedPrompt]] = []  # there is no replica yet, and there may be several: a group each
        extra: Counter[str] = Counter()
        for index, item in enumerate(placed):
            replica_id = self._choose_replica(extra)
            if replica_id is None:
                lone.append((index, item))
            else:
                by_replica.setdefault(replica_id, []).append((index, item))
                extra[replica_id] += len(item.streams)
        openings: dict[int, asyncio.Future[Opening]] = {}
        for replica_id, members in [*by_replica.items(), *((None, [member]) for member in lone)]:
            group = self._start_group(replica_id, [item for _, item in members])
            openings.update((index, group.opened) for index, _ in members)
        return [openings[index] for index in range(len(placed))]

    async def close(self) -> None:
        self._housekeeping.cancel()
        for group in list(self._groups.values()):
            group.cancel(UnavailableError("the ingress replica is shutting down"))
        await asyncio.gather(*(link.close() for link in self._links.values()))

    def _choose_replica(self, extra: Counter[str]) -> str | None:
        """The less busy of two; with one ingress and two replicas that is exact. `extra` is about to be sent."""
        replicas = self.running_replicas()
        if not replicas:
            return None
        willing = [replica_id for replica_id in replicas if not self._is_shunned(replica_id)] or replicas
        return min(random.sample(willing, min(2, len(willing))), key=lambda id_: self._busyness(id_) + extra[id_])

    def _busyness(self, replica_id: str) -> int:
        load = self._loads.get(replica_id)
        fresh = load is not None and time.monotonic() - load.seen_s < LOAD_EXPIRY_S
        return self._own[replica_id] + (load.num_foreign if load is not None and fresh else 0)

    def _start_group(self, replica_id: str | None, items: list[PlacedPrompt]) -> Group:
        group = Group(
            group_id=f"{self._name}.{next(self._serial)}",
            prompts=[item.prompt for item in items],
            streams=[stream for item in items for stream in item.streams],
            replica_id=replica_id,
        )
        for member, stream in enumerate(group.streams):
            stream.on_finished = partial(self._on_finished, group)
            stream.on_abort = partial(self._on_abort, group, member)
        self._groups[group.group_id] = group
        self._count(replica_id, len(group.streams))
        spawn(self._run(group))
        return group

    def _count(self, replica_id: str | None, change: int) -> None:
        if replica_id is not None:
            self._own[replica_id] += change

    def _on_finished(self, group: Group) -> None:
        self._count(group.replica_id, -1)

    def _on_abort(self, group: Group, member: int) -> None:
        if not group.num_live_members:
            group.cancel(UnavailableError("the request was aborted"))
        elif group.is_open:
            self._abort_member(group, member)
        # else `_on_opening` sends it: an abort must not overtake the submission

    def _abort_member(self, group: Group, member: int) -> None:
        assert group.replica_id is not None
        self._link(group.replica_id).abort(group.group_id, member)

    async def _run(self, group: Group) -> None:
        """Demultiplexes one group until its call ends. Never waits for a reader of the streams."""
        try:
            await self._read(group)
            group.fail(UnavailableError("the engine replica ended the stream early"))
        except UnavailableError as error:
            group.fail(error)
        except asyncio.CancelledError:
            group.fail(UnavailableError("the ingress replica is shutting down"))
        except Exception as error:
            if not group.cancelled:
                logger.warning(f"group {group.group_id} on engine replica {group.replica_id} failed: {error!r}")
                group.cancel(UnavailableError("the engine replica stopped while serving this request"))
        finally:
            del self._groups[group.group_id]

    async def _read(self, group: Group) -> None:
        """Sends the submission, and deals out what comes back.

        A replica that has left, or that refuses, has started nothing: then another one is asked.
        """
        submission = encode(Submission(group.group_id, 0, group.prompts))
        while not group.cancelled:
            if not self.running_replicas():
                await self._waker.wait(lambda: group.cancelled)
                self._place(group, self._choose_replica(Counter()))
                continue
            group.response = self._generate.remote(submission, replica_id=group.replica_id)
            try:
                async for data in group.response:
                    self._on_frame(group, decode_frame(data))
                return
            except ReplicaGoneError:
                assert not group.is_open
                self._place(group, None)
            except _RefusedError as refusal:
                assert not group.is_open
                self._shun(group.replica_id)
                replica_id = self._choose_replica(Counter())
                if replica_id is None or self._is_shunned(replica_id):
                    raise UnavailableError(str(refusal)) from None
                self._place(group, replica_id)

    def _shun(self, replica_id: str | None) -> None:
        if replica_id is not None:
            self._shunned_s[replica_id] = time.monotonic()

    def _is_shunned(self, replica_id: str) -> bool:
        return time.monotonic() - self._shunned_s.get(replica_id, -SHUN_S) < SHUN_S

    def _on_frame(self, group: Group, frame: Frame) -> None:
        self.last_heard_s = group.last_frame_s = time.monotonic()
        match frame:
            case TokenFrame():
                for output in frame.outputs:
                    stream = group.streams[output.member]
                    stream.put(from_wire(stream.request_id, output))
                self._on_sequence(group, frame.sequence, frame.num_requests)
            case Heartbeat():
                self._on_sequence(group, frame.sequence, frame.num_requests)
            case Opening():
                self._on_opening(group, frame)
            case Refusal():
                raise _RefusedError(frame.reason)

    def _place(self, group: Group, replica_id: str | None) -> None:
        if replica_id != group.replica_id:
            self._count(group.replica_id, -group.num_live_members)
            self._count(replica_id, group.num_live_members)
            group.replica_id = replica_id

    def _on_opening(self, group: Group, opening: Opening) -> None:
        self._place(group, opening.replica_id)
        self.fingerprint = opening.fingerprint
        group.is_open = True
        if not group.opened.done():
            group.opened.set_result(opening)
        for member, stream in enumerate(group.streams):
            if stream.finished:  # aborted while the group was on its way
                self._abort_member(group, member)

    def _on_sequence(self, group: Group, sequence: int, num_requests: int) -> None:
        assert group.replica_id is not None
        group.sequence = sequence
        foreign = max(0, num_requests - self._own[group.replica_id])
        self._loads[group.replica_id] = _Load(foreign, group.last_frame_s)
        if sequence - group.acknowledged >= ACKNOWLEDGE_EVERY:
            self._acknowledge(group)

    def _acknowledge(self, group: Group) -> None:
        assert group.replica_id is not None
        group.acknowledged = group.sequence
        self._link(group.replica_id).acknowledge(group.group_id, group.sequence)

    def _link(self, replica_id: str) -> ControlLink:
        link = self._links.get(replica_id)
        if link is None:
            link = self._links[replica_id] = ControlLink(replica_id, self._send_control)
        return link

    def _send_control(self, message: bytes, replica_id: str) -> Awaitable[None]:
        if replica_id not in self.running_replicas():  # gone, or draining, when Serve passes no calls on
            raise ReplicaGoneError(f"engine replica {replica_id} has left")
        response: Awaitable[None] = self._control.remote(message, replica_id=replica_id)
        return response

    async def _keep_house(self) -> None:
        """Late credit for slow groups, hung replicas, and what is kept of replicas that have left."""
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            now_s = time.monotonic()
            for group in list(self._groups.values()):
                if not group.is_open:
                    continue
                if group.sequence > group.acknowledged:
                    self._acknowledge(group)
                if now_s - group.last_frame_s > SILENCE_LIMIT_S:
                    logger.warning(f"engine replica {group.replica_id} has been silent for {SILENCE_LIMIT_S:g} s")
                    group.cancel(UnavailableError("the engine replica does not answer"))
            running = {*self.running_replicas(), *(group.replica_id for group in self._groups.values())}
            for replica_id in self._links.keys() - running:
                await self._links.pop(replica_id).close()
            for kept in (self._loads, self._shunned_s, self._own):
                for replica_id in kept.keys() - running:
                    del kept[replica_id]

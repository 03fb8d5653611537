"""The ingress's side of the engine replicas: places prompts, deals the frames of each group to its streams, and sends
what a replica has lost to another one."""

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from ray.serve.handle import DeploymentHandle

from engine.request import FinishReason
from serve_app.background import spawn
from serve_app.control_link import ControlLinks
from serve_app.errors import Overload, OverloadedError, UnavailableError
from serve_app.failover import SILENCE_LIMIT_S, FailoverObserver, FailoverPolicy, Loss, NoFailoverObserver
from serve_app.group import Group, PlacedPrompt
from serve_app.messages import (
    FRAME_WINDOW,
    EngineStatus,
    Frame,
    Heartbeat,
    MemberOutput,
    Opening,
    Refusal,
    TokenFrame,
    decode_frame,
    decode_status,
    encode,
    from_wire,
)
from serve_app.placement import TOKENS_PER_REQUEST, NoPlacementObserver, PlacementObserver, PlacementRule
from serve_app.queued_prompts import queues_of
from serve_app.rebalancing import Rebalancer
from serve_app.replica_book import ReplicaBook
from serve_app.replica_registry import ReplicaGoneError, running_replicas
from serve_app.waking import Waker

logger = logging.getLogger("ray.serve")

ACKNOWLEDGE_EVERY = FRAME_WINDOW // 4
HOUSEKEEPING_S = 0.25


class _LostError(Exception):
    """A group has to go to another replica."""

    def __init__(self, loss: Loss, why: str) -> None:
        super().__init__(why)
        self.loss = loss


class EngineClient:
    """Owns every call to the engine deployment of one ingress replica. Lives on one event loop."""

    def __init__(
        self,
        handle: DeploymentHandle[object],
        name: str,
        policy: FailoverPolicy | None = None,
        observer: FailoverObserver | None = None,
        rule: PlacementRule | None = None,
        placements: PlacementObserver | None = None,
    ) -> None:
        """`name` is unique among ingress replicas: it makes group ids and so request ids unique. rule: None: the caches
        of the replicas do not count."""
        self._handle = handle
        self._generate = handle.options(method_name="generate", stream=True)
        self._control = handle.options(method_name="control")
        self._name = name
        self._policy = policy or FailoverPolicy()
        self._observer = observer or NoFailoverObserver()
        self._serial = itertools.count()
        self._groups: dict[str, Group] = {}
        self._waiting: list[PlacedPrompt] = []  # for a replica that is well and fits
        self._links = ControlLinks(self._send_control)
        self._book = ReplicaBook(
            self.running_replicas, self._ask, across_fingerprints=self._policy.across_fingerprints, rule=rule
        )
        self._tokens_per_request = TOKENS_PER_REQUEST if rule is None else rule.tokens_per_request
        self._placements = placements or NoPlacementObserver()
        self._rebalancer: Rebalancer[tuple[Group, PlacedPrompt]] = Rebalancer()
        self.last_heard_s = -float("inf")  # time.monotonic() of the last frame of any replica
        self.fingerprint = ""  # of the replica that last opened a group
        self._waker = Waker(handle, self.running_replicas)
        self._waking: asyncio.Task[None] | None = None
        self._housekeeping = spawn(self._keep_house())

    def running_replicas(self) -> tuple[str, ...]:
        return running_replicas(self._handle.app_name, self._handle.deployment_name)

    @property
    def num_unfinished(self) -> int:
        """Requests handed over here, whether an engine has taken them or not."""
        waiting = sum(not stream.finished for item in self._waiting for stream in item.streams)
        return waiting + sum(group.num_live_members for group in self._groups.values())

    def unique_request_id(self, request_id: str) -> str:
        """Clients choose ids; the engine's must differ."""
        return f"{request_id}@{self._name}.{next(self._serial)}"

    def submit(self, placed: Sequence[PlacedPrompt]) -> list[asyncio.Future[Opening]]:
        """Hands prompts over, in one streaming call for each replica chosen; returns at once.

        Returns one future for each prompt, of the opening of its first group. It fails with UnavailableError, or with
        OverloadedError where the replicas are full.
        """
        if (prefixes := self._book.prefixes) is not None:
            for item in placed:
                item.chain = prefixes.chain(item.prompt.token_ids)
        self._dispatch(placed)
        return [item.opened for item in placed]

    async def close(self) -> None:
        self._housekeeping.cancel()
        if self._waking is not None:
            self._waking.cancel()
        error = UnavailableError("the ingress replica is shutting down")
        for group in list(self._groups.values()):
            self._end(group, error)
        for item in self._waiting:
            item.end(error)
        self._links.close_all_but(())

    def _dispatch(self, prompts: Iterable[PlacedPrompt]) -> None:
        """Sends prompts to replicas, or lets them wait for one."""
        chosen: list[tuple[PlacedPrompt, str]] = []
        extra: Counter[str] = Counter()
        for item in prompts:
            if not item.is_live:  # aborted before a replica had it: whoever waits for that is told
                item.end(UnavailableError("the request was aborted"))
                continue
            placement = self._book.choose(extra, item.fingerprint, chain=item.chain, excluded=item.full_replicas)
            if placement is None and item.full_replicas:
                item.end(OverloadedError("the engine replicas are full; try again later", reason=Overload.ENGINE_FULL))
                continue
            if placement is None:
                if self.running_replicas() and item.lost_s is None:
                    item.lost_s = time.monotonic()
                self._waiting.append(item)
                continue
            extra[placement.replica_id] += len(item.streams)
            item.num_held_tokens = placement.num_held_tokens
            self._record(placement.replica_id, item.chain)
            if self._book.prefixes is not None:
                self._placements.on_placed(placement, len(item.streams))
            chosen.append((item, placement.replica_id))
        self._start_groups(chosen)
        if self._waiting and not self.running_replicas() and (self._waking is None or self._waking.done()):
            self._waking = spawn(self._wake())

    async def _wake(self) -> None:
        await self._waker.wait(lambda: not self._waiting)
        waiting, self._waiting = self._waiting, []
        self._dispatch(waiting)

    def _record(self, replica_id: str | None, chain: Sequence[bytes]) -> None:
        if self._book.prefixes is not None and replica_id is not None:
            self._book.prefixes.record(replica_id, chain)

    def _start_groups(self, chosen: Iterable[tuple[PlacedPrompt, str]]) -> None:
        """Sends prompts to the replicas that they were given."""
        groups: dict[tuple[str, int, str], list[PlacedPrompt]] = {}
        for item, replica_id in chosen:
            required = "" if self._policy.across_fingerprints else item.fingerprint
            groups.setdefault((replica_id, item.attempt, required), []).append(item)
        for (replica_id, attempt, fingerprint), items in groups.items():
            self._start_group(replica_id, attempt, fingerprint, items)

    def _start_group(self, replica_id: str, attempt: int, fingerprint: str, items: list[PlacedPrompt]) -> None:
        group = Group(f"{self._name}.{next(self._serial)}", attempt, fingerprint, items, replica_id)
        for member, stream in enumerate(group.streams):
            stream.on_finished = partial(self._on_finished, group, member)
            stream.on_abort = partial(self._on_abort, group, member)
        self._groups[group.group_id] = group
        self._book.count(replica_id, len(group.streams))
        self._observer.on_attempt(len(group.streams))
        spawn(self._run(group))

    def _on_finished(self, group: Group, member: int) -> None:
        if group.is_over:
            return
        self._book.count(group.replica_id, -1)
        item, stream = group.items[member], group.streams[member]
        if self._book.prefixes is not None and stream.token_ids:  # the next turn's prompt begins with prompt and answer
            computed = [*item.prompt.token_ids, *stream.token_ids[:-1]]
            self._record(group.replica_id, self._book.prefixes.chain(computed, item.chain))

    def _on_abort(self, group: Group, member: int) -> None:
        if group.is_over:  # the stream waits for a replica
            return
        if not group.num_live_members:
            self._end(group, UnavailableError("the request was aborted"))
        elif group.is_open:
            self._abort_member(group, member)
        # else `_on_opening` sends it: an abort must not overtake the submission

    def _abort_member(self, group: Group, member: int) -> None:
        assert group.replica_id is not None
        self._links.to(group.replica_id).abort(group.group_id, member)

    def _end(self, group: Group, error: UnavailableError) -> None:
        """Ends a group, and the prompts in it with an error."""
        self._remove(group)
        for item in group.prompts:
            item.end(error)

    def _remove(self, group: Group) -> None:
        if self._groups.pop(group.group_id, None) is not None:
            self._book.count(group.replica_id, -group.num_live_members)
        group.close()

    def _lose(self, group: Group, loss: Loss, why: str) -> None:
        """Takes the requests of a group that have not ended away from its replica, and sends them elsewhere."""
        if loss in (Loss.FAILED, Loss.SILENT):
            logger.warning(f"engine replica {group.replica_id} is lost to {group.num_live_members} requests: {why}")
            if group.replica_id is not None:
                self._book.suspect(group.replica_id)
        self._remove(group)
        if loss is not Loss.REFUSED:
            self._observer.on_lost(loss, group.num_live_members)
        for item in group.prompts:
            if item.is_live:
                item.lose(loss, group.last_frame_s, was_open=group.is_open)
        self._dispatch(group.prompts)

    async def _run(self, group: Group) -> None:
        """Demultiplexes one group until its call ends. Never waits for a reader of the streams.

        Of a group that is over, it goes on reading until the replica, which may have been stopped, learns of it.
        """
        if group.is_over:  # before it could be sent
            return
        try:
            group.response = self._generate.remote(encode(group.message), replica_id=group.replica_id)
            async for data in group.response:
                self._on_frame(group, decode_frame(data))
            loss, why = Loss.FAILED, "its stream ended early"
        except _LostError as error:
            loss, why = error.loss, str(error)
        except ReplicaGoneError as error:
            loss, why = Loss.REFUSED, str(error)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                self._end(group, UnavailableError("the ingress replica is shutting down"))
                raise
            loss, why = Loss.FAILED, repr(error)  # Ray says so too when a replica goes down
        except Exception as error:
            loss, why = Loss.FAILED, repr(error)
        if group.is_over:
            return
        if group.num_live_members:
            self._lose(group, loss, why)
        else:
            self._groups.pop(group.group_id)
            group.is_over = True

    def _on_frame(self, group: Group, frame: Frame) -> None:
        self.last_heard_s = time.monotonic()
        if isinstance(frame, TokenFrame):
            self._on_outputs(group, frame.outputs)
        if group.is_over:
            return
        group.last_frame_s, group.silent_s = self.last_heard_s, 0.0
        match frame:
            case TokenFrame() | Heartbeat():
                self._on_load(group, frame)
            case Opening():
                self._on_opening(group, frame)
            case Refusal():
                self._on_refusal(group, frame)

    def _on_outputs(self, group: Group, outputs: Sequence[MemberOutput]) -> None:
        gone = None
        is_stale = False
        for wired in outputs:
            if group.has_released(wired.member):
                continue
            stream = group.streams[wired.member]
            output = from_wire(stream.request_id, wired)
            if output.finish_reason is FinishReason.ABORT:  # not the client's: that one has ended the stream already
                gone = output.error
                output = replace(output, finish_reason=None, error=None)
            is_stale |= not stream.receive(group.attempt, output)
        if is_stale:
            self._observer.on_stale_frame()
            return
        for item in group.prompts if group.attempt else ():
            if item.paused_s is not None and item.has_advanced:
                self._observer.on_recovered(self.last_heard_s - item.paused_s)
                item.paused_s = None
        if gone is not None:
            raise _LostError(Loss.FAILED, gone)

    def _on_opening(self, group: Group, opening: Opening) -> None:
        if opening.replica_id != group.replica_id:
            self._book.count(group.replica_id, -group.num_live_members)
            self._book.count(opening.replica_id, group.num_live_members)
            group.replica_id = opening.replica_id
        self.fingerprint = self._book.fingerprints[opening.replica_id] = opening.fingerprint
        if self._book.prefixes is not None:
            self._book.prefixes.set_capacity(opening.replica_id, opening.num_blocks)
        group.open(opening)
        for member, stream in enumerate(group.streams):
            if stream.finished:  # aborted while the group was on its way
                self._abort_member(group, member)

    def _on_refusal(self, group: Group, refusal: Refusal) -> None:
        if refusal.is_full:
            for item in group.prompts:
                item.full_replicas.add(refusal.replica_id)
        elif refusal.fingerprint:
            self._book.fingerprints[refusal.replica_id] = refusal.fingerprint
        else:
            self._book.suspect(refusal.replica_id)
        raise _LostError(Loss.REFUSED, refusal.reason)

    def _on_load(self, group: Group, frame: TokenFrame | Heartbeat) -> None:
        assert group.replica_id is not None
        group.sequence = frame.sequence
        self._book.observe_load(group.replica_id, frame.num_requests, frame.num_waiting)
        has_ended = isinstance(frame, TokenFrame) and any(output.finish_reason is not None for output in frame.outputs)
        if group.sequence - group.acknowledged >= ACKNOWLEDGE_EVERY or (has_ended and not group.num_live_members):
            self._acknowledge(group)  # the last frame too: the call ends when the replica knows that it was read

    def _acknowledge(self, group: Group) -> None:
        assert group.replica_id is not None
        group.acknowledged = group.sequence
        self._links.to(group.replica_id).acknowledge(group.group_id, group.sequence)

    def _send_control(self, message: bytes, replica_id: str) -> Awaitable[None]:
        if replica_id not in self.running_replicas():  # gone, or draining, when Serve passes no calls on
            raise ReplicaGoneError(f"engine replica {replica_id} has left")
        response: Awaitable[None] = self._control.remote(message, replica_id=replica_id)
        return response

    async def _ask(self, replica_id: str) -> EngineStatus:
        return decode_status(await self._handle.status.remote(replica_id=replica_id))

    async def _keep_house(self) -> None:
        """Late credit for slow groups, replicas that hang or drain, and what is kept of replicas that have left."""
        last_s = time.monotonic()
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            now_s = time.monotonic()
            # Time in which this process was stopped or starved tells nothing about the replicas.
            elapsed_s, last_s = min(now_s - last_s, 2 * HOUSEKEEPING_S), now_s
            try:
                self._tidy(now_s, elapsed_s)
            except Exception:  # a fault of ours, and no reason to look after nobody any more
                logger.exception("the housekeeping of engine calls failed")

    def _tidy(self, now_s: float, elapsed_s: float) -> None:
        for group in list(self._groups.values()):
            self._look_after(group, elapsed_s)
        waiting, self._waiting = self._waiting, []
        self._dispatch(waiting)
        self._give_up(now_s)
        self._rebalance()
        running = {*self.running_replicas(), *(group.replica_id for group in self._groups.values())}
        self._links.close_all_but(running)
        self._book.forget_all_but(running)

    def _look_after(self, group: Group, elapsed_s: float) -> None:
        running = self.running_replicas()
        if group.sequence > group.acknowledged:
            self._acknowledge(group)
        if running:  # else the call waits for a replica
            group.silent_s += elapsed_s
        if not group.num_live_members and group.replica_id not in running:
            self._remove(group)  # it drains, and cannot be told that all was read
        elif group.silent_s > SILENCE_LIMIT_S:
            self._lose(group, Loss.SILENT, f"nothing was heard for {SILENCE_LIMIT_S:g} s")
        elif group.is_open and group.replica_id not in running and self._can_move(group):
            self._lose(group, Loss.LEFT, "it drains")

    def _can_move(self, group: Group) -> bool:
        """Whether another replica would surely take a group whose own drains. While none would, it stays."""
        self._book.learn_fingerprints()
        fingerprints = {item.fingerprint for item in group.prompts}
        return all(self._book.would_fit(each) for each in fingerprints)

    def _rebalance(self) -> None:
        """Moves requests that wait in a queue to replicas that have none. The engines answer the same, wherever."""
        queues = partial(queues_of, self._groups.values(), self._tokens_per_request)
        chosen = []
        for (group, item), target in self._rebalancer.moves(self._book.depths(), queues):
            members = group.release(item)
            self._book.count(group.replica_id, -len(members))
            if group.num_live_members:
                for member in members:
                    self._abort_member(group, member)
            else:
                self._remove(group)
            item.move()
            item.num_held_tokens = 0
            self._record(target, item.chain)
            self._placements.on_moved(len(members))
            chosen.append((item, target))
        self._start_groups(chosen)

    def _give_up(self, now_s: float) -> None:
        """Ends the requests that have waited long enough for a replica, after they had lost one."""
        timeout_s = self._policy.timeout_s
        late = UnavailableError(f"the engine replica was lost, and no other took over within {timeout_s:g} s")
        on_their_way = [group for group in self._groups.values() if not group.is_open]
        for item in (*self._waiting, *(item for group in on_their_way for item in group.prompts)):
            if item.lost_s is not None and now_s - item.lost_s > timeout_s:
                item.end(late)
        for group in on_their_way:
            if not group.num_live_members:
                self._remove(group)

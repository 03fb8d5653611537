"""What one ingress knows of the engine replicas, and which of them it would send a request to."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from serve_app.background import spawn
from serve_app.messages import EngineStatus
from serve_app.replica_registry import ReplicaGoneError

ASK_PAUSE_S = 1.0  # between questions to a replica that is not well
LOAD_EXPIRY_S = 2.0  # what a replica said of its load before that says nothing about now


@dataclass(frozen=True)
class _Load:
    num_foreign: int  # requests of other ingresses
    seen_s: float


class ReplicaBook:
    """Lives on one event loop."""

    def __init__(
        self,
        running: Callable[[], tuple[str, ...]],
        ask: Callable[[str], Awaitable[EngineStatus]],
        *,
        across_fingerprints: bool,
    ) -> None:
        """running: ids of the replicas that may be called now. ask: one of them how it is; raises where it is not well.
        across_fingerprints: one engine may continue the answer of another kind of engine."""
        self.fingerprints: dict[str, str] = {}  # of replicas that have told
        self._running = running
        self._ask_replica = ask
        self._across_fingerprints = across_fingerprints
        self._own: Counter[str] = Counter()  # unfinished requests of ours, by replica
        self._loads: dict[str, _Load] = {}
        self._suspects: set[str] = set()
        self._asked: set[str] = set()  # whose answer is to come

    def count(self, replica_id: str | None, change: int) -> None:
        """So many requests of ours more, or fewer, are with a replica."""
        if replica_id is not None:
            self._own[replica_id] += change

    def observe_load(self, replica_id: str, num_requests: int) -> None:
        self._loads[replica_id] = _Load(max(0, num_requests - self._own[replica_id]), time.monotonic())

    def suspect(self, replica_id: str) -> None:
        """Chooses it no more until it answers that it is well."""
        self._suspects.add(replica_id)
        self._ask(replica_id)

    def learn_fingerprints(self) -> None:
        """Asks the replicas that have not told theirs."""
        for replica_id in self._running():
            if replica_id not in self.fingerprints:
                self._ask(replica_id)

    def choose(
        self, extra: Counter[str], fingerprint: str, *, known_only: bool = False, excluded: Collection[str] = ()
    ) -> str | None:
        """The less busy of two; with one ingress and two replicas that is exact. None: it is better to wait.

        extra: requests that are about to be sent. fingerprint: of the engine that is to be continued, or empty.
        known_only: replicas whose fingerprint is not known yet are left out, as are those excluded.
        """
        trusted = [id_ for id_ in self._running() if id_ not in self._suspects and id_ not in excluded]
        if known_only:
            trusted = [replica_id for replica_id in trusted if replica_id in self.fingerprints]
        fitting = trusted
        if fingerprint:
            fitting = [id_ for id_ in trusted if self.fingerprints.get(id_, fingerprint) == fingerprint]
            if not fitting and self._across_fingerprints:
                fitting = trusted
        if not fitting:
            return None
        return min(random.sample(fitting, min(2, len(fitting))), key=lambda id_: self._busyness(id_) + extra[id_])

    def forget_all_but(self, replica_ids: Collection[str | None]) -> None:
        kept: tuple[dict[str, _Load] | dict[str, str] | Counter[str], ...] = (self._loads, self.fingerprints, self._own)
        for each in kept:
            for replica_id in each.keys() - set(replica_ids):
                del each[replica_id]
        self._suspects = {replica_id for replica_id in self._suspects if replica_id in replica_ids}

    def _busyness(self, replica_id: str) -> int:
        load = self._loads.get(replica_id)
        is_fresh = load is not None and time.monotonic() - load.seen_s < LOAD_EXPIRY_S
        return self._own[replica_id] + (load.num_foreign if load is not None and is_fresh else 0)

    def _ask(self, replica_id: str) -> None:
        if replica_id not in self._asked:
            self._asked.add(replica_id)
            spawn(self._ask_until_well(replica_id))

    async def _ask_until_well(self, replica_id: str) -> None:
        """One that was stopped answers when it goes on."""
        try:
            while replica_id in self._running():
                try:
                    status = await self._ask_replica(replica_id)
                except ReplicaGoneError:
                    return
                except Exception:  # its engine is dead, or the replica is and nobody has noticed yet
                    await asyncio.sleep(ASK_PAUSE_S)
                else:
                    self.fingerprints[replica_id] = status.fingerprint
                    self._suspects.discard(replica_id)
                    return
        finally:
            self._asked.discard(replica_id)

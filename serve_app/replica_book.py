"""What one ingress knows of the engine replicas, and which of them it would send a request to."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

from serve_app.background import spawn
from serve_app.messages import EngineStatus
from serve_app.placement import Candidate, Choice, Placement, PlacementRule, two_of
from serve_app.prefix_index import PrefixIndex
from serve_app.rebalancing import Depth
from serve_app.replica_registry import ReplicaGoneError

ASK_PAUSE_S = 1.0  # between questions to a replica that is not well
LOAD_EXPIRY_S = 2.0  # what a replica said of its load before that says nothing about now


@dataclass(frozen=True)
class _Load:
    num_foreign: int  # requests of other ingresses
    num_waiting: int
    seen_s: float


class ReplicaBook:
    """Lives on one event loop."""

    def __init__(
        self,
        running: Callable[[], tuple[str, ...]],
        ask: Callable[[str], Awaitable[EngineStatus]],
        *,
        across_fingerprints: bool,
        rule: PlacementRule | None = None,
    ) -> None:
        """running: ids of the replicas that may be called now. ask: one of them how it is; raises where it is not well.
        across_fingerprints: one engine may continue the answer of another kind of engine. rule: None: what a replica
        has in its cache does not count."""
        self.prefixes = None if rule is None else PrefixIndex(rule.block_size)
        self.fingerprints: dict[str, str] = {}  # of replicas that have told
        self._running = running
        self._ask_replica = ask
        self._across_fingerprints = across_fingerprints
        self._rule = rule
        self._rng = random.Random()
        self._own: Counter[str] = Counter()  # unfinished requests of ours, by replica
        self._loads: dict[str, _Load] = {}
        self._suspects: set[str] = set()
        self._asked: set[str] = set()  # whose answer is to come

    def count(self, replica_id: str | None, change: int) -> None:
        """So many requests of ours more, or fewer, are with a replica."""
        if replica_id is not None:
            self._own[replica_id] += change

    def observe_load(self, replica_id: str, num_requests: int, num_waiting: int) -> None:
        num_foreign = max(0, num_requests - self._own[replica_id])
        self._loads[replica_id] = _Load(num_foreign, num_waiting, time.monotonic())

    def depths(self) -> list[Depth]:
        """Of the replicas that are well. Where none of ours is and none was heard of, nothing waits."""
        return [self._depth(id_) for id_ in self._running() if id_ not in self._suspects]

    def _depth(self, replica_id: str) -> Depth:
        load, num_requests = self._fresh_load(replica_id), self._busyness(replica_id)
        own_part = self._own[replica_id] / num_requests if num_requests else 1.0
        return Depth(replica_id, num_requests, 0 if load is None else load.num_waiting, own_part)

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
        self, extra: Counter[str], fingerprint: str, *, chain: Sequence[bytes] = (), excluded: Collection[str] = ()
    ) -> Placement | None:
        """By the rule; without one, the less busy of two. None: it is better to wait.

        extra: requests that are about to be sent. fingerprint: of the engine that is to be continued, or empty.
        chain: of the prompt, see PrefixIndex. excluded: replicas that are left out.
        """
        candidates = [
            Candidate(id_, self._busyness(id_) + extra[id_], self._num_held_tokens(id_, chain))
            for id_ in self._fitting(fingerprint, excluded, known_only=False)
        ]
        if not candidates:
            return None
        if self._rule is None:
            least_busy = min(two_of(candidates, self._rng), key=lambda each: each.num_requests)
            return Placement(least_busy.replica_id, Choice.NEW, 0)
        return self._rule.choose(candidates, chain, self._rng)

    def would_fit(self, fingerprint: str) -> bool:
        """Whether a replica would surely take what an engine of this fingerprint, or any, has begun."""
        return bool(self._fitting(fingerprint, (), known_only=True))

    def _num_held_tokens(self, replica_id: str, chain: Sequence[bytes]) -> int:
        if self.prefixes is None:
            return 0
        return self.prefixes.num_held_blocks(replica_id, chain) * self.prefixes.block_size

    def _fitting(self, fingerprint: str, excluded: Collection[str], *, known_only: bool) -> list[str]:
        """known_only: replicas whose fingerprint is not known yet are left out."""
        trusted = [id_ for id_ in self._running() if id_ not in self._suspects and id_ not in excluded]
        if known_only:
            trusted = [replica_id for replica_id in trusted if replica_id in self.fingerprints]
        fitting = trusted
        if fingerprint:
            fitting = [id_ for id_ in trusted if self.fingerprints.get(id_, fingerprint) == fingerprint]
            if not fitting and self._across_fingerprints:
                fitting = trusted
        return fitting

    def forget_all_but(self, replica_ids: Collection[str | None]) -> None:
        kept: tuple[dict[str, _Load] | dict[str, str] | Counter[str], ...] = (self._loads, self.fingerprints, self._own)
        for each in kept:
            for replica_id in each.keys() - set(replica_ids):
                del each[replica_id]
        self._suspects = {replica_id for replica_id in self._suspects if replica_id in replica_ids}
        if self.prefixes is not None:
            self.prefixes.forget_all_but(replica_ids)

    def _busyness(self, replica_id: str) -> int:
        load = self._fresh_load(replica_id)
        return self._own[replica_id] + (0 if load is None else load.num_foreign)

    def _fresh_load(self, replica_id: str) -> _Load | None:
        load = self._loads.get(replica_id)
        return load if load is not None and time.monotonic() - load.seen_s < LOAD_EXPIRY_S else None

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

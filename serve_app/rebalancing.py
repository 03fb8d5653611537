"""Which requests should leave a queue for a replica that has none: one that has just started, above all.

A request that an engine has not begun costs nothing to move. The rule is pure; serve_app.engine_client follows it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

MIN_GAP = 4  # requests that a replica has more than another, before any of them moves
MAX_MOVES_AT_ONCE = 64  # of an ingress, each time that it looks (four times a second)
MAX_MOVES = 3  # of one request

Item = TypeVar("Item")


@dataclass
class Depth:
    """Of one replica, as an ingress knows it."""

    replica_id: str
    num_requests: float  # running and waiting
    num_waiting: float  # of those, the ones that the engine has not begun
    own_part: float = 1.0  # of its requests, those of this ingress: 0 to 1


@dataclass(frozen=True)
class Queued(Generic[Item]):
    """A prompt of this ingress of which no token has come."""

    item: Item
    num_requests: int  # its choices
    cost_requests: float = 0.0  # of leaving what its replica has in the cache: worth a gap of so many


class Rebalancer(Generic[Item]):
    """Asked again and again. Only what has waited since the last time counts: engines learn of new requests between
    two steps, so for a moment every request waits. After moves it skips one time: what the replicas tell until then
    may be of before."""

    def __init__(self) -> None:
        self._waiting_before: dict[str, float] = {}

    def moves(
        self, depths: Sequence[Depth], queues: Callable[[], Mapping[str, list[Queued[Item]]]]
    ) -> list[tuple[Item, str]]:
        """What should move, and to which replica.

        queues: by replica, the latest last, which is the one that waits if only some do; asked where it matters.
        """
        before, self._waiting_before = self._waiting_before, {each.replica_id: each.num_waiting for each in depths}
        lasting = [replace(each, num_waiting=min(each.num_waiting, before.get(each.replica_id, 0))) for each in depths]
        plan = _Plan(lasting)
        moves: list[tuple[Item, str]] = []
        found: Mapping[str, list[Queued[Item]]] | None = None
        while len(moves) < MAX_MOVES_AT_ONCE and (pair := plan.next_pair()) is not None:
            source, target = pair
            found = queues() if found is None else found
            queue = found.get(source.replica_id)
            if not queue:
                source.own_part = 0  # it has nothing to give
                continue
            queued = queue.pop()
            if source.num_requests - target.num_requests > queued.cost_requests:
                plan.count(source, target, queued.num_requests)
                moves.append((queued.item, target.replica_id))
        if moves:
            self._waiting_before = {}
        return moves


class _Plan:
    """Depths as they will be with the moves counted so far."""

    def __init__(self, depths: Sequence[Depth]) -> None:
        self._depths = depths

    def next_pair(self) -> tuple[Depth, Depth] | None:
        """From the fullest replica where requests wait to the emptiest where none does; None: it is not worth it."""
        sources = [depth for depth in self._depths if depth.num_waiting >= 1 and depth.own_part > 0]
        targets = [depth for depth in self._depths if depth.num_waiting < 1]
        if not sources or not targets:
            return None
        source = max(sources, key=lambda depth: depth.num_requests)
        target = min(targets, key=lambda depth: depth.num_requests)
        return (source, target) if source.num_requests - target.num_requests >= MIN_GAP else None

    def count(self, source: Depth, target: Depth, num_requests: int) -> None:
        """So many of this ingress's requests move. Other ingresses look at the same numbers: each moves its part."""
        num_all = num_requests / source.own_part
        source.num_requests -= num_all
        source.num_waiting -= num_all
        target.num_requests += num_all

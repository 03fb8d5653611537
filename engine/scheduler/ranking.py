"""The one order among requests: who is admitted first, who is preempted last."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import NamedTuple

from engine.request import Request


def virtual_arrival_s(arrival_s: float, priority: int, priority_aging_s: float) -> float:
    """When a request counts as arrived: `priority_aging_s` later for each level of priority it stands behind.

    Priorities that age with waiting time need no clock. A request that gains one level in `priority_aging_s` has at
    time t the urgency `priority - (t - arrival_s) / priority_aging_s`, and t cancels out of the comparison of two
    requests: which is the more urgent never changes. So the order is fixed at arrival, and nobody starves: ahead of
    a request are those that came before its virtual arrival, however many more urgent ones come after it.
    """
    return arrival_s + priority * priority_aging_s


class Ranked(NamedTuple):
    """A request and its place. Tuples compare by virtual arrival, then by order of submission, which is unique."""

    virtual_arrival_s: float
    sequence: int
    request: Request


class RankedRequests:
    """Requests in rank order, the most urgent first. Finding a place is O(log n), making room moves pointers."""

    def __init__(self) -> None:
        self._entries: list[Ranked] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Ranked]:
        return iter(self._entries)

    def __getitem__(self, index: int) -> Ranked:
        return self._entries[index]

    def add(self, entry: Ranked) -> None:
        insort(self._entries, entry)

    def remove(self, entry: Ranked) -> None:
        index = bisect_left(self._entries, entry)
        is_here = index < len(self._entries) and self._entries[index] is entry
        assert is_here, f"request {entry.request.request_id} is not in this order"
        del self._entries[index]

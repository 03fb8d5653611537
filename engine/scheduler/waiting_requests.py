"""All requests that wait, and which is admitted next."""

from collections.abc import Iterator

from engine.request import Request
from engine.scheduler.fair_queue import FairQueue
from engine.scheduler.ranking import Ranked, RankedRequests


class WaitingRequests:
    """In rank order, and within one priority shared fairly between tenants.

    The first in rank says which priority is served next, so priority and its aging mean the same with tenants as
    without. Of the requests with this priority the one is taken whose tenant's turn it is: with one tenant the first
    itself. Iteration is in rank order.
    """

    def __init__(self, quantum_tokens: int) -> None:
        self._quantum_tokens = quantum_tokens
        self._all = RankedRequests()
        self._queues: dict[int, FairQueue] = {}  # by priority
        self._num_shared = 0  # of the queues

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Ranked]:
        return iter(self._all)

    @property
    def are_shared(self) -> bool:
        """Whether several tenants have requests of one priority, waiting or running."""
        return self._num_shared > 0

    def next(self) -> Ranked:
        """The request to be admitted next; there must be one."""
        first = self._all[0]
        queue = self._queues[first.request.priority]
        return queue.next() if queue.is_shared else first

    def heads(self) -> Iterator[Ranked]:
        """The first of each tenant that waits, of those with the priority of the next one."""
        return self._queues[self._all[0].request.priority].heads()

    def enter(self, entry: Ranked) -> None:
        """A new request waits."""
        request = entry.request
        queue = self._queues.get(request.priority)
        if queue is None:
            queue = self._queues[request.priority] = FairQueue(self._quantum_tokens)
        was_shared = queue.is_shared
        queue.open(request.tenant)
        self._num_shared += queue.is_shared - was_shared
        self.add(entry)

    def leave(self, entry: Ranked) -> None:
        """A request has ended that waits no more."""
        request = entry.request
        queue = self._queues[request.priority]
        was_shared = queue.is_shared
        queue.close(request.tenant)
        self._num_shared += queue.is_shared - was_shared
        if not queue:
            del self._queues[request.priority]

    def add(self, entry: Ranked) -> None:
        """A request that was admitted waits again."""
        self._all.add(entry)
        self._queues[entry.request.priority].add(entry)

    def remove(self, entry: Ranked) -> None:
        """The request waits no more."""
        self._all.remove(entry)
        self._queues[entry.request.priority].remove(entry)

    def charge(self, request: Request, num_tokens: int) -> None:
        """So many tokens of a request, which need not wait, are served."""
        self._queues[request.priority].charge(request.tenant, num_tokens)

    def check_integrity(self) -> None:
        """Assert that the queues hold what waits, and nothing else."""
        queued = [entry for queue in self._queues.values() for entry in queue.waiting()]
        assert sorted(queued) == list(self._all), "the queues of the priorities hold other requests than those waiting"
        assert self._num_shared == sum(queue.is_shared for queue in self._queues.values())

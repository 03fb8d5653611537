"""Places in the queue of one ingress replica, and who may have one."""

from collections import Counter, OrderedDict

from engine.errors import InvalidRequest
from serve_app.drain_rate import DrainRate
from serve_app.errors import Overload, OverloadedError

RECENT_S = 10.0  # for so long a tenant that was turned away keeps its claim to a share
_DEFAULT_RETRY_S = 1.0
_MAX_RETRY_S = 60.0


class QueuePlaces:
    """A place belongs to one choice of one request, from its arrival to its first token. Free of clocks and threads.

    One tenant may have every place while nobody else asks. Where the queue is more than half full, each of those that
    have a place, or were turned away in the last RECENT_S, may have an equal share: who has more waits until its own
    requests have moved on. max_per_tenant is a bound in any case.
    """

    def __init__(self, max_places: int, max_per_tenant: int | None = None) -> None:
        self._max_places = max_places
        self._max_per_tenant = max_places if max_per_tenant is None else min(max_places, max_per_tenant)
        self._held: Counter[str] = Counter()  # by tenant; those with none are not in it
        self._num_held = 0
        self._turned_away_s: OrderedDict[str, float] = OrderedDict()  # tenant: when; the oldest first
        self._rate = DrainRate()

    def take(self, tenant: str, count: int, now_s: float) -> None:
        """Raises:
        InvalidRequest: more than there are.
        OverloadedError: not now.
        """
        if count > self._max_per_tenant:
            raise InvalidRequest(
                f"the request asks for {count} choices, and this service queues at most {self._max_per_tenant}", "n"
            )
        self._forget_claims(now_s)
        num_missing = self._num_held + count - self._max_places
        if num_missing > 0:
            self._claim(tenant, now_s)
            raise OverloadedError(
                f"{self._num_held} requests are waiting already; try again later", self.retry_after_s(num_missing)
            )
        held, limit = self._held[tenant], self._limit(tenant, count)
        if held + count > limit:
            part = held / self._num_held  # of the places that are given back, about this part is its own
            raise OverloadedError(
                f"{held} of your requests are waiting already; try again later",
                self.retry_after_s((held + count - limit) / part),
                Overload.KEY_LIMIT,
            )
        self._rate.pass_time(now_s, self._num_held > 0)
        self._turned_away_s.pop(tenant, None)
        self._held[tenant] = held + count
        self._num_held += count

    def give_back(self, tenant: str, count: int, now_s: float) -> None:
        self._rate.pass_time(now_s, self._num_held > 0)
        self._rate.count(count)
        self._num_held -= count
        self._held[tenant] -= count
        assert self._held[tenant] >= 0, "more places are given back than were taken"
        if not self._held[tenant]:
            del self._held[tenant]

    def retry_after_s(self, num_places: float = 1) -> float:
        """When so many places are likely to be free, by the rate measured; a guess where there is none."""
        seconds = self._rate.seconds_for(num_places)
        return _DEFAULT_RETRY_S if seconds is None else min(seconds, _MAX_RETRY_S)

    def _limit(self, tenant: str, count: int) -> int:
        """Places that the tenant may have now."""
        if 2 * (self._num_held + count) <= self._max_places:
            return self._max_per_tenant
        num_tenants = len(self._held.keys() | self._turned_away_s.keys() | {tenant})
        return min(self._max_per_tenant, max(count, self._max_places // num_tenants))

    def _claim(self, tenant: str, now_s: float) -> None:
        self._turned_away_s.pop(tenant, None)
        self._turned_away_s[tenant] = now_s
        if len(self._turned_away_s) > self._max_places:
            self._turned_away_s.popitem(last=False)

    def _forget_claims(self, now_s: float) -> None:
        while self._turned_away_s and now_s - next(iter(self._turned_away_s.values())) > RECENT_S:
            self._turned_away_s.popitem(last=False)

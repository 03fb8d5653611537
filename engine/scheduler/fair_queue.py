"""Waiting requests of several tenants, served in turn: deficit round-robin by tokens (Shreedhar and Varghese 1996)."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from engine.scheduler.ranking import Ranked, RankedRequests


@dataclass(eq=False, slots=True)
class _Account:
    """What one tenant has coming. It is kept for as long as the tenant has requests, waiting or running."""

    round: int  # as of which the quantum has been added
    deficit_tokens: int = 0  # what may still be served in this round; below 0: served in advance
    num_requests: int = 0
    waiting: RankedRequests = field(default_factory=RankedRequests)


class FairQueue:
    """Whose request is next, so that tenants with requests waiting get equal numbers of tokens, whatever they ask for.

    In each round every tenant that waits may have `quantum_tokens` served, in the order of a ring. What a request
    costs is known only as it is served, so a tenant is served while its deficit is above 0, and what it then gets too
    much it has less in the rounds after. Of two tenants that wait all the time from when their accounts were opened,
    one so gets at most a quantum and the largest single charge more than the other. A tenant that waits anew comes last
    in its round, behind a quantum of each of the others; what it did not use while it did not wait is lost, and what it
    had in advance is paid off by the rounds that pass.

    While there is one tenant, nobody is owed anything: its requests are served in their own order.
    """

    def __init__(self, quantum_tokens: int) -> None:
        assert quantum_tokens > 0
        self._quantum_tokens = quantum_tokens
        self._accounts: dict[str, _Account] = {}
        self._round = 0
        self._ring: OrderedDict[str, _Account] = OrderedDict()  # tenants that wait, and whose turn is to come
        self._served: OrderedDict[str, _Account] = OrderedDict()  # tenants that wait, and have had it in this round

    @property
    def is_shared(self) -> bool:
        return len(self._accounts) > 1

    def __bool__(self) -> bool:
        """Whether anybody has requests here, waiting or running."""
        return bool(self._accounts)

    def heads(self) -> Iterator[Ranked]:
        """The first waiting request of each tenant that has one."""
        for account in chain(self._ring.values(), self._served.values()):
            yield account.waiting[0]

    def waiting(self) -> Iterator[Ranked]:
        """All that wait, tenant by tenant."""
        for account in chain(self._ring.values(), self._served.values()):
            yield from account.waiting

    def open(self, tenant: str) -> None:
        """A request of the tenant has come. It is not waiting yet."""
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = _Account(self._round - 1)
        account.num_requests += 1

    def close(self, tenant: str) -> None:
        """A request of the tenant has ended, and waits no more."""
        account = self._accounts[tenant]
        account.num_requests -= 1
        assert account.num_requests >= len(account.waiting), f"a request of {tenant} has ended and waits"
        if account.num_requests:
            return
        del self._accounts[tenant]
        if not self.is_shared:
            for alone in self._accounts.values():
                alone.deficit_tokens = 0

    def add(self, entry: Ranked) -> None:
        """The request waits, for the first time or again."""
        tenant = entry.request.tenant
        account = self._accounts[tenant]
        if not account.waiting:
            self._catch_up(account, self._round - 1)
            account.deficit_tokens = min(account.deficit_tokens, 0)
            (self._ring if account.round < self._round else self._served)[tenant] = account
        account.waiting.add(entry)

    def remove(self, entry: Ranked) -> None:
        """The request waits no more: it runs, or has been given up."""
        tenant = entry.request.tenant
        account = self._accounts[tenant]
        account.waiting.remove(entry)
        if not account.waiting:
            del (self._ring if tenant in self._ring else self._served)[tenant]

    def next(self) -> Ranked:
        """The request to be served next; the same one until something is charged, added or removed."""
        while True:
            if not self._ring:
                assert self._served, "nobody waits"
                self._ring, self._served = self._served, self._ring
                self._round += 1
            tenant, account = next(iter(self._ring.items()))
            self._catch_up(account, self._round)
            if account.deficit_tokens > 0 or not self.is_shared:
                return account.waiting[0]
            self._served[tenant] = self._ring.pop(tenant)

    def charge(self, tenant: str, num_tokens: int) -> None:
        """The tenant has been served so much. It may pay in advance, and may not wait."""
        if self.is_shared:
            self._accounts[tenant].deficit_tokens -= num_tokens

    def _catch_up(self, account: _Account, to_round: int) -> None:
        """Add the quanta of the rounds up to this one."""
        if account.round < to_round:
            account.deficit_tokens += (to_round - account.round) * self._quantum_tokens
            account.round = to_round

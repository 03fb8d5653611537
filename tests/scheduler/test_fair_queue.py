"""Deficit round-robin: equal shares for those who wait, nobody starves, and nobody pays for what was not served."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.request import Request, SamplingParams
from engine.scheduler.fair_queue import FairQueue
from engine.scheduler.ranking import Ranked

SETTINGS = settings(max_examples=200, deadline=None, derandomize=True)
LARGEST = 40  # tokens of one request
quanta = st.integers(1, 60)
sizes = st.integers(1, LARGEST)


class Bench:
    """A queue, what was served to whom, and requests of a size each."""

    def __init__(self, quantum_tokens: int) -> None:
        self.queue = FairQueue(quantum_tokens)
        self.served: Counter[str] = Counter()
        self.num_waiting: Counter[str] = Counter()
        self.num_added = 0

    def arrive(self, tenant: str, num_tokens: int) -> Ranked:
        request = Request(f"r{self.num_added}", [0] * num_tokens, SamplingParams(seed=0), tenant=tenant)
        entry = Ranked(0.0, self.num_added, request)
        self.num_added += 1
        self.num_waiting[tenant] += 1
        self.queue.open(tenant)
        self.queue.add(entry)
        return entry

    def serve(self) -> str:
        """The next request, whole: it ends at once."""
        entry = self.queue.next()
        assert self.queue.next() is entry
        tenant, num_tokens = entry.request.tenant, entry.request.num_tokens
        self.queue.remove(entry)
        self.queue.charge(tenant, num_tokens)
        self.queue.close(tenant)
        self.served[tenant] += num_tokens
        self.num_waiting[tenant] -= 1
        return tenant

    def cancel(self, entry: Ranked) -> None:
        self.queue.remove(entry)
        self.queue.close(entry.request.tenant)
        self.num_waiting[entry.request.tenant] -= 1


@SETTINGS
@given(quantum=quanta, loads=st.lists(st.lists(sizes, min_size=1, max_size=40), min_size=2, max_size=5))
def test_tenants_that_wait_get_the_same_up_to_a_quantum_and_a_request(quantum: int, loads: list[list[int]]) -> None:
    bench = Bench(quantum)
    for place, load in enumerate(loads):
        for num_tokens in load:
            bench.arrive(f"t{place}", num_tokens)
    largest = max(map(max, loads))
    while all(bench.num_waiting[f"t{place}"] for place in range(len(loads))):
        services = [bench.served[f"t{place}"] for place in range(len(loads))]
        assert max(services) - min(services) <= quantum + largest
        bench.serve()


@SETTINGS
@given(quanta, st.integers(1, 4), st.lists(sizes, min_size=1, max_size=200), st.integers(0, 100))
def test_a_newcomer_waits_for_one_turn_of_each_of_the_others(
    quantum: int, rivals: int, load: list[int], cut: int
) -> None:
    bench = Bench(quantum)
    for place, num_tokens in enumerate(load * 3):
        bench.arrive(f"t{place % rivals}", num_tokens)
    for _ in range(min(cut, len(load))):
        bench.serve()
    before = bench.served.total()
    bench.arrive("new", LARGEST)
    num_turns = len({tenant for tenant, count in bench.num_waiting.items() if count}) - 1
    while bench.serve() != "new":
        assert bench.served.total() - before <= num_turns * (quantum + LARGEST)


@SETTINGS
@given(
    quantum=quanta,
    actions=st.lists(st.tuples(st.sampled_from("AABC"), sizes, st.sampled_from(["arrive", "serve", "cancel", "pay"]))),
)
def test_whoever_waits_is_served_in_its_own_order_until_nobody_does(
    quantum: int, actions: list[tuple[str, int, str]]
) -> None:
    bench = Bench(quantum)
    waiting: dict[str, list[Ranked]] = {tenant: [] for tenant in "ABC"}

    def serve() -> None:
        entry = bench.queue.next()
        assert entry is waiting[entry.request.tenant].pop(0)
        bench.serve()

    for tenant, num_tokens, action in actions:
        if action == "arrive":
            waiting[tenant].append(bench.arrive(tenant, num_tokens))
        elif action == "cancel" and waiting[tenant]:
            bench.cancel(waiting[tenant].pop(num_tokens % len(waiting[tenant])))
        elif action == "pay" and waiting[tenant]:  # for a request of its own that runs meanwhile
            bench.queue.charge(tenant, num_tokens)
        elif action == "serve" and any(waiting.values()):
            serve()
        assert sorted(bench.queue.waiting()) == sorted(entry for entries in waiting.values() for entry in entries)
        assert [entry is waiting[entry.request.tenant][0] for entry in bench.queue.heads()].count(False) == 0
    while any(waiting.values()):
        serve()
    assert not bench.queue


@SETTINGS
@given(quantum=quanta, cancelled=st.lists(sizes, max_size=20), load=st.lists(sizes, min_size=30, max_size=30))
def test_what_was_cancelled_is_not_paid_for(quantum: int, cancelled: list[int], load: list[int]) -> None:
    """B's service is the same whether or not it had given up other requests before they were served."""

    def served(cancelled: list[int]) -> list[str]:
        bench = Bench(quantum)
        kept = bench.arrive("B", 1)  # its account is not closed meanwhile
        for num_tokens in load:
            bench.arrive("A", num_tokens)
        entries = [bench.arrive("B", num_tokens) for num_tokens in cancelled]
        for entry in entries:
            bench.cancel(entry)
        for num_tokens in load:
            bench.arrive("B", num_tokens)
        assert kept.request.tenant == "B"
        return [bench.serve() for _ in range(61)]

    assert served(cancelled) == served([])


def test_one_tenant_is_served_in_order_and_owes_nothing_to_a_second_one() -> None:
    bench = Bench(10)
    entries = [bench.arrive("A", 1000) for _ in range(3)]
    for entry in entries[:2]:
        assert bench.queue.next() is entry
        bench.serve()
    bench.arrive("B", 1000)
    assert sorted([bench.serve(), bench.serve()]) == ["A", "B"]


def test_a_tenant_pays_for_what_it_got_while_it_did_not_wait() -> None:
    """B's request runs and is charged as it goes on, while A waits; then B wants another one."""
    bench = Bench(10)
    first = bench.arrive("B", 5)
    for _ in range(20):
        bench.arrive("A", 10)
    bench.queue.remove(first)
    for _ in range(4):  # as much as four requests of A, of which two are served meanwhile
        bench.queue.charge("B", 10)
    assert [bench.serve(), bench.serve()] == ["A", "A"]
    bench.arrive("B", 10)
    assert [bench.serve() for _ in range(4)] == ["A", "A", "A", "B"]  # A's turn comes first in a round


def test_credit_is_not_saved_up() -> None:
    """B has requests that run all the time, but none that waits; it is not served twenty rounds at once later."""
    bench = Bench(10)
    running = bench.arrive("B", 10)
    bench.queue.remove(running)
    for _ in range(60):
        bench.arrive("A", 10)
    for _ in range(20):
        bench.serve()
    for _ in range(30):
        bench.arrive("B", 10)
    turns = [bench.serve() for _ in range(20)]
    assert abs(turns.count("A") - turns.count("B")) <= 2

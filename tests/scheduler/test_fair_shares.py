"""Tenants that share one engine: who comes late, who holds most, and what a flood costs the others, in steps."""

import random
from typing import Any

import pytest

from engine.cache.block_manager import BlockManager
from engine.cache.block_pool import BlockPool
from engine.config import SchedulerConfig
from engine.request import FinishReason, Request, RequestStatus, SamplingParams
from engine.scheduler.fair_exchange import fair_exchange, fair_victim
from engine.scheduler.ranking import Ranked
from engine.scheduler.scheduler import Scheduler
from tests.scheduler.simulation import SimulatedEngine

BLOCK_SIZE = 4


def engine(num_blocks: int = 400, caching: bool = False, **limits: Any) -> SimulatedEngine:
    return SimulatedEngine(SchedulerConfig(**limits), num_blocks, BLOCK_SIZE, caching)


def prompts(seed: int, count: int, shortest: int, longest: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3) for _ in range(draw.randint(shortest, longest))] for _ in range(count)]


class Flooded:
    """A scheduler alone, without the checks that make the simulated engine slow: every token is 1."""

    def __init__(self, num_blocks: int, **limits: Any) -> None:
        self.scheduler = Scheduler(SchedulerConfig(**limits), BlockManager(BlockPool(num_blocks, BLOCK_SIZE, False)))
        self.num_steps = 0
        self.num_added = 0

    def add(self, prompt: list[int], max_tokens: int, tenant: str) -> Request:
        sampling = SamplingParams(seed=0, max_tokens=max_tokens)
        request = Request(f"r{self.num_added}", prompt, sampling, arrival_s=float(self.num_steps), tenant=tenant)
        self.num_added += 1
        self.scheduler.add(request)
        return request

    def step(self) -> None:
        step = self.scheduler.schedule()
        sampling = [chunk.request for chunk in step.chunks if chunk.samples]
        self.scheduler.commit(step)
        for request in sampling:
            request.append_output(1)
            if len(request.output_token_ids) == request.sampling.max_tokens:
                self.scheduler.finish(request, FinishReason.LENGTH)
        self.num_steps += 1

    def steps_to_first_tokens(self, requests: list[Request]) -> int:
        """From now until each of them has one."""
        started = self.num_steps
        while not all(request.output_token_ids for request in requests):
            self.step()
        return self.num_steps - started


FLOODED = {
    "seats are free": {"num_blocks": 8000, "max_num_seqs": 256, "token_budget": 512},
    "seats are taken": {"num_blocks": 8000, "max_num_seqs": 32, "token_budget": 256},
    "the cache is full": {"num_blocks": 400, "max_num_seqs": 256, "token_budget": 256},
    "the cache is full of many": {"num_blocks": 4000, "max_num_seqs": 256, "token_budget": 512},
}


@pytest.mark.parametrize("head_start", [0, 7, 60])
@pytest.mark.parametrize("case", FLOODED)
def test_a_flood_at_most_triples_the_time_to_the_first_token(case: str, head_start: int) -> None:
    """A sends 200 requests, and B 10, at once or some steps later. The slowest of ten is their p99."""
    load = prompts(1, 10, 20, 60)
    alone = Flooded(**FLOODED[case])
    solo = alone.steps_to_first_tokens([alone.add(prompt, 20, "B") for prompt in load])

    def flooded(tenant: str) -> int:
        eng = Flooded(**FLOODED[case])
        for prompt in prompts(2, 200, 20, 100):
            eng.add(prompt, 80, "A")
        for _ in range(head_start):
            eng.step()
        return eng.steps_to_first_tokens([eng.add(prompt, 20, tenant) for prompt in load])

    assert flooded("B") <= 3 * solo
    if case in ("seats are taken", "the cache is full"):
        assert flooded("A") > 10 * solo  # first come, first served


def test_tenants_that_never_stop_asking_get_the_same_number_of_tokens() -> None:
    """A has short prompts and long answers, B long prompts and short answers, C one request at a time."""
    eng = engine(1000, max_num_seqs=48, token_budget=64, fair_quantum_tokens=64)
    served = {"A": 0, "B": 0}
    lone = eng.add([0], 1, tenant="C")
    for _ in range(400):
        for tenant, size, max_tokens in (("A", 4, 40), ("B", 60, 2)):
            if sum(request.tenant == tenant for request in eng.scheduler.waiting) < 20:
                eng.add([1] * size, max_tokens, tenant=tenant)
        if lone.finish_reason is not None:
            lone = eng.add([0] * 20, 5, tenant="C")
        for chunk in eng.step().chunks:
            if chunk.request.tenant in served:
                served[chunk.request.tenant] += chunk.num_scheduled_tokens
    assert eng.num_steps == 400
    assert sum(served.values()) > 0.9 * 400 * 64  # C took what it asked for
    assert 0.9 < served["A"] / served["B"] < 1.1


def test_turns_decide_among_tenants_and_arrival_within_one() -> None:
    eng = engine(max_num_seqs=1, fair_quantum_tokens=4)
    of_a = [eng.add([0] * 4, 1, tenant="A") for _ in range(3)]
    of_b = [eng.add([1] * 4, 1, tenant="B") for _ in range(2)]
    order = [chunk.request for _ in range(5) for chunk in eng.step().chunks]
    assert order == [of_a[0], of_b[0], of_a[1], of_b[1], of_a[2]]
    assert not eng.scheduler.has_work


def test_priority_is_above_shares() -> None:
    eng = engine(max_num_seqs=1, priority_aging_s=10.0, fair_quantum_tokens=4)
    normal = [eng.add([1] * 4, 1, arrival_s=1.0, tenant="A") for _ in range(2)]
    low = eng.add([0] * 4, 1, priority=1, arrival_s=0.0, tenant="B")  # as if it came at 10
    late = eng.add([1] * 4, 1, arrival_s=30.0, tenant="B")
    urgent = eng.add([2] * 4, 1, priority=-1, arrival_s=5.0, tenant="A")
    order = [chunk.request for _ in range(5) for chunk in eng.step().chunks]
    assert order == [urgent, normal[0], late, normal[1], low]


class TestDisplacement:
    def full_of_a(self, num_requests: int = 6) -> tuple[SimulatedEngine, list[Request]]:
        eng = engine(max_num_seqs=num_requests, token_budget=64)
        requests = [eng.add([0] * 8, 30, tenant="A") for _ in range(num_requests)]
        eng.step()
        return eng, requests

    def test_the_last_ones_of_whoever_holds_most_make_room(self) -> None:
        eng, of_a = self.full_of_a()
        of_b = [eng.add([1] * 8, 3, tenant="B") for _ in range(3)]
        step = eng.step()
        assert step.preempted == of_a[:3:-1]  # as many as leave A with twice as much as B
        assert set(eng.scheduler.running) == {*of_a[:4], *of_b[:2]}
        assert eng.step().preempted == []
        eng.drain()
        assert [request.num_preemptions for request in of_a + of_b] == [0, 0, 0, 0, 1, 1, 0, 0, 0]

    def test_nobody_makes_room_for_its_own_tenant_or_for_another_priority(self) -> None:
        eng, _ = self.full_of_a()
        eng.add([1] * 8, 3, tenant="A")
        eng.add([1] * 8, 3, priority=1, tenant="B")
        eng.add([1] * 8, 3, priority=-1, tenant="B")
        assert eng.step().preempted == []
        eng.drain()

    def test_a_step_that_may_not_displace_says_that_it_would_have(self) -> None:
        eng, of_a = self.full_of_a()
        assert not eng.scheduler.is_displacement_due
        eng.add([1] * 8, 3, tenant="B")
        step = eng.scheduler.schedule(may_displace=False)
        assert (step.preempted, eng.scheduler.is_displacement_due) == ([], True)
        assert eng.step().preempted == [of_a[-1]]
        assert not eng.scheduler.is_displacement_due
        eng.drain()

    def test_who_came_late_and_was_let_in_does_not_leave_first(self) -> None:
        """When blocks run short, the victims are those of A that were admitted after B's."""
        eng = engine(40, max_num_seqs=8, token_budget=64)
        for _ in range(8):
            eng.add([0] * 12, 30, tenant="A")
        for _ in range(3):
            eng.step()
        of_b = eng.add([1] * 12, 25, tenant="B")
        eng.drain()
        assert of_b.num_preemptions == 0
        assert eng.scheduler.num_preemptions > 0


class TestLongPrompts:
    def test_a_long_prompt_leaves_rows_to_another_tenant(self) -> None:
        eng = engine(token_budget=32)
        long = eng.add([0] * 200, 1, tenant="A")
        eng.step()
        short = eng.add([1] * 10, 1, tenant="B")
        sizes = {chunk.request: chunk.num_scheduled_tokens for chunk in eng.step().chunks}
        assert sizes == {long: 22, short: 10}  # what B does not need of its half goes to A
        assert eng.step().num_scheduled_tokens == 32
        eng.drain()

    def test_a_prompt_that_came_late_has_its_rows_in_every_step(self) -> None:
        eng = engine(4000, token_budget=32, max_prefill_chunk=8, max_num_seqs=8)
        for _ in range(40):
            eng.add([0] * 64, 1, tenant="A")
        eng.step()
        late = eng.add([1] * 80, 1, tenant="B")
        while not late.output_token_ids:
            eng.step()
        assert eng.num_steps == 1 + 80 / 8
        eng.drain()

    def test_not_to_a_less_urgent_one(self) -> None:
        eng = engine(token_budget=32, max_prefill_chunk=24)
        urgent = eng.add([0] * 200, 1, priority=-1, tenant="A")
        patient = eng.add([1] * 200, 1, tenant="B")
        for _ in range(3):
            sizes = {chunk.request: chunk.num_scheduled_tokens for chunk in eng.step().chunks}
            assert sizes == {urgent: 24, patient: 8}
        eng.drain()

    def test_not_to_another_request_of_its_own(self) -> None:
        eng = engine(token_budget=32)
        long = eng.add([0] * 200, 1, tenant="A")
        eng.add([1] * 10, 1, tenant="A")
        for _ in range(3):
            assert [chunk.request for chunk in eng.step().chunks] == [long]
        eng.drain()

    def test_rows_that_cannot_be_used_are_not_kept(self) -> None:
        eng = engine(60, token_budget=32)
        eng.add([0] * 200, 1, tenant="A")
        eng.step()
        eng.add([1] * 100, 1, tenant="B")  # finds no blocks
        assert eng.step().num_scheduled_tokens == 32
        eng.drain()


def test_an_aborted_prompt_costs_what_was_computed_of_it() -> None:
    def order_of_service(abort: bool) -> list[str]:
        eng = engine(max_num_seqs=2, token_budget=8, fair_quantum_tokens=8)
        gone = eng.add([2] * 400, 1, tenant="B") if abort else None
        for _ in range(10):
            eng.add([0] * 8, 1, tenant="A")
        if gone is not None:
            eng.step()
            eng.scheduler.abort(gone.request_id)
        for _ in range(10):
            eng.add([1] * 8, 1, tenant="B")
        return [chunk.request.tenant for _ in range(12) for chunk in eng.step().chunks]

    assert abs(order_of_service(True).count("A") - order_of_service(False).count("A")) <= 1


def entry(name: str, tenant: str, sequence: int, num_tokens: int, num_blocks: int = 0) -> Ranked:
    request = Request(name, [0] * num_tokens, SamplingParams(seed=0), tenant=tenant, block_table=[1] * num_blocks)
    return Ranked(0.0, sequence, request)


@pytest.mark.parametrize(
    ("held_by_a", "held_by_b", "wanted", "victims"),
    [
        ([4, 4, 4], [], 2, ["a2", "a1"]),
        ([4, 4, 4], [], 3, ["a2"]),
        ([4, 4, 4], [], 4, ["a2"]),
        ([4, 4, 4], [], 5, []),
        ([4, 4, 4], [2], 2, ["a2"]),
        ([4, 4, 4], [2, 2], 1, []),
        ([9], [], 1, []),  # the first one is never a victim
        ([2, 9], [], 1, ["a1"]),
        ([], [], 1, []),
    ],
)
def test_an_exchange_leaves_the_giver_twice_what_the_taker_has(
    held_by_a: list[int], held_by_b: list[int], wanted: int, victims: list[str]
) -> None:
    running = [entry(f"a{i}", "A", i, 1, size) for i, size in enumerate(held_by_a)]
    running += [entry(f"b{i}", "B", 10 + i, 1, size) for i, size in enumerate(held_by_b)]
    heads = [entry("next of A", "A", 20, 1), entry("next of B", "B", 21, wanted)]
    head, found = fair_exchange(running, heads, lambda num_tokens: num_tokens)
    if held_by_a:
        assert head.request.request_id == "next of B"
    assert [victim.request.request_id for victim in found] == victims


def test_the_victim_is_the_last_of_whoever_holds_most() -> None:
    running = [entry("a0", "A", 0, 1, 3), entry("a1", "A", 1, 1, 3), entry("b0", "B", 2, 1, 5)]
    assert fair_victim(running).request.request_id == "a1"
    assert fair_victim(running[1:]).request.request_id == "b0"


def test_statuses_of_who_was_displaced_and_returns() -> None:
    eng = engine(max_num_seqs=3, token_budget=64)
    of_a = [eng.add([0] * 8, 12, tenant="A") for _ in range(3)]
    eng.step()
    eng.add([1] * 4, 2, tenant="B")
    eng.step()
    assert (of_a[2].status, of_a[2].block_table) == (RequestStatus.WAITING, [])
    eng.drain()
    assert all(request.finish_reason is FinishReason.LENGTH for request in of_a)

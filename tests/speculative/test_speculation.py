"""The number of drafts follows what steps cost and what is accepted, in a simulated engine with a clock of its own."""

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest

from engine.request import Request, RequestStatus, SamplingParams
from engine.speculative import speculation as module
from engine.speculative.proposer import DraftOrder
from engine.speculative.speculation import Speculation
from engine.stats import RemoteStats, SpeculationStats

StepTime = Callable[[int, bool], float]  # of rows, and whether there are drafts among them


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Simulation:
    """Requests whose drafts are accepted by a coin; drafting takes a time for each token that is drafted deep."""

    def __init__(
        self,
        acceptance: Sequence[float],
        step_s: StepTime,
        drafting_s: float = 0.0,
        num_draft_tokens: int = 8,
        always: bool = False,
    ) -> None:
        self.clock = Clock()
        self.step_s, self.drafting_s = step_s, drafting_s
        self.speculation = Speculation(self, num_draft_tokens, 256, always=always)
        sampling = SamplingParams(max_tokens=10**6, seed=0)
        self.requests = [Request(str(i), [1, 2, 3], sampling) for i in range(len(acceptance))]
        self.acceptance = dict(zip(self.requests, acceptance, strict=True))
        self.draw = random.Random(1)
        self.waits_s: list[float] = []
        self.silent: set[Request] = set()
        for request in self.requests:
            request.status = RequestStatus.RUNNING
            request.max_output_tokens = 10**6
            request.num_computed_tokens = 2

    def may_propose(self, request: Request) -> bool:
        return request not in self.silent

    def propose(self, orders: Sequence[DraftOrder], wait_s: float) -> list[list[int]]:
        self.waits_s.append(wait_s)
        self.clock.now_s += self.drafting_s * max(order.num_draft_tokens for order in orders)
        return [[9] * order.num_draft_tokens for order in orders]

    def forget(self, request: Request) -> None:
        del self.acceptance[request]

    def close(self) -> None:
        pass

    def step(self) -> list[int]:
        """Returns how many drafts each request had."""
        self.speculation.propose(self.requests)
        drafts = [len(request.draft_token_ids) for request in self.requests]
        rows = len(drafts) + sum(drafts)
        step_s = self.step_s(rows, any(drafts))
        self.clock.now_s += step_s
        chunks = [None] * len(drafts)
        step = SimpleNamespace(chunks=chunks, num_scheduled_tokens=rows, num_draft_tokens=sum(drafts))
        for request, count in zip(self.requests, drafts, strict=True):
            kept = 0
            while kept < count and self.draw.random() < self.acceptance[request]:
                kept += 1
            request.output_token_ids += [9] * (kept + 1)
            request.num_tokens += kept + 1
            request.num_computed_tokens += kept + 1
            request.draft_token_ids = ()
            if count:
                self.speculation.observe_round(request, count, kept)
        self.speculation.observe_step(step, step_s)  # type: ignore[arg-type]
        return drafts

    def rate(self, num_steps: int = 300) -> float:
        """Tokens a second, of all."""
        start_s, start = self.clock.now_s, sum(request.num_tokens for request in self.requests)
        for _ in range(num_steps):
            self.step()
        return (sum(request.num_tokens for request in self.requests) - start) / (self.clock.now_s - start_s)


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Simulation]:
    def make(*args: object, **kwargs: object) -> Simulation:
        simulation = Simulation(*args, **kwargs)  # type: ignore[arg-type]
        monkeypatch.setattr(module, "perf_counter", simulation.clock)
        return simulation

    return make


def flat(_rows: int, has_drafts: bool) -> float:
    """A GPU at few rows: reading the weights is all; without drafts the host is a step ahead."""
    return 1.05e-3 if has_drafts else 1e-3


def linear(rows: int, _has_drafts: bool) -> float:
    return 1e-3 * rows


def test_drafts_where_rows_are_free(simulate: Callable[..., Simulation]) -> None:
    simulation = simulate([0.8], flat)
    simulation.rate(20)
    assert simulation.rate() > 3.5e3  # of 4.1e3 with eight drafts in each step
    assert simulation.speculation.stats().mean_acceptance_length > 3.5
    assert 0.36 < simulation.speculation.stats().acceptance_rate < 0.48  # of eight, 3.3 are accepted


@pytest.mark.parametrize("num_requests", [1, 64])
@pytest.mark.parametrize("acceptance", [0.3, 0.9])
def test_never_slower_than_without(simulate: Callable[..., Simulation], num_requests: int, acceptance: float) -> None:
    simulation = simulate([acceptance] * num_requests, linear)
    simulation.rate(20)
    assert simulation.rate(100) > 0.97e3
    assert sum(simulation.step()) == 0
    assert not simulation.speculation.waits_for(simulation.requests)  # and the host may run ahead


def test_drafting_that_takes_too_long_is_left(simulate: Callable[..., Simulation]) -> None:
    fast = simulate([0.8], flat, drafting_s=1e-4)
    fast.rate(30)
    assert fast.rate() > 2e3
    slow = simulate([0.8], flat, drafting_s=2e-3)
    slow.rate(30)
    assert slow.rate() > 0.95e3
    assert not slow.speculation.waits_for(slow.requests)


def test_planning_takes_its_share_of_the_time(
    simulate: Callable[..., Simulation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of a step for each plan, which is therefore good for many steps; a new request is planned for at once."""
    simulation = simulate([0.8, 0.8], flat)
    late = simulation.requests.pop()
    plan, planned = module.choose_num_draft_tokens, []

    def slow_plan(acceptance: Sequence[float], *rest: object) -> list[int]:
        planned.append(len(acceptance))
        simulation.clock.now_s += 3e-4
        return plan(acceptance, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "choose_num_draft_tokens", slow_plan)
    simulation.rate(50)
    planned.clear()
    assert simulation.rate(300) > 3.4e3
    assert 10 < len(planned) < 40
    simulation.requests.append(late)
    simulation.step()
    assert planned[-1] == 2


def test_each_request_by_its_own_acceptance(simulate: Callable[..., Simulation]) -> None:
    """Rows cost something: those go where they are accepted."""
    simulation = simulate([0.9, 0.05], lambda rows, _: 1e-3 + 1e-4 * rows)
    for _ in range(60):
        simulation.step()
    drafts = [simulation.step() for _ in range(40)]
    assert sum(good for good, _ in drafts) > 40 * 3
    assert sum(bad for _, bad in drafts) < 40 * 0.5


def test_another_try_after_a_while(simulate: Callable[..., Simulation]) -> None:
    simulation = simulate([0.0], lambda rows, _: 1e-3 + 3e-4 * rows)
    simulation.rate(60)
    assert sum(simulation.step()[0] for _ in range(20)) < 10
    simulation.acceptance[simulation.requests[0]] = 0.95
    simulation.rate(150)
    assert sum(simulation.step()[0] for _ in range(20)) > 50


def test_who_has_nothing_to_propose_is_not_asked(simulate: Callable[..., Simulation]) -> None:
    simulation = simulate([0.9, 0.9], flat)
    simulation.silent = {simulation.requests[1]}
    simulation.rate(20)
    first, second = simulation.step()
    assert first > 2
    assert second == 0
    simulation.silent = set(simulation.requests)
    assert simulation.step() == [0, 0]
    assert not simulation.speculation.waits_for(simulation.requests)


def test_no_drafts_past_the_last_token(simulate: Callable[..., Simulation]) -> None:
    simulation = simulate([0.0], flat, num_draft_tokens=4, always=True)
    (request,) = simulation.requests
    seen = []
    for left in (7, 5, 4, 2, 1):
        request.max_output_tokens = len(request.output_token_ids) + left
        seen.append((simulation.speculation.waits_for([request]), simulation.step()[0]))
    assert seen == [(True, 4), (True, 4), (True, 3), (False, 1), (False, 0)]


def test_how_long_drafts_are_worth_waiting_for(simulate: Callable[..., Simulation]) -> None:
    """A step that brings 1 + a + a^2 + ... tokens in 1.05 ms may take as much longer as one token takes 1 ms."""
    simulation = simulate([0.8], flat)
    simulation.rate(100)
    assert 1.5e-3 < simulation.waits_s[-1] < 3.3e-3
    simulation.speculation.forget(simulation.requests[0])
    assert not simulation.acceptance


class ReportingSimulation(Simulation):
    """A proposer with a draft model elsewhere."""

    def __init__(self, remote: RemoteStats) -> None:
        self.remote = remote
        super().__init__([0.5], lambda *_: 1e-3, num_draft_tokens=2, always=True)

    def stats(self) -> RemoteStats:
        return self.remote


def test_stats_have_those_of_a_remote_draft() -> None:
    assert Simulation([0.5], lambda *_: 1e-3).speculation.stats() == SpeculationStats()
    remote = RemoteStats(missed_rounds=3, is_connected=True)
    simulation = ReportingSimulation(remote)
    drafted = sum(sum(simulation.step()) for _ in range(20))
    stats = simulation.speculation.stats()
    assert (stats.num_rounds, stats.num_drafted_tokens, stats.remote) == (20, drafted, remote)
    assert stats.num_accepted_tokens == simulation.requests[0].num_tokens - 3 - 20

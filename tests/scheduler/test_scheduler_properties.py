"""The scheduler under random load: nothing starves, nothing leaks, and no token depends on the company it had."""

from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from engine.config import SchedulerConfig
from engine.errors import InvalidRequest
from tests.scheduler.simulation import VOCAB_SIZE, SimulatedEngine

# Prompts begin alike, so that prefixes are shared, and some are whole prefixes of others.
SHARED = ([0, 1, 2, 0, 1, 2, 0, 0], [0, 1, 2, 0, 2, 1], [])
prompts = st.builds(
    lambda shared, cut, own: (shared[:cut] + own) or [0],
    st.sampled_from(SHARED),
    st.integers(0, 8),
    st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6),
)


def engines(num_blocks: st.SearchStrategy[int]) -> st.SearchStrategy[SimulatedEngine]:
    configs = st.builds(
        SchedulerConfig,
        max_num_seqs=st.integers(1, 5),
        token_budget=st.integers(1, 9),
        max_prefill_chunk=st.none() | st.integers(1, 4),
        max_model_len=st.sampled_from([12, 100]),
        max_draft_tokens=st.sampled_from([0, 0, 2, 20]),
        priority_aging_s=st.sampled_from([0.0, 3.0, 20.0]),
        fair_quantum_tokens=st.sampled_from([1, 8]),
    )
    return st.builds(SimulatedEngine, configs, num_blocks, st.sampled_from([1, 2, 4]), st.booleans())


class Load(RuleBasedStateMachine):
    """Arrivals, steps, aborts and failures in any order on an engine with hardly any room."""

    tenants = ("", "", "")

    @initialize(engine=engines(st.integers(2, 12)))
    def start(self, engine: SimulatedEngine) -> None:
        self.engine = engine

    @rule(prompt=prompts, max_tokens=st.integers(1, 12), priority=st.integers(-2, 2), tenant=st.integers(0, 2))
    def arrive(self, prompt: list[int], max_tokens: int, priority: int, tenant: int) -> None:
        too_long = len(prompt) + 1 > min(self.engine.config.max_model_len, self.engine.cache.capacity_tokens)
        try:
            self.engine.add(list(prompt), max_tokens, priority, tenant=self.tenants[tenant])
        except InvalidRequest:
            assert too_long
        else:
            assert not too_long

    @precondition(lambda self: self.engine.requests)
    @rule(index=st.integers(0, 30))
    def abort(self, index: int) -> None:
        request = self.engine.requests[index % len(self.engine.requests)]
        alive = request.finish_reason is None
        assert self.engine.scheduler.abort(request.request_id) is (request if alive else None)
        self.engine.scheduler.check_integrity()

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    @rule(index=st.integers(0, 4), late=st.booleans())
    def step_with_a_failure(self, index: int, late: bool) -> None:
        self.engine.step(failing=index, late=late)

    @rule(index=st.integers(0, 4))
    def step_with_an_abort(self, index: int) -> None:
        self.engine.step(aborting=index)

    @precondition(lambda self: self.engine.scheduler.has_work)
    @rule(may_displace=st.booleans())
    def schedule_and_do_not_run(self, may_displace: bool) -> None:
        self.engine.scheduler.schedule(may_displace)
        self.engine.scheduler.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.drain()


class LoadOfTenants(Load):
    """The same from several tenants, who displace each other."""

    tenants = ("A", "B", "C")


TestLoad = Load.TestCase
TestLoad.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
TestLoadOfTenants = LoadOfTenants.TestCase
TestLoadOfTenants.settings = TestLoad.settings


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    engine=engines(st.integers(5, 9)),
    load=st.lists(st.tuples(prompts, st.integers(4, 20), st.integers(-1, 1)), min_size=2, max_size=6),
)
def test_requests_that_outgrow_the_pool_together_all_finish(
    engine: SimulatedEngine, load: list[tuple[list[int], int, int]]
) -> None:
    for prompt, max_tokens, priority in load:
        if len(prompt) + 1 <= min(engine.cache.capacity_tokens, engine.config.max_model_len):
            engine.add(list(prompt), max_tokens, priority)
    engine.drain()
    event("preempted" if engine.scheduler.num_preemptions else "not preempted")
    event("accepted" if engine.num_accepted_tokens else "not accepted")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(aging_s=st.floats(0.0, 10.0), urgency=st.integers(1, 3))
def test_a_flood_of_urgent_requests_does_not_starve_another(aging_s: float, urgency: int) -> None:
    config = SchedulerConfig(max_num_seqs=2, token_budget=4, max_model_len=32, priority_aging_s=aging_s)
    engine = SimulatedEngine(config, num_blocks=9, block_size=4)
    patient = engine.add([1, 2, 0], max_tokens=3)
    for _ in range(200):  # twice as much work as can be done
        engine.add([0, 1], max_tokens=4, priority=-urgency)
        engine.step()
        if patient.finish_reason is not None:
            break
    # The urgent ones that came first, two at a time for four steps each, and then its own three steps.
    num_ahead = urgency * aging_s + 1
    assert engine.num_steps <= num_ahead * 4 / 2 + 4 + 3 + 2
    engine.drain()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(budget=st.integers(3, 12), num_requests=st.integers(1, 3), limit=st.integers(1, 12))
def test_drafts_take_what_rows_are_left(budget: int, num_requests: int, limit: int) -> None:
    config = SchedulerConfig(max_num_seqs=3, token_budget=budget, max_draft_tokens=limit, max_model_len=64)
    engine = SimulatedEngine(config, num_blocks=100, block_size=4)
    for _ in range(num_requests):
        engine.add([0], max_tokens=40)
    engine.step()
    for request in engine.scheduler.running:
        request.draft_token_ids = [0] * 4
    step = engine.scheduler.schedule()
    assert step.num_draft_tokens == min(4 * num_requests, budget - num_requests, limit)
    assert [len(chunk.draft_token_ids) for chunk in step.chunks] == sorted(
        (len(chunk.draft_token_ids) for chunk in step.chunks), reverse=True
    )  # the most urgent ones first

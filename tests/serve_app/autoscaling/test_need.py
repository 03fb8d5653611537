import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.autoscaling.load import EngineLoad, IngressLoad
from serve_app.autoscaling.need import EngineGoal, draft_need, engine_need, ingress_need, needed_to_keep_up

GOAL = EngineGoal(target_queue_depth=16, drain_s=2)
counts = st.floats(0, 1e6)
rates = st.floats(0, 1e4)
goals = st.builds(EngineGoal, st.floats(0.1, 1e3), st.floats(0, 100))


@pytest.mark.parametrize(
    ("load", "need"),
    [
        (EngineLoad(), 0),
        (EngineLoad(num_running=64), 4),
        (EngineLoad(num_waiting=64), 4),  # nothing is known of how fast they would be served
        (EngineLoad(num_running=16, num_waiting=48), 4),
        (EngineLoad(num_running=16, num_waiting=64, capacity_per_s=16), 1 + 2),  # 32 of them in 2 s by each
        (EngineLoad(num_running=16, num_waiting=64, capacity_per_s=1), 1 + 4),  # a place each is enough
        (EngineLoad(num_running=1, kv_cache_usage=1.8), 2),
    ],
)
def test_known_needs(load: EngineLoad, need: float) -> None:
    assert engine_need(load, GOAL) == pytest.approx(need)


@given(counts, counts, counts, counts, rates, goals)
def test_more_requests_never_need_fewer_replicas(
    running: float, more_running: float, waiting: float, more_waiting: float, capacity_per_s: float, goal: EngineGoal
) -> None:
    less = EngineLoad(running, waiting, capacity_per_s=capacity_per_s)
    more = EngineLoad(running + more_running, waiting + more_waiting, capacity_per_s=capacity_per_s)
    assert 0 <= engine_need(less, goal) <= engine_need(more, goal)


@given(counts, rates, rates)
def test_a_faster_engine_never_needs_more_replicas(waiting: float, capacity_per_s: float, faster_by: float) -> None:
    slow = EngineLoad(num_waiting=waiting, capacity_per_s=capacity_per_s)
    fast = EngineLoad(num_waiting=waiting, capacity_per_s=capacity_per_s + faster_by)
    assert engine_need(fast, GOAL) <= engine_need(slow, GOAL)


def test_keeping_up() -> None:
    assert needed_to_keep_up(EngineLoad(num_running=9, finished_per_s=50)) == 0  # what one can do is not known
    assert needed_to_keep_up(EngineLoad(finished_per_s=17, capacity_per_s=10)) == pytest.approx(2)


def test_ingress_and_draft() -> None:
    assert ingress_need(IngressLoad(num_ongoing=512, cpu_usage=0.35), 256) == 2
    assert ingress_need(IngressLoad(num_ongoing=8, cpu_usage=2.1), 256) == pytest.approx(3)
    assert draft_need(5, 4) == 1.25
    assert draft_need(0, 4) == 0

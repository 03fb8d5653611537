"""The order among requests: strict, fixed at arrival, the same as priorities that age with the time waited."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.request import Request, SamplingParams
from engine.scheduler.ranking import Ranked, RankedRequests, virtual_arrival_s


def entry(arrival_s: float, sequence: int) -> Ranked:
    return Ranked(arrival_s, sequence, Request(f"r{sequence}", [1], SamplingParams(seed=0)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    arrivals_s=st.tuples(st.integers(0, 1000), st.integers(0, 1000)),
    priorities=st.tuples(st.integers(-5, 5), st.integers(-5, 5)),
    aging_s=st.sampled_from([0.5, 1.0, 64.0]),  # with powers of two, all of this is exact
    waited_s=st.integers(0, 10_000),
)
def test_the_order_is_that_of_aged_priorities_at_any_time(
    arrivals_s: tuple[int, int], priorities: tuple[int, int], aging_s: float, waited_s: int
) -> None:
    now_s = 1000 + waited_s
    urgency = [p - (now_s - a) / aging_s for a, p in zip(arrivals_s, priorities, strict=True)]
    rank = [virtual_arrival_s(a, p, aging_s) for a, p in zip(arrivals_s, priorities, strict=True)]
    assert (urgency[0] < urgency[1]) == (rank[0] < rank[1])


def test_priority_is_worth_its_aging_time() -> None:
    assert virtual_arrival_s(100.0, 0, 60.0) == 100.0
    assert virtual_arrival_s(100.0, -1, 60.0) < virtual_arrival_s(41.0, 0, 60.0)
    assert virtual_arrival_s(100.0, -1, 60.0) > virtual_arrival_s(39.0, 0, 60.0)
    assert virtual_arrival_s(100.0, -7, 0.0) == 100.0


def test_entries_stay_in_order_and_ties_go_to_the_first_submitted() -> None:
    requests = RankedRequests()
    late, tied_first, tied_second = entry(9.0, 0), entry(5.0, 1), entry(5.0, 2)
    for item in (tied_second, late, tied_first):
        requests.add(item)
    assert list(requests) == [tied_first, tied_second, late]
    requests.remove(tied_first)
    assert list(requests) == [tied_second, late]
    assert (requests[0], requests[-1], len(requests)) == (tied_second, late, 2)


def test_removing_a_stranger_is_our_own_mistake() -> None:
    requests = RankedRequests()
    requests.add(entry(1.0, 0))
    for stranger in (entry(0.0, 5), entry(1.0, 7), entry(2.0, 6)):
        with pytest.raises(AssertionError, match="is not in this order"):
            requests.remove(stranger)

"""Who gets a place in the ingress's queue, and what the others are told."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequest
from serve_app.drain_rate import MEMORY_S, DrainRate
from serve_app.errors import Overload, OverloadedError
from serve_app.queue_places import RECENT_S, QueuePlaces


def refusal(places: QueuePlaces, tenant: str, count: int = 1, now_s: float = 0.0) -> OverloadedError:
    with pytest.raises(OverloadedError) as caught:
        places.take(tenant, count, now_s)
    return caught.value


def test_one_tenant_may_have_every_place() -> None:
    places = QueuePlaces(8)
    for _ in range(4):
        places.take("A", 2, 0.0)
    error = refusal(places, "A")
    assert error.reason is Overload.QUEUE_FULL
    assert error.retry_after_s == 1.0  # nothing has been measured
    places.give_back("A", 1, 0.0)
    places.take("A", 1, 0.0)


def test_more_than_there_are_is_a_mistake_of_the_client() -> None:
    with pytest.raises(InvalidRequest, match="asks for 9 choices, and this service queues at most 8") as caught:
        QueuePlaces(8).take("A", 9, 0.0)
    assert caught.value.param == "n"
    with pytest.raises(InvalidRequest, match="at most 3"):
        QueuePlaces(8, max_per_tenant=3).take("A", 4, 0.0)


def test_a_long_queue_is_shared() -> None:
    places = QueuePlaces(12)
    places.take("A", 5, 0.0)
    places.take("B", 1, 0.0)
    assert refusal(places, "A", 2).reason is Overload.KEY_LIMIT  # 6 of 12 for each of two
    places.take("A", 1, 0.0)
    places.take("B", 5, 0.0)
    assert refusal(places, "C").reason is Overload.QUEUE_FULL


def test_a_short_queue_is_not() -> None:
    places = QueuePlaces(12)
    for tenant in "BCD":
        places.take(tenant, 1, 0.0)
    places.take("A", 3, 0.0)
    assert refusal(places, "A").reason is Overload.KEY_LIMIT


def test_who_was_turned_away_has_a_claim_for_a_while() -> None:
    places = QueuePlaces(8)
    places.take("A", 8, 0.0)
    assert refusal(places, "B", now_s=1.0).reason is Overload.QUEUE_FULL
    places.give_back("A", 2, 2.0)
    assert refusal(places, "A", now_s=2.0).reason is Overload.KEY_LIMIT
    places.take("B", 1, 3.0)
    places.give_back("B", 1, 3.0)
    places.take("A", 1, 3.0)  # B has been, and has gone
    places.take("A", 1, 3.0)
    assert refusal(places, "B", now_s=4.0)
    places.give_back("A", 1, 5.0)
    assert refusal(places, "A", now_s=4.0 + RECENT_S).reason is Overload.KEY_LIMIT
    places.take("A", 1, 4.1 + RECENT_S)


def test_a_bound_for_each_holds_in_any_case() -> None:
    places = QueuePlaces(100, max_per_tenant=3)
    places.take("A", 3, 0.0)
    assert refusal(places, "A").reason is Overload.KEY_LIMIT
    places.take("B", 3, 0.0)


def test_retry_after_is_when_the_places_will_be_free_at_the_measured_rate() -> None:
    places = QueuePlaces(8)
    places.take("A", 8, 100.0)
    for second in range(1, 5):
        places.give_back("A", 2, 100.0 + second)  # two a second
    places.take("A", 8, 104.0)
    assert refusal(places, "A", 4, 104.0).retry_after_s == pytest.approx(2.0, rel=0.05)
    assert refusal(places, "B", 1, 104.0).retry_after_s == pytest.approx(0.5, rel=0.05)
    places.give_back("A", 1, 104.0)
    assert refusal(places, "A", 1, 104.0).reason is Overload.KEY_LIMIT
    assert refusal(places, "A", 1, 104.0).retry_after_s == pytest.approx((7 + 1 - 4) / 2, rel=0.2)


def test_retry_after_has_a_bound() -> None:
    places = QueuePlaces(4)
    places.take("A", 4, 0.0)
    places.give_back("A", 1, 3600.0)
    places.take("A", 1, 3600.0)
    assert refusal(places, "A", 4, 3600.0).retry_after_s == 60.0


class TestDrainRate:
    def test_idle_time_does_not_count(self) -> None:
        rate = DrainRate()
        rate.pass_time(0.0, is_busy=False)
        rate.pass_time(1000.0, is_busy=False)
        rate.pass_time(1004.0, is_busy=True)
        rate.count(8)
        assert rate.seconds_for(10) == pytest.approx(5.0, rel=0.1)

    def test_it_follows_a_change(self) -> None:
        rate = DrainRate()
        for second in range(1, 201):
            rate.pass_time(float(second), is_busy=True)
            rate.count(10 if second <= 100 else 1)
        assert rate.seconds_for(1) == pytest.approx(1.0, rel=0.1)  # some five times MEMORY_S later
        assert MEMORY_S * 5 == 100

    def test_without_a_measurement_there_is_no_estimate(self) -> None:
        rate = DrainRate()
        assert rate.seconds_for(1) is None
        rate.pass_time(0.0, is_busy=False)
        rate.pass_time(9.0, is_busy=True)
        assert rate.seconds_for(1) is None


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    max_places=st.integers(1, 12),
    actions=st.lists(st.tuples(st.sampled_from("ABCD"), st.integers(-3, 3), st.floats(0, 5)), max_size=80),
)
def test_there_are_never_more_than_may_be_and_shares_are_honest(
    max_places: int, actions: list[tuple[str, int, float]]
) -> None:
    places, held, now_s = QueuePlaces(max_places), Counter[str](), 0.0
    for tenant, change, passed_s in actions:
        now_s += passed_s
        if change > 0:
            refusal = None
            try:
                places.take(tenant, change, now_s)
            except (InvalidRequest, OverloadedError) as error:
                refusal = error
            is_full = held.total() + change > max_places
            if refusal is None:
                held[tenant] += change
            elif isinstance(refusal, InvalidRequest):
                assert change > max_places
            else:
                assert 0.0 < refusal.retry_after_s <= 60.0
                assert (refusal.reason is Overload.QUEUE_FULL) == is_full
                # With four tenants at most, who has less than a quarter is never told that it has too much.
                assert is_full or held[tenant] + change > max_places // 4
        elif held[tenant]:
            places.give_back(tenant, count := min(-change, held[tenant]), now_s)
            held[tenant] -= count
        assert held.total() <= max_places

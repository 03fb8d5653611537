"""Which requests leave a queue."""

from collections import Counter

import pytest

from serve_app.rebalancing import MAX_MOVES_AT_ONCE, MIN_GAP, Depth, Queued, Rebalancer


def queue(count: int, **fields: float) -> list[Queued[int]]:
    return [Queued(number, 1, **fields) for number in range(count)]


def moves(depths: list[Depth], queues: dict[str, list[Queued[int]]]) -> list[tuple[int, str]]:
    """What a second look at the same numbers finds."""
    rebalancer: Rebalancer[int] = Rebalancer()
    assert rebalancer.moves(depths, lambda: queues) == []
    return rebalancer.moves(depths, lambda: queues)


def test_a_queue_is_shared_with_an_idle_replica_the_latest_first() -> None:
    found = moves([Depth("a", 30, 20), Depth("b", 0, 0)], {"a": queue(30)})
    assert [item for item, _ in found] == list(range(29, 29 - len(found), -1))
    assert {target for _, target in found} == {"b"}
    assert abs((30 - len(found)) - len(found)) < MIN_GAP


def test_with_several_idle_replicas() -> None:
    found = moves([Depth("a", 40, 36), Depth("b", 0, 0), Depth("c", 4, 0), Depth("d", 0, 0)], {"a": queue(40)})
    counts = Counter(target for _, target in found)
    after = [40 - len(found), counts["b"], 4 + counts["c"], counts["d"]]
    assert max(after) - min(after) <= MIN_GAP


def test_what_runs_stays() -> None:
    """Two of a hundred wait: no more than they move."""
    assert [item for item, _ in moves([Depth("a", 100, 2), Depth("b", 0, 0)], {"a": queue(3)})] == [2, 1]
    assert moves([Depth("a", 100, 0), Depth("b", 0, 0)], {"a": queue(100)}) == []


@pytest.mark.parametrize(
    "depths",
    [
        [Depth("a", 50, 20)],
        [Depth("a", 50, 20), Depth("b", 20, 1)],  # where others wait, nobody is sent
        [Depth("a", MIN_GAP + 1, 5), Depth("b", 2, 0)],
        [Depth("a", 50, 20, own_part=0.0), Depth("b", 0, 0)],
    ],
)
def test_nothing_moves_where_it_is_not_worth_it(depths: list[Depth]) -> None:
    assert moves(depths, {"a": queue(20)}) == []


def test_other_ingresses_move_their_own_parts() -> None:
    """Each of three has a third of what waits; together they level it out."""
    found = moves([Depth("a", 60, 50, own_part=1 / 3), Depth("b", 0, 0)], {"a": queue(20)})
    assert 9 <= len(found) <= 11


def test_what_leaves_much_in_the_cache_stays_longer() -> None:
    mixed = queue(10, cost_requests=25.0) + queue(10)
    found = moves([Depth("a", 20, 15), Depth("b", 0, 0)], {"a": mixed})
    assert len(found) >= 8
    assert len(moves([Depth("a", 20, 15), Depth("b", 0, 0)], {"a": queue(20, cost_requests=25.0)})) == 0


def test_a_moment_is_no_queue() -> None:
    rebalancer: Rebalancer[int] = Rebalancer()
    waits, does_not = [Depth("a", 20, 15), Depth("b", 0, 0)], [Depth("a", 20, 0), Depth("b", 0, 0)]
    for depths in (waits, does_not, waits, does_not):
        assert rebalancer.moves(depths, lambda: {"a": queue(20)}) == []
    assert rebalancer.moves(waits, lambda: pytest.fail("nobody needs to know")) == []


def test_at_most_so_many_at_once_and_no_search_without_end() -> None:
    assert len(moves([Depth("a", 1000, 900), Depth("b", 0, 0)], {"a": queue(1000)})) == MAX_MOVES_AT_ONCE
    assert moves([Depth("a", 1000, 900), Depth("b", 0, 0)], {}) == []


def test_after_moves_it_looks_twice_again() -> None:
    """What a replica tells a moment later may still count them."""
    rebalancer: Rebalancer[int] = Rebalancer()
    depths = [Depth("a", 20, 15), Depth("b", 0, 0)]
    found = [len(rebalancer.moves(depths, lambda: {"a": queue(20)})) for _ in range(5)]
    assert [bool(number) for number in found] == [False, True, False, True, False]

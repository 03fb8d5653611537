"""Block tables: prefix hits, all-or-nothing allocation, what is hashed and what is not."""

import pytest

from engine.cache.block_manager import BlockManager
from engine.cache.block_pool import BlockPool
from engine.request import Request, SamplingParams

BLOCK_SIZE = 4


def manager(num_blocks: int = 9, caching: bool = True) -> BlockManager:
    return BlockManager(BlockPool(num_blocks, BLOCK_SIZE, caching))


def request(name: str, prompt: list[int]) -> Request:
    return Request(name, prompt, SamplingParams(seed=0))


def compute(cache: BlockManager, req: Request, num_tokens: int) -> None:
    req.num_computed_tokens = num_tokens
    cache.commit(req)


def leave(cache: BlockManager, req: Request) -> None:
    cache.free(req)
    cache.forget(req)
    req.num_computed_tokens = 0


@pytest.mark.parametrize(
    ("num_prompt_tokens", "expected"),
    [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 8), (20, 8)],
)
def test_a_hit_is_whole_blocks_and_leaves_a_token_to_compute(num_prompt_tokens: int, expected: int) -> None:
    cache = manager()
    first = request("first", list(range(11)))  # two full blocks and three tokens
    assert cache.admit(first) == 0
    compute(cache, first, 11)
    second = request("second", list(range(num_prompt_tokens)))
    assert cache.find_cached_tokens(second) == expected
    assert cache.admit(second) == expected
    shared = expected // BLOCK_SIZE
    assert second.block_table[:shared] == first.block_table[:shared]
    assert not set(second.block_table[shared:]) & set(first.block_table)
    assert len(second.block_table) == -(-num_prompt_tokens // BLOCK_SIZE)


def test_equal_blocks_behind_different_prefixes_are_not_shared() -> None:
    cache = manager()
    first = request("first", [1, 1, 1, 1, 7, 7, 7, 7, 0])
    cache.admit(first)
    compute(cache, first, 9)
    assert cache.find_cached_tokens(request("same", [1, 1, 1, 1, 7, 7, 7, 7, 5])) == 8
    assert cache.find_cached_tokens(request("second block differs", [1, 1, 1, 1, 7, 7, 7, 8, 5])) == 4
    assert cache.find_cached_tokens(request("first block differs", [1, 1, 1, 2, 7, 7, 7, 7, 5])) == 0
    assert cache.find_cached_tokens(request("second block alone", [7, 7, 7, 7, 5])) == 0


def test_only_computed_blocks_are_found() -> None:
    cache = manager()
    first = request("first", list(range(12)))
    cache.admit(first)
    other = request("other", list(range(20)))
    assert cache.find_cached_tokens(other) == 0
    for num_computed, expected in ((3, 0), (4, 4), (7, 4), (12, 12)):
        compute(cache, first, num_computed)
        assert cache.find_cached_tokens(other) == expected


def test_outputs_extend_the_chain() -> None:
    cache = manager()
    first = request("first", [1, 2, 3])
    cache.admit(first)
    compute(cache, first, 3)
    first.append_output(4)
    assert cache.grow(first, 4)
    compute(cache, first, 4)
    assert cache.find_cached_tokens(request("next turn", [1, 2, 3, 4, 9])) == 4


def test_admission_is_all_or_nothing_and_counts_idle_hits_as_taken() -> None:
    cache = manager(num_blocks=5)
    first = request("first", list(range(12)))
    cache.admit(first)
    compute(cache, first, 12)
    leave(cache, first)
    # 3 cached idle blocks and 1 empty one: a hit of 2 plus 3 new ones cannot be had, for the 2 are in the same list.
    large = request("large", [*range(8), *range(50, 62)])
    assert cache.find_cached_tokens(large) == 8
    assert cache.admit(large) is None
    assert large.block_table == []
    assert cache.pool.num_free_blocks == 4
    assert cache.pool.num_cached_blocks == 3
    small = request("small", [*range(8), *range(50, 54)])
    assert cache.admit(small, num_reserved_blocks=2) is None
    assert cache.admit(small, num_reserved_blocks=1) == 8
    cache.forget(large)
    cache.forget(first)
    small.num_computed_tokens = 8
    cache.check_integrity([small])


def test_a_hit_is_not_evicted_by_the_same_admission() -> None:
    cache = manager(num_blocks=3)
    first = request("first", list(range(4)))
    cache.admit(first)
    compute(cache, first, 4)
    leave(cache, first)
    second = request("second", list(range(6)))
    assert cache.admit(second) == 4
    assert len(set(second.block_table)) == 2


def test_growth_is_all_or_nothing() -> None:
    cache = manager(num_blocks=3)
    first = request("first", [1, 2])
    cache.admit(first)
    assert cache.grow(first, 4)
    assert len(first.block_table) == 1
    assert not cache.grow(first, 9)
    assert len(first.block_table) == 1
    assert cache.grow(first, 8)
    assert len(first.block_table) == 2


def test_a_preempted_request_finds_its_own_blocks_again_and_can_commit_anew() -> None:
    cache = manager()
    first = request("first", list(range(12)))
    cache.admit(first)
    compute(cache, first, 12)
    cache.free(first)
    first.num_computed_tokens, first.num_preemptions = 0, 1
    taken = cache.pool.allocate(7)  # of 8: the empty ones, then the cached ones from the tail
    assert cache.find_cached_tokens(first) == 4
    assert cache.admit(first) is None
    cache.pool.free(taken)
    assert cache.admit(first) == 4
    compute(cache, first, 12)
    assert cache.find_cached_tokens(request("other", list(range(13)))) == 12


def test_a_failed_request_shares_nothing_any_more() -> None:
    cache = manager()
    first, other = request("first", list(range(12))), request("other", list(range(20)))
    cache.admit(first)
    compute(cache, first, 12)
    assert cache.find_cached_tokens(other) == 12
    cache.distrust(first)
    leave(cache, first)
    assert cache.find_cached_tokens(other) == 0
    cache.check_integrity([other])


def test_hits_and_queries_count_prompt_tokens_once_for_each_request() -> None:
    cache = manager(num_blocks=20)
    first, second = request("first", list(range(10))), request("second", list(range(11)))
    cache.admit(first)
    compute(cache, first, 10)
    cache.admit(second)
    assert (cache.prefix_cache_queries, cache.prefix_cache_hits) == (21, 8)
    cache.free(second)
    second.num_preemptions = 1
    cache.admit(second)
    assert (cache.prefix_cache_queries, cache.prefix_cache_hits) == (21, 8)


def test_without_prefix_caching_nothing_is_looked_up_or_counted() -> None:
    cache = manager(caching=False)
    first, second = request("first", list(range(10))), request("second", list(range(10)))
    cache.admit(first)
    compute(cache, first, 10)
    assert cache.admit(second) == 0
    assert (cache.prefix_cache_queries, cache.prefix_cache_hits) == (0, 0)


def test_integrity_check_notices_wrong_requests() -> None:
    cache = manager()
    first = request("first", list(range(8)))
    cache.admit(first)
    compute(cache, first, 8)
    cache.check_integrity([first])
    with pytest.raises(AssertionError, match="block tables but counted"):
        cache.check_integrity([])
    first.num_computed_tokens = 7
    with pytest.raises(AssertionError, match=r"request first: block \d+ is hashed before it is full"):
        cache.check_integrity([first])
    first.num_computed_tokens = 9
    with pytest.raises(AssertionError, match="request first: 9 tokens computed in 8 slots"):
        cache.check_integrity([first])
    first.num_computed_tokens = 8
    first.prompt_token_ids[5] = 99
    with pytest.raises(AssertionError, match=r"request first: block \d+ has the hash of other tokens"):
        cache.check_integrity([first])
    cache.free(first)
    first.num_computed_tokens = 0
    with pytest.raises(AssertionError, match="finished requests are still remembered: \\['first'\\]"):
        cache.check_integrity([])

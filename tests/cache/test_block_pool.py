"""The block pool against a naive model, its eviction order, and an integrity check that really notices."""

from collections.abc import Callable, Iterable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.cache.block_hash import ROOT_HASH, hash_block
from engine.cache.block_pool import NULL_BLOCK, BlockPool


def chain(*tokens: int) -> list[bytes]:
    """Hashes of consecutive blocks of one token each."""
    hashes, parent = [], ROOT_HASH
    for token in tokens:
        parent = hash_block(parent, [token])
        hashes.append(parent)
    return hashes


def fill(pool: BlockPool, *tokens: int) -> list[int]:
    """A block table whose blocks are all registered."""
    blocks = pool.allocate(len(tokens))
    for block, block_hash in zip(blocks, chain(*tokens), strict=True):
        assert pool.register(block, block_hash)
    return blocks


class PoolModel(RuleBasedStateMachine):
    """Lists and linear scans beside the pool; every block handed out must be the one the model hands out."""

    @initialize(num_blocks=st.integers(2, 9), caching=st.booleans())
    def start(self, num_blocks: int, caching: bool) -> None:
        self.pool = BlockPool(num_blocks, 1, caching)
        self.caching = caching
        self.free_blocks = list(range(1, num_blocks))  # first in line for reuse first
        self.names: dict[int, bytes] = {}
        self.tables: list[list[int]] = []
        self.chains: list[list[bytes]] = []  # hashes of each table's blocks
        self.num_registered: list[int] = []

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        found = []
        for block_hash in hashes:
            owners = [block for block, name in self.names.items() if name == block_hash]
            if not owners:
                break
            found += owners
        return found

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def open(self, tokens: list[int]) -> None:
        hashes = chain(*tokens)
        cached = self.pool.find(hashes)
        assert cached == self.find(hashes)
        num_new = len(tokens) - len(cached)
        num_free = len([block for block in self.free_blocks if block not in cached])
        if num_new > num_free:
            return
        self.pool.touch(cached)
        self.free_blocks = [block for block in self.free_blocks if block not in cached]
        expected = [self.free_blocks.pop(0) for _ in range(num_new)]
        for block in expected:
            self.names.pop(block, None)
        assert self.pool.allocate(num_new) == expected
        self.tables.append(cached + expected)
        self.chains.append(hashes)
        self.num_registered.append(len(cached))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        at = self.num_registered[index]
        if at == len(self.tables[index]):
            return
        block, block_hash = self.tables[index][at], self.chains[index][at]
        is_first = self.caching and block_hash not in self.names.values()
        assert self.pool.register(block, block_hash) == is_first
        if is_first:
            self.names[block] = block_hash
        self.num_registered[index] += 1

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        table = self.tables.pop(index)
        del self.chains[index], self.num_registered[index]
        self.pool.free(reversed(table))
        for block in reversed(table):
            if any(block in other for other in self.tables):
                continue
            if block in self.names:
                self.free_blocks.append(block)
            else:
                self.free_blocks.insert(0, block)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def unregister(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.tables))))
        self.pool.unregister(block)
        self.names.pop(block, None)

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity(self.tables)
        assert self.pool.num_free_blocks == len(self.free_blocks)
        assert self.pool.num_blocks_in_use == len({block for table in self.tables for block in table})
        assert self.pool.num_cached_blocks == len(self.names)
        for block in range(1, self.pool.num_usable_blocks + 1):
            assert self.pool.hash_of(block) == self.names.get(block)
            assert self.pool.is_free(block) == (block in self.free_blocks)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for table in self.tables:
                self.pool.free(reversed(table))
            self.pool.check_integrity([])
            assert self.pool.num_free_blocks == self.pool.num_usable_blocks


TestPoolModel = PoolModel.TestCase
TestPoolModel.settings = settings(max_examples=80, stateful_step_count=30, deadline=None, derandomize=True)


def test_the_null_block_is_never_handed_out() -> None:
    pool = BlockPool(5, 16)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    with pytest.raises(AssertionError, match="1 blocks wanted, 0 free"):
        pool.allocate(1)


def test_empty_blocks_go_first_then_the_longest_unused_and_of_one_request_the_tail() -> None:
    pool = BlockPool(6, 1)
    old, new, empty = fill(pool, 1, 2), fill(pool, 3, 4), pool.allocate(1)
    pool.free(reversed(old))
    pool.free(reversed(new))
    pool.free(reversed(empty))
    assert pool.allocate(5) == [*empty, old[1], old[0], new[1], new[0]]
    assert pool.num_cached_blocks == 0


def test_a_hit_makes_a_block_recently_used() -> None:
    pool = BlockPool(3, 1)
    first, second = fill(pool, 1), fill(pool, 2)
    pool.free(first)
    pool.free(second)
    pool.touch(pool.find(chain(1)))
    pool.free(first)
    assert pool.allocate(1) == second
    assert pool.find(chain(1)) == first


def test_a_lookup_stops_at_the_first_miss_and_reads_no_further() -> None:
    pool = BlockPool(4, 1)
    blocks = fill(pool, 1, 2, 3)
    pool.unregister(blocks[1])
    seen = []

    def hashes() -> Iterable[bytes]:
        for block_hash in chain(1, 2, 3):
            seen.append(block_hash)
            yield block_hash

    assert pool.find(hashes()) == blocks[:1]
    assert len(seen) == 2


def test_the_first_of_equal_blocks_keeps_the_hash_and_the_other_is_reused_first() -> None:
    pool = BlockPool(3, 1)
    (first,) = fill(pool, 1)
    (second,) = pool.allocate(1)
    assert not pool.register(second, chain(1)[0])
    pool.free([first])
    pool.free([second])
    assert pool.find(chain(1)) == [first]
    assert pool.allocate(1) == [second]


def test_without_prefix_caching_nothing_is_found() -> None:
    pool = BlockPool(3, 1, enable_prefix_caching=False)
    (block,) = pool.allocate(1)
    assert not pool.register(block, chain(1)[0])
    assert pool.find(chain(1)) == []


def test_misuse_is_refused() -> None:
    pool = BlockPool(4, 1)
    used, free = fill(pool, 1), pool.allocate(1)
    pool.free(free)
    with pytest.raises(AssertionError, match=f"block {free[0]} is freed more often than taken"):
        pool.free(free)
    with pytest.raises(AssertionError, match=f"block {free[0]} is registered while nobody uses it"):
        pool.register(free[0], chain(2)[0])
    with pytest.raises(AssertionError, match=f"block {used[0]} is registered twice"):
        pool.register(used[0], chain(2)[0])
    with pytest.raises(AssertionError, match=f"block {free[0]} loses its hash in the free list"):
        pool.unregister(free[0])


def corrupt_count(pool: BlockPool) -> None:
    pool._ref_counts[1] += 1


def corrupt_double_free(pool: BlockPool) -> None:
    pool._free[1] = None


def corrupt_leak(pool: BlockPool) -> None:
    del pool._free[3]


def corrupt_null_free(pool: BlockPool) -> None:
    pool._free[NULL_BLOCK] = None


def corrupt_hash_owner(pool: BlockPool) -> None:
    pool._block_of[chain(1)[0]] = 2


def corrupt_hash_extra(pool: BlockPool) -> None:
    pool._block_of[chain(9)[0]] = 3


def corrupt_hash_missing(pool: BlockPool) -> None:
    del pool._block_of[chain(1)[0]]


def corrupt_order(pool: BlockPool) -> None:
    pool._free.move_to_end(4)
    pool._hashes[3], pool._block_of[chain(9)[0]] = chain(9)[0], 3


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (corrupt_count, "block 1 is in 1 block tables but counted 2 times"),
        (corrupt_double_free, "block 1 is free and in use at once"),
        (corrupt_leak, "block 3 is leaked"),
        (corrupt_null_free, "the null block is in the free list"),
        (corrupt_hash_owner, "block 1 has hash [0-9a-f]{32}, which the map gives to 2"),
        (corrupt_hash_extra, "3 hash entries for 2 hashed blocks"),
        (corrupt_hash_missing, "block 1 has hash [0-9a-f]{32}, which the map gives to None"),
        (corrupt_order, "a cached block is in line for reuse before an empty one"),
    ],
)
def test_integrity_check_notices_broken_books(corrupt: Callable[[BlockPool], None], message: str) -> None:
    pool = BlockPool(5, 1)
    table = fill(pool, 1, 2)
    assert table == [1, 2]
    pool.check_integrity([table])
    corrupt(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity([table])


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], "block 1 is in 0 block tables but counted 1 times"),
        ([[1, 2], [2]], "block 2 is in 2 block tables but counted 1 times"),
        ([[1, 2, 3]], "block 3 is in 1 block tables but counted 0 times"),
        ([[1, 2, 1]], "a block occurs twice in one block table"),
        ([[0, 1, 2]], "the null block is in a block table"),
        ([[1, 2, 7]], "blocks \\[7\\] are in a block table but not in the pool"),
    ],
)
def test_integrity_check_notices_wrong_tables(tables: list[list[int]], message: str) -> None:
    pool = BlockPool(5, 1)
    fill(pool, 1, 2)
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity(tables)

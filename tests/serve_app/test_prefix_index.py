"""What an ingress remembers of the prompts that replicas were sent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cache.block_hash import ROOT_HASH, hash_block, hash_blocks
from serve_app.prefix_index import PrefixIndex

SIZE = 4


def chain_of(index: PrefixIndex, *tokens: int) -> list[bytes]:
    """One block for each of `tokens`."""
    return index.chain([token for token in tokens for _ in range(SIZE)])


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 63, 64])
def test_chains_are_the_hashes_of_the_engines_blocks(length: int) -> None:
    tokens = list(range(70_000, 70_000 + length))
    expected, parent = [], ROOT_HASH
    for start in range(0, length - SIZE + 1, SIZE):
        parent = hash_block(parent, tokens[start : start + SIZE])
        expected.append(parent)
    index = PrefixIndex(SIZE)
    assert hash_blocks(ROOT_HASH, tokens, SIZE) == index.chain(tokens) == expected
    for known in range(len(expected) + 1):
        assert index.chain(tokens, expected[:known]) == expected


def test_the_longest_beginning_counts() -> None:
    index = PrefixIndex(SIZE)
    index.record("a", chain_of(index, 1, 2, 3))
    index.record("b", chain_of(index, 1))
    asked = chain_of(index, 1, 2, 9, 9)
    assert [index.num_held_blocks(replica_id, asked) for replica_id in "abc"] == [2, 1, 0]
    assert index.num_held_blocks("a", chain_of(index, 2, 3)) == 0  # the same blocks behind others are others
    assert index.num_held_blocks("a", []) == 0


def test_what_was_not_used_for_long_is_forgotten_from_its_end() -> None:
    index = PrefixIndex(SIZE, max_blocks=6)
    old, new = chain_of(index, 1, 2, 3, 4), chain_of(index, 1, 7, 8, 9)
    index.record("a", old)
    index.record("a", new)  # 7 blocks, of which one is both
    assert index.num_blocks == 6
    assert index.num_held_blocks("a", new) == 4
    assert index.num_held_blocks("a", old) == 3
    index.record("a", chain_of(index, 5, 6))
    assert index.num_held_blocks("a", old) == 1  # which the newer one shares
    assert index.num_held_blocks("a", new) == 4


def test_of_a_replica_no_more_is_remembered_than_its_cache_holds() -> None:
    index = PrefixIndex(SIZE)
    index.record("a", chain_of(index, 1, 2, 3, 4))
    index.set_capacity("a", 3)
    assert index.num_blocks == 3
    index.record("a", chain_of(index, 5, 6))
    assert index.num_blocks == 3
    index.set_capacity("b", 0)
    index.record("b", chain_of(index, 1, 2))
    assert index.num_held_blocks("b", chain_of(index, 1, 2)) == 0


def test_each_replica_has_an_equal_part() -> None:
    index = PrefixIndex(SIZE, max_blocks=8)
    index.record("a", chain_of(index, *range(8)))
    index.record("b", chain_of(index, *range(100, 110)))
    assert index.num_held_blocks("a", chain_of(index, *range(8))) == 4
    assert index.num_held_blocks("b", chain_of(index, *range(100, 110))) == 4


def test_a_replica_that_has_left_is_forgotten() -> None:
    index = PrefixIndex(SIZE)
    chain = chain_of(index, 1, 2)
    for replica_id in "ab":
        index.set_capacity(replica_id, 1)
        index.record(replica_id, chain)
    index.forget_all_but(["b", None])
    assert [index.num_held_blocks(replica_id, chain) for replica_id in "ab"] == [0, 1]
    index.record("a", chain)  # another of this name has its own cache
    assert index.num_held_blocks("a", chain) == 2


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 2), min_size=1, max_size=6)), max_size=40),
    st.integers(1, 30),
)
def test_memory_is_bounded_and_the_search_finds_what_is_there(sent: list[tuple[str, list[int]]], limit: int) -> None:
    """Against a search from the beginning: of a replica, what leads to a known block is known."""
    index = PrefixIndex(1, max_blocks=limit)
    for replica_id, tokens in sent:
        index.record(replica_id, index.chain(tokens))
        assert index.num_blocks <= limit
        assert index.num_held_blocks(replica_id, index.chain(tokens)) <= len(tokens)
        for other, prompt in sent:
            chain = index.chain(prompt)
            held = index._held.get(other, {})
            leading = next((place for place, block in enumerate(chain) if block not in held), len(chain))
            assert index.num_held_blocks(other, chain) == leading
            assert not any(block in held for block in chain[leading:])

"""Block hashes: stable across processes, chained, sensitive to every token."""

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache.block_hash import ROOT_HASH, hash_block

tokens = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8)


def test_digest_is_fixed() -> None:
    # Written down once: the hash of a block must not depend on the process, PYTHONHASHSEED or byte order.
    assert hash_block(ROOT_HASH, [1, 2, 3, 4]).hex() == "f23680cf9d0cdff61c7fe464c491f63b"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(tokens, tokens, tokens)
def test_equal_exactly_for_equal_chains(first: list[int], second: list[int], third: list[int]) -> None:
    chains = [[first], [second], [third], [first, second], [first, third], [second, first], [third, third]]
    digests = []
    for chain in chains:
        parent = ROOT_HASH
        for block in chain:
            parent = hash_block(parent, block)
        digests.append(parent)
    for i, chain in enumerate(chains):
        for j, other in enumerate(chains):
            assert (digests[i] == digests[j]) == (chain == other)

"""The blocks of the paged KV cache: who uses them, which hold a known prefix, which is reclaimed next."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

NULL_BLOCK = 0  # rows that belong to no request write here; never allocated, never shared, never read


class BlockPool:
    """Reference counts, a free list in least-recently-used order, and a map from block hash to block.

    A free block that is registered under a hash keeps its contents, and a later prompt may take it back, until
    the pool needs it for something else (evicts it). Free blocks without a hash hold nothing of use, so they are
    handed out first; then the hashed ones, the longest unused first. Every operation on a block is O(1).

    **Several blocks with the same contents**: the first one registered under a hash keeps it, later ones stay
    unhashed (`register` returns False) and are the first to be reused once free. They arise when requests with
    one prompt prefill at the same time, and when a prompt that is cached to its last token computes that token's
    block anew. Swapping the later block for the first in a block table that the device may be reading is not
    worth the memory. The contents are equal bit for bit, so it does not matter whose block a prefix hit returns.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        """A pool of blocks 0 … num_blocks - 1 of `block_size` tokens each, of which block 0 is the null block."""
        assert num_blocks >= 2, "a pool needs a block beside the null block"
        self.block_size = block_size
        self.num_usable_blocks = num_blocks - 1
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # An OrderedDict is a doubly linked list with an index: first in line for reuse at the front.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request uses, whether or not they still hold a cached prefix."""
        return len(self._free)

    @property
    def num_blocks_in_use(self) -> int:
        return self.num_usable_blocks - len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks registered under a hash, in use or not."""
        return len(self._block_of)

    def is_free(self, block: int) -> bool:
        return block in self._free

    def hash_of(self, block: int) -> bytes | None:
        """The hash that `block` is registered under, if any."""
        return self._hashes[block]

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` free blocks, each with one reference; evicts what they held. They must be there."""
        assert num_blocks <= len(self._free), f"{num_blocks} blocks wanted, {len(self._free)} free"
        blocks = []
        for _ in range(num_blocks):
            block, _none = self._free.popitem(last=False)
            self.unregister(block)
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of the chain `hashes`; `hashes` is read no further than the first miss.

        Takes no references: `touch` the blocks before anything is allocated.
        """
        found = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def touch(self, blocks: Iterable[int]) -> None:
        """Take one more reference to each cached block, out of the free list if need be."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Give back one reference to each block; of those that become free, the first named is reclaimed first.

        So name a request's last block first: its prefix, which others are likelier to share, is evicted last.
        """
        for block in blocks:
            assert self._ref_counts[block] > 0, f"block {block} is freed more often than taken"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if self._hashes[block] is None:
                    self._free.move_to_end(block, last=False)

    def register(self, block: int, block_hash: bytes) -> bool:
        """Let prompts find `block`, in use and full, under `block_hash`. False if another block has that hash."""
        assert self._ref_counts[block] > 0, f"block {block} is registered while nobody uses it"
        assert self._hashes[block] is None, f"block {block} is registered twice"
        if not self.enable_prefix_caching or block_hash in self._block_of:
            return False
        self._hashes[block] = block_hash
        self._block_of[block_hash] = block
        return True

    def unregister(self, block: int) -> None:
        """Let nobody find `block` any more. It must not be in the free list, whose order depends on it."""
        assert block not in self._free, f"block {block} loses its hash in the free list"
        block_hash = self._hashes[block]
        if block_hash is not None:
            self._hashes[block] = None
            del self._block_of[block_hash]

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Assert that the pool's books agree with each other and with the block tables of all requests.

        Raises:
            AssertionError: a leak, a double free, a wrong count, a wrong hash entry; the message names the block.
        """
        expected: Counter[int] = Counter()
        for table in block_tables:
            assert len(set(table)) == len(table), f"a block occurs twice in one block table: {list(table)}"
            expected.update(table)
        assert NULL_BLOCK not in expected, "the null block is in a block table"
        unknown = [block for block in expected if not 0 < block < len(self._ref_counts)]
        assert not unknown, f"blocks {unknown} are in a block table but not in the pool"
        for block, count in enumerate(self._ref_counts):
            assert count == expected[block], (
                f"block {block} is in {expected[block]} block tables but counted {count} times"
            )
            is_free = block in self._free
            assert not (is_free and count), f"block {block} is free and in use at once"
            assert is_free or count or block == NULL_BLOCK, f"block {block} is leaked: neither free nor in use"
        assert NULL_BLOCK not in self._free, "the null block is in the free list"
        assert len(self._free) + len(expected) == self.num_usable_blocks, (
            f"{len(self._free)} free and {len(expected)} used blocks are not {self.num_usable_blocks}"
        )
        for block, block_hash in enumerate(self._hashes):
            if block_hash is not None:
                owner = self._block_of.get(block_hash)
                assert owner == block, f"block {block} has hash {block_hash.hex()}, which the map gives to {owner}"
        num_hashed = sum(block_hash is not None for block_hash in self._hashes)
        assert num_hashed == len(self._block_of), f"{len(self._block_of)} hash entries for {num_hashed} hashed blocks"
        assert self._hashes[NULL_BLOCK] is None, "the null block is registered under a hash"
        idle_is_hashed = [self._hashes[block] is not None for block in self._free]
        assert idle_is_hashed == sorted(idle_is_hashed), "a cached block is in line for reuse before an empty one"

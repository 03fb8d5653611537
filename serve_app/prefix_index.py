"""Which engine replica has been sent which beginnings of prompts, as one ingress knows it."""

from collections import OrderedDict
from collections.abc import Collection, Sequence

from engine.cache.block_hash import ROOT_HASH, hash_blocks

MAX_BLOCKS = 2**18  # of all replicas together, about 36 MB; 4 million tokens with blocks of 16


class PrefixIndex:
    """A replica's part is what its KV cache is likely to hold: the blocks sent and received last.

    Prompts are given as *chains*: the hash of each full block, which stands for all tokens up to its end. Free of
    clocks, threads and Ray. Of a replica, the leading blocks of a chain are always known where a later one is: so a
    look-up is a binary search, and forgetting begins at the ends, as it does in the engine's cache.
    """

    def __init__(self, block_size: int, max_blocks: int = MAX_BLOCKS) -> None:
        """max_blocks: that are remembered of all replicas together; each may have an equal part."""
        self.block_size = block_size
        self._max_blocks = max_blocks
        self._capacities: dict[str, int] = {}  # of replicas that have told, in blocks
        self._held: dict[str, OrderedDict[bytes, None]] = {}  # by replica; the latest last

    def chain(self, token_ids: Sequence[int], head: Sequence[bytes] = ()) -> list[bytes]:
        """Hashes of the full blocks of `token_ids`, in order. head: those of its first blocks, if they are known."""
        rest = token_ids[len(head) * self.block_size :] if head else token_ids
        return [*head, *hash_blocks(head[-1] if head else ROOT_HASH, rest, self.block_size)]

    def num_held_blocks(self, replica_id: str, chain: Sequence[bytes]) -> int:
        """Of the chain, from its beginning."""
        held = self._held.get(replica_id)
        if not held or not chain or chain[0] not in held:
            return 0
        low, high = 1, len(chain)  # the number is one of these, or between
        while low < high:
            middle = (low + high + 1) // 2
            if chain[middle - 1] in held:
                low = middle
            else:
                high = middle - 1
        return low

    def record(self, replica_id: str, chain: Sequence[bytes]) -> None:
        """The replica has, or will soon have, the whole chain."""
        held = self._held.get(replica_id)
        if held is None:
            held = self._held[replica_id] = OrderedDict()
        for block in reversed(chain):  # its beginning is the latest of it: others may share that
            held[block] = None
            held.move_to_end(block)
        self._shrink(replica_id)

    def set_capacity(self, replica_id: str, num_blocks: int) -> None:
        """What the replica's cache can hold; 0: nothing is found in it."""
        if self._capacities.get(replica_id) != num_blocks:
            self._capacities[replica_id] = num_blocks
            self._shrink(replica_id)

    def forget_all_but(self, replica_ids: Collection[str | None]) -> None:
        for known in (self._held, self._capacities):
            for replica_id in known.keys() - set(replica_ids):
                del known[replica_id]

    @property
    def num_blocks(self) -> int:
        """Remembered, of all replicas."""
        return sum(len(held) for held in self._held.values())

    def _shrink(self, replica_id: str) -> None:
        part = self._max_blocks // max(1, len(self._held))
        for each in (replica_id,) if self.num_blocks <= self._max_blocks else tuple(self._held):
            held = self._held.get(each, OrderedDict())
            limit = min(part, self._capacities.get(each, part))
            while len(held) > limit:
                held.popitem(last=False)

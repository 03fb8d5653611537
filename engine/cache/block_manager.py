"""Block tables of requests over a block pool: prefix hits, growth, hashing of what is committed."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from engine.cache.block_hash import ROOT_HASH, hash_block
from engine.cache.block_pool import BlockPool
from engine.request import Request


@dataclass
class _Lineage:
    """What is remembered of one request between steps. Tokens only ever grow, so hashes stay valid once made."""

    hashes: list[bytes] = field(default_factory=list)  # of its full blocks, from the first, as far as needed yet
    num_registered: int = 0  # leading blocks of its block table that the pool has been told of; set by admission
    num_promised: int = 0  # leading blocks that its prefill will have registered; 0 while it has no blocks


class BlockManager:
    """What the scheduler asks of the cache. It writes `request.block_table` and no other field of a request.

    All blocks of a request stay until it is freed, also those that a sliding window has left behind: simple, and
    prefix hits and recomputation stay exact; the price is memory on windowed models with long contexts.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.block_size = pool.block_size
        self.capacity_tokens = pool.num_usable_blocks * pool.block_size  # of one request that has the pool to itself
        self.prefix_cache_queries = 0  # prompt tokens looked up, once for each request
        self.prefix_cache_hits = 0  # of those, tokens found
        self._lineages: dict[Request, _Lineage] = {}
        self._promised: Counter[bytes] = Counter()  # hashes of blocks that prefills under way have yet to register

    def find_cached_tokens(self, request: Request) -> int:
        """How many leading tokens of `request` an admission would find now: whole blocks, never its last token."""
        return len(self._find_cached_blocks(request)) * self.block_size

    def is_prefix_under_way(self, request: Request) -> bool:
        """Whether a running prefill is about to register the next block that `request` would find.

        Admitted now, it would compute the same block again beside it: the choices of one prompt, sent together, or
        requests that share a system prompt.
        """
        if not self._promised:
            return False
        index = len(self._find_cached_blocks(request))
        if (index + 1) * self.block_size >= request.num_tokens:  # its last token is computed anyway
            return False
        return self._hash(request, self._lineage(request), index) in self._promised

    def admit(self, request: Request, num_reserved_blocks: int = 0) -> int | None:
        """Give a request without blocks a table for all of its tokens, starting with its cached prefix.

        All or nothing: None, and nothing changes, where fewer than `num_reserved_blocks` free blocks would remain.
        Returns the number of leading tokens whose KV was found.
        """
        assert not request.block_table, f"request {request.request_id} is admitted with blocks"
        pool = self.pool
        cached = self._find_cached_blocks(request)
        num_new = self.num_blocks_for(request.num_tokens) - len(cached)
        num_idle = sum(pool.is_free(block) for block in cached)
        if num_new + num_idle + num_reserved_blocks > pool.num_free_blocks:
            return None
        pool.touch(cached)  # before allocating, which could evict them
        request.block_table[:] = cached + pool.allocate(num_new)
        self._promise(request, len(cached))
        num_cached_tokens = len(cached) * self.block_size
        if pool.enable_prefix_caching and request.num_preemptions == 0:
            self.prefix_cache_queries += request.num_prompt_tokens
            self.prefix_cache_hits += min(num_cached_tokens, request.num_prompt_tokens)
        return num_cached_tokens

    def grow(self, request: Request, num_tokens: int, num_reserved_blocks: int = 0) -> bool:
        """Append blocks until the request has `num_tokens` slots.

        All or nothing: False, and no change, where fewer than `num_reserved_blocks` free blocks would remain.
        """
        num_new = self.num_blocks_for(num_tokens) - len(request.block_table)
        if num_new > 0 and num_new + num_reserved_blocks > self.pool.num_free_blocks:
            return False
        if num_new > 0:
            request.block_table += self.pool.allocate(num_new)
        return True

    def share(self, request: Request, other: Request, num_tokens: int) -> int:
        """Give `other`, which has no blocks, the whole blocks of `request` that hold its first `num_tokens` tokens.

        Returns how many tokens these are. Nobody may write to them any more while both have them.
        """
        assert not other.block_table, f"request {other.request_id} has blocks"
        other.block_table[:] = request.block_table[: num_tokens // self.block_size]
        self.pool.touch(other.block_table)
        return len(other.block_table) * self.block_size

    def commit(self, request: Request) -> None:
        """Register the blocks that `num_computed_tokens` has filled: their KV is written and their tokens are final."""
        if not self.pool.enable_prefix_caching:
            return
        lineage = self._lineage(request)
        num_full = request.num_computed_tokens // self.block_size
        if num_full <= lineage.num_registered:
            return
        for index in range(lineage.num_registered, num_full):
            block_hash = self._hash(request, lineage, index)
            self.pool.register(request.block_table[index], block_hash)
            if index < lineage.num_promised:
                self._settle(block_hash)
        lineage.num_registered = num_full

    def free(self, request: Request) -> None:
        """Take the request's blocks, last first. What is registered of them can still be found, also by its return."""
        self.pool.free(reversed(request.block_table))
        request.block_table.clear()
        if lineage := self._lineages.get(request):
            for index in range(lineage.num_registered, lineage.num_promised):
                self._settle(lineage.hashes[index])
            lineage.num_promised = 0

    def forget(self, request: Request) -> None:
        """Drop what is remembered of a request that will not return."""
        assert not request.block_table, f"request {request.request_id} is forgotten with blocks"
        self._lineages.pop(request, None)

    def distrust(self, request: Request) -> None:
        """Let nobody find this request's blocks: it failed, their KV may be wrong, and a prefix hit would spread it."""
        for block in request.block_table:
            self.pool.unregister(block)

    def check_integrity(self, requests: Collection[Request]) -> None:
        """Assert that pool, block tables and hashes agree; `requests` are all those that are not finished.

        Raises:
            AssertionError: naming the block or the request that is wrong.
        """
        self.pool.check_integrity([request.block_table for request in requests])
        finished = self._lineages.keys() - set(requests)
        promised = sum(max(0, lineage.num_promised - lineage.num_registered) for lineage in self._lineages.values())
        assert promised == self._promised.total(), f"{self._promised.total()} blocks are promised, not {promised}"
        assert not finished, f"finished requests are still remembered: {[r.request_id for r in finished]}"
        for request in requests:
            name, num_computed = request.request_id, request.num_computed_tokens
            num_slots = len(request.block_table) * self.block_size
            assert num_computed <= num_slots, f"request {name}: {num_computed} tokens computed in {num_slots} slots"
            parent = ROOT_HASH
            for index, block in enumerate(request.block_table):
                block_hash = self.pool.hash_of(block)
                if (index + 1) * self.block_size > num_computed:
                    assert block_hash is None, f"request {name}: block {block} is hashed before it is full"
                    continue
                parent = hash_block(parent, request.token_ids(index * self.block_size, (index + 1) * self.block_size))
                assert block_hash in (None, parent), f"request {name}: block {block} has the hash of other tokens"

    def _promise(self, request: Request, num_cached: int) -> None:
        """Note which blocks the prefill of a request just admitted will register."""
        if not self.pool.enable_prefix_caching:
            return
        lineage = self._lineage(request)
        lineage.num_registered = num_cached
        lineage.num_promised = request.num_tokens // self.block_size
        for index in range(lineage.num_promised):
            block_hash = self._hash(request, lineage, index)
            if index >= num_cached:
                self._promised[block_hash] += 1

    def _settle(self, block_hash: bytes) -> None:
        """Take back one promise of a block."""
        self._promised[block_hash] -= 1
        if not self._promised[block_hash]:
            del self._promised[block_hash]

    def _find_cached_blocks(self, request: Request) -> list[int]:
        if not self.pool.enable_prefix_caching:
            return []
        lineage = self._lineage(request)
        # The last token is computed even if all are cached: its logits choose the next one.
        num_blocks = (request.num_tokens - 1) // self.block_size
        return self.pool.find(self._hash(request, lineage, index) for index in range(num_blocks))

    def _hash(self, request: Request, lineage: _Lineage, index: int) -> bytes:
        """Hash of the request's block `index`, made at the first time of asking: blocks are asked for in order."""
        hashes = lineage.hashes
        if index == len(hashes):
            token_ids = request.token_ids(index * self.block_size, (index + 1) * self.block_size)
            hashes.append(hash_block(hashes[-1] if hashes else ROOT_HASH, token_ids))
        return hashes[index]

    def _lineage(self, request: Request) -> _Lineage:
        lineage = self._lineages.get(request)
        if lineage is None:
            lineage = self._lineages[request] = _Lineage()
        return lineage

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks of a request with so many tokens."""
        return -(-num_tokens // self.block_size)

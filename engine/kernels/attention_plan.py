"""How the reference attention cuts a step into products: computed once a step, used by every layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Small, since a decoding request fills one row of its tile. SmolLM2 on 2 cores, 4 / 2 / 1 rows: a step of one request
# 31.3 / 29.4 / 29.8 ms, of eight 42.8 / 40.8 / 37.9 ms, a prefill of 128 tokens 240 / 243 / 274 ms.
QUERY_TILE = 2
KV_SPLIT_TOKENS = 256  # keys of one split; splits are aligned to position 0
# Tiles that are computed side by side: enough to spread the cost of a torch call, few enough to stay in the cache.
DECODE_TILES = 8
CHUNK_TILES = 64

NULL_SLOT = 0  # rows that belong to no request write here
ZERO_SLOT = 1  # always zero: read in place of positions past a context, whose slots may hold another request's NaN


@dataclass(frozen=True)
class ChunkRows:
    """Rows of one request in a batch: `num_rows` consecutive positions from `first_position` on.

    `block_table`: the blocks of the request, covering every position up to the chunk's last.
    """

    row_start: int
    num_rows: int
    first_position: int
    block_table: Sequence[int]

    @property
    def context_len(self) -> int:
        return self.first_position + self.num_rows


@dataclass(frozen=True)
class SplitWork:
    """One split of keys and the tiles of a group that see some of it; all of them see the group's first split.

    slots: int64 [A or 1, KV_SPLIT_TOKENS], 1 where all tiles belong to one request; ZERO_SLOT past the context.
    hidden: bool [A, 1, QUERY_TILE * group, KV_SPLIT_TOKENS], the keys that each row of a product may not see, `group`
    query heads a row; None if each sees all.
    """

    tiles: slice
    slots: torch.Tensor
    hidden: torch.Tensor | None


@dataclass(frozen=True)
class TileGroup:
    """T tiles of query rows.

    rows: int64 [T * QUERY_TILE], the batch row in each place; a place that only fills its tile repeats another's.
    real: int64 [R], the places that are not filling; real_rows: int64 [R], their batch rows.
    """

    rows: torch.Tensor
    real: torch.Tensor
    real_rows: torch.Tensor
    splits: list[SplitWork]


@dataclass(frozen=True)
class AttentionPlan:
    """All tiles of a step: the decoding requests in groups of their own, then longer chunks in pieces."""

    groups: list[TileGroup]


def plan_attention(
    chunks: Sequence[ChunkRows], block_size: int, group: int, sliding_window: int | None, device: torch.device
) -> AttentionPlan:
    """Cut a step's chunks into tiles and splits. `group`: query heads for each key-value head."""
    # Longest first: the tiles that see a given split are then neighbours.
    single = sorted((c for c in chunks if c.num_rows == 1), key=lambda c: -c.context_len)
    planner = _Planner(block_size, group, sliding_window, device)
    groups = [planner.decodes(single[i : i + DECODE_TILES]) for i in range(0, len(single), DECODE_TILES)]
    rows = CHUNK_TILES * QUERY_TILE
    for chunk in chunks:
        if chunk.num_rows > 1:
            groups += [planner.chunk(piece) for piece in _pieces(chunk, rows)]
    return AttentionPlan(groups)


def _pieces(chunk: ChunkRows, rows: int) -> list[ChunkRows]:
    return [
        ChunkRows(chunk.row_start + i, min(rows, chunk.num_rows - i), chunk.first_position + i, chunk.block_table)
        for i in range(0, chunk.num_rows, rows)
    ]


@dataclass(frozen=True)
class _Planner:
    block_size: int
    group: int
    sliding_window: int | None
    device: torch.device

    def decodes(self, chunks: Sequence[ChunkRows]) -> TileGroup:
        """One tile a request; each has its own keys."""
        real_rows = torch.tensor([c.row_start for c in chunks], device=self.device)
        real = torch.arange(len(chunks), device=self.device) * QUERY_TILE
        first = torch.tensor([c.first_position for c in chunks], device=self.device)
        splits = []
        for split in range((chunks[0].context_len - 1) // KV_SPLIT_TOKENS + 1):
            start = split * KV_SPLIT_TOKENS
            seeing = sum(c.context_len > start for c in chunks)
            if self._behind_window(start, min(c.first_position for c in chunks[:seeing])):
                continue
            slots = torch.tensor([self._slots(c, start) for c in chunks[:seeing]], device=self.device)
            splits.append(self._split(slice(0, seeing), start, slots, first[:seeing]))
        return TileGroup(real_rows.repeat_interleave(QUERY_TILE), real, real_rows, splits)

    def chunk(self, chunk: ChunkRows) -> TileGroup:
        """Tiles of consecutive rows of one request, which share its keys."""
        offsets = torch.arange(0, chunk.num_rows, QUERY_TILE, device=self.device)
        places = torch.arange(len(offsets) * QUERY_TILE, device=self.device)
        rows = chunk.row_start + places.clamp(max=chunk.num_rows - 1)
        real = places[: chunk.num_rows]
        first = chunk.first_position + offsets
        splits = []
        for split in range((chunk.context_len - 1) // KV_SPLIT_TOKENS + 1):
            start = split * KV_SPLIT_TOKENS
            if self._behind_window(start, chunk.first_position):
                continue
            # Tiles whose every row lies before this split see nothing of it.
            before = max(0, (start - chunk.first_position) // QUERY_TILE)
            slots = torch.tensor([self._slots(chunk, start)], device=self.device)
            splits.append(self._split(slice(before, len(offsets)), start, slots, first[before:]))
        return TileGroup(rows, real, chunk.row_start + real, splits)

    def _behind_window(self, split_start: int, earliest_query: int) -> bool:
        """True if the split lies wholly before what the earliest query still sees."""
        if self.sliding_window is None:
            return False
        return split_start + KV_SPLIT_TOKENS <= earliest_query - self.sliding_window + 1

    def _slots(self, chunk: ChunkRows, start: int) -> list[int]:
        stop = min(start + KV_SPLIT_TOKENS, chunk.context_len)
        size = self.block_size
        slots = [chunk.block_table[p // size] * size + p % size for p in range(start, stop)]
        return slots + [ZERO_SLOT] * (KV_SPLIT_TOKENS - len(slots))

    def _split(self, tiles: slice, start: int, slots: torch.Tensor, first: torch.Tensor) -> SplitWork:
        """`first`: the position of each tile's first row. A row sees itself and what came before it."""
        keys = torch.arange(start, start + KV_SPLIT_TOKENS, device=self.device)
        queries = (first[:, None] + torch.arange(QUERY_TILE, device=self.device))[:, :, None]
        hidden = keys > queries
        if self.sliding_window is not None:
            hidden |= keys <= queries - self.sliding_window
        if not bool(hidden.any()):
            return SplitWork(tiles, slots, None)
        return SplitWork(tiles, slots, hidden.repeat_interleave(self.group, dim=1)[:, None])

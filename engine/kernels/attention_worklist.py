# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Cuts the rows of a step into work for the attention kernel, on the device: once a step, for all layers.

A tile is some consecutive rows of one request at consecutive positions; it is computed by one program for each
key-value head. Where there are few tiles, their splits of keys are given to programs of their own, and the last of a
tile's programs to finish merges what the others left. None of these choices changes a bit of any row, so they are free
to depend on the batch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.pdl import supports_pdl, wait_for_producers
from engine.kernels.target import gpu_of

SPLIT_TOKENS = 256  # keys of a split; part of what a row's bits depend on, like KEY_TILE
KEY_TILE = 64
SMALL_M = 16  # rows of a product (batch rows x query heads of a key-value head): the least that a tensor core takes
LARGE_M = 64
MAX_PARTIAL_BYTES = 64 << 20
# Of the attention kernel, as compiled for sm_90: up to 255 registers a thread, 4 warps, at most 84 KB of shared memory.
PROGRAMS_PER_PROCESSOR = 2
MANY_ITEMS = 3  # for each program; with 768 items for 264 programs (SmolLM2's shape, 256 rows) four warps are better

ENTRY_FIELDS = 16  # int32 fields of an entry, of which 10 are used: an entry is two sectors of 32 bytes

ROW_START = tl.constexpr(0)  # the tile's first row in the batch
NUM_ROWS = tl.constexpr(1)
REQUEST = tl.constexpr(2)  # row of the block tables; -1 for rows of nobody
FIRST_POSITION = tl.constexpr(3)  # position of the tile's first row
SPLIT_BEGIN = tl.constexpr(4)  # the splits of keys that this entry walks through
SPLIT_END = tl.constexpr(5)
PARTIAL = tl.constexpr(6)  # where the first row leaves its partial state; -1: nothing to merge, write the output
FIRST_PARTIAL = tl.constexpr(7)  # where the tile's first split leaves its own
NUM_SPLITS = tl.constexpr(8)  # of the tile
STEP_POSITION = tl.constexpr(9)  # the first position of the request in this step: what lies before does not change


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _begins(row, num_rows, row_request, positions):
    """Whether `row` does not go on where the row before it stopped. Rows of nobody do: their positions mean nothing."""
    inside = (row > 0) & (row < num_rows)
    request = tl.load(row_request + row, mask=inside, other=0, cache_modifier=".cg")
    before = tl.load(row_request + row - 1, mask=inside, other=0, cache_modifier=".cg")
    position = tl.load(positions + row, mask=inside, other=0, cache_modifier=".cg")
    position_before = tl.load(positions + row - 1, mask=inside, other=0, cache_modifier=".cg")
    elsewhere = (request != before) | (position != position_before + 1)
    return (row <= 0) | (row >= num_rows) | (elsewhere & ((request >= 0) | (before >= 0)))


@triton.jit(do_not_specialize=["num_rows", "max_partials", "spread_below_tiles", "num_programs"])
def _worklist_kernel(
    row_request,
    positions,
    entries,
    num_entries,
    counters,
    num_rows,
    max_partials,
    spread_below_tiles,
    num_programs,
    BLOCK_ROWS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SMALL_ROWS: tl.constexpr,
    LARGE_ROWS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_producers(PDL)  # launches no dependents: attention reads the list before its own wait
    row = tl.arange(0, BLOCK_ROWS)
    inside = row < num_rows
    request = tl.maximum(tl.load(row_request + row, mask=inside, other=-1, cache_modifier=".cg"), -1)
    position = tl.load(positions + row, mask=inside, other=0, cache_modifier=".cg").to(tl.int32)

    # Runs: rows of one request at consecutive positions.
    head = _begins(row, num_rows, row_request, positions)
    tail = _begins(row + 1, num_rows, row_request, positions)
    run_start = tl.associative_scan(tl.where(head, row, 0), 0, _larger)
    run_end = tl.associative_scan(tl.where(tail, row, BLOCK_ROWS), 0, _smaller, reverse=True)
    # What fills half a large tile at most is sooner done in small ones.
    large = run_end - run_start >= (LARGE_ROWS // 2 if LARGE_ROWS > 0 else BLOCK_ROWS)

    # Tiles, each described at its first row.
    tile_rows = tl.where(large, LARGE_ROWS, SMALL_ROWS)
    first = inside & ((row - run_start) % tile_rows == 0)
    count = tl.minimum(tile_rows, run_end - row + 1)
    split_begin = row * 0
    if WINDOW > 0:
        split_begin = tl.maximum(position - WINDOW + 1, 0) // SPLIT_TOKENS
    num_splits = tl.where(request >= 0, (position + count - 1) // SPLIT_TOKENS + 1 - split_begin, 0)

    # Large tiles are spread over several programs only where they are too few to fill the device; small ones where one
    # alone would take more than half of a program's share of all splits, and has three of them: one program is done
    # with two by the time that others have met (at 32 rows of TinyLlama's shape on an H100).
    num_large = tl.sum((first & large & (request >= 0)).to(tl.int32), axis=0)
    share = tl.sum(tl.where(first, num_splits, 0), axis=0) * KV_HEADS
    excess = tl.where(large, spread_below_tiles - num_large, 2 * num_splits * num_programs - share)
    spread = first & (num_splits > tl.where(large, 1, 2)) & (excess > 0)
    partials = tl.where(spread, count * num_splits, 0)
    partial = tl.cumsum(partials, 0) - partials
    spread = spread & (partial + partials <= max_partials)

    # Large tiles first, the last rows (which see most keys) before the others.
    size = tl.where(first, tl.where(spread, num_splits, 1), 0)
    large_size = tl.where(large, size, 0)
    num_large_entries = tl.sum(large_size, axis=0)
    small_size = size - large_size
    before = tl.where(
        large,
        num_large_entries - tl.cumsum(large_size, 0),
        num_large_entries + tl.cumsum(small_size, 0) - small_size,
    )
    tl.store(num_entries, tl.sum(size, axis=0))
    tl.store(num_entries + 1, num_large_entries)
    for head_index in range(KV_HEADS):
        tl.store(counters + row * KV_HEADS + head_index, row * 0, mask=spread)
    for index in range(tl.max(size, axis=0)):
        mask = index < size
        entry = entries + (before + index) * FIELDS
        tl.store(entry + ROW_START, row, mask=mask)
        tl.store(entry + NUM_ROWS, count, mask=mask)
        tl.store(entry + REQUEST, request, mask=mask)
        tl.store(entry + FIRST_POSITION, position, mask=mask)
        tl.store(entry + SPLIT_BEGIN, split_begin + index, mask=mask)
        tl.store(entry + SPLIT_END, split_begin + tl.where(spread, index + 1, num_splits), mask=mask)
        tl.store(entry + PARTIAL, tl.where(spread, partial + index * count, -1), mask=mask)
        tl.store(entry + FIRST_PARTIAL, partial, mask=mask)
        tl.store(entry + NUM_SPLITS, num_splits, mask=mask)
        tl.store(entry + STEP_POSITION, position - (row - run_start), mask=mask)


@dataclass(frozen=True)
class AttentionWorkspace:
    """What attention needs between its kernels, for steps of up to `max_rows` rows; one for all graphs of a stream.

    entries: int32 [max_rows + max_partials, ENTRY_FIELDS]; num_entries: int32 [2], of all and of the large tiles among
    them; counters: int32 [max_rows, KVH], of spread tiles: how many of their programs are done; maxima, totals: float32
    [max_partials, H] and values: float32 [max_partials, H, D], the states of spread tiles, one for each row and split.
    All may hold anything before `build_worklist`, which every step begins with.

    large_tiles: whether chunks get tiles of LARGE_M; a graph for decoding alone is leaner without.
    num_processors: what the device has, for the choice of grids.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None
    dtype: torch.dtype
    large_tiles: bool
    num_processors: int
    max_splits: int
    entries: torch.Tensor
    num_entries: torch.Tensor
    counters: torch.Tensor
    maxima: torch.Tensor
    totals: torch.Tensor
    values: torch.Tensor

    @property
    def group(self) -> int:
        """Query heads of a key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_programs(self) -> int:
        """Of the attention kernel, where there is work for so many."""
        return PROGRAMS_PER_PROCESSOR * self.num_processors

    def num_warps(self, num_rows: int) -> int:
        """Of a program. Where there is much more work than programs of four warps, and no chunk that would want large
        tiles, a warp by itself does as much, and does not wait for three others at every unit: 17 µs in place of 24
        for 256 rows of TinyLlama's shape at 128 tokens on an H100, 49 in place of 56 at 380."""
        alone = self.at_once and not self.large_tiles and self.head_dim <= 64
        return 1 if alone and num_rows * self.num_kv_heads >= MANY_ITEMS * self.num_programs else 4

    @property
    def at_once(self) -> bool:
        """Whether small tiles take all keys of a split at once: on tensor cores, while that fits into registers."""
        return self.dtype.itemsize == 2 and self.small_m <= LARGE_M // 2 and self.head_dim <= 128

    @property
    def small_m(self) -> int:
        return max(SMALL_M, triton.next_power_of_2(self.group))

    def large_m(self, num_rows: int) -> int:
        """0 if a step of `num_rows` rows has no large tiles."""
        if not self.large_tiles or num_rows <= LARGE_M // self.group // 2 or self.small_m > LARGE_M // 2:
            return 0
        return LARGE_M


def attention_workspace(
    max_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_context_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    sliding_window: int | None = None,
    max_partial_bytes: int = MAX_PARTIAL_BYTES,
    large_tiles: bool = True,
) -> AttentionWorkspace:
    """Allocate once. Tiles whose states find no room in `max_partial_bytes` are not spread: slower, the same bits."""
    max_splits = -(-max_context_tokens // SPLIT_TOKENS)
    bytes_per_partial = num_heads * (head_dim + 2) * torch.float32.itemsize
    max_partials = min(max_rows * max_splits, max(1, max_partial_bytes // bytes_per_partial))
    gpu = gpu_of(device)
    return AttentionWorkspace(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        sliding_window=sliding_window,
        dtype=dtype,
        # Without tensor cores for float32, a large product only spills registers.
        large_tiles=large_tiles and dtype.itemsize == 2,
        num_processors=gpu.num_processors if gpu is not None else 2,
        max_splits=max_splits,
        entries=torch.empty((max_rows + max_partials, ENTRY_FIELDS), dtype=torch.int32, device=device),
        num_entries=torch.empty(2, dtype=torch.int32, device=device),
        counters=torch.empty((max_rows, num_kv_heads), dtype=torch.int32, device=device),
        maxima=torch.empty((max_partials, num_heads), device=device),
        totals=torch.empty((max_partials, num_heads), device=device),
        values=torch.empty((max_partials, num_heads, head_dim), device=device),
    )


def build_worklist(
    workspace: AttentionWorkspace, row_request: torch.Tensor, positions: torch.Tensor, pdl: bool = True
) -> None:
    """Cut a step into work: once a step, before its first `flash_attention`. Does not wait for the device.

    row_request: int32 [N], each row's row of the block tables; negative for rows of nobody. positions: int64 [N].
    N may be anything up to the workspace's rows. A request's rows should stand together at consecutive positions: rows
    that do not are computed rightly too, but then only where `flash_attention` is launched with pdl=False.
    pdl: False starts it only when the kernels before it are done. The next kernel must be launched without, since
    attention reads the list before it waits for the kernel ahead of it.
    """
    num_rows = row_request.shape[0]
    assert positions.shape == (num_rows,)
    assert num_rows <= workspace.counters.shape[0]
    assert row_request.is_contiguous()
    assert positions.is_contiguous()
    group = workspace.group
    use_pdl = pdl and supports_pdl(row_request.device)
    _worklist_kernel[(1,)](
        row_request,
        positions,
        workspace.entries,
        workspace.num_entries,
        workspace.counters,
        num_rows,
        workspace.values.shape[0],
        -(-workspace.num_processors // workspace.num_kv_heads),
        workspace.num_programs,
        BLOCK_ROWS=max(32, triton.next_power_of_2(num_rows)),
        KV_HEADS=workspace.num_kv_heads,
        SMALL_ROWS=workspace.small_m // group,
        LARGE_ROWS=workspace.large_m(num_rows) // group,
        SPLIT_TOKENS=SPLIT_TOKENS,
        WINDOW=workspace.sliding_window or 0,
        FIELDS=ENTRY_FIELDS,
        PDL=use_pdl,
        num_warps=1 if num_rows <= 32 else 4 if num_rows <= 256 else 8,  # a warp alone scans without barriers
        launch_pdl=use_pdl,
    )

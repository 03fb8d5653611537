# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Causal attention over the paged KV cache (FlashAttention, Dao 2023; split keys as in Flash-Decoding), in Triton.

One reduction for decode, chunks, prefill and verification. Keys are cut into splits of SPLIT_TOKENS and these into
tiles of KEY_TILE, both aligned to position 0. An online softmax walks the tiles of a split in ascending order, and the
states of the splits are merged in ascending order (`softmax_state`): by the program itself where it walks through all
splits of its rows, or by the last of several programs. The sum of the weights is a product with a column of ones, since
the order of `tl.sum` depends on the shape of its operand, and the order along K of `tl.dot` does not. Weights are
rounded to the model's dtype before they are summed and before they meet the values. So a row has the same bits
whatever chunk it is computed in, whatever rows stand beside it and however its keys are spread over programs.

Slots past a context, or before its window, are never read, so they may hold anything. Rows of nobody get zeros.
"""

import math

import torch
import triton
import triton.language as tl

from engine.kernels.arithmetic import multiply, round_to
from engine.kernels.attention_worklist import (
    ENTRY_FIELDS,
    FIRST_PARTIAL,
    FIRST_POSITION,
    IS_LARGE,
    KEY_TILE,
    NUM_ROWS,
    NUM_SPLITS,
    PARTIAL,
    REQUEST,
    ROW_START,
    SPLIT_BEGIN,
    SPLIT_END,
    SPLIT_TOKENS,
    AttentionWorkspace,
)
from engine.kernels.pdl import launch_dependents, supports_pdl, wait_for_producers
from engine.kernels.softmax_state import attended, empty_state, finite, merge_states, merged_state


@triton.jit
def _block_ids(block_table, token, lowest, last, BLOCK_SIZE: tl.constexpr):
    """The blocks that hold some positions; the null block for positions outside lowest..last."""
    mask = (token >= lowest) & (token <= last)
    return tl.load(block_table + token // BLOCK_SIZE, mask=mask, other=0, cache_modifier=".cg")


@triton.jit
def _split_state(
    queries,
    query_positions,
    lowest,
    last,
    split,
    keys,
    values,
    block_table,
    k_block_stride,
    k_slot_stride,
    v_block_stride,
    v_slot_stride,
    scale_log2,
    M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    KEY_TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """The state of M query rows after one split of keys. Positions outside lowest..last are not read."""
    dims = tl.arange(0, BLOCK_DIM)
    ones = tl.full([KEY_TILE, 16], 1.0, values.dtype.element_ty)
    maximum, _, weighted = empty_state(M, BLOCK_DIM)
    totals = tl.zeros([M, 16], tl.float32)  # 16 equal columns
    start = tl.maximum(split * SPLIT_TOKENS, lowest) // KEY_TILE
    stop = (tl.minimum((split + 1) * SPLIT_TOKENS, last + 1) + KEY_TILE - 1) // KEY_TILE
    first = start * KEY_TILE + tl.arange(0, KEY_TILE)
    next_block = _block_ids(block_table, first, lowest, last, BLOCK_SIZE)
    for tile in range(start, stop):
        token = tile * KEY_TILE + tl.arange(0, KEY_TILE)
        readable = (token >= lowest) & (token <= last)
        block = next_block.to(tl.int64)
        # One tile ahead: a load that waits for another load's result in the same turn halves what is under way.
        next_block = _block_ids(block_table, token + KEY_TILE, lowest, last, BLOCK_SIZE)
        slot = token % BLOCK_SIZE
        key = tl.load(
            keys + (block * k_block_stride + slot * k_slot_stride)[None, :] + dims[:, None],
            mask=readable[None, :] & (dims < HEAD_DIM)[:, None],
            other=0.0,
            cache_modifier=".cg",
        )
        value = tl.load(
            values + (block * v_block_stride + slot * v_slot_stride)[:, None] + dims[None, :],
            mask=readable[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        scores = multiply(queries, key, tl.zeros([M, KEY_TILE], tl.float32)) * scale_log2
        visible = token[None, :] <= query_positions[:, None]
        if WINDOW > 0:
            visible = visible & (token[None, :] > query_positions[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        both = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = round_to(tl.exp2(scores - finite(both)[:, None]), value.dtype)
        decay = tl.exp2(maximum - finite(both))[:, None]
        totals = multiply(weights, ones, totals * decay)
        weighted = multiply(weights, value, weighted * decay)
        maximum = both
    return maximum, tl.max(totals, axis=1), weighted


@triton.jit
def _attend(
    q,
    k_cache,
    v_cache,
    out,
    block_tables,
    entry,
    counters,
    maxima,
    totals,
    partial_values,
    kv_head,
    scale_log2,
    q_row_stride,
    k_block_stride,
    k_slot_stride,
    k_head_stride,
    v_block_stride,
    v_slot_stride,
    v_head_stride,
    table_stride,
    M: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    KEY_TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """One entry of the worklist for one key-value head: M = rows x GROUP, padded."""
    row_start = tl.load(entry + ROW_START, cache_modifier=".cg")
    num_rows = tl.load(entry + NUM_ROWS, cache_modifier=".cg")
    request = tl.load(entry + REQUEST, cache_modifier=".cg")
    first_position = tl.load(entry + FIRST_POSITION, cache_modifier=".cg")
    split_begin = tl.load(entry + SPLIT_BEGIN, cache_modifier=".cg")
    split_end = tl.load(entry + SPLIT_END, cache_modifier=".cg")
    partial = tl.load(entry + PARTIAL, cache_modifier=".cg")

    lane = tl.arange(0, M)
    row = lane // GROUP
    head = kv_head * GROUP + lane % GROUP
    dims = tl.arange(0, BLOCK_DIM)
    real = row < num_rows
    real_dims = real[:, None] & (dims < HEAD_DIM)[None, :]
    queries = tl.load(
        q + ((row_start + row) * q_row_stride + head * HEAD_DIM)[:, None] + dims[None, :],
        mask=real_dims,
        other=0.0,
        cache_modifier=".cg",
    )
    last = first_position + num_rows - 1
    lowest = first_position * 0
    if WINDOW > 0:
        lowest = tl.maximum(first_position - WINDOW + 1, 0)

    maximum, total, weighted = empty_state(M, BLOCK_DIM)
    for split in range(split_begin, split_end):
        split_maximum, split_total, split_weighted = _split_state(
            queries,
            first_position + row,
            lowest,
            last,
            split,
            k_cache + kv_head * k_head_stride,
            v_cache + kv_head * v_head_stride,
            block_tables + request * table_stride,
            k_block_stride,
            k_slot_stride,
            v_block_stride,
            v_slot_stride,
            scale_log2,
            M,
            HEAD_DIM,
            BLOCK_DIM,
            BLOCK_SIZE,
            SPLIT_TOKENS,
            KEY_TILE,
            WINDOW,
        )
        maximum, total, weighted = merge_states(maximum, total, weighted, split_maximum, split_total, split_weighted)

    heads: tl.constexpr = KV_HEADS * GROUP
    to = out + ((row_start + row) * heads + head)[:, None] * HEAD_DIM + dims[None, :]
    if partial < 0:
        tl.store(to, round_to(attended(total, weighted), out.dtype.element_ty), mask=real_dims)
    else:
        place = (partial + row) * heads + head
        tl.store(maxima + place, maximum, mask=real)
        tl.store(totals + place, total, mask=real)
        tl.store(partial_values + place[:, None] * HEAD_DIM + dims[None, :], weighted, mask=real_dims)
        num_splits = tl.load(entry + NUM_SPLITS, cache_modifier=".cg")
        counter = counters + row_start * KV_HEADS + kv_head
        tl.debug_barrier()  # every thread's part is stored before one thread says so
        arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if arrived == num_splits - 1:
            place = (tl.load(entry + FIRST_PARTIAL, cache_modifier=".cg") + row) * heads + head
            maximum, total, weighted = merged_state(
                maxima,
                totals,
                partial_values,
                place,
                row,
                num_rows,
                num_rows * heads,
                num_splits,
                M,
                HEAD_DIM,
                BLOCK_DIM,
            )
            tl.store(to, round_to(attended(total, weighted), out.dtype.element_ty), mask=real_dims)
            tl.store(counter, 0)  # for the next layer


@triton.jit(do_not_specialize=["table_stride"])
def attention_kernel(
    q,
    k_cache,
    v_cache,
    out,
    block_tables,
    entries,
    num_entries,
    counters,
    maxima,
    totals,
    partial_values,
    scale_log2,
    q_row_stride,
    k_block_stride,
    k_slot_stride,
    k_head_stride,
    v_block_stride,
    v_slot_stride,
    v_head_stride,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SMALL_M: tl.constexpr,
    LARGE_M: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    KEY_TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Any number of programs walk through the worklist, one entry and key-value head at a time."""
    launch_dependents(PDL)
    wait_for_producers(PDL)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    num_items = tl.load(num_entries, cache_modifier=".cg") * KV_HEADS
    for turn in range(tl.cdiv(num_items, programs)):
        # Back and forth, since the list begins with its longest entries.
        item = turn * programs + tl.where(turn % 2 == 0, program, programs - 1 - program)
        if item < num_items:
            entry = entries + item // KV_HEADS * FIELDS
            kv_head = item % KV_HEADS
            if LARGE_M > 0:
                if tl.load(entry + IS_LARGE, cache_modifier=".cg") != 0:
                    _attend(
                        q, k_cache, v_cache, out, block_tables, entry, counters, maxima, totals, partial_values,
                        kv_head, scale_log2, q_row_stride, k_block_stride, k_slot_stride, k_head_stride,
                        v_block_stride, v_slot_stride, v_head_stride, table_stride,
                        LARGE_M, KV_HEADS, GROUP, HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, SPLIT_TOKENS, KEY_TILE, WINDOW,
                    )  # fmt: skip
                else:
                    _attend(
                        q, k_cache, v_cache, out, block_tables, entry, counters, maxima, totals, partial_values,
                        kv_head, scale_log2, q_row_stride, k_block_stride, k_slot_stride, k_head_stride,
                        v_block_stride, v_slot_stride, v_head_stride, table_stride,
                        SMALL_M, KV_HEADS, GROUP, HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, SPLIT_TOKENS, KEY_TILE, WINDOW,
                    )  # fmt: skip
            else:
                _attend(
                    q, k_cache, v_cache, out, block_tables, entry, counters, maxima, totals, partial_values,
                    kv_head, scale_log2, q_row_stride, k_block_stride, k_slot_stride, k_head_stride,
                    v_block_stride, v_slot_stride, v_head_stride, table_stride,
                    SMALL_M, KV_HEADS, GROUP, HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, SPLIT_TOKENS, KEY_TILE, WINDOW,
                )  # fmt: skip


def _occupancy(block_dim: int, dtype: torch.dtype, large_m: int) -> tuple[int, int]:
    """Programs that fit on a processor of sm_90 side by side, and tiles of keys that each has under way plus one.

    Compiled for it, with 4 warps: 144 registers a thread and 53 KB for a head of 64 without large tiles, 255 and 102 KB
    for 128; with large tiles 254 and 74 KB, 255 (and spills) and 82 KB.
    """
    if dtype.itemsize == 4:
        return 2, 2
    if large_m == 0:
        return (3, 4) if block_dim <= 64 else (2, 4)
    return (2, 4) if block_dim <= 64 else (2, 2)


def flash_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    workspace: AttentionWorkspace,
    scale: float,
    out: torch.Tensor | None = None,
    pdl: bool = True,
) -> torch.Tensor:
    """Attention of the rows that `build_worklist` was last given; returns `out` [N, H, D], zero for rows of nobody.

    q: [N, H, D], rows may be strided; k_cache, v_cache: [num_blocks, block_size, KVH, D], heads and slots may be
    strided; block_tables: int32 [requests, blocks]. scale: of the scores, positive. The keys and values of the rows
    themselves must be in the cache. pdl: False starts it only when the kernels before it are done.
    Its launch depends on N alone, so that a CUDA graph may hold it; launches that share a workspace must not overlap.
    """
    num_rows, num_heads, head_dim = q.shape
    out = torch.empty((num_rows, num_heads, head_dim), dtype=q.dtype, device=q.device) if out is None else out
    assert (num_heads, head_dim, q.dtype) == (workspace.num_heads, workspace.head_dim, workspace.dtype)
    assert k_cache.shape == v_cache.shape
    assert k_cache.shape[2:] == (workspace.num_kv_heads, head_dim)
    assert k_cache.dtype == v_cache.dtype == q.dtype
    assert q.stride()[1:] == (head_dim, 1)
    assert k_cache.stride(3) == v_cache.stride(3) == block_tables.stride(1) == 1
    assert out.is_contiguous()
    use_pdl = pdl and supports_pdl(q.device)
    large_m = workspace.large_m(num_rows)
    programs_per_processor, num_stages = _occupancy(triton.next_power_of_2(head_dim), q.dtype, large_m)
    most_items = num_rows * workspace.num_kv_heads * workspace.max_splits
    attention_kernel[(min(programs_per_processor * workspace.num_processors, most_items),)](
        q,
        k_cache,
        v_cache,
        out,
        block_tables,
        workspace.entries,
        workspace.num_entries,
        workspace.counters,
        workspace.maxima,
        workspace.totals,
        workspace.values,
        scale * math.log2(math.e),
        q.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_tables.stride(0),
        KV_HEADS=workspace.num_kv_heads,
        GROUP=workspace.group,
        HEAD_DIM=head_dim,
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=k_cache.shape[1],
        SMALL_M=workspace.small_m,
        LARGE_M=large_m,
        SPLIT_TOKENS=SPLIT_TOKENS,
        KEY_TILE=KEY_TILE,
        WINDOW=workspace.sliding_window or 0,
        FIELDS=ENTRY_FIELDS,
        PDL=use_pdl,
        num_warps=4,
        num_stages=num_stages,
        enable_fp_fusion=False,
        launch_pdl=use_pdl,
    )
    return out

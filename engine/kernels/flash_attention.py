# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Causal attention over the paged KV cache (FlashAttention, Dao 2023; split keys as in Flash-Decoding), in Triton.

One reduction for decode, chunks, prefill and verification. Keys are cut into splits of SPLIT_TOKENS and these into
tiles of KEY_TILE, both aligned to position 0. Each tile has a softmax of its own, computed from nothing. The states of
a split's tiles are merged in ascending order, and so are those of the splits (`softmax_state`): by the program itself
where it has all splits of its rows, or by the last of several programs. Small tiles of query rows take the key tiles of
a split at once (`attention_at_once`), large ones one after the other (`attention_in_turns`). So a row has the same bits
whatever chunk it is computed in, whatever rows stand beside it and however its keys are spread over programs.

Slots past a context, or before its window, are never read, so they may hold anything. Rows of nobody get zeros.

Keys and values may be int8 with a scale for each position and head (KIVI's per-token scheme, Liu et al. 2024). Queries
meet int8 keys exactly, in their own dtype, and the scores are scaled; weights are scaled before they are rounded to
bfloat16, whatever the model's dtype, since scaled weights may be too small for float16.
"""

import math

import torch
import triton
import triton.language as tl

from engine.kernels.attention_at_once import attend_at_once
from engine.kernels.attention_entry import item_of
from engine.kernels.attention_in_turns import attend_in_turns
from engine.kernels.attention_output import Output
from engine.kernels.attention_shape import AttentionShape
from engine.kernels.attention_worklist import ENTRY_FIELDS, AttentionWorkspace
from engine.kernels.paged_kv import PagedKV
from engine.kernels.pdl import launch_dependents, supports_pdl, wait_for_producers

_FIELDS = tl.constexpr(ENTRY_FIELDS)
_TRITON_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit(do_not_specialize=["table_stride", "num_slots"])
def attention_kernel(
    q,
    keys,
    values,
    key_scales,
    value_scales,
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
    block_stride,
    slot_stride,
    head_stride,
    scale_block_stride,
    scale_slot_stride,
    scale_head_stride,
    table_stride,
    num_slots,
    SMALL_M: tl.constexpr,
    LARGE_M: tl.constexpr,
    VALUE_DTYPE: tl.constexpr,
    TILES: tl.constexpr,
    SHAPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Any number of programs walk through the worklist, one entry and key-value head at a time.

    SMALL_M, LARGE_M: rows of the tiles that are computed at once and in turns; 0 where a step has none of them.
    TILES: key tiles that are computed at once.
    """
    launch_dependents(PDL)
    kv = PagedKV(
        key_data=keys, value_data=values, key_scales=key_scales, value_scales=value_scales,
        block_stride=block_stride, slot_stride=slot_stride, head_stride=head_stride,
        scale_block_stride=scale_block_stride, scale_slot_stride=scale_slot_stride,
        scale_head_stride=scale_head_stride,
    )  # fmt: skip
    output = Output(out=out, counters=counters, maxima=maxima, totals=totals, sums=partial_values)
    num_items = tl.load(num_entries, cache_modifier=".cg") * SHAPE.kv_heads
    num_large = tl.full([], 0, tl.int32)
    first_small_turn = tl.full([], 0, tl.int32)
    if LARGE_M > 0:
        num_large = num_items
        if SMALL_M > 0:
            num_large = tl.load(num_entries + 1, cache_modifier=".cg") * SHAPE.kv_heads
        first_small_turn = num_large // tl.num_programs(0)
        first_small_turn += tl.where(item_of(first_small_turn) < num_large, 1, 0)
    if SMALL_M > 0:
        # Before the large tiles, which would only hold up their early loads; a program's work is the same either way.
        attend_at_once(
            q, kv, output, block_tables, entries, first_small_turn, num_items, scale_log2, q_row_stride, table_stride,
            num_slots, SMALL_M, VALUE_DTYPE, TILES, SHAPE, PDL,
        )  # fmt: skip
    else:
        wait_for_producers(PDL)
    if LARGE_M > 0:
        for turn in range(first_small_turn):
            item = item_of(turn)
            if item < num_large:
                attend_in_turns(
                    q, kv, output, block_tables, entries + item // SHAPE.kv_heads * _FIELDS, item % SHAPE.kv_heads,
                    scale_log2, q_row_stride, table_stride, LARGE_M, VALUE_DTYPE, SHAPE,
                )  # fmt: skip


def flash_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    workspace: AttentionWorkspace,
    scale: float,
    out: torch.Tensor | None = None,
    pdl: bool = True,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the rows that `build_worklist` was last given; returns `out` [N, H, D], zero for rows of nobody.

    q: [N, H, D], rows may be strided; k_cache, v_cache: [num_blocks, block_size, KVH, D], blocks, slots and heads may
    be strided, alike in both; block_tables: int32 [requests, blocks]. scale: of the scores, positive. The keys and
    values of the rows themselves are in the cache, or the kernel just ahead writes them; those of their requests'
    earlier positions are there since an earlier step.
    k_scales, v_scales: of an int8 cache, whose keys and values are int8 * scale: float32 [num_blocks, block_size, KVH],
    strided alike; for q of float16 or bfloat16. Both or none.
    pdl: False starts it only when the kernels before it are done, as it must behind `build_worklist` itself.
    Its launch depends on N alone, so that a CUDA graph may hold it; launches that share a workspace must not overlap.
    """
    num_rows, num_heads, head_dim = q.shape
    out = torch.empty((num_rows, num_heads, head_dim), dtype=q.dtype, device=q.device) if out is None else out
    _check(q, k_cache, v_cache, block_tables, workspace, out, k_scales, v_scales)
    key_scales, value_scales = (workspace.maxima,) * 2  # stand for pointers that the kernel does not read
    if k_scales is not None and v_scales is not None:
        key_scales, value_scales = k_scales, v_scales
    shape = AttentionShape(
        workspace.num_kv_heads, workspace.group, head_dim, k_cache.shape[1], workspace.sliding_window or 0
    )
    use_pdl = pdl and supports_pdl(q.device)
    large_m = workspace.large_m(num_rows)
    narrow = shape.block_dim * k_cache.element_size() <= 128
    most_items = num_rows * workspace.num_kv_heads * workspace.max_splits
    warps = workspace.num_warps(num_rows)
    programs = workspace.num_programs * (4 // warps)
    attention_kernel[(min(programs, most_items),)](
        q,
        k_cache,
        v_cache,
        key_scales,
        value_scales,
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
        *(key_scales.stride() if k_scales is not None else (0, 0, 0)),
        block_tables.stride(0),
        workspace.entries.shape[0],
        SMALL_M=workspace.small_m if workspace.at_once else 0,
        LARGE_M=large_m if workspace.at_once else workspace.small_m,
        VALUE_DTYPE=_TRITON_DTYPE[q.dtype if k_scales is None else torch.bfloat16],
        TILES=1 if warps == 1 else 4 if narrow else 2,
        SHAPE=shape,
        PDL=use_pdl,
        num_warps=warps,
        num_stages=4 if narrow else 2,  # in turns: so many key tiles but one under way
        enable_fp_fusion=False,
        launch_pdl=use_pdl,
    )
    return out


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    workspace: AttentionWorkspace,
    out: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
) -> None:
    """Assert the shapes, dtypes and strides that the kernel takes for granted."""
    _, num_heads, head_dim = q.shape
    assert (num_heads, head_dim, q.dtype) == (workspace.num_heads, workspace.head_dim, workspace.dtype)
    assert k_cache.shape == v_cache.shape
    assert k_cache.shape[2:] == (workspace.num_kv_heads, head_dim)
    assert k_cache.stride() == v_cache.stride()
    assert q.stride()[1:] == (head_dim, 1)
    assert k_cache.stride(3) == block_tables.stride(1) == 1
    assert out.is_contiguous()
    assert (k_scales is None) == (v_scales is None), "scales of both keys and values, or none"
    if k_scales is None or v_scales is None:
        assert k_cache.dtype == v_cache.dtype == q.dtype
        return
    assert q.dtype in (torch.float16, torch.bfloat16), "an int8 cache serves models of 16 bits"
    assert k_cache.dtype == v_cache.dtype == torch.int8
    assert k_scales.dtype == v_scales.dtype == torch.float32
    assert k_scales.shape == v_scales.shape == k_cache.shape[:3]
    assert k_scales.stride() == v_scales.stride()

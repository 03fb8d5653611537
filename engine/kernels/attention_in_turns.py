# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Attention of large tiles of query rows: the key tiles of a split one after the other, with loads some tiles ahead."""

import triton
import triton.language as tl

from engine.kernels.arithmetic import multiply
from engine.kernels.attention_entry import last_position, load_queries, read_entry, readable
from engine.kernels.attention_output import deliver, read_destination
from engine.kernels.attention_worklist import ENTRY_FIELDS, KEY_TILE, SPLIT_TOKENS
from engine.kernels.paged_kv import block_ids, load_heads, load_scales, widen
from engine.kernels.softmax_state import empty_state, merge_states, tile_state, visible_scores

_FIELDS = tl.constexpr(ENTRY_FIELDS)
_SPLIT_TOKENS = tl.constexpr(SPLIT_TOKENS)
_KEY_TILE = tl.constexpr(KEY_TILE)


@triton.jit
def _split_state(
    queries, kv, block_table, tile, kv_head, split, scale_log2, M: tl.constexpr, SCALED: tl.constexpr,
    VALUE_DTYPE: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """The state of M query rows after one split of keys."""
    D: tl.constexpr = SHAPE.block_dim  # noqa: N806
    query_position = tile.first_position + tl.arange(0, M) // SHAPE.group
    lowest = 0
    if SHAPE.window > 0:
        lowest = tl.maximum(tile.first_position - SHAPE.window + 1, 0)
    start = tl.maximum(split * _SPLIT_TOKENS, lowest) // _KEY_TILE
    stop = tl.cdiv(tl.minimum((split + 1) * _SPLIT_TOKENS, last_position(tile) + 1), _KEY_TILE)
    maximum, total, weighted = empty_state(M, D)
    first = start * _KEY_TILE + tl.arange(0, _KEY_TILE)
    next_block = block_ids(block_table, first, readable(first, tile, SHAPE.window), SHAPE.block_size)
    for index in range(start, stop):
        token = index * _KEY_TILE + tl.arange(0, _KEY_TILE)
        seen = readable(token, tile, SHAPE.window)
        block = next_block
        # One tile ahead: a load that waits for another load's result in the same turn halves what is under way.
        ahead = token + _KEY_TILE
        next_block = block_ids(block_table, ahead, readable(ahead, tile, SHAPE.window), SHAPE.block_size)
        key = load_heads(kv, kv.key_data, token, block, kv_head, seen, 0, 0, SHAPE)
        value = load_heads(kv, kv.value_data, token, block, kv_head, seen, 0, 1, SHAPE)
        key_scale, value_scale = 0.0, 0.0
        if SCALED:
            key_scale = load_scales(kv, kv.key_scales, token, block, kv_head, seen, 0.0, SHAPE)
            value_scale = load_scales(kv, kv.value_scales, token, block, kv_head, seen, 0.0, SHAPE)
        scores = multiply(queries, widen(key, queries.dtype), tl.zeros([M, _KEY_TILE], tl.float32))
        scores = visible_scores(scores, key_scale, scale_log2, token, query_position, seen, SCALED, SHAPE.window)
        a, b, c = tile_state(scores, widen(value, VALUE_DTYPE), value_scale, SCALED)
        maximum, total, weighted = merge_states(maximum, total, weighted, a, b, c)
    return maximum, total, weighted


@triton.jit
def attend_in_turns(
    q, kv, output, block_tables, entry, kv_head, scale_log2, q_row_stride, table_stride, M: tl.constexpr,
    VALUE_DTYPE: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """The worklist's entry at a pointer for one key-value head, after the wait for the kernel ahead."""
    SCALED: tl.constexpr = kv.key_data.dtype.element_ty == tl.int8  # noqa: N806
    D: tl.constexpr = SHAPE.block_dim  # noqa: N806
    tile = read_entry(entry, tl.full([], 1, tl.int1))
    destination = read_destination(entry)
    queries = load_queries(q, q_row_stride, tile, kv_head, M, SHAPE)
    block_table = block_tables + tile.request * table_stride
    maximum, total, weighted = empty_state(M, D)
    for split in range(tile.split_begin, tile.split_end):
        a, b, c = _split_state(
            queries, kv, block_table, tile, kv_head, split, scale_log2, M, SCALED, VALUE_DTYPE, SHAPE
        )
        maximum, total, weighted = merge_states(maximum, total, weighted, a, b, c)
    deliver(output, tile, destination, kv_head, maximum, total, weighted, M, SHAPE)

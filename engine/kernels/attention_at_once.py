# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Attention of small tiles of query rows: several key tiles at once, so that no load waits for another's use.

A unit of work is a split of a tile, or half of one where heads are wide, for one key-value head. Its key tiles are the
batch of a batched product, one a warp; only their finished states meet. What says where a unit's keys are is read while
the unit before it is computed. Of a program's first unit even the keys and values are asked for before the wait for the
kernel ahead: worklist and block tables do not change during a step, nor do keys and values at positions before the
first that the step computes for a request. Only the others are read after the wait.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from engine.kernels.arithmetic import multiply
from engine.kernels.attention_entry import (
    Entry,
    choose_entry,
    item_of,
    last_position,
    load_queries,
    read_entry,
    readable,
)
from engine.kernels.attention_output import deliver, read_destination
from engine.kernels.attention_worklist import ENTRY_FIELDS, KEY_TILE, SPLIT_TOKENS
from engine.kernels.paged_kv import block_ids, load_heads, load_scales, widen
from engine.kernels.pdl import wait_for_producers
from engine.kernels.softmax_state import empty_columns, merge_stack, merge_states, tile_state, visible_scores

_FIELDS = tl.constexpr(ENTRY_FIELDS)
_SPLIT_TOKENS = tl.constexpr(SPLIT_TOKENS)
_KEY_TILE = tl.constexpr(KEY_TILE)


class _Unit(NamedTuple):
    """TILES key tiles of a query tile, for a key-value head.

    index: of the unit among those from position 0 on. end: the first that its entry does not need. block: [TILES, keys
    of a tile], where its keys are.
    """

    item: tl.tensor
    kv_head: tl.tensor
    tile: Entry
    index: tl.tensor
    end: tl.tensor
    block: tl.tensor


@triton.jit
def _tokens(index, TILES: tl.constexpr):
    """Positions of a unit's keys: [TILES, keys of a tile]."""
    return (index * TILES + tl.arange(0, TILES)[:, None]) * _KEY_TILE + tl.arange(0, _KEY_TILE)[None, :]


@triton.jit
def _unit(block_tables, table_stride, item, tile, index, end, TILES: tl.constexpr, SHAPE: tl.constexpr):
    """A unit, with the blocks of its keys under way."""
    token = _tokens(index, TILES)
    mask = readable(token, tile, SHAPE.window)
    block = block_ids(block_tables + tile.request * table_stride, token, mask, SHAPE.block_size)
    return _Unit(item=item, kv_head=item % SHAPE.kv_heads, tile=tile, index=index, end=end, block=block)


@triton.jit
def _first_unit(block_tables, table_stride, item, tile, TILES: tl.constexpr, SHAPE: tl.constexpr):
    """The first unit of an entry. Rows of nobody have one that sees nothing."""
    UNITS: tl.constexpr = _SPLIT_TOKENS // (TILES * _KEY_TILE)  # noqa: N806
    begin = tile.split_begin * UNITS
    end = tl.minimum(tile.split_end * UNITS, last_position(tile) // (TILES * _KEY_TILE) + 1)
    return _unit(block_tables, table_stride, item, tile, begin, end, TILES, SHAPE)


@triton.jit
def _load(kv, data, scales, unit, mask, stored, scale, AXIS: tl.constexpr, TILES: tl.constexpr, SHAPE: tl.constexpr):
    """Keys [TILES, block_dim, keys] or values [TILES, keys, block_dim] of a unit, with block_dim as AXIS, and, if int8,
    their scales [TILES, keys]; `stored` and `scale` where `mask` is false."""
    token = _tokens(unit.index, TILES)
    stored = load_heads(kv, data, token, unit.block, unit.kv_head, mask, stored, AXIS, SHAPE)
    if data.dtype.element_ty == tl.int8:
        scale = load_scales(kv, scales, token, unit.block, unit.kv_head, mask, scale, SHAPE)
    return stored, scale


@triton.jit
def _state(
    unit, before, queries, key, key_scale, value, value_scale, scale_log2, VALUE_DTYPE: tl.constexpr,
    TILES: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """The state of what came `before` in the unit's split, and of the unit's keys; transposed."""
    SCALED: tl.constexpr = key.dtype == tl.int8  # noqa: N806
    M: tl.constexpr = queries.shape[0]  # noqa: N806
    D: tl.constexpr = SHAPE.block_dim  # noqa: N806
    token = _tokens(unit.index, TILES)
    products = multiply(
        tl.broadcast_to(queries[None, :, :], [TILES, M, D]),
        widen(key, queries.dtype),
        tl.zeros([TILES, M, _KEY_TILE], tl.float32),
    )
    position = unit.tile.first_position + tl.arange(0, M) // SHAPE.group
    seen = readable(token, unit.tile, SHAPE.window)
    scores = visible_scores(products, key_scale, scale_log2, token, position, seen, SCALED, SHAPE.window)
    maxima, totals, stack = tile_state(scores, widen(value, VALUE_DTYPE), value_scale, SCALED)
    return merge_stack(before[0], before[1], before[2], maxima, totals, stack)


@triton.jit
def _first_state(
    q, kv, unit, before, scale_log2, q_row_stride, M: tl.constexpr, VALUE_DTYPE: tl.constexpr, TILES: tl.constexpr,
    SHAPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The state of a program's first unit; waits for the kernel ahead."""
    token = _tokens(unit.index, TILES)
    seen = readable(token, unit.tile, SHAPE.window)
    none = tl.zeros([TILES, _KEY_TILE], tl.float32)
    old = seen & (token < unit.tile.step_position)
    key, key_scale = _load(kv, kv.key_data, kv.key_scales, unit, old, 0, none, 1, TILES, SHAPE)
    value, value_scale = _load(kv, kv.value_data, kv.value_scales, unit, old, 0, none, 2, TILES, SHAPE)
    wait_for_producers(PDL)
    new = seen & (token >= unit.tile.step_position)
    queries = load_queries(q, q_row_stride, unit.tile, unit.kv_head, M, SHAPE)
    key, key_scale = _load(kv, kv.key_data, kv.key_scales, unit, new, key, key_scale, 1, TILES, SHAPE)
    value, value_scale = _load(kv, kv.value_data, kv.value_scales, unit, new, value, value_scale, 2, TILES, SHAPE)
    return _state(unit, before, queries, key, key_scale, value, value_scale, scale_log2, VALUE_DTYPE, TILES, SHAPE)


@triton.jit
def _later_state(
    q, kv, unit, before, scale_log2, q_row_stride, M: tl.constexpr, VALUE_DTYPE: tl.constexpr, TILES: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """The state of any other unit, merged into the one of its split so far."""
    seen = readable(_tokens(unit.index, TILES), unit.tile, SHAPE.window)
    none = tl.zeros([TILES, _KEY_TILE], tl.float32)
    queries = load_queries(q, q_row_stride, unit.tile, unit.kv_head, M, SHAPE)
    key, key_scale = _load(kv, kv.key_data, kv.key_scales, unit, seen, 0, none, 1, TILES, SHAPE)
    value, value_scale = _load(kv, kv.value_data, kv.value_scales, unit, seen, 0, none, 2, TILES, SHAPE)
    return _state(unit, before, queries, key, key_scale, value, value_scale, scale_log2, VALUE_DTYPE, TILES, SHAPE)


@triton.jit
def attend_at_once(
    q, kv, output, block_tables, entries, first_turn, num_items, scale_log2, q_row_stride, table_stride, num_slots,
    M: tl.constexpr, VALUE_DTYPE: tl.constexpr, TILES: tl.constexpr, SHAPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """This program's items from `first_turn` on; waits for the kernel ahead. num_slots: places of the list.

    TILES: key tiles at once, 2 or 4: as many as there are registers for.
    """
    D: tl.constexpr = SHAPE.block_dim  # noqa: N806
    KV_HEADS: tl.constexpr = SHAPE.kv_heads  # noqa: N806
    UNITS: tl.constexpr = _SPLIT_TOKENS // (TILES * _KEY_TILE)  # noqa: N806
    empty = empty_columns(M, D)

    turn = first_turn
    item = item_of(turn)
    # The place is there to be read, in parallel with the length of the list, even if nobody wrote it.
    tile = read_entry(entries + item // KV_HEADS * _FIELDS, item < num_slots * KV_HEADS)
    tile = choose_entry(item < num_items, tile, read_entry(entries, item < 0))
    unit = _first_unit(block_tables, table_stride, item, tile, TILES, SHAPE)
    next_item = item_of(turn + 1)
    following = read_entry(entries + next_item // KV_HEADS * _FIELDS, next_item < num_items)
    state = empty
    split = empty
    if unit.item < num_items:
        split = _first_state(q, kv, unit, empty, scale_log2, q_row_stride, M, VALUE_DTYPE, TILES, SHAPE, PDL)
    else:
        wait_for_producers(PDL)
    while unit.item < num_items:
        destination = read_destination(entries + unit.item // KV_HEADS * _FIELDS)
        ends = unit.index + 1 >= unit.end
        next_unit = unit
        if ends:
            next_unit = _first_unit(block_tables, table_stride, item_of(turn + 1), following, TILES, SHAPE)
            turn += 1
            next_item = item_of(turn + 1)
            following = read_entry(entries + next_item // KV_HEADS * _FIELDS, next_item < num_items)
        else:
            next_unit = _unit(block_tables, table_stride, unit.item, unit.tile, unit.index + 1, unit.end, TILES, SHAPE)
        if ends | ((unit.index + 1) % UNITS == 0):
            state = merge_states(state[0], state[1], state[2], split[0], split[1], split[2])
            split = empty
        if ends:
            maximum, total, weighted = tl.trans(state[0]), tl.trans(state[1]), tl.trans(state[2])
            deliver(output, unit.tile, destination, unit.kv_head, maximum, total, weighted, M, SHAPE)
            state = empty
        if next_unit.item < num_items:
            split = _later_state(q, kv, next_unit, split, scale_log2, q_row_stride, M, VALUE_DTYPE, TILES, SHAPE)
        unit = next_unit

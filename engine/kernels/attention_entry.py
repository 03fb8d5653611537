# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Entries of the attention's worklist, as its kernel sees them."""

from typing import NamedTuple

import triton
import triton.language as tl

from engine.kernels.attention_worklist import (
    FIRST_POSITION,
    NUM_ROWS,
    REQUEST,
    ROW_START,
    SPLIT_BEGIN,
    SPLIT_END,
    STEP_POSITION,
)


class Entry(NamedTuple):
    """Scalars, int32: see the fields of the worklist. All are -1 in an entry past the end of the list."""

    row_start: tl.tensor
    num_rows: tl.tensor
    request: tl.tensor
    first_position: tl.tensor
    step_position: tl.tensor
    split_begin: tl.tensor
    split_end: tl.tensor


@triton.jit
def item_of(turn):
    """Which item this program does in a turn: an entry and a key-value head, as their number in the order of the list.

    Back and forth, since the list begins with its longest entries.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    return turn * programs + tl.where(turn % 2 == 0, program, programs - 1 - program)


@triton.jit
def read_entry(entry, mask):
    """The entry at a pointer; its loads are under way together."""
    return Entry(
        row_start=tl.load(entry + ROW_START, mask=mask, other=-1, cache_modifier=".cg"),
        num_rows=tl.load(entry + NUM_ROWS, mask=mask, other=-1, cache_modifier=".cg"),
        request=tl.load(entry + REQUEST, mask=mask, other=-1, cache_modifier=".cg"),
        first_position=tl.load(entry + FIRST_POSITION, mask=mask, other=-1, cache_modifier=".cg"),
        step_position=tl.load(entry + STEP_POSITION, mask=mask, other=-1, cache_modifier=".cg"),
        split_begin=tl.load(entry + SPLIT_BEGIN, mask=mask, other=-1, cache_modifier=".cg"),
        split_end=tl.load(entry + SPLIT_END, mask=mask, other=-1, cache_modifier=".cg"),
    )


@triton.jit
def choose_entry(condition, yes, no):
    """`yes` if the condition holds, else `no`."""
    return Entry(
        row_start=tl.where(condition, yes.row_start, no.row_start),
        num_rows=tl.where(condition, yes.num_rows, no.num_rows),
        request=tl.where(condition, yes.request, no.request),
        first_position=tl.where(condition, yes.first_position, no.first_position),
        step_position=tl.where(condition, yes.step_position, no.step_position),
        split_begin=tl.where(condition, yes.split_begin, no.split_begin),
        split_end=tl.where(condition, yes.split_end, no.split_end),
    )


@triton.jit
def last_position(entry):
    """Of the entry's rows; -1 for rows of nobody, which see no key."""
    return tl.where(entry.request < 0, -1, entry.first_position + entry.num_rows - 1)


@triton.jit
def readable(token, entry, WINDOW: tl.constexpr):
    """Which positions some row of the entry may see. No other slot is read: it may hold anything."""
    seen = (token >= 0) & (token <= last_position(entry))
    if WINDOW > 0:
        seen = seen & (token > entry.first_position - WINDOW)
    return seen


@triton.jit
def load_queries(q, q_row_stride, tile, kv_head, M: tl.constexpr, SHAPE: tl.constexpr):
    """Queries of a tile, [M, block_dim]; zero where there are none."""
    lane = tl.arange(0, M)
    row = lane // SHAPE.group
    head = kv_head * SHAPE.group + lane % SHAPE.group
    dims = tl.arange(0, SHAPE.block_dim)
    return tl.load(
        q + ((tile.row_start + row) * q_row_stride + head * SHAPE.head_dim)[:, None] + dims[None, :],
        mask=(row < tile.num_rows)[:, None] & (dims < SHAPE.head_dim)[None, :],
        other=0.0,
        cache_modifier=".cg",
    )

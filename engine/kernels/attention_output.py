# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Where attention leaves its states: in the output, or, of a tile whose splits are spread over programs, beside those
of the other splits, which the last of the programs merges."""

from typing import NamedTuple

import triton
import triton.language as tl

from engine.kernels.arithmetic import round_to
from engine.kernels.attention_worklist import FIRST_PARTIAL, NUM_SPLITS, PARTIAL
from engine.kernels.softmax_state import attended, empty_columns, halves, merge_stack

SPLITS_AT_ONCE = tl.constexpr(8)  # of a merge: their loads are under way together


class Output(NamedTuple):
    """Pointers: out [N, H, D], and the workspace's states and counters of spread tiles."""

    out: tl.tensor
    counters: tl.tensor
    maxima: tl.tensor
    totals: tl.tensor
    sums: tl.tensor


class Destination(NamedTuple):
    """Scalars of a worklist entry, int32, that say where its state goes."""

    partial: tl.tensor
    first_partial: tl.tensor
    num_splits: tl.tensor


@triton.jit
def read_destination(entry):
    """Of the entry at a pointer."""
    return Destination(
        partial=tl.load(entry + PARTIAL, cache_modifier=".cg"),
        first_partial=tl.load(entry + FIRST_PARTIAL, cache_modifier=".cg"),
        num_splits=tl.load(entry + NUM_SPLITS, cache_modifier=".cg"),
    )


@triton.jit
def _merge_splits(
    output,
    tile,
    destination,
    kv_head,
    SHAPE: tl.constexpr,
):
    """Merge all splits of a tile in ascending order and write its rows. Reads past the first-level cache, which does
    not see other processors' stores."""
    D: tl.constexpr = SHAPE.block_dim  # noqa: N806
    # Few rows at a time, and many splits of them: a decoding request has one row with the heads of its group.
    LANES: tl.constexpr = max(1, 512 // D)  # noqa: N806
    dims = tl.arange(0, D)
    for first_lane in range(0, tile.num_rows * SHAPE.group, LANES):
        lane = first_lane + tl.arange(0, LANES)
        row = lane // SHAPE.group
        head = kv_head * SHAPE.group + lane % SHAPE.group
        real = row < tile.num_rows
        maximum, total, weighted = empty_columns(LANES, D)
        for first_split in range(0, destination.num_splits, SPLITS_AT_ONCE):
            split = first_split + tl.arange(0, SPLITS_AT_ONCE)[:, None]
            mask = (split < destination.num_splits) & real[None, :]
            place = (destination.first_partial + split * tile.num_rows + row[None, :]) * SHAPE.heads + head[None, :]
            maxima = tl.load(output.maxima + place, mask=mask, other=float("-inf"), cache_modifier=".cg")
            totals = tl.load(output.totals + place, mask=mask, other=0.0, cache_modifier=".cg")
            values = tl.load(
                output.sums + place[:, :, None] * SHAPE.head_dim + dims[None, None, :],
                mask=mask[:, :, None] & (dims < SHAPE.head_dim)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            # Each half holds 4 splits that follow each other: [., 4 LANES].
            a = halves(tl.reshape(maxima, [2, 4 * LANES, 1]))
            b = halves(tl.reshape(totals, [2, 4 * LANES, 1]))
            c = halves(tl.reshape(values, [2, 4 * LANES, D]))
            for half in tl.static_range(2):
                maximum, total, weighted = merge_stack(
                    maximum,
                    total,
                    weighted,
                    tl.reshape(tl.trans(a[half]), [4, LANES, 1]),
                    tl.reshape(tl.trans(b[half]), [4, LANES, 1]),
                    tl.reshape(tl.trans(c[half]), [4, LANES, D]),
                )
        to = output.out + ((tile.row_start + row) * SHAPE.heads + head)[None, :] * SHAPE.head_dim + dims[:, None]
        mask = real[None, :] & (dims < SHAPE.head_dim)[:, None]
        tl.store(to, round_to(attended(total, weighted), output.out.dtype.element_ty), mask=mask)


@triton.jit
def deliver(
    output,
    tile,
    destination,
    kv_head,
    maximum,
    total,
    weighted,
    M: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """Bring home the state of an entry's rows and a key-value head."""
    D: tl.constexpr = SHAPE.block_dim  # noqa: N806
    lane = tl.arange(0, M)
    row = lane // SHAPE.group
    head = kv_head * SHAPE.group + lane % SHAPE.group
    dims = tl.arange(0, D)
    mask = (row < tile.num_rows)[:, None] & (dims < SHAPE.head_dim)[None, :]
    if destination.partial < 0:
        to = output.out + ((tile.row_start + row) * SHAPE.heads + head)[:, None] * SHAPE.head_dim + dims[None, :]
        tl.store(to, round_to(attended(total, weighted), output.out.dtype.element_ty), mask=mask)
    else:
        place = ((destination.partial + row) * SHAPE.heads + head)[:, None]
        real = (row < tile.num_rows)[:, None]
        tl.store(output.maxima + place, maximum, mask=real)
        tl.store(output.totals + place, total, mask=real)
        tl.store(output.sums + place * SHAPE.head_dim + dims[None, :], weighted, mask=mask)
        counter = output.counters + tile.row_start * SHAPE.kv_heads + kv_head
        tl.debug_barrier()  # every thread's part is stored before one thread says so
        arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if arrived == destination.num_splits - 1:
            _merge_splits(output, tile, destination, kv_head, SHAPE)
            tl.store(counter, 0)  # for the next layer

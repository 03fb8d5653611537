# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""A product for few rows: weights from the packed copy straight into the tensor cores' registers.

Each warp of a program owns one slice of K, so that a row's chain of additions has a quarter of the length, or an
eighth: a tensor core needs about 33 cycles to add to what it has just computed, 2.4 µs for K = 2,048 in one chain.
Weights are asked for before the wait for the kernel ahead, and a turn ahead of their use. "Swap AB": 16 weight rows are
the M operand and the activations N, 8 or 16 of them.

The packed order (`matrix.pack`) is the order of operand A's fragments: `_operand` only renames registers. That holds
with as many warps as slices, which the launch options see to.
"""

import triton
import triton.language as tl

from engine.kernels.arithmetic import multiply
from engine.kernels.int8_values import as_loaded, four_values


@triton.jit
def load_turn(
    w_ptr,
    tile,
    last_tile,
    turn,
    K: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    STEPS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """STEPS steps of each slice of GROUPS tiles of 16 weight rows from `tile` on; zeros past slice and K. Flat.

    w_ptr: the packed values, int8 ones as int32, four a word. Tiles past `last_tile` repeat it.
    """
    WORD: tl.constexpr = 4 if w_ptr.dtype.element_ty == tl.int32 else 1  # noqa: N806
    TURN: tl.constexpr = STEPS * SLICES * 256 // WORD  # noqa: N806
    place = tl.arange(0, GROUPS * TURN)
    within = place % TURN
    source = tl.minimum(tile + place // TURN, last_tile) * (SLICE * SLICES * 16 // WORD) + turn * TURN + within
    if K == SLICES * SLICE and SLICE % (16 * STEPS) == 0:
        values = tl.load(w_ptr + source)
    else:
        if WORD == 4:
            step = turn * STEPS + within // (SLICES * 128) * 2
            slice_index = within // 128 % SLICES
        else:
            step = turn * STEPS + within // (SLICES * 256)
            slice_index = within // 256 % SLICES
        mask = (step < SLICE // 16) & (slice_index * SLICE + step * 16 < K)
        values = tl.load(w_ptr + source, mask=mask, other=0)
    return values


@triton.jit
def _operand(values, SLICES: tl.constexpr, STEPS: tl.constexpr, GROUPS: tl.constexpr, dtype: tl.constexpr):
    """A turn's flat values as operand A: [GROUPS x SLICES, 16, 16 STEPS]."""
    if values.dtype == tl.int32:
        a, b, c, d = four_values(values, dtype)
        # turn of two steps, slice, g, c, step, half of the features, one of a pair, half of the rows
        pairs = tl.join(tl.join(a, b), tl.join(c, d))
        parts = tl.reshape(pairs, [GROUPS, STEPS // 2, SLICES, 8, 4, 2, 2, 2, 2])
        parts = tl.permute(parts, [0, 2, 8, 3, 1, 5, 6, 4, 7])
        operand = as_loaded(tl.reshape(parts, [GROUPS * SLICES, 16, STEPS * 16]))
    else:
        # step, slice, g, c, half of the features, half of the rows, one of a pair
        parts = tl.reshape(values, [GROUPS, STEPS, SLICES, 8, 4, 2, 2, 2])
        parts = tl.permute(parts, [0, 2, 6, 3, 1, 5, 4, 7])
        operand = tl.reshape(parts, [GROUPS * SLICES, 16, STEPS * 16])
    return operand


@triton.jit
def _columns(
    x_ptr,
    row_offset,
    present,
    turn,
    K: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    STEPS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The turn's features of the rows as operand B: [GROUPS x SLICES, 16 STEPS, BLOCK_N]."""
    within = turn * (STEPS * 16) + tl.arange(0, STEPS * 16)
    k = tl.arange(0, SLICES)[:, None] * SLICE + within[None, :]
    mask = present[None, :, None]
    if K != SLICES * SLICE:
        mask = mask & (k < K)[:, None, :]
    if SLICE % (16 * STEPS) != 0:
        mask = mask & (within < SLICE)[None, None, :]
    x = tl.load(x_ptr + row_offset[None, :, None] + k[:, None, :], mask=mask, other=0.0, cache_modifier=".cg")
    x = tl.broadcast_to(x, [SLICES, BLOCK_N, STEPS * 16])
    if GROUPS > 1:
        x = tl.broadcast_to(x[None, :, :, :], [GROUPS, SLICES, BLOCK_N, STEPS * 16])
        x = tl.reshape(x, [GROUPS * SLICES, BLOCK_N, STEPS * 16])
    return tl.permute(x, [0, 2, 1])


@triton.jit
def _fold(acc, SLICES: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The slices' sums in ascending order, as `product_many_rows` adds them to zero: [16 GROUPS, BLOCK_N]."""
    if SLICES == 8:
        slices = tl.permute(tl.reshape(acc, [GROUPS, 2, 2, 2, 16, BLOCK_N]), [0, 4, 5, 2, 3, 1])
        lower, upper = tl.split(slices)
        total = _add_four(_add_four(0.0, lower), upper)
    else:
        slices = tl.permute(tl.reshape(acc, [GROUPS, 2, 2, 16, BLOCK_N]), [0, 3, 4, 1, 2])
        total = _add_four(0.0, slices)
    return tl.reshape(total, [GROUPS * 16, BLOCK_N])


@triton.jit
def _add_four(total, slices):
    """total and then the four slices of [..., 2, 2], one after the other."""
    even, odd = tl.split(slices)
    zeroth, second = tl.split(even)
    first, third = tl.split(odd)
    return (((total + zeroth) + first) + second) + third


@triton.jit
def product_few_rows(
    first,
    second,
    w_ptr,
    tile,
    last_tile,
    x_ptr,
    row_offset,
    present,
    K: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    STEPS: tl.constexpr,
    PRELOAD: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """GROUPS tiles of 16 weight rows times a tile of rows: float32 [16 GROUPS, BLOCK_N].

    first, second: `load_turn` of turns 0 and 1, the second only if PRELOAD is 2. row_offset, present:
    [BLOCK_N], or [1] for one row that all columns repeat.
    """
    TURNS: tl.constexpr = (SLICE + 16 * STEPS - 1) // (16 * STEPS)  # noqa: N806
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros([GROUPS * SLICES, 16, BLOCK_N], tl.float32)
    x = _columns(x_ptr, row_offset, present, 0, K, SLICE, SLICES, STEPS, GROUPS, BLOCK_N)
    if PRELOAD > 1:
        next_x = _columns(x_ptr, row_offset, present, 1, K, SLICE, SLICES, STEPS, GROUPS, BLOCK_N)
        for turn in tl.range(2, TURNS, num_stages=1):
            third = load_turn(w_ptr, tile, last_tile, turn, K, SLICE, SLICES, STEPS, GROUPS)
            third_x = _columns(x_ptr, row_offset, present, turn, K, SLICE, SLICES, STEPS, GROUPS, BLOCK_N)
            acc = multiply(_operand(first, SLICES, STEPS, GROUPS, dtype), x, acc)
            first = second
            x = next_x
            second = third
            next_x = third_x
        acc = multiply(_operand(first, SLICES, STEPS, GROUPS, dtype), x, acc)
        acc = multiply(_operand(second, SLICES, STEPS, GROUPS, dtype), next_x, acc)
    else:
        for turn in tl.range(1, TURNS, num_stages=1):
            ahead = load_turn(w_ptr, tile, last_tile, turn, K, SLICE, SLICES, STEPS, GROUPS)
            ahead_x = _columns(x_ptr, row_offset, present, turn, K, SLICE, SLICES, STEPS, GROUPS, BLOCK_N)
            acc = multiply(_operand(first, SLICES, STEPS, GROUPS, dtype), x, acc)
            first = ahead
            x = ahead_x
        acc = multiply(_operand(first, SLICES, STEPS, GROUPS, dtype), x, acc)
    return _fold(acc, SLICES, GROUPS, BLOCK_N)

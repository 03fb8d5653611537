# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""A product for any number of rows: tiles of whole weight rows through shared memory, Hopper's warpgroup products.

The order along K is that of `product_few_rows`: each slice is summed on its own, and the sums are added in ascending
order. One accumulator walks through all slices and is emptied at their borders. Sums of integers (w8a8) need no order.
"""

import triton
import triton.language as tl

from engine.kernels.arithmetic import multiply, multiply_int8
from engine.kernels.int8_values import unpack_int8


@triton.jit
def _load_weight(
    w_ptr, weight_rows, start, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, dtype: tl.constexpr
):
    """A weight tile [BLOCK_M, BLOCK_K]; zero past K. `weight_rows` all exist."""
    if w_ptr.dtype.element_ty == tl.int32:
        word = start // 4 + tl.arange(0, BLOCK_K // 4)
        pointers = w_ptr + weight_rows[:, None] * (K // 4) + word[None, :]
        if K % BLOCK_K == 0:
            words = tl.load(pointers)
        else:
            words = tl.load(pointers, mask=(word < K // 4)[None, :], other=0)
        tile = unpack_int8(words, BLOCK_M, BLOCK_K // 4, dtype)
    else:
        k = start + tl.arange(0, BLOCK_K)
        pointers = w_ptr + weight_rows[:, None] * K + k[None, :]
        if K % BLOCK_K == 0:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(k < K)[None, :], other=0.0)
    return tile


@triton.jit
def product_many_rows(
    w_ptr,
    weight_rows,
    x_ptr,
    row_offset,
    present,
    K: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A weight tile times a tile of rows: float32 [BLOCK_M, BLOCK_N]. row_offset, present: [BLOCK_N]."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    step = 0
    for start in range(0, K, BLOCK_K):
        w = _load_weight(w_ptr, weight_rows, start, K, BLOCK_M, BLOCK_K, dtype)
        k = start + tl.arange(0, BLOCK_K)
        mask = present[:, None]
        if K % BLOCK_K != 0:
            mask = mask & (k < K)[None, :]
        x = tl.load(x_ptr + row_offset[:, None] + k[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        acc = multiply(w, tl.trans(x), acc)
        step += 1
        if w_ptr.dtype.element_ty == tl.int32:
            # The tile is a register operand, and where a branch reads its sum, Triton 3.6 forgets to wait for it.
            is_last = step == SLICE // BLOCK_K
            total = tl.where(is_last, total + acc, total)
            acc = tl.where(is_last, 0.0, acc)
            step = tl.where(is_last, 0, step)
        elif step == SLICE // BLOCK_K:
            total += acc
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            step = 0
    if K % SLICE != 0:
        total += acc
    return total


@triton.jit
def product_int8(
    w_ptr,
    weight_rows,
    x_ptr,
    row_offset,
    present,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same of an int8 weight and int8 rows; the sums in int32, rounded to float32 once."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = present[:, None]
        pointers = w_ptr + weight_rows[:, None] * K + k[None, :]
        if K % BLOCK_K == 0:
            w = tl.load(pointers)
        else:
            mask = mask & (k < K)[None, :]
            w = tl.load(pointers, mask=(k < K)[None, :], other=0)
        x = tl.load(x_ptr + row_offset[:, None] + k[None, :], mask=mask, other=0, cache_modifier=".cg")
        acc = multiply_int8(w, tl.trans(x), acc)
    return acc.to(tl.float32)

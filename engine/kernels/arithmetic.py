# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Arithmetic whose bits no compiler and no layout may choose, the same under Triton's interpreter as on a GPU."""

import triton
import triton.language as tl

from engine.kernels.pdl import INTERPRETED

# The interpreter (3.9) multiplies bfloat16 operands of a product as if their bits were integers, and casts to
# bfloat16 by cutting off: both are spelled out there. Its products come from a matrix library whose order of sums
# follows the shape; in float64 that is too small to show.
_INTERPRETED = tl.constexpr(INTERPRETED)


def halvings(width: int) -> int:
    """Steps of `tree_sum` over `width`, a power of two."""
    assert width & (width - 1) == 0, "a power of two"
    return width.bit_length() - 1


@triton.jit
def round_to(values, dtype: tl.constexpr):
    """float32 to `dtype`, to the nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        values = tl.where(values == values, nearest, values)
    return values.to(dtype)


@triton.jit
def multiply(a, b, acc):
    """acc + a b on the tensor cores: exact products of the operands' dtype, float32 sums, K upwards."""
    if _INTERPRETED:
        return acc + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def multiply_int8(a, b, acc):
    """acc + a b of int8 operands: int32, exact."""
    if _INTERPRETED:
        return acc + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.int32)
    return tl.dot(a, b, acc, out_dtype=tl.int32)


@triton.jit
def tree_sum(values, ROWS: tl.constexpr, WIDTH: tl.constexpr, HALVINGS: tl.constexpr):
    """Sums of the rows of [ROWS, WIDTH] by adding neighbours HALVINGS = log2(WIDTH) times; returns [ROWS].

    Each addition has two operands, so the layout of the tensor cannot change the order; `tl.sum` over all of WIDTH
    would follow the number of warps.
    """
    for step in tl.static_range(HALVINGS):
        values = tl.sum(tl.reshape(values, [ROWS, WIDTH >> (step + 1), 2]), axis=2)
    return tl.reshape(values, [ROWS])

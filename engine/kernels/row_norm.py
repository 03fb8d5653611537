# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""RMSNorm in two parts: whoever writes a row multiplies it by the norm's weights, whoever reads it divides by its rms.

rms(x) is one number a row, so that W · (x · w / rms(x)) = (W · (x · w)) / rms(x): the product need not wait for it. The
producer of a row, which has only a tile of it, leaves the sum of the tile's squares; the consumer adds these up.

The sum is one binary tree over the features, in the order of `sum_of_squares` inside sixteen of them and by neighbours
above: additions of two numbers each, so that neither a tile's size nor a compiler's layout can change its bits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.arithmetic import halvings, tree_sum

LEAF = tl.constexpr(16)  # features whose squares are summed by halves


@dataclass(frozen=True)
class NormedRows:
    """Rows on their way into a norm.

    weighted: [N, K], the rows times the norm's weights, rounded. squares: float32 [N, at least num_parts], of which the
    first `num_parts` numbers of each row add up to the row's sum of squares. eps: of the norm. scales: float32 [N],
    what `weighted` is to be multiplied with where it is int8; else None.
    """

    weighted: torch.Tensor
    squares: torch.Tensor
    num_parts: int
    eps: float
    scales: torch.Tensor | None = None

    def options(self) -> dict[str, int]:
        """Keyword arguments of a kernel that calls `load_parts` and `row_scale`."""
        columns = triton.next_power_of_2(self.num_parts)
        return {
            "PARTS": self.num_parts,
            "PART_COLUMNS": columns,
            "PART_HALVINGS": halvings(columns),
            "PART_STRIDE": self.squares.stride(0),
        }


def max_parts(features: int) -> int:
    """Columns of `NormedRows.squares` that are enough for any producer."""
    return -(-features // 16)


@triton.jit
def sum_of_squares(values, M: tl.constexpr, N: tl.constexpr, TILE_HALVINGS: tl.constexpr):
    """Sums of the squares of the columns of [M, N], M a multiple of 16 and M / 16 = 2^TILE_HALVINGS: [N]."""
    squares = tl.reshape(values * values, [M // LEAF, LEAF, N])
    for step in tl.static_range(4):
        squares = tl.sum(tl.reshape(squares, [M // LEAF, 2, 8 >> step, N]), axis=1)
    squares = tl.reshape(squares, [M // LEAF, N])
    for step in tl.static_range(TILE_HALVINGS):
        squares = tl.sum(tl.reshape(squares, [M // LEAF >> (step + 1), 2, N]), axis=1)
    return tl.reshape(squares, [N])


@triton.jit
def load_parts(squares_ptr, row, present, PARTS: tl.constexpr, PART_COLUMNS: tl.constexpr, PART_STRIDE: tl.constexpr):
    """The parts of some rows' sums of squares, [rows, PART_COLUMNS]; zero where not `present`."""
    part = tl.arange(0, PART_COLUMNS)
    mask = present[:, None] & (part < PARTS)[None, :]
    return tl.load(squares_ptr + row[:, None] * PART_STRIDE + part[None, :], mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def row_scale(parts, eps, K: tl.constexpr, ROWS: tl.constexpr, PART_COLUMNS: tl.constexpr, PART_HALVINGS: tl.constexpr):
    """1 / rms of the rows: [ROWS]."""
    return tl.rsqrt(tree_sum(parts, ROWS, PART_COLUMNS, PART_HALVINGS) / K + eps)

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""What the product kernels share: a tile of weight rows times a tile of activation rows, always in the same order.

"Swap AB": the weight tile is the M operand of the tensor cores and the rows are N, so that one row costs no more
than a full tile of 16 or 64, and the order of summation of a row is the same for any number of rows. One accumulator
walks K upwards; nothing is split along K. Statistics of the norms are summed by halving a fixed number of columns,
additions of two numbers each, so no layout that a compiler chooses can change their bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.arithmetic import halvings, multiply, round_to, tree_sum
from engine.kernels.configurations import Configuration
from engine.kernels.pdl import launch_dependents, supports_pdl, wait_for_producers

STATISTIC_STAGES = tl.constexpr(4)  # unrolled instead, many rows spill registers under Triton 3.9
STATISTIC_COLUMNS = 256  # partial sums of a row's squares; a constant, since the bits of a norm depend on it


def statistic_columns(in_features: int) -> int:
    """Columns over which the squares of a row of `in_features` are summed."""
    return min(STATISTIC_COLUMNS, triton.next_power_of_2(in_features))


def tile_options(
    configuration: Configuration, rows: int, weight: torch.Tensor, in_features: int, pdl: bool
) -> dict[str, Any]:
    """Keyword arguments of a launch that follow from the configuration.

    block_n, preload and one_row are clipped to what the shape allows; none of them changes a bit.
    """
    assert not configuration.one_row or rows == 1, "a configuration for one row"
    use_pdl = pdl and supports_pdl(weight.device)
    steps = triton.cdiv(in_features, configuration.block_k)
    options: dict[str, Any] = {
        "K": in_features,
        "BLOCK_M": configuration.block_m,
        "BLOCK_N": configuration.block_n,
        "BLOCK_K": configuration.block_k,
        "LOAD_N": 1 if configuration.one_row else configuration.block_n,
        "PRELOAD": min(configuration.preload, steps),
        "SEGMENTS": _prefetch_segments(configuration, in_features * weight.element_size()) if use_pdl else 0,
        "PDL": use_pdl,
        "num_warps": configuration.num_warps,
        "num_stages": configuration.num_stages,
        # A fused multiply-add rounds once where the twin rounds twice, and where one is used is up to the compiler.
        "enable_fp_fusion": False,
    }
    if use_pdl:
        options["launch_pdl"] = True
    return options


def norm_options(in_features: int) -> dict[str, int]:
    """Keyword arguments of a launch that computes the statistics of rows of `in_features`."""
    columns = statistic_columns(in_features)
    return {"COLUMNS": columns, "HALVINGS": halvings(columns)}


def _prefetch_segments(configuration: Configuration, row_bytes: int) -> int:
    """Pieces into which each weight row is cut for the prefetch, one a thread; 0: no prefetch."""
    if not configuration.prefetch or row_bytes % 16:
        return 0
    segments = max(1, 32 * configuration.num_warps // configuration.block_m)
    return segments if row_bytes % (16 * segments) == 0 else 1


@triton.jit
def load_rows(x_ptr, row_offset, present, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Features start … start + BLOCK_K of the rows at `row_offset`; zero where not `present` and past K."""
    k = start + tl.arange(0, BLOCK_K)
    mask = present[:, None]
    if K % BLOCK_K != 0:
        mask = mask & (k < K)[None, :]
    return tl.load(x_ptr + row_offset[:, None] + k[None, :], mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def row_scales(
    x_ptr,
    row_offset,
    present,
    eps,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    """1 / rms of each row, float32 [ROWS]; the order of additions depends on K alone."""
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    if ROWS == 1:  # few registers a load: all of them at once
        for start in tl.static_range(0, K, COLUMNS):
            x = load_rows(x_ptr, row_offset, present, start, K, COLUMNS).to(tl.float32)
            squares = tl.fma(x, x, squares)
    else:
        for start in tl.range(0, K, COLUMNS, num_stages=STATISTIC_STAGES):
            x = load_rows(x_ptr, row_offset, present, start, K, COLUMNS).to(tl.float32)
            squares = tl.fma(x, x, squares)
    return tl.rsqrt(tree_sum(squares, ROWS, COLUMNS, HALVINGS) / K + eps)


@triton.jit
def normalise(x, scale, norm_ptr, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """RMSNorm of a tile of rows, rounded to their dtype as the twin does."""
    k = start + tl.arange(0, BLOCK_K)
    norm = tl.load(norm_ptr + k) if K % BLOCK_K == 0 else tl.load(norm_ptr + k, mask=k < K, other=0.0)
    return round_to(x.to(tl.float32) * scale[:, None] * norm[None, :], x.dtype)


@triton.jit
def load_weight(w_ptr, weight_rows, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A weight tile [BLOCK_M, BLOCK_K]; zero past K. `weight_rows` all exist."""
    k = start + tl.arange(0, BLOCK_K)
    pointers = w_ptr + weight_rows[:, None] * K + k[None, :]
    if K % BLOCK_K == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=(k < K)[None, :], other=0.0)


@triton.jit
def prefetch_weights(
    w_ptr, first_row, OUT: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, SEGMENTS: tl.constexpr
):
    """Ask for whole weight rows in L2, each in SEGMENTS pieces: one instruction a thread, no register held."""
    piece = tl.arange(0, BLOCK_M * SEGMENTS)
    row = tl.minimum(first_row + piece // SEGMENTS, OUT - 1)
    address = (w_ptr + row * K + (piece % SEGMENTS) * (K // SEGMENTS)).to(tl.int64)
    num_bytes = tl.full(
        [BLOCK_M * SEGMENTS], K // SEGMENTS * (w_ptr.dtype.element_ty.primitive_bitwidth // 8), tl.int32
    )
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [address, num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def begin(
    w_ptr,
    first_row,
    weight_rows,
    OUT: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRELOAD: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Launch the dependents, start reading weights, wait for the kernels ahead; returns the first two weight tiles.

    A tile that PRELOAD does not ask for is returned as 0 and not used.
    """
    launch_dependents(PDL)
    first = 0
    second = 0
    if PRELOAD > 0:
        first = load_weight(w_ptr, weight_rows, 0, K, BLOCK_K)
    if PRELOAD > 1:
        second = load_weight(w_ptr, weight_rows, BLOCK_K, K, BLOCK_K)
    if SEGMENTS > 0:
        prefetch_weights(w_ptr, first_row, OUT, K, BLOCK_M, SEGMENTS)
    wait_for_producers(PDL)
    return first, second


@triton.jit
def columns(
    x_ptr,
    row_offset,
    present,
    scale,
    norm_ptr,
    start,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOAD_N: tl.constexpr,
    NORM: tl.constexpr,
):
    """The N operand of one step, [BLOCK_K, BLOCK_N]: rows as columns, normalised if NORM."""
    x = load_rows(x_ptr, row_offset, present, start, K, BLOCK_K)
    if NORM:
        x = normalise(x, scale, norm_ptr, start, K, BLOCK_K)
    if LOAD_N != BLOCK_N:
        x = tl.broadcast_to(x, [BLOCK_N, BLOCK_K])
    return tl.trans(x)


@triton.jit
def accumulate(
    first,
    second,
    w_ptr,
    weight_rows,
    x_ptr,
    row_offset,
    present,
    scale,
    norm_ptr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOAD_N: tl.constexpr,
    PRELOAD: tl.constexpr,
    NORM: tl.constexpr,
):
    """The product of a weight tile with a tile of rows: float32 [BLOCK_M, BLOCK_N], K in ascending order.

    row_offset, present: [LOAD_N], where LOAD_N is BLOCK_N, or 1 for one row that all columns repeat.
    scale: from `row_scales` [LOAD_N], read only if NORM.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if PRELOAD > 0:
        x = columns(x_ptr, row_offset, present, scale, norm_ptr, 0, K, BLOCK_N, BLOCK_K, LOAD_N, NORM)
        acc = multiply(first, x, acc)
    if PRELOAD > 1:
        x = columns(x_ptr, row_offset, present, scale, norm_ptr, BLOCK_K, K, BLOCK_N, BLOCK_K, LOAD_N, NORM)
        acc = multiply(second, x, acc)
    for start in range(PRELOAD * BLOCK_K, K, BLOCK_K):
        w = load_weight(w_ptr, weight_rows, start, K, BLOCK_K)
        x = columns(x_ptr, row_offset, present, scale, norm_ptr, start, K, BLOCK_N, BLOCK_K, LOAD_N, NORM)
        acc = multiply(w, x, acc)
    return acc


@triton.jit
def split_pairs(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Rows in the order of `pair_order` to their first and second halves, [BLOCK_M / 2, BLOCK_N] each."""
    groups = tl.reshape(tile, [BLOCK_M // (2 * GROUP), 2, GROUP, BLOCK_N])
    first, second = tl.split(tl.permute(groups, [0, 2, 3, 1]))
    return tl.reshape(first, [BLOCK_M // 2, BLOCK_N]), tl.reshape(second, [BLOCK_M // 2, BLOCK_N])

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Output and down projections with the residual added, ready for the next norm: the end of each half of a layer."""

import torch
import triton
import triton.language as tl

from engine.kernels.arithmetic import halvings, round_to
from engine.kernels.configurations import Configuration, configuration_for, fitted
from engine.kernels.int8_rows import Int8Rows
from engine.kernels.matrix import Matrix
from engine.kernels.prefetch import prefetch, shares
from engine.kernels.product import accumulate, begin, num_programs, product_options, scaled, weight_pointer
from engine.kernels.row_norm import NormedRows, sum_of_squares


@triton.jit(do_not_specialize=["rows", "share", "last"])
def _product_residual(
    x_ptr,
    w_ptr,
    scales_ptr,
    row_scales_ptr,
    residual_ptr,
    norm_ptr,
    out_ptr,
    weighted_ptr,
    squares_ptr,
    ahead_ptr,
    rows,
    share,
    last,
    OUT: tl.constexpr,
    TILE_HALVINGS: tl.constexpr,
    PART_STRIDE: tl.constexpr,
    K: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    INT8: tl.constexpr,
    INT8_ROWS: tl.constexpr,
    FEW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOAD_N: tl.constexpr,
    STEPS: tl.constexpr,
    PRELOAD: tl.constexpr,
    PDL: tl.constexpr,
    THREADS: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_N)
    tile = tl.program_id(0) // row_tiles
    first_row = tl.program_id(0) % row_tiles * BLOCK_N
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    norm = tl.load(norm_ptr + m, mask=m < OUT, other=0.0)
    if THREADS > 0:
        prefetch(ahead_ptr, share, last, THREADS)
    first, second = begin(w_ptr, tile * BLOCK_M, OUT, K, SLICE, SLICES, BLOCK_M, STEPS, PRELOAD, FEW, PDL)
    n = first_row + tl.arange(0, BLOCK_N)
    target = n[None, :] * OUT + m[:, None]
    mask = (n < rows)[None, :] & (m < OUT)[:, None]
    residual = tl.load(residual_ptr + target, mask=mask, other=0.0, cache_modifier=".cg")
    source = first_row + tl.arange(0, LOAD_N)
    acc = accumulate(
        first, second, w_ptr, tile * BLOCK_M, x_ptr, source * K, source < rows,
        OUT, K, SLICE, SLICES, BLOCK_M, BLOCK_N, BLOCK_K, STEPS, PRELOAD, FEW,
    )  # fmt: skip
    acc = scaled(acc, scales_ptr, row_scales_ptr, m, source, source < rows, OUT, INT8, INT8_ROWS)
    dtype = out_ptr.dtype.element_ty
    total = round_to(residual.to(tl.float32) + round_to(acc, dtype).to(tl.float32), dtype)
    tl.store(out_ptr + target, total, mask=mask)
    wide = tl.where(mask, total.to(tl.float32), 0.0)
    tl.store(weighted_ptr + target, round_to(wide * norm[:, None], dtype), mask=mask)
    part = sum_of_squares(wide, BLOCK_M, BLOCK_N, TILE_HALVINGS)
    tl.store(squares_ptr + n * PART_STRIDE + tile, part, mask=n < rows)


def product_residual(
    x: torch.Tensor | Int8Rows,
    matrix: Matrix,
    residual: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    weighted: torch.Tensor,
    squares: torch.Tensor,
    *,
    configuration: Configuration | None = None,
    pdl: bool = True,
    ahead: torch.Tensor | None = None,
) -> NormedRows:
    """out = residual + x Wᵀ, the product rounded to the dtype, then the sum; and the same on its way into `norm`.

    x [N, K], matrix [M, K], residual, out and weighted [N, M], all contiguous and of one dtype; residual and out may be
    the same tensor. norm: float32 [M]. weighted, squares: where the returned rows' parts go.
    configuration: in place of the table's entry. pdl: False launches the kernel only when those before it are done.
    ahead: a weight that the next product reads, to be fetched into the cache meanwhile.
    """
    values, row_scales = (x.values, x.scales) if isinstance(x, Int8Rows) else (x, squares)
    rows, outputs = values.shape[0], matrix.out_features
    assert values.shape == (rows, matrix.in_features)
    assert matrix.rounds_inputs == isinstance(x, Int8Rows)
    assert residual.shape == out.shape == weighted.shape == (rows, outputs)
    assert norm.shape == (outputs,)
    assert norm.dtype == squares.dtype == torch.float32
    assert residual.dtype == out.dtype == weighted.dtype
    assert isinstance(x, Int8Rows) or x.dtype == out.dtype
    assert all(t.is_contiguous() for t in (values, matrix.rows, residual, norm, out, weighted))
    configuration = configuration or configuration_for("product_residual", rows, matrix)
    configuration = fitted(configuration, rows, matrix, row_bytes=values.element_size())
    options = product_options(configuration, rows, matrix, pdl)
    num_parts = triton.cdiv(outputs, options["BLOCK_M"])
    assert squares.shape[0] >= rows
    assert squares.shape[1] >= num_parts
    programs = num_programs(configuration, rows, outputs)
    if not options["PDL"]:
        ahead = None  # there is no wait to use
    share, last = (0, 0) if ahead is None else shares(ahead, programs, options["num_warps"])
    _product_residual[(programs,)](
        values,
        weight_pointer(matrix, configuration),
        squares if matrix.scales is None else matrix.scales,
        row_scales,
        residual,
        norm,
        out,
        weighted,
        squares,
        squares if ahead is None else ahead,
        rows,
        share,
        last,
        OUT=outputs,
        TILE_HALVINGS=halvings(options["BLOCK_M"] // 16),
        PART_STRIDE=squares.stride(0),
        THREADS=0 if ahead is None else 32 * options["num_warps"],
        **options,
    )
    return NormedRows(weighted, squares, num_parts, eps)

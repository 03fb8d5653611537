# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""RMSNorm, gate and up projections and SwiGLU: the first half of a feed-forward block."""

import torch
import triton
import triton.language as tl

from engine.kernels.arithmetic import round_to
from engine.kernels.configurations import Configuration, configuration_for, fitted
from engine.kernels.matrix import Matrix
from engine.kernels.pair_order import pair_group, pair_order
from engine.kernels.product import accumulate, begin, num_programs, product_options, scaled, split_pairs, weight_pointer
from engine.kernels.row_norm import NormedRows, load_parts, row_scale


def gate_up_row_order(ffn_size: int) -> torch.Tensor:
    """Order of the rows of a stacked weight (gate, then up: [2F, K]) that the kernel wants: `weight[order]`."""
    return pair_order(1, 2 * ffn_size)


@triton.jit(do_not_specialize=["rows", "eps"])
def _norm_gate_up_silu(
    x_ptr,
    squares_ptr,
    w_ptr,
    scales_ptr,
    row_scales_ptr,
    out_ptr,
    rows,
    eps,
    OUT: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    PART_COLUMNS: tl.constexpr,
    PART_HALVINGS: tl.constexpr,
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
):
    row_tiles = tl.cdiv(rows, BLOCK_N)
    tile = tl.program_id(0) // row_tiles
    first_row = tl.program_id(0) % row_tiles * BLOCK_N
    first, second = begin(w_ptr, tile * BLOCK_M, OUT, K, SLICE, SLICES, BLOCK_M, STEPS, PRELOAD, FEW, PDL)
    source = first_row + tl.arange(0, LOAD_N)
    if FEW:  # under way beside the product; for many rows it would cost registers
        parts = load_parts(squares_ptr, source, source < rows, PARTS, PART_COLUMNS, PART_STRIDE)
    acc = accumulate(
        first, second, w_ptr, tile * BLOCK_M, x_ptr, source * K, source < rows,
        OUT, K, SLICE, SLICES, BLOCK_M, BLOCK_N, BLOCK_K, STEPS, PRELOAD, FEW,
    )  # fmt: skip
    if not FEW:
        parts = load_parts(squares_ptr, source, source < rows, PARTS, PART_COLUMNS, PART_STRIDE)
    acc = scaled(
        acc,
        scales_ptr,
        row_scales_ptr,
        tile * BLOCK_M + tl.arange(0, BLOCK_M),
        source,
        source < rows,
        OUT,
        INT8,
        INT8_ROWS,
    )
    acc = acc * row_scale(parts, eps, K, LOAD_N, PART_COLUMNS, PART_HALVINGS)[None, :]
    dtype = out_ptr.dtype.element_ty
    gate, up = split_pairs(round_to(acc, dtype).to(tl.float32), BLOCK_M, BLOCK_N, GROUP)
    activated = tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up
    n = first_row + tl.arange(0, BLOCK_N)
    feature = tile * (BLOCK_M // 2) + tl.arange(0, BLOCK_M // 2)
    mask = (n < rows)[None, :] & (feature < OUT // 2)[:, None]
    tl.store(out_ptr + n[None, :] * (OUT // 2) + feature[:, None], round_to(activated, dtype), mask=mask)


def norm_gate_up_silu(
    x: NormedRows,
    matrix: Matrix,
    out: torch.Tensor,
    *,
    configuration: Configuration | None = None,
    pdl: bool = True,
) -> None:
    """out = silu(gate) · up of the normalised rows; gate and up are rounded to the dtype before.

    x: rows [N, K]; matrix [2F, K] in the order of `gate_up_row_order`; out [N, F], contiguous.
    configuration: in place of the table's entry. pdl: False launches the kernel only when those before it are done.
    """
    rows, outputs = x.weighted.shape[0], matrix.out_features
    assert x.weighted.shape == (rows, matrix.in_features)
    assert out.shape == (rows, outputs // 2)
    assert outputs % 2 == 0
    assert (torch.int8 if matrix.rounds_inputs else out.dtype) == x.weighted.dtype
    assert all(t.is_contiguous() for t in (x.weighted, matrix.rows, out))
    configuration = configuration or configuration_for("norm_gate_up_silu", rows, matrix)
    configuration = fitted(configuration, rows, matrix, row_bytes=x.weighted.element_size())
    _norm_gate_up_silu[(num_programs(configuration, rows, outputs),)](
        x.weighted,
        x.squares,
        weight_pointer(matrix, configuration),
        x.squares if matrix.scales is None else matrix.scales,
        x.squares if x.scales is None else x.scales,
        out,
        rows,
        x.eps,
        OUT=outputs,
        GROUP=pair_group(outputs // 2),
        **x.options(),
        **product_options(configuration, rows, matrix, pdl),
    )

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""The final RMSNorm and the product with the vocabulary."""

import torch
import triton
import triton.language as tl

from engine.kernels.arithmetic import round_to
from engine.kernels.configurations import Configuration, configuration_for, fitted
from engine.kernels.matrix import Matrix
from engine.kernels.product import accumulate, begin, num_programs, product_options, scaled, weight_pointer
from engine.kernels.row_norm import NormedRows, load_parts, row_scale


@triton.jit(do_not_specialize=["rows", "eps"])
def _norm_logits(
    x_ptr,
    squares_ptr,
    index_ptr,
    w_ptr,
    scales_ptr,
    row_scales_ptr,
    out_ptr,
    rows,
    eps,
    OUT: tl.constexpr,
    INDEXED: tl.constexpr,
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
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    first, second = begin(w_ptr, tile * BLOCK_M, OUT, K, SLICE, SLICES, BLOCK_M, STEPS, PRELOAD, FEW, PDL)
    place = first_row + tl.arange(0, LOAD_N)
    source = place
    if INDEXED:
        source = tl.load(index_ptr + place, mask=place < rows, other=0, cache_modifier=".cg").to(tl.int32)
    if FEW:  # under way beside the product; for many rows it would cost registers
        parts = load_parts(squares_ptr, source, place < rows, PARTS, PART_COLUMNS, PART_STRIDE)
    acc = accumulate(
        first, second, w_ptr, tile * BLOCK_M, x_ptr, source * K, place < rows,
        OUT, K, SLICE, SLICES, BLOCK_M, BLOCK_N, BLOCK_K, STEPS, PRELOAD, FEW,
    )  # fmt: skip
    if not FEW:
        parts = load_parts(squares_ptr, source, place < rows, PARTS, PART_COLUMNS, PART_STRIDE)
    acc = scaled(acc, scales_ptr, row_scales_ptr, m, source, place < rows, OUT, INT8, INT8_ROWS)
    acc = acc * row_scale(parts, eps, K, LOAD_N, PART_COLUMNS, PART_HALVINGS)[None, :]
    n = first_row + tl.arange(0, BLOCK_N)
    mask = (n < rows)[None, :] & (m < OUT)[:, None]
    rounded = round_to(acc, x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + n.to(tl.int64)[None, :] * OUT + m[:, None], rounded, mask=mask)


def norm_logits(
    x: NormedRows,
    matrix: Matrix,
    out: torch.Tensor,
    *,
    row_index: torch.Tensor | None = None,
    configuration: Configuration | None = None,
    pdl: bool = True,
) -> None:
    """Logits of the normalised rows, float32 values rounded through the model's dtype.

    x: rows [N, K]; matrix [V, K]; out float32 [S, V], contiguous.
    row_index: int64 [S], the rows whose logits are wanted; None: all, S = N.
    configuration: in place of the table's entry. pdl: False launches the kernel only when those before it are done.
    """
    rows = x.weighted.shape[0] if row_index is None else row_index.shape[0]
    outputs = matrix.out_features
    assert x.weighted.shape[1] == matrix.in_features
    assert out.shape == (rows, outputs)
    assert out.dtype == torch.float32
    assert not matrix.rounds_inputs, "logits are rounded through the dtype of the rows"
    assert all(t.is_contiguous() for t in (x.weighted, matrix.rows, out))
    assert row_index is None or row_index.dtype == torch.int64
    configuration = configuration or configuration_for("norm_logits", rows, matrix)
    configuration = fitted(configuration, rows, matrix, row_bytes=x.weighted.element_size())
    _norm_logits[(num_programs(configuration, rows, outputs),)](
        x.weighted,
        x.squares,
        x.squares if row_index is None else row_index,
        weight_pointer(matrix, configuration),
        x.squares if matrix.scales is None else matrix.scales,
        x.squares if x.scales is None else x.scales,
        out,
        rows,
        x.eps,
        OUT=outputs,
        INDEXED=row_index is not None,
        **x.options(),
        **product_options(configuration, rows, matrix, pdl),
    )

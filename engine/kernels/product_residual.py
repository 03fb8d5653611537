# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Output and down projections with the residual added: the end of each half of a layer."""

import torch
import triton
import triton.language as tl

from engine.kernels.arithmetic import round_to
from engine.kernels.configurations import Configuration, configuration_for
from engine.kernels.product import accumulate, begin, tile_options


@triton.jit(do_not_specialize=["rows"])
def _product_residual(
    x_ptr,
    w_ptr,
    residual_ptr,
    out_ptr,
    rows,
    OUT: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOAD_N: tl.constexpr,
    PRELOAD: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PDL: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_N)
    first_out = tl.program_id(0) // row_tiles * BLOCK_M
    first_row = tl.program_id(0) % row_tiles * BLOCK_N
    m = first_out + tl.arange(0, BLOCK_M)
    weight_rows = tl.minimum(m, OUT - 1)
    first, second = begin(w_ptr, first_out, weight_rows, OUT, K, BLOCK_M, BLOCK_K, PRELOAD, SEGMENTS, PDL)
    n = first_row + tl.arange(0, BLOCK_N)
    target = n[None, :] * OUT + m[:, None]
    mask = (n < rows)[None, :] & (m < OUT)[:, None]
    residual = tl.load(residual_ptr + target, mask=mask, other=0.0, cache_modifier=".cg")
    source = first_row + tl.arange(0, LOAD_N)
    acc = accumulate(
        first, second, w_ptr, weight_rows, x_ptr, source * K, source < rows, 0, 0,
        K, BLOCK_M, BLOCK_N, BLOCK_K, LOAD_N, PRELOAD, False,
    )  # fmt: skip
    dtype = out_ptr.dtype.element_ty
    total = residual.to(tl.float32) + round_to(acc, dtype).to(tl.float32)
    tl.store(out_ptr + target, round_to(total, dtype), mask=mask)


def product_residual(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    out: torch.Tensor,
    *,
    configuration: Configuration | None = None,
    pdl: bool = True,
) -> None:
    """out = residual + x Wᵀ: the product is rounded to the dtype, then the sum.

    x [N, K], weight [M, K], residual and out [N, M], which may be the same tensor; one dtype, all contiguous.
    configuration: in place of the table's entry. pdl: False launches the kernel only when those before it are done.
    """
    rows, features = x.shape
    outputs = weight.shape[0]
    assert weight.shape == (outputs, features)
    assert residual.shape == out.shape == (rows, outputs)
    assert x.dtype == weight.dtype == residual.dtype == out.dtype
    assert all(t.is_contiguous() for t in (x, weight, residual, out))
    configuration = configuration or configuration_for("product_residual", rows, outputs, features)
    grid = triton.cdiv(outputs, configuration.block_m) * triton.cdiv(rows, configuration.block_n)
    options = tile_options(configuration, rows, weight, features, pdl)
    _product_residual[(grid,)](x, weight, residual, out, rows, OUT=outputs, **options)

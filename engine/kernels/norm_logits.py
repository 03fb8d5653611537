# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""The final RMSNorm and the product with the vocabulary."""

import torch
import triton
import triton.language as tl

from engine.kernels.arithmetic import round_to
from engine.kernels.configurations import Configuration, configuration_for
from engine.kernels.norm_rows import norm_rows
from engine.kernels.product import accumulate, begin, norm_options, row_scales, tile_options


@triton.jit(do_not_specialize=["rows", "eps"])
def _norm_logits(
    x_ptr,
    index_ptr,
    norm_ptr,
    w_ptr,
    out_ptr,
    rows,
    eps,
    OUT: tl.constexpr,
    INDEXED: tl.constexpr,
    NORM: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOAD_N: tl.constexpr,
    PRELOAD: tl.constexpr,
    SEGMENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALVINGS: tl.constexpr,
    PDL: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_N)
    first_out = tl.program_id(0) // row_tiles * BLOCK_M
    first_row = tl.program_id(0) % row_tiles * BLOCK_N
    m = first_out + tl.arange(0, BLOCK_M)
    weight_rows = tl.minimum(m, OUT - 1)
    first, second = begin(w_ptr, first_out, weight_rows, OUT, K, BLOCK_M, BLOCK_K, PRELOAD, SEGMENTS, PDL)
    place = first_row + tl.arange(0, LOAD_N)
    source = place
    if INDEXED:
        source = tl.load(index_ptr + place, mask=place < rows, other=0, cache_modifier=".cg").to(tl.int32)
    scale = 0
    if NORM:
        scale = row_scales(x_ptr, source * K, place < rows, eps, LOAD_N, K, COLUMNS, HALVINGS)
    acc = accumulate(
        first, second, w_ptr, weight_rows, x_ptr, source * K, place < rows, scale, norm_ptr,
        K, BLOCK_M, BLOCK_N, BLOCK_K, LOAD_N, PRELOAD, NORM,
    )  # fmt: skip
    n = first_row + tl.arange(0, BLOCK_N)
    mask = (n < rows)[None, :] & (m < OUT)[:, None]
    rounded = round_to(acc, w_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + n.to(tl.int64)[None, :] * OUT + m[:, None], rounded, mask=mask)


def norm_logits(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    row_index: torch.Tensor | None = None,
    normed: torch.Tensor | None = None,
    configuration: Configuration | None = None,
    pdl: bool = True,
) -> None:
    """Logits of the normalised rows, float32 values rounded through the weights' dtype.

    x [N, K], norm float32 [K], weight [V, K], out float32 [S, V]; contiguous.
    row_index: int64 [S], the rows of x whose logits are wanted; None: all, S = N.
    normed: scratch [S, K] for configurations that do not fuse the norm; made there if None.
    configuration: in place of the table's entry. pdl: False launches the kernel only when those before it are done.
    """
    features = x.shape[1]
    rows = x.shape[0] if row_index is None else row_index.shape[0]
    outputs = weight.shape[0]
    assert weight.shape == (outputs, features)
    assert out.shape == (rows, outputs)
    assert out.dtype == torch.float32
    assert norm.dtype == torch.float32
    assert norm.shape == (features,)
    assert x.dtype == weight.dtype
    assert all(t.is_contiguous() for t in (x, norm, weight, out))
    assert row_index is None or row_index.dtype == torch.int64
    configuration = configuration or configuration_for("norm_logits", rows, outputs, features)
    if not configuration.fuse_norm:
        x, row_index = norm_rows(x, norm, eps, normed, row_index=row_index, pdl=pdl), None
    grid = triton.cdiv(outputs, configuration.block_m) * triton.cdiv(rows, configuration.block_n)
    _norm_logits[(grid,)](
        x,
        x if row_index is None else row_index,
        norm,
        weight,
        out,
        rows,
        eps,
        OUT=outputs,
        INDEXED=row_index is not None,
        NORM=configuration.fuse_norm,
        **norm_options(features),
        **tile_options(configuration, rows, weight, features, pdl),
    )

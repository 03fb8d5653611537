# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""RMSNorm of many rows by a kernel of its own, for products that would otherwise repeat it in every CTA."""

import torch
import triton
import triton.language as tl

from engine.kernels.pdl import launch_dependents, supports_pdl, wait_for_producers
from engine.kernels.product import load_rows, norm_options, normalise, row_scales


@triton.jit(do_not_specialize=["eps"])
def _norm_rows(
    x_ptr,
    index_ptr,
    norm_ptr,
    out_ptr,
    eps,
    INDEXED: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALVINGS: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    wait_for_producers(PDL)
    row = tl.program_id(0) + tl.arange(0, 1)
    source = row
    if INDEXED:
        source = tl.load(index_ptr + row, cache_modifier=".cg")
    present = row >= 0
    scale = row_scales(x_ptr, source * K, present, eps, 1, K, COLUMNS, HALVINGS)
    for start in tl.static_range(0, K, BLOCK_K):
        x = load_rows(x_ptr, source * K, present, start, K, BLOCK_K)
        k = start + tl.arange(0, BLOCK_K)
        normed = normalise(x, scale, norm_ptr, start, K, BLOCK_K)
        tl.store(out_ptr + row[:, None] * K + k[None, :], normed, mask=(k < K)[None, :])


def norm_rows(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
    *,
    row_index: torch.Tensor | None = None,
    pdl: bool = True,
) -> torch.Tensor:
    """RMSNorm of x [M, K] with weight `norm` float32 [K], with the bits that the fused kernels compute inside.

    row_index: int64 [N], the rows of x that are wanted; all if None. Returns `out` [N, K], made if None.
    """
    features = x.shape[1]
    rows = x.shape[0] if row_index is None else row_index.shape[0]
    if out is None:
        out = x.new_empty((rows, features))
    assert x.is_contiguous()
    assert out.is_contiguous()
    assert out.shape == (rows, features)
    assert out.dtype == x.dtype
    assert norm.dtype == torch.float32
    assert norm.shape == (features,)
    use_pdl = pdl and supports_pdl(x.device)
    options = norm_options(features)
    _norm_rows[(rows,)](
        x,
        x if row_index is None else row_index,
        norm,
        out,
        eps,
        INDEXED=row_index is not None,
        K=features,
        BLOCK_K=options["COLUMNS"],
        PDL=use_pdl,
        num_warps=2,
        enable_fp_fusion=False,
        **options,
        **({"launch_pdl": True} if use_pdl else {}),
    )
    return out

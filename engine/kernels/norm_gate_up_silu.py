# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""RMSNorm, gate and up projections and SwiGLU: the first half of a feed-forward block."""

import torch
import triton
import triton.language as tl

from engine.kernels.arithmetic import round_to
from engine.kernels.configurations import Configuration, configuration_for
from engine.kernels.norm_rows import norm_rows
from engine.kernels.pair_order import pair_group, pair_order
from engine.kernels.product import accumulate, begin, norm_options, row_scales, split_pairs, tile_options


def gate_up_row_order(ffn_size: int) -> torch.Tensor:
    """Order of the rows of a stacked weight (gate, then up: [2F, K]) that the kernel wants: `weight[order]`."""
    return pair_order(1, 2 * ffn_size)


@triton.jit(do_not_specialize=["rows", "eps"])
def _norm_gate_up_silu(
    x_ptr,
    norm_ptr,
    w_ptr,
    out_ptr,
    rows,
    eps,
    OUT: tl.constexpr,
    GROUP: tl.constexpr,
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
    tile = tl.program_id(0) // row_tiles
    first_row = tl.program_id(0) % row_tiles * BLOCK_N
    weight_rows = tl.minimum(tile * BLOCK_M + tl.arange(0, BLOCK_M), OUT - 1)
    first, second = begin(w_ptr, tile * BLOCK_M, weight_rows, OUT, K, BLOCK_M, BLOCK_K, PRELOAD, SEGMENTS, PDL)
    source = first_row + tl.arange(0, LOAD_N)
    scale = 0
    if NORM:
        scale = row_scales(x_ptr, source * K, source < rows, eps, LOAD_N, K, COLUMNS, HALVINGS)
    acc = accumulate(
        first, second, w_ptr, weight_rows, x_ptr, source * K, source < rows, scale, norm_ptr,
        K, BLOCK_M, BLOCK_N, BLOCK_K, LOAD_N, PRELOAD, NORM,
    )  # fmt: skip
    dtype = out_ptr.dtype.element_ty
    gate, up = split_pairs(round_to(acc, dtype).to(tl.float32), BLOCK_M, BLOCK_N, GROUP)
    activated = tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up
    n = first_row + tl.arange(0, BLOCK_N)
    feature = tile * (BLOCK_M // 2) + tl.arange(0, BLOCK_M // 2)
    mask = (n < rows)[None, :] & (feature < OUT // 2)[:, None]
    tl.store(out_ptr + n[None, :] * (OUT // 2) + feature[:, None], round_to(activated, dtype), mask=mask)


def norm_gate_up_silu(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    normed: torch.Tensor | None = None,
    configuration: Configuration | None = None,
    pdl: bool = True,
) -> None:
    """out = silu(gate) · up of the normalised rows; gate and up are rounded to the dtype before.

    x [N, K], norm float32 [K], weight [2F, K] in the order of `gate_up_row_order`, out [N, F]; contiguous.
    normed: scratch [N, K] for configurations that do not fuse the norm; made there if None.
    configuration: in place of the table's entry. pdl: False launches the kernel only when those before it are done.
    """
    rows, features = x.shape
    outputs = weight.shape[0]
    assert weight.shape == (outputs, features)
    assert out.shape == (rows, outputs // 2)
    assert outputs % 2 == 0
    assert norm.dtype == torch.float32
    assert norm.shape == (features,)
    assert x.dtype == weight.dtype == out.dtype
    assert all(t.is_contiguous() for t in (x, norm, weight, out))
    configuration = configuration or configuration_for("norm_gate_up_silu", rows, outputs, features)
    if not configuration.fuse_norm:
        x = norm_rows(x, norm, eps, normed, pdl=pdl)
    grid = triton.cdiv(outputs, configuration.block_m) * triton.cdiv(rows, configuration.block_n)
    _norm_gate_up_silu[(grid,)](
        x,
        norm,
        weight,
        out,
        rows,
        eps,
        OUT=outputs,
        GROUP=pair_group(outputs // 2),
        NORM=configuration.fuse_norm,
        **norm_options(features),
        **tile_options(configuration, rows, weight, features, pdl),
    )

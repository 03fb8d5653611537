# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""What the product kernels share: how they are launched, how they begin, and the product itself, for few rows or many.

Each program computes a tile of weight rows times a tile of activation rows. The order of summation of a row is the same
in both ways and for any number of rows (see `product_few_rows`).
"""

from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.configurations import MAX_FEW_ROWS, Configuration, FewRows
from engine.kernels.matrix import TILE_ROWS, Matrix, num_slices, slice_features
from engine.kernels.pdl import launch_dependents, supports_pdl, wait_for_producers
from engine.kernels.product_few_rows import load_turn, product_few_rows
from engine.kernels.product_many_rows import product_int8, product_many_rows


def weight_pointer(matrix: Matrix, configuration: Configuration) -> torch.Tensor:
    """The copy of the weight that the configuration reads, int8 values four to an int32."""
    weight = matrix.packed if isinstance(configuration, FewRows) else matrix.rows
    assert weight is not None, "a configuration for few rows wants a packed weight"
    return weight.view(torch.int32) if weight.dtype == torch.int8 and not matrix.rounds_inputs else weight


def num_programs(configuration: Configuration, rows: int, outputs: int, tile_rows: int | None = None) -> int:
    """Programs of a launch; tile_rows: weight rows of a program, where the configuration does not say."""
    if isinstance(configuration, FewRows):
        return triton.cdiv(outputs, tile_rows or TILE_ROWS) * triton.cdiv(rows, _few_block_n(rows))
    return triton.cdiv(outputs, tile_rows or configuration.block_m) * triton.cdiv(rows, configuration.block_n)


def _few_block_n(rows: int) -> int:
    """Rows of a tile: what one tensor-core instruction takes, or two."""
    return 8 if rows <= 8 else MAX_FEW_ROWS


def product_options(
    configuration: Configuration, rows: int, matrix: Matrix, pdl: bool, block_m: int | None = None
) -> dict[str, Any]:
    """Keyword arguments of a launch that follow from the configuration. block_m: in place of what it says."""
    use_pdl = pdl and supports_pdl(matrix.rows.device)
    slices = num_slices(matrix.in_features)
    options: dict[str, Any] = {
        "K": matrix.in_features,
        "SLICE": slice_features(matrix.in_features),
        "SLICES": slices,
        "INT8": matrix.scales is not None,
        "INT8_ROWS": matrix.rounds_inputs,
        "PDL": use_pdl,
        # A fused multiply-add rounds once where the twin rounds twice, and where one is used is up to the compiler.
        "enable_fp_fusion": False,
    }
    if isinstance(configuration, FewRows):
        block_n = _few_block_n(rows)
        options |= {"FEW": True, "BLOCK_M": block_m or TILE_ROWS, "BLOCK_N": block_n, "BLOCK_K": 0}
        options |= {"LOAD_N": 1 if rows == 1 else block_n, "STEPS": configuration.steps}
        options |= {"PRELOAD": configuration.preload, "num_warps": slices, "num_stages": 1}
    else:
        options |= {"FEW": False, "BLOCK_M": block_m or configuration.block_m, "BLOCK_N": configuration.block_n}
        options |= {"BLOCK_K": configuration.block_k, "LOAD_N": configuration.block_n, "STEPS": 0, "PRELOAD": 0}
        options |= {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    if use_pdl:
        options["launch_pdl"] = True
    return options


@triton.jit
def begin(
    w_ptr,
    first_out,
    OUT: tl.constexpr,
    K: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STEPS: tl.constexpr,
    PRELOAD: tl.constexpr,
    FEW: tl.constexpr,
    PDL: tl.constexpr,
):
    """Launch the dependents, ask for the first weights, wait for the kernels ahead; returns what was asked for.

    first_out: the program's first weight row, a multiple of 16 if FEW. What is not asked for is 0 and not used.
    """
    launch_dependents(PDL)
    first = 0
    second = 0
    if FEW:
        last_tile: tl.constexpr = (OUT + 15) // 16 - 1
        first = load_turn(w_ptr, first_out // 16, last_tile, 0, K, SLICE, SLICES, STEPS, BLOCK_M // 16)
        if PRELOAD > 1:
            second = load_turn(w_ptr, first_out // 16, last_tile, 1, K, SLICE, SLICES, STEPS, BLOCK_M // 16)
    wait_for_producers(PDL)
    return first, second


@triton.jit
def accumulate(
    first,
    second,
    w_ptr,
    first_out,
    x_ptr,
    row_offset,
    present,
    OUT: tl.constexpr,
    K: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    PRELOAD: tl.constexpr,
    FEW: tl.constexpr,
):
    """The product of weight rows first_out … with a tile of rows: float32 [BLOCK_M, BLOCK_N].

    first, second: from `begin`. row_offset, present: [BLOCK_N], or [1] for one row that all columns repeat.
    """
    if FEW:
        last_tile: tl.constexpr = (OUT + 15) // 16 - 1
        acc = product_few_rows(
            first, second, w_ptr, first_out // 16, last_tile, x_ptr, row_offset, present,
            K, SLICE, SLICES, STEPS, PRELOAD, BLOCK_M // 16, BLOCK_N,
        )  # fmt: skip
    else:
        weight_rows = tl.minimum(first_out + tl.arange(0, BLOCK_M), OUT - 1)
        if x_ptr.dtype.element_ty == tl.int8:
            acc = product_int8(w_ptr, weight_rows, x_ptr, row_offset, present, K, BLOCK_M, BLOCK_N, BLOCK_K)
        else:
            acc = product_many_rows(w_ptr, weight_rows, x_ptr, row_offset, present, K, SLICE, BLOCK_M, BLOCK_N, BLOCK_K)
    return acc


@triton.jit
def scaled(
    acc, scales_ptr, row_scales_ptr, out, row, present, OUT: tl.constexpr, INT8: tl.constexpr, INT8_ROWS: tl.constexpr
):
    """The product in its own unit: int8 values have a scale for each weight row `out`, and if INT8_ROWS for each
    activation row `row` as well."""
    if INT8:
        acc = acc * tl.load(scales_ptr + out, mask=out < OUT, other=0.0)[:, None]
    if INT8_ROWS:
        acc = acc * tl.load(row_scales_ptr + row, mask=present, other=0.0, cache_modifier=".cg")[None, :]
    return acc


@triton.jit
def split_pairs(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Rows in the order of `pair_order` to their first and second halves, [BLOCK_M / 2, BLOCK_N] each."""
    groups = tl.reshape(tile, [BLOCK_M // (2 * GROUP), 2, GROUP, BLOCK_N])
    first, second = tl.split(tl.permute(groups, [0, 2, 3, 1]))
    return tl.reshape(first, [BLOCK_M // 2, BLOCK_N]), tl.reshape(second, [BLOCK_M // 2, BLOCK_N])

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""From a tile of the query, key and value product to heads: norms, bias, the rotation (RoPE), and where they go."""

import triton
import triton.language as tl

from engine.kernels.arithmetic import round_to, tree_sum
from engine.kernels.product import scaled, split_pairs
from engine.kernels.row_norm import row_scale


@triton.jit
def places(positions_ptr, slots_ptr, n, rows):
    """Position and slot of rows n."""
    position = tl.load(positions_ptr + n, mask=n < rows, other=0, cache_modifier=".cg")
    slot = tl.load(slots_ptr + n, mask=n < rows, other=0, cache_modifier=".cg")
    return position, slot


@triton.jit
def angles(cos_ptr, sin_ptr, position, pair, mask, HALF: tl.constexpr):
    """Cosine and sine of each pair of features [M] at each position [N]: [M, N]."""
    angle = position[None, :] * HALF + pair[:, None]
    return tl.load(cos_ptr + angle, mask=mask, other=1.0), tl.load(sin_ptr + angle, mask=mask, other=0.0)


@triton.jit
def _head_norm(first, second, weight_ptr, other_ptr, use_other, pair, eps, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
               HALF: tl.constexpr, HALVINGS: tl.constexpr):  # fmt: skip
    """RMSNorm over the features of the one head of this tile, in float32 values of the model's dtype."""
    valid = pair < HALF
    squares = tl.where(valid[:, None], tl.fma(second, second, first * first), 0.0)
    scale = tl.rsqrt(tree_sum(tl.trans(squares), BLOCK_N, BLOCK_M // 2, HALVINGS) / (2 * HALF) + eps)
    weight_ptr = tl.where(use_other, other_ptr, weight_ptr)
    first_weight = tl.load(weight_ptr + pair, mask=valid, other=0.0)
    second_weight = tl.load(weight_ptr + HALF + pair, mask=valid, other=0.0)
    return first * scale[None, :] * first_weight[:, None], second * scale[None, :] * second_weight[:, None]


@triton.jit
def head_halves(
    acc,
    parts,
    scales_ptr,
    row_scales_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    first_out,
    source,
    rows,
    pair,
    rotated,
    is_key,
    eps,
    head_eps,
    dtype: tl.constexpr,
    OUT: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    QK_NORM: tl.constexpr,
    HEAD_HALVINGS: tl.constexpr,
    PART_COLUMNS: tl.constexpr,
    PART_HALVINGS: tl.constexpr,
    K: tl.constexpr,
    INT8: tl.constexpr,
    INT8_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOAD_N: tl.constexpr,
):
    """A tile of the product, [BLOCK_M, BLOCK_N], to the first and second halves of heads, before they are rotated."""
    out = first_out + tl.arange(0, BLOCK_M)
    acc = scaled(acc, scales_ptr, row_scales_ptr, out, source, source < rows, OUT, INT8, INT8_ROWS)
    acc = acc * row_scale(parts, eps, K, LOAD_N, PART_COLUMNS, PART_HALVINGS)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + out, mask=out < OUT, other=0.0).to(tl.float32)[:, None]
    one, two = split_pairs(round_to(acc, dtype).to(tl.float32), BLOCK_M, BLOCK_N, GROUP)
    if QK_NORM:
        normed_one, normed_two = _head_norm(
            one, two, q_norm_ptr, k_norm_ptr, is_key, pair, head_eps, BLOCK_M, BLOCK_N, HALF, HEAD_HALVINGS
        )
        one = tl.where(rotated[:, None], round_to(normed_one, dtype).to(tl.float32), one)
        two = tl.where(rotated[:, None], round_to(normed_two, dtype).to(tl.float32), two)
    return one, two


@triton.jit
def rotate_and_store(
    one,
    two,
    cos,
    sin,
    slot,
    head,
    pair,
    rotated,
    n,
    mask,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    H: tl.constexpr,
    KVH: tl.constexpr,
    D: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
):
    """Both halves of heads of rows n, [M, N], to queries and to slots of the cache."""
    dtype = q_ptr.dtype.element_ty
    # Values take no angle: x · 1 - y · 0 would turn an infinite neighbour into NaN.
    turned_one = tl.where(rotated[:, None], one * cos - two * sin, one)
    turned_two = tl.where(rotated[:, None], two * cos + one * sin, two)

    in_q = q_ptr + n.to(tl.int64)[None, :] * (H * D) + (head * D + pair)[:, None]
    in_slot = slot[None, :] * SLOT_STRIDE
    in_k = k_cache_ptr + in_slot + ((head - H) * D + pair)[:, None]
    in_v = v_cache_ptr + in_slot + ((head - H - KVH) * D + pair)[:, None]
    target = tl.where((head < H)[:, None], in_q, tl.where(rotated[:, None], in_k, in_v))
    tl.store(target, round_to(turned_one, dtype), mask=mask)
    tl.store(target + D // 2, round_to(turned_two, dtype), mask=mask)

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""RMSNorm, query, key and value projections, per-head norms, RoPE and the write to the cache, in one kernel."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.arithmetic import halvings, round_to, tree_sum
from engine.kernels.configurations import Configuration, Kernel, configuration_for
from engine.kernels.norm_rows import norm_rows
from engine.kernels.pair_order import pair_group, pair_order
from engine.kernels.product import (
    accumulate,
    begin,
    norm_options,
    row_scales,
    split_pairs,
    tile_options,
)


def qkv_row_order(num_heads: int, num_kv_heads: int, head_dim: int) -> torch.Tensor:
    """Order of the rows of a stacked weight (q, k, v) that the kernel wants: `weight[order]`, `bias[order]`."""
    return pair_order(num_heads + 2 * num_kv_heads, head_dim)


@dataclass(frozen=True)
class QKVWeights:
    """What the kernel reads of a layer: it never changes after loading.

    norm: float32 [K]. weight [(H + 2 KVH) D, K] and bias [(H + 2 KVH) D] in the order of `qkv_row_order`.
    q_norm, k_norm: float32 [D], both or none, in the natural order.
    """

    norm: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    eps: float
    num_heads: int
    num_kv_heads: int
    head_dim: int


@triton.jit
def _angles(cos_ptr, sin_ptr, position, pair, mask, HALF: tl.constexpr):
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


@triton.jit(do_not_specialize=["rows", "eps"])
def _norm_qkv_rope(
    x_ptr,
    norm_ptr,
    w_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    rows,
    eps,
    H: tl.constexpr,
    KVH: tl.constexpr,
    D: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    BIAS: tl.constexpr,
    QK_NORM: tl.constexpr,
    HEAD_HALVINGS: tl.constexpr,
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
    OUT: tl.constexpr = (H + 2 * KVH) * D  # noqa: N806
    HALF: tl.constexpr = D // 2  # noqa: N806
    row_tiles = tl.cdiv(rows, BLOCK_N)
    tile = tl.program_id(0) // row_tiles
    first_row = tl.program_id(0) % row_tiles * BLOCK_N
    # A tile has TILE_ROWS rows of the weight; the rest of BLOCK_M repeats others and is not stored.
    weight_rows = tl.minimum(tile * TILE_ROWS + tl.arange(0, BLOCK_M), OUT - 1)
    bias = 0.0
    if BIAS:
        bias = tl.load(bias_ptr + weight_rows).to(tl.float32)[:, None]
    first, second = begin(w_ptr, tile * TILE_ROWS, weight_rows, OUT, K, BLOCK_M, BLOCK_K, PRELOAD, SEGMENTS, PDL)

    n = first_row + tl.arange(0, BLOCK_N)
    position = tl.load(positions_ptr + n, mask=n < rows, other=0, cache_modifier=".cg")
    slot = tl.load(slots_ptr + n, mask=n < rows, other=0, cache_modifier=".cg")
    place = tl.arange(0, BLOCK_M // 2)
    pair = tile * (TILE_ROWS // 2) + place
    head = pair // HALF
    pair = pair % HALF
    if QK_NORM:  # the tile is one head, and may be wider than it
        head = tile + 0 * place
        pair = place
    rotated = head < H + KVH
    mask = (n < rows)[None, :] & ((place < TILE_ROWS // 2) & (head < H + 2 * KVH))[:, None]
    EARLY: tl.constexpr = BLOCK_N <= 16  # noqa: N806 - hides the latency where it counts; would cost registers elsewhere
    if EARLY:
        cos, sin = _angles(cos_ptr, sin_ptr, position, pair, mask & rotated[:, None], HALF)

    source = first_row + tl.arange(0, LOAD_N)
    scale = 0
    if NORM:
        scale = row_scales(x_ptr, source * K, source < rows, eps, LOAD_N, K, COLUMNS, HALVINGS)
    acc = accumulate(
        first, second, w_ptr, weight_rows, x_ptr, source * K, source < rows, scale, norm_ptr,
        K, BLOCK_M, BLOCK_N, BLOCK_K, LOAD_N, PRELOAD, NORM,
    )  # fmt: skip

    dtype = q_ptr.dtype.element_ty
    if BIAS:
        acc += bias
    one, two = split_pairs(round_to(acc, dtype).to(tl.float32), BLOCK_M, BLOCK_N, GROUP)
    if QK_NORM:
        normed_one, normed_two = _head_norm(
            one, two, q_norm_ptr, k_norm_ptr, tile >= H, pair, eps, BLOCK_M, BLOCK_N, HALF, HEAD_HALVINGS
        )
        one = tl.where(rotated[:, None], round_to(normed_one, dtype).to(tl.float32), one)
        two = tl.where(rotated[:, None], round_to(normed_two, dtype).to(tl.float32), two)
    if not EARLY:
        cos, sin = _angles(cos_ptr, sin_ptr, position, pair, mask & rotated[:, None], HALF)
    # Values take no angle: x · 1 - y · 0 would turn an infinite neighbour into NaN.
    turned_one = tl.where(rotated[:, None], one * cos - two * sin, one)
    turned_two = tl.where(rotated[:, None], two * cos + one * sin, two)

    in_q = q_ptr + n.to(tl.int64)[None, :] * (H * D) + (head * D + pair)[:, None]
    in_slot = slot[None, :] * SLOT_STRIDE
    in_k = k_cache_ptr + in_slot + ((head - H) * D + pair)[:, None]
    in_v = v_cache_ptr + in_slot + ((head - H - KVH) * D + pair)[:, None]
    target = tl.where((head < H)[:, None], in_q, tl.where(rotated[:, None], in_k, in_v))
    tl.store(target, round_to(turned_one, dtype), mask=mask)
    tl.store(target + HALF, round_to(turned_two, dtype), mask=mask)


def norm_qkv_rope(
    x: torch.Tensor,
    weights: QKVWeights,
    rope: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    *,
    normed: torch.Tensor | None = None,
    configuration: Configuration | None = None,
    pdl: bool = True,
) -> None:
    """Fill q and the cache slots of this step.

    x [N, K]; rope: cos and sin, float32 [max_len, D / 2]; positions, slot_mapping int64 [N]; q [N, H, D];
    kv: keys and values [num_blocks, block_size, KVH, D], slots at one stride. A row whose slot lies in block 0 is
    padding and writes there.
    normed: scratch [N, K] for configurations that do not fuse the norm; made there if None.
    configuration: in place of the table's entry; with q_norm a tile is one head, whatever block_m says.
    pdl: False launches the kernel only when those before it are done.
    """
    rows, features = x.shape
    outputs = weights.weight.shape[0]
    kernel: Kernel = "norm_qkv_rope" if weights.q_norm is None else "norm_qkv_head_norm_rope"
    configuration = configuration or configuration_for(kernel, rows, outputs, features)
    _check(x, weights, rope, positions, slot_mapping, q, kv)
    if not configuration.fuse_norm:
        x = norm_rows(x, weights.norm, weights.eps, normed, pdl=pdl)
    options = tile_options(configuration, rows, weights.weight, features, pdl)
    if weights.q_norm is not None:
        options["BLOCK_M"] = max(16, triton.next_power_of_2(weights.head_dim))
        options["SEGMENTS"] = min(options["SEGMENTS"], 1)  # they were counted for block_m
    tile_rows = options["BLOCK_M"] if weights.q_norm is None else weights.head_dim
    grid = triton.cdiv(outputs, tile_rows) * triton.cdiv(rows, configuration.block_n)
    absent = weights.norm  # stands for pointers that the kernel does not read
    _norm_qkv_rope[(grid,)](
        x,
        weights.norm,
        weights.weight,
        absent if weights.bias is None else weights.bias,
        absent if weights.q_norm is None else weights.q_norm,
        absent if weights.k_norm is None else weights.k_norm,
        *rope,
        positions,
        slot_mapping,
        q,
        *kv,
        rows,
        weights.eps,
        H=weights.num_heads,
        KVH=weights.num_kv_heads,
        D=weights.head_dim,
        TILE_ROWS=tile_rows,
        GROUP=pair_group(weights.head_dim // 2),
        SLOT_STRIDE=kv[0].stride(1),
        BIAS=weights.bias is not None,
        QK_NORM=weights.q_norm is not None,
        HEAD_HALVINGS=halvings(options["BLOCK_M"] // 2),
        NORM=configuration.fuse_norm,
        **norm_options(features),
        **options,
    )


def _check(
    x: torch.Tensor,
    weights: QKVWeights,
    rope: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Assert the shapes, dtypes and strides that the kernel takes for granted."""
    rows, features = x.shape
    heads, head_dim = weights.num_heads + 2 * weights.num_kv_heads, weights.head_dim
    assert weights.weight.shape == (heads * head_dim, features)
    assert weights.norm.shape == (features,)
    assert weights.bias is None or weights.bias.shape == (heads * head_dim,)
    assert (weights.q_norm is None) == (weights.k_norm is None)
    for norm in (weights.norm, weights.q_norm, weights.k_norm):
        assert norm is None or (norm.dtype == torch.float32 and norm.is_contiguous())
    assert x.dtype == weights.weight.dtype == q.dtype == kv[0].dtype == kv[1].dtype
    assert q.shape == (rows, weights.num_heads, head_dim)
    assert all(t.is_contiguous() for t in (x, weights.weight, q, positions, slot_mapping, *rope))
    assert all(t.dtype == torch.float32 and t.shape[1] == head_dim // 2 for t in rope)
    assert positions.dtype == slot_mapping.dtype == torch.int64
    assert positions.shape == slot_mapping.shape == (rows,)
    for cache in kv:
        stride = kv[0].stride(1)
        assert cache.shape[2:] == (weights.num_kv_heads, head_dim)
        assert cache.stride() == (cache.shape[1] * stride, stride, head_dim, 1)

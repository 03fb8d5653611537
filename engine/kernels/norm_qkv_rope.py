# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""RMSNorm, query, key and value projections, per-head norms, RoPE and the write to the cache, in one kernel."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.arithmetic import halvings, round_to, tree_sum
from engine.kernels.configurations import Configuration, FewRows, Kernel, configuration_for, fitted
from engine.kernels.matrix import TILE_ROWS, Matrix
from engine.kernels.pair_order import pair_group, pair_order
from engine.kernels.product import accumulate, begin, num_programs, product_options, scaled, split_pairs, weight_pointer
from engine.kernels.row_norm import NormedRows, load_parts, row_scale


def qkv_row_order(num_heads: int, num_kv_heads: int, head_dim: int) -> torch.Tensor:
    """Order of the rows of a stacked weight (q, k, v) that the kernel wants: `weight[order]`, `bias[order]`."""
    return pair_order(num_heads + 2 * num_kv_heads, head_dim)


@dataclass(frozen=True)
class QKVWeights:
    """What the kernel reads of a layer: it never changes after loading.

    weight [(H + 2 KVH) D, K] and bias [(H + 2 KVH) D] in the order of `qkv_row_order`. q_norm, k_norm: float32 [D],
    both or none, in the natural order; eps: theirs.
    """

    weight: Matrix
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


@triton.jit(do_not_specialize=["rows", "eps", "head_eps"])
def _norm_qkv_rope(
    x_ptr,
    squares_ptr,
    w_ptr,
    scales_ptr,
    row_scales_ptr,
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
    head_eps,
    H: tl.constexpr,
    KVH: tl.constexpr,
    D: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    BIAS: tl.constexpr,
    QK_NORM: tl.constexpr,
    HEAD_HALVINGS: tl.constexpr,
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
    OUT: tl.constexpr = (H + 2 * KVH) * D  # noqa: N806
    HALF: tl.constexpr = D // 2  # noqa: N806
    row_tiles = tl.cdiv(rows, BLOCK_N)
    tile = tl.program_id(0) // row_tiles
    first_row = tl.program_id(0) % row_tiles * BLOCK_N
    # A tile has TILE_ROWS rows of the weight; the rest of BLOCK_M repeats others and is not stored.
    first_out = tile * TILE_ROWS
    first, second = begin(w_ptr, first_out, OUT, K, SLICE, SLICES, BLOCK_M, STEPS, PRELOAD, FEW, PDL)

    source = first_row + tl.arange(0, LOAD_N)
    if FEW:  # under way beside the product; for many rows it would cost registers
        parts = load_parts(squares_ptr, source, source < rows, PARTS, PART_COLUMNS, PART_STRIDE)
    n = first_row + tl.arange(0, BLOCK_N)
    position = tl.load(positions_ptr + n, mask=n < rows, other=0, cache_modifier=".cg")
    slot = tl.load(slots_ptr + n, mask=n < rows, other=0, cache_modifier=".cg")
    place = tl.arange(0, BLOCK_M // 2)
    pair = first_out // 2 + place
    head = pair // HALF
    pair = pair % HALF
    if QK_NORM:  # the tile is one head, and may be wider than it
        head = tile + 0 * place
        pair = place
    rotated = head < H + KVH
    mask = (n < rows)[None, :] & ((place < TILE_ROWS // 2) & (head < H + 2 * KVH))[:, None]
    if FEW:
        cos, sin = _angles(cos_ptr, sin_ptr, position, pair, mask & rotated[:, None], HALF)

    acc = accumulate(
        first, second, w_ptr, first_out, x_ptr, source * K, source < rows,
        OUT, K, SLICE, SLICES, BLOCK_M, BLOCK_N, BLOCK_K, STEPS, PRELOAD, FEW,
    )  # fmt: skip
    if not FEW:
        parts = load_parts(squares_ptr, source, source < rows, PARTS, PART_COLUMNS, PART_STRIDE)
    out = first_out + tl.arange(0, BLOCK_M)
    acc = scaled(acc, scales_ptr, row_scales_ptr, out, source, source < rows, OUT, INT8, INT8_ROWS)
    acc = acc * row_scale(parts, eps, K, LOAD_N, PART_COLUMNS, PART_HALVINGS)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + out, mask=out < OUT, other=0.0).to(tl.float32)[:, None]

    dtype = q_ptr.dtype.element_ty
    one, two = split_pairs(round_to(acc, dtype).to(tl.float32), BLOCK_M, BLOCK_N, GROUP)
    if QK_NORM:
        normed_one, normed_two = _head_norm(
            one, two, q_norm_ptr, k_norm_ptr, tile >= H, pair, head_eps, BLOCK_M, BLOCK_N, HALF, HEAD_HALVINGS
        )
        one = tl.where(rotated[:, None], round_to(normed_one, dtype).to(tl.float32), one)
        two = tl.where(rotated[:, None], round_to(normed_two, dtype).to(tl.float32), two)
    if not FEW:
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
    x: NormedRows,
    weights: QKVWeights,
    rope: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    *,
    configuration: Configuration | None = None,
    pdl: bool = True,
) -> None:
    """Fill q and the cache slots of this step.

    x: rows [N, K]; rope: cos and sin, float32 [max_len, D / 2]; positions, slot_mapping int64 [N]; q [N, H, D];
    kv: keys and values [num_blocks, block_size, KVH, D], slots at one stride. A row whose slot lies in block 0 is
    padding and writes there.
    configuration: in place of the table's entry; with q_norm a tile is one head, whatever block_m says.
    pdl: False launches the kernel only when those before it are done.
    """
    rows = x.weighted.shape[0]
    matrix = weights.weight
    head_norm = weights.q_norm is not None
    kernel: Kernel = "norm_qkv_head_norm_rope" if head_norm else "norm_qkv_rope"
    block_m = max(TILE_ROWS, triton.next_power_of_2(weights.head_dim)) if head_norm else None
    if configuration is None:
        configuration = configuration_for(kernel, rows, matrix)
        if head_norm and isinstance(configuration, FewRows) and not _fits_few_rows(weights.head_dim):
            configuration = configuration_for(kernel, TILE_ROWS, matrix)
    configuration = fitted(configuration, rows, matrix, row_bytes=x.weighted.element_size(), block_m=block_m)
    assert not (head_norm and isinstance(configuration, FewRows)) or weights.head_dim % TILE_ROWS == 0
    _check(x, weights, rope, positions, slot_mapping, q, kv)
    options = product_options(configuration, rows, matrix, pdl, block_m)
    tile_rows = weights.head_dim if head_norm else options["BLOCK_M"]
    absent = x.squares  # stands for pointers that the kernel does not read
    _norm_qkv_rope[(num_programs(configuration, rows, matrix.out_features, tile_rows),)](
        x.weighted,
        x.squares,
        weight_pointer(matrix, configuration),
        absent if matrix.scales is None else matrix.scales,
        absent if x.scales is None else x.scales,
        absent if weights.bias is None else weights.bias,
        absent if weights.q_norm is None else weights.q_norm,
        absent if weights.k_norm is None else weights.k_norm,
        *rope,
        positions,
        slot_mapping,
        q,
        *kv,
        rows,
        x.eps,
        weights.eps,
        H=weights.num_heads,
        KVH=weights.num_kv_heads,
        D=weights.head_dim,
        TILE_ROWS=tile_rows,
        GROUP=pair_group(weights.head_dim // 2),
        SLOT_STRIDE=kv[0].stride(1),
        BIAS=weights.bias is not None,
        QK_NORM=head_norm,
        HEAD_HALVINGS=halvings(options["BLOCK_M"] // 2),
        **x.options(),
        **options,
    )


def _fits_few_rows(head_dim: int) -> bool:
    """Whether a head is a number of packed tiles, and few enough of them for the registers of one program."""
    return head_dim % TILE_ROWS == 0 and head_dim <= 64


def _check(
    x: NormedRows,
    weights: QKVWeights,
    rope: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Assert the shapes, dtypes and strides that the kernel takes for granted."""
    rows, features = x.weighted.shape
    heads, head_dim = weights.num_heads + 2 * weights.num_kv_heads, weights.head_dim
    assert weights.weight.rows.shape == (heads * head_dim, features)
    assert weights.bias is None or weights.bias.shape == (heads * head_dim,)
    assert (weights.q_norm is None) == (weights.k_norm is None)
    for norm in (weights.q_norm, weights.k_norm):
        assert norm is None or (norm.dtype == torch.float32 and norm.is_contiguous())
    assert (torch.int8 if weights.weight.rounds_inputs else q.dtype) == x.weighted.dtype
    assert q.dtype == kv[0].dtype == kv[1].dtype
    assert q.shape == (rows, weights.num_heads, head_dim)
    assert all(t.is_contiguous() for t in (x.weighted, weights.weight.rows, q, positions, slot_mapping, *rope))
    assert all(t.dtype == torch.float32 and t.shape[1] == head_dim // 2 for t in rope)
    assert positions.dtype == slot_mapping.dtype == torch.int64
    assert positions.shape == slot_mapping.shape == (rows,)
    for cache in kv:
        stride = kv[0].stride(1)
        assert cache.shape[2:] == (weights.num_kv_heads, head_dim)
        assert cache.stride() == (cache.shape[1] * stride, stride, head_dim, 1)

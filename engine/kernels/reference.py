"""Plain-torch operators of the decoder: the oracle of every kernel, and what runs on the CPU.

All of them are row-invariant: a row's result has the same bits whatever rows stand beside it. Torch keeps that
for elementwise functions and for reductions along the last dimension, with one trap: functions whose vector and
scalar code round differently (`silu` and `sigmoid`; not `exp`), since which element falls into the scalar tail
depends on the shape of the whole tensor. Such functions are spelled with `exp` here.
"""

from dataclasses import dataclass

import torch

from engine.kernels.attention_plan import QUERY_TILE, AttentionPlan, SplitWork
from engine.quantize.int8_weight import Int8Weight, Weight, quantize_rows, round_inputs

KVScales = tuple[torch.Tensor, torch.Tensor]  # of int8 keys and values: float32 [num_blocks, block_size, KVH] each


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) · weight over the last dimension (Zhang & Sennrich 2019); float32 inside, rounded once.

    weight: float32. Spelled out: on the CPU torch's own takes twice as long.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's silu(gate) · up (Shazeer 2020). gate_up [N, 2F] holds gate, then up; returns [N, F], rounded once."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / (1.0 + torch.exp(-gate)) * up).to(gate_up.dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + D/2) of each head. x [N, heads, D]; cos and sin float32 [N, 1, D/2]; x's dtype returned."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_scales: KVScales | None = None,
) -> None:
    """Write k, v [N, KVH, D] into the caches [num_blocks, block_size, KVH, D]; slot = block · block_size + offset.

    With `kv_scales` the caches are int8: each head of a token is rounded to 255 steps with a scale of its own.
    """
    if kv_scales is not None:
        k, k_scales = quantize_rows(k)
        v, v_scales = quantize_rows(v)
        kv_scales[0].flatten(0, 1).index_copy_(0, slot_mapping, k_scales)
        kv_scales[1].flatten(0, 1).index_copy_(0, slot_mapping, v_scales)
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping, k)
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping, v)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    kv_scales: KVScales | None = None,
) -> torch.Tensor:
    """Causal attention of q [N, H, D] over the paged cache [num_blocks, block_size, KVH, D]; returns [N, H, D].

    Keys and values in int8 stand for themselves times `kv_scales`, see `store_kv`.

    One reduction for decode, chunks and prefill: keys are cut into splits aligned to position 0, an online softmax
    (Milakov & Gimelshein 2018) runs over them in ascending order in float32, and every product has the same shape
    (a tile of query rows by a split of keys; only how many such products run side by side varies), so a row does not
    depend on how its chunk was cut. Splits that a row cannot see leave its state unchanged, exactly.
    Rows outside the plan (padding) are zero.
    """
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_cache.shape[2]
    group = num_heads // num_kv_heads
    k_scales, v_scales = (None, None) if kv_scales is None else kv_scales
    out = torch.zeros_like(q)
    for tiles in plan.groups:
        # [T, QUERY_TILE, KVH, group, D] to products of QUERY_TILE * group rows for each key-value head
        rows = q.index_select(0, tiles.rows).view(-1, QUERY_TILE, num_kv_heads, group, head_dim).transpose(1, 2)
        queries = rows.reshape(-1, num_kv_heads, QUERY_TILE * group, head_dim).float() * scale
        state: SoftmaxState | None = None
        for split in tiles.splits:
            scores = _products(queries[split.tiles], _gather(k_cache, k_scales, split).transpose(2, 3))
            if split.hidden is not None:
                scores.masked_fill_(split.hidden, float("-inf"))
            values = _gather(v_cache, v_scales, split)
            if state is None:
                state = SoftmaxState.first(scores, values)
            else:
                state.merge(split.tiles, scores, values)
        assert state is not None
        attended = state.result().view(-1, num_kv_heads, QUERY_TILE, group, head_dim).transpose(1, 2)
        attended = attended.reshape(-1, num_heads, head_dim).index_select(0, tiles.real)
        out.index_copy_(0, tiles.real_rows, attended.to(q.dtype))
    return out


@dataclass(frozen=True)
class SoftmaxState:
    """Running softmax of T tiles, float32: maximum and sum of exponentials [T, KVH, M, 1], values [T, KVH, M, D]."""

    maximum: torch.Tensor
    total: torch.Tensor
    weighted: torch.Tensor

    @classmethod
    def first(cls, scores: torch.Tensor, values: torch.Tensor) -> "SoftmaxState":
        """From a split that all tiles see: scores [T, KVH, M, S], -inf where hidden; values [T or 1, KVH, S, D]."""
        maximum = scores.amax(dim=-1, keepdim=True)
        weights = torch.exp(scores - _finite(maximum))
        return cls(maximum, weights.sum(dim=-1, keepdim=True), _products(weights, values))

    def merge(self, tiles: slice, scores: torch.Tensor, values: torch.Tensor) -> None:
        """Take one more split of some tiles in; shapes as in `first`, for those tiles."""
        maximum = torch.maximum(self.maximum[tiles], scores.amax(dim=-1, keepdim=True))
        shift = _finite(maximum)
        weights = torch.exp(scores - shift)
        decay = torch.exp(self.maximum[tiles] - shift)
        self.total[tiles] = self.total[tiles] * decay + weights.sum(dim=-1, keepdim=True)
        self.weighted[tiles] = self.weighted[tiles] * decay + _products(weights, values)
        self.maximum[tiles] = maximum

    def result(self) -> torch.Tensor:
        """The attention of every row: [T, KVH, M, D]."""
        return self.weighted / self.total


def _finite(maximum: torch.Tensor) -> torch.Tensor:
    """A row that has seen no key yet (sliding window) is at -inf, and -inf - -inf would be NaN."""
    return maximum.clamp(min=torch.finfo(torch.float32).min)


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [A, KVH, M, X] times b [A or 1, KVH, X, Y]: one product of the same shape for every tile and head."""
    count, heads = a.shape[:2]
    if b.shape[0] == count:
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, (count, heads))
    # Tiles of one request share their keys; head by head, the shared operand needs no copy.
    return torch.stack([torch.bmm(a[:, h], b[:, h].expand(count, -1, -1)) for h in range(heads)], dim=1)


def _gather(cache: torch.Tensor, scales: torch.Tensor | None, split: SplitWork) -> torch.Tensor:
    """Keys or values of a split as float32 [A or 1, KVH, KV_SPLIT_TOKENS, D]."""
    slots = split.slots.flatten()
    rows = cache.flatten(0, 1).index_select(0, slots).unflatten(0, split.slots.shape)
    shape = (rows.shape[0], rows.shape[2], rows.shape[1], rows.shape[3])
    gathered = rows.new_empty(shape, dtype=torch.float32).copy_(rows.transpose(1, 2))
    if scales is not None:
        by_token = scales.flatten(0, 1).index_select(0, slots).unflatten(0, split.slots.shape)
        gathered *= by_token.transpose(1, 2)[..., None]
    return gathered


def product(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [N, K] times a matrix [M, K], plus bias [M]; returns [N, M].

    An int8 matrix is multiplied as it is stored: float32 sums of products that are exact, or integer sums where x is
    rounded too (w8a8), are scaled (by channel, then by row) and rounded once, to x's dtype.
    """
    if not isinstance(weight, Int8Weight):
        return torch.nn.functional.linear(x, weight, bias)
    if weight.rounds_inputs:
        values, row_scales = round_inputs(x)
        sums = (values.double() @ weight.values.double().T).float()  # float64 holds every such integer
        wide = sums * weight.scales * row_scales[:, None]
    else:
        wide = torch.nn.functional.linear(x.float(), weight.values.float()) * weight.scales
    if bias is not None:
        wide = wide + bias.float()
    return wide.to(x.dtype)


@dataclass(frozen=True)
class QKVProjection:
    """Weights of an attention's entry in their natural order: q, k, v stacked, [(H + 2 KVH) D, K]; norms float32."""

    norm: torch.Tensor
    weight: Weight
    bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    eps: float
    num_heads: int
    num_kv_heads: int
    head_dim: int


def norm_qkv_rope(
    x: torch.Tensor,
    weights: QKVProjection,
    rope: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    kv_scales: KVScales | None = None,
) -> torch.Tensor:
    """Queries [N, H, D] of x [N, K]; keys and values go to the cache. rope: cos and sin, float32 [max_len, D / 2]."""
    heads, kv_heads = weights.num_heads, weights.num_kv_heads
    projected = product(rms_norm(x, weights.norm, weights.eps), weights.weight, weights.bias)
    q, k, v = projected.view(x.shape[0], -1, weights.head_dim).split((heads, kv_heads, kv_heads), dim=1)
    if weights.q_norm is not None and weights.k_norm is not None:
        q, k = rms_norm(q, weights.q_norm, weights.eps), rms_norm(k, weights.k_norm, weights.eps)
    cos, sin = (table[positions][:, None] for table in rope)
    store_kv(apply_rope(k, cos, sin), v, *kv, slot_mapping, kv_scales)
    return apply_rope(q, cos, sin)


def product_residual(x: torch.Tensor, weight: Weight, residual: torch.Tensor) -> torch.Tensor:
    """residual + x Wᵀ: x [N, K], weight [M, K], residual [N, M]; the product is rounded before it is added."""
    return residual + product(x, weight)


def norm_gate_up_silu(x: torch.Tensor, norm: torch.Tensor, eps: float, weight: Weight) -> torch.Tensor:
    """SwiGLU of the normalised rows x [N, K]: weight [2F, K] holds gate, then up; returns [N, F]."""
    return silu_mul(product(rms_norm(x, norm, eps), weight))


def norm_logits(x: torch.Tensor, norm: torch.Tensor, eps: float, weight: Weight) -> torch.Tensor:
    """Logits of x [N, K], float32 [N, V], rounded through x's dtype."""
    return product(rms_norm(x, norm, eps), weight).float()

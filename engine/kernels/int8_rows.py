# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Rows rounded to int8 with a scale each: the activations of w8a8, and what an int8 KV cache stores.

scale = max|x| / 127, 1 for (nearly) zero rows, and half to even. Activations are first rotated (QuaRot, Ashkboos et al.
2024): a Hadamard transform of each block of channels, which the weights have gone through as well, spreads outliers
that one scale could not serve. A row depends on nothing but itself.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from engine.kernels.arithmetic import halvings
from engine.kernels.pdl import launch_dependents, supports_pdl, wait_for_producers
from engine.kernels.row_norm import NormedRows

LIMIT = tl.constexpr(127.0)
SMALLEST_SCALE = tl.constexpr(torch.finfo(torch.float32).smallest_normal)
ROUNDER = tl.constexpr(1.5 * 2.0**23)  # adding and subtracting it leaves the nearest integer, half to even


@dataclass(frozen=True)
class Int8Rows:
    """x ≈ values · scales: int8 [N, K] and float32 [N]."""

    values: torch.Tensor
    scales: torch.Tensor

    def first(self, rows: int, features: int) -> "Int8Rows":
        """Room for [rows, features] in the memory of these."""
        return Int8Rows(self.values.view(-1)[: rows * features].view(rows, features), self.scales[:rows])


@triton.jit
def _scale_of(largest, is_poisoned):
    """Of values up to `largest`; NaN where one of them was, which a maximum may pass over."""
    scale = tl.div_rn(largest, LIMIT)
    scale = tl.where(scale < SMALLEST_SCALE, 1.0, scale)
    return tl.where(is_poisoned != 0, float("nan"), scale)


@triton.jit
def _divided(x, scale):
    return ((tl.div_rn(x, scale) + ROUNDER) - ROUNDER).to(tl.int8)


@triton.jit
def _rounded(x, axis: tl.constexpr):
    """int8 values of x along `axis`, and their scales with that axis kept."""
    largest = tl.max(tl.abs(x), axis=axis, keep_dims=True)
    scale = _scale_of(largest, tl.max((x != x).to(tl.int32), axis=axis, keep_dims=True))
    return _divided(x, scale), scale


@triton.jit
def _rotated(x, COLUMNS: tl.constexpr, ROTATIONS: tl.constexpr):
    """Walsh-Hadamard transform, without its factor, of each block of 2^ROTATIONS: sums and differences of two."""
    for step in tl.static_range(ROTATIONS):
        halves = tl.reshape(x, [COLUMNS >> (step + 1), 2, 1 << step])
        first, second = tl.split(tl.permute(halves, [0, 2, 1]))
        x = tl.reshape(tl.permute(tl.join(first + second, first - second), [0, 2, 1]), [COLUMNS])
    return x


@triton.jit
def _round_rows(
    x_ptr,
    values_ptr,
    scales_ptr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROTATIONS: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    wait_for_producers(PDL)
    row = tl.program_id(0)
    k = tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0, cache_modifier=".cg").to(tl.float32)
    x = _rotated(x, COLUMNS, ROTATIONS)
    # Of one dimension: with a reshape to [1, COLUMNS] here, Triton 3.6 takes 90 s to compile 4,096 columns.
    scale = _scale_of(tl.max(tl.abs(x), axis=0), tl.max((x != x).to(tl.int32), axis=0))
    tl.store(values_ptr + row * K + k, _divided(x, scale), mask=k < K)
    tl.store(scales_ptr + row, scale)


def round_rows(x: torch.Tensor, block: int, out: Int8Rows, *, pdl: bool = True) -> Int8Rows:
    """Rotate x [N, K] in blocks of `block` channels and round it; returns `out`, whose values have that shape.

    block: a power of two that divides K. pdl: False starts it only when the kernels before it are done.
    """
    rows, features = x.shape
    assert x.is_contiguous()
    assert features % block == 0
    assert out.values.shape == x.shape
    assert out.scales.shape == (rows,)
    use_pdl = pdl and supports_pdl(x.device)
    _round_rows[(rows,)](
        x,
        out.values,
        out.scales,
        K=features,
        COLUMNS=triton.next_power_of_2(features),
        ROTATIONS=halvings(block),
        PDL=use_pdl,
        num_warps=8,
        enable_fp_fusion=False,
        **({"launch_pdl": True} if use_pdl else {}),
    )
    return out


def round_normed(x: NormedRows, block: int, out: Int8Rows) -> NormedRows:
    """The same for rows on their way into a norm: what they are still to be multiplied with is kept beside them."""
    rounded = round_rows(x.weighted, block, out)
    return replace(x, weighted=rounded.values, scales=rounded.scales)


@triton.jit
def _store_heads(
    x_ptr, cache_ptr, scales_ptr, row, slot, HEADS: tl.constexpr, HEAD_COLUMNS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, HEAD_COLUMNS)
    d = tl.arange(0, BLOCK_D)
    mask = (head < HEADS)[:, None] & (d < D)[None, :]
    place = head[:, None] * D + d[None, :]
    x = tl.load(x_ptr + row * (HEADS * D) + place, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    values, scale = _rounded(x, 1)
    tl.store(cache_ptr + slot * (HEADS * D) + place, values, mask=mask)
    tl.store(scales_ptr + slot * HEADS + head, tl.reshape(scale, [HEAD_COLUMNS]), mask=head < HEADS)


@triton.jit
def _store_kv_int8(
    keys_ptr, values_ptr, key_cache_ptr, value_cache_ptr, key_scales_ptr, value_scales_ptr, slots_ptr,
    HEADS: tl.constexpr, HEAD_COLUMNS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait_for_producers(PDL)
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row, cache_modifier=".cg")
    _store_heads(keys_ptr, key_cache_ptr, key_scales_ptr, row, slot, HEADS, HEAD_COLUMNS, D, BLOCK_D)
    _store_heads(values_ptr, value_cache_ptr, value_scales_ptr, row, slot, HEADS, HEAD_COLUMNS, D, BLOCK_D)


def store_kv_int8(
    kv: tuple[torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor, torch.Tensor],
    slot_mapping: torch.Tensor,
    *,
    pdl: bool = True,
) -> None:
    """Round keys and values [N, KVH, D] into an int8 cache [num_blocks, block_size, KVH, D] with float32 scales
    [num_blocks, block_size, KVH]; slot = block · block_size + offset. pdl: False waits for the kernels ahead to end."""
    rows, heads, head_dim = kv[0].shape
    assert all(t.is_contiguous() for t in (*kv, *cache, *scales, slot_mapping))
    assert slot_mapping.shape == (rows,)
    use_pdl = pdl and supports_pdl(kv[0].device)
    _store_kv_int8[(rows,)](
        *kv,
        *cache,
        *scales,
        slot_mapping,
        HEADS=heads,
        HEAD_COLUMNS=triton.next_power_of_2(heads),
        D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        PDL=use_pdl,
        num_warps=4,
        enable_fp_fusion=False,
        **({"launch_pdl": True} if use_pdl else {}),
    )

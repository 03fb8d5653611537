# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Keys and values of the paged cache, as the attention kernel reads them."""

from typing import NamedTuple

import triton
import triton.language as tl

from engine.kernels.pdl import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


class PagedKV(NamedTuple):
    """Pointers to keys, values and their scales, and what keys and values have in common: strides in elements.

    Without scales (a cache of the model's dtype) those two point anywhere.
    """

    key_data: tl.tensor
    value_data: tl.tensor
    key_scales: tl.tensor
    value_scales: tl.tensor
    block_stride: tl.tensor
    slot_stride: tl.tensor
    head_stride: tl.tensor
    scale_block_stride: tl.tensor
    scale_slot_stride: tl.tensor
    scale_head_stride: tl.tensor


@triton.jit
def block_ids(block_table, token, mask, BLOCK_SIZE: tl.constexpr):
    """The blocks that hold some positions; the null block where `mask` is false."""
    return tl.load(block_table + token // BLOCK_SIZE, mask=mask, other=0, cache_modifier=".cg")


@triton.jit
def load_heads(kv, data, token, block, kv_head, mask, other, AXIS: tl.constexpr, SHAPE: tl.constexpr):
    """Keys or values of one head: the shape of `token` with block_dim put in as AXIS; `other` where `mask` is false.

    Keys come with their features ahead of their positions, as the product wants them: a transposition behind the load
    is compiled to many more exchanges between threads.
    """
    dims = tl.arange(0, SHAPE.block_dim)
    if len(token.shape) != AXIS:
        dims = dims[:, None]
    offset = block.to(tl.int64) * kv.block_stride + token % SHAPE.block_size * kv.slot_stride + kv_head * kv.head_stride
    mask = tl.expand_dims(mask, AXIS)
    if SHAPE.head_dim != SHAPE.block_dim:
        mask = mask & (dims < SHAPE.head_dim)
    return tl.load(data + (tl.expand_dims(offset, AXIS) + dims), mask=mask, other=other, cache_modifier=".cg")


@triton.jit
def load_scales(kv, scales, token, block, kv_head, mask, other, SHAPE: tl.constexpr):
    """Scales of the keys or values of one head: float32 `token.shape`, `other` where `mask` is false."""
    offset = block.to(tl.int64) * kv.scale_block_stride + token % SHAPE.block_size * kv.scale_slot_stride
    return tl.load(scales + offset + kv_head * kv.scale_head_stride, mask=mask, other=other, cache_modifier=".cg")


@triton.jit
def _int8_to_bfloat16(stored):
    """Exactly, four at a time: a conversion instruction takes one byte and has a quarter of the throughput. Not "pure",
    or the compiler moves it behind the exchange between threads, which then goes byte by byte.

    The bytes become the low bits of floats whose last place is worth 1. Of those bfloat16 has 7, one too few:
    128 + low bits - (128 or 256, as the sign bit says).
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, sign, a, b, c, d;
        and.b32 low, $2, 0x7f7f7f7f;
        and.b32 sign, $2, 0x80808080;
        prmt.b32 a, low, 0x43434343, 0x4140;
        prmt.b32 b, low, 0x43434343, 0x4342;
        prmt.b32 c, sign, 0xc3c3c3c3, 0x4140;
        prmt.b32 d, sign, 0xc3c3c3c3, 0x4342;
        mov.b32 sign, 0x3f803f80;
        fma.rn.bf16x2 $0, a, sign, c;
        fma.rn.bf16x2 $1, b, sign, d;
        }""",
        "=r,=r,r",
        [stored],
        dtype=tl.bfloat16,
        is_pure=False,
        pack=4,
    )


@triton.jit
def _int8_to_float16(stored):
    """Likewise: 1024 + (128 + x), then off with 1152."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 shifted, a, b;
        xor.b32 shifted, $2, 0x80808080;
        prmt.b32 a, shifted, 0x64646464, 0x4140;
        prmt.b32 b, shifted, 0x64646464, 0x4342;
        mov.b32 shifted, 0x64806480;
        sub.rn.f16x2 $0, a, shifted;
        sub.rn.f16x2 $1, b, shifted;
        }""",
        "=r,=r,r",
        [stored],
        dtype=tl.float16,
        is_pure=False,
        pack=4,
    )


@triton.jit
def widen(stored, dtype: tl.constexpr):
    """int8 as `dtype` (float16 or bfloat16), exactly; anything else as it is."""
    if stored.dtype == tl.int8:
        if _INTERPRETED:
            stored = stored.to(tl.float32).to(dtype)
        elif dtype == tl.bfloat16:
            stored = _int8_to_bfloat16(stored)
        else:
            stored = _int8_to_float16(stored)
    return stored

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Int8 values in registers to the dtype of the activations, exactly.

Four int8 travel in one int32. Triton's own conversion takes four instructions a value; the tricks here two: the bits of
a value become the low bits of the mantissa of a constant, which is then taken off again.
"""

import triton
import triton.language as tl

from engine.kernels.pdl import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)

# bfloat16 has room for 7 bits: 0x4300 is 128, so 0x4300 | (q & 127) is 128 + (q mod 128); the sign bit falls on the
# lowest bit of the exponent of what is then added, which makes that -128 or -256.
_TO_BFLOAT16 = tl.constexpr("""
{
.reg .b32 t, u, a, b, one;
mov.b32 one, 0x3F803F80;
prmt.b32 t, $4, 0, 0x4140;
prmt.b32 u, $4, 0, 0x4342;
lop3.b32 a, t, 0x007f007f, 0x43004300, 0xEA;
lop3.b32 b, t, 0x00800080, 0xC300C300, 0xEA;
fma.rn.bf16x2 t, a, one, b;
lop3.b32 a, u, 0x007f007f, 0x43004300, 0xEA;
lop3.b32 b, u, 0x00800080, 0xC300C300, 0xEA;
fma.rn.bf16x2 u, a, one, b;
mov.b32 {$0, $1}, t;
mov.b32 {$2, $3}, u;
}
""")
# float16 has room for 10: 0x6400 is 1024, and with the sign bit flipped the bits are 1024 + (q + 128).
_TO_FLOAT16 = tl.constexpr("""
{
.reg .b32 t, u, b;
prmt.b32 t, $4, 0, 0x4140;
prmt.b32 u, $4, 0, 0x4342;
xor.b32 t, t, 0x64806480;
xor.b32 u, u, 0x64806480;
mov.b32 b, 0x64806480;
sub.rn.f16x2 t, t, b;
sub.rn.f16x2 u, u, b;
mov.b32 {$0, $1}, t;
mov.b32 {$2, $3}, u;
}
""")


@triton.jit
def four_values(words, dtype: tl.constexpr):
    """The four values of each word of an int32 tensor, lowest byte first, as `dtype`: four tensors of its shape."""
    if dtype == tl.bfloat16 and not _INTERPRETED:
        a, b, c, d = tl.inline_asm_elementwise(
            _TO_BFLOAT16,
            "=h,=h,=h,=h,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=1,
        )
    elif dtype == tl.float16 and not _INTERPRETED:
        a, b, c, d = tl.inline_asm_elementwise(
            _TO_FLOAT16,
            "=h,=h,=h,=h,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    else:
        a = ((words << 24) >> 24).to(tl.float32).to(dtype)
        b = ((words << 16) >> 24).to(tl.float32).to(dtype)
        c = ((words << 8) >> 24).to(tl.float32).to(dtype)
        d = (words >> 24).to(tl.float32).to(dtype)
    return a, b, c, d


@triton.jit
def as_loaded(values):
    """The same values of 2 bytes, with their origin hidden from the compiler.

    Triton gives the operand of a product another order along K when it finds that the values were joined; the order is
    part of the result's bits. It does not look behind assembly that claims to have side effects; this one has no cost.
    """
    if values.dtype.primitive_bitwidth == 16 and not _INTERPRETED:
        values = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [values], dtype=values.dtype, is_pure=False, pack=2
        )
    return values


@triton.jit
def unpack_int8(words, A: tl.constexpr, B: tl.constexpr, dtype: tl.constexpr):
    """int32 [A, B], four int8 each, lowest byte first, to `dtype` [A, 4 B]."""
    a, b, c, d = four_values(words, dtype)
    pairs = tl.join(tl.join(a, b), tl.join(c, d))  # [A, B, low or high of a pair, pair]
    return as_loaded(tl.reshape(tl.permute(pairs, [0, 1, 3, 2]), [A, 4 * B]))

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Int8 values in registers: all 256 of them, in every place of a word, to every dtype."""

import pytest
import torch
import triton
import triton.language as tl

from engine.kernels.int8_values import four_values, unpack_int8
from tests.kernels.products import DEVICES

WORDS = 64  # 256 values


@triton.jit
def _unpack(words_ptr, out_ptr, A: tl.constexpr, B: tl.constexpr):
    words = tl.load(words_ptr + tl.arange(0, A)[:, None] * B + tl.arange(0, B)[None, :])
    tile = unpack_int8(words, A, B, out_ptr.dtype.element_ty)
    tl.store(out_ptr + tl.arange(0, A)[:, None] * (4 * B) + tl.arange(0, 4 * B)[None, :], tile)


@triton.jit
def _four(words_ptr, out_ptr, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    a, b, c, d = four_values(tl.load(words_ptr + place), out_ptr.dtype.element_ty)
    tl.store(out_ptr + place * 4, a)
    tl.store(out_ptr + place * 4 + 1, b)
    tl.store(out_ptr + place * 4 + 2, c)
    tl.store(out_ptr + place * 4 + 3, d)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("turn", range(4))
def test_every_value_in_every_place(device: str, dtype: torch.dtype, turn: int) -> None:
    values = torch.arange(-128, 128).roll(turn).to(torch.int8).to(device)
    words = values.view(torch.int32)
    out = torch.full((256,), float("nan"), dtype=dtype, device=device)
    _four[(1,)](words, out, COUNT=WORDS, num_warps=2)
    assert torch.equal(out, values.to(dtype))
    for rows in (4, 16):
        tile = torch.full((rows, 256 // rows), float("nan"), dtype=dtype, device=device)
        _unpack[(1,)](words, tile, A=rows, B=WORDS // rows, num_warps=1)
        assert torch.equal(tile.flatten(), values.to(dtype))

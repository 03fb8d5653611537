"""The packed copy of a weight: each value where the tensor cores' registers want it."""

import pytest
import torch

from engine.kernels.matrix import Matrix, num_slices, pack, slice_features

SHAPES = [(16, 256), (33, 48), (20, 320), (1, 1), (48, 576), (17, 1100), (3, 4100)]


def place(row: int, feature: int, in_features: int, value_bytes: int) -> int:
    """Where a value lies in the packed copy, from PTX's description of mma.m16n8k16's operand A.

    A lane (g, c) = 4 g + c holds the registers a0 … a7: rows g and g + 8, features 2c, 2c + 1 and 2c + 8, 2c + 9.
    """
    slices, width = num_slices(in_features), slice_features(in_features)
    tile, slice_index = row // 16, feature // width
    step, inside = feature % width // 16, feature % 16
    lane = row % 8 * 4 + inside % 8 // 2
    register = inside % 2 + 2 * (row % 16 // 8) + 4 * (inside // 8)
    steps_together = 2 // value_bytes
    turn, member = divmod(step, steps_together)
    piece = (turn * slices + slice_index) * 32 + lane  # 16 bytes of one lane
    return (tile * slices * width * 16) + piece * 8 * steps_together + member * 8 + register


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_in_register_order(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows = torch.randint(1, 100, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed = pack(rows)
    places = torch.tensor([[place(m, k, shape[1], dtype.itemsize) for k in range(shape[1])] for m in range(shape[0])])
    assert torch.equal(packed[places], rows)
    assert places.unique().numel() == rows.numel()
    assert packed.count_nonzero() == rows.numel()  # zeros wherever the rows have nothing
    assert packed.numel() == -(-shape[0] // 16) * 16 * num_slices(shape[1]) * slice_features(shape[1])


def test_wide_values_cannot_be_packed() -> None:
    with pytest.raises(AssertionError, match="1 or 2 bytes"):
        pack(torch.zeros(16, 64))


def test_slices_are_whole_units() -> None:
    """They are part of what the bits of a product depend on."""
    slices = {64: (4, 64), 96: (4, 64), 256: (4, 64), 257: (4, 128), 576: (4, 192), 2048: (4, 512), 4095: (4, 1024)}
    slices |= {4096: (8, 512), 4100: (8, 640), 5632: (8, 768), 14336: (8, 1792)}
    assert {count: (num_slices(count), slice_features(count)) for count in slices} == slices


def test_bytes_count_both_copies() -> None:
    rows = torch.zeros(20, 64, dtype=torch.int8)
    assert Matrix(rows).num_bytes == 20 * 64
    assert Matrix(rows, pack(rows), torch.zeros(20)).num_bytes == 20 * 64 + 32 * 256 + 20 * 4
    assert (Matrix(rows).out_features, Matrix(rows).in_features) == (20, 64)

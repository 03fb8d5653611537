"""A weight as the product kernels read it: its rows, and a copy in the order of the tensor cores' registers."""

from dataclasses import dataclass

import torch

LONG_FEATURES = 4096  # from here on K has more slices
TILE_ROWS = 16  # weight rows of one tensor-core instruction; its 16 features are a step


def num_slices(in_features: int) -> int:
    """Slices of K, each summed on its own: part of what the bits of a product depend on."""
    return 8 if in_features >= LONG_FEATURES else 4


def slice_features(in_features: int) -> int:
    """Features of a slice; the last slices may be shorter, or empty."""
    slices = num_slices(in_features)
    unit = 16 * slices  # long K can afford to fill the longer steps of many rows
    return -(-in_features // (slices * unit)) * unit


@dataclass(frozen=True)
class Matrix:
    """A weight [out_features, in_features], in the model's dtype or as int8 with a scale for each row.

    rounds_inputs: the rows that it is multiplied with are int8 too (w8a8): integers are then summed, exactly.

    rows: the weight as it is. packed: the same values for steps of few rows, None to do without: such steps are then
    slower and have the same bits. scales: float32 [out_features], None unless int8.

    Two copies buy speed with memory: few rows want each lane's operands in one piece, straight into registers; many
    rows share a tile through shared memory, which wants whole rows. One row at a time, TinyLlama's layers on an H100:
    716 µs from the packed copy, 854 µs from the rows.
    """

    rows: torch.Tensor
    packed: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    rounds_inputs: bool = False

    @property
    def out_features(self) -> int:
        return self.rows.shape[0]

    @property
    def in_features(self) -> int:
        return self.rows.shape[1]

    @property
    def num_bytes(self) -> int:
        """On the device, both copies."""
        parts = (self.rows, self.packed, self.scales)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def pack(rows: torch.Tensor) -> torch.Tensor:
    """Rows [M, K] of a 2-byte or 1-byte dtype in the order of the tensor cores' registers, zeros where they end.

    In PTX's terms (mma.m16n8k16, the fragments of operand A), a lane of a warp is (g, c), 8 by 4; its 8 values of a
    step are rows g and g + 8, features 2c, 2c + 1, 2c + 8 and 2c + 9. From the outside in: tile of 16 rows; step of a
    slice (two at a time for 1-byte values); slice; lane; and 16 bytes of the lane. A warp reads 512 bytes in one
    piece, and the warps of a program, one for each slice, read so much side by side.
    """
    out_features, in_features = rows.shape
    slices, width = num_slices(in_features), slice_features(in_features)
    tiles = -(-out_features // TILE_ROWS)
    padded = rows.new_zeros((tiles * TILE_ROWS, slices * width))
    padded[:out_features, :in_features] = rows
    steps = 3 - rows.element_size()  # that fill a lane's 16 bytes
    assert steps in (1, 2), "packed values have 1 or 2 bytes"
    #                    tile   half g slice  turns            step  half c pair
    parts = padded.view(tiles, 2, 8, slices, width // (16 * steps), steps, 2, 4, 2)
    return parts.permute(0, 4, 3, 2, 7, 5, 6, 1, 8).contiguous().view(-1)

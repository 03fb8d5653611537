"""The order of weight rows in which a tile holds both halves of every pair.

RoPE turns features i and i + D/2 of a head, SwiGLU multiplies gate i with up i = row i + F of the stacked weight.
Rows are reordered once, at load: groups of `pair_group` first rows alternate with their second rows, so that every
aligned tile of at least twice that many rows has whole pairs, whatever its size. Groups of 8 because a tensor-core
fragment holds rows r and r + 8 in one thread: the halves then meet in registers.
"""

import torch


def pair_group(half: int) -> int:
    """Rows of one group: the largest of 8, 4, 2, 1 that divides `half`."""
    return next(group for group in (8, 4, 2, 1) if half % group == 0)


def pair_order(units: int, width: int) -> torch.Tensor:
    """Row order for `units` times `width` rows, of which i and i + width/2 are pairs: `ordered = weight[order]`."""
    assert width % 2 == 0, "a unit consists of two halves"
    half = width // 2
    first = torch.arange(half).view(-1, pair_group(half))
    unit = torch.stack((first, first + half), dim=1).flatten()
    return (torch.arange(units)[:, None] * width + unit).flatten()

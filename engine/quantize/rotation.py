"""Rotations that spread a row's outliers, so that rounding it to int8 with one scale costs little.

Of a transformer's activations some channels are a hundred times larger than most (Dettmers et al. 2022), and where one
scale has to reach those, the others keep a bit or two. A Hadamard transform of both operands leaves their product as
it is and makes the channels alike (QuaRot, Ashkboos et al. 2024); blocks of 64 channels do. Perplexity of SmolLM2-135M
against bfloat16: +3.5 % with one scale a row as it is, +1.3 % with a scale for each 128 channels, +0.6 % for each 64,
+0.2 % rotated, which is what int8 weights cost alone.
"""

from functools import lru_cache

import torch

MAX_BLOCK = 64


def rotation_block(features: int) -> int:
    """Channels that are mixed with each other: the largest power of two that divides `features`, 64 at most."""
    return min(MAX_BLOCK, features & -features)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Walsh-Hadamard transform, without its factor, of each block of the last dimension: float32, as x is shaped.

    Applied twice, it multiplies by the size of a block. Sums and differences in an order of its own, so that every
    device has the same bits.
    """
    block = rotation_block(x.shape[-1])
    y = x.float().reshape(-1, block).t()  # channels first: each step then adds long vectors
    half = 1
    while half < block:
        first, second = y.reshape(-1, 2, half, y.shape[1]).unbind(1)
        y = torch.stack((first + second, first - second), dim=1).view(y.shape)
        half *= 2
    return y.t().reshape(x.shape)


@lru_cache
def hadamard_matrix(block: int, device: torch.device) -> torch.Tensor:
    """The same as a matrix, symmetric: float32 [block, block] of 1 and -1."""
    return rotate(torch.eye(block, device=device))

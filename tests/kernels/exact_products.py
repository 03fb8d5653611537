"""Products that are exact in float32 in any order: every bit of a kernel's output can then be asserted.

A value that is read too early, used twice or left out shows at once, where a tolerance would hide it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from engine.kernels.configurations import Configuration
from engine.kernels.pdl import INTERPRETED
from tests.kernels.products import FEW, MANY, Draw, Weight

EXACT_ROWS = (1, 3, 16, 17) if INTERPRETED else (1, 8, 16, 64, 256)
REPEATS = 1 if INTERPRETED else 5  # launches of each configuration: what goes wrong by chance needs several


@dataclass(frozen=True)
class ExactProduct:
    """x [N, K] and a weight of integers. product: x Wᵀ times the weight's scales, float32 [N, M], rounded once."""

    x: torch.Tensor
    weight: Weight
    product: torch.Tensor


def exact_products(draw: Draw, rows: int, outputs: int, features: int, int8: bool) -> Iterator[ExactProduct]:
    """Two products: one whose sums are large and show where they are rounded, one whose sums are small and show all."""
    for cancel in (False, True):
        limit = 126 if int8 else 8
        x = draw.integers(-4, 4, rows, features)
        weight = draw.integers(-limit, limit, outputs, features)
        if cancel:
            _cancel(draw, x, weight)
        sums = (x.double() @ weight.double().T).float()
        assert sums.abs().max() < 2**24
        if not int8:
            yield ExactProduct(x.to(draw.dtype), Weight(weight.to(draw.dtype)), sums)
        else:
            scales = draw.norm(outputs) * (1.0 if cancel else 2.0**-4)  # so that float16 can hold the results
            yield ExactProduct(
                x.to(draw.dtype), Weight(weight.to(torch.int8), scales, draw.dtype != torch.float32), sums * scales
            )


def _cancel(draw: Draw, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Change a draw in place so that its sums are about 96, most of them within 60 of that.

    Features go in pairs, in random places, with the same x and opposite weights, a few of which are one off. In
    bfloat16 the sums are exact; one lost or doubled product changes its sum visibly.
    """
    features = x.shape[1]
    order = draw.order(features)
    offset, rest = order[:3], order[3:]
    x[:, offset], weight[:, offset] = 4, 8
    half = len(rest) // 2
    one, other = rest[:half], rest[half : 2 * half]
    x[:, rest[2 * half :]] = 0
    sparse = draw.integers(0, max(0, half // 16 - 1), len(weight), half) == 0
    x[:, other] = x[:, one]
    weight[:, other] = sparse * draw.integers(-1, 1, len(weight), half) - weight[:, one]


def all_configurations(rows: int, packed: bool) -> list[Configuration | None]:
    """Every configuration of the tests; None: the table's. The interpreter takes turns."""
    few = FEW if packed else []
    return [None, *few[rows % 2 :: 2], *MANY[rows % 3 :: 3]] if INTERPRETED else [None, *few, *MANY]


def assert_exact(
    launch: Callable[[Configuration | None], torch.Tensor], expected: torch.Tensor, tried: list[Configuration | None]
) -> None:
    """What `launch` returns, over poisoned outputs, equals `expected` for each configuration, every time."""
    for configuration in tried:
        different = [int((out != expected).sum()) for out in [launch(configuration) for _ in range(REPEATS)]]
        assert not any(different), f"{different} values differ in {REPEATS} launches of {configuration}"

"""The Hadamard transform of blocks, and what w8a8 makes of it."""

import pytest
import torch

from engine.quantize.int8_weight import quantize_weight, round_inputs
from engine.quantize.rotation import hadamard_matrix, rotate, rotation_block

CPU = torch.device("cpu")


@pytest.mark.parametrize(("features", "block"), [(576, 64), (144, 16), (64, 64), (128, 64), (37, 1), (96, 32), (2, 2)])
def test_blocks_divide_the_features(features: int, block: int) -> None:
    assert rotation_block(features) == block


def test_the_transform_is_the_matrix_block_by_block() -> None:
    x = torch.randn(3, 5, 192)
    expected = (x.view(3, 5, 3, 64) @ hadamard_matrix(64, CPU)).flatten(-2)
    assert torch.allclose(rotate(x), expected, atol=1e-5)
    matrix = hadamard_matrix(64, CPU)
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix, 64 * torch.eye(64))


def test_twice_is_the_size_of_a_block() -> None:
    x = torch.randint(-99, 99, (4, 576)).to(torch.bfloat16)
    assert torch.equal(rotate(rotate(x)), 64 * x.float())
    odd = torch.randn(2, 37)
    assert torch.equal(rotate(odd), odd)


def test_a_product_survives_outliers() -> None:
    """With one scale for a row that has a few large channels, rotation is what leaves the others their digits."""
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(32, 576, generator=generator), torch.randn(96, 576, generator=generator)
    x[:, ::100] *= 100
    weight[:, ::100] /= 100  # what such a channel says matters as much as any other
    exact = x.double() @ weight.double().T

    def error(values: torch.Tensor, scales: torch.Tensor, matrix: torch.Tensor) -> float:
        y = (values.double() * scales.double()[:, None]) @ matrix.double().T
        return float((y - exact).norm() / exact.norm())

    rotated = quantize_weight(weight, rounds_inputs=True)
    with_rotation = error(*round_inputs(x), rotated.values.double() * rotated.scales.double()[:, None])
    largest = x.abs().amax(dim=1) / 127
    without = error(torch.round(x / largest[:, None]), largest, weight)
    assert with_rotation < 0.1
    assert without > 3 * with_rotation

"""Product with residual: against the twin, on poisoned outputs; a row keeps its bits."""

import pytest
import torch

from engine.kernels import reference
from engine.kernels.configurations import Configuration
from engine.kernels.product_residual import product_residual
from tests.kernels.products import (
    DEVICES,
    DTYPES,
    FEW_ROWS,
    ROWS,
    WIDE_ROWS,
    Draw,
    assert_close,
    assert_row_invariant,
    configurations,
)

SHAPES = [(101, 96), (160, 160)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rows", "dtype"), ROWS)
def test_equals_the_twin(device: str, dtype: torch.dtype, shape: tuple[int, int], rows: int) -> None:
    draw = Draw(device, dtype, rows)
    weight, x, residual = draw.weight(*shape), draw.normal(rows, shape[1]), draw.normal(rows, shape[0])
    expected = reference.product_residual(x.cpu(), weight.cpu(), residual.cpu())
    for configuration in configurations(rows):
        out = draw.poisoned(rows, shape[0])
        product_residual(x, weight, residual, out, configuration=configuration)
        assert_close(out, expected, dtype)
    product_residual(x, weight, residual, residual)  # in place
    assert_close(residual, expected, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_invariance(device: str, dtype: torch.dtype) -> None:
    draw = Draw(device, dtype, 7)
    weight, x = draw.weight(101, 160), draw.normal(33, 160)

    def kernel(rows: torch.Tensor, configuration: Configuration | None) -> torch.Tensor:
        out = draw.poisoned(len(rows), 101)
        product_residual(rows, weight, torch.ones_like(out), out, configuration=configuration)
        return out

    assert_row_invariant(kernel, x, [FEW_ROWS, WIDE_ROWS])

"""Product with residual: against the twin, on poisoned outputs; exactly, where sums are exact; a row keeps its bits."""

import pytest
import torch

from engine.kernels import reference
from engine.kernels.configurations import Configuration
from engine.kernels.matrix import Matrix
from engine.kernels.pdl import INTERPRETED
from engine.kernels.product_residual import product_residual
from engine.kernels.row_norm import NormedRows, max_parts
from tests.kernels.exact_products import EXACT_ROWS, all_configurations, assert_exact, exact_products
from tests.kernels.products import (
    DEVICES,
    EPS,
    INVARIANT_ROWS,
    KINDS,
    ROWS,
    Draw,
    assert_close,
    assert_row_invariant,
    configurations,
    sums_of_squares,
)

# (outputs, features): one slice, with a remainder; slices that end early or are empty; turns that do; eight slices
SHAPES = [(33, 48), (48, 160), (40, 320), (20, 576), (16, 1536), (16, 4100)]
LARGE = [(40, 160)] if INTERPRETED else [(11_264, 2048), (11_264, 5632), (576, 1536)]
EXACT = [(40, 160), (16, 4100)] if INTERPRETED else LARGE


def run(
    draw: Draw,
    x: torch.Tensor,
    matrix: Matrix,
    residual: torch.Tensor,
    norm: torch.Tensor,
    configuration: Configuration | None,
) -> tuple[torch.Tensor, NormedRows]:
    """The sum and its way into a norm, over poison."""
    out, weighted = draw.poisoned(*residual.shape), draw.poisoned(*residual.shape)
    squares = draw.poisoned(len(x), max_parts(matrix.out_features) + 3, dtype=torch.float32)
    normed = product_residual(x, matrix, residual, norm, EPS, out, weighted, squares, configuration=configuration)
    return out, normed


def check_normed(normed: NormedRows, out: torch.Tensor, norm: torch.Tensor) -> None:
    """The parts follow from `out`, bit for bit; nothing else is written."""
    parts = -(-out.shape[1] // normed.num_parts)
    part = next(size for size in (16, 32, 64, 128) if parts <= size)
    assert torch.equal(normed.weighted, (out.float() * norm).to(out.dtype))
    assert torch.equal(normed.squares[:, : normed.num_parts], sums_of_squares(out, part))
    assert normed.squares[:, normed.num_parts :].isnan().all()
    assert normed.eps == EPS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rows", "dtype", "int8"), ROWS)
def test_equals_the_twin(device: str, dtype: torch.dtype, int8: bool, shape: tuple[int, int], rows: int) -> None:
    draw = Draw(device, dtype, rows)
    weight, x, residual = draw.weight(*shape, int8), draw.normal(rows, shape[1]), draw.normal(rows, shape[0])
    matrix, norm = weight.matrix(), draw.norm(shape[0])
    expected = reference.product_residual(x.cpu(), weight.dequantised(dtype).cpu(), residual.cpu())
    for configuration in configurations(rows, matrix):
        out, normed = run(draw, x, matrix, residual, norm, configuration)
        assert_close(out, expected, dtype)
        check_normed(normed, out, norm)
    squares = draw.poisoned(rows, max_parts(shape[0]), dtype=torch.float32)
    product_residual(x, matrix, residual, norm, EPS, residual, torch.empty_like(out), squares)  # in place
    assert_close(residual, expected, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("rows", EXACT_ROWS)
@pytest.mark.parametrize("shape", EXACT, ids=str)
def test_exact_sums(device: str, shape: tuple[int, int], rows: int, int8: bool) -> None:
    draw = Draw(device, torch.bfloat16, rows)
    norm = draw.norm(shape[0])
    for drawn in exact_products(draw, rows, *shape, int8):
        matrix, nothing = drawn.weight.matrix(), torch.zeros(rows, shape[0], device=device, dtype=draw.dtype)

        def launch(configuration: Configuration | None) -> torch.Tensor:
            out, normed = run(draw, drawn.x, matrix, nothing, norm, configuration)  # noqa: B023
            check_normed(normed, out, norm)
            return out

        assert_exact(launch, drawn.product.to(draw.dtype), all_configurations(rows, packed=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "int8"), KINDS)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_row_invariance(device: str, dtype: torch.dtype, shape: tuple[int, int], int8: bool) -> None:
    draw = Draw(device, dtype, 7)
    matrix, x, norm = draw.weight(*shape, int8).matrix(), draw.normal(INVARIANT_ROWS, shape[1]), draw.norm(shape[0])

    def kernel(rows: torch.Tensor, configuration: Configuration | None) -> torch.Tensor:
        out, normed = run(
            draw, rows, matrix, torch.ones_like(rows[:, :1]).expand(-1, shape[0]).contiguous(), norm, configuration
        )
        return torch.cat((out, normed.weighted), dim=1)

    assert_row_invariant(kernel, x, matrix.packed is not None)

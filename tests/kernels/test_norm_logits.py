"""Norm and vocabulary: against the twin, on poisoned outputs; exactly, where sums are exact; a row keeps its bits."""

import pytest
import torch

from engine.kernels import reference
from engine.kernels.configurations import Configuration
from engine.kernels.norm_logits import norm_logits
from engine.kernels.pdl import INTERPRETED
from engine.kernels.row_norm import NormedRows
from tests.kernels.exact_products import EXACT_ROWS, all_configurations, assert_exact, exact_products
from tests.kernels.products import (
    DEVICES,
    INVARIANT_ROWS,
    KINDS,
    ROWS,
    Draw,
    assert_normed_close,
    assert_row_invariant,
    configurations,
    normed_rows,
)

SHAPES = [(37, 96), (21, 160), (16, 576)]  # (vocabulary, features)
LARGE = [(37, 160)] if INTERPRETED else [(32_000, 4096), (49_152, 576)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("vocabulary", "hidden"), SHAPES)
@pytest.mark.parametrize(("rows", "dtype", "int8"), ROWS)
def test_equals_the_twin(device: str, dtype: torch.dtype, int8: bool, vocabulary: int, hidden: int, rows: int) -> None:
    draw = Draw(device, dtype, rows)
    weight, norm, (x, eps) = draw.weight(vocabulary, hidden, int8), draw.norm(hidden), draw.rows_for_norm(40, hidden)
    wanted = 2 * draw.order(20)[:1] if rows == 1 else (torch.arange(rows, device=device) * 3 + 6) % 40
    expected = reference.norm_logits(x[wanted].cpu(), norm.cpu(), eps, weight.dequantised(dtype).cpu())
    matrix = weight.matrix()
    for part, configuration in zip((16, 128, 1024), configurations(rows, matrix), strict=False):
        out = draw.poisoned(rows, vocabulary, dtype=torch.float32)
        norm_logits(normed_rows(x, norm, eps, part), matrix, out, row_index=wanted, configuration=configuration)
        assert_normed_close(out, expected, dtype)
        assert torch.equal(out.to(dtype).float(), out)
        gathered = draw.poisoned(rows, vocabulary, dtype=torch.float32)
        norm_logits(normed_rows(x[wanted], norm, eps, part), matrix, gathered, configuration=configuration)
        assert torch.equal(gathered, out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "int8"), KINDS)
@pytest.mark.parametrize("rows", EXACT_ROWS)
def test_exact_sums(device: str, dtype: torch.dtype, rows: int, int8: bool) -> None:
    vocabulary, hidden = LARGE[0]
    draw = Draw(device, dtype, rows)
    for drawn in exact_products(draw, rows, vocabulary, hidden, int8):
        x = NormedRows(drawn.x, torch.zeros(rows, 1, device=device), 1, eps=0.25)  # 1 / rms is 2
        matrix = drawn.weight.matrix()

        def launch(configuration: Configuration | None) -> torch.Tensor:
            out = draw.poisoned(rows, vocabulary, dtype=torch.float32)
            norm_logits(x, matrix, out, configuration=configuration)  # noqa: B023
            return out

        expected = (drawn.product * 2).to(dtype).float()
        assert_exact(launch, expected, all_configurations(rows, matrix.packed is not None))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "int8"), KINDS)
@pytest.mark.parametrize(("vocabulary", "hidden"), LARGE)
def test_row_invariance(device: str, dtype: torch.dtype, vocabulary: int, hidden: int, int8: bool) -> None:
    draw = Draw(device, dtype, 7)
    matrix, norm = draw.weight(vocabulary, hidden, int8).matrix(), draw.norm(hidden)

    def kernel(rows: torch.Tensor, configuration: Configuration | None) -> torch.Tensor:
        out = draw.poisoned(len(rows), vocabulary, dtype=torch.float32)
        norm_logits(normed_rows(rows, norm), matrix, out, configuration=configuration)
        return out

    assert_row_invariant(kernel, draw.normal(INVARIANT_ROWS, hidden), matrix.packed is not None)

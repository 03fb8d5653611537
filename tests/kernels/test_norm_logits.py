"""Norm and vocabulary: against the twin, on poisoned outputs; a row keeps its bits."""

import pytest
import torch

from engine.kernels import reference
from engine.kernels.configurations import Configuration
from engine.kernels.norm_logits import norm_logits
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

VOCABULARY = 101


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hidden", [96, 160])
@pytest.mark.parametrize(("rows", "dtype"), ROWS)
def test_equals_the_twin(device: str, dtype: torch.dtype, hidden: int, rows: int) -> None:
    draw = Draw(device, dtype, rows)
    weight, norm, x = draw.weight(VOCABULARY, hidden), draw.norm(hidden), draw.normal(40, hidden)
    wanted = draw.order(40)[:rows]
    expected = reference.norm_logits(x[wanted].cpu(), norm.cpu(), 1e-5, weight.cpu())
    for configuration in configurations(rows):
        out = draw.poisoned(rows, VOCABULARY, dtype=torch.float32)
        norm_logits(x, norm, 1e-5, weight, out, row_index=wanted, configuration=configuration)
        assert_close(out, expected, dtype)
        assert torch.equal(out.to(dtype).float(), out)
        gathered = draw.poisoned(rows, VOCABULARY, dtype=torch.float32)
        norm_logits(x[wanted], norm, 1e-5, weight, gathered, configuration=configuration)
        assert torch.equal(gathered, out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_invariance(device: str, dtype: torch.dtype) -> None:
    draw = Draw(device, dtype, 7)
    weight, norm, x = draw.weight(VOCABULARY, 160), draw.norm(160), draw.normal(33, 160)

    def kernel(rows: torch.Tensor, configuration: Configuration | None) -> torch.Tensor:
        out = draw.poisoned(len(rows), VOCABULARY, dtype=torch.float32)
        norm_logits(rows, norm, 1e-5, weight, out, configuration=configuration)
        return out

    assert_row_invariant(kernel, x, [FEW_ROWS, WIDE_ROWS])

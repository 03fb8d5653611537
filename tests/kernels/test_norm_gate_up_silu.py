"""Norm, gate/up and SwiGLU: against the twin, on poisoned outputs; a row keeps its bits."""

import pytest
import torch

from engine.kernels import reference
from engine.kernels.configurations import Configuration
from engine.kernels.norm_gate_up_silu import gate_up_row_order, norm_gate_up_silu
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("ffn", "hidden"), [(88, 96), (37, 160)])
@pytest.mark.parametrize(("rows", "dtype"), ROWS)
def test_equals_the_twin(device: str, dtype: torch.dtype, ffn: int, hidden: int, rows: int) -> None:
    draw = Draw(device, dtype, rows)
    weight, norm, x = draw.weight(2 * ffn, hidden), draw.norm(hidden), draw.normal(rows, hidden)
    x[0] *= 40  # gates far out on both sides
    expected = reference.norm_gate_up_silu(x.cpu(), norm.cpu(), 1e-5, weight.cpu())
    ordered = weight[gate_up_row_order(ffn).to(device)].contiguous()
    for configuration in configurations(rows):
        out = draw.poisoned(rows, ffn)
        norm_gate_up_silu(x, norm, 1e-5, ordered, out, configuration=configuration)
        assert_close(out, expected, dtype)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("device", DEVICES)
def test_extreme_gates(device: str) -> None:
    """exp overflows for a gate of -200; the product is then zero, not NaN."""
    weight = torch.zeros(4, 16, device=device)
    weight[0], weight[1], weight[2:] = -200 / 16, 200 / 16, 1 / 16
    out = torch.full((1, 2), float("nan"), device=device)
    ones = torch.ones(1, 16, device=device)
    norm_gate_up_silu(ones, ones[0], 0.0, weight[gate_up_row_order(2).to(device)].contiguous(), out)
    assert out.tolist() == [[0.0, 200.0]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_invariance(device: str, dtype: torch.dtype) -> None:
    draw = Draw(device, dtype, 7)
    weight, norm, x = draw.weight(88, 160), draw.norm(160), draw.normal(33, 160)

    def kernel(rows: torch.Tensor, configuration: Configuration | None) -> torch.Tensor:
        out = draw.poisoned(len(rows), 44)
        norm_gate_up_silu(rows, norm, 1e-5, weight, out, configuration=configuration)
        return out

    assert_row_invariant(kernel, x, [FEW_ROWS, WIDE_ROWS])

"""Norm, gate/up, SwiGLU: against the twin, on poisoned outputs; exactly, where sums are exact; a row keeps its bits."""

import pytest
import torch

from engine.kernels import reference
from engine.kernels.configurations import Configuration, FewRows
from engine.kernels.norm_gate_up_silu import gate_up_row_order, norm_gate_up_silu
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

SHAPES = [(24, 96), (13, 160), (20, 320), (8, 48)]  # (FFN size, features)
LARGE = [(20, 160)] if INTERPRETED else [(5632, 2048), (1536, 576)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("ffn", "hidden"), SHAPES)
@pytest.mark.parametrize(("rows", "dtype", "int8"), ROWS)
def test_equals_the_twin(device: str, dtype: torch.dtype, int8: bool, ffn: int, hidden: int, rows: int) -> None:
    draw = Draw(device, dtype, rows)
    weight, norm, (x, eps) = draw.weight(2 * ffn, hidden, int8), 4 * draw.norm(hidden), draw.rows_for_norm(rows, hidden)
    expected = reference.norm_gate_up_silu(x.cpu(), norm.cpu(), eps, weight.dequantised(dtype).cpu())
    matrix = weight.matrix(gate_up_row_order(ffn))
    for part, configuration in zip((16, 128, 1024), configurations(rows, matrix), strict=False):
        out = draw.poisoned(rows, ffn)
        norm_gate_up_silu(normed_rows(x, norm, eps, part), matrix, out, configuration=configuration)
        assert_normed_close(out, expected, dtype)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_gates(device: str, dtype: torch.dtype) -> None:
    """exp overflows for a gate of -200; the product is then zero, not NaN."""
    draw = Draw(device, dtype, 0)
    weight = draw.weight(4, 16)
    weight.rows[0], weight.rows[1], weight.rows[2:] = -200 / 16, 200 / 16, 1 / 16
    ones = torch.ones(1, 16, device=device, dtype=dtype)
    rows = normed_rows(ones, ones[0].float(), eps=1e-12)
    matrix = weight.matrix(gate_up_row_order(2))
    for configuration in [None] if matrix.packed is None else [None, FewRows(4, 1)]:
        out = draw.poisoned(1, 2)
        norm_gate_up_silu(rows, matrix, out, configuration=configuration)
        assert out.tolist() == [[0.0, 200.0]]


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("rows", EXACT_ROWS)
def test_exact_sums(device: str, rows: int, int8: bool) -> None:
    """Where silu(gate) is the gate, or 0, everything is exact; elsewhere exp is as good as its approximation."""
    ffn, hidden = LARGE[0]
    draw = Draw(device, torch.bfloat16, rows)
    for drawn in exact_products(draw, rows, 2 * ffn, hidden, int8):
        x = NormedRows(drawn.x, torch.zeros(rows, 1, device=device), 1, eps=0.25)  # 1 / rms is 2
        gate_up = (drawn.product * 2).to(draw.dtype)
        gate, expected = gate_up[:, :ffn], reference.silu_mul(gate_up)
        plain = (gate > 18) | (gate < -90)
        assert plain.float().mean() > 0.6
        matrix = drawn.weight.matrix(gate_up_row_order(ffn))

        def launch(configuration: Configuration | None) -> torch.Tensor:
            out = draw.poisoned(rows, ffn)
            norm_gate_up_silu(x, matrix, out, configuration=configuration)  # noqa: B023
            assert torch.allclose(out, expected, rtol=0.01, atol=0)  # noqa: B023
            return torch.where(plain, out, expected)  # noqa: B023

        assert_exact(launch, expected, all_configurations(rows, packed=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "int8"), KINDS)
@pytest.mark.parametrize(("ffn", "hidden"), LARGE)
def test_row_invariance(device: str, dtype: torch.dtype, ffn: int, hidden: int, int8: bool) -> None:
    draw = Draw(device, dtype, 7)
    matrix, norm = draw.weight(2 * ffn, hidden, int8).matrix(), draw.norm(hidden)

    def kernel(rows: torch.Tensor, configuration: Configuration | None) -> torch.Tensor:
        out = draw.poisoned(len(rows), ffn)
        norm_gate_up_silu(normed_rows(rows, norm), matrix, out, configuration=configuration)
        return out

    assert_row_invariant(kernel, draw.normal(INVARIANT_ROWS, hidden), matrix.packed is not None)

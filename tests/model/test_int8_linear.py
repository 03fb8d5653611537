"""Products with int8 weights: what the twin says, with the same bits wherever a row stands."""

import pytest
import torch

from engine.kernels.reference import product
from engine.model import int8_linear
from engine.model.int8_linear import Int8Linear
from engine.model.linear import Linear, make_linear, padded_rows
from engine.quantize.int8_weight import Int8Weight, quantize_weight

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(96, 576), (576, 1536), (320, 64), (101, 37), (40, 2500)]  # more columns than one exact float32 sum has terms
LARGEST = torch.full((3, 2500), 127, dtype=torch.int8)


def draw(
    shape: tuple[int, int], dtype: torch.dtype, rounds_inputs: bool, device: str = "cpu"
) -> tuple[Int8Weight, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(shape[0])
    weight = quantize_weight(torch.randn(shape, generator=generator).to(device), rounds_inputs)
    x = torch.randn(80, shape[1], generator=generator)
    x[:, 3] *= 50
    return weight, x.to(device, dtype), torch.randn(shape[0], generator=generator).to(device, dtype)


@pytest.mark.parametrize("rounds_inputs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device", DEVICES)
def test_equals_the_twin(device: str, shape: tuple[int, int], dtype: torch.dtype, rounds_inputs: bool) -> None:
    weight, x, bias = draw(shape, dtype, rounds_inputs, device)
    for b in (None, bias):
        ours, twin = make_linear(weight, b)(x), product(x, weight, b)
        assert ours.dtype is twin.dtype is dtype
        # Half a step of int8 may go the other way where the rotation's sums were rounded in another order.
        tolerance = 1e-3 if rounds_inputs or dtype is not torch.float32 else 5e-6
        assert (ours - twin).float().norm() / twin.float().norm() < tolerance


@pytest.mark.parametrize("rounds_inputs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_row_invariance(shape: tuple[int, int], dtype: torch.dtype, rounds_inputs: bool) -> None:
    """On the CPU, where it serves; on a GPU it is only what the kernels are compared with."""
    weight, x, bias = draw(shape, dtype, rounds_inputs, "cpu")
    linear = make_linear(weight, bias)
    y = linear(x)
    assert torch.isfinite(y).all()
    for start, count in ((0, 1), (79, 1), (3, 2), (5, 8), (16, 24), (1, 63), (10, 65)):
        assert torch.equal(linear(x[start : start + count]), y[start : start + count])
    x[7] = float("nan")
    poisoned = linear(x)
    assert poisoned[7].isnan().all()
    assert torch.equal(poisoned[:7], y[:7])
    assert torch.equal(poisoned[8:], y[8:])
    assert linear(x[:0]).shape == (0, shape[0])


@pytest.mark.parametrize("rounds_inputs", [False, True])
def test_every_way_to_sum_has_the_same_bits(rounds_inputs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors without the instructions take float32 products, of which enough are exact."""
    if not int8_linear.onednn_is_exact("cpu"):
        pytest.skip("there is only one way here")
    weight, x, _ = draw((96, 2500), torch.bfloat16, rounds_inputs)
    fast = Int8Linear(weight)(x)
    monkeypatch.setattr(int8_linear, "onednn_is_exact", lambda _: False)
    assert torch.equal(Int8Linear(weight)(x), fast)


@pytest.mark.parametrize("sums", [int8_linear._plain_sums, int8_linear._onednn_sums])
def test_the_largest_sums_are_exact(sums: int8_linear.ScaledSums) -> None:
    if sums is int8_linear._onednn_sums and not int8_linear.onednn_is_exact("cpu"):
        pytest.skip("this processor saturates")
    weight = Int8Weight(torch.cat((LARGEST, -LARGEST)), torch.tensor([1.0, 0.5, 3.0] * 2))
    digits = torch.tensor([[0], [255], [1], [129]], dtype=torch.uint8).expand(4, 2500).contiguous()
    exact = (digits.double() - 128) @ weight.values.double().T
    assert torch.equal(sums(weight)(digits), exact.float() * weight.scales)


def test_the_kind_of_the_weight_decides() -> None:
    weight = torch.randn(8, 16)
    assert isinstance(make_linear(weight), Linear)
    assert isinstance(make_linear(quantize_weight(weight)), Int8Linear)


def test_padding() -> None:
    assert [padded_rows(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]
    assert [padded_rows(n, 1) for n in (0, 1, 2, 3, 5, 8, 9, 63, 64)] == [0, 1, 2, 4, 8, 8, 16, 64, 64]

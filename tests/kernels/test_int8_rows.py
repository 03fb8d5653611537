"""Rows rounded to int8: the bits of the plain operators, on poisoned outputs."""

import pytest
import torch

from engine.kernels.int8_rows import Int8Rows, round_rows, store_kv_int8
from engine.quantize.int8_weight import quantize_rows
from engine.quantize.rotation import rotate, rotation_block
from tests.kernels.products import DEVICES, Draw


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [48, 576, 2048])
def test_activations(device: str, dtype: torch.dtype, features: int) -> None:
    draw = Draw(device, dtype, features)
    x = draw.normal(7, features)
    x[0] *= 1e4
    x[2] = 0.0
    x[3, 5] = 300.0
    memory = Int8Rows(
        torch.full((9, features + 64), 99, dtype=torch.int8, device=device),
        torch.full((9,), float("nan"), device=device),
    )
    out = round_rows(x, rotation_block(features), memory.first(7, features))
    values, scales = quantize_rows(rotate(x.cpu()))
    assert torch.equal(out.scales.cpu(), scales)
    assert torch.equal(out.values.cpu(), values)
    x[4, 7] = float("nan")
    assert round_rows(x, rotation_block(features), out).scales.isnan().tolist() == [row == 4 for row in range(7)]
    assert (memory.values.view(-1)[7 * features :] == 99).all()
    assert memory.scales[7:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_keys_and_values(device: str, heads: int, head_dim: int) -> None:
    draw = Draw(device, torch.bfloat16, heads)
    keys, values = draw.normal(5, heads, head_dim), draw.normal(5, heads, head_dim, scale=30.0)
    values[1] = 0.0
    cache = torch.full((2, 4, 8, heads, head_dim), 99, dtype=torch.int8, device=device)
    scales = torch.full((2, 4, 8, heads), float("nan"), device=device)
    slots = torch.tensor([9, 31, 10, 8, 17], device=device)
    store_kv_int8((keys, values), (cache[0], cache[1]), (scales[0], scales[1]), slots)
    for kind, x in enumerate((keys, values)):
        rounded, expected = quantize_rows(x.cpu())
        assert torch.equal(cache[kind].flatten(0, 1)[slots].cpu(), rounded)
        assert torch.equal(scales[kind].flatten(0, 1)[slots].cpu(), expected)
    untouched = torch.ones(32, dtype=torch.bool)
    untouched[slots.cpu()] = False
    assert (cache.flatten(1, 2)[:, untouched] == 99).all()
    assert scales.flatten(1, 2)[:, untouched].isnan().all()

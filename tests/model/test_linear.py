"""Products keep the bits of a row, wherever it stands and whatever stands beside it."""

import pytest
import torch

from engine.model.linear import Linear, row_tile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (3072, 576), (320, 64), (101, 37)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_row_invariance(device: str, dtype: torch.dtype, shape: tuple[int, int], bias: bool) -> None:
    tile = row_tile(torch.device(device))
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator)
    offset = torch.randn(shape[0], generator=generator) if bias else None
    linear = Linear(weight.to(device, dtype), None if offset is None else offset.to(device, dtype))
    x = torch.randn(5 * tile, shape[1], generator=generator).to(device, dtype)
    y = linear(x)
    order = torch.randperm(len(x), generator=generator)
    assert torch.equal(linear(x[order]), y[order])
    for row in range(0, tile, max(1, tile // 8)):
        alone = torch.zeros(tile, shape[1], device=device, dtype=dtype)
        alone[row] = x[11]
        assert torch.equal(linear(alone)[row], y[11])
    x, y = x.cpu(), y.cpu()
    expected = x.float() @ weight.to(dtype).float().T + (0 if offset is None else offset.to(dtype).float())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    assert (y.float() - expected).norm() / expected.norm() < tolerance

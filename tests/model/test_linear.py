"""Products keep the bits of a row, wherever it stands and whatever stands beside it."""

import pytest
import torch

from engine.model.linear import CPU_ROW_TILE, Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (3072, 576), (320, 64), (101, 37)])
@pytest.mark.parametrize("bias", [False, True])
def test_row_invariance(dtype: torch.dtype, shape: tuple[int, int], bias: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator)
    offset = torch.randn(shape[0], generator=generator) if bias else None
    linear = Linear(weight.to(dtype), None if offset is None else offset.to(dtype))
    x = torch.randn(5 * CPU_ROW_TILE, shape[1], generator=generator).to(dtype)
    y = linear(x)
    order = torch.randperm(len(x), generator=generator)
    assert torch.equal(linear(x[order]), y[order])
    for row in range(CPU_ROW_TILE):
        alone = torch.zeros(CPU_ROW_TILE, shape[1], dtype=dtype)
        alone[row] = x[11]
        assert torch.equal(linear(alone)[row], y[11])
    expected = x.float() @ weight.to(dtype).float().T + (0 if offset is None else offset.to(dtype).float())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    assert (y.float() - expected).norm() / expected.norm() < tolerance

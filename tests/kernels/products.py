"""What the tests of the product kernels share: devices, shapes, draws, tolerances, and the check of invariance."""

from collections.abc import Callable, Sequence

import pytest
import torch

from engine.kernels.configurations import Configuration
from engine.kernels.pdl import INTERPRETED

NAN = float("nan")
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")]),
]
DTYPES = [torch.float32, torch.bfloat16]
ROWS = [  # (rows, dtype): the interpreter is slow
    *((rows, torch.float32) for rows in (1, 3)),
    *((rows, torch.bfloat16) for rows in (1, 16, 17, 33)),
]
if not INTERPRETED:
    DTYPES.append(torch.float16)
    ROWS = [(rows, dtype) for rows in (1, 3, 16, 17, 33, 150) for dtype in DTYPES]

# Every way through a kernel: a row in registers, preloaded tiles, the norm inside and before, several row tiles.
# Under the interpreter the sums of a product follow block_k, so these agree in it.
ONE_ROW = Configuration(16, 16, 64, 2, 2, preload=2, prefetch=True, one_row=True)
FEW_ROWS = Configuration(32, 16, 64, 2, 2, preload=1)
MANY_ROWS = Configuration(64, 32, 64, 4, 3, preload=0, fuse_norm=False)
WIDE_ROWS = Configuration(16, 64, 64, 4, 2, preload=2, prefetch=True)


def configurations(rows: int) -> list[Configuration | None]:
    """Some that can serve `rows` rows, every one for some number; None: the table's. The interpreter is slow."""
    few: dict[int, list[Configuration | None]] = {
        1: [None, ONE_ROW, FEW_ROWS],
        3: [MANY_ROWS],
        16: [FEW_ROWS],
        33: [None],
    }
    return few.get(rows, [FEW_ROWS, MANY_ROWS])


class Draw:
    """Reproducible tensors on a device."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int) -> None:
        self.device = device
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=self._generator) * scale
        return values.to(self.device, self.dtype)

    def weight(self, outputs: int, features: int) -> torch.Tensor:
        return self.normal(outputs, features, scale=features**-0.5)

    def norm(self, size: int) -> torch.Tensor:
        return (torch.rand(size, generator=self._generator) + 0.5).to(self.device)

    def poisoned(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.full(shape, NAN, device=self.device, dtype=dtype or self.dtype)

    def order(self, count: int) -> torch.Tensor:
        return torch.randperm(count, generator=self._generator).to(self.device)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Equal but for the order of sums: in bfloat16 that flips a rounding here and there.

    A rounding left out or added changes about half of the values by a unit: 1e-3 of the norm or more.
    """
    actual, expected = actual.cpu().float(), expected.cpu().float()
    assert actual.shape == expected.shape
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 6e-4, torch.float16: 1e-4}[dtype]
    error = (actual - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.2e}"
    assert (actual - expected).abs().max() <= {torch.float32: 2e-5, torch.bfloat16: 0.016, torch.float16: 2e-3}[
        dtype
    ] * expected.abs().max()


Kernel = Callable[[torch.Tensor, Configuration | None], torch.Tensor]


def assert_row_invariant(kernel: Kernel, x: torch.Tensor, configured: Sequence[Configuration | None]) -> None:
    """The rows of x [33, K] keep their bits alone, among others, at any position, beside rows of NaN, in any tile.

    kernel: rows and a configuration to one result a row, [N, ...].
    """
    assert len(x) == 33
    whole = kernel(x, MANY_ROWS)
    assert not whole.isnan().any()
    for configuration in configured:
        assert torch.equal(kernel(x, configuration), whole)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(1)).to(x.device)
    assert torch.equal(kernel(x[order], MANY_ROWS), whole[order])
    poisoned = torch.full_like(x, NAN)
    poisoned[5], poisoned[31] = x[20], x[0]
    beside = kernel(poisoned, MANY_ROWS)
    assert torch.equal(beside[5], whole[20])
    assert torch.equal(beside[31], whole[0])
    assert beside[6].isnan().all()
    for row, configuration in ((0, ONE_ROW), (20, FEW_ROWS), (32, ONE_ROW), (32, MANY_ROWS)):
        assert torch.equal(kernel(x[row : row + 1], configuration)[0], whole[row])
    assert torch.equal(kernel(x[3:6], FEW_ROWS), whole[3:6])

"""What the tests of the product kernels share: devices, draws, tolerances, and the check of invariance."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from engine.kernels.configurations import REFERENCE, Configuration, FewRows, ManyRows
from engine.kernels.matrix import Matrix, pack
from engine.kernels.pdl import INTERPRETED
from engine.kernels.row_norm import NormedRows

NAN = float("nan")
EPS = 1e-5
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")]),
]
# (dtype, whether the weights are int8)
KINDS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
ROWS = [  # (rows, *kind): the interpreter is slow
    (1, torch.float32, False),
    *((rows, torch.bfloat16, False) for rows in (1, 3, 16, 33)),
    *((rows, torch.bfloat16, True) for rows in (3, 17)),
]
INVARIANT_ROWS = 33
COUNTS: tuple[int, ...] = (1, 3, 16)
if not INTERPRETED:
    KINDS += [(torch.float32, True), (torch.float16, False), (torch.float16, True)]
    ROWS = [(rows, dtype, int8) for rows in (1, 3, 16, 17, 33, 150) for dtype, int8 in KINDS]
    INVARIANT_ROWS = 300
    COUNTS = (1, 3, 8, 16, 17, 33, 64, 150, 256)

FEW = [FewRows(steps, preload) for steps in (4, 8, 16) for preload in (1, 2)]
MANY = [
    REFERENCE,
    ManyRows(16, 16, 64, 4, 4),
    ManyRows(32, 16, 128, 4, 3),
    ManyRows(64, 32, 128, 4, 4),
    ManyRows(128, 64, 64, 8, 4),
    ManyRows(64, 128, 64, 4, 3),
    ManyRows(32, 64, 256, 4, 2),
]


def configurations(rows: int, matrix: Matrix) -> list[Configuration | None]:
    """A few that can serve `rows` rows, each of all for some number; None: the table's. The interpreter is slow."""
    chosen: dict[int, list[Configuration | None]] = {
        1: [None, FEW[0], MANY[1]],
        3: [FEW[1], FEW[3], MANY[0]],
        16: [FEW[2], FEW[4], MANY[2]],
        17: [None, FEW[3], MANY[3]],
        33: [MANY[4], MANY[5]],
        150: [None, FEW[2], MANY[6]],
    }
    return [c for c in chosen[rows] if matrix.packed is not None or not isinstance(c, FewRows)]


@dataclass(frozen=True)
class Weight:
    """A weight [M, K] in its natural order. scales: float32 [M] of int8 rows.

    packs: whether there may be a packed copy. Nothing is read from one for float32 rows, whose tiles are too large.
    """

    rows: torch.Tensor
    scales: torch.Tensor | None = None
    packs: bool = True

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return self.rows if self.scales is None else (self.rows.float() * self.scales[:, None]).to(dtype)

    def matrix(self, order: torch.Tensor | None = None) -> Matrix:
        """As the loader hands it to the kernels, its rows in another order where one is given."""
        rows, scales = self.rows, self.scales
        if order is not None:
            order = order.to(rows.device)
            rows, scales = rows[order].contiguous(), None if scales is None else scales[order].contiguous()
        return Matrix(rows, pack(rows) if self.packs and rows.element_size() <= 2 else None, scales)


class Draw:
    """Reproducible tensors on a device."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int) -> None:
        self.device = device
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=self._generator) * scale
        return values.to(self.device, self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """int64, `high` included."""
        return torch.randint(low, high + 1, shape, generator=self._generator).to(self.device)

    def weight(self, outputs: int, features: int, int8: bool = False) -> Weight:
        """int8 scales are powers of two: the dequantised weight is then exact in all dtypes, as the kernels' is."""
        if not int8:
            return Weight(self.normal(outputs, features, scale=features**-0.5))
        scales = 2.0 ** self.integers(-8, -6, outputs).float() * 2.0 ** -((features.bit_length() - 1) // 2)
        return Weight(self.integers(-128, 127, outputs, features).to(torch.int8), scales, self.dtype != torch.float32)

    def rows_for_norm(self, rows: int, features: int) -> tuple[torch.Tensor, float]:
        """Rows [N, K] and the eps that makes 1 / rms of every other one 1, or next to it."""
        values = self.normal(features, scale=0.8)
        x = torch.stack([values[self.order(features)] for _ in range(rows)])
        x = x * (2 * self.integers(0, 1, rows, features) - 1).to(self.dtype)
        x[1::2] *= self.normal(len(x[1::2]), 1, scale=3.0)
        return x, 1.0 - values.double().square().mean().item()

    def norm(self, size: int) -> torch.Tensor:
        return (torch.rand(size, generator=self._generator) + 0.5).to(self.device)

    def poisoned(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.full(shape, NAN, device=self.device, dtype=dtype or self.dtype)

    def order(self, count: int) -> torch.Tensor:
        return torch.randperm(count, generator=self._generator).to(self.device)


def neighbour_sum(values: torch.Tensor) -> torch.Tensor:
    """Sums of the last dimension: neighbours are added until one is left, zeros where the dimension ends early."""
    while (width := values.shape[-1]) > 1:
        values = torch.nn.functional.pad(values, (0, width % 2))
        values = values[..., ::2] + values[..., 1::2]
    return values[..., 0]


def sums_of_squares(x: torch.Tensor, part: int) -> torch.Tensor:
    """The parts, of `part` features each, of the rows' sums of squares, as every producer writes them: [N, parts]."""
    squares = x.float().square()
    squares = torch.nn.functional.pad(squares, (0, -squares.shape[1] % part)).unflatten(1, (-1, part // 16, 16))
    for width in (8, 4, 2, 1):
        squares = squares[..., :width] + squares[..., width:]
    return neighbour_sum(squares[..., 0])


def normed_rows(x: torch.Tensor, norm: torch.Tensor, eps: float = EPS, part: int = 64) -> NormedRows:
    """x [N, K] on its way into a norm, as a producer whose tiles have `part` features leaves it."""
    parts = sums_of_squares(x, part)
    squares = torch.full((len(x), parts.shape[1] + 3), NAN, device=x.device)
    squares[:, : parts.shape[1]] = parts
    return NormedRows((x.float() * norm).to(x.dtype), squares, parts.shape[1], eps)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, leeway: float = 1.0) -> None:
    """Equal but for the order of sums: in bfloat16 that flips a rounding here and there; one is allowed in any case.

    A rounding left out or added changes about half of the values by a unit: 1e-3 of the norm or more.
    """
    actual, expected = actual.cpu().float(), expected.cpu().float()
    assert actual.shape == expected.shape
    tolerance = leeway * {torch.float32: 2e-6, torch.bfloat16: 6e-4, torch.float16: 1e-4}[dtype]
    error, largest = (actual - expected).norm(), expected.abs().max()
    assert error < tolerance * expected.norm() + torch.finfo(dtype).eps * largest, (
        f"error {error / expected.norm():.2e}"
    )
    furthest = leeway * {torch.float32: 2e-5, torch.bfloat16: 0.016, torch.float16: 2e-3}[dtype]
    assert (actual - expected).abs().max() <= furthest * largest


def assert_normed_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """As close as `assert_close` for every other row of `Draw.rows_for_norm`.

    The twin rounds the normalised rows, the kernels round the rows times the norm's weights and normalise the product:
    the same number of roundings, but of other numbers, unless the rms is a power of two, as it is in every other row.
    In the rest each of the K products has another error of up to a unit.
    """
    assert_close(actual[::2], expected[::2], dtype)
    if len(actual) > 1:
        assert_close(actual[1::2], expected[1::2], dtype, leeway=1 if dtype == torch.float32 else 24)


Kernel = Callable[[torch.Tensor, Configuration | None], torch.Tensor]


def assert_row_invariant(kernel: Kernel, x: torch.Tensor, packed: bool) -> None:
    """The rows of x [INVARIANT_ROWS, K] keep their bits alone, among others, at any position, beside rows of NaN, few
    or many, in any tile.

    kernel: rows and a configuration to one result a row, [N, ...]. packed: whether it can serve few rows from a packed
    weight. Under the interpreter sums follow the step along K: for K up to 256 it is 64 features in every
    configuration.
    """
    assert len(x) == INVARIANT_ROWS
    whole = kernel(x, REFERENCE)
    assert not whole.isnan().any()
    for configuration in (*MANY[1:], *(FEW[2:4] if packed else []), None):
        assert torch.equal(kernel(x, configuration), whole), configuration
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1)).to(x.device)
    assert torch.equal(kernel(x[order], None), whole[order])
    for count in COUNTS:
        first = count % 7
        tried: list[Configuration | None] = [None]
        if count <= 16:
            tried += [MANY[1], *(FEW[count % 2 :: 2] if packed else [])]
        for configuration in tried:
            result = kernel(x[first : first + count], configuration)
            assert torch.equal(result, whole[first : first + count]), (count, configuration)
    poisoned = torch.full_like(x, NAN)
    poisoned[5], poisoned[15], poisoned[31] = x[20], x[0], x[1]
    for count in (8, 16, len(x)):
        beside = kernel(poisoned[:count], None)
        for place, source in ((5, 20), (15, 0), (31, 1)):
            assert place >= count or torch.equal(beside[place], whole[source])
        assert beside[6].isnan().all()

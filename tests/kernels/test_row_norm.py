"""The row's statistic: one binary tree over its features, however its parts were cut and whoever reads it."""

import pytest
import torch

from engine.kernels.configurations import FewRows, ManyRows
from engine.kernels.embed_rows import embed_rows
from engine.kernels.norm_logits import norm_logits
from engine.kernels.product_residual import product_residual
from engine.kernels.row_norm import NormedRows, max_parts
from tests.kernels.products import DEVICES, EPS, FEW, MANY, Draw, neighbour_sum

ROWS = 5
PRODUCERS = {
    16: FewRows(4, 1),
    32: ManyRows(32, 16, 64, 4, 3),
    64: ManyRows(64, 16, 64, 4, 3),
    128: ManyRows(128, 16, 64, 8, 3),
}


def by_embed_rows(draw: Draw, x: torch.Tensor, norm: torch.Tensor) -> NormedRows:
    squares = draw.poisoned(ROWS, 1, dtype=torch.float32)
    return embed_rows(
        torch.arange(ROWS, device=x.device), x, norm, EPS, torch.empty_like(x), torch.empty_like(x), squares
    )


def by_product(draw: Draw, x: torch.Tensor, norm: torch.Tensor, part: int) -> NormedRows:
    """0 W + x, in tiles of `part` features."""
    features = x.shape[1]
    matrix, nothing = draw.weight(features, 16).matrix(), torch.zeros(ROWS, 16, device=x.device, dtype=x.dtype)
    squares = draw.poisoned(ROWS, max_parts(features), dtype=torch.float32)
    out, weighted = draw.poisoned(*x.shape), draw.poisoned(*x.shape)
    made = product_residual(nothing, matrix, x, norm, EPS, out, weighted, squares, configuration=PRODUCERS[part])
    assert torch.equal(out, x)
    assert made.num_parts == -(-features // part)
    return made


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("features", [37, 48, 96, 160, 576])
def test_parts_of_any_size_have_one_sum(device: str, features: int) -> None:
    """Sums of a tile and of the whole row, and the logits that are normalised with them: bit for bit the same."""
    draw = Draw(device, torch.bfloat16, features)
    x, norm = draw.normal(ROWS, features, scale=3.0), draw.norm(features)
    vocabulary = draw.weight(16, features).matrix()
    whole = by_embed_rows(draw, x, norm)
    total = whole.squares[:, 0]
    assert torch.allclose(total.double(), x.double().square().sum(dim=1), rtol=1e-6)
    logits: list[torch.Tensor] = []
    for made in (whole, *(by_product(draw, x, norm, part) for part in PRODUCERS)):
        assert torch.equal(made.weighted, whole.weighted)
        assert torch.equal(neighbour_sum(made.squares[:, : made.num_parts]), total)
        for configuration in (FEW[0], MANY[3]):
            out = draw.poisoned(ROWS, 16, dtype=torch.float32)
            norm_logits(made, vocabulary, out, configuration=configuration)
            logits.append(out)
    if features <= 256:  # above, the interpreter's sums follow the configuration
        assert all(torch.equal(out, logits[0]) for out in logits)
    assert all(torch.equal(out, logits[index % 2]) for index, out in enumerate(logits))


@pytest.mark.parametrize("device", DEVICES)
def test_scale_is_that_of_the_row(device: str) -> None:
    """With the identity as weight the logits are the normalised rows, each with its own rms and with eps."""
    draw = Draw(device, torch.float32, 1)
    x = draw.normal(ROWS, 64) * torch.tensor([[1e-4], [0.1], [1.0], [30.0], [1e4]], device=device)
    identity = draw.weight(64, 64)
    identity.rows.copy_(torch.eye(64))
    out = draw.poisoned(ROWS, 64)
    norm_logits(by_embed_rows(draw, x, torch.ones(64, device=device)), identity.matrix(), out)
    expected = x.double() * (x.double().square().mean(dim=1, keepdim=True) + EPS).rsqrt()
    assert torch.allclose(out.double(), expected, rtol=2e-6, atol=0)

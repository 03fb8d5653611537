"""RMSNorm of rows: against the twin, and with the bits that the fused kernels compute inside."""

import pytest
import torch

from engine.kernels import reference
from engine.kernels.configurations import Configuration
from engine.kernels.norm_logits import norm_logits
from engine.kernels.norm_rows import norm_rows
from tests.kernels.products import DEVICES, DTYPES, Draw, assert_close


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [37, 160, 576])
def test_equals_the_twin(device: str, dtype: torch.dtype, hidden: int) -> None:
    draw = Draw(device, dtype, hidden)
    x, norm, out = draw.normal(5, hidden, scale=3.0), draw.norm(hidden), draw.poisoned(5, hidden)
    norm_rows(x, norm, 1e-5, out)
    assert_close(out, reference.rms_norm(x.cpu(), norm.cpu(), 1e-5), dtype)
    picked = torch.tensor([3, 0, 3], device=device)
    assert torch.equal(norm_rows(x, norm, 1e-5, row_index=picked), out[picked])


@pytest.mark.parametrize("device", DEVICES)
def test_statistics_do_not_depend_on_the_tile(device: str) -> None:
    """The identity as weight shows the normalised rows of the fused kernel, bit for bit.

    576 features: several rounds of the statistic's columns, and a remainder.
    """
    draw = Draw(device, torch.bfloat16, 1)
    x, norm = draw.normal(17, 576, scale=3.0), draw.norm(576)
    identity = torch.eye(576, device=device, dtype=torch.bfloat16)[500:]
    expected = norm_rows(x, norm, 1e-5)[:, 500:].float()
    for configuration in (Configuration(16, 16, 64, 1, 2), Configuration(64, 32, 128, 4, 3, preload=0)):
        out = draw.poisoned(17, 76, dtype=torch.float32)
        norm_logits(x, norm, 1e-5, identity, out, configuration=configuration)
        assert torch.equal(out, expected)
    alone = draw.poisoned(1, 76, dtype=torch.float32)
    norm_logits(x[4:5], norm, 1e-5, identity, alone, configuration=Configuration(16, 16, 64, 2, 2, one_row=True))
    assert torch.equal(alone[0], expected[4])

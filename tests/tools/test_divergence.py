"""The fused loss against torch's own functions and their gradients."""

import pytest
import torch

from tools.distil_draft.divergence import losses_and_gradients
from tools.distil_draft.loss import distillation_loss


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("vocab_size", [7, 4096, 9001])
@pytest.mark.parametrize("ce_weight", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_autograd(device: str, vocab_size: int, ce_weight: float, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(vocab_size)
    logits = [(8 * torch.randn(3, vocab_size, generator=draw)).to(device, dtype) for _ in range(2)]
    token_ids = torch.tensor([0, vocab_size - 1, vocab_size // 2], device=device)
    leaf = logits[0].float().requires_grad_()
    expected = torch.stack(
        [distillation_loss(leaf[i : i + 1], logits[1][i : i + 1], token_ids[i : i + 1], ce_weight) for i in range(3)]
    )
    (0.25 * expected.sum()).backward()
    assert leaf.grad is not None
    losses = losses_and_gradients(logits[0], logits[1], token_ids, ce_weight, scale=0.25)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-5)
    tolerance = 1e-6 if dtype is torch.float32 else 1e-3
    torch.testing.assert_close(logits[0].float(), leaf.grad, rtol=10 * tolerance, atol=tolerance)
    assert leaf.grad.abs().max() > 0.01

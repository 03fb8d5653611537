# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""The loss of draft logits and its gradient in one kernel: torch's functions pass over the logits a dozen times."""

import torch
import triton
import triton.language as tl

BLOCK = 4096
LOWEST = tl.constexpr(-1e30)  # of a logit; not infinite, whose difference to itself is no number


@triton.jit
def _log_sum_exp(logits_ptr, V, BLOCK: tl.constexpr):
    highest = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        token = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + token, mask=token < V, other=LOWEST).to(tl.float32)
        higher = tl.maximum(highest, logits)
        total = total * tl.exp(highest - higher) + tl.exp(logits - higher)
        highest = higher
    peak = tl.max(highest, axis=0)
    return peak + tl.log(tl.sum(total * tl.exp(highest - peak), axis=0))


@triton.jit
def _losses_and_gradients(
    draft_ptr, target_ptr, token_ids_ptr, losses_ptr, V, ce_weight, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    draft_ptr += row * V
    target_ptr += row * V
    said = tl.load(token_ids_ptr + row)
    draft_norm = _log_sum_exp(draft_ptr, V, BLOCK)
    target_norm = _log_sum_exp(target_ptr, V, BLOCK)
    losses = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        token = start + tl.arange(0, BLOCK)
        mask = token < V
        ours = tl.load(draft_ptr + token, mask=mask, other=LOWEST).to(tl.float32) - draft_norm
        theirs = tl.load(target_ptr + token, mask=mask, other=LOWEST).to(tl.float32) - target_norm
        weight = tl.exp(theirs) * (1 - ce_weight)
        truth = tl.where(token == said, ce_weight, 0.0)
        losses += tl.where(mask, weight * (theirs - ours) - truth * ours, 0.0)
        tl.store(draft_ptr + token, ((tl.exp(ours) - weight - truth) * scale).to(draft_ptr.dtype.element_ty), mask=mask)
    tl.store(losses_ptr + row, tl.sum(losses, axis=0))


def losses_and_gradients(
    draft_logits: torch.Tensor, target_logits: torch.Tensor, token_ids: torch.Tensor, ce_weight: float, scale: float
) -> torch.Tensor:
    """Each row's loss (see `loss.distillation_loss`), float32 [N]; `draft_logits` become the gradients of `scale` times
    it. Logits [N, vocab], token_ids int64 [N]."""
    num_rows, vocab_size = draft_logits.shape
    assert draft_logits.is_contiguous()
    assert target_logits.is_contiguous()
    assert target_logits.shape == draft_logits.shape
    losses = torch.empty(num_rows, device=draft_logits.device)
    _losses_and_gradients[(num_rows,)](
        draft_logits, target_logits, token_ids, losses, vocab_size, ce_weight, scale, BLOCK=BLOCK, num_warps=8
    )
    return losses

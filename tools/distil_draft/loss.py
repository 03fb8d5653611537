"""How far a draft's predictions are from its target's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from tools.distil_draft.batches import Batch

# Logits of one piece of rows, in one format: a few times as much is in memory.
PIECE_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
SAMPLED_TEMPERATURE = 0.8
NOISE_SEED = 1


class Teacher:
    """The target. Of what it computes only the states in front of its head are kept, for later epochs: a thousandth of
    the logits, and the head is cheap beside the layers. It holds up to `cache_bytes` of them."""

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype, cache_bytes: int) -> None:
        self._model = model.to(device, dtype).eval()
        self._device = device
        self._room_bytes = cache_bytes
        self._known: dict[int, torch.Tensor] = {}

    @property
    def head(self) -> torch.Tensor:
        """[vocab, hidden]"""
        weight: torch.Tensor = self._model.lm_head.weight
        return weight

    @torch.no_grad()
    def states(self, batch: Batch) -> torch.Tensor:
        """[N, hidden] for the batch's rows."""
        if all(sample.sample_id in self._known for sample in batch.samples):
            return torch.cat([self._known[sample.sample_id] for sample in batch.samples])
        states = states_of(self._model, batch, self._device)
        if states.nbytes <= self._room_bytes:
            self._room_bytes -= states.nbytes
            parts = states.split([sample.num_output_tokens for sample in batch.samples])
            self._known |= {sample.sample_id: part for sample, part in zip(batch.samples, parts, strict=True)}
        return states


def states_of(model: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """What a model's head would read, for the batch's rows: [N, hidden]."""
    hidden = model.model(batch.token_ids.to(device), use_cache=False).last_hidden_state
    states: torch.Tensor = hidden.flatten(0, 1)[batch.rows.to(device)]
    return states


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Products in `dtype`; of float32, that is nothing special."""
    return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)


def pieces(num_rows: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    """Rows whose logits are in memory together."""
    size = max(1, PIECE_BYTES[device.type] // (4 * vocab_size))
    return (slice(start, start + size) for start in range(0, num_rows, size))


def distillation_loss(
    draft_logits: torch.Tensor, target_logits: torch.Tensor, token_ids: torch.Tensor, ce_weight: float
) -> torch.Tensor:
    """Sum over rows of (1 - ce_weight) times the divergence KL(target || draft) (Hinton et al. 2015, at temperature 1)
    and ce_weight times the cross-entropy of what the target said. Logits [N, vocab] of any format, token_ids [N]."""
    ours = F.log_softmax(draft_logits.float(), dim=-1)
    loss = ours.new_zeros(())
    if ce_weight < 1:
        theirs = F.log_softmax(target_logits.float(), dim=-1)
        loss = (1 - ce_weight) * F.kl_div(ours, theirs, log_target=True, reduction="sum")
    if ce_weight > 0:
        loss = loss + ce_weight * F.nll_loss(ours, token_ids, reduction="sum")
    return loss


def loss_and_gradients(
    draft_logits: torch.Tensor, target_logits: torch.Tensor, token_ids: torch.Tensor, ce_weight: float, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the rows' losses divided by `num_rows`, and its gradients; on a GPU these are where the logits were."""
    if draft_logits.is_cuda:
        from tools.distil_draft.divergence import losses_and_gradients  # Triton is not to be had on every platform

        losses = losses_and_gradients(draft_logits, target_logits, token_ids, ce_weight, 1 / num_rows)
        return losses.sum() / num_rows, draft_logits
    leaf = draft_logits.requires_grad_()
    loss = distillation_loss(leaf, target_logits, token_ids, ce_weight) / num_rows
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def accumulate_gradients(
    draft: Any, teacher: Teacher, batch: Batch, device: torch.device, dtype: torch.dtype, ce_weight: float
) -> torch.Tensor:
    """Gradients of the mean loss of the batch's rows, added to those of the draft's parameters; returns that loss.

    Each piece of rows goes back to the states in front of the head at once, so that its logits can be forgotten.
    """
    with autocast(device, dtype):
        states = states_of(draft, batch, device)
    target_states, token_ids = teacher.states(batch), batch.targets.to(device)
    leaf = states.detach().requires_grad_()
    total = torch.zeros((), device=device)
    for piece in pieces(len(token_ids), teacher.head.shape[0], device):
        with autocast(device, dtype):
            logits = F.linear(leaf[piece], draft.lm_head.weight)
        with torch.no_grad():
            target_logits = F.linear(target_states[piece], teacher.head)
        loss, gradients = loss_and_gradients(
            logits.detach(), target_logits, token_ids[piece], ce_weight, len(token_ids)
        )
        logits.backward(gradients)
        total += loss
    states.backward(leaf.grad)
    return total


@dataclass(frozen=True)
class Agreement:
    """Means over rows. `kl` in nats. `greedy`: how often the likeliest tokens are the same. `sampled`: how often the
    two models choose the same token at SAMPLED_TEMPERATURE with the same noise, as the engine does. Both are what a
    first draft token's acceptance rate should be."""

    kl: float
    greedy: float
    sampled: float


@torch.no_grad()
def measure_agreement(
    draft: Any, teacher: Teacher, batches: Sequence[Batch], device: torch.device, dtype: torch.dtype
) -> Agreement:
    """On batches that the draft is not trained with."""
    noise = torch.Generator(device).manual_seed(NOISE_SEED)
    sums = torch.zeros(3, device=device, dtype=torch.float64)
    num_rows = 0
    for batch in batches:
        with autocast(device, dtype):
            states = states_of(draft, batch, device)
        target_states, token_ids = teacher.states(batch), batch.targets.to(device)
        for piece in pieces(len(token_ids), teacher.head.shape[0], device):
            with autocast(device, dtype):
                ours = F.linear(states[piece], draft.lm_head.weight).float()
            theirs = F.linear(target_states[piece], teacher.head).float()
            gumbel = -torch.empty_like(ours).exponential_(generator=noise).log()
            sampled = [(logits / SAMPLED_TEMPERATURE + gumbel).argmax(-1) for logits in (ours, theirs)]
            sums[0] += distillation_loss(ours, theirs, token_ids[piece], ce_weight=0)
            sums[1] += (ours.argmax(-1) == theirs.argmax(-1)).sum()
            sums[2] += (sampled[0] == sampled[1]).sum()
        num_rows += len(token_ids)
    return Agreement(*(sums / num_rows).tolist())

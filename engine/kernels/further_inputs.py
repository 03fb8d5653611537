# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""The first kernel of a step that goes on where the last one ended, without the host."""

import torch
import triton
import triton.language as tl

from engine.kernels.attention_plan import NULL_SLOT
from engine.kernels.step_inputs import BLOCK, NUM_TURNS, StepInputs


@triton.jit(do_not_specialize=["num_rows", "num_logit_rows", "max_blocks"])
def _further_inputs(
    turn,
    choices,
    block_tables,
    token_ids,
    positions,
    slot_mapping,
    row_seats,
    logit_rows,
    logit_seats,
    logit_positions,
    num_drafts,
    num_rows,
    num_logit_rows,
    max_blocks,
    NUM_TURNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NULL_SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A row reads and writes its own place alone, so that the last step's columns can be written over.
    for first in range(0, num_rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        inside = row < num_rows
        wanted = row < num_logit_rows
        seat = tl.load(logit_seats + row, mask=wanted, other=-1, cache_modifier=".cg")
        real = seat >= 0
        token_id = tl.load(choices + 2 * row + 1, mask=real, other=0, cache_modifier=".cg")
        position = tl.load(logit_positions + row, mask=real, other=-1, cache_modifier=".cg") + 1
        place = seat * max_blocks + position // BLOCK_SIZE
        block = tl.load(block_tables + place, mask=real, other=0, cache_modifier=".cg").to(tl.int64)
        tl.store(token_ids + row, token_id, mask=inside)
        tl.store(positions + row, position, mask=inside)
        tl.store(slot_mapping + row, tl.where(real, block * BLOCK_SIZE + position % BLOCK_SIZE, NULL_SLOT), mask=inside)
        tl.store(row_seats + row, seat, mask=inside)
        tl.store(logit_rows + row, tl.where(real, row, 0).to(tl.int64), mask=wanted)
        tl.store(logit_positions + row, position, mask=wanted)
        tl.store(num_drafts + row, 0, mask=wanted)
    tl.store(turn, (tl.load(turn, cache_modifier=".cg") + 1) % NUM_TURNS)


def further_inputs(
    turn: torch.Tensor, choices: torch.Tensor, block_tables: torch.Tensor, block_size: int, step: StepInputs
) -> None:
    """Turn the last step's inputs into those of the next, in place: one row for each row that had its logits wanted, at
    the position behind that, with the token that was chosen there. Does not wait for the device.

    turn: as in `step_inputs`. choices: int64 [S or more, 2], of the last step; token ids are in the second column.
    block_tables: int32 [seats, max_blocks], with the blocks of the positions to come. step: N rows, of which the first
    S have their logits wanted; in, `logit_seats` and `logit_positions` of the last step; out, all of it.
    """
    num_rows, num_logit_rows = len(step.token_ids), len(step.logit_rows)
    assert num_logit_rows <= num_rows
    assert num_logit_rows <= len(choices)
    assert turn.dtype == block_tables.dtype == torch.int32
    assert choices.dtype == torch.int64
    assert choices.is_contiguous()
    assert block_tables.is_contiguous()
    _further_inputs[(1,)](
        turn,
        choices,
        block_tables,
        step.token_ids,
        step.positions,
        step.slot_mapping,
        step.seats,
        step.logit_rows,
        step.logit_seats,
        step.logit_positions,
        step.num_drafts,
        num_rows,
        num_logit_rows,
        block_tables.shape[1],
        NUM_TURNS=NUM_TURNS,
        BLOCK_SIZE=block_size,
        NULL_SLOT=NULL_SLOT,
        BLOCK=BLOCK,
        num_warps=BLOCK // 32,
    )

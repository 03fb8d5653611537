# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""The first kernel of a step: what the host has staged becomes what the decoder reads."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.attention_plan import NULL_SLOT

NUM_TURNS = 16  # that steps take with what they tell the host; even, since their inputs have two
BLOCK = 512  # rows that are handled side by side, one a thread: a warp reads 128 bytes of the host's at once


@dataclass(frozen=True)
class StagedLayout:
    """Where the columns of a step lie in one int32 buffer.

    Four columns of `num_rows` rows: token id; source, the place of the token among the choices of the step before,
    -1 where the token id counts; seat, the request's row of the block tables, -1 for a row of nobody; position.
    Then two columns of `num_logit_rows`: rows whose logits are wanted, -1 for none; and how many draft tokens come
    before them, each row's own token being the last of these. Then `num_updates` places in the flattened block tables,
    -1 for none, and the blocks that belong there.
    """

    num_rows: int
    num_logit_rows: int
    num_updates: int

    @property
    def size(self) -> int:
        return 4 * self.num_rows + 2 * self.num_logit_rows + 2 * self.num_updates


@dataclass(frozen=True)
class StepInputs:
    """A step on the device: N rows, of which S have their logits computed.

    token_ids, positions, slot_mapping: int64 [N]. seats: int32 [N], -1 for a row of nobody, which has token 0,
    position 0 and the null slot. logit_rows: int64 [S], row 0 in place of none. logit_seats: int32 [S], -1 for none;
    logit_positions: int64 [S]. num_drafts: int32 [S].
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    seats: torch.Tensor
    logit_rows: torch.Tensor
    logit_seats: torch.Tensor
    logit_positions: torch.Tensor
    num_drafts: torch.Tensor

    @classmethod
    def empty(cls, num_rows: int, num_logit_rows: int, device: torch.device) -> "StepInputs":
        def make(size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        return cls(
            token_ids=make(num_rows, torch.int64),
            positions=make(num_rows, torch.int64),
            slot_mapping=make(num_rows, torch.int64),
            seats=make(num_rows, torch.int32),
            logit_rows=make(num_logit_rows, torch.int64),
            logit_seats=make(num_logit_rows, torch.int32),
            logit_positions=make(num_logit_rows, torch.int64),
            num_drafts=make(num_logit_rows, torch.int32),
        )

    def first(self, num_rows: int, num_logit_rows: int) -> "StepInputs":
        """The same memory for a smaller step."""
        return StepInputs(
            self.token_ids[:num_rows],
            self.positions[:num_rows],
            self.slot_mapping[:num_rows],
            self.seats[:num_rows],
            self.logit_rows[:num_logit_rows],
            self.logit_seats[:num_logit_rows],
            self.logit_positions[:num_logit_rows],
            self.num_drafts[:num_logit_rows],
        )


@triton.jit(do_not_specialize=["half_size", "num_rows", "num_logit_rows", "num_updates", "max_blocks"])
def _step_inputs(
    staged,
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
    half_size,
    num_rows,
    num_logit_rows,
    num_updates,
    max_blocks,
    NUM_TURNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NULL_SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    own_turn = (tl.load(turn, volatile=True) + 1) % NUM_TURNS
    staged += own_turn % 2 * half_size
    staged_logit_rows = staged + 4 * num_rows
    places = staged_logit_rows + 2 * num_logit_rows
    # All that the host has written of some rows is asked for at once: each answer takes more than a microsecond. Never
    # out of a cache, since the host writes the same memory anew every other step; Triton drops cache_modifier=".cv".
    for first in range(0, tl.maximum(tl.maximum(num_rows, num_logit_rows), num_updates), BLOCK):
        row = first + lane
        inside = row < num_rows
        wanted = row < num_logit_rows
        updated = row < num_updates
        token_id = tl.load(staged + row, mask=inside, other=0, volatile=True).to(tl.int64)
        source = tl.load(staged + num_rows + row, mask=inside, other=-1, volatile=True)
        seat = tl.load(staged + 2 * num_rows + row, mask=inside, other=-1, volatile=True)
        position = tl.load(staged + 3 * num_rows + row, mask=inside, other=0, volatile=True).to(tl.int64)
        logit_row = tl.load(staged_logit_rows + row, mask=wanted, other=-1, volatile=True)
        drafts = tl.load(staged_logit_rows + num_logit_rows + row, mask=wanted, other=0, volatile=True)
        place = tl.load(places + row, mask=updated, other=-1, volatile=True)
        block = tl.load(places + num_updates + row, mask=updated, other=0, volatile=True)
        chosen = tl.load(choices + 2 * source + 1, mask=source >= 0, other=0, cache_modifier=".cg")
        tl.store(block_tables + place, block, mask=place >= 0)
        tl.store(token_ids + row, tl.where(source >= 0, chosen, token_id), mask=inside)
        tl.store(positions + row, position, mask=inside)
        tl.store(row_seats + row, seat, mask=inside)
        tl.store(logit_seats + row, logit_row, mask=wanted)  # until the seat is known
        tl.store(num_drafts + row, drafts, mask=wanted)
    # The one program of this kernel has written the tables and the columns before any of its threads reads them.
    tl.debug_barrier()
    tl.store(turn, own_turn)
    for first in range(0, num_rows, BLOCK):
        row = first + lane
        inside = row < num_rows
        seat = tl.load(row_seats + row, mask=inside, other=-1, cache_modifier=".cg")
        position = tl.load(positions + row, mask=inside, other=0, cache_modifier=".cg")
        place = seat * max_blocks + position // BLOCK_SIZE
        block = tl.load(block_tables + place, mask=seat >= 0, other=0, cache_modifier=".cg").to(tl.int64)
        slot = tl.where(seat >= 0, block * BLOCK_SIZE + position % BLOCK_SIZE, NULL_SLOT)
        tl.store(slot_mapping + row, slot, mask=inside)
    for first in range(0, num_logit_rows, BLOCK):
        index = first + lane
        inside = index < num_logit_rows
        row = tl.load(logit_seats + index, mask=inside, other=-1, cache_modifier=".cg")
        seat = tl.load(row_seats + row, mask=row >= 0, other=-1, cache_modifier=".cg")
        position = tl.load(positions + row, mask=row >= 0, other=0, cache_modifier=".cg")
        tl.store(logit_rows + index, tl.maximum(row, 0).to(tl.int64), mask=inside)
        tl.store(logit_seats + index, seat, mask=inside)
        tl.store(logit_positions + index, position, mask=inside)


def step_inputs(
    staged: torch.Tensor,
    turn: torch.Tensor,
    layout: StagedLayout,
    choices: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
    out: StepInputs,
) -> None:
    """Bring the block tables up to date, then fill `out`. Does not wait for the device.

    staged: int32 [2, layout.size or more], in the host's pinned memory or on the device: this step in one half, in the
    other the one before or after it. turn: int32 [1], on the device: the turn of the step before, of NUM_TURNS; this
    one takes the next, and says so there. Its parity is the half. The device goes by that and not by what it finds in
    the halves, because the host may have staged the next step, or be at it, by the time that this one runs. A half may
    be written anew when the step that it held is done; a step that was not launched for certain, or launched twice,
    leaves `turn` to be set by hand.
    choices: int64 [S, 2], of the step before; the token ids are in the second column.
    block_tables: int32 [seats, max_blocks], written where `staged` says so; no place may be named twice.

    One program does it all, so that its own barrier orders the writes to the tables before the reads. It is launched
    when all that was there before it is done: the choices that it reads are the end of the step before, whose kernels
    have also read `turn` by then.
    """
    assert staged.shape[0] == 2
    assert staged.shape[1] >= layout.size
    assert turn.shape == (1,)
    assert staged.dtype == turn.dtype == block_tables.dtype == torch.int32
    assert choices.dtype == torch.int64
    assert choices.shape[1] == 2
    assert out.token_ids.shape == (layout.num_rows,)
    assert out.logit_rows.shape == (layout.num_logit_rows,)
    assert all(tensor.is_contiguous() for tensor in (staged, choices, block_tables))
    _step_inputs[(1,)](
        staged,
        turn,
        choices,
        block_tables,
        out.token_ids,
        out.positions,
        out.slot_mapping,
        out.seats,
        out.logit_rows,
        out.logit_seats,
        out.logit_positions,
        out.num_drafts,
        staged.shape[1],
        layout.num_rows,
        layout.num_logit_rows,
        layout.num_updates,
        block_tables.shape[1],
        NUM_TURNS=NUM_TURNS,
        BLOCK_SIZE=block_size,
        NULL_SLOT=NULL_SLOT,
        BLOCK=BLOCK,
        num_warps=BLOCK // 32,
    )

"""The first kernel of a step that goes on without the host, against a plain formulation."""

from dataclasses import replace

import pytest
import torch

from engine.kernels.attention_plan import NULL_SLOT
from engine.kernels.further_inputs import further_inputs
from engine.kernels.step_inputs import BLOCK, NUM_TURNS, StepInputs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BLOCK_SIZE = 4
MAX_BLOCKS = 40


def reference(last: StepInputs, choices: torch.Tensor, tables: torch.Tensor, num_rows: int) -> StepInputs:
    """The kernel's twin in plain torch."""
    num_logit_rows = len(last.logit_seats)
    real = last.logit_seats >= 0
    position = torch.where(real, last.logit_positions + 1, 0)
    block = tables[last.logit_seats.clamp(min=0), position // BLOCK_SIZE].long()

    def padded(column: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(column, (0, num_rows - num_logit_rows), value=value)

    return StepInputs(
        token_ids=padded(torch.where(real, choices[:num_logit_rows, 1], 0), 0),
        positions=padded(position, 0),
        slot_mapping=padded(torch.where(real, block * BLOCK_SIZE + position % BLOCK_SIZE, NULL_SLOT), NULL_SLOT),
        seats=padded(last.logit_seats, -1),
        logit_rows=torch.where(real, torch.arange(num_logit_rows, device=real.device), 0),
        logit_seats=last.logit_seats,
        logit_positions=position,
        num_drafts=torch.zeros_like(last.num_drafts),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("num_rows", "num_logit_rows", "num_real"), [(1, 1, 1), (1, 1, 0), (16, 16, 11), (32, 20, 20), (2 * BLOCK,) * 3]
)
def test_equals_the_plain_formulation(num_rows: int, num_logit_rows: int, num_real: int, device: str) -> None:
    """Over some steps, each written over the one before; the columns that it does not need hold anything."""
    generator = torch.Generator().manual_seed(num_rows + num_real)

    def draw(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator).to(device)

    seats = torch.full((num_logit_rows,), -1, dtype=torch.int32)
    seats[torch.randperm(num_logit_rows, generator=generator)[:num_real]] = torch.randperm(
        num_logit_rows + 3, generator=generator
    )[:num_real].int()
    poison = 1 << 20
    inputs = StepInputs.empty(2 * num_rows, 2 * num_rows, torch.device(device))
    for column in vars(inputs).values():
        column.fill_(poison)
    step = inputs.first(num_rows, num_logit_rows)
    step.logit_seats.copy_(seats)
    step.logit_positions.copy_(draw(0, (MAX_BLOCKS - 2) * BLOCK_SIZE, num_logit_rows))
    tables = draw(1, 1 << 27, num_logit_rows + 3, MAX_BLOCKS).int()  # of a size whose slots need more than 32 bits
    turn = torch.tensor([NUM_TURNS - 3], dtype=torch.int32, device=device)
    expected = replace(step, logit_seats=step.logit_seats.clone(), logit_positions=step.logit_positions.clone())
    for number in range(2 * BLOCK_SIZE):
        choices = torch.stack((draw(0, 2, 2 * num_rows), draw(0, 200_000, 2 * num_rows)), dim=1)
        expected = reference(expected, choices, tables, num_rows)
        further_inputs(turn, choices, tables, BLOCK_SIZE, step)
        assert turn.tolist() == [(NUM_TURNS - 2 + number) % NUM_TURNS]
        for name, column in vars(expected).items():
            assert torch.equal(getattr(step, name), column), name
    assert (inputs.token_ids[num_rows:] == poison).all()
    assert (inputs.logit_rows[num_logit_rows:] == poison).all()

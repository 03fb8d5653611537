"""The first kernel of a step against a plain formulation."""

import pytest
import torch

from engine.kernels.attention_plan import NULL_SLOT
from engine.kernels.pdl import INTERPRETED
from engine.kernels.step_inputs import BLOCK, NUM_TURNS, StagedLayout, StepInputs, step_inputs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BLOCK_SIZE = 4
MAX_BLOCKS = 40


def reference(
    staged: torch.Tensor, layout: StagedLayout, choices: torch.Tensor, tables: torch.Tensor, block_size: int
) -> StepInputs:
    """The kernel's twin in plain torch; `tables` is brought up to date as there."""
    num_rows, num_updates = layout.num_rows, layout.num_updates
    columns = staged.long().split([num_rows] * 4 + [layout.num_logit_rows] * 2 + [num_updates] * 2)
    token_ids, sources, seats, positions, logit_rows, num_drafts, places, blocks = columns
    tables.view(-1)[places[places >= 0]] = blocks[places >= 0].int()
    block = tables[seats.clamp(min=0), positions // block_size].long()
    rows = logit_rows.clamp(min=0)
    return StepInputs(
        token_ids=torch.where(sources < 0, token_ids, choices[sources.clamp(min=0), 1]),
        positions=positions,
        slot_mapping=torch.where(seats < 0, NULL_SLOT, block * block_size + positions % block_size),
        seats=seats.int(),
        logit_rows=rows,
        logit_seats=torch.where(logit_rows < 0, -1, seats[rows]).int(),
        logit_positions=torch.where(logit_rows < 0, 0, positions[rows]),
        num_drafts=num_drafts.int(),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("turn", [0, 1, NUM_TURNS - 2, NUM_TURNS - 1])
@pytest.mark.parametrize(
    ("num_rows", "num_real", "num_logit_rows", "num_updates"),
    [(1, 1, 1, 16), (1, 0, 1, 16), (16, 11, 7, 16), (BLOCK, BLOCK, 256, BLOCK), (2 * BLOCK, BLOCK + 9, 3, 2 * BLOCK)],
)
def test_equals_the_plain_formulation(
    num_rows: int, num_real: int, num_logit_rows: int, num_updates: int, turn: int, device: str
) -> None:
    generator = torch.Generator().manual_seed(num_rows + num_real)

    def draw(low: int, high: int, size: int) -> torch.Tensor:
        return torch.randint(low, high, (size,), generator=generator)

    num_seats = max(num_rows, 30)
    nobody = torch.arange(num_rows) >= num_real
    fed_back = draw(0, 2, num_rows) > 0
    logit_rows = torch.where(draw(0, 3, num_logit_rows) > 0, draw(0, max(num_real, 1), num_logit_rows), -1)
    seats, positions = draw(0, num_seats, num_rows), draw(0, MAX_BLOCKS * BLOCK_SIZE, num_rows)
    # Every real row's block comes with this step, as far as there is room and it is not named twice, and others too.
    places = (seats * MAX_BLOCKS + positions // BLOCK_SIZE).unique()[: num_updates // 2]
    free = torch.ones(num_seats * MAX_BLOCKS, dtype=torch.bool)
    free[places] = False
    places = torch.cat((places, free.nonzero().flatten()[: num_updates // 4]))
    places = torch.cat((places, torch.full((num_updates - len(places),), -1)))
    places = places[torch.randperm(num_updates, generator=generator)]
    columns = [
        draw(0, 1000, num_rows).masked_fill(nobody, 0),
        torch.where(fed_back, draw(0, 256, num_rows), -1).masked_fill(nobody, -1),
        seats.masked_fill(nobody, -1),
        positions.masked_fill(nobody, 0),
        logit_rows,
        draw(0, 9, num_logit_rows),
        places,
        draw(1, 1 << 27, num_updates),  # of a size whose slots need more than 32 bits
    ]
    layout = StagedLayout(num_rows, num_logit_rows, num_updates)
    step = torch.cat(columns).int()
    # As long as a larger bucket needs it; the rest is of no concern, like the other half.
    staged = torch.full((2, layout.size + 5), 1 << 20, dtype=torch.int32, pin_memory=device == "cuda")
    staged[turn % 2, : layout.size] = step
    device_turn = torch.tensor([(turn - 1) % NUM_TURNS], dtype=torch.int32, device=device)
    choices = torch.stack((draw(0, 2, 256), draw(1000, 200_000, 256)), dim=1).to(device)
    tables = torch.randint(1, 1 << 27, (num_seats, MAX_BLOCKS), generator=generator).int()
    expected_tables, actual_tables = tables.clone().to(device), tables.clone().to(device)
    expected = reference(step.to(device), layout, choices, expected_tables, BLOCK_SIZE)
    actual = StepInputs.empty(2 * num_rows, 2 * num_logit_rows, torch.device(device)).first(num_rows, num_logit_rows)
    step_inputs(staged, device_turn, layout, choices, actual_tables, BLOCK_SIZE, actual)
    assert device_turn.tolist() == [turn]
    assert torch.equal(actual_tables, expected_tables)
    if num_real:
        assert not torch.equal(actual_tables.cpu(), tables)
    for name, column in vars(expected).items():
        assert torch.equal(getattr(actual, name), column), name
        assert getattr(actual, name).dtype == column.dtype, name


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_replays_take_turns_and_read_the_host_anew() -> None:
    """Out of one graph, with the next step staged before the last one has run; what was there earlier is not seen."""
    device = torch.device("cuda")
    layout = StagedLayout(8, 1, 16)
    staged = torch.full((2, layout.size), -1, dtype=torch.int32, pin_memory=True)
    staged[:, 24:32] = 0
    turn = torch.full((1,), NUM_TURNS - 1, dtype=torch.int32, device=device)
    tables = torch.zeros((8, 4), dtype=torch.int32, device=device)
    choices = torch.zeros((8, 2), dtype=torch.int64, device=device)
    out = StepInputs.empty(8, 1, device)
    arguments = (staged, turn, layout, choices, tables, BLOCK_SIZE, out)
    step_inputs(*arguments)  # compiles
    turn.fill_(NUM_TURNS - 1)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step_inputs(*arguments)
    seen = torch.zeros((200, 8), dtype=torch.int64, device=device)
    done = [torch.cuda.Event() for _ in range(2)]
    for step in range(200):
        done[step % 2].synchronize()
        staged[step % 2, :8] = torch.arange(8 * step, 8 * step + 8)
        torch.cuda._sleep(100_000)
        graph.replay()
        seen[step].copy_(out.token_ids)
        done[step % 2].record()
    assert seen.flatten().tolist() == list(range(1600))

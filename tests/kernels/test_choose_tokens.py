"""The choice of tokens: against the twin; a row's outcome is its own; poison, ties, counts and log-probabilities."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from engine.kernels import token_scores as fields
from engine.kernels.choose_tokens import CHUNK
from engine.kernels.kept_tokens import BLOCK, SHORTLIST
from engine.kernels.pdl import INTERPRETED
from engine.sampling.sampler import filter_tokens
from tests.kernels.choosing import Draw, Seat, assert_logprobs, run, twin
from tests.kernels.products import DEVICES

NAN = float("nan")
INFINITY = float("inf")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab_size", [1, 320, 1030, CHUNK + 3])
def test_equals_the_twin(device: str, vocab_size: int) -> None:
    """Logarithms on a GPU may differ from the CPU's by the last bit, which seldom shows."""
    draw = Draw(vocab_size, vocab_size)
    differing, num_rows = 0, 64 if INTERPRETED else 4096
    for _ in range(num_rows // 64):
        logits = torch.stack([draw.row() for _ in range(64)])
        seats: list[Seat | None] = [draw.seat() for _ in range(64)]
        positions = [draw.number(2000) for _ in range(64)]
        outcome = run(logits, seats, positions, device)
        for place, (row, seat) in enumerate(zip(logits, seats, strict=True)):
            assert seat is not None
            expected = twin(row, seat, positions[place])
            differing += tuple(outcome.choices[place].tolist()) != expected
            if seat.num_logprobs >= 0 and outcome.choices[place, 0]:
                assert_logprobs(outcome, place, row, seat.num_logprobs)
    assert differing <= (0 if INTERPRETED else num_rows // 1000)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("top_k", [1, BLOCK, SHORTLIST - 1, SHORTLIST + 1, CHUNK])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
def test_filters_that_keep_many(device: str, top_k: int, top_p: float) -> None:
    """A flat row: the shortlist holds what remains, or does not; the same draw often has to be repeated."""
    row = torch.randn(CHUNK + 3, generator=torch.Generator().manual_seed(1)).bfloat16().float() * 0.2
    num_rows = 3 if INTERPRETED else 64
    seats: list[Seat | None] = [Seat(1.0, top_k, top_p, seed=seed) for seed in range(num_rows)]
    outcome = run(row.expand(num_rows, -1).contiguous(), seats, [7] * num_rows, device)
    expected = [twin(row, seat, 7) for seat in seats if seat is not None]
    assert [tuple(choice) for choice in outcome.choices.tolist()] == expected
    kept = set(filter_tokens(row, top_k, top_p, 0.0)[1].tolist())
    assert {token_id for _, token_id in expected} <= kept


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("seat", "kept"),
    [(Seat(top_k=3), 3), (Seat(top_p=0.004), 4), (Seat(min_p=1.0), 500), (Seat(top_k=4, top_p=0.5), 2)],
)
def test_of_equals_the_lowest_ids_are_kept(device: str, seat: Seat, kept: int) -> None:
    row = torch.zeros(1000)
    row[500:] = -1e-3
    seats: list[Seat | None] = [replace(seat, temperature=1.0, seed=seed) for seed in range(40)]
    outcome = run(row.expand(40, -1).contiguous(), seats, [0] * 40, device)
    drawn = set(outcome.choices[:, 1].tolist())
    assert max(drawn) < kept
    assert len(drawn) >= min(kept, 20)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_is_its_own(device: str) -> None:
    """The same choices, log-probabilities to the bit and counts alone, among others, beside poison, at any place."""
    sizes = (1, 7) if INTERPRETED else (1, 7, 64, 256)
    count, vocab_size = (8, 1030) if INTERPRETED else (256, 32000)
    draw = Draw(5, vocab_size)
    logits = torch.stack([draw.row() for _ in range(count)])
    seats: list[Seat | None] = [draw.seat() for _ in range(count)]
    positions = [draw.number(2000) for _ in range(count)]
    whole = run(logits, seats, positions, device)
    for size in sizes:
        start = count - size
        part = run(logits[start:], seats[start:], positions[start:], device)
        assert torch.equal(part.choices, whole.choices[start:])
        assert torch.equal(part.logprob_ids, whole.logprob_ids[start:])
        assert torch.equal(part.logprobs.view(torch.int32), whole.logprobs[start:].view(torch.int32))
        assert torch.equal(part.token_states, whole.token_states[start:])
    poisoned = torch.full_like(logits, NAN)
    poisoned[2], poisoned[5] = logits[4], logits[1]
    moved = list(seats)
    moved[2], moved[5] = seats[4], seats[1]
    moved_positions = list(positions)
    moved_positions[2], moved_positions[5] = positions[4], positions[1]
    beside = run(poisoned, moved, moved_positions, device)
    assert torch.equal(beside.choices[[2, 5]], whole.choices[[4, 1]])
    assert beside.choices[:, 0].sum() == 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", [0, 1])
def test_the_host_is_told_in_the_half_whose_turn_it_is(device: str, half: int) -> None:
    draw = Draw(9, 320)
    logits = torch.stack([draw.row() for _ in range(5)])
    logits[3, 7] = NAN
    outcome = run(logits, [draw.seat() for _ in range(5)], [4] * 5, device, half)
    assert torch.equal(outcome.host_choices[half, :5], outcome.choices)
    assert outcome.choices[:, 0].tolist() == [1, 1, 1, 0, 1]
    assert (outcome.host_choices[half, 5] == -1).all()
    assert (outcome.host_choices[1 - half] == -1).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seat", [None, Seat(), Seat(0.7, seed=3), Seat(0.7, top_p=0.9, num_logprobs=2, seed=3)])
def test_poison_is_found_anywhere(device: str, seat: Seat | None) -> None:
    def poison(row: torch.Tensor, place: int, value: float) -> torch.Tensor:
        row[place] = value
        return row

    clean = torch.randn(CHUNK + 5, generator=torch.Generator().manual_seed(2))
    rows = [clean.clone(), poison(clean.clone(), 7, -INFINITY)]
    rows += [poison(clean.clone(), place, value) for place in (0, CHUNK + 4) for value in (NAN, -NAN, INFINITY)]
    rows += [torch.full_like(clean, -INFINITY)]
    outcome = run(torch.stack(rows), [seat] * len(rows), [3] * len(rows), device)
    assert outcome.choices[:, 0].tolist() == [1, 1] + [0] * 7
    assert (outcome.choices[2:, 1] == 0).all()
    assert outcome.choices[0, 1] == twin(clean, seat or Seat(), 3)[1]


@pytest.mark.parametrize("device", DEVICES)
def test_zeros_of_either_sign_tie(device: str) -> None:
    row = torch.full((100,), -1.0)
    row[40], row[60] = -0.0, 0.0
    assert run(row[None], [Seat()], [0], device).choices.tolist() == [[1, 40]]


@pytest.mark.parametrize("device", DEVICES)
def test_chosen_tokens_are_counted_where_they_matter(device: str) -> None:
    states = torch.zeros(64, dtype=torch.int32)
    states[5] = fields.IN_PROMPT | fields.STOPS | 9 << fields.BIAS_SHIFT | 41 << fields.COUNT_SHIFT
    row = torch.zeros(64)
    row[5] = 50.0
    poisoned = row.clone()
    poisoned[1] = NAN
    counted = Seat(states=states, counted=True, biases=[0.0] * 9)
    logits = torch.stack([row, row, row, poisoned])
    outcome = run(logits, [counted, replace(counted, counted=False), None, counted], [0] * 4, device)
    assert outcome.choices[:, 1].tolist() == [5, 5, 5, 0]
    expected = torch.stack([states, states, torch.zeros_like(states), states])
    expected[0, 5] += 1 << fields.COUNT_SHIFT
    assert torch.equal(outcome.token_states, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_drafts_before_a_row_are_output(device: str) -> None:
    """As if they had been counted, also where filters look at the row again; nothing of them is left in the states."""
    count, vocab_size = (16 if INTERPRETED else 256), 320
    draw = Draw(11, vocab_size)
    logits = torch.stack([torch.randn(vocab_size, generator=torch.Generator().manual_seed(i)) for i in range(count)])
    seats, after, drafts = [], [], []
    for place in range(count):
        seat = replace(draw.seat(), repetition=1.7, presence=0.6, frequency=0.8, counted=False, biases=[])
        seat = replace(seat, states=torch.zeros(vocab_size, dtype=torch.int32))
        likeliest = logits[place].argsort(descending=True)[:3].tolist()
        drafts.append([likeliest[draw.number(3)] for _ in range(draw.number(9))])
        states = torch.bincount(torch.tensor(drafts[-1], dtype=torch.int64), minlength=vocab_size).int()
        seats.append(seat)
        after.append(replace(seat, states=states << fields.COUNT_SHIFT))
    positions = [place + len(tokens) for place, tokens in enumerate(drafts)]
    outcome = run(logits, seats, positions, device, drafts=drafts)
    assert torch.equal(outcome.choices, run(logits, after, positions, device).choices)
    assert not torch.equal(outcome.choices, run(logits, seats, positions, device).choices)
    assert not outcome.token_states.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "change",
    [
        lambda seat: replace(seat, seed=seat.seed + 1),
        lambda seat: replace(seat, seed=seat.seed + (1 << 40)),
        lambda seat: replace(seat, choice_index=1),
    ],
)
def test_every_part_of_the_noise_s_key_matters(device: str, change: Callable[[Seat], Seat]) -> None:
    row = torch.zeros(1, 1030)
    seat = Seat(1.0, seed=77)
    first = run(row, [seat], [10], device).choices
    assert not torch.equal(run(row, [change(seat)], [10], device).choices, first)
    assert not torch.equal(run(row, [seat], [11], device).choices, first)

"""The choice of tokens in plain torch, from the same tensors as the kernels read; and what its tests draw."""

from dataclasses import dataclass, field
from typing import Any

import torch

from engine.kernels import token_scores as fields
from engine.kernels.choose_tokens import MAX_TOP, Choices, DraftRows, HostTokens, choice_workspace, choose_tokens
from engine.kernels.token_scores import SeatTensors, seat_tensors
from engine.sampling.noise import gumbel_noise
from engine.sampling.sampler import filter_tokens, token_logprobs


@dataclass(frozen=True)
class Seat:
    """What one seat wants, in the words of SamplingParams; `states` is its row of token states, if it has any."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    seed: int = 0
    choice_index: int = 0
    masked_until: int = 0
    num_logprobs: int = -1
    counted: bool = False
    states: torch.Tensor | None = None
    biases: list[float] = field(default_factory=list)

    def write(self, tensors: SeatTensors, seat: int) -> None:
        vocab_size = tensors.token_states.shape[1]
        flags = fields.SAMPLED.value * (self.temperature > 0)
        if self.temperature > 0 and (self.top_k or self.top_p < 1.0 or self.min_p):
            flags |= fields.FILTERED.value
        flags |= fields.ADJUSTED.value * (self.states is not None) | fields.COUNTED.value * self.counted
        row = tensors.parameters[seat]
        for place, value in (
            (fields.TEMPERATURE, self.temperature),
            (fields.TOP_P, self.top_p),
            (fields.MIN_P, self.min_p),
            (fields.REPETITION, self.repetition),
            (fields.PRESENCE, self.presence),
            (fields.FREQUENCY, self.frequency),
        ):
            row[place.value] = torch.tensor(value, dtype=torch.float64).view(torch.int64)
        for place, number in (
            (fields.FLAGS, flags),
            (fields.TOP_K, min(self.top_k or vocab_size, vocab_size)),
            (fields.SEED, self.seed),
            (fields.CHOICE_INDEX, self.choice_index),
            (fields.MASKED_UNTIL, self.masked_until),
            (fields.NUM_LOGPROBS, min(self.num_logprobs, vocab_size)),
        ):
            row[place.value] = number
        if self.states is not None:
            tensors.token_states[seat] = self.states.to(row.device)
        tensors.biases[seat, 1 : 1 + len(self.biases)] = torch.tensor(self.biases)


def twin(row: torch.Tensor, seat: Seat, position: int) -> tuple[bool, int]:
    """One row of logits, on the CPU: whether it has one, and its next token. position: of the row's own token."""
    if not bool(torch.isfinite(row.max())):
        return False, 0
    values = row
    if seat.states is not None:
        place = (seat.states >> fields.BIAS_SHIFT) & (fields.BIAS_PLACES - 1)
        count = (seat.states >> fields.COUNT_SHIFT) & fields.MAX_COUNT
        values = values + torch.tensor([0.0, *seat.biases])[place]
        seen = ((seat.states & fields.IN_PROMPT) != 0) | (count > 0)
        penalised = torch.where(values > 0, values / seat.repetition, values * seat.repetition)
        values = torch.where(seen, penalised, values)
        values = torch.where(count > 0, values - (seat.frequency * count.float() + seat.presence), values)
        masked = ((seat.states & fields.STOPS) != 0) & (position + 1 < seat.masked_until)
        values = values.masked_fill(masked, float("-inf"))
    if bool(values.max() == float("-inf")):
        return False, 0
    if seat.temperature == 0:
        return True, int(values.argmax())
    scaled, ids = filter_tokens(values / seat.temperature, seat.top_k, seat.top_p, seat.min_p)
    return True, int(ids[(scaled + gumbel_noise(ids, seat.seed, seat.choice_index, position + 1)).argmax()])


@dataclass(frozen=True)
class Outcome:
    """Of S rows, on the CPU: choices int64 [S, 2], logprob ids and values [S, 1 + MAX_TOP], and the token states.

    host_choices: int64 [2, S + 1, 2], the memory in which the host finds the choices, -1 where nobody wrote.
    """

    choices: torch.Tensor
    host_choices: torch.Tensor
    logprob_ids: torch.Tensor
    logprobs: torch.Tensor
    token_states: torch.Tensor


def run(
    logits: torch.Tensor,
    seats: list[Seat | None],
    positions: list[int],
    device: str,
    half: int | None = None,
    drafts: list[list[int]] | None = None,
) -> Outcome:
    """The kernels on some rows, each in a seat of its own; None for a row of nobody. half: of the host's choices.

    drafts: of each row, the tokens before it that the states of its seat do not know of.
    """
    num_rows, vocab_size = logits.shape
    on = torch.device(device)
    tensors, workspace = seat_tensors(num_rows, vocab_size, on), choice_workspace(num_rows, vocab_size, on)
    order = [num_rows - 1 - place for place in range(num_rows)]  # seats are not rows
    for row, seat in enumerate(seats):
        if seat is not None:
            seat.write(tensors, order[row])
    places = [-1 if seat is None else order[row] for row, seat in enumerate(seats)]
    shape = (num_rows, 1 + MAX_TOP)
    host_choices = torch.full((2, num_rows + 1, 2), -1, dtype=torch.int64, pin_memory=on.type == "cuda")
    host = None if half is None else HostTokens(host_choices, torch.tensor([half], dtype=torch.int32, device=on))
    out = Choices(
        torch.full((num_rows, 2), -1, dtype=torch.int64, device=on),
        torch.full(shape, -1, dtype=torch.int32, device=on),
        torch.full(shape, float("nan"), device=on),
        host,
    )
    choose_tokens(
        logits.to(on),
        torch.tensor(places, dtype=torch.int32, device=on),
        torch.tensor(positions, device=on),
        tensors,
        workspace,
        out,
        None if drafts is None else _draft_rows(drafts, on),
    )
    states = tensors.token_states[order]
    return Outcome(out.tokens.cpu(), host_choices, out.logprob_ids.cpu(), out.logprobs.cpu(), states.cpu())


def _draft_rows(drafts: list[list[int]], device: torch.device) -> DraftRows:
    """As a step has them: each row of logits is behind a row of its own, and further rows lie between them."""
    token_ids: list[int] = []
    rows = []
    for tokens in drafts:
        token_ids += [7, *tokens]
        rows.append(len(token_ids) - 1)
    counts = [len(tokens) for tokens in drafts]
    return DraftRows(
        torch.tensor(token_ids, device=device),
        torch.tensor(rows, device=device),
        torch.tensor(counts, dtype=torch.int32, device=device),
    )


class Draw:
    """Reproducible rows and seats."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._generator = torch.Generator().manual_seed(seed)

    def number(self, stop: int) -> int:
        return int(torch.randint(stop, (1,), generator=self._generator))

    def of(self, *values: Any) -> Any:
        return values[self.number(len(values))]

    def row(self) -> torch.Tensor:
        """Logits of any spread, some with many ties, some with tokens that cannot come."""
        row = torch.randn(self.vocab_size, generator=self._generator) * self.of(0.0, 0.1, 1.0, 4.0, 20.0)
        kind = self.number(4)
        if kind == 0:
            row = row.bfloat16().float()
        elif kind == 1:
            row = row.round()
        elif kind == 2:
            row[torch.rand(self.vocab_size, generator=self._generator) < 0.7] = float("-inf")
            row[self.number(self.vocab_size)] = 1.0
        return row

    def seat(self) -> Seat:
        adjusted = self.number(3) == 0
        return Seat(
            temperature=self.of(0.0, 1e-5, 0.3, 0.7, 1.0, 1.5, 100.0),
            top_k=self.of(0, 0, 1, 2, 40, 63, self.vocab_size - 1, 2 * self.vocab_size),
            top_p=self.of(1.0, 1.0, 0.999999, 0.95, 0.5, 1e-6),
            min_p=self.of(0.0, 0.0, 0.01, 0.3, 1.0),
            seed=self.of(0, 1, 1 << 32, (1 << 63) - 1, self.number(1 << 62)),
            choice_index=self.number(3),
            masked_until=self.of(0, 50, 1000),
            num_logprobs=self.of(-1, -1, 0, 1, 20),
            repetition=self.of(0.5, 1.0, 1.3) if adjusted else 1.0,
            presence=self.of(0.0, -1.5, 0.7) if adjusted else 0.0,
            frequency=self.of(0.0, 0.3, -0.2) if adjusted else 0.0,
            counted=adjusted and self.number(2) == 0,
            states=self._states() if adjusted else None,
            biases=[self.of(-100.0, 3.3, 10.0) for _ in range(79)] if adjusted else [],
        )

    def _states(self) -> torch.Tensor:
        def some(share: float) -> torch.Tensor:
            return (torch.rand(self.vocab_size, generator=self._generator) < share).int()

        places = torch.randint(80, (self.vocab_size,), generator=self._generator, dtype=torch.int32)
        counts = torch.randint(9, (self.vocab_size,), generator=self._generator, dtype=torch.int32)
        return (
            some(0.3) * fields.IN_PROMPT
            | some(0.05) * fields.STOPS
            | (some(0.1) * places << fields.BIAS_SHIFT)
            | (some(0.2) * counts << fields.COUNT_SHIFT)
        )


def assert_logprobs(outcome: Outcome, place: int, row: torch.Tensor, num_logprobs: int) -> None:
    """Of one row: those of the chosen token and of the likeliest, in order."""
    expected = token_logprobs(row, int(outcome.choices[place, 1]), num_logprobs)
    stop = 1 + len(expected.top)
    values = torch.tensor([expected.logprob, *(value for _, value in expected.top)])
    assert outcome.logprob_ids[place, 0] == outcome.choices[place, 1]
    # By the logits themselves: some that differ have equal log-probabilities, and the host then goes by the id.
    likeliest = row.sort(descending=True, stable=True).indices[:num_logprobs]
    assert outcome.logprob_ids[place, 1:stop].tolist() == likeliest.tolist()
    assert torch.allclose(outcome.logprobs[place, :stop], values, rtol=1e-6, atol=2e-6 + 1e-7 * float(row.abs().max()))
    assert (outcome.logprob_ids[place, stop:] == -1).all()

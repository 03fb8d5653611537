"""Sampling on the device, inside a step's CUDA graph: what it knows of each request, and how that is kept up to date.

A request that runs has a seat. Its parameters, and where it has penalties, a bias or tokens that may not come yet, a
state for each token, are written when it takes the seat; from then on the device counts the chosen tokens itself. All
writes go through the stream that the steps run in: behind the steps that are under way, which may still concern the
seat's last request, and ahead of the next. What a step computes for a request that has ended touches only its seat.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import SampledToken
from engine.kernels import token_scores as fields
from engine.kernels.choose_tokens import MAX_TOP, Choices, DraftRows, HostTokens, choice_workspace, choose_tokens
from engine.kernels.token_scores import SEAT_FIELDS, seat_tensors
from engine.request import MAX_LOGPROBS, Request, TokenLogprobs
from engine.sampling.greedy import NOT_NUMBERS

assert MAX_TOP >= MAX_LOGPROBS


@dataclass(frozen=True)
class RowLogprobs:
    """Log-probabilities of some rows, on their way to the host: ids int32 and values float32 [S, 1 + MAX_TOP]. The
    chosen token's first, then those of the likeliest; rows that do not ask for them hold anything."""

    ids: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]


class DeviceSampler:
    """engine.sampling.sampler.Sampler for the device: equal but for the last bit of a logarithm."""

    def __init__(self, vocab_size: int, max_seats: int, max_rows: int, device: torch.device) -> None:
        """max_rows: of logits in a step."""
        self._vocab_size = vocab_size
        self._on_gpu = device.type == "cuda"
        self._tensors = seat_tensors(max_seats, vocab_size, device)
        self._workspace = choice_workspace(max_rows, vocab_size, device)
        shape = (max_rows, 1 + MAX_TOP)
        self._logprob_ids = torch.zeros(shape, dtype=torch.int32, device=device)
        self._logprobs = torch.zeros(shape, device=device)
        # Twice, as everything that the device may be writing while the host still reads the last step's.
        self._host_logprobs = [
            (
                torch.zeros(shape, dtype=torch.int32, pin_memory=self._on_gpu),
                torch.zeros(shape, pin_memory=self._on_gpu),
            )
            for _ in range(2)
        ]
        self._plain = _plain_row()
        self._rows = [self._plain] * max_seats  # as the device has them
        self._requests: list[tuple[Request, int] | None] = [None] * max_seats  # with their preemptions by then
        # Of seats whose tokens are counted: how many the states know of, where the host does the counting.
        self._num_counted: list[int | None] = [None] * max_seats

    def supports(self, request: Request) -> bool:
        """Whether the device can choose this request's tokens; depends on nothing but what was asked for."""
        sampling = request.sampling
        return len(sampling.logit_bias) < fields.BIAS_PLACES and sampling.max_tokens <= fields.MAX_COUNT

    def assign(self, seat: int, request: Request) -> None:
        """Make a seat this request's, in the current stream, if it is not already. Does not wait for the device.

        A request that comes back after a preemption has its counts rebuilt. One that the device does not support gets a
        plainly greedy seat: its tokens are to be chosen on the host.
        """
        if self._requests[seat] == (request, request.num_preemptions):
            return
        row = self._parameter_row(request) if self.supports(request) else self._plain
        if row[fields.FLAGS.value] & fields.ADJUSTED.value:
            assert not request.num_pending_tokens, "a request keeps its seat while a token is pending"
            self._send(self._token_states(request), self._tensors.token_states[seat])
            if request.sampling.logit_bias:
                biases = np.fromiter(request.sampling.logit_bias.values(), np.float32)
                self._send(biases, self._tensors.biases[seat, 1 : 1 + len(biases)])
        self._write_row(seat, row)
        self._requests[seat] = (request, request.num_preemptions)
        self._num_counted[seat] = None

    def follow_drafts(self, seat: int, request: Request, has_drafts: bool) -> None:
        """Ahead of a step in which the seat's request has drafts or has none, with no token pending if it has.

        Which of its rows' tokens will be kept is not known on the device: from a step with drafts to the next without,
        the host counts them.
        """
        row, num_counted = self._rows[seat], self._num_counted[seat]
        if num_counted is None:
            if not has_drafts or not row[fields.FLAGS.value] & fields.COUNTED.value:
                return
        elif missing := request.output_token_ids[num_counted:]:
            ids = torch.from_numpy(np.array(missing, np.int64)).to(self._tensors.token_states.device)
            ones = torch.full_like(ids, 1 << fields.COUNT_SHIFT, dtype=torch.int32)
            self._tensors.token_states[seat].index_add_(0, ids, ones)
        self._num_counted[seat] = len(request.output_token_ids) if has_drafts else None
        flags = row[fields.FLAGS.value] & ~fields.COUNTED.value
        if not has_drafts:
            flags |= fields.COUNTED.value
        self._write_row(seat, [*row[: fields.FLAGS.value], flags, *row[fields.FLAGS.value + 1 :]])

    def _write_row(self, seat: int, row: list[int]) -> None:
        if row != self._rows[seat]:
            self._send(np.array(row, np.int64), self._tensors.parameters[seat])
            self._rows[seat] = row

    def forget(self) -> None:
        """Write every seat anew: a step that failed may have counted tokens that nobody will see."""
        self._requests = [None] * len(self._requests)

    def choose(
        self,
        logits: torch.Tensor,
        seats: torch.Tensor,
        positions: torch.Tensor,
        choices: torch.Tensor,
        host: HostTokens | None = None,
        drafts: DraftRows | None = None,
    ) -> None:
        """Choose each row's next token; may run inside a CUDA graph. Does not wait for the device.

        logits: float32 [S, vocab_size]. seats: int32 [S], negative for rows of nobody. positions: int64 [S], of each
        row's own token. choices: int64 [S, 2], filled as by `greedy_choices`; `host` too. drafts: see there.
        """
        out = Choices(choices, self._logprob_ids, self._logprobs, host)
        choose_tokens(logits, seats, positions, self._tensors, self._workspace, out, drafts)

    def fetch_logprobs(self, num_rows: int, parity: int) -> RowLogprobs:
        """Start copying the log-probabilities of the step just launched to the host.

        parity: of the step. They are there when the stream has got to this point, until the step after the next.
        """
        ids, values = (host[:num_rows] for host in self._host_logprobs[parity])
        ids.copy_(self._logprob_ids[:num_rows], non_blocking=True)
        values.copy_(self._logprobs[:num_rows], non_blocking=True)
        return RowLogprobs(ids.numpy(), values.numpy())

    def details(
        self, requests: Sequence[Request], choices: npt.NDArray[np.int64], logprobs: RowLogprobs | None
    ) -> Mapping[int, SampledToken]:
        """By place, the outcomes that are more than a token id: errors, and tokens with log-probabilities.

        choices: [len(requests), 2], of requests that the device supports. logprobs: None where no request asks.
        """
        found = {}
        for place, request in enumerate(requests):
            is_finite, token_id = choices[place].tolist()
            if not is_finite:
                found[place] = SampledToken(error=NOT_NUMBERS)
            elif request.sampling.logprobs is not None:
                assert logprobs is not None
                stop = 1 + min(request.sampling.logprobs, self._vocab_size)
                ids, (chosen, *values) = logprobs.ids[place, 1:stop].tolist(), logprobs.values[place, :stop].tolist()
                found[place] = SampledToken(token_id, TokenLogprobs(chosen, tuple(zip(ids, values, strict=True))))
        return found

    def _parameter_row(self, request: Request) -> list[int]:
        sampling = request.sampling
        top_k = min(sampling.top_k or self._vocab_size, self._vocab_size)
        flags = 0
        if not sampling.is_greedy:
            flags |= fields.SAMPLED.value
            if top_k < self._vocab_size or sampling.top_p < 1.0 or sampling.min_p > 0.0:
                flags |= fields.FILTERED.value
        if sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty:
            flags |= fields.COUNTED.value | fields.ADJUSTED.value
        if sampling.logit_bias or (sampling.min_tokens and request.stop_ids):
            flags |= fields.ADJUSTED.value
        row = list(self._plain)
        row[fields.FLAGS.value] = flags
        row[fields.NUM_LOGPROBS.value] = -1 if sampling.logprobs is None else min(sampling.logprobs, self._vocab_size)
        if flags & fields.SAMPLED.value:
            assert sampling.seed is not None, "a seed is assigned at admission"
            row[fields.TEMPERATURE.value] = _bits(sampling.temperature)
            row[fields.TOP_K.value] = top_k
            row[fields.TOP_P.value] = _bits(sampling.top_p)
            row[fields.MIN_P.value] = _bits(sampling.min_p)
            row[fields.SEED.value] = sampling.seed
            row[fields.CHOICE_INDEX.value] = request.choice_index
        if flags & fields.ADJUSTED.value:
            row[fields.REPETITION.value] = _bits(sampling.repetition_penalty)
            row[fields.PRESENCE.value] = _bits(sampling.presence_penalty)
            row[fields.FREQUENCY.value] = _bits(sampling.frequency_penalty)
            row[fields.MASKED_UNTIL.value] = request.num_prompt_tokens + sampling.min_tokens
        return row

    def _token_states(self, request: Request) -> npt.NDArray[np.int32]:
        """What the device has to know of each token: int32 [vocab_size]."""
        states = np.zeros(self._vocab_size, np.int32)
        states[request.prompt_token_ids] = fields.IN_PROMPT
        states[list(request.stop_ids)] |= fields.STOPS
        biased = list(request.sampling.logit_bias)
        states[biased] |= np.arange(1, 1 + len(biased), dtype=np.int32) << fields.BIAS_SHIFT
        counts = np.bincount(np.array(request.output_token_ids, np.int64), minlength=self._vocab_size)
        states |= counts.astype(np.int32) << fields.COUNT_SHIFT
        return states

    def _send(self, values: npt.NDArray[np.generic], to: torch.Tensor) -> None:
        """Copy behind whatever runs in the current stream. The allocator of pinned memory keeps it until then."""
        host = torch.from_numpy(values)
        to.copy_(host.pin_memory() if self._on_gpu else host, non_blocking=True)


def _bits(value: float) -> int:
    return int(np.float64(value).view(np.int64))


def _plain_row() -> list[int]:
    """A plainly greedy seat, as `seat_tensors` makes them."""
    row = [0] * SEAT_FIELDS
    row[fields.NUM_LOGPROBS.value] = -1
    return row

"""Calls the Triton decoder through CUDA graphs, one for each shape that steps are padded to."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import SampledToken, ScheduledChunk
from engine.config import SchedulerConfig
from engine.kernels.choose_tokens import DraftRows
from engine.kernels.further_inputs import further_inputs
from engine.kernels.step_inputs import NUM_TURNS, step_inputs
from engine.model.kv_cache import KVCache
from engine.model.triton_decoder import TritonDecoder, TritonInput
from engine.request import Request
from engine.runner.block_tables import BlockTables
from engine.runner.staged_step import ChunkLists
from engine.runner.step_buckets import Bucket, StepBuckets
from engine.sampling.device_sampler import DeviceSampler, RowLogprobs

_is_pending = attrgetter("num_pending_tokens")


@dataclass(frozen=True)
class _Launched:
    """A forward.StepLogits under way: `arrived` is recorded behind it, when its choices are on the host."""

    decoder: TritonDecoder
    sampler: DeviceSampler
    num_choices: int
    host_choices: npt.NDArray[np.int64]
    logprobs: RowLogprobs | None
    arrived: torch.cuda.Event | None

    @property
    def logits(self) -> torch.Tensor:
        return self.decoder.logits(self.num_choices)

    def choices(self) -> npt.NDArray[np.int64]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host_choices[: self.num_choices]

    def details(self, requests: Sequence[Request]) -> Mapping[int, SampledToken]:
        return self.sampler.details(requests, self.choices(), self.logprobs)


class GraphForward:
    """A forward.Forward.

    One step may be launched while the one before it runs: its pending tokens come from that one's choices, which stay
    on the device. A bucket that is used before `warm_up` or `prepare_next` got to it compiles its kernels at its first
    step, and is captured at the second. Under Triton's interpreter (device cpu) the same calls run without graphs.

    Steps take turns with the memory that host and device share. The device changes over by itself, once for each step
    that it runs (see `step_inputs`); the host counts those that it has launched. Wherever one of the two may have
    missed one, `_recover` sets the device right.
    """

    feeds_back = True

    def __init__(self, decoder: TritonDecoder, make_kv_cache: Callable[[], KVCache], limits: SchedulerConfig) -> None:
        self.decoder = decoder
        self._on_gpu = decoder.device.type == "cuda"
        max_logit_rows = limits.max_logit_rows
        self._verifies = limits.max_draft_tokens > 0
        self._buckets = StepBuckets(limits.token_budget, max_logit_rows, self._verifies, decoder.device)
        self.padded_sizes: Sequence[int] = self._buckets.sizes
        decoder.reserve(self._buckets.sizes[-1], max_logit_rows)
        self._sampler = DeviceSampler(decoder.config.vocab_size, limits.max_num_seqs, max_logit_rows, decoder.device)
        self._graph_memory = torch.cuda.graph_pool_handle() if self._on_gpu else None
        self._arrived = [torch.cuda.Event() if self._on_gpu else None for _ in range(NUM_TURNS)]
        self._num_steps = 0
        # Of the last step: its bucket; the requests that sampled, with their places among its choices; whether one of
        # them asks for log-probabilities; and all its requests in order, if each of its rows sampled.
        self._last: Bucket | None = None
        self._choice_of: dict[Request, int] = {}
        self._wants_logprobs = False
        self._decoding: list[Request] = []
        self.kv_cache = make_kv_cache()  # takes what memory is left
        blocks = -(-limits.max_model_len // self.kv_cache.block_size)
        self._block_tables = BlockTables(limits.max_num_seqs, blocks, decoder.device)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    def launch(self, chunks: Sequence[ScheduledChunk], num_further: int = 0) -> _Launched:
        with self._turn() as parity:
            bucket, num_choices = self._stage(chunks, parity, num_further)
            self._start(bucket)
            logprobs = self._sampler.fetch_logprobs(num_choices, parity) if self._wants_logprobs else None
        return self._launched(num_choices, logprobs)

    def launch_further(self) -> _Launched:
        assert self._last is not None
        assert not self._wants_logprobs
        num_choices = len(self._choice_of)
        with self._turn(stages=False):
            bucket = self._buckets.going_on(num_choices)
            assert len(bucket.choices) <= len(self._last.choices), "the last step has not said who its rows are"
            self._start(bucket)
            self._last, self._decoding = bucket, []
        return self._launched(num_choices, None)

    def _launched(self, num_choices: int, logprobs: RowLogprobs | None) -> _Launched:
        """The step whose turn is just over."""
        turn = (self._num_steps - 1) % NUM_TURNS
        host_choices, arrived = self._buckets.host_choices[turn], self._arrived[turn]
        return _Launched(self.decoder, self._sampler, num_choices, host_choices, logprobs, arrived)

    @torch.inference_mode()
    def score(self, chunk: ScheduledChunk) -> torch.Tensor:
        with self._turn() as parity:
            num_rows = chunk.num_scheduled_tokens
            bucket = self._buckets.holding(num_rows, num_rows, decodes=False)
            lists, seats = ChunkLists.of([chunk], {}), np.array(self._block_tables.seats([chunk]), np.int32)
            staging = bucket.staging[parity]
            staging.write(lists, seats)
            num_needed = -(-np.array(lists.stops, np.int32) // self.kv_cache.block_size)
            self._block_tables.write_updates([chunk], seats, num_needed, staging.updates, parity)
            self._decoding, self._choice_of = [], {}
            step = replace(self._make_input(bucket), logit_rows=torch.arange(num_rows, device=self.decoder.device))
            return self.decoder.forward(step, self.kv_cache)

    def chooses(self, request: Request) -> bool:
        return self._sampler.supports(request)

    def warm_up(self, on_progress: Callable[[int, int], None]) -> None:
        wanted = self._buckets.most_wanted() if self._on_gpu else []
        for done, bucket in enumerate(wanted, start=1):
            self._prepare(bucket)
            on_progress(done, len(wanted))

    def prepare_next(self) -> bool:
        if not self._on_gpu:
            return False
        unprepared = [bucket for bucket in self._buckets.all() if bucket.graph is None]
        if unprepared:
            self._prepare(unprepared[0])
        return len(unprepared) > 1

    def launch_all(self) -> None:
        """Launch the step of every bucket, whatever is staged: for engine.precompile, where no launch runs."""
        for bucket in self._buckets.all():
            self._run(bucket)
        self._run(self._buckets.going_on(1))

    @contextmanager
    def _turn(self, *, stages: bool = True) -> Iterator[int]:
        """One step, staged in the half of the memory that this yields, and launched: counted, or recovered from.

        If it `stages` something, waits first for the step before the last, whose half is written anew: not at all,
        where that step has been read.
        """
        parity = self._num_steps % 2
        before_last = self._arrived[(self._num_steps - 2) % NUM_TURNS]
        if stages and before_last is not None:
            before_last.synchronize()
        arrived = self._arrived[self._num_steps % NUM_TURNS]
        try:
            yield parity
            if arrived is not None:
                arrived.record()
            self._num_steps += 1
        except BaseException:
            self._recover()
            raise

    def _recover(self) -> None:
        """After a step of which it is not known what has reached the device: start from nothing, in step with it."""
        self._block_tables.forget()
        self._sampler.forget()
        self._decoding = []
        if self._on_gpu:
            torch.cuda.synchronize()  # the failed step may be about to read the half that is staged next
        self._buckets.turn.fill_((self._num_steps - 1) % NUM_TURNS)

    def _stage(self, chunks: Sequence[ScheduledChunk], parity: int, num_further: int) -> tuple[Bucket, int]:
        """Write the step down on the host. Returns the bucket, and how many of its choices are wanted.

        Where the requests of the last step decode once more, and only they do, next to nothing is written anew.
        """
        tables, block_size = self._block_tables, self.kv_cache.block_size
        requests = [chunk.request for chunk in chunks]
        # A request with a pending token has lost neither blocks nor seat since the step that is choosing that token.
        if self._last is not None and requests == self._decoding and all(map(_is_pending, requests)):
            bucket, num_choices = self._last, len(requests)
            staging = bucket.staging[parity]
            staging.follow(bucket.staging[1 - parity], num_choices)
            seats, stops = staging.seats[:num_choices], staging.positions[:num_choices] + 1
        else:
            lists = ChunkLists.of(chunks, self._choice_of)
            num_choices = len(lists.logit_rows)
            num_rows = len(lists.token_ids)
            decodes = num_rows == num_choices == len(chunks)
            bucket = self._last = self._buckets.holding(num_rows, num_choices, decodes)
            staging = bucket.staging[parity]
            taken = tables.seats(chunks)
            for seat, request in zip(taken, requests, strict=True):
                self._sampler.assign(seat, request)
            if self._verifies:
                for seat, chunk in zip(taken, chunks, strict=True):
                    self._sampler.follow_drafts(seat, chunk.request, bool(chunk.draft_token_ids))
            seats, stops = np.array(taken, np.int32), np.array(lists.stops, np.int32)
            staging.write(lists, seats)
            # Behind a step with drafts no token is pending, and nobody asks.
            self._choice_of = {request: place for place, request in enumerate(lists.sampling)}
            self._wants_logprobs = any(request.sampling.logprobs is not None for request in lists.sampling)
            self._decoding = requests if decodes else []
        num_needed = -(-(stops + num_further) // block_size)
        tables.write_updates(chunks, seats, num_needed, staging.updates, parity)
        return bucket, num_choices

    def _start(self, bucket: Bucket) -> None:
        """Start the step that is staged, behind whatever runs on the device."""
        if bucket.graph is None and bucket.has_run and self._on_gpu:
            bucket.graph = self._capture(bucket)
        if bucket.graph is not None:
            bucket.graph.replay()
        else:
            self._run(bucket)
            bucket.has_run = True

    @torch.inference_mode()
    def _run(self, bucket: Bucket) -> None:
        """The whole step on the device, from what is staged to its choices."""
        inputs = bucket.inputs
        logits = self.decoder.forward(self._make_input(bucket), self.kv_cache)
        drafts = DraftRows(inputs.token_ids, inputs.logit_rows, inputs.num_drafts) if self._verifies else None
        self._sampler.choose(
            logits, inputs.logit_seats, inputs.logit_positions, bucket.choices, self._buckets.host_tokens, drafts
        )

    def _make_input(self, bucket: Bucket) -> TritonInput:
        """Start turning what is staged, or what was chosen, into the decoder's input."""
        inputs, tables, shared = bucket.inputs, self._block_tables.device_tables, self._buckets
        block_size, choices = self.kv_cache.block_size, shared.last_choices
        if bucket.goes_on:
            further_inputs(shared.turn, choices, tables, block_size, inputs)
        else:
            step_inputs(shared.staged, shared.turn, bucket.layout, choices, tables, block_size, inputs)
        return TritonInput(
            inputs.token_ids,
            inputs.positions,
            inputs.slot_mapping,
            inputs.seats,
            tables,
            inputs.logit_rows,
            bucket.decodes,
        )

    def _capture(self, bucket: Bucket) -> torch.cuda.CUDAGraph:
        """Record the step, which computes nothing and takes no turn. Its kernels are compiled."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._graph_memory):
            self._run(bucket)
        return graph

    def _prepare(self, bucket: Bucket) -> None:
        """Compile and capture a bucket with steps of nobody. The last step's choices are lost: none may be pending."""
        torch.cuda.synchronize()
        while bucket.graph is None:
            with self._turn() as parity:
                bucket.staging[parity].write_nobody()
                self._start(bucket)
                torch.cuda.synchronize()

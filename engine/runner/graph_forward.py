"""Calls the Triton decoder through CUDA graphs, one for each row bucket."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import torch

from engine.batch import ScheduledChunk
from engine.config import SchedulerConfig
from engine.model.kv_cache import KVCache
from engine.model.triton_decoder import TritonDecoder, TritonInput
from engine.request import Request
from engine.runner.block_tables import BlockTables
from engine.runner.step_rows import StepRows
from engine.sampling.greedy import greedy_choices

FIRST_BUCKETS = (1, 16)  # then powers of two; up to 16 rows the kernels' tiles are the same, but for a single row


def row_buckets(token_budget: int) -> tuple[int, ...]:
    """Row counts that steps are padded to, up to the first that holds `token_budget` rows."""
    buckets = list(FIRST_BUCKETS)
    while buckets[-1] < token_budget:
        buckets.append(2 * buckets[-1])
    return tuple(buckets)


@dataclass
class _Bucket:
    """Where the inputs of a step of `num_rows` rows lie, and the graph that reads them there.

    staging: on the host, twice, since the device may still be reading the last step's: token ids, sources, positions,
    slots, rows of the block tables, logit rows. inputs: the same on the device, once.
    """

    num_rows: int
    num_logit_rows: int
    staging: tuple[torch.Tensor, torch.Tensor]
    inputs: torch.Tensor
    graph: torch.cuda.CUDAGraph | None = None
    has_run: bool = False


@dataclass(frozen=True)
class _Launched:
    """A forward.StepLogits under way: `arrived` is recorded behind the copy of its choices to the host."""

    logits: torch.Tensor
    host_choices: torch.Tensor
    arrived: torch.cuda.Event | None

    def choices(self) -> torch.Tensor:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host_choices


class GraphForward:
    """A forward.Forward. A bucket's graph is captured at its second step; the first compiles its kernels.

    One step may be launched while the one before it runs: its pending tokens come from that one's choices, which stay
    on the device. Under Triton's interpreter (device cpu) the same calls run without graphs.
    """

    feeds_back = True

    def __init__(self, decoder: TritonDecoder, make_kv_cache: Callable[[], KVCache], limits: SchedulerConfig) -> None:
        self.decoder = decoder
        self._on_gpu = decoder.device.type == "cuda"
        self._max_logit_rows = min(limits.max_num_seqs, limits.token_budget)
        self._bucket_sizes = row_buckets(limits.token_budget)
        self._buckets: dict[int, _Bucket] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None
        decoder.reserve(self._bucket_sizes[-1], self._max_logit_rows)
        shape = (self._max_logit_rows, 2)
        self._choices = torch.zeros(shape, dtype=torch.int64, device=decoder.device)  # of the last step
        self._host_choices = [torch.zeros(shape, dtype=torch.int64, pin_memory=self._on_gpu) for _ in range(2)]
        self._choice_of: dict[Request, int] = {}
        self._num_steps = 0
        self.kv_cache = make_kv_cache()  # takes what memory is left
        blocks = -(-limits.max_model_len // self.kv_cache.block_size)
        self._block_tables = BlockTables(limits.max_num_seqs, blocks, decoder.device)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    @torch.inference_mode()
    def launch(self, chunks: Sequence[ScheduledChunk]) -> _Launched:
        rows = StepRows.of(chunks, self.kv_cache.block_size, self._choice_of)
        num_wanted = len(rows.logit_rows)
        bucket = self._bucket(len(rows.token_ids))
        self._send(bucket, rows, chunks)
        if bucket.graph is not None:
            bucket.graph.replay()
        elif bucket.has_run and self._on_gpu:
            self._capture(bucket)
        else:
            self._run(bucket)
            bucket.has_run = True
        self._choice_of = {chunk.request: place for place, chunk in enumerate(c for c in chunks if c.samples)}
        return self._fetch_choices(num_wanted)

    def _fetch_choices(self, num_wanted: int) -> _Launched:
        """Start copying the step's choices to the host, to the place that the step before the last one used."""
        host = self._host_choices[self._num_steps % 2][:num_wanted]
        self._num_steps += 1
        host.copy_(self._choices[:num_wanted], non_blocking=True)  # contiguous, or torch would wait
        arrived = None
        if self._on_gpu:
            arrived = torch.cuda.Event()
            arrived.record()
        return _Launched(self.decoder.logits(num_wanted), host, arrived)

    def _bucket(self, num_rows: int) -> _Bucket:
        size = next(size for size in self._bucket_sizes if size >= num_rows)
        bucket = self._buckets.get(size)
        if bucket is None:
            wanted = min(size, self._max_logit_rows)
            first, second = (
                torch.zeros(5 * size + wanted, dtype=torch.int64, pin_memory=self._on_gpu) for _ in range(2)
            )
            inputs = torch.zeros_like(first, device=self.decoder.device)
            bucket = self._buckets[size] = _Bucket(size, wanted, (first, second), inputs)
        return bucket

    def _send(self, bucket: _Bucket, rows: StepRows, chunks: Sequence[ScheduledChunk]) -> None:
        """Write the step's inputs to the device, behind whatever runs there."""
        num_rows, num_wanted = len(rows.token_ids), len(rows.logit_rows)
        table_rows = self._block_tables.update(chunks)
        requests = chain.from_iterable(
            repeat(row, chunk.num_scheduled_tokens) for row, chunk in zip(table_rows, chunks, strict=True)
        )
        rows.pad(bucket.num_rows)
        values = [*rows.token_ids, *rows.sources, *rows.positions, *rows.slots, *requests]
        values += [-1] * (bucket.num_rows - num_rows)
        values += rows.logit_rows
        values += [0] * (bucket.num_logit_rows - num_wanted)
        staging = bucket.staging[self._num_steps % 2]
        staging.copy_(torch.tensor(values))
        bucket.inputs.copy_(staging, non_blocking=True)

    def _run(self, bucket: _Bucket) -> None:
        """The whole step on the device, from its inputs to its choices."""
        size = bucket.num_rows
        sizes = [size] * 5 + [bucket.num_logit_rows]
        token_ids, sources, positions, slots, requests, logit_rows = bucket.inputs.split(sizes)
        fed_back = self._choices[:, 1].index_select(0, sources.clamp(min=0))
        token_ids = torch.where(sources < 0, token_ids, fed_back)
        tables = self._block_tables.device_tables
        step = TritonInput(token_ids, positions, slots, requests.int(), tables, logit_rows)
        logits = self.decoder.forward(step, self.kv_cache)
        self._choices[: bucket.num_logit_rows].copy_(greedy_choices(logits))

    def _capture(self, bucket: _Bucket) -> None:
        """Record the step and run it. Its inputs are in place: recording itself computes nothing."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool):
            self._run(bucket)
        bucket.graph = graph
        graph.replay()

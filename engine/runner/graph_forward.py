"""Calls the Triton decoder through CUDA graphs, one for each row bucket."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import torch

from engine.batch import ScheduledChunk
from engine.config import SchedulerConfig
from engine.model.kv_cache import KVCache
from engine.model.triton_decoder import TritonDecoder, TritonInput
from engine.runner.block_tables import BlockTables
from engine.runner.step_rows import StepRows

FIRST_BUCKETS = (1, 16)  # then powers of two; up to 16 rows the kernels' tiles are the same, but for a single row


def row_buckets(token_budget: int) -> tuple[int, ...]:
    """Row counts that steps are padded to, up to the first that holds `token_budget` rows."""
    buckets = list(FIRST_BUCKETS)
    while buckets[-1] < token_budget:
        buckets.append(2 * buckets[-1])
    return tuple(buckets)


@dataclass
class _Bucket:
    """Where the inputs of a step of `num_rows` rows lie, and the graph that reads them there."""

    num_rows: int
    num_logit_rows: int
    staging: torch.Tensor  # on the host: token_ids, positions, slots, rows of the block tables, logit rows
    inputs: torch.Tensor  # the same on the device
    row_request: torch.Tensor
    graph: torch.cuda.CUDAGraph | None = None
    logits: torch.Tensor | None = None


class GraphForward:
    """A model_runner.Forward. A bucket's graph is captured at its second step; the first compiles its kernels.

    Under Triton's interpreter (device cpu) the same calls run without graphs.
    """

    def __init__(self, decoder: TritonDecoder, make_kv_cache: Callable[[], KVCache], limits: SchedulerConfig) -> None:
        self.decoder = decoder
        self._max_logit_rows = min(limits.max_num_seqs, limits.token_budget)
        self._bucket_sizes = row_buckets(limits.token_budget)
        self._buckets: dict[int, _Bucket] = {}
        self._pool = torch.cuda.graph_pool_handle() if decoder.device.type == "cuda" else None
        decoder.reserve(self._bucket_sizes[-1], self._max_logit_rows)
        self.kv_cache = make_kv_cache()  # takes what memory is left
        blocks = -(-limits.max_model_len // self.kv_cache.block_size)
        self._block_tables = BlockTables(limits.max_num_seqs, blocks, decoder.device)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    def __call__(self, chunks: Sequence[ScheduledChunk]) -> torch.Tensor:
        rows = StepRows.of(chunks, self.kv_cache.block_size)
        num_wanted = len(rows.logit_rows)
        bucket = self._bucket(len(rows.token_ids))
        self._send(bucket, rows, chunks)
        if bucket.graph is not None:
            bucket.graph.replay()
        elif bucket.logits is None or self.decoder.device.type != "cuda":
            bucket.logits = self._run(bucket)
        else:
            self._capture(bucket)
        assert bucket.logits is not None
        return bucket.logits[:num_wanted]

    def _bucket(self, num_rows: int) -> _Bucket:
        size = next(size for size in self._bucket_sizes if size >= num_rows)
        bucket = self._buckets.get(size)
        if bucket is None:
            wanted = min(size, self._max_logit_rows)
            on_gpu = self.decoder.device.type == "cuda"
            staging = torch.zeros(4 * size + wanted, dtype=torch.int64, pin_memory=on_gpu)
            inputs = torch.zeros_like(staging, device=self.decoder.device)
            row_request = torch.zeros(size, dtype=torch.int32, device=self.decoder.device)
            bucket = self._buckets[size] = _Bucket(size, wanted, staging, inputs, row_request)
        return bucket

    def _send(self, bucket: _Bucket, rows: StepRows, chunks: Sequence[ScheduledChunk]) -> None:
        """Write the step's inputs to the device, behind whatever runs there."""
        num_rows, num_wanted = len(rows.token_ids), len(rows.logit_rows)
        table_rows = self._block_tables.update(chunks)
        requests = chain.from_iterable(
            repeat(row, chunk.num_scheduled_tokens) for row, chunk in zip(table_rows, chunks, strict=True)
        )
        rows.pad(bucket.num_rows)
        values = [*rows.token_ids, *rows.positions, *rows.slots, *requests]
        values += [-1] * (bucket.num_rows - num_rows)
        values += rows.logit_rows
        values += [0] * (bucket.num_logit_rows - num_wanted)
        bucket.staging.copy_(torch.tensor(values))
        bucket.inputs.copy_(bucket.staging, non_blocking=True)

    def _run(self, bucket: _Bucket) -> torch.Tensor:
        size = bucket.num_rows
        token_ids, positions, slots, requests, logit_rows = bucket.inputs.split([size] * 4 + [bucket.num_logit_rows])
        bucket.row_request.copy_(requests)
        tables = self._block_tables.device_tables
        step = TritonInput(token_ids, positions, slots, bucket.row_request, tables, logit_rows)
        return self.decoder.forward(step, self.kv_cache)

    def _capture(self, bucket: _Bucket) -> None:
        """Record the step and run it. Its inputs are in place: recording itself computes nothing."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool):
            bucket.logits = self._run(bucket)
        bucket.graph = graph
        graph.replay()

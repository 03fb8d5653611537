"""Turns a scheduled step into tensors, runs the decoder, and samples."""

from collections.abc import Sequence

import torch

from engine.batch import SampledToken, ScheduledChunk, ScheduledStep
from engine.kernels.attention_plan import NULL_SLOT, ChunkRows
from engine.model.decoder import Decoder, ModelInput
from engine.model.kv_cache import KVCache
from engine.model.linear import padded_rows
from engine.sampling.sampler import Sampler


class ModelRunner:
    """Owns the device side of an engine: weights and KV cache."""

    def __init__(self, decoder: Decoder, kv_cache: KVCache, sampler: Sampler) -> None:
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._sampler = sampler

    @property
    def dtype(self) -> torch.dtype:
        return self._decoder.dtype

    def run(self, step: ScheduledStep) -> list[SampledToken]:
        """Compute the step's KV and the next token of every chunk that samples, in the order of the chunks.

        Raises:
            torch.OutOfMemoryError, RuntimeError: the device could not do it; no request's earlier KV is touched.
        """
        sampling = [chunk.request for chunk in step.chunks if chunk.samples]
        logits = self._decoder.forward(self._model_input(step.chunks), self._kv_cache)
        return self._sampler.sample(logits, sampling)

    def _model_input(self, chunks: Sequence[ScheduledChunk]) -> ModelInput:
        block_size = self._kv_cache.block_size
        device = self._decoder.device
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[ChunkRows] = []
        logit_rows: list[int] = []
        for chunk in chunks:
            table = chunk.request.block_table
            rows.append(ChunkRows(len(token_ids), chunk.num_scheduled_tokens, chunk.start, table))
            token_ids += chunk.request.token_ids(chunk.start, chunk.stop)
            positions += range(chunk.start, chunk.stop)
            slots += [table[p // block_size] * block_size + p % block_size for p in range(chunk.start, chunk.stop)]
            if chunk.samples:
                logit_rows.append(len(token_ids) - 1)
        # Padding rows: token 0 at position 0, written to the null block, read by nobody.
        padding = padded_rows(len(token_ids), device) - len(token_ids)
        token_ids += [0] * padding
        positions += [0] * padding
        slots += [NULL_SLOT] * padding
        columns = torch.tensor([token_ids, positions, slots], device=device)
        wanted = torch.tensor(logit_rows, dtype=torch.int64, device=device)
        return ModelInput(columns[0], columns[1], columns[2], rows, wanted)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch failed for want of memory, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)

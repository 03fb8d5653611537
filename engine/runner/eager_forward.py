"""Calls the reference decoder step by step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.batch import ScheduledChunk
from engine.kernels.attention_plan import ChunkRows
from engine.model.kv_cache import KVCache
from engine.model.linear import padded_rows
from engine.model.reference_decoder import ReferenceDecoder, ReferenceInput
from engine.runner.step_rows import StepRows
from engine.sampling.greedy import greedy_choices


@dataclass(frozen=True)
class _Computed:
    """A forward.StepLogits that is there already."""

    logits: torch.Tensor

    def choices(self) -> torch.Tensor:
        return greedy_choices(self.logits)


class EagerForward:
    """A forward.Forward that waits for each step."""

    feeds_back = False

    def __init__(self, decoder: ReferenceDecoder, kv_cache: KVCache) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    def launch(self, chunks: Sequence[ScheduledChunk]) -> _Computed:
        rows = StepRows.of(chunks, self.kv_cache.block_size)
        return _Computed(self.decoder.forward(self.make_input(chunks, rows), self.kv_cache))

    def make_input(self, chunks: Sequence[ScheduledChunk], rows: StepRows) -> ReferenceInput:
        """The step's tensors, padded to whole row tiles."""
        device = self.decoder.device
        rows.pad(padded_rows(len(rows.token_ids), device))
        columns = torch.tensor([rows.token_ids, rows.positions, rows.slots], device=device)
        spans: list[ChunkRows] = []
        start = 0
        for chunk in chunks:
            spans.append(ChunkRows(start, chunk.num_scheduled_tokens, chunk.start, chunk.request.block_table))
            start += chunk.num_scheduled_tokens
        wanted = torch.tensor(rows.logit_rows, dtype=torch.int64, device=device)
        return ReferenceInput(columns[0], columns[1], columns[2], spans, wanted)

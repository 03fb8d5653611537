"""Calls the reference decoder step by step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import SampledToken, ScheduledChunk
from engine.kernels.attention_plan import ChunkRows
from engine.model.kv_cache import KVCache
from engine.model.reference_decoder import ReferenceDecoder, ReferenceInput
from engine.request import Request
from engine.runner.step_rows import StepRows
from engine.sampling.greedy import greedy_choices

LARGEST_PADDED = 512  # rows, past which a step takes the longer for each that it has


@dataclass(frozen=True)
class _Computed:
    """A forward.StepLogits that is there already."""

    logits: torch.Tensor

    def choices(self) -> npt.NDArray[np.int64]:
        return greedy_choices(self.logits).numpy()

    def details(self, requests: Sequence[Request]) -> Mapping[int, SampledToken]:  # noqa: ARG002
        return {}  # the host chooses every token


class EagerForward:
    """A forward.Forward that waits for each step."""

    feeds_back = False

    def __init__(self, decoder: ReferenceDecoder, kv_cache: KVCache) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.padded_sizes: Sequence[int] = sorted(
            {decoder.padded_rows(num_rows) for num_rows in range(1, LARGEST_PADDED + 1)}
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    def launch(self, chunks: Sequence[ScheduledChunk], num_further: int = 0) -> _Computed:
        assert not num_further, "nothing is fed back here"
        rows = StepRows.of(chunks, self.kv_cache.block_size)
        return _Computed(self.decoder.forward(self.make_input(chunks, rows), self.kv_cache))

    def launch_further(self) -> _Computed:
        raise AssertionError("nothing is fed back here")

    def score(self, chunk: ScheduledChunk) -> torch.Tensor:
        """Compute one chunk's KV. Returns the logits of all its rows: float32 [num_scheduled_tokens, vocab_size]."""
        rows = StepRows.of([chunk], self.kv_cache.block_size)
        rows.logit_rows[:] = range(chunk.num_scheduled_tokens)
        return self.decoder.forward(self.make_input([chunk], rows), self.kv_cache)

    def chooses(self, request: Request) -> bool:  # noqa: ARG002
        return False

    def warm_up(self, on_progress: Callable[[int, int], None]) -> None:
        """Nothing here is compiled."""

    def prepare_next(self) -> bool:
        return False

    def make_input(self, chunks: Sequence[ScheduledChunk], rows: StepRows) -> ReferenceInput:
        """The step's tensors, padded as the decoder wants them."""
        device = self.decoder.device
        rows.pad(self.decoder.padded_rows(len(rows.token_ids)))
        columns = torch.tensor([rows.token_ids, rows.positions, rows.slots], device=device)
        spans: list[ChunkRows] = []
        start = 0
        for chunk in chunks:
            spans.append(ChunkRows(start, chunk.num_scheduled_tokens, chunk.start, chunk.request.block_table))
            start += chunk.num_scheduled_tokens
        wanted = torch.tensor(rows.logit_rows, dtype=torch.int64, device=device)
        return ReferenceInput(columns[0], columns[1], columns[2], spans, wanted)

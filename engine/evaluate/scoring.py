"""Logits of every row of a chunk, from whatever forward there is."""

import torch

from engine.batch import ScheduledChunk
from engine.request import Request, SamplingParams
from engine.runner.eager_forward import EagerForward
from engine.runner.forward import Forward


def score(forward: Forward, chunk: ScheduledChunk) -> torch.Tensor:
    """Compute the chunk's KV. Returns the logits of all its rows: float32 [num_scheduled_tokens, vocab_size], until the
    next step.
    """
    if isinstance(forward, EagerForward):
        return forward.score(chunk)
    return score_by_rows(forward, chunk)


def score_by_rows(forward: Forward, chunk: ScheduledChunk) -> torch.Tensor:
    """The same through `launch`, which gives a chunk the logits of its last row: a request for each row, all on the
    same blocks. A row's bits do not depend on how a chunk is cut, and every layer writes the KV of all rows before any
    of them attends.
    """
    request = chunk.request
    rows = []
    for position in range(chunk.start, chunk.stop):
        prefix = Request(str(position), request.token_ids(0, position + 1), SamplingParams(seed=0))
        prefix.block_table = request.block_table
        rows.append(ScheduledChunk(prefix, position, 1))
    return forward.launch(rows).logits

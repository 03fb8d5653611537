"""The block tables of requests on the device, kept up to date by small writes."""

from collections.abc import Sequence

import torch

from engine.batch import ScheduledChunk
from engine.request import Request


class BlockTables:
    """Gives each request that runs a row of `device_tables`: int32 [max_requests, max_blocks].

    A request keeps its row from step to step, so that a step sends only the rows that have changed.
    """

    def __init__(self, max_requests: int, max_blocks: int, device: torch.device) -> None:
        self.device_tables = torch.zeros((max_requests, max_blocks), dtype=torch.int32, device=device)
        self._host = torch.zeros((max_requests, max_blocks), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._free = list(range(max_requests))
        self._rows: dict[Request, int] = {}
        self._sent: dict[Request, tuple[int, int]] = {}  # preemptions and blocks of the table that the device has

    def update(self, chunks: Sequence[ScheduledChunk]) -> list[int]:
        """Send what has changed; returns the row of each chunk's request. The copies follow in the current stream."""
        if len(self._free) < len(chunks):
            self._release({chunk.request for chunk in chunks})
        return [self._row(chunk.request) for chunk in chunks]

    def _row(self, request: Request) -> int:
        row = self._rows.get(request)
        if row is None:
            row = self._rows[request] = self._free.pop()
        state = (request.num_preemptions, len(request.block_table))
        if self._sent.get(request) != state:
            width = len(request.block_table)
            self._host[row, :width] = torch.tensor(request.block_table, dtype=torch.int32)
            self.device_tables[row, :width].copy_(self._host[row, :width], non_blocking=True)
            self._sent[request] = state
        return row

    def _release(self, keep: set[Request]) -> None:
        """Take the rows of requests that do not run in this step; those that come back are sent again."""
        for request in [request for request in self._rows if request not in keep]:
            self._free.append(self._rows.pop(request))
            del self._sent[request]

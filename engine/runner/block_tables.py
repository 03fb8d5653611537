"""The block tables of requests on the device, kept up to date by small writes."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import ScheduledChunk
from engine.request import Request

Int32s = npt.NDArray[np.int32]


class BlockTables:
    """Gives each request that runs a seat: a row of `device_tables`, int32 [max_requests, max_blocks].

    A request keeps its seat from step to step, so that a step sends only the blocks that are new to the device. They
    travel among the step's inputs, and the step itself writes them into the tables; where they are too many, which
    takes a long prefix found in the cache, the row is copied ahead of the step.
    """

    def __init__(self, max_requests: int, max_blocks: int, device: torch.device) -> None:
        shape = (max_requests, max_blocks)
        self.device_tables = torch.zeros(shape, dtype=torch.int32, device=device)
        # Twice, as everything that the device may still be reading while the host writes down the next step.
        self._host = [torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda") for _ in range(2)]
        self._max_requests = max_requests
        self._max_blocks = max_blocks
        self._free: list[int] = []
        self._seats: dict[Request, int] = {}
        self._num_preemptions = [0] * max_requests  # of each seat's request, when its blocks were first sent
        self._num_sent = np.zeros(max_requests, np.int32)  # leading blocks of each row that the device has
        self.forget()

    def forget(self) -> None:
        """Send everything anew: a step that failed may have left the tables in any state."""
        self._seats.clear()
        self._free[:] = range(self._max_requests)

    def seats(self, chunks: Sequence[ScheduledChunk]) -> list[int]:
        """The seat of each chunk's request, a new one for those that have none."""
        known, num_preemptions = self._seats, self._num_preemptions
        seats = []
        for chunk in chunks:
            request = chunk.request
            seat = known.get(request)
            if seat is None:
                seat = self._take_seat(request, chunks)
            elif num_preemptions[seat] != request.num_preemptions:
                self._begin(seat, request)
            seats.append(seat)
        return seats

    def write_updates(
        self, chunks: Sequence[ScheduledChunk], seats: Int32s, num_needed: Int32s, updates: Int32s, parity: int
    ) -> None:
        """Bring the leading `num_needed` blocks of each chunk's request to the device.

        seats, num_needed: [len(chunks)]. updates: [2, max_updates], filled with places in the flattened tables (-1 for
        none) and the blocks that belong there. parity: of the step; a copy that finds no room in `updates` starts from
        the memory that the step before the last one used.
        """
        num_sent = self._num_sent[seats]
        behind = (num_needed > num_sent).nonzero()[0]
        places: list[int] = []
        blocks: list[int] = []
        if len(behind):
            firsts, stops, rows = num_sent[behind], num_needed[behind], seats[behind]
            self._num_sent[rows] = stops
            limit, max_blocks = updates.shape[1], self._max_blocks
            for index, first, stop, seat in zip(
                behind.tolist(), firsts.tolist(), stops.tolist(), rows.tolist(), strict=True
            ):
                table = chunks[index].request.block_table
                if len(blocks) + stop - first > limit:
                    self._copy(seat, table[:stop], parity)
                    continue
                blocks += table[first:stop]
                places += range(seat * max_blocks + first, seat * max_blocks + stop)
            updates[:, : len(blocks)] = places, blocks
        updates[0][len(blocks) :] = -1

    def _copy(self, seat: int, blocks: list[int], parity: int) -> None:
        source = self._host[parity][seat, : len(blocks)]
        source.numpy()[:] = blocks
        self.device_tables[seat, : len(blocks)].copy_(source, non_blocking=True)

    def _take_seat(self, request: Request, chunks: Sequence[ScheduledChunk]) -> int:
        if not self._free:  # of those that do not run in this step; who comes back is sent again
            running = {chunk.request for chunk in chunks}
            for gone in [each for each in self._seats if each not in running]:
                self._free.append(self._seats.pop(gone))
        seat = self._seats[request] = self._free.pop()
        self._begin(seat, request)
        return seat

    def _begin(self, seat: int, request: Request) -> None:
        self._num_preemptions[seat] = request.num_preemptions
        self._num_sent[seat] = 0

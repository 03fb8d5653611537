"""A step's inputs as the host writes them down for the device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.batch import ScheduledChunk
from engine.kernels.step_inputs import StagedLayout
from engine.request import Request
from engine.runner.block_tables import Int32s

_NOBODY = np.array([[0], [-1], [-1], [0]], np.int32)  # token id, source, seat, position


@dataclass(frozen=True)
class ChunkLists:
    """The chunks of a step taken apart: token_ids is of rows; sources, lengths and stops are of chunks; logit_rows and
    num_drafts are of rows that sample, sampling of requests that do.

    Pending tokens have id 0 here; their source is the place of the token among the choices of the step before. Other
    chunks have source -1.
    """

    token_ids: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    logit_rows: list[int] = field(default_factory=list)
    num_drafts: list[int] = field(default_factory=list)
    sampling: list[Request] = field(default_factory=list)

    @classmethod
    def of(cls, chunks: Sequence[ScheduledChunk], choice_of: Mapping[Request, int]) -> "ChunkLists":
        """`choice_of`: the requests that sampled in the step before, by their place among its choices."""
        lists = cls()
        token_ids, sources, lengths, stops = lists.token_ids, lists.sources, lists.lengths, lists.stops
        logit_rows, num_drafts, sampling = lists.logit_rows, lists.num_drafts, lists.sampling
        for chunk in chunks:
            request, start, length = chunk.request, chunk.start, chunk.num_scheduled_tokens
            stop = start + length
            drafts = chunk.draft_token_ids
            num_known = stop - len(drafts)  # of the request's tokens
            if not request.num_pending_tokens:
                token_ids += request.token_ids(start, num_known)
                source = -1
            else:
                assert length == 1, f"request {request.request_id} computes {length} tokens, the last of them unknown"
                token_ids.append(0)
                source = choice_of[request]
            sources.append(source)
            lengths.append(length)
            stops.append(stop)
            if num_known == request.num_tokens:
                logit_rows.append(len(token_ids) - 1)
                num_drafts.append(0)
                sampling.append(request)
                for draft in drafts:
                    logit_rows.append(len(token_ids))
                    num_drafts.append(num_drafts[-1] + 1)
                    token_ids.append(draft)
        return lists


class StagedStep:
    """Columns over one of the two halves in which steps are staged in turn; see StagedLayout for what they mean."""

    def __init__(self, layout: StagedLayout, buffer: torch.Tensor) -> None:
        """buffer: int32 [layout.size or more], in pinned memory."""
        num_rows, updates = layout.num_rows, layout.size - 2 * layout.num_updates
        flat: Int32s = buffer[: layout.size].numpy()
        self._all_but_updates: Int32s = flat[:updates]
        self._rows: Int32s = flat[: 4 * num_rows].reshape(4, num_rows)
        self._token_ids, self._sources, self.seats, self.positions = self._rows
        self._logit_rows, self._num_drafts = flat[4 * num_rows : updates].reshape(2, layout.num_logit_rows)
        self.updates: Int32s = flat[updates:].reshape(2, layout.num_updates)
        self._places = np.arange(num_rows, dtype=np.int32)

    def write(self, lists: ChunkLists, seats: Int32s) -> None:
        """All but the updates. seats: of each chunk."""
        num_rows, num_logit_rows = len(lists.token_ids), len(lists.logit_rows)
        lengths = np.array(lists.lengths, np.int32)
        ends = lengths.cumsum(dtype=np.int32)
        # A row's position is its place among the rows, moved by as much as its chunk's last row is.
        shifts = np.array(lists.stops, np.int32) - ends
        self._token_ids[:num_rows] = lists.token_ids
        self._sources[:num_rows] = np.array(lists.sources, np.int32).repeat(lengths)
        self.seats[:num_rows] = seats.repeat(lengths)
        np.add(self._places[:num_rows], shifts.repeat(lengths), out=self.positions[:num_rows])
        self._rows[:, num_rows:] = _NOBODY
        self._logit_rows[:num_logit_rows] = lists.logit_rows
        self._logit_rows[num_logit_rows:] = -1
        self._num_drafts[:num_logit_rows] = lists.num_drafts
        self._num_drafts[num_logit_rows:] = 0

    def write_nobody(self) -> None:
        """A step that computes nothing for anyone."""
        self._rows[:] = _NOBODY
        self._logit_rows[:] = -1
        self._num_drafts[:] = 0
        self.updates[0] = -1

    def follow(self, before: "StagedStep", num_rows: int) -> None:
        """The step after `before`, which had `num_rows` rows, each a request's last token and sampling the next."""
        self._all_but_updates[:] = before._all_but_updates
        self._sources[:num_rows] = self._places[:num_rows]
        self.positions[:num_rows] += 1

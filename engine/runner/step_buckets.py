"""The shapes that steps are padded to, and the memory in which they are prepared."""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from engine.kernels.choose_tokens import HostTokens
from engine.kernels.step_inputs import NUM_TURNS, StagedLayout, StepInputs
from engine.runner.staged_step import StagedStep

FIRST_SIZES = (1, 8)  # then powers of two; up to 8 rows the kernels' tiles are the same, but for a single row
FEW_LOGIT_ROWS = 16  # of a prompt's rows only the last one needs logits
SOME_LOGIT_ROWS = 256  # beside many decoding requests: the head of a model costs as much as several layers
MIN_UPDATES = 16  # of the block tables; also as many as rows, since no row needs more than one new block


def row_buckets(token_budget: int) -> tuple[int, ...]:
    """Row counts that steps are padded to, up to the first that holds `token_budget` rows."""
    sizes = list(FIRST_SIZES)
    while sizes[-1] < token_budget:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


@dataclass
class Bucket:
    """Where the inputs of a step of some shape lie, and the graph that reads them there.

    decodes: whether each row is a request's only one, and has its logits wanted. staging: on the host, for steps in
    turn. inputs: what the step's first kernel makes of it. choices: int64 [S, 2], what comes out. goes_on: nothing is
    staged; the step goes on with what the one before has chosen.
    """

    layout: StagedLayout
    decodes: bool
    staging: tuple[StagedStep, StagedStep]
    inputs: StepInputs
    choices: torch.Tensor
    goes_on: bool = False
    graph: torch.cuda.CUDAGraph | None = None
    has_run: bool = False


class StepBuckets:
    """Buckets by number of rows, for decoding alone; and for chunks of prompts by number of logit rows as well: few,
    some, or as many as there may be. Up to FEW_LOGIT_ROWS rows one bucket serves both.

    All of them share their memory, which is as large as the largest of them needs it, since steps follow each other
    in one stream. What the host writes is pinned and there twice, for steps in turn, because the host is at one step
    while the device is at another; what it reads is there NUM_TURNS times, since it may read many steps late. The
    device works on it where it is: a copy would take longer than all that a small step reads or writes.

    staged: int32 [2, size], with the columns of `staging`. host_tokens: the outcome of the last NUM_TURNS steps, which
    host_choices shows as arrays. turn: int32 [1], on the device, the turn of the last step there.
    """

    def __init__(self, token_budget: int, max_logit_rows: int, verifies: bool, device: torch.device) -> None:
        """verifies: whether steps may have drafts, and so several logit rows of one request."""
        self._verifies = verifies
        self.sizes = row_buckets(token_budget)
        self.max_logit_rows = max_logit_rows
        self.last_choices = torch.zeros((max_logit_rows, 2), dtype=torch.int64, device=device)
        on_gpu = device.type == "cuda"
        largest = _layout(self.sizes[-1], max_logit_rows)
        self.staged = torch.zeros((2, largest.size), dtype=torch.int32, pin_memory=on_gpu)
        self.turn = torch.full((1,), NUM_TURNS - 1, dtype=torch.int32, device=device)  # the first step takes turn 0
        self.host_tokens = HostTokens(
            torch.zeros((NUM_TURNS, max_logit_rows, 2), dtype=torch.int64, pin_memory=on_gpu), self.turn
        )
        self.host_choices: npt.NDArray[np.int64] = self.host_tokens.tokens.numpy()
        self._inputs = StepInputs.empty(largest.num_rows, largest.num_logit_rows, device)
        self._made: dict[tuple[int, int, bool], Bucket] = {}
        self._going_on: dict[int, Bucket] = {}

    def holding(self, num_rows: int, num_logit_rows: int, decodes: bool) -> Bucket:
        """The smallest bucket for a step of so many rows. decodes: see Bucket; the rows are then the logit rows."""
        size = self.sizes[bisect_left(self.sizes, num_rows)]
        if size <= FEW_LOGIT_ROWS or decodes:
            num_logit_rows = size
        else:
            levels = (FEW_LOGIT_ROWS, SOME_LOGIT_ROWS, self.max_logit_rows)
            num_logit_rows = next(level for level in levels if num_logit_rows <= level)
        shape = (size, min(size, num_logit_rows, self.max_logit_rows), decodes and size > FEW_LOGIT_ROWS)
        return self._made.get(shape) or self._make(*shape)

    def going_on(self, num_choices: int) -> Bucket:
        """The smallest bucket for a step that goes on with so many choices of the one before."""
        size = self.sizes[bisect_left(self.sizes, num_choices)]
        bucket = self._going_on.get(size)
        if bucket is None:
            decoding = self.holding(size, min(size, self.max_logit_rows), decodes=True)
            bucket = self._going_on[size] = replace(decoding, goes_on=True, graph=None, has_run=False)
        return bucket

    def most_wanted(self) -> list[Bucket]:
        """Decoding alone, up to as many requests as may run, with and without drafts, and prefills of every size."""
        sizes = self.sizes[: bisect_left(self.sizes, self.max_logit_rows) + 1]
        decoding = [self.holding(size, min(size, self.max_logit_rows), decodes=True) for size in sizes]
        if self._verifies:
            decoding += [self.holding(size, min(size, self.max_logit_rows), decodes=False) for size in sizes]
        return _distinct(decoding + [self.holding(size, 1, decodes=False) for size in self.sizes])

    def all(self) -> list[Bucket]:
        """Those, and then the ones for prefills beside many decoding requests."""
        levels = (level for level in (SOME_LOGIT_ROWS, self.max_logit_rows) if level <= self.max_logit_rows)
        beside = [self.holding(size, min(size, level), decodes=False) for level in levels for size in self.sizes]
        return _distinct(self.most_wanted() + beside)

    def _make(self, num_rows: int, num_logit_rows: int, decodes: bool) -> Bucket:
        layout = _layout(num_rows, num_logit_rows)
        first, second = (StagedStep(layout, half) for half in self.staged)
        bucket = self._made[num_rows, num_logit_rows, decodes] = Bucket(
            layout=layout,
            decodes=decodes,
            staging=(first, second),
            inputs=self._inputs.first(num_rows, num_logit_rows),
            choices=self.last_choices[:num_logit_rows],
        )
        return bucket


def _distinct(buckets: Iterable[Bucket]) -> list[Bucket]:
    return list({id(bucket): bucket for bucket in buckets}.values())


def _layout(num_rows: int, num_logit_rows: int) -> StagedLayout:
    return StagedLayout(num_rows, num_logit_rows, max(MIN_UPDATES, num_rows))

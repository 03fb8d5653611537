"""The shapes that steps are padded to, and the memory in which they are prepared."""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.kernels.choose_tokens import HostTokens
from engine.kernels.step_inputs import StagedLayout, StepInputs
from engine.runner.staged_step import StagedStep

FIRST_SIZES = (1, 8)  # then powers of two; up to 8 rows the kernels' tiles are the same, but for a single row
FEW_LOGIT_ROWS = 16  # of a prompt's rows only the last one needs logits
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

    staging: on the host, for steps in turn. inputs: what the step's first kernel makes of it. choices: int64 [S, 2],
    what comes out.
    """

    layout: StagedLayout
    staging: tuple[StagedStep, StagedStep]
    inputs: StepInputs
    choices: torch.Tensor
    graph: torch.cuda.CUDAGraph | None = None
    has_run: bool = False


class StepBuckets:
    """Buckets by number of rows and of logit rows: few, for prefills, or as many as there may be.

    All of them share their memory, which is as large as the largest of them needs it, since steps follow each other
    in one stream. What the host writes or reads is pinned and there twice, for steps in turn, because the host is at
    one step while the device is at another. The device works on it where it is: a copy would take longer than all that
    a small step reads or writes.

    staged: int32 [2, size], with the columns of `staging`. host_tokens: the outcome of the last two steps, which
    host_choices shows as arrays. turn: int32 [1], on the device, which half the last step there was in.
    """

    def __init__(self, token_budget: int, max_logit_rows: int, device: torch.device) -> None:
        self.sizes = row_buckets(token_budget)
        self.max_logit_rows = max_logit_rows
        self.last_choices = torch.zeros((max_logit_rows, 2), dtype=torch.int64, device=device)
        on_gpu = device.type == "cuda"
        largest = _layout(self.sizes[-1], max_logit_rows)
        self.staged = torch.zeros((2, largest.size), dtype=torch.int32, pin_memory=on_gpu)
        self.turn = torch.ones(1, dtype=torch.int32, device=device)  # the first step takes half 0
        self.host_tokens = HostTokens(
            torch.zeros((2, max_logit_rows, 2), dtype=torch.int64, pin_memory=on_gpu), self.turn
        )
        self.host_choices: npt.NDArray[np.int64] = self.host_tokens.tokens.numpy()
        self._inputs = StepInputs.empty(largest.num_rows, largest.num_logit_rows, device)
        self._made: dict[tuple[int, int], Bucket] = {}

    def holding(self, num_rows: int, num_logit_rows: int) -> Bucket:
        """The smallest bucket for a step of so many rows."""
        size = self.sizes[bisect_left(self.sizes, num_rows)]
        limit = FEW_LOGIT_ROWS if num_logit_rows <= FEW_LOGIT_ROWS else self.max_logit_rows
        shape = (size, min(size, limit, self.max_logit_rows))
        return self._made.get(shape) or self._make(*shape)

    def most_wanted(self) -> list[Bucket]:
        """Decoding alone, up to as many requests as may run, and prefills of every size."""
        decoding = bisect_left(self.sizes, self.max_logit_rows) + 1
        shapes = [(size, size) for size in self.sizes[:decoding]] + [(size, FEW_LOGIT_ROWS) for size in self.sizes]
        return self._distinct(shapes)

    def all(self) -> list[Bucket]:
        """Those, and then the ones for prefills beside many decoding requests."""
        return self._distinct([(size, size) for size in self.sizes], self.most_wanted())

    def _distinct(self, shapes: list[tuple[int, int]], known: list[Bucket] | None = None) -> list[Bucket]:
        buckets = list(known or [])
        for size, num_logit_rows in shapes:
            bucket = self.holding(size, min(num_logit_rows, self.max_logit_rows))
            if not any(bucket is other for other in buckets):
                buckets.append(bucket)
        return buckets

    def _make(self, num_rows: int, num_logit_rows: int) -> Bucket:
        layout = _layout(num_rows, num_logit_rows)
        first, second = (StagedStep(layout, half) for half in self.staged)
        bucket = self._made[num_rows, num_logit_rows] = Bucket(
            layout=layout,
            staging=(first, second),
            inputs=self._inputs.first(num_rows, num_logit_rows),
            choices=self.last_choices[:num_logit_rows],
        )
        return bucket


def _layout(num_rows: int, num_logit_rows: int) -> StagedLayout:
    return StagedLayout(num_rows, num_logit_rows, max(MIN_UPDATES, num_rows))

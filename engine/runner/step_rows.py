"""The rows of a step, as the host writes them down."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from engine.batch import ScheduledChunk
from engine.kernels.attention_plan import NULL_SLOT
from engine.request import Request


@dataclass(frozen=True)
class StepRows:
    """Chunk after chunk: a token, its position and its slot a row; and the last row of each chunk that samples.

    `sources`: for a token that the step before has chosen and nobody has read, which of that step's choices it is;
    else -1.
    """

    token_ids: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    logit_rows: list[int] = field(default_factory=list)

    @classmethod
    def of(
        cls, chunks: Sequence[ScheduledChunk], block_size: int, choice_of: Mapping[Request, int] = MappingProxyType({})
    ) -> "StepRows":
        """`choice_of`: the requests that sampled in the step before, by their place among its choices."""
        rows = cls()
        for chunk in chunks:
            table = chunk.request.block_table
            known = chunk.request.token_ids(chunk.start, chunk.stop)
            rows.token_ids.extend(known)
            rows.sources.extend([-1] * len(known))
            if len(known) < chunk.num_scheduled_tokens:
                rows.token_ids.append(0)
                rows.sources.append(choice_of[chunk.request])
            rows.positions.extend(range(chunk.start, chunk.stop))
            rows.slots.extend(
                table[p // block_size] * block_size + p % block_size for p in range(chunk.start, chunk.stop)
            )
            if chunk.samples:
                rows.logit_rows.append(len(rows.token_ids) - 1)
        return rows

    def pad(self, num_rows: int) -> None:
        """Fill up with rows of nobody: token 0 at position 0, written to the null block, read by none."""
        padding = num_rows - len(self.token_ids)
        assert padding >= 0
        self.token_ids.extend([0] * padding)
        self.sources.extend([-1] * padding)
        self.positions.extend([0] * padding)
        self.slots.extend([NULL_SLOT] * padding)

"""The rows of a step, as lists for a forward that makes tensors of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.batch import ScheduledChunk
from engine.kernels.attention_plan import NULL_SLOT


@dataclass(frozen=True)
class StepRows:
    """Chunk after chunk: a token, its position and its slot a row; and the rows behind which a token is sampled."""

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    logit_rows: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, chunks: Sequence[ScheduledChunk], block_size: int) -> "StepRows":
        """All tokens of the chunks are known."""
        rows = cls()
        for chunk in chunks:
            table = chunk.request.block_table
            rows.token_ids.extend(chunk.token_ids())
            rows.positions.extend(range(chunk.start, chunk.stop))
            rows.slots.extend(
                table[p // block_size] * block_size + p % block_size for p in range(chunk.start, chunk.stop)
            )
            assert len(rows.token_ids) == len(rows.positions), f"request {chunk.request.request_id} has a pending token"
            num_rows = len(rows.token_ids)
            rows.logit_rows.extend(range(num_rows - chunk.num_samples, num_rows))
        return rows

    def pad(self, num_rows: int) -> None:
        """Fill up with rows of nobody: token 0 at position 0, written to the null block, read by none."""
        padding = num_rows - len(self.token_ids)
        assert padding >= 0
        self.token_ids.extend([0] * padding)
        self.positions.extend([0] * padding)
        self.slots.extend([NULL_SLOT] * padding)

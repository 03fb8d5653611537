"""The constants of an attention kernel's launch."""

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class AttentionShape:
    """One constexpr for the whole kernel. `window`: positions that a row sees, itself included; 0: all."""

    kv_heads: int
    group: int  # query heads of a key-value head
    head_dim: int
    block_size: int
    window: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def block_dim(self) -> int:
        """Width of a tensor that holds a head."""
        return int(triton.next_power_of_2(self.head_dim))

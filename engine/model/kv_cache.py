"""The tensors of the paged KV cache."""

import torch

from engine.config import ModelConfig


def kv_bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers, keys and values together."""
    return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize


class KVCache:
    """Keys and values of every layer: two tensors [num_blocks, block_size, num_kv_heads, head_dim] a layer.

    Block 0 is the null block: rows that belong to no request write to its first slot, and its other slots stay zero.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, 2, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        # Only the null block is zeroed: no other slot is read before it is written, and a CPU's untouched pages cost
        # nothing.
        self._data = torch.empty(shape, dtype=dtype, device=device)
        self._data[:, :, 0].zero_()
        self.num_blocks = num_blocks
        self.block_size = block_size

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer."""
        keys, values = self._data[index].unbind(0)
        return keys, values

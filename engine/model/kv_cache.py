"""The tensors of the paged KV cache."""

import torch

from engine.config import KVCacheDType, ModelConfig
from engine.kernels.reference import KVScales


def kv_bytes_per_block(
    config: ModelConfig, block_size: int, dtype: torch.dtype, cache_dtype: KVCacheDType = KVCacheDType.AUTO
) -> int:
    """Bytes that one block takes over all layers, keys and values together. `dtype`: of the activations."""
    heads = 2 * config.num_layers * block_size * config.num_kv_heads
    if cache_dtype is KVCacheDType.INT8:
        return heads * (config.head_dim * torch.int8.itemsize + torch.float32.itemsize)
    return heads * config.head_dim * dtype.itemsize


class KVCache:
    """Keys and values of every layer, in the activations' dtype or in int8 with a scale for each head of each token.

    Block 0 is the null block: rows that belong to no request write to its first slot, and its other slots stay zero.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        cache_dtype: KVCacheDType = KVCacheDType.AUTO,
    ) -> None:
        heads = (config.num_layers, 2, num_blocks, block_size, config.num_kv_heads)
        quantized = cache_dtype is KVCacheDType.INT8
        # Only the null block is zeroed: no other slot is read before it is written, and a CPU's untouched pages cost
        # nothing.
        self._data = torch.empty((*heads, config.head_dim), dtype=torch.int8 if quantized else dtype, device=device)
        self._data[:, :, 0].zero_()
        self._scales: torch.Tensor | None = None
        if quantized:
            self._scales = torch.empty(heads, dtype=torch.float32, device=device)
            self._scales[:, :, 0].zero_()
        self.num_blocks = num_blocks
        self.block_size = block_size

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer: [num_blocks, block_size, num_kv_heads, head_dim] each."""
        keys, values = self._data[index].unbind(0)
        return keys, values

    def scales(self, index: int) -> KVScales | None:
        """What keys and values of one layer are to be multiplied with: float32 [num_blocks, block_size, num_kv_heads]
        each; None where they are not int8."""
        if self._scales is None:
            return None
        key_scales, value_scales = self._scales[index].unbind(0)
        return key_scales, value_scales

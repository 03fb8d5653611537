"""What a decoding step must read of the device's memory: a bound on its speed, whatever the kernels."""

import torch

from engine.config import KVCacheDType, ModelConfig, Quantization
from engine.model.kv_cache import kv_bytes_per_block
from engine.runner.memory import weight_bytes


def step_weight_bytes(model: ModelConfig, dtype: torch.dtype, quantization: Quantization) -> int:
    """Weights that a decoding step must read: each once, of the embedding a row a request, which is nothing."""
    in_all = weight_bytes(model, dtype, quantization)
    head_is_the_embedding = model.tie_word_embeddings and quantization is Quantization.NONE
    return in_all - (0 if head_is_the_embedding else model.vocab_size * model.hidden_size * dtype.itemsize)


def step_kv_bytes(
    model: ModelConfig, dtype: torch.dtype, cache_dtype: KVCacheDType, batch: int, mean_context: float
) -> float:
    """Keys and values that a decoding step of `batch` requests must read."""
    if model.sliding_window is not None:
        mean_context = min(mean_context, model.sliding_window)
    return batch * mean_context * kv_bytes_per_block(model, 1, dtype, cache_dtype)

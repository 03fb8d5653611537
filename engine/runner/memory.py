"""How many KV blocks a device has room for."""

import psutil
import torch

from engine.config import CacheConfig, ModelConfig, SchedulerConfig
from engine.errors import ConfigError
from engine.model.kv_cache import kv_bytes_per_block

CPU_DEFAULT_BYTES = 1 << 30  # or what the longest request needs; pages that are never written cost nothing
CPU_FRACTION = 0.5  # of the memory available: the rest is for the process, its workspace and its neighbours
CUDA_FRACTION = 0.9  # of the memory that is free once weights and workspace are there; graphs and sampling take some


def plan_num_blocks(
    model: ModelConfig, cache: CacheConfig, scheduler: SchedulerConfig, dtype: torch.dtype, device: torch.device
) -> int:
    """Blocks of the KV pool, the null block included.

    Raises:
        ConfigError: not even one request of the longest length would fit; says which settings to change.
    """
    per_block = kv_bytes_per_block(model, cache.block_size, dtype, cache.dtype)
    needed = -(-scheduler.max_model_len // cache.block_size) + 1
    if cache.num_blocks is not None:
        num_blocks = cache.num_blocks
    else:
        budget = cache.memory_bytes
        if budget is None and device.type == "cpu":
            budget = _default_cpu_bytes(needed * per_block)
        elif budget is None:
            budget = int(torch.cuda.mem_get_info(device)[0] * CUDA_FRACTION)
        # More than this no set of running requests can use.
        longest = scheduler.max_num_seqs * -(-scheduler.max_model_len // cache.block_size) + 1
        num_blocks = min(budget // per_block, longest)
    if num_blocks < needed:
        raise ConfigError(
            f"the KV cache holds {max(num_blocks - 1, 0) * cache.block_size} tokens, fewer than max_model_len "
            f"{scheduler.max_model_len}: lower max_model_len, or give the cache {needed * per_block / 2**30:.2f} GiB"
        )
    return num_blocks


def _default_cpu_bytes(longest_request_bytes: int) -> int:
    wanted = max(CPU_DEFAULT_BYTES, longest_request_bytes)
    return min(wanted, int(psutil.virtual_memory().available * CPU_FRACTION))

"""What must be the same for two replicas to produce the same tokens."""

import hashlib
import platform

import torch

from engine.config import KVCacheDType, Quantization
from engine.kernels.attention_plan import KV_SPLIT_TOKENS, QUERY_TILE
from engine.model.linear import row_tile


def fingerprint(
    checkpoint_fingerprint: str,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization,
    kv_cache_dtype: KVCacheDType,
) -> str:
    """Identity of weights, number formats, hardware and software: `fp_` and 16 hexadecimal digits.

    On the CPU the instruction set and the number of threads count, since the library chooses its kernels by them.
    """
    if device.type == "cuda":
        hardware = (torch.cuda.get_device_name(device), str(torch.version.cuda))
    else:
        hardware = (platform.machine(), f"{torch.backends.cpu.get_cpu_capability()} x {torch.get_num_threads()}")
    formats = (dtype, quantization, kv_cache_dtype)
    software = (torch.__version__, QUERY_TILE, KV_SPLIT_TOKENS, row_tile(device))
    parts = [checkpoint_fingerprint, *formats, *software, *hardware]
    return "fp_" + hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]

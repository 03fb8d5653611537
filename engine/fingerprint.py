"""What must be the same for two replicas to produce the same tokens."""

import hashlib
import platform
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch

from engine.config import KVCacheDType, Quantization

COMPUTING = ("kernels", "model", "quantize", "sampling")  # the folders whose code decides the bits of a token


def fingerprint(
    checkpoint_fingerprint: str,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization,
    kv_cache_dtype: KVCacheDType,
) -> str:
    """Identity of weights, number formats, hardware and software: `fp_` and 16 hexadecimal digits.

    Software is torch, on a GPU Triton, and the code that computes, down to its comments: nobody then has to remember to
    raise a version. On the CPU the instruction set and the number of threads count, since the library chooses its
    kernels by them.
    """
    software = [torch.__version__, _source_digest()]
    if device.type == "cuda":
        software.append(version("triton"))
        hardware = (torch.cuda.get_device_name(device), str(torch.version.cuda))
    else:
        hardware = (platform.machine(), f"{torch.backends.cpu.get_cpu_capability()} x {torch.get_num_threads()}")
    formats = (dtype, quantization, kv_cache_dtype)
    parts = [checkpoint_fingerprint, *formats, *software, *hardware]
    return "fp_" + hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


@lru_cache
def _source_digest() -> str:
    digest = hashlib.sha256()
    for folder in COMPUTING:
        for file in sorted((Path(__file__).parent / folder).glob("*.py")):
            digest.update(f"{folder}/{file.name}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()

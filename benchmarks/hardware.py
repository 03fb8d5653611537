"""What a benchmark ran on, and how fast it could be at best."""

import platform
from pathlib import Path

import torch

from engine.config import Device, KVCacheDType, ModelConfig, Quantization
from engine.model.kv_cache import kv_bytes_per_block
from engine.runner.memory import weight_bytes

# Memory bandwidth in bytes/s, by how the card calls itself: NVIDIA's datasheets.
BANDWIDTHS = {"H100 80GB HBM3": 3.35e12, "H200": 4.8e12}


def hardware_name(device: Device) -> str:
    """The card's name, or the processor's with the number of threads."""
    if device is Device.CUDA:
        return torch.cuda.get_device_name()
    names = [line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def bandwidth(hardware: str) -> float | None:
    """Bytes/s of the memory of a card that is known, by its name."""
    return next((speed for name, speed in BANDWIDTHS.items() if hardware.endswith(name)), None)


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


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []

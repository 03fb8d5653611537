"""What a plan is made for: a GPU by its name, or what this machine has."""

from dataclasses import dataclass

import torch

from engine.config import Device, DType
from engine.errors import ConfigError
from engine.kernels.target import GPU, gpu_of
from engine.precompile.gpus import GPUS, known_bandwidth, known_gpu
from engine.runner.device import default_dtype
from engine.runner.memory import MemoryReading, read_memory

# Of CUDA's context and the libraries' kernels in a process, on a GPU that is not there to be asked. An estimate:
# `python -m benchmarks.memory --device cuda` records what it is.
CONTEXT_BYTES = 512 << 20
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Card:
    """gpu: None for a CPU. memory: before an engine has anything there. bytes_per_s: of its memory by its datasheet,
    None where there is none. default_dtype: where no other is asked for."""

    gpu: GPU | None
    memory: MemoryReading
    bytes_per_s: float | None
    default_dtype: DType

    @property
    def device(self) -> Device:
        return Device.CPU if self.gpu is None else Device.CUDA


def card_of(name: str | None) -> Card:
    """A known GPU, or this machine's CPU ("cpu"), or by default the GPU of this machine, or its CPU if it has none.

    Raises:
        ConfigError: there is no such name.
    """
    if name is None and torch.cuda.is_available():
        return _installed_gpu(torch.device("cuda", torch.cuda.current_device()))
    if name in (None, "cpu"):
        return Card(None, read_memory(CPU), None, default_dtype(CPU))
    if name not in GPUS:
        raise ConfigError(f"gpu must be one of {', '.join(GPUS)}, cpu, not {name!r}")
    known = known_gpu(name)
    total = known.gpu.memory_bytes
    return Card(known.gpu, MemoryReading(known.title, total, total - CONTEXT_BYTES), known.bytes_per_s, DType.BFLOAT16)


def _installed_gpu(device: torch.device) -> Card:
    gpu, reading = gpu_of(device), read_memory(device)
    return Card(gpu, reading, known_bandwidth(reading.device_name), default_dtype(device))

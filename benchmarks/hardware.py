"""What a benchmark ran on."""

import platform
from pathlib import Path

import torch

from engine.config import Device


def hardware_name(device: Device) -> str:
    """The card's name, or the processor's with the number of threads."""
    if device is Device.CUDA:
        return torch.cuda.get_device_name()
    names = [line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []

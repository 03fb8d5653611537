"""The GPU that kernels are launched for: the one that their tensors lie on, or one that is only aimed at.

Whatever a launch asks of a GPU, it asks here, and not torch: so that `engine.precompile` can launch for a GPU that the
machine does not have.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class GPU:
    """What launches depend on. capability: major and minor. memory_bytes: all that there is. shared_bytes: of shared
    memory that a program can be given."""

    capability: tuple[int, int]
    num_processors: int
    memory_bytes: int
    shared_bytes: int


_aimed_at: GPU | None = None


def gpu_of(device: torch.device) -> GPU | None:
    """None for tensors that lie on no GPU: Triton's interpreter then runs the kernels."""
    if _aimed_at is not None:
        return _aimed_at
    return _installed(device) if device.type == "cuda" else None


@contextmanager
def aimed_at(gpu: GPU) -> Iterator[None]:
    """Launch for this GPU, wherever tensors lie, for the length of a `with` block in the whole process."""
    global _aimed_at
    before, _aimed_at = _aimed_at, gpu
    try:
        yield
    finally:
        _aimed_at = before


@lru_cache
def _installed(device: torch.device) -> GPU:
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks the last of these
    return GPU(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.total_memory,
        properties.shared_memory_per_block_optin,
    )

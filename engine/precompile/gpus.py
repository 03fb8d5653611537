"""GPUs that kernels can be compiled for without having one."""

from dataclasses import dataclass

from engine.errors import ConfigError
from engine.kernels.target import GPU


@dataclass(frozen=True)
class KnownGPU:
    """gpu: as launches see it where it is installed."""

    title: str
    gpu: GPU


# From NVIDIA's datasheets, shared memory from CUDA's table of compute capabilities; memory in whole GiB of what torch
# sees, which decides no more than whether a quarter of it holds the weights (engine.model.triton_decoder's
# PACKED_FRACTION). Tile shapes were measured on an H100 alone.
GPUS = {
    "h100": KnownGPU("H100 80GB SXM", GPU((9, 0), 132, 79 << 30, 232_448)),
    "h200": KnownGPU("H200 141GB SXM", GPU((9, 0), 132, 139 << 30, 232_448)),
    "a100": KnownGPU("A100 80GB", GPU((8, 0), 108, 79 << 30, 166_912)),
    "l4": KnownGPU("L4 24GB", GPU((8, 9), 58, 22 << 30, 101_376)),
    "l40s": KnownGPU("L40S 48GB", GPU((8, 9), 142, 44 << 30, 101_376)),
    "rtx4090": KnownGPU("GeForce RTX 4090 24GB", GPU((8, 9), 128, 23 << 30, 101_376)),
}


def known_gpu(name: str) -> KnownGPU:
    """The GPU of that name in the table.

    Raises:
        ConfigError: there is none.
    """
    if name not in GPUS:
        raise ConfigError(f"gpu must be one of {', '.join(GPUS)}, not {name!r}")
    return GPUS[name]

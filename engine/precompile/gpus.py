"""GPUs that can be compiled and planned for without having one."""

from dataclasses import dataclass

from engine.errors import ConfigError
from engine.kernels.target import GPU


@dataclass(frozen=True)
class KnownGPU:
    """gpu: as launches see it where it is installed. torch_name: what torch calls it there, behind the maker's name.
    bytes_per_s: of its memory."""

    title: str
    gpu: GPU
    torch_name: str
    bytes_per_s: float


# From NVIDIA's datasheets (bandwidth of an A100: that of the SXM card), shared memory from CUDA's table of compute
# capabilities; memory in whole GiB of what torch sees, for plans, and for whether a quarter of it holds the weights
# (engine.model.triton_decoder's PACKED_FRACTION). Tile shapes were measured on an H100 alone.
GPUS = {
    "h100": KnownGPU("H100 80GB SXM", GPU((9, 0), 132, 79 << 30, 232_448), "H100 80GB HBM3", 3.35e12),
    "h200": KnownGPU("H200 141GB SXM", GPU((9, 0), 132, 139 << 30, 232_448), "H200", 4.8e12),
    "a100": KnownGPU("A100 80GB", GPU((8, 0), 108, 79 << 30, 166_912), "A100-SXM4-80GB", 2.039e12),
    "l4": KnownGPU("L4 24GB", GPU((8, 9), 58, 22 << 30, 101_376), "L4", 300e9),
    "l40s": KnownGPU("L40S 48GB", GPU((8, 9), 142, 44 << 30, 101_376), "L40S", 864e9),
    "rtx4090": KnownGPU("GeForce RTX 4090 24GB", GPU((8, 9), 128, 23 << 30, 101_376), "GeForce RTX 4090", 1.008e12),
}


def known_gpu(name: str) -> KnownGPU:
    """The GPU of that name in the table.

    Raises:
        ConfigError: there is none.
    """
    if name not in GPUS:
        raise ConfigError(f"gpu must be one of {', '.join(GPUS)}, not {name!r}")
    return GPUS[name]


def known_bandwidth(torch_name: str) -> float | None:
    """Bytes/s of the memory of a GPU in the table, by torch's name for it."""
    return next((known.bytes_per_s for known in GPUS.values() if torch_name == f"NVIDIA {known.torch_name}"), None)

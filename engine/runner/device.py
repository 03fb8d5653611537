"""Chooses device, number format and threads."""

import os

import torch

from engine.config import Device, DType, EngineConfig
from engine.errors import ConfigError

_TORCH_DTYPES = {
    DType.FLOAT32: torch.float32,
    DType.BFLOAT16: torch.bfloat16,
    DType.FLOAT16: torch.float16,
}


def prepare_device(config: EngineConfig) -> tuple[torch.device, torch.dtype]:
    """The device and number format to use; on the CPU also sets torch's threads, for the whole process.

    Raises:
        ConfigError: there is no such device here.
    """
    if config.device is Device.CUDA:
        if not torch.cuda.is_available():
            raise ConfigError("device=cuda, but torch finds no CUDA device here: use device=cpu, or check the driver")
        device = torch.device("cuda", torch.cuda.current_device())
        # cuBLAS may otherwise add partial sums in the 16-bit format of the operands.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    else:
        device = torch.device("cpu")
        torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
    return device, _TORCH_DTYPES[config.dtype or default_dtype(device)]


def default_dtype(device: torch.device) -> DType:
    """bfloat16 where the hardware multiplies it; elsewhere what is fast and safe there."""
    if device.type == "cuda":
        return DType.BFLOAT16 if torch.cuda.get_device_capability(device) >= (8, 0) else DType.FLOAT16
    multiplies_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return DType.BFLOAT16 if multiplies_bfloat16 else DType.FLOAT32

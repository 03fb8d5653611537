"""What torch and Triton say of the GPU, and what they do on it: nothing."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from engine.precompile.gpus import KnownGPU
from engine.precompile.recorded_kernels import TargetDriver
from tools.pretended_gpu.tensors import CUDA

_SILENT = (
    "synchronize",
    "empty_cache",
    "reset_peak_memory_stats",
    "reset_accumulated_memory_stats",
    "manual_seed",
    "manual_seed_all",
    "init",
    "_lazy_init",
    "set_device",
)


class _Event:
    """Has always happened. Serves for streams as well."""

    cuda_stream = 0

    def __init__(self, *_: object, **__: object) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _other: object) -> float:
        return 1.0

    def record(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...

    def wait(self, *_: object) -> None: ...

    def wait_stream(self, *_: object) -> None: ...

    def wait_event(self, *_: object) -> None: ...


class _Graph:
    """Of steps that do nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def replay(self) -> None: ...

    def reset(self) -> None: ...

    def pool(self) -> int:
        return 0


class _Generator:
    """A class, as annotations ask for, whose instances are generators of the CPU."""

    _plain = torch.Generator

    def __new__(cls, *_: object, **__: object) -> Any:
        return cls._plain()


class _Driver(TargetDriver):
    """With what tests ask for besides."""

    def __init__(self, target: GPUTarget, gpu: KnownGPU) -> None:
        super().__init__(target)
        clocks = {"sm_clock_rate": 1_980_000, "mem_clock_rate": 2_619_000, "mem_bus_width": 5120}  # kHz, kHz, bits
        sizes = {"max_shared_mem": gpu.gpu.shared_bytes, "multiprocessor_count": gpu.gpu.num_processors}
        properties = sizes | {"max_num_regs": 65536, "warpSize": 32} | clocks
        self.utils = SimpleNamespace(get_device_properties=lambda _device: properties)

    def get_active_torch_device(self) -> torch.device:
        return CUDA

    def get_device_interface(self) -> Any:
        return torch.cuda


def pretend(gpu: KnownGPU) -> None:
    """From here on, for the whole process, torch and Triton see this GPU."""
    total = gpu.gpu.memory_bytes
    major, minor = gpu.gpu.capability
    properties = SimpleNamespace(
        name=gpu.title,
        major=major,
        minor=minor,
        multi_processor_count=gpu.gpu.num_processors,
        total_memory=total,
        L2_cache_size=50 << 20,
        shared_memory_per_block_optin=gpu.gpu.shared_bytes,
        warp_size=32,
    )
    cuda: Any = torch.cuda
    for name in _SILENT:
        setattr(cuda, name, lambda *_, **__: None)
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.is_current_stream_capturing = lambda: False
    cuda.device_count = lambda: 1
    cuda.current_device = cuda.graph_pool_handle = lambda: 0
    cuda.get_device_capability = lambda *_: gpu.gpu.capability
    cuda.get_device_name = lambda *_: gpu.title
    cuda.get_device_properties = lambda *_: properties
    cuda.mem_get_info = lambda *_: (total - (1 << 30), total)
    cuda.memory_allocated = cuda.max_memory_allocated = cuda.memory_reserved = lambda *_: 0
    cuda.Event = cuda.Stream = _Event
    cuda.CUDAGraph = _Graph
    cuda.graph = cuda.stream = lambda *_, **__: nullcontext()
    cuda.current_stream = cuda.default_stream = lambda *_: _Event()
    anything: Any = torch
    anything.Generator = _Generator
    torch.testing.assert_close = lambda *_, **__: None
    triton.runtime.driver.set_active(_Driver(GPUTarget("cuda", 10 * major + minor, 32), gpu))
    _let_choices_be_numbers()


def _let_choices_be_numbers() -> None:
    """Tokens that nothing writes are token 0, and not errors."""
    from engine.runner.step_buckets import StepBuckets

    plain = StepBuckets.__init__

    def made(self: StepBuckets, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.host_tokens.tokens[..., 0] = 1

    StepBuckets.__init__ = made  # type: ignore[method-assign]

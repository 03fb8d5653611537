"""What an engine asks Triton to compile, written down in place of being compiled and run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from engine.config import CacheConfig, ModelConfig, Quantization, SchedulerConfig
from engine.kernels.target import aimed_at
from engine.model.kv_cache import KVCache
from engine.model.triton_decoder import TritonDecoder
from engine.model.weights import load_decoder
from engine.precompile.gpus import KnownGPU
from engine.precompile.shapes_only import NOWHERE, ShapesOnly
from engine.runner.graph_forward import GraphForward


@dataclass(frozen=True)
class Kernel:
    """The arguments of one call of triton.compile."""

    source: Any
    target: GPUTarget
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.source.name)


def engine_kernels(
    model: ModelConfig,
    gpu: KnownGPU,
    dtype: torch.dtype,
    quantization: Quantization,
    cache: CacheConfig,
    limits: SchedulerConfig,
) -> list[Kernel]:
    """Every kernel that an engine of these settings launches on this GPU. `quantization` has been resolved.

    It is the engine's own code that launches them, all layers and all buckets. Tensors lie on torch's device "meta":
    an address there is the offset in the tensor that was allocated, so that addresses are multiples of 16 where those
    of a GPU are, whose tensors begin at multiples of 512. Nothing else of an address gets into a kernel.
    """
    with aimed_at(gpu.gpu), recorded(gpu) as kernels:
        decoder = load_decoder(
            TritonDecoder, ShapesOnly(model), NOWHERE, dtype, limits.max_model_len, quantization=quantization
        )
        num_blocks = cache.num_blocks or -(-limits.max_model_len // cache.block_size) + 1

        def make_kv_cache() -> KVCache:
            return KVCache(model, num_blocks, cache.block_size, dtype, NOWHERE, cache.dtype)

        GraphForward(decoder, make_kv_cache, limits).launch_all()
    return list(kernels)


class TargetDriver:
    """As much of Triton's driver as compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


class _NotCompiled:
    """Stands for a compiled kernel: a launch does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *_arguments: object) -> None: ...

    def run(self, *_arguments: object) -> None: ...


_kernels: list[Kernel] = []  # one list, since Triton keeps the function that it first compiled with
_target: GPUTarget | None = None


def _record(source: Any, target: GPUTarget, options: dict[str, Any]) -> _NotCompiled:
    source.hash()  # Triton 3.6 hashes a function differently once another has been that calls the same ones: so now
    _kernels.append(Kernel(source, target, options))
    return _NotCompiled()


@contextmanager
def recorded(gpu: KnownGPU) -> Iterator[list[Kernel]]:
    """Collects what is launched for the first time in this process. Kernels that were launched so are never compiled by
    a later launch: the process is of no use for anything else that launches."""
    global _target
    major, minor = gpu.gpu.capability
    target = GPUTarget("cuda", 10 * major + minor, 32)
    assert _target in (None, target), "a process compiles for one kind of GPU: Triton keeps the first"
    _target = target
    _kernels.clear()
    triton.runtime.driver.set_active(TargetDriver(target))
    compile_now, triton.compiler.compile = triton.compiler.compile, _record
    try:
        yield _kernels
    finally:
        triton.compiler.compile = compile_now

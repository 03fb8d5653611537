"""From an engine's settings to a directory that it starts from without compiling."""

import platform
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from engine.config import DType, EngineConfig, ModelConfig
from engine.errors import ConfigError
from engine.kernels.pdl import INTERPRETED
from engine.precompile.compiling import Compiled, compile_all
from engine.precompile.gpus import KnownGPU
from engine.precompile.kernel_directory import Entry, KernelDirectory
from engine.precompile.launchers import are_per_kernel, driver_stub
from engine.precompile.recorded_kernels import engine_kernels
from engine.quantize.formats import resolve_quantization


@dataclass(frozen=True)
class Outcome:
    """What was done. lacks_launchers: this Triton compiles launchers in C as well, and that was not possible here."""

    kernels: list[Compiled]
    directory: KernelDirectory
    lacks_launchers: bool


def precompile(
    model_name: str,
    model: ModelConfig,
    config: EngineConfig,
    gpu_name: str,
    gpu: KnownGPU,
    output: Path | None,
    runtime_path: Path | None,
    jobs: int,
    on_progress: Callable[[int, int], None],
) -> Outcome:
    """Compile what an engine of this config launches on `gpu` into `output`, or into Triton's own cache if None.

    runtime_path: where the directory will lie when engines start; None: where it is. `on_progress(done, in all)`. For a
    process of its own: see `engine_kernels`.

    Raises:
        ConfigError: a setting does not go with the model, the GPU has no room for a kernel, the directory cannot be
            written, or a process came to an end.
    """
    if INTERPRETED:
        raise ConfigError("TRITON_INTERPRET is set, with which nothing is compiled: unset it")
    quantization = resolve_quantization(model, config.quantization)
    dtype = config.dtype or DType.BFLOAT16
    directory = KernelDirectory((output or Path(triton.knobs.cache.dir)).absolute())
    kernels = engine_kernels(model, gpu, getattr(torch, dtype), quantization, config.cache, config.scheduler)
    directory.expect_at(directory.path)  # whatever is there already is to be found
    with driver_stub() if are_per_kernel() else nullcontext() as stub:
        compiled = compile_all(kernels, gpu, directory.path, jobs, stub, on_progress)
    place = (runtime_path or directory.path).absolute()
    directory.expect_at(place)
    entry = Entry(
        model=model_name,
        gpu=gpu_name,
        capability=".".join(map(str, gpu.gpu.capability)),
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=config.cache.dtype,
        block_size=config.cache.block_size,
        max_model_len=config.scheduler.max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        token_budget=config.scheduler.token_budget,
        triton=triton.__version__,
        python=platform.python_version(),
        num_kernels=len(compiled),
    )
    directory.note(entry, place)
    return Outcome(compiled, directory, are_per_kernel() and stub is None)

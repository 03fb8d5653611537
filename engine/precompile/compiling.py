"""Compiles recorded kernels into Triton's cache, several at a time."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from engine.errors import ConfigError
from engine.precompile.gpus import KnownGPU
from engine.precompile.launchers import build_launcher
from engine.precompile.recorded_kernels import Kernel


@dataclass(frozen=True)
class Compiled:
    """A kernel that is in the cache. is_new: it was not there before. shared_bytes: of shared memory for a program."""

    name: str
    is_new: bool
    shared_bytes: int


def compile_all(
    kernels: Sequence[Kernel],
    gpu: KnownGPU,
    directory: Path,
    jobs: int,
    stub: Path | None,
    on_progress: Callable[[int, int], None],
) -> list[Compiled]:
    """Compile what `directory`, a cache of Triton's, does not hold yet. `on_progress(done, in all)`.

    stub: see `build_launcher`; None builds none.

    The processes are forked, since what a kernel is compiled from does not travel; Triton is then not at work in this
    one, and torch's threads are idle.

    Raises:
        ConfigError: the GPU has no room for a kernel, or a process came to an end, as for want of memory.
    """
    triton.knobs.cache.dir = str(directory)
    triton.knobs.compilation.store_binary_only = True  # the stages before it are for those who read them
    done: list[Compiled] = []
    context = multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(jobs, context, _inherit, (kernels, stub)) as pool:
            futures = [pool.submit(_compile, place) for place in range(len(kernels))]
            try:
                for future in as_completed(futures):
                    done.append(fitting(future.result(), gpu))
                    on_progress(len(done), len(kernels))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool:
        raise ConfigError(
            f"a process that compiles came to an end with jobs={jobs}, most likely for want of memory: give fewer jobs"
        ) from None
    return done


def fitting(compiled: Compiled, gpu: KnownGPU) -> Compiled:
    """The same, where the GPU has room for it.

    Raises:
        ConfigError: it has not.
    """
    if compiled.shared_bytes > gpu.gpu.shared_bytes:
        raise ConfigError(
            f"{compiled.name} needs {compiled.shared_bytes} bytes of shared memory, and {gpu.title} has "
            f"{gpu.gpu.shared_bytes} for a program: an engine of these settings does not start there"
        )
    return compiled


_kernels: Sequence[Kernel] = ()
_stub: Path | None = None


def _inherit(kernels: Sequence[Kernel], stub: Path | None) -> None:
    """In a process of the pool."""
    global _kernels, _stub
    _kernels, _stub = kernels, stub


def _compile(place: int) -> Compiled:
    kernel = _kernels[place]
    with _noticed() as hits:
        compiled = triton.compile(kernel.source, target=kernel.target, options=kernel.options)
    if _stub is not None:
        build_launcher(kernel.source, compiled.metadata, _stub)
    return Compiled(kernel.name, not all(hits), compiled.metadata.shared)


@contextmanager
def _noticed() -> Iterator[list[bool]]:
    """Whether what is compiled within was found in the cache."""
    hits: list[bool] = []

    def notice(*, cache_hit: bool, **_others: Any) -> None:
        hits.append(cache_hit)

    triton.knobs.compilation.listener = notice
    try:
        yield hits
    finally:
        triton.knobs.compilation.listener = None

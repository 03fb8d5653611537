"""`python -m tools.pretended_gpu pytest tests/kernels`, or a module that is run as a program in place of pytest."""

import os
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from engine.errors import ConfigError
from engine.kernels.pdl import INTERPRETED
from engine.kernels.target import aimed_at
from engine.precompile.compiling import compile_all
from engine.precompile.gpus import known_gpu
from engine.precompile.launchers import are_per_kernel, driver_stub
from engine.precompile.recorded_kernels import recorded
from tools.pretended_gpu import lenient_tests
from tools.pretended_gpu.runtime import pretend
from tools.pretended_gpu.tensors import CudaIsMeta

_console = Console(stderr=True)
_PYTEST = ["-o", "addopts=", "-m", "gpu", "-q", "-rN", "--tb=line", "--assert=plain", "-p", "no:cacheprovider"]


def run(what: str, arguments: list[str]) -> None:
    """Whatever becomes of it: nothing is computed, so that much may fail."""
    if what == "pytest":
        import pytest

        lenient_tests.install()
        pytest.main([*_PYTEST, *arguments])
        return
    sys.argv = [what, *arguments]
    try:
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    except (Exception, SystemExit) as error:
        _console.print(f"{what} ended with {error!r}", markup=False)


def main(
    what: Annotated[str, typer.Argument(help="pytest, or a module such as benchmarks.engine")],
    arguments: Annotated[list[str] | None, typer.Argument(help="behind a -- if they begin with dashes")] = None,
    gpu: Annotated[str, typer.Option(help="what is compiled for")] = "h100",
    output: Annotated[Path, typer.Option(help="the directory to fill: a cache of Triton's")] = Path("/tmp/kernels"),
    jobs: Annotated[int | None, typer.Option(min=1, help="processes; left out: one for each core")] = None,
) -> None:
    """Launch on a GPU that is not there, and compile whatever was launched.

    With TRITON_CACHE_DIR=OUTPUT at the same path on a machine with that GPU, the same then compiles nothing. It takes
    the very same wheel of Triton there, and for versions that compile launchers the same minor version of Python.
    """
    if INTERPRETED:
        raise ConfigError("TRITON_INTERPRET is set, with which nothing is compiled: unset it")
    target = known_gpu(gpu)
    with aimed_at(target.gpu), recorded(target) as kernels:
        pretend(target)
        with CudaIsMeta():
            run(what, arguments or [])
    _console.print(f"{len(kernels)} kernels were launched")

    def show(done: int, total: int) -> None:
        if done % 50 == 0 or done == total:
            _console.print(f"compiled {done} of {total}")

    output.mkdir(parents=True, exist_ok=True)
    count = jobs or len(os.sched_getaffinity(0))
    with driver_stub() if are_per_kernel() else nullcontext() as stub:
        compiled = compile_all(kernels, target, output, count, stub, show)
    print(f"{output}: {len(compiled)} kernels, {sum(kernel.is_new for kernel in compiled)} of them new")


if __name__ == "__main__":
    typer.run(main)

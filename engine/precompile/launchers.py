"""The C modules through which Triton launches kernels, built without a GPU's driver.

Triton 3.6 compiles one for each signature of a kernel, and one for itself, when they are first needed, for which every
container has to have a C compiler. They are kept in the same cache as the kernels, by their source. Later versions
compile one module in all, and keep it by the place of the driver's library, which is not known without the driver.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
import triton.backends.nvidia.driver as nvidia
import triton.runtime.build as build

# One function that every module calls: linkers forget a library that they have no use for.
_STUB = "#include <Python.h>\nvoid cuGetErrorString(void) {}\n"


def are_per_kernel() -> bool:
    """Whether this version of Triton compiles a launcher for each signature."""
    return hasattr(nvidia, "make_launcher")


@contextmanager
def driver_stub() -> Iterator[Path | None]:
    """A directory with a libcuda.so.1 that does nothing, for the length of a `with` block: launchers are linked with
    it, and find the driver's own where they are loaded. None where C cannot be compiled: no compiler, or Python's
    headers are missing."""
    with TemporaryDirectory() as directory:
        source = Path(directory, "stub.c")
        source.write_text(_STUB)
        try:
            library = build._build("stub", str(source), directory, [], [], [], ["-Wl,-soname,libcuda.so.1"])
        except (RuntimeError, OSError, subprocess.CalledProcessError):
            yield None
            return
        Path(library).rename(Path(directory, "libcuda.so.1"))
        yield Path(directory)


def build_launcher(source: Any, metadata: Any, stub: Path) -> None:
    """Put the launcher of a compiled kernel, and Triton's own module, into the cache, if they are not there. source: it
    was compiled from. stub: see `driver_stub`."""
    triton.knobs.nvidia.libcuda_path = str(stub)
    load, build._load_module_from_path = build._load_module_from_path, lambda _name, _path: _NotLoaded()
    try:
        nvidia.CudaUtils()
        nvidia.CudaLauncher(source, metadata)
    finally:
        build._load_module_from_path = load


class _NotLoaded:
    """Stands for a module that only a machine with the driver can load."""

    def __getattr__(self, _name: str) -> None: ...

"""Lets two builds of one version of Triton find each other's kernels. Python imports it by itself from PYTHONPATH.

Triton's cache goes by a hash of Triton's own files and by what ptxas calls itself, which differ between a wheel and a
build that came with something else. With this directory first on PYTHONPATH on both sides, the version counts alone. In
3.6 the hash of a function also depends on which of the functions it calls were hashed before; here it does not.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def _pin_key(module: Any) -> None:
    from importlib.metadata import version

    if hasattr(module, "triton_key"):
        key = f"{version('triton').partition('+')[0]}-pinned"
        module.triton_key = lambda: key


def _pin_hashes(module: Any) -> None:
    plain = module.DependenciesFinder._update_hash

    def update_hash(self: Any, function: Any) -> None:
        _ = function.cache_key  # before its globals are merged
        plain(self, function)

    module.DependenciesFinder._update_hash = update_hash


def _pin_backend(module: Any) -> None:
    module.CUDABackend.hash = lambda self: f"ptxas-pinned-{self.target.arch}"


_PINS = {
    "triton.runtime.cache": _pin_key,
    "triton.compiler.compiler": _pin_key,
    "triton.runtime.jit": _pin_hashes,
    "triton.backends.nvidia.compiler": _pin_backend,
}


class _PinningLoader(Loader):
    def __init__(self, loader: Any, name: str) -> None:
        self._loader = loader
        self._name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _PINS[self._name](module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _PinningFinder(MetaPathFinder):
    """Nothing is imported before somebody imports Triton."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:  # noqa: ARG002
        if fullname not in _PINS:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _PinningLoader(spec.loader, fullname)
        return spec


sys.meta_path.insert(0, _PinningFinder())

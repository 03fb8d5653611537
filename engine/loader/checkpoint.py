"""The one view of a model on disk that the rest of the engine has, whatever format it is in.

Whoever reads headers only, as `serve run` and the HTTP processes do, does not wait for torch to be imported.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from engine.config import ModelConfig
from engine.errors import ModelError
from engine.loader.generation_defaults import GenerationDefaults
from engine.loader.gguf_file import GGUFFile
from engine.loader.safetensors_directory import SafetensorsDirectory
from engine.loader.tensor_info import TensorInfo

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]


class Checkpoint(Protocol):
    """A model on disk, opened by its headers; tensors go by Hugging Face's names."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def generation(self) -> GenerationDefaults: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """In the order of file and offset: reading in this order lets the system read ahead."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for equal models wherever they lie, and different, as good as surely, for different ones."""
        ...

    def load(self, name: str) -> "torch.Tensor":
        """One tensor on the CPU: a view of the mapped file in its stored format, or, for a quantised type, float32.

        Raises:
            ModelError: there is no such tensor, or it cannot be read.
        """
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face directory or a GGUF file; reads headers and configs, no weights.

    Raises:
        ModelError: it is neither, or it is malformed or unsupported; names file and field.
    """
    if path.is_file():
        return GGUFFile(path)
    if not path.is_dir():
        raise ModelError(f"{path}: there is no such file or directory")
    if not (path / "config.json").exists():
        ggufs = sorted(path.glob("*.gguf"))
        hint = f"; to serve the GGUF file in it, give its path: {ggufs[0]}" if ggufs else ""
        raise ModelError(f"{path / 'config.json'}: is missing{hint}")
    return SafetensorsDirectory(path)

"""A checkpoint in Hugging Face's layout: config.json beside one or many safetensors files."""

import re
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from engine.config import Quantization
from engine.errors import ModelError
from engine.loader.hf_config import read_generation_defaults, read_model_config
from engine.loader.json_fields import read_json_object
from engine.loader.messages import shown
from engine.loader.safetensors_header import SafetensorsHeader, read_safetensors_header
from engine.loader.tensor_info import StoredTensor, weights_digest

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")


class SafetensorsDirectory:
    """Implements `engine.loader.checkpoint.Checkpoint`. Opening it reads headers and configs only.

    Raises:
        ModelError: a file is missing, cut short, malformed or unsupported; names file and field.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_model_config(path)
        self.generation = read_generation_defaults(path)
        self._headers, self.tensors = _collect_tensors(path, self.config.stored_quantization is not Quantization.NONE)
        self._handles: dict[Path, Any] = {}

    def load(self, name: str) -> "torch.Tensor":
        """The tensor as it is stored, a view of the mapped file: its pages are read when they are used.

        Raises:
            ModelError: there is no such tensor, or the file has changed since it was opened.
        """
        info = self.tensors.get(name)
        if info is None:
            raise ModelError(f"{self.path}: tensor {name!r} is missing")
        try:
            if info.file not in self._handles:
                self._handles[info.file] = safe_open(info.file, framework="pt", device="cpu")
            tensor: torch.Tensor = self._handles[info.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{info.file}: tensor {name!r}: cannot be read: {error}") from None
        if tuple(tensor.shape) != info.shape or str(tensor.dtype) != f"torch.{info.dtype}":
            raise ModelError(f"{info.file}: tensor {name!r}: the file has changed since it was opened")
        return tensor

    @cached_property
    def fingerprint(self) -> str:
        """Identity of config, headers, sizes and a sample of the weights; where the files lie does not matter."""
        digest = sha256(repr(self.config).encode())
        for header in self._headers:
            digest.update(header.file.name.encode())
            digest.update(header.digest)
        digest.update(weights_digest(self.tensors.values()))
        return digest.hexdigest()


def _collect_tensors(directory: Path, int8_weights: bool) -> tuple[list[SafetensorsHeader], dict[str, StoredTensor]]:
    """Headers of every file in use, and the tensors in the order of file and offset."""
    index = directory / INDEX_NAME
    if index.exists():
        return _from_index(directory, index, int8_weights)
    files = [directory / SINGLE_NAME] if (directory / SINGLE_NAME).exists() else _loose_files(directory)
    headers = [read_safetensors_header(file, int8_weights) for file in files]
    tensors: dict[str, StoredTensor] = {}
    for header in headers:
        for name, info in header.tensors.items():
            if name in tensors:
                raise ModelError(f"{info.file}: tensor {shown(name)}: is also in {tensors[name].file.name}")
            tensors[name] = info
    return headers, tensors


def _loose_files(directory: Path) -> list[Path]:
    # Mistral's repositories hold a second copy under its own tensor names, consolidated.safetensors.
    files = [file for file in sorted(directory.glob("*.safetensors")) if not file.name.startswith("consolidated")]
    if not files:
        pickled = next(directory.glob("*.bin"), None)
        hint = f"; {pickled.name} is pickled and is not loaded, convert it to safetensors" if pickled else ""
        raise ModelError(f"{directory}: holds no safetensors file{hint}")
    return files


def _from_index(
    directory: Path, index: Path, int8_weights: bool
) -> tuple[list[SafetensorsHeader], dict[str, StoredTensor]]:
    weight_map = read_json_object(index).optional_object("weight_map")
    if weight_map is None:
        raise ModelError(f"{index}: weight_map: is missing")
    names_by_file: dict[str, set[str]] = {}
    for name, value in weight_map.members():
        names_by_file.setdefault(_file_name(index, name, value), set()).add(name)
    headers: list[SafetensorsHeader] = []
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(names_by_file):
        file = directory / file_name
        if not file.exists():
            raise ModelError(f"{index}: weight_map: {shown(file_name)} does not exist")
        header = read_safetensors_header(file, int8_weights)
        headers.append(header)
        tensors.update({name: info for name, info in header.tensors.items() if name in names_by_file[file_name]})
        absent = names_by_file[file_name].difference(header.all_names)
        if absent:
            raise ModelError(f"{file}: tensor {shown(min(absent))}: is missing, though {INDEX_NAME} says it is here")
    if not headers:
        raise ModelError(f"{index}: weight_map: is empty")
    return headers, tensors


def _file_name(index: Path, tensor: str, value: Any) -> str:
    """A plain file name: an index must not reach outside its directory."""
    if not isinstance(value, str) or _PLAIN_NAME.fullmatch(value) is None:
        raise ModelError(
            f"{index}: weight_map: {shown(tensor)} must be in a safetensors file beside it, not in {shown(value)}"
        )
    return value

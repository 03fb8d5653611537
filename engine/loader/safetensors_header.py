"""The header of a safetensors file, checked before the file is handed to the `safetensors` library.

The library refuses offsets that overlap or leave the file, but parses a header of 99 MB and names neither the tensor
nor the file when it refuses. Format: https://github.com/huggingface/safetensors#format
"""

import math
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeGuard

import orjson

from engine.errors import ModelError
from engine.loader.messages import shown
from engine.loader.tensor_info import StoredTensor

# An entry takes about 120 bytes, so this is room for 140,000 tensors; a shard of the largest models has under 5,000.
MAX_HEADER_BYTES = 16 * 1024**2
MAX_DIMENSIONS = 8
_MAX_DIMENSION = 1 << 48

_ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
_WEIGHT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TENSOR_DTYPES = {**_WEIGHT_DTYPES, "I8": "int8"}


@dataclass(frozen=True)
class SafetensorsHeader:
    """`tensors`: the floating-point tensors of `file` in the order of their offsets. `all_names`: these and the
    tensors that were left out. `digest`: of the raw header."""

    file: Path
    tensors: dict[str, StoredTensor]
    all_names: frozenset[str]
    digest: bytes


def read_safetensors_header(file: Path, int8_weights: bool = False) -> SafetensorsHeader:
    """Read and check the header; the tensors' data are not touched.

    A buffer in another format than F32, F16 and BF16 (an attention mask, say) is left out; a weight or bias is refused,
    but for weights in I8 where `int8_weights` says that they are meant.

    Raises:
        ModelError: the file cannot be read, is cut short, or its header is malformed; names file and tensor.
    """
    raw, file_bytes = _read_raw(file)
    try:
        entries = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ModelError(f"{file}: header: is not valid JSON: {error}") from None
    if not isinstance(entries, dict):
        raise ModelError(f"{file}: header: must be a JSON object")
    entries.pop("__metadata__", None)
    data_start = 8 + len(raw)
    stored = {name: _read_entry(file, name, entry, data_start, file_bytes) for name, entry in entries.items()}
    ordered = sorted(stored.items(), key=lambda item: (item[1].offset_bytes, item[1].size_bytes))
    _check_contiguous(file, ordered, data_start, file_bytes)
    usable = {name: info for name, info in ordered if _is_usable(name, info, int8_weights)}
    return SafetensorsHeader(file, usable, frozenset(stored), sha256(raw).digest())


def _read_raw(file: Path) -> tuple[bytes, int]:
    """The header's JSON text and the size of the whole file."""
    try:
        file_bytes = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise ModelError(f"{file}: header length: the file ends after {len(prefix)} bytes")
            if header_bytes > MAX_HEADER_BYTES:
                raise ModelError(f"{file}: header length: {header_bytes} bytes; at most {MAX_HEADER_BYTES} are allowed")
            if header_bytes > file_bytes - 8:
                raise ModelError(f"{file}: header length: {header_bytes} bytes, but only {file_bytes - 8} follow")
            return stream.read(header_bytes), file_bytes
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror or error}") from None


def _read_entry(file: Path, name: str, entry: Any, data_start: int, file_bytes: int) -> StoredTensor:
    def fail(field: str, problem: str) -> ModelError:
        return ModelError(f"{file}: tensor {shown(name)}: {field}: {problem}")

    if not isinstance(entry, dict):
        raise fail("entry", "must be an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise fail("dtype", f"{shown(dtype)} is not known; known are {', '.join(_ITEM_BYTES)}")
    if not _is_integers(shape, _MAX_DIMENSION) or len(shape) > MAX_DIMENSIONS:
        raise fail("shape", f"must be a list of at most {MAX_DIMENSIONS} sizes")
    if not _is_integers(offsets, 1 << 62) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail("data_offsets", "must be two ascending byte offsets")
    begin, end = offsets
    if data_start + end > file_bytes:
        raise fail("data_offsets", f"end {data_start + end - file_bytes} bytes past the end of the file")
    wanted_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if end - begin != wanted_bytes:
        raise fail("data_offsets", f"span {end - begin} bytes; shape {shown(shape)} of {dtype} takes {wanted_bytes}")
    return StoredTensor(tuple(shape), _TENSOR_DTYPES.get(dtype, dtype), file, data_start + begin, wanted_bytes)


def _is_integers(value: Any, limit: int) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < limit for item in value
    )


def _check_contiguous(file: Path, ordered: list[tuple[str, StoredTensor]], data_start: int, file_bytes: int) -> None:
    """Tensors must fill the file without overlap, gap or trailing bytes: the format says so, the library insists."""
    position = data_start
    for name, info in ordered:
        if info.offset_bytes != position:
            problem = "overlap another tensor" if info.offset_bytes < position else "leave a gap before this tensor"
            raise ModelError(f"{file}: tensor {shown(name)}: data_offsets: {problem}")
        position = info.end_bytes
    if position != file_bytes:
        raise ModelError(f"{file}: header: {file_bytes - position} bytes at the end of the file belong to no tensor")


def _is_usable(name: str, info: StoredTensor, int8_weights: bool) -> bool:
    if info.dtype in _WEIGHT_DTYPES.values():
        return True
    if int8_weights and info.dtype == "int8" and name.endswith(".weight"):
        return True
    if name.endswith((".weight", ".bias")):
        accepted = ", ".join(_WEIGHT_DTYPES)
        stored = next((raw for raw, dtype in _TENSOR_DTYPES.items() if dtype == info.dtype), info.dtype)
        raise ModelError(f"{info.file}: tensor {shown(name)}: dtype: {stored} is not supported; use {accepted}")
    return False

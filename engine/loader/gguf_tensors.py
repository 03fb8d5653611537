"""The header of a GGUF file: metadata and the table of tensors, checked against the file's size."""

import math
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from engine.errors import ModelError
from engine.loader.gguf_cursor import GGUFCursor
from engine.loader.gguf_metadata import GGUFMetadata, map_gguf, read_entries, read_preamble
from engine.loader.tensor_info import StoredTensor

MAX_DIMENSIONS = 4  # the format's own limit
MAX_ALIGNMENT_BYTES = 1 << 20
DEFAULT_ALIGNMENT_BYTES = 32

_PLAIN = {
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}
_QUANTISED = (
    GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q4_K,
    GGMLQuantizationType.Q5_K,
    GGMLQuantizationType.Q6_K,
)
ACCEPTED_TYPES = (*_PLAIN, *_QUANTISED)


@dataclass(frozen=True)
class GGUFHeader:
    """`tensors`: by the file's own names, in the order of their offsets, shapes turned to outermost dimension first.
    `digest`: of everything before the tensors' data."""

    metadata: GGUFMetadata
    tensors: dict[str, StoredTensor]
    digest: bytes


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read and check the header; no tensor's data are touched.

    Raises:
        ModelError: the file cannot be read, is no GGUF file, is cut short, malformed, one of several parts, or holds
            a tensor of a type that is not accepted; names file and field.
    """
    with map_gguf(path) as buffer:
        cursor = GGUFCursor(buffer, path)
        num_tensors, num_entries = read_preamble(cursor)
        metadata = GGUFMetadata(path, read_entries(cursor, num_entries))
        if "split.count" in metadata and metadata.integer("split.count") > 1:
            raise metadata.fail("split.count", "the model is split into several files; merge them into one")
        alignment = _alignment_bytes(metadata)
        relative: dict[str, StoredTensor] = {}
        for index in range(num_tensors):
            name = cursor.name(f"tensor name {index}")
            if name in relative:
                raise cursor.fail(f"tensor {name!r}", "occurs twice")
            relative[name] = _read_tensor(cursor, name, path)
        header_bytes = cursor.position
        data_start = -(-header_bytes // alignment) * alignment
        tensors = _place(relative, data_start, alignment, len(buffer))
        return GGUFHeader(metadata, tensors, sha256(memoryview(buffer)[:header_bytes].tobytes()).digest())


def _alignment_bytes(metadata: GGUFMetadata) -> int:
    alignment = metadata.integer("general.alignment", default=DEFAULT_ALIGNMENT_BYTES)
    if not 8 <= alignment <= MAX_ALIGNMENT_BYTES or alignment & (alignment - 1):
        raise metadata.fail("general.alignment", f"must be a power of two from 8 to {MAX_ALIGNMENT_BYTES}")
    return alignment


def _read_tensor(cursor: GGUFCursor, name: str, path: Path) -> StoredTensor:
    """One row of the tensor table; the offset is still relative to the start of the data."""
    field = f"tensor {name!r}"
    num_dimensions = cursor.u32(field)
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise cursor.fail(field, f"has {num_dimensions} dimensions; 1 to {MAX_DIMENSIONS} are allowed")
    dimensions = [cursor.u64(field) for _ in range(num_dimensions)]  # innermost first
    if min(dimensions) < 1:
        raise cursor.fail(field, f"has an empty dimension: {dimensions}")
    type_number = cursor.u32(field)
    offset = cursor.u64(field)
    try:
        tensor_type = GGMLQuantizationType(type_number)
    except ValueError:
        raise cursor.fail(field, f"has type number {type_number}, which is not known") from None
    if tensor_type not in ACCEPTED_TYPES:
        accepted = ", ".join(accepted.name for accepted in ACCEPTED_TYPES)
        raise cursor.fail(field, f"has type {tensor_type.name}, which is not supported; supported are {accepted}")
    block_elements, block_bytes = GGML_QUANT_SIZES[tensor_type]
    if dimensions[0] % block_elements:
        raise cursor.fail(field, f"has rows of {dimensions[0]}, not whole blocks of {block_elements}")
    size_bytes = math.prod(dimensions) // block_elements * block_bytes
    dtype = _PLAIN.get(tensor_type, tensor_type.name)
    return StoredTensor(tuple(reversed(dimensions)), dtype, path, offset, size_bytes)


def _place(
    relative: dict[str, StoredTensor], data_start: int, alignment: int, file_bytes: int
) -> dict[str, StoredTensor]:
    """Turn offsets into the file's, and check that tensors are aligned, apart from one another and inside the file."""
    placed: dict[str, StoredTensor] = {}
    position = data_start
    for name, info in sorted(relative.items(), key=lambda item: item[1].offset_bytes):
        start = data_start + info.offset_bytes
        end = start + info.size_bytes
        if info.offset_bytes % alignment:
            raise ModelError(f"{info.file}: tensor {name!r}: offset {info.offset_bytes} is not aligned to {alignment}")
        if start < position:
            raise ModelError(f"{info.file}: tensor {name!r}: its data overlap another tensor's")
        if end > file_bytes:
            raise ModelError(f"{info.file}: tensor {name!r}: its data end at byte {end}, the file at {file_bytes}")
        position = end
        placed[name] = StoredTensor(info.shape, info.dtype, info.file, start, info.size_bytes)
    return placed

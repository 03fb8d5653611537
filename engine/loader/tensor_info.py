"""What a checkpoint's header says about one tensor."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

# Formats that a tensor is mapped in as it lies in the file, by the name used in `TensorInfo.dtype`, which is torch's.
PLAIN_DTYPES = frozenset(("float32", "float16", "bfloat16", "int8"))

_SAMPLE_BYTES = 64


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its shape (as in Hugging Face checkpoints, outermost dimension first), the format it is stored in
    (one of PLAIN_DTYPES, or GGML's name of a quantised type such as "Q4_1") and the file it is in."""

    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """... and where in the file its bytes are."""

    offset_bytes: int
    size_bytes: int

    @property
    def end_bytes(self) -> int:
        return self.offset_bytes + self.size_bytes


def weights_digest(tensors: Iterable[StoredTensor]) -> bytes:
    """Digest of a few bytes of every tensor, at its start and in its middle.

    Headers alone are equal for a model and its fine-tunes; the samples tell them apart without reading 16 GB.
    """
    digest = sha256()
    by_file: dict[Path, list[StoredTensor]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    for file, stored in by_file.items():
        with file.open("rb", buffering=0) as stream:
            for tensor in stored:
                for offset in (tensor.offset_bytes, tensor.offset_bytes + tensor.size_bytes // 2):
                    stream.seek(offset)
                    digest.update(stream.read(min(_SAMPLE_BYTES, tensor.end_bytes - offset)))
    return digest.digest()

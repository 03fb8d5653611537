"""A checkpoint in one GGUF file."""

from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from engine.errors import ModelError
from engine.loader.gguf_config import gguf_architecture, read_gguf_config, read_gguf_generation_defaults
from engine.loader.gguf_names import ROPE_FACTORS, hf_tensor_name, is_ignorable
from engine.loader.gguf_tensors import GGUFHeader, read_gguf_header
from engine.loader.tensor_info import PLAIN_DTYPES, StoredTensor, TensorInfo, weights_digest

# Elements dequantised at a time: the library makes several temporaries of this size, and small ones stay in the cache.
_CHUNK_ELEMENTS = 1 << 18


class GGUFFile:
    """Implements `engine.loader.checkpoint.Checkpoint`. Opening it reads the header only.

    Raises:
        ModelError: the file is cut short, malformed or unsupported; names file and field.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header = read_gguf_header(path)
        metadata = self._header.metadata
        architecture = gguf_architecture(metadata)
        self._mapping = _map_file(path)
        self.config = read_gguf_config(self._header, self._frequency_factors())
        self.generation = read_gguf_generation_defaults(metadata)
        self.tensors = _rename(self._header, architecture.qkv_bias, architecture.qk_norm)
        self._permuted = architecture.gguf_permuted

    def load(self, name: str) -> torch.Tensor:
        """The tensor: a view of the mapped file if it is stored as F32, F16 or BF16, else dequantised to float32.

        Query and key weights of Llama files come back in the half-split order of Hugging Face's checkpoints.

        Raises:
            ModelError: there is no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise ModelError(f"{self.path}: tensor {name!r} is missing")
        tensor = self._read(info)
        if self._permuted and name.endswith((".self_attn.q_proj.weight", ".self_attn.k_proj.weight")):
            is_query = name.endswith(".q_proj.weight")
            num_heads = self.config.num_heads if is_query else self.config.num_kv_heads
            tensor = _undo_permutation(tensor, num_heads, f"{self.path}: tensor {name!r}")
        return tensor

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the header, the file's size and a sample of the weights; where the file lies does not matter."""
        digest = sha256(repr(self.config).encode())
        digest.update(self._header.digest)
        digest.update(str(len(self._mapping)).encode())
        digest.update(weights_digest(self._header.tensors.values()))
        return digest.hexdigest()

    def _read(self, info: StoredTensor) -> torch.Tensor:
        stored = self._mapping[info.offset_bytes : info.end_bytes]
        if info.dtype in PLAIN_DTYPES:
            return stored.view(PLAIN_DTYPES[info.dtype]).view(info.shape)
        return _dequantise(stored.numpy(), info)

    def _frequency_factors(self) -> tuple[float, ...] | None:
        """What each rotary frequency is divided by, as Llama 3's scaling is stored in this format."""
        info = self._header.tensors.get(ROPE_FACTORS)
        if info is None:
            return None
        field = f"{self.path}: tensor {ROPE_FACTORS!r}"
        if len(info.shape) != 1 or info.dtype != "float32":
            raise ModelError(f"{field}: must be a vector of float32")
        factors = self._read(info)
        if not bool((torch.isfinite(factors) & (factors > 0)).all()):
            raise ModelError(f"{field}: holds a factor that is not positive")
        return tuple(factors.tolist())


def _map_file(path: Path) -> torch.Tensor:
    """The whole file as bytes, mapped copy-on-write: pages are read when used, and nothing is written back."""
    try:
        size_bytes = path.stat().st_size
        return torch.from_file(str(path), shared=False, size=size_bytes, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path}: cannot be mapped: {str(error).splitlines()[0]}") from None


def _rename(header: GGUFHeader, qkv_bias: bool, qk_norm: bool) -> dict[str, StoredTensor]:
    renamed: dict[str, StoredTensor] = {}
    for gguf_name, info in header.tensors.items():
        if is_ignorable(gguf_name):
            continue
        name = hf_tensor_name(gguf_name, qkv_bias, qk_norm)
        if name is None:  # dropping a weight would change what the model says
            raise ModelError(f"{info.file}: tensor {gguf_name!r}: is not part of the architecture and is not supported")
        renamed[name] = info
    return renamed


def _dequantise(stored: npt.NDArray[np.uint8], info: TensorInfo) -> torch.Tensor:
    """float32 tensor of `info.shape` from its quantised bytes, a slice of rows at a time."""
    row_elements = info.shape[-1]
    num_rows = info.num_elements // row_elements
    rows = stored.reshape(num_rows, -1)
    values = np.empty((num_rows, row_elements), np.float32)
    step = max(1, _CHUNK_ELEMENTS // row_elements)
    tensor_type = GGMLQuantizationType[info.dtype]
    for start in range(0, num_rows, step):
        values[start : start + step] = dequantize(rows[start : start + step], tensor_type)
    return torch.from_numpy(values).view(info.shape)


def _undo_permutation(tensor: torch.Tensor, num_heads: int, field: str) -> torch.Tensor:
    """Rows of one head from interleaved order (r0, i0, r1, i1, ...) to half-split order (r0, r1, ..., i0, i1, ...).

    Converters interleave them so that rotation works on neighbours; left so, perplexity goes from 35 to 400.
    """
    num_rows = tensor.shape[0]
    if num_rows % (2 * num_heads):
        raise ModelError(f"{field}: its {num_rows} rows are not {num_heads} heads of an even size")
    pairs = tensor.reshape(num_heads, num_rows // num_heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)

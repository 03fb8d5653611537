"""A checkpoint in one GGUF file."""

from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from engine.errors import ModelError
from engine.loader.gguf_config import gguf_architecture, read_gguf_config, read_gguf_generation_defaults
from engine.loader.gguf_names import ROPE_FACTORS, hf_tensor_name, is_ignorable
from engine.loader.gguf_tensors import GGUFHeader, read_gguf_header
from engine.loader.tensor_info import PLAIN_DTYPES, StoredTensor, TensorInfo, weights_digest

if TYPE_CHECKING:
    import torch

# Elements dequantised at a time. The library works on groups of 16 rows, which is slow for short rows, so blocks are
# handed over as one long row; and it makes several temporaries, which should stay in the cache. Measured for the
# 135M weights of the default model: 0.93 s row by row, 0.29 s at 2**17, 0.32 s at 2**16, 0.9 s at 2**20.
_CHUNK_ELEMENTS = 1 << 16


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

    def load(self, name: str) -> "torch.Tensor":
        """The tensor: a view of the mapped file if it is stored as F32, F16 or BF16, else dequantised to float32.

        Query and key weights of Llama files come back in the half-split order of Hugging Face's checkpoints.

        Raises:
            ModelError: there is no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise ModelError(f"{self.path}: tensor {name!r} is missing")
        stored = self._mapping[info.offset_bytes : info.end_bytes]
        if self._permuted and name.endswith((".self_attn.q_proj.weight", ".self_attn.k_proj.weight")):
            is_query = name.endswith(".q_proj.weight")
            num_heads = self.config.num_heads if is_query else self.config.num_kv_heads
            if info.shape[0] % (2 * num_heads):
                raise ModelError(f"{self.path}: tensor {name!r}: {info.shape[0]} rows are not {num_heads} even heads")
            stored = _undo_permutation(stored, info.shape[0], num_heads)
        return _as_tensor(stored, info)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the header, the file's size and a sample of the weights; where the file lies does not matter."""
        digest = sha256(repr(self.config).encode())
        digest.update(self._header.digest)
        digest.update(str(len(self._mapping)).encode())
        digest.update(weights_digest(self._header.tensors.values()))
        return digest.hexdigest()

    def _frequency_factors(self) -> tuple[float, ...] | None:
        """What each rotary frequency is divided by, as Llama 3's scaling is stored in this format."""
        info = self._header.tensors.get(ROPE_FACTORS)
        if info is None:
            return None
        field = f"{self.path}: tensor {ROPE_FACTORS!r}"
        if len(info.shape) != 1 or info.dtype != "float32":
            raise ModelError(f"{field}: must be a vector of float32")
        factors = self._mapping[info.offset_bytes : info.end_bytes].view(np.float32)
        if not bool((np.isfinite(factors) & (factors > 0)).all()):
            raise ModelError(f"{field}: holds a factor that is not positive")
        return tuple(factors.tolist())


def _map_file(path: Path) -> npt.NDArray[np.uint8]:
    """The whole file as bytes, mapped copy-on-write: pages are read when used, and nothing is written back."""
    try:
        return np.asarray(np.memmap(path, np.uint8, mode="c"))
    except (OSError, ValueError) as error:
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


def _undo_permutation(stored: npt.NDArray[np.uint8], num_rows: int, num_heads: int) -> npt.NDArray[np.uint8]:
    """Rows of each head from interleaved order (r0, i0, r1, i1, ...) to half-split order (r0, r1, ..., i0, i1, ...).

    Converters interleave them so that rotation works on neighbours; left so, perplexity goes from 35 to 400. A row is
    a whole number of quantised blocks, so its bytes can be moved before they are decoded.
    """
    pairs = stored.reshape(num_heads, num_rows // num_heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(-1)


def _as_tensor(stored: npt.NDArray[np.uint8], info: TensorInfo) -> "torch.Tensor":
    """The tensor whose bytes are `stored`: a view of them, or float32 if they are quantised."""
    import torch

    if info.dtype in PLAIN_DTYPES:
        return torch.from_numpy(stored).view(getattr(torch, info.dtype)).view(info.shape)
    return torch.from_numpy(_dequantise(stored, info)).view(info.shape)


def _dequantise(stored: npt.NDArray[np.uint8], info: TensorInfo) -> npt.NDArray[np.float32]:
    """Flat float32 values of quantised bytes."""
    tensor_type = GGMLQuantizationType[info.dtype]
    block_elements, block_bytes = GGML_QUANT_SIZES[tensor_type]
    step = _CHUNK_ELEMENTS // block_elements
    num_blocks = info.num_elements // block_elements
    values = np.empty(info.num_elements, np.float32)
    for start in range(0, num_blocks, step):
        end = min(start + step, num_blocks)
        chunk = stored[start * block_bytes : end * block_bytes].reshape(1, -1)
        with np.errstate(all="ignore"):  # a hostile scale makes NaN, which the sampler finds, not a warning
            values[start * block_elements : end * block_elements] = dequantize(chunk, tensor_type)[0]
    return values

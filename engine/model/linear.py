"""Matrix products with weights, always called with the same number of rows.

A matrix library picks its kernel, and so its order of summation, by shape. Cutting every input into tiles of
`row_tile` rows makes the shape, and with it the bits of a row, independent of how many rows there are.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from engine.model.int8_linear import Int8Linear
from engine.quantize.int8_weight import Int8Weight, Weight

# oneDNN's blocked weights: measured on 2 cores (AVX-512 BF16), SmolLM2-135M at 8 rows: 13 ms a pass against 25 ms
# with plain row-major weights; at 16 rows 18 ms. One row costs as much as eight: the pass is bound by memory.
CPU_ROW_TILE = 8
CUDA_ROW_TILE = 64  # cuBLAS takes about as long for 64 rows as for 8: still bound by the weights


def row_tile(device: torch.device) -> int:
    """Rows of one product on this device."""
    return CUDA_ROW_TILE if device.type == "cuda" else CPU_ROW_TILE


def padded_rows(num_rows: int, tile: int) -> int:
    """`num_rows` rounded up to whole tiles. Where any number will do (tile 1), few different ones are used: the library
    makes a kernel for each."""
    if tile == 1:
        if num_rows <= CPU_ROW_TILE:
            return 1 << (num_rows - 1).bit_length() if num_rows else 0
        tile = CPU_ROW_TILE
    return -(-num_rows // tile) * tile


class Linear:
    """y = x Wᵀ + b for x [N, in_features], N a multiple of `row_tile`; returns [N, out_features]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.row_tile = row_tile(weight.device)
        self._product = _packed_product(weight, bias) or _plain_product(weight, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[0] % self.row_tile == 0, "rows are padded to whole tiles"
        if x.shape[0] == self.row_tile:
            return self._product(x)
        out = x.new_empty((x.shape[0], self.out_features))
        for start in range(0, x.shape[0], self.row_tile):
            out[start : start + self.row_tile] = self._product(x[start : start + self.row_tile])
        return out


def make_linear(weight: Weight, bias: torch.Tensor | None = None) -> "Linear | Int8Linear":
    """The product with a matrix in the format that it is in."""
    return Int8Linear(weight, bias) if isinstance(weight, Int8Weight) else Linear(weight, bias)


def packs_weights(dtype: torch.dtype) -> bool:
    """Whether a product on this CPU has weights in a layout of its own, beside the tensor that they came in."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is not torch.float16 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


Product = Callable[[torch.Tensor], torch.Tensor]


def _plain_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    return lambda x: F.linear(x, weight, bias)


def _packed_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product | None:
    """The product with weights in oneDNN's blocked layout, or None where oneDNN has none for this device and dtype."""
    if weight.device.type != "cpu" or not packs_weights(weight.dtype):
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), CPU_ROW_TILE)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
